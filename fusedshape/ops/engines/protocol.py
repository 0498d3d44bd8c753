"""What an engine is: one convolution or linear layer, computed in each direction."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from fusedshape.ops.checks import Geometry
from fusedshape.ops.dispatch import Kernels
from fusedshape.ops.layer import Before, Shortcut
from fusedshape.spec import ActSpec


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


class Engines(NamedTuple):
    """The engine of each direction of one layer."""

    fprop: LayerEngine
    dgrad: LayerEngine
    wgrad: LayerEngine
