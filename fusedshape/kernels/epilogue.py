"""φ̂ and its gradient on a tile in registers: all of a pointwise kernel, the end of the others.

A kernel that multiplies takes what its epilogue needs as two values: `Operands`, of the launch, and
`Kind`, of the compilation. `finish` is where they are used.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fusedshape.activations import ids_by_registers
from fusedshape.kernels import phi
from fusedshape.spec import KernelArgs

#: Stands for "no activation" in place of an id: the product is written as it is.
IDENTITY = tl.constexpr(-1)
#: The arguments of a kernel that has no activation.
PLAIN: KernelArgs = (IDENTITY.value, 0.0, 1.0, 0.0, 0.0, 1.0)
#: Ids whose epilogue needs about as few registers as the identity.
STRAIGHT = (IDENTITY.value, *ids_by_registers("few"))


class Spec(NamedTuple):
    """The constants of an activation, without its id.

    A launch types floats in a tuple as float32, which is what these kernels compute in. Those that
    also compute in float64 take scalars instead, annotated as `tl.float64`, and make a `Spec` of
    them inside. `act` and `act_grad` broadcast: a constant may as well be a row of numbers, one a
    channel.
    """

    negative_slope: float
    input_scale: float
    input_shift: float
    output_shift: float
    output_scale: float


class Weights(NamedTuple):
    """What `mix` multiplies the product and the residual by: √(1 − w²) and w."""

    own: float
    residual: float


class Rates(NamedTuple):
    """What `act_grad` multiplies by: 1/γ, to get φ from a saved output, and αγ, beside φ′."""

    output_unscale: float
    scale: float


class Operands(NamedTuple):
    """What a kernel's epilogue reads and writes beside the tile; what it does not need is None.

    Attributes:
        bias: a number for each channel.
        aux: of the output's size: the residual, or in a gradient what the layer before saved.
        sums: partial sums of the gradient over all but the channel, (parts, channels).
        spec: constants of the activation.
        factors: `Weights` of a residual; in a gradient, `Rates`.
    """

    bias: Tensor | None = None
    aux: Tensor | None = None
    sums: Tensor | None = None
    spec: Spec | None = None
    factors: Weights | Rates | None = None


class Kind(NamedTuple):
    """What an epilogue does.

    Attributes:
        grad: whether it ends a gradient: with φ̂′ of the layer before, else with φ̂.
        activation: id of φ, or `IDENTITY`.
        save_output: whether φ̂′ is to be had from the output, else from the pre-activation.
    """

    grad: bool = False
    activation: int = IDENTITY.value
    save_output: bool = False


class Epilogue(NamedTuple):
    """What a product goes through on its way to memory: `forward`, `backward` or nothing."""

    kind: Kind = Kind()
    operands: Operands = Operands()

    @property
    def mixes(self) -> bool:
        """Whether a residual comes in."""
        return not self.kind.grad and self.operands.aux is not None


def forward(
    bias: Tensor | None, residual: Tensor | None, residual_weight: float, kernel_args: KernelArgs
) -> Epilogue:
    """φ̂(√(1 − w²)(z + bias) + w · residual); without residual φ̂(z + bias).

    Raises:
        ValueError: w beyond ±1.
    """
    weights = None if residual is None else weights_of(residual_weight)
    activation = kernel_args[0]
    spec = None if activation == IDENTITY.value else Spec(*kernel_args[1:])
    return Epilogue(Kind(False, activation), Operands(bias, residual, None, spec, weights))


def backward(
    bias: Tensor | None,
    saved: Tensor | None,
    sums: Tensor | None,
    kernel_args: KernelArgs,
    save_output: bool,
) -> Epilogue:
    """Multiply by φ̂′ of the layer before, if `saved` is given, and sum over channels into `sums`.

    `saved` is the output of that layer if `save_output`, else its pre-activation without the bias.
    """
    if saved is None:
        return Epilogue(Kind(True), Operands(sums=sums))
    spec = Spec(*kernel_args[1:])
    operands = Operands(bias, saved, sums, spec, rates_of(spec))
    return Epilogue(Kind(True, kernel_args[0], save_output), operands)


def weights_of(residual_weight: float) -> Weights:
    """The weights of the product and the residual.

    Raises:
        ValueError: w beyond ±1.
    """
    if not abs(residual_weight) <= 1:
        raise ValueError(f"residual_weight must lie between -1 and 1, got {residual_weight}")
    return Weights(math.sqrt((1 - residual_weight) * (1 + residual_weight)), residual_weight)


def rates_of(spec: Spec) -> Rates:
    """What follows from the constants for a gradient."""
    return Rates(1 / spec.output_scale, spec.input_scale * spec.output_scale)


@triton.jit
def in_dtype(spec, T: tl.constexpr):
    """The constants as T; they come from the host, in the interpreter as Python's floats."""
    return Spec(
        tl.full((), spec.negative_slope, T),
        tl.full((), spec.input_scale, T),
        tl.full((), spec.input_shift, T),
        tl.full((), spec.output_shift, T),
        tl.full((), spec.output_scale, T),
    )


