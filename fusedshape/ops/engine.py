"""Who computes one convolution or linear layer, in each direction: torch, or our Triton kernels.

"aten" is torch's convolution or product and one fused pointwise pass after it, in place. "triton"
is one kernel that ends with the activation (forward), or with φ′ of the layer before and that
layer's bias gradient (dgrad). `choose_engine` says which, and `install_chooser` is where
measurements come in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape.ops import dispatch
from fusedshape.ops.checks import Geometry
from fusedshape.ops.dispatch import Kernels
from fusedshape.spec import ActSpec

Engine = Literal["auto", "aten", "triton"]
#: "dgrad_act" is a dgrad that goes on through the activation of the layer before.
Direction = Literal["fprop", "dgrad", "dgrad_act", "wgrad"]
ENGINES: tuple[str, ...] = ("auto", "aten", "triton")
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
        saved: its output where ``spec.saves_output``, else its pre-activation without the bias.
        bias: used only where the pre-activation was saved.
        spec: its constants.
        kernels: who runs its pointwise pass, where that is one by itself.
        bias_grad: whether its bias wants a gradient.
    """

    saved: Tensor
    bias: Tensor | None
    spec: ActSpec
    kernels: Kernels
    bias_grad: bool


class LayerEngine(Protocol):
    """One convolution, or a linear layer where `geometry` is None.

    Tensors that a method returns are fresh, and nobody else's.
    """

    name: str

    def fprop(self, x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
        """Return the product alone, x ⋆ W."""

    def fprop_act(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        geometry: Geometry | None,
        kernels: Kernels,
    ) -> Tensor:
        """Return φ̂(x ⋆ W + b), and no other tensor is left."""

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

    def fprop(self, x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
        if geometry is None:
            return F.linear(x, weight)
        return torch.convolution(x, weight, None, *geometry)

    def fprop_act(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        geometry: Geometry | None,
        kernels: Kernels,
    ) -> Tensor:
        y = self.fprop(x, weight, geometry)
        kernels.bias_act_(y, bias, spec, channel_dim(y, geometry))
        return y

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


class _Triton:
    name = "triton"

    def fprop(self, x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
        ops = torch.ops.fusedshape
        z = ops.triton_conv(_dense(x, geometry), weight, *_sizes(geometry))
        return _like_input(z, x, geometry)

    def fprop_act(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        geometry: Geometry | None,
        kernels: Kernels,
    ) -> Tensor:
        args = (bias, None, 0.0, *_sizes(geometry), *spec.kernel_args)
        y = torch.ops.fusedshape.triton_conv_act(_dense(x, geometry), weight, *args)
        return _like_input(y, x, geometry)

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
            epilogue = (*_IDENTITY, True, False)
            operands: tuple[Tensor | None, Tensor | None] = None, None
        else:
            spec = before.spec
            operands = _dense(before.saved, geometry), None if spec.saves_output else before.bias
            epilogue = (*spec.kernel_args, spec.saves_output, before.bias_grad)
        dx, sums = torch.ops.fusedshape.triton_conv_dgrad(
            dz, weight, *operands, size, *_sizes(geometry), *epilogue
        )
        return dx.view(x.shape), sums if before is not None and before.bias_grad else None

    def wgrad(self, dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
        operands = _dense(dz, geometry), _dense(x, geometry)
        sizes = _sizes(geometry)
        return torch.ops.fusedshape.triton_conv_wgrad(*operands, weight.shape, *sizes)

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


# Constants for a dgrad without activation before it; the op takes them and does not use them.
_IDENTITY = (0, 0.0, 1.0, 0.0, 0.0, 1.0)


def _sizes(geometry: Geometry | None) -> tuple[list[int], list[int], list[int]]:
    return ([], [], []) if geometry is None else geometry[:3]


def _dense(x: Tensor, geometry: Geometry | None) -> Tensor:
    """The same numbers with channels innermost; a matrix for a linear layer."""
    if geometry is None:
        return x.reshape(-1, x.shape[-1]).contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _like_input(y: Tensor, x: Tensor, geometry: Geometry | None) -> Tensor:
    return y if geometry is not None else y.view(*x.shape[:-1], y.shape[-1])


def channel_dim(x: Tensor, geometry: Geometry | None) -> int:
    """The dimension of the channels or features."""
    return 1 if geometry is not None else x.ndim - 1


ATEN: LayerEngine = _Aten()
_ENGINES: dict[str, LayerEngine] = {"aten": ATEN, "triton": _Triton()}
# Where Triton can run at all; elsewhere nobody is asked.
_SERVED = ("cuda", "cpu") if dispatch.INTERPRET else ("cuda",)


class Engines(NamedTuple):
    """The engine of each direction of one layer."""

    fprop: LayerEngine
    dgrad: LayerEngine
    wgrad: LayerEngine


_ALL_ATEN = Engines(ATEN, ATEN, ATEN)
_chooser: Chooser | None = None


def install_chooser(chooser: Chooser | None) -> Chooser | None:
    """Let `chooser` say what "auto" means, for each direction of each problem that Triton serves.

    It is called for every layer on every call, so it must be quick, and it must not raise. Where it
    returns None, or names an engine that cannot run, the pinned choice holds: "aten".

    Args:
        chooser: who knows measurements; None for the pinned choice alone.

    Returns:
        The chooser until now.

    Example:
        >>> previous = install_chooser(lambda direction, problem: None)
        >>> _ = install_chooser(previous)
    """
    global _chooser
    previous, _chooser = _chooser, chooser
    return previous


def choose_engine(
    direction: Direction, problem: Problem, asked: str, obstacle: Callable[[], str | None]
) -> str:
    """Name of the engine that computes one direction of a layer.

    Args:
        direction: one of `DIRECTIONS`.
        problem: the layer and its input.
        asked: "auto", or an engine's name to insist on it.
        obstacle: says why the Triton engine cannot run the layer; None if it can.

    Returns:
        "aten" or "triton".

    Raises:
        ValueError: an unknown engine, or one that cannot run the layer.

    Example:
        >>> shapes = (2, 8, 5, 5), (8, 8, 3, 3), True, (1, 1), (1, 1), (1, 1)
        >>> problem = Problem("cpu", None, torch.float32, *shapes, 1, "relu", True)
        >>> choose_engine("fprop", problem, "auto", lambda: None)
        'aten'
    """
    if asked == "triton":
        reason = obstacle()
        if reason is not None:
            raise ValueError(f"engine 'triton' cannot run this layer: {reason}")
        return "triton"
    if asked == "auto" and _chooser is not None and _chooser(direction, problem) == "triton":
        return "triton" if obstacle() is None else "aten"
    if asked in ENGINES:
        return "aten"
    raise ValueError(f"unknown engine {asked!r}; known: {', '.join(ENGINES)}")


def why_not_triton(x: Tensor, weight: Tensor, groups: int) -> str | None:
    """Why the Triton engine cannot run a layer on this input; None if it can."""
    missing = dispatch.why_not("triton", x.device.type)
    if missing is not None:
        return str(missing)
    if weight.ndim == 2:
        x = x.reshape(-1, x.shape[-1])
    from fusedshape.kernels import conv  # imports Triton

    return conv.why_not(x, weight, groups=groups)


def problem_of(x: Tensor, weight: Tensor, spec: ActSpec, geometry: Geometry | None) -> Problem:
    """Describe a layer and its input."""
    innermost = x if geometry is None else x.movedim(1, -1)
    stride, padding, dilation = (tuple(sizes) for sizes in _sizes(geometry))
    return Problem(
        device=x.device.type,
        capability=_capability(x.device) if x.is_cuda else None,
        dtype=x.dtype,
        input=tuple(x.shape),
        weight=tuple(weight.shape),
        channels_last=innermost.is_contiguous(),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=1 if geometry is None else geometry[5],
        activation=spec.activation,
        saves_output=spec.saves_output,
    )


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# What torch.compiler.assume_constant_result does, which would import Dynamo, seconds of it.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def only_aten(asked: str, x: Tensor) -> bool:
    """Whether torch computes a layer in every direction, known without looking at the problem."""
    if asked == "auto":
        return _chooser is None or x.device.type not in _SERVED
    return asked == "aten"


def forward_engine(
    asked: str, x: Tensor, weight: Tensor, spec: ActSpec, geometry: Geometry | None
) -> LayerEngine:
    """The engine of a layer that nobody will go back through.

    Raises:
        ValueError: as `choose_engine`.
    """
    if only_aten(asked, x):
        return ATEN
    problem = problem_of(x, weight, spec, geometry)
    obstacle = functools.partial(why_not_triton, x, weight, problem.groups)
    return _ENGINES[choose_engine("fprop", problem, asked, obstacle)]


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
        return _ALL_ATEN
    problem = problem_of(x, weight, spec, geometry)
    obstacle = functools.partial(why_not_triton, x, weight, problem.groups)
    directions: tuple[Direction, ...] = ("fprop", "dgrad_act" if chained else "dgrad", "wgrad")
    names = [choose_engine(d, problem, asked, obstacle) for d in directions]
    return Engines(*(_ENGINES[name] for name in names))
