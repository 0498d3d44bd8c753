"""The engine "aten": torch's convolution or product, and the activation in place after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape.ops.engines.protocol import LayerEngine, through
from fusedshape.ops.layer import Before, Layer, share
from fusedshape.spec import is_half

_conv_backward = torch.ops.aten.convolution_backward.default


class Aten(LayerEngine):
    """torch's own functions, for every layer on every device."""

    name = "aten"
    plain = True

    def why_not(self, x: Tensor, layer: Layer) -> str | None:
        """None: it can compute every layer."""
        return None

    def fprop(self, x: Tensor, layer: Layer, bias: Tensor | None = None) -> Tensor:
        weight, _, _, geometry, _, shortcut = layer
        if geometry is None:
            z = F.linear(x, weight, bias)
        else:
            z = torch.convolution(x, weight, bias, *geometry)
        if shortcut is not None:
            if z.is_cpu and is_half(z.dtype):  # torch's CPU kernel would round alpha to z's dtype
                z = z.float()
            # Where torch's own functions write in place, torch 2.11 compiles gradients of zero.
            add = z.add if torch.compiler.is_compiling() else z.add_
            z = add(shortcut.residual, alpha=share(shortcut.weight))
        return z

    def dgrad(
        self, dz: Tensor, x: Tensor, layer: Layer, before: Before | None
    ) -> tuple[Tensor, Tensor | None]:
        weight, geometry = layer.weight, layer.geometry
        if geometry is None:
            return through(dz @ weight, layer, before)
        mask = [True, False, False]
        return through(_conv_backward(dz, x, weight, None, *geometry, mask)[0], layer, before)

    def wgrad(self, dz: Tensor, x: Tensor, layer: Layer) -> Tensor:
        geometry = layer.geometry
        if geometry is None:
            return dz.reshape(-1, dz.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        mask = [False, True, False]
        return _conv_backward(dz, x, layer.weight, None, *geometry, mask)[1]

    def both(
        self, dz: Tensor, x: Tensor, layer: Layer, before: Before | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        geometry = layer.geometry
        if geometry is None:
            return *self.dgrad(dz, x, layer, before), self.wgrad(dz, x, layer)
        # One call of ATen instead of two saves the host some microseconds.
        mask = [True, True, False]
        dx, dweight, _ = _conv_backward(dz, x, layer.weight, None, *geometry, mask)
        return *through(dx, layer, before), dweight
