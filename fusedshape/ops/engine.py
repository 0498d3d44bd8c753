"""Who computes one convolution or linear layer, in each direction: torch, or kernels of ours.

"aten" is torch's convolution or product and one fused pointwise pass after it, in place. "triton",
on CUDA, and "native", on the CPU, are one kernel that ends with the activation (forward), or with
φ′ of the layer before and that layer's bias gradient (dgrad). `choose_engine` says which, and
`install_chooser` is where measurements come in.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape import native
from fusedshape.activations import get_activation
from fusedshape.compiling import constant_for_dynamo
from fusedshape.ops import dispatch, schema
from fusedshape.ops.checks import Geometry, channels_last, is_channels_last
from fusedshape.ops.dispatch import Kernels
from fusedshape.reference import own_weight, product_bias, rounded
from fusedshape.spec import ActSpec, is_half, saves_output
from fusedshape.validate import shown

Engine = Literal["auto", "aten", "triton", "native"]
#: "dgrad_act" is a dgrad that goes on through the activation of the layer before.
Direction = Literal["fprop", "dgrad", "dgrad_act", "wgrad"]
ENGINES: tuple[str, ...] = ("auto", "aten", "triton", "native")
DIRECTIONS: tuple[Direction, ...] = ("fprop", "dgrad", "dgrad_act", "wgrad")


class Problem(NamedTuple):
    """All that the choice of an engine may depend on; hashable.

    Attributes:
        device: type, "cuda" or "cpu".
        capability: compute capability of a CUDA device.
        dtype: of input and weight.
        input: shape of the layer's input.
        weight: shape of its weight; two dimensions are a linear layer.
        channels_last: whether the input is dense in memory with channels innermost.
        stride, padding, dilation: one number for each spatial dimension.
        groups: number of groups.
        activation: name of φ.
        saves_output: whether backward works from the layer's output.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    input: tuple[int, ...]
    weight: tuple[int, ...]
    channels_last: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    activation: str
    saves_output: bool


#: Names the fastest engine of a direction, or None where it has not been measured.
Chooser = Callable[[Direction, Problem], str | None]


class Before(NamedTuple):
    """The layer before, as dgrad's epilogue wants it.

    Attributes:
        saved: its output where `spec` saves that in its dtype, else its pre-activation without
            `bias`.
        bias: what of its bias is added after its product; used only where the pre-activation was
            saved.
        spec: its constants.
        kernels: who runs its pointwise pass, where that is one by itself.
        bias_grad: whether its bias wants a gradient.
    """

    saved: Tensor
    bias: Tensor | None
    spec: ActSpec
    kernels: Kernels
    bias_grad: bool


class Shortcut(NamedTuple):
    """What joins a layer before its activation, φ̂(√(1 − w²)·(x ⋆ W + b) + w·r).

    With √(1 − w²) in α (`joined_spec`) that is φ̂(x ⋆ W + w/√(1 − w²)·r + b): one number to add to
    the product, and gradients that are those of a plain layer, but for r's, which is a multiple of
    the product's.

    Attributes:
        residual: r, of the output's shape and dtype.
        weight: w, above 0 and below 1.
    """

    residual: Tensor
    weight: float


def share(residual_weight: float) -> float:
    """w/√(1 − w²): how much of the residual is added to the product."""
    return residual_weight / own_weight(residual_weight)


def joined_spec(spec: ActSpec, residual_weight: float) -> ActSpec:
    """The constants with √(1 − w²) in α.

    Example:
        >>> joined_spec(ActSpec("relu", input_scale=5.0), 0.6).input_scale
        4.0
    """
    return _scaled_spec(residual_weight, True, spec.activation, *spec.kernel_args[1:])


def residual_spec(spec: ActSpec, residual_weight: float) -> ActSpec:
    """`joined_spec` with w/√(1 − w²) in γ: its gradient is that of the residual.

    Where backward works from an output, only in half precision, whose sign alone counts.

    Example:
        >>> joined = residual_spec(ActSpec("relu", input_scale=5.0), 0.6)
        >>> joined.input_scale, round(joined.output_scale, 9)
        (4.0, 0.75)
    """
    return _scaled_spec(residual_weight, False, spec.activation, *spec.kernel_args[1:])


@constant_for_dynamo
def _scaled_spec(residual_weight: float, own: bool, activation: str, *constants: float) -> ActSpec:
    return _cached_scaled_spec(residual_weight, own, activation, constants)


