"""What the engines share whose kernels are operators of `fusedshape.ops.schema`."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fusedshape.activations import get_activation
from fusedshape.ops import schema
from fusedshape.ops.apart import is_apart
from fusedshape.ops.checks import Geometry, channels_last
from fusedshape.ops.engines.protocol import LayerEngine
from fusedshape.ops.layer import Before, Layer
from fusedshape.ops.passes import OperatorPass
from fusedshape.reference import own_weight
from fusedshape.spec import KernelArgs, saves_output

# With slope 1 leaky_relu is the identity, for the kernels too.
_LEAKY = get_activation("leaky_relu").id
_unsafe_view = torch.ops.aten._unsafe_view.default


class KernelEngine(LayerEngine):
    """The operators `<name>_conv*` for layers, and `<name>_bias_act*` for the pass by itself.

    `pass_devices` are the types of device whose tensors backend "auto" gives the latter; where
    there are none, there is no such pass.

    Args:
        operators: what the names of its operators begin with; None for the engine's name.
    """

    pass_devices: tuple[str, ...] = ()

    def __init__(self, operators: str | None = None) -> None:
        name = operators or self.name
        schema.define(name, passes=bool(self.pass_devices))
        ops = torch.ops.fusedshape
        self._conv = getattr(ops, f"{name}_conv").default
        self._conv_act = getattr(ops, f"{name}_conv_act").default
        self._dgrad = getattr(ops, f"{name}_conv_dgrad").default
        self._wgrad = getattr(ops, f"{name}_conv_wgrad").default
        if self.pass_devices:
            self.backend = OperatorPass(name, self.pass_devices, self.unavailable)

    @abstractmethod
    def unavailable(self, device: str) -> Exception | None:
        """The error to raise if a call insists on it on `device`; None if it can run there."""

    def why_not(self, x: Tensor, layer: Layer) -> str | None:
        missing = self.unavailable(x.device.type)
        return self.refuses(x, layer) if missing is None else str(missing)

    @abstractmethod
    def refuses(self, x: Tensor, layer: Layer) -> str | None:
        """Why its kernels cannot compute `layer` where they are available; None if they can."""

    def fprop(self, x: Tensor, layer: Layer, bias: Tensor | None = None) -> Tensor:
        geometry, shortcut = layer.geometry, layer.shortcut
        if shortcut is None and bias is None:
            z = self._conv(_dense(x, geometry), layer.weight, *_sizes(geometry))
        else:
            scale = 1.0 if shortcut is None else 1 / own_weight(shortcut.weight)
            z = self._join(x, layer, bias, (_LEAKY, 1.0, scale, 0.0, 0.0, 1.0))
        return _like_input(z, x)

    def fprop_act(self, x: Tensor, layer: Layer) -> Tensor:
        if layer.shortcut is None and is_apart():
            return super().fprop_act(x, layer)
        return _like_input(self._join(x, layer, layer.bias, layer.spec.kernel_args), x)

    def _join(self, x: Tensor, layer: Layer, bias: Tensor | None, constants: KernelArgs) -> Tensor:
        geometry, shortcut = layer.geometry, layer.shortcut
        joining: tuple[Tensor | None, float] = None, 0.0
        if shortcut is not None:
            joining = _dense(shortcut.residual, geometry), shortcut.weight
        args = (bias, *joining, *_sizes(geometry), *constants)
        return self._conv_act(_dense(x, geometry), layer.weight, *args)

    def dgrad(
        self, dz: Tensor, x: Tensor, layer: Layer, before: Before | None
    ) -> tuple[Tensor, Tensor | None]:
        weight, geometry = layer.weight, layer.geometry
        dz = _dense(dz, geometry)
        size = x.shape if geometry is not None else (dz.shape[0], weight.shape[1])
        if before is None:
            # The operator takes constants that it does not use. If the module kept them,
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

    def wgrad(self, dz: Tensor, x: Tensor, layer: Layer) -> Tensor:
        geometry = layer.geometry
        operands = _dense(dz, geometry), _dense(x, geometry)
        return self._wgrad(*operands, layer.weight.shape, *_sizes(geometry))


def _sizes(geometry: Geometry | None) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation; empty for a linear layer."""
    return ([], [], []) if geometry is None else geometry[:3]


def _dense(x: Tensor, geometry: Geometry | None) -> Tensor:
    """The same numbers with channels innermost; a matrix for a linear layer."""
    if geometry is None:
        return x.reshape(-1, x.shape[-1]).contiguous()
    return channels_last(x)


def _like_input(y: Tensor, x: Tensor) -> Tensor:
    """A linear layer's output with the input's leading dimensions."""
    # Autograd rejects in-place writes on a view that a Function returned, and torch's own linear
    # layer allows them, so the result must not be a view.
    return y if y.ndim == x.ndim else _unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
