"""φ̂ and its gradient on a tile in registers: all of a pointwise kernel, the end of the others.

A kernel takes the constants as `tl.float64` arguments, in the order of `constants` (forward) or
`grad_constants` (backward), and hands them on.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fusedshape.activations import ids_by_registers
from fusedshape.kernels import phi
from fusedshape.spec import KernelArgs

#: In place of an activation's id: the product is written as it is.
IDENTITY = tl.constexpr(-1)
#: The arguments of a kernel that has no activation.
PLAIN: KernelArgs = (IDENTITY.value, 0.0, 1.0, 0.0, 0.0, 1.0)
#: Activations that take hardly more registers than that.
STRAIGHT = (IDENTITY.value, *ids_by_registers("few"))


def constants(kernel_args: KernelArgs, residual_weight: float = 0.0) -> tuple[float, ...]:
    """Arguments of `act` and `mix`: the five constants, then √(1 − w²) and w.

    Raises:
        ValueError: w beyond ±1.
    """
    if not abs(residual_weight) <= 1:
        raise ValueError(f"residual_weight must lie between -1 and 1, got {residual_weight}")
    own_weight = math.sqrt((1 - residual_weight) * (1 + residual_weight))
    return *kernel_args[1:], own_weight, residual_weight


def grad_constants(kernel_args: KernelArgs) -> tuple[float, ...]:
    """Arguments of `act_grad`: the five constants, then 1/γ and αγ."""
    _, _, input_scale, _, _, output_scale = kernel_args
    return *kernel_args[1:], 1 / output_scale, input_scale * output_scale


@triton.jit
def mix(z, residual, own_weight, residual_weight):
    """√(1 − w²) z + w · residual, in z's dtype."""
    T: tl.constexpr = z.dtype
    return tl.full((), own_weight, T) * z + tl.full((), residual_weight, T) * residual.to(T)


@triton.jit
def act(
    z,
    negative_slope,
    input_scale,
    input_shift,
    output_shift,
    output_scale,
    ACTIVATION: tl.constexpr,
):
    """φ̂(z) in z's dtype."""
    T: tl.constexpr = z.dtype
    u = tl.full((), input_scale, T) * z + tl.full((), input_shift, T)
    v = phi.value(u, tl.full((), negative_slope, T), ACTIVATION)
    gamma = tl.full((), output_scale, T)
    # One fused instruction a number; for φ = 0 the same bits as γ(φ + δ).
    return gamma * v + gamma * tl.full((), output_shift, T)


@triton.jit
def act_grad(
    grad,
    saved,
    negative_slope,
    input_scale,
    input_shift,
    output_shift,
    output_scale,
    output_unscale,
    scale,
    ACTIVATION: tl.constexpr,
    SAVE_OUTPUT: tl.constexpr,
):
    """Grad · φ̂′, in grad's dtype; finite wherever grad and saved are 0.

    `saved` is the output in the dtype it was stored in if SAVE_OUTPUT, else the input, its bias
    added.
    """
    T: tl.constexpr = grad.dtype
    slope = tl.full((), negative_slope, T)
    s = saved.to(T)
    if SAVE_OUTPUT:
        # What `act` leaves for φ = 0, rounded as there: the place of the kink at u = 0.
        at_zero = tl.full((), output_scale, T) * tl.full((), output_shift, T)
        at_zero = at_zero.to(saved.dtype).to(T)
        rising = tl.full((), output_scale, T) > 0
        if ACTIVATION == phi.LEAKY_RELU:
            right = tl.where(rising, s > at_zero, s < at_zero)
        else:  # as torch's, right at NaN
            right = ~tl.where(rising, s <= at_zero, s >= at_zero)
        v = s * tl.full((), output_unscale, T) - tl.full((), output_shift, T)
        d = phi.d1_from_output(v, right, slope, ACTIVATION)
    else:
        u = tl.full((), input_scale, T) * s + tl.full((), input_shift, T)
        d = phi.d1(u, slope, ACTIVATION)
    return d * tl.full((), scale, T) * grad
