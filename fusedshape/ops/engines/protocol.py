"""What an engine is: it computes one convolution or linear layer, in each direction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedshape.ops.layer import Before, Layer, channel_dim, joined_spec, wide
from fusedshape.ops.passes import Kernels
from fusedshape.ops.problem import Direction, Problem
from fusedshape.reference import product_bias, rounded


class LayerEngine(ABC):
    """One convolution or linear layer and its gradients.

    An engine is one file with a subclass, and one line in the table of `fusedshape.ops.engines`.
    Tensors that a method returns are newly allocated; nobody else holds them.

    Attributes:
        name: as `conv_act(..., engine=name)` takes it.
        devices: types of the devices on which "auto" and tuning consider it, beside "aten".
        plain: whether it consists of torch's own functions, which torch.func transforms, exporters
            and tensors of other classes can look into.
        pinned: whether "auto" may take it for a layer that has not been measured; see `prefers`.
        backend: its pass of the activation by itself, which a call may name as a backend; None if
            it has none.
    """

    name: str
    devices: tuple[str, ...] = ()
    plain: bool = False
    pinned: bool = False
    backend: Kernels | None = None

    @abstractmethod
    def why_not(self, x: Tensor, layer: Layer) -> str | None:
        """Why it cannot compute `layer` for this input; None if it can. Nothing is computed."""

    def considers(self, x: Tensor) -> bool:
        """Whether a layer with this input is worth the time that choosing takes, under "auto".

        It is asked on every call, so it must be quick.
        """
        return True

    def prefers(self, problem: Problem) -> bool:
        """Whether "auto" takes it for a problem that has not been measured."""
        return False

    @property
    def lenient(self) -> LayerEngine:
        """This engine as "auto" takes it.

        It may let "aten" compute where this one fails at run time; one that a call names raises.
        """
        return self

    def prepare(
        self,
        cases: Sequence[tuple[Direction, Problem]],
        device: torch.device,
        progress: Callable[[Iterator[None], int], Iterable[None]],
    ) -> None:
        """Compile what these directions of layers lack, in parallel, before they are measured.

        An engine that compiles nothing, or in no time, has nothing to do.

        Args:
            cases: directions and layers.
            device: where they will be computed.
            progress: shows how far an iterator of known length is.
        """
        return

    @abstractmethod
    def fprop(self, x: Tensor, layer: Layer, bias: Tensor | None = None) -> Tensor:
        """Return x ⋆ W + b, or with a shortcut x ⋆ W + b + w/√(1 − w²)·r; no activation.

        Args:
            x: the input.
            layer: its own bias is not read.
            bias: b, in x's dtype: what the product takes of the layer's bias, as
                `fusedshape.reference.product_bias` divides it; None for nothing.

        Returns:
            The sum, with a shortcut in float32 perhaps where the product would not be.
        """

    def fprop_act(self, x: Tensor, layer: Layer) -> Tensor:
        """Return φ̂(x ⋆ W + b), joined by the shortcut; no other tensor is kept."""
        weight, bias, spec, geometry, kernels, shortcut = layer
        if shortcut is not None:
            spec = joined_spec(spec, shortcut.weight)
        own, rest = product_bias(bias, x, weight)
        y = self.fprop(x, layer, own)
        dim = channel_dim(y, geometry)
        # Where torch's own functions write in place, torch 2.11 compiles gradients of zero.
        if torch.compiler.is_compiling() and kernels.name == "reference":
            return rounded(kernels.bias_act(y, wide(rest, y), spec, dim), x.dtype)
        kernels.bias_act_(y, wide(rest, y), spec, dim)
        return rounded(y, x.dtype)

    @abstractmethod
    def dgrad(
        self, dz: Tensor, x: Tensor, layer: Layer, before: Before | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient of the input, or of the pre-activation of the layer before, and its sums.

        Args:
            dz: gradient of the pre-activation, with the strides of the layer's output.
            x: any tensor of the input's shape, dtype and strides; its numbers are not read.
            layer: only its weight and geometry count.
            before: the layer that made the input; None where the input's own gradient is wanted.
                `through` takes a gradient of the input through it.

        Returns:
            The gradient, and its sum over all but the channels where ``before.bias_grad``.
        """

    @abstractmethod
    def wgrad(self, dz: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Gradient of the weight; of the layer's weight only the shape is read."""

    def both(
        self, dz: Tensor, x: Tensor, layer: Layer, before: Before | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What `dgrad` returns, and what `wgrad` returns."""
        dx, sums = self.dgrad(dz, x, layer, before)
        return dx, sums, self.wgrad(dz, x, layer)


def through(dx: Tensor, layer: Layer, before: Before | None) -> tuple[Tensor, Tensor | None]:
    """Take a newly allocated gradient of a layer's input through the activation before it.

    In place where strides allow it; what `LayerEngine.dgrad` returns for an engine whose kernels do
    not end with φ′.
    """
    if before is None:
        return dx, None
    saved, bias, spec, kernels, bias_grad = before
    dim = channel_dim(saved, layer.geometry)
    if dx.stride() == saved.stride():
        return dx, kernels.act_grad_(dx, saved, bias, spec, dim, bias_grad)
    return kernels.act_grad(dx, saved, bias, spec, dim, bias_grad)


class Engines(NamedTuple):
    """The engine of each direction of one layer."""

    fprop: LayerEngine
    dgrad: LayerEngine
    wgrad: LayerEngine
