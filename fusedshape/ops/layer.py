"""A layer as a value for engines, and the activation before it, through which dgrad may pass."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fusedshape.compiling import constant_for_dynamo
from fusedshape.ops.checks import Geometry
from fusedshape.ops.passes import Kernels
from fusedshape.reference import own_weight
from fusedshape.spec import ActSpec


class Shortcut(NamedTuple):
    """A residual that joins a layer before its activation: φ̂(√(1 − w²)·(x ⋆ W + b) + w·r).

    With √(1 − w²) moved into α (`joined_spec`) this is φ̂(x ⋆ W + w/√(1 − w²)·r + b). The kernel
    adds one number to the product. Gradients are those of a plain layer, and r's is a multiple of
    the product's.

    Attributes:
        residual: r, of the output's shape and dtype.
        weight: w, above 0 and below 1.
    """

    residual: Tensor
    weight: float


class Layer(NamedTuple):
    """A checked convolution or linear layer with its activation: what an engine is given beside x.

    Attributes:
        weight: W, in the input's dtype.
        bias: b, in that dtype or float32; None for none.
        spec: the constants of the activation.
        geometry: of the convolution; None for a linear layer.
        kernels: what runs the activation, where it is a pass by itself.
        shortcut: what joins the product before the activation; None for a plain layer.
    """

    weight: Tensor
    bias: Tensor | None
    spec: ActSpec
    geometry: Geometry | None
    kernels: Kernels
    shortcut: Shortcut | None = None


class Before(NamedTuple):
    """The layer before this one, as dgrad's epilogue needs it.

    Attributes:
        saved: its output where `spec` saves that in its dtype, else its pre-activation without
            `bias`.
        bias: the part of its bias that is added after its product; only read where the
            pre-activation was saved.
        spec: its constants.
        kernels: what runs its activation, where that is a pass by itself.
        bias_grad: whether its bias needs a gradient.
    """

    saved: Tensor
    bias: Tensor | None
    spec: ActSpec
    kernels: Kernels
    bias_grad: bool


def share(residual_weight: float) -> float:
    """Return w/√(1 − w²), the factor of the residual that is added to the product."""
    return residual_weight / own_weight(residual_weight)


def joined_spec(spec: ActSpec, residual_weight: float) -> ActSpec:
    """The constants with √(1 − w²) multiplied into α.

    Example:
        >>> joined_spec(ActSpec("relu", input_scale=5.0), 0.6).input_scale
        4.0
    """
    return _scaled_spec(residual_weight, True, spec.activation, *spec.kernel_args[1:])


def residual_spec(spec: ActSpec, residual_weight: float) -> ActSpec:
    """`joined_spec` with w/√(1 − w²) multiplied into γ; its gradient is that of the residual.

    Use it only in half precision: there a backward that works from the output reads its sign alone,
    which γ does not change.

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


def wide(bias: Tensor | None, z: Tensor) -> Tensor | None:
    """The bias, converted to float32 where z is float32."""
    return bias if bias is None or z.dtype != torch.float32 else bias.float()


def channel_dim(x: Tensor, geometry: Geometry | None) -> int:
    """The dimension of the channels or features."""
    return 1 if geometry is not None else x.ndim - 1