@functools.lru_cache(1024)
def _cached_scaled_spec(
    residual_weight: float, own: bool, activation: str, constants: tuple[float, ...]
) -> ActSpec:
    slope, input_scale, input_shift, output_shift, output_scale = constants
    input_scale *= own_weight(residual_weight)
    output_scale *= 1.0 if own else share(residual_weight)
    return ActSpec(activation, input_scale, input_shift, output_shift, output_scale, slope)


class LayerEngine(Protocol):
    """One convolution, or a linear layer where `geometry` is None.

    Tensors that a method returns are fresh, and nobody else's.
    """

    name: str

    def fprop(
        self,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry | None,
        shortcut: Shortcut | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return x ⋆ W + b, or with a shortcut x ⋆ W + b + w/√(1 − w²)·r; no activation.

        A bias of x's dtype; see `fusedshape.reference.product_bias`. The sum with a shortcut may
        come in float32 where the product does not.
        """

    def fprop_act(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        geometry: Geometry | None,
        kernels: Kernels,
        shortcut: Shortcut | None = None,
    ) -> Tensor:
        """Return φ̂(x ⋆ W + b), the shortcut taken in, and no other tensor is left."""

    def dgrad(
        self,
        dz: Tensor,
        weight: Tensor,
        x: Tensor,
        geometry: Geometry | None,
        before: Before | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient of the input, or of the pre-activation of the layer before, and its sums.

        Args:
            dz: gradient of the pre-activation, with the strides of the layer's output.
            weight: W.
            x: any tensor of the input's shape, dtype and strides; its numbers are not read.
            geometry: of the convolution.
            before: the layer that made the input; None where its gradient is wanted itself.

        Returns:
            The gradient, and its sum over all but the channels where ``before.bias_grad``.
        """

    def wgrad(self, dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
        """Gradient of the weight; of `weight` itself only the shape is read."""

    def both(
        self,
        dz: Tensor,
        weight: Tensor,
        x: Tensor,
        geometry: Geometry | None,
        before: Before | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What `dgrad` returns, and what `wgrad` does."""


class _Aten:
    name = "aten"

    def fprop(
        self,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry | None,
        shortcut: Shortcut | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if geometry is None:
            z = F.linear(x, weight, bias)
        else:
            z = torch.convolution(x, weight, bias, *geometry)
        if shortcut is not None:
            if z.is_cpu and is_half(z.dtype):  # torch's CPU kernel would round alpha to z's dtype
                z = z.float()
            # Where torch's own ops write in place, torch 2.11 compiles gradients of zero.
            add = z.add if torch.compiler.is_compiling() else z.add_
            z = add(shortcut.residual, alpha=share(shortcut.weight))
        return z

    def fprop_act(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        geometry: Geometry | None,
        kernels: Kernels,
        shortcut: Shortcut | None = None,
    ) -> Tensor:
        if shortcut is not None:
            spec = joined_spec(spec, shortcut.weight)
        own, rest = product_bias(bias, x, weight)
        y = self.fprop(x, weight, geometry, shortcut, own)
        dim = channel_dim(y, geometry)
        if torch.compiler.is_compiling() and kernels.name == "reference":  # as in fprop
            return rounded(kernels.bias_act(y, wide(rest, y), spec, dim), x.dtype)
        kernels.bias_act_(y, wide(rest, y), spec, dim)
        return rounded(y, x.dtype)

    def dgrad(
        self,
        dz: Tensor,
        weight: Tensor,
        x: Tensor,
        geometry: Geometry | None,
        before: Before | None,
    ) -> tuple[Tensor, Tensor | None]:
        if geometry is None:
            return _through(dz @ weight, geometry, before)
        mask = [True, False, False]
        return _through(_conv_backward(dz, x, weight, None, *geometry, mask)[0], geometry, before)

    def wgrad(self, dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
        if geometry is None:
            return dz.reshape(-1, dz.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return _conv_backward(dz, x, weight, None, *geometry, [False, True, False])[1]

    def both(
        self,
        dz: Tensor,
        weight: Tensor,
        x: Tensor,
        geometry: Geometry | None,
        before: Before | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if geometry is None:
            return *self.dgrad(dz, weight, x, geometry, before), self.wgrad(dz, x, weight, None)
        # One call of ATen instead of two saves the host some microseconds.
        mask = [True, True, False]
        dx, dweight, _ = _conv_backward(dz, x, weight, None, *geometry, mask)
        return *_through(dx, geometry, before), dweight


_conv_backward = torch.ops.aten.convolution_backward.default


def _through(
    dx: Tensor, geometry: Geometry | None, before: Before | None
) -> tuple[Tensor, Tensor | None]:
    """Take a fresh gradient back through the activation before it, in place."""
    if before is None:
        return dx, None
    saved, bias, spec, kernels, bias_grad = before
    dim = channel_dim(saved, geometry)
    if dx.stride() == saved.stride():
        return dx, kernels.act_grad_(dx, saved, bias, spec, dim, bias_grad)
    return kernels.act_grad(dx, saved, bias, spec, dim, bias_grad)


class _Kernels:
    """The ops `<name>_conv*` of `fusedshape.ops.schema`."""

    def __init__(self, name: str) -> None:
        self.name = name
        ops = torch.ops.fusedshape
        self._conv = getattr(ops, f"{name}_conv").default
        self._conv_act = getattr(ops, f"{name}_conv_act").default
        self._dgrad = getattr(ops, f"{name}_conv_dgrad").default
        self._wgrad = getattr(ops, f"{name}_conv_wgrad").default

    def fprop(
        self,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry | None,
        shortcut: Shortcut | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if shortcut is None and bias is None:
            z = self._conv(_dense(x, geometry), weight, *_sizes(geometry))
        else:
            scale = 1.0 if shortcut is None else 1 / own_weight(shortcut.weight)
            identity = _LEAKY, 1.0, scale, 0.0, 0.0, 1.0
            z = self._join(x, weight, bias, geometry, shortcut, identity)
        return _like_input(z, x)

    def fprop_act(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        geometry: Geometry | None,
        kernels: Kernels,
        shortcut: Shortcut | None = None,
    ) -> Tensor:
        if is_apart() and shortcut is None:
            own, rest = product_bias(bias, x, weight)
            y = self.fprop(x, weight, geometry, None, own)
            kernels.bias_act_(y, rest, spec, channel_dim(y, geometry))
            return y
        y = self._join(x, weight, bias, geometry, shortcut, spec.kernel_args)
        return _like_input(y, x)

    def _join(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry | None,
        shortcut: Shortcut | None,
        constants: tuple[int, float, float, float, float, float],
    ) -> Tensor:
        joining: tuple[Tensor | None, float] = None, 0.0
        if shortcut is not None:
            joining = _dense(shortcut.residual, geometry), shortcut.weight
        args = (bias, *joining, *_sizes(geometry), *constants)
        return self._conv_act(_dense(x, geometry), weight, *args)

    def dgrad(
        self,
        dz: Tensor,
        weight: Tensor,
        x: Tensor,
        geometry: Geometry | None,
        before: Before | None,
    ) -> tuple[Tensor, Tensor | None]:
        dz = _dense(dz, geometry)
        size = x.shape if geometry is not None else (dz.shape[0], weight.shape[1])
        if before is None:
            # The op takes constants that it does not use. Were they kept in the module,
            # torch.compile(dynamic=True) would make inputs of them, which no backward can have.
            epilogue = (0, 0.0, 1.0, 0.0, 0.0, 1.0, True, False)
            operands: tuple[Tensor | None, Tensor | None] = None, None
        else:
            spec = before.spec
            from_output = saves_output(spec, dz.dtype)
            operands = _dense(before.saved, geometry), None if from_output else before.bias
            epilogue = (*spec.kernel_args, from_output, before.bias_grad)
        dx, sums = self._dgrad(dz, weight, *operands, size, *_sizes(geometry), *epilogue)
        return dx.view(x.shape), sums if before is not None and before.bias_grad else None

    def wgrad(self, dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
        operands = _dense(dz, geometry), _dense(x, geometry)
        sizes = _sizes(geometry)
        return self._wgrad(*operands, weight.shape, *sizes)

    def both(
        self,
        dz: Tensor,
        weight: Tensor,
        x: Tensor,
        geometry: Geometry | None,
        before: Before | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        dx, sums = self.dgrad(dz, weight, x, geometry, before)
        return dx, sums, self.wgrad(dz, x, weight, geometry)


# With slope 1 the identity, for the kernels too.
_LEAKY = get_activation("leaky_relu").id


def _sizes(geometry: Geometry | None) -> tuple[list[int], list[int], list[int]]:
    return ([], [], []) if geometry is None else geometry[:3]


def _dense(x: Tensor, geometry: Geometry | None) -> Tensor:
    """The same numbers with channels innermost; a matrix for a linear layer."""
    if geometry is None:
        return x.reshape(-1, x.shape[-1]).contiguous()
    return channels_last(x)


def _like_input(y: Tensor, x: Tensor) -> Tensor:
    # As torch's own product: a node that returns a view forbids to write on it, whoever needs it.
    return y if y.ndim == x.ndim else _unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


_unsafe_view = torch.ops.aten._unsafe_view.default


def wide(bias: Tensor | None, z: Tensor) -> Tensor | None:
    """The bias, in float32 where z is."""
    return bias if bias is None or z.dtype != torch.float32 else bias.float()


def channel_dim(x: Tensor, geometry: Geometry | None) -> int:
    """The dimension of the channels or features."""
    return 1 if geometry is not None else x.ndim - 1


ATEN: LayerEngine = _Aten()
_ENGINES: dict[str, LayerEngine] = {
    "aten": ATEN,
    **{name: _Kernels(name) for name in schema.KERNEL_BACKENDS},
}


class Engines(NamedTuple):
    """The engine of each direction of one layer."""

    fprop: LayerEngine
    dgrad: LayerEngine
    wgrad: LayerEngine


_ALL_ATEN = Engines(ATEN, ATEN, ATEN)
_chooser: Chooser | None = None
_remembers = True
_remembered: dict[Any, Engines] = {}
_REMEMBERED = 4096
_apart: set[int] = set()  # threads


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


@contextmanager
def apart() -> Iterator[None]:
    """Let every engine leave its product in memory and run the activation after it, for a while.

    For those who look at the tensors in between; it holds for the thread that asks. A layer with a
    residual takes torch's product, and makes the normalised sum by itself.

    Example:
        >>> with apart():
        ...     pass
    """
    thread = threading.get_ident()
    outer = thread in _apart
    _apart.add(thread)
    try:
        yield
    finally:
        if not outer:
            _apart.discard(thread)


def is_apart() -> bool:
    """Whether `apart` holds, in this thread.

    Example:
        >>> is_apart()
        False
    """
    return bool(_apart) and threading.get_ident() in _apart


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
            if name == "aten" or (name in _ENGINES and obstacle(name) is None):
                return name
        return "aten"
    if not isinstance(asked, str) or asked not in _ENGINES:
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
        return _why_not_native(x, weight, groups)
    if weight.ndim == 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    from fusedshape.kernels import conv  # imports Triton

    return conv.why_not(x, weight, groups=groups)


# csrc's kChannels.
_CHANNELS = 16


def _why_not_native(x: Tensor, weight: Tensor, groups: int) -> str | None:
    if groups != 1:
        return f"groups={groups}, csrc's convolutions have groups=1 only; use another engine"
    if x.dtype != torch.float32:
        return f"csrc's convolutions are for float32, got {x.dtype}; use another engine"
    for channels in weight.shape[:2]:
        if channels == 0 or channels % _CHANNELS:
            return (
                f"{channels} channels or features, csrc's convolutions take multiples of "
                f"{_CHANNELS}; use another engine"
            )
    if weight.ndim == 2:
        if not x.is_contiguous():
            return (
                f"x of shape {tuple(x.shape)} and strides {x.stride()} is not contiguous; pass "
                "x.contiguous()"
            )
    elif not is_channels_last(x):
        return (
            f"x of shape {tuple(x.shape)} and strides {x.stride()} is not channels_last: channels "
            "must be innermost and memory dense; pass x.to(memory_format=torch.channels_last)"
        )
    return None


def problem_of(x: Tensor, weight: Tensor, spec: ActSpec, geometry: Geometry | None) -> Problem:
    """Describe a layer and its input."""
    stride, padding, dilation = (tuple(sizes) for sizes in _sizes(geometry))
    return Problem(
        device=x.device.type,
        capability=_capability(x.device) if x.is_cuda else None,
        dtype=x.dtype,
        input=tuple(x.shape),
        weight=tuple(weight.shape),
        channels_last=x.is_contiguous() if geometry is None else is_channels_last(x),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=1 if geometry is None else geometry[5],
        activation=spec.activation,
        saves_output=saves_output(spec, x.dtype),
    )


@constant_for_dynamo
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


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

    return [_ENGINES[choose_engine(d, problem, asked, obstacle)] for d in directions]