@triton.jit
def mix(z, residual, weights):
    """√(1 − w²) z + w · residual, in z's dtype."""
    T: tl.constexpr = z.dtype
    own = tl.full((), weights.own, T)
    return own * z + tl.full((), weights.residual, T) * residual.to(T)


@triton.jit
def act(z, spec, ACTIVATION: tl.constexpr):
    """φ̂(z); z and the constants are of one dtype."""
    v = phi.value(spec.input_scale * z + spec.input_shift, spec.negative_slope, ACTIVATION)
    # This is one fused multiply-add a number; for φ = 0 it gives the same bits as γ(φ + δ).
    return spec.output_scale * v + spec.output_scale * spec.output_shift


@triton.jit
def act_grad(grad, saved, spec, rates, ACTIVATION: tl.constexpr, SAVE_OUTPUT: tl.constexpr):
    """Multiply grad by φ̂′, in grad's dtype, which must be that of the constants.

    `saved` is the output, in the dtype it was stored in, if SAVE_OUTPUT, else the input with its
    bias. The result is finite where grad and saved are 0.
    """
    T: tl.constexpr = grad.dtype
    s = saved.to(T)
    if SAVE_OUTPUT:
        # What `act` gives for φ = 0, rounded alike: the output at the kink u = 0.
        at_zero = (spec.output_scale * spec.output_shift).to(saved.dtype).to(T)
        rising = spec.output_scale > 0
        if ACTIVATION == phi.LEAKY_RELU:
            right = tl.where(rising, s > at_zero, s < at_zero)
        else:  # as torch's, right at NaN
            right = ~tl.where(rising, s <= at_zero, s >= at_zero)
        v = s * tl.full((), rates.output_unscale, T) - spec.output_shift
        d = phi.d1_from_output(v, right, spec.negative_slope, ACTIVATION)
    else:
        d = phi.d1(spec.input_scale * s + spec.input_shift, spec.negative_slope, ACTIVATION)
    return d * tl.full((), rates.scale, T) * grad


@triton.jit
def finish(z, operands, row, inside, first_n, n, aux_stride, part, KIND: tl.constexpr):
    """Take a tile through bias, residual and activation, or through φ̂′ and to its channel sums.

    Args:
        z: the tile, as the product left it.
        operands: `Operands`.
        row: of each row of the tile, its place in the output and in aux.
        inside: whether there is such a row.
        first_n: column of the output where the tile begins.
        n: columns of the output.
        aux_stride: elements from row to row of aux.
        part: row of the partial sums.
        KIND: `Kind`.
    """
    T: tl.constexpr = z.dtype
    ACTIVATION: tl.constexpr = KIND.activation
    SAVE_OUTPUT: tl.constexpr = KIND.save_output
    col = first_n + tl.arange(0, z.shape[1])
    mask = inside[:, None] & (col < n)[None, :]
    if operands.bias is not None:
        bias = tl.load(operands.bias + col, col < n, 0.0).to(T)[None, :]
    if KIND.grad:
        if ACTIVATION != IDENTITY:
            aux = tl.load(operands.aux + (row[:, None] * aux_stride + col[None, :]), mask, 0.0)
            if operands.bias is not None:
                aux = aux.to(T) + bias
            spec = in_dtype(operands.spec, T)
            z = act_grad(z, aux, spec, operands.factors, ACTIVATION, SAVE_OUTPUT)
        if operands.sums is not None:
            total = tl.sum(tl.where(mask, z, 0.0), 0)
            tl.store(operands.sums + part * n + col, total, col < n)
    else:
        if operands.bias is not None:
            z += bias
        if operands.aux is not None:
            aux = tl.load(operands.aux + (row[:, None] * aux_stride + col[None, :]), mask, 0.0)
            z = mix(z, aux, operands.factors)
        if ACTIVATION != IDENTITY:
            z = act(z, in_dtype(operands.spec, T), ACTIVATION)
    return z
