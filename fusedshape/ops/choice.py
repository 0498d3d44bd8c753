"""Which engine computes a layer in each direction, and why another cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fusedshape import native
from fusedshape.compiling import constant_for_dynamo
from fusedshape.ops import dispatch
from fusedshape.ops.checks import Geometry
from fusedshape.ops.engines import ATEN, REGISTRY
from fusedshape.ops.engines.native import why_not_native
from fusedshape.ops.engines.protocol import Engines, LayerEngine
from fusedshape.ops.problem import Direction, Problem, problem_of
from fusedshape.spec import ActSpec, saves_output
from fusedshape.validate import shown

Engine = Literal["auto", "aten", "triton", "native"]
ENGINES: tuple[str, ...] = ("auto", "aten", "triton", "native")
#: Names the fastest engine of a direction, or None where it has not been measured.
Chooser = Callable[[Direction, Problem], str | None]

_ALL_ATEN = Engines(ATEN, ATEN, ATEN)
_chooser: Chooser | None = None
_remembers = True
_remembered: dict[Any, Engines] = {}
_REMEMBERED = 4096


def install_chooser(chooser: Chooser | None, steady: bool = True) -> Chooser | None:
    """Let `chooser` say what "auto" means, for each direction of each problem worth a question.

    It may be called for every layer on every call, so it must be quick, and it must not raise.
    Where it returns None, or names an engine that cannot run, `pinned_engine`'s choice holds.

    Args:
        chooser: who knows measurements; None for the pinned choice alone.
        steady: whether it always answers alike, until `forget_choices`.

    Returns:
        The chooser until now.

    Example:
        >>> previous = install_chooser(lambda direction, problem: None)
        >>> _ = install_chooser(previous)
    """
    global _chooser, _remembers
    previous, _chooser = _chooser, chooser
    _remembers = steady
    forget_choices()
    return previous


def forget_choices() -> None:
    """Ask the chooser anew, about every layer.

    Example:
        >>> forget_choices()
    """
    _remembered.clear()


def choose_engine(
    direction: Direction, problem: Problem, asked: str, obstacle: Callable[[str], str | None]
) -> str:
    """Name of the engine that computes one direction of a layer.

    Args:
        direction: one of `DIRECTIONS`.
        problem: the layer and its input.
        asked: "auto", or an engine's name to insist on it.
        obstacle: says why an engine other than "aten" cannot run the layer; None if it can.

    Returns:
        One of `ENGINES`, but not "auto".

    Raises:
        ValueError: an unknown engine, or one that cannot run the layer.

    Example:
        >>> shapes = (2, 8, 5, 5), (8, 8, 3, 3), True, (1, 1), (1, 1), (1, 1)
        >>> problem = Problem("cpu", None, torch.float32, *shapes, 1, "relu", True)
        >>> choose_engine("fprop", problem, "auto", lambda name: None)
        'aten'
    """
    if asked == "auto":
        measured = None if _chooser is None else _chooser(direction, problem)
        for name in (measured, pinned_engine(problem)):
            if name == "aten" or (name in REGISTRY and obstacle(name) is None):
                return name
        return "aten"
    if not isinstance(asked, str) or asked not in REGISTRY:
        raise ValueError(f"unknown engine {shown(asked)}; known: {', '.join(ENGINES)}")
    reason = None if asked == "aten" else obstacle(asked)
    if reason is not None:
        raise ValueError(f"engine {asked!r} cannot run this layer: {reason}")
    return asked


# With fewer rows a linear layer is the reading of its weight, which csrc copies first.
_WORTH_PACKING = 16


def pinned_engine(problem: Problem) -> str:
    """The engine for a layer that has not been measured.

    On CUDA "aten". On the CPU "native" for float32 in channels_last layout: for convolutions of 32
    channels and more, those with several taps and no stride of 256 and more; and for linear layers
    of 16 rows and more on AMD's CPUs, which torch leaves to MKL.

    Example:
        >>> shapes = (8, 64, 14, 14), (64, 64, 1, 1), True, (1, 1), (0, 0), (1, 1)
        >>> pinned_engine(Problem("cpu", None, torch.float32, *shapes, 1, "relu", True))
        'native'
    """
    if problem.device != "cpu" or problem.dtype != torch.float32 or not problem.channels_last:
        return "aten"
    out, per_group, *kernel = problem.weight
    if not kernel:
        # A comparison under torch.compile would be a guard on sizes that may vary.
        few = not torch.compiler.is_compiling() and math.prod(problem.input[:-1]) < _WORTH_PACKING
        return "aten" if few or not _is_amd() else "native"
    dense = any(k > 1 for k in kernel) and all(s == 1 for s in problem.stride)
    least = 256 if dense else 32  # below, oneDNN's convolution is quicker by more than one pass
    return "native" if min(out, per_group) >= least else "aten"


@constant_for_dynamo
def _is_amd() -> bool:
    return native.cpu_vendor() == "AuthenticAMD"


def why_not(name: str, x: Tensor, weight: Tensor, groups: int) -> str | None:
    """Why "triton" or "native" cannot run a layer on this input; None if it can.

    Example:
        >>> x = torch.zeros(2, 8, 5, 5, dtype=torch.float64)
        >>> why_not("native", x, torch.zeros(4, 8, 3, 3, dtype=torch.float64), 1) is None
        False
    """
    missing = dispatch.why_not(name, x.device.type)
    if missing is not None:
        return str(missing)
    if name == "native":
        return why_not_native(x, weight, groups)
    if weight.ndim == 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    from fusedshape.kernels import conv  # imports Triton

    return conv.why_not(x, weight, groups=groups)


# The engines beside "aten" that "auto" and the tuning consider, by the tensors' device.
_SERVED = {"cuda": ("triton",), "cpu": ("triton",) if dispatch.INTERPRET else ("native",)}
# An input of fewer numbers on the CPU is not worth the time that choosing takes.
_WORTH_CHOOSING = 1 << 15


def rivals(device: str) -> tuple[str, ...]:
    """The engines beside "aten" that may compute a layer on a type of device.

    Example:
        >>> rivals("cuda")
        ('triton',)
    """
    return _SERVED.get(device, ())


def only_aten(asked: str, x: Tensor) -> bool:
    """Whether torch computes a layer in every direction, known without looking at the problem."""
    if asked != "auto":
        return asked == "aten"
    served = rivals(x.device.type)
    if "native" not in served:
        return not served or _chooser is None  # nobody else is pinned
    if x.dtype != torch.float32 or not native.available():
        return True
    # Under torch.compile a comparison would be a guard on sizes that may vary.
    return not torch.compiler.is_compiling() and x.numel() < _WORTH_CHOOSING


def asked_engine(engine: Engine, backend: str) -> str:
    """The engine that a caller's two choices ask for.

    Who names a backend wants its pass, and so, unless told otherwise, the engine that has one.

    Raises:
        ValueError: kernels named under a torch.func transform or an export.
    """
    dispatch.refuse_transforms("engine", engine)
    return "aten" if engine == "auto" and backend != "auto" else engine


def forward_engine(
    asked: str, x: Tensor, weight: Tensor, spec: ActSpec, geometry: Geometry | None
) -> LayerEngine:
    """The engine of a layer that nobody will go back through.

    Raises:
        ValueError: as `choose_engine`.
    """
    return _engines(("fprop",), asked, x, weight, spec, geometry)[0]


def engines_for(
    asked: str,
    x: Tensor,
    weight: Tensor,
    spec: ActSpec,
    geometry: Geometry | None,
    chained: bool = False,
) -> Engines:
    """The engines of one layer on this input; `chained` if its dgrad will go on through a layer.

    Raises:
        ValueError: as `choose_engine`.
    """
    if only_aten(asked, x):
        return _ALL_ATEN  # the quickest answer, for the smallest layers
    directions: tuple[Direction, ...] = ("fprop", "dgrad_act" if chained else "dgrad", "wgrad")
    # On CUDA the chooser looks at torch's switches, too.
    if not _remembers or x.device.type != "cpu" or torch.compiler.is_compiling():
        return Engines(*_engines(directions, asked, x, weight, spec, geometry))
    sizes = None if geometry is None else (*map(tuple, geometry[:3]), geometry[5])
    layer = asked, chained, spec.activation, saves_output(spec, x.dtype)
    key = (*layer, x.dtype, x.shape, x.stride(), weight.shape, sizes)
    found = _remembered.get(key)
    if found is None:
        if len(_remembered) >= _REMEMBERED:
            _remembered.clear()
        found = Engines(*_engines(directions, asked, x, weight, spec, geometry))
        _remembered[key] = found
    return found


def _engines(
    directions: tuple[Direction, ...],
    asked: str,
    x: Tensor,
    weight: Tensor,
    spec: ActSpec,
    geometry: Geometry | None,
) -> list[LayerEngine]:
    if only_aten(asked, x):
        return [ATEN] * len(directions)
    problem = problem_of(x, weight, spec, geometry)
    known: dict[str, str | None] = {}

    def obstacle(name: str) -> str | None:
        if name not in known:
            known[name] = why_not(name, x, weight, problem.groups)
        return known[name]

    return [REGISTRY[choose_engine(d, problem, asked, obstacle)] for d in directions]
