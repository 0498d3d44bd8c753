"""Which engine computes a layer in each direction: the caller's, the measured or the pinned one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fusedshape import native
from fusedshape.ops import dispatch
from fusedshape.ops.checks import transformed
from fusedshape.ops.engines import ATEN, ENGINES, RIVALS
from fusedshape.ops.engines.protocol import Engines, LayerEngine
from fusedshape.ops.layer import Layer
from fusedshape.ops.problem import Direction, Problem, problem_of
from fusedshape.spec import saves_output
from fusedshape.validate import shown

#: The name of an engine, or "auto"; `engine_names` lists them.
Engine = str
#: Names the fastest engine of a direction, or None where it has not been measured.
Chooser = Callable[[Direction, Problem], str | None]

_ALL_ATEN = Engines(ATEN, ATEN, ATEN)
_chooser: Chooser | None = None
_remembers = True
_remembered: dict[Any, Engines] = {}
_REMEMBERED = 4096


def engine_names() -> tuple[str, ...]:
    """What a call may name as its engine.

    Example:
        >>> engine_names()
        ('auto', 'aten', 'triton', 'native', 'cudnn')
    """
    return ("auto", *ENGINES)


def engine_named(name: str) -> LayerEngine:
    """The engine of that name.

    Raises:
        ValueError: there is none.

    Example:
        >>> engine_named("aten").name
        'aten'
    """
    if not isinstance(name, str) or name not in ENGINES:
        raise ValueError(f"unknown engine {shown(name)}; known: {', '.join(engine_names())}")
    return ENGINES[name]


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
    native.forget_plans()


def steady() -> bool:
    """Whether the chooser always answers alike, until `forget_choices`.

    Example:
        >>> steady()
        True
    """
    return _remembers


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
        One of `engine_names`, but not "auto".

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
        return first_able((measured, pinned_engine(problem)), obstacle)
    engine_named(asked)
    reason = None if asked == "aten" else obstacle(asked)
    if reason is not None:
        raise ValueError(f"engine {asked!r} cannot run this layer: {reason}")
    return asked


def first_able(names: Iterable[str | None], obstacle: Callable[[str], str | None]) -> str:
    """The first of these engines that can run a layer, else "aten"; None and unknown names cannot.

    Example:
        >>> first_able((None, "native", "triton"), {"native": "groups=2"}.get)
        'triton'
    """
    for name in names:
        if name == "aten" or (name in ENGINES and obstacle(name) is None):
            return name
    return "aten"


def pinned_engine(problem: Problem) -> str:
    """The engine for a layer that has not been measured: the first that prefers it, else "aten".

    Example:
        >>> shapes = (8, 64, 14, 14), (64, 64, 1, 1), True, (1, 1), (0, 0), (1, 1)
        >>> pinned_engine(Problem("cpu", None, torch.float32, *shapes, 1, "relu", True))
        'native'
    """
    for engine in ENGINES.values():
        if engine.prefers(problem):
            return engine.name
    return "aten"


def rivals(device: str) -> tuple[LayerEngine, ...]:
    """The engines beside "aten" that may compute a layer on a type of device.

    Example:
        >>> [engine.name for engine in rivals("cuda")]
        ['triton', 'cudnn']
    """
    return RIVALS.get(device, ())


def only_aten(asked: str, x: Tensor) -> bool:
    """Whether torch computes a layer in every direction, known without looking at the problem."""
    if asked != "auto":
        return asked == "aten"
    device = "cpu" if x.is_cpu else x.device.type  # the former is quicker to ask
    for engine in RIVALS.get(device, ()):
        if (engine.pinned or _chooser is not None) and engine.considers(x):
            return False
    return True


def asked_engine(engine: str, backend: str) -> str:
    """The engine that a caller's two choices ask for.

    Naming a backend asks for its pass, and so implies the engine that has a pass by itself, "aten",
    unless an engine is named too.

    Raises:
        ValueError: an unknown engine, or kernels named under a torch.func transform or an export.
    """
    if engine == "auto":
        return engine if backend == "auto" else "aten"
    if not engine_named(engine).plain and transformed():
        dispatch.refuse_kernels("engine", engine)
    return engine


def forward_engine(asked: str, x: Tensor, layer: Layer) -> LayerEngine:
    """The engine of a layer that has no backward.

    Raises:
        ValueError: as `choose_engine`.
    """
    return ATEN if only_aten(asked, x) else _engines(("fprop",), asked, x, layer)[0]


def engines_for(asked: str, x: Tensor, layer: Layer, chained: bool = False) -> Engines:
    """The engines of one layer on this input; `chained` if its dgrad will go on through a layer.

    Raises:
        ValueError: as `choose_engine`.
    """
    if only_aten(asked, x):
        return _ALL_ATEN  # the quickest answer, for the smallest layers
    directions: tuple[Direction, ...] = ("fprop", "dgrad_act" if chained else "dgrad", "wgrad")
    # On CUDA the chooser looks at torch's switches, too.
    if not _remembers or x.device.type != "cpu" or torch.compiler.is_compiling():
        return Engines(*_engines(directions, asked, x, layer))
    weight, _, spec, geometry, *_ = layer
    sizes = None if geometry is None else (*map(tuple, geometry[:3]), geometry.groups)
    how = asked, chained, spec.activation, saves_output(spec, x.dtype)
    key = (*how, x.dtype, x.shape, x.stride(), weight.shape, sizes)
    found = _remembered.get(key)
    if found is None:
        if len(_remembered) >= _REMEMBERED:
            _remembered.clear()
        found = Engines(*_engines(directions, asked, x, layer))
        _remembered[key] = found
    return found


def _engines(
    directions: tuple[Direction, ...], asked: str, x: Tensor, layer: Layer
) -> list[LayerEngine]:
    problem = problem_of(x, layer)
    known: dict[str, str | None] = {}

    def obstacle(name: str) -> str | None:
        if name not in known:
            known[name] = ENGINES[name].why_not(x, layer)
        return known[name]

    chosen = [ENGINES[choose_engine(d, problem, asked, obstacle)] for d in directions]
    return [engine.lenient for engine in chosen] if asked == "auto" else chosen
