"""Engines whose kernels are the ops `<name>_conv*` of `fusedshape.ops.schema`."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedshape.activations import get_activation
from fusedshape.ops.apart import is_apart
from fusedshape.ops.checks import Geometry, channels_last
from fusedshape.ops.dispatch import Kernels
from fusedshape.ops.layer import Before, Shortcut, channel_dim
from fusedshape.reference import own_weight, product_bias
from fusedshape.spec import ActSpec, saves_output


class KernelEngine:
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
