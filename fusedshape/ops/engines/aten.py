"""The engine "aten": torch's convolution or product, and one fused pass after it, in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape.ops.checks import Geometry
from fusedshape.ops.dispatch import Kernels
from fusedshape.ops.layer import Before, Shortcut, channel_dim, joined_spec, share, wide
from fusedshape.reference import product_bias, rounded
from fusedshape.spec import ActSpec, is_half


class Aten:
    """torch's own."""

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
