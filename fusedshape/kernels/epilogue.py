"""φ̂ and its gradient on a tile in registers: all of a pointwise kernel, the end of the others.

A kernel takes the constants as `tl.float64` arguments, in the order of `constants` (forward) or
`grad_constants` (backward), and hands them on.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fusedshape.kernels import phi

#: In place of an activation's id: the product is written as it is.
IDENTITY = tl.constexpr(-1)


def constants(
    negative_slope: float,
    input_scale: float,
    input_shift: float,
    output_shift: float,
    output_scale: float,
    residual_weight: float = 0.0,
) -> tuple[float, ...]:
    """Arguments of `act` and `mix`: the five constants, then √(1 − w²) and w.

    Raises:
        ValueError: w beyond ±1.
    """
    if not abs(residual_weight) <= 1:
        raise ValueError(f"residual_weight must lie between -1 and 1, got {residual_weight}")
    own_weight = math.sqrt((1 - residual_weight) * (1 + residual_weight))
    five = negative_slope, input_scale, input_shift, output_shift, output_scale
    return *five, own_weight, residual_weight


def grad_constants(
    negative_slope: float,
    input_scale: float,
    input_shift: float,
    output_shift: float,
    output_scale: float,
) -> tuple[float, ...]:
    """Arguments of `act_grad`: the five constants, then 1/γ and αγ."""
    five = negative_slope, input_scale, input_shift, output_shift, output_scale
    return *five, 1 / output_scale, input_scale * output_scale


@triton.jit
def slices(z, COUNT: tl.constexpr):
    """Z cut into COUNT parts side by side, 1, 2 or 4: a tuple of tiles.

    A tensor core's tile holds up to 128 numbers a thread, and an activation worked out on all of
    them at once spills registers; on 32 at a time none does.
    """
    if COUNT == 1:
        parts = (z,)
    else:
        left, right = z.reshape(z.shape[0], 2, z.shape[1] // 2).permute(0, 2, 1).split()
        parts = slices(left, COUNT // 2) + slices(right, COUNT // 2)
    return parts


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
    return tl.full((), output_scale, T) * (v + tl.full((), output_shift, T))


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
        right = tl.where(tl.full((), output_scale, T) > 0, s > at_zero, s < at_zero)
        v = s * tl.full((), output_unscale, T) - tl.full((), output_shift, T)
        d = phi.d1_from_output(v, right, slope, ACTIVATION)
    else:
        u = tl.full((), input_scale, T) * s + tl.full((), input_shift, T)
        d = phi.d1(u, slope, ACTIVATION)
    return d * tl.full((), scale, T) * grad
