"""The eager oracle: every op as plain PyTorch, for any dtype, device and transform.

It is the truth that tests compare against (in float64), the path taken where no kernel is to be had
or a torch.func transform is active, and a provider in the benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedshape.activations import Phi, get_activation
from fusedshape.spec import ActSpec, is_half, saves_output


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a result of `dtype` is computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute a + scale · b and round once.

    On the CPU, torch.add rounds its alpha to the tensors' dtype. In half precision that is another
    scale than backward applies, so float32 is computed in.
    """
    if has_torch_function_variadic(a, b):  # proxies have no dtype
        return handle_torch_function(add_scaled, (a, b), a, b, scale)
    if a.is_cpu and is_half(a.dtype) and a.dtype == b.dtype:
        return torch.add(a.float(), b, alpha=scale).to(a.dtype)
    return torch.add(a, b, alpha=scale)


def product_bias(
    bias: Tensor | None, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What of a layer's bias its product x ⋆ W takes, in x's dtype, and what is added after it.

    In half precision, a product that is rounded before the bias is added has lost what is left
    where the two nearly cancel: the side of a kink, or where φ does not saturate. torch's own
    layers round once, but for convolutions on accelerators. A float32 bias keeps its digits.
    """
    once = x.is_cpu or weight.ndim == 2
    if bias is None or not is_half(x.dtype) or not once:
        return None, bias
    if bias.dtype == x.dtype:
        return bias, None
    most = torch.finfo(x.dtype).max / 2  # what float16 cannot hold is added after the product
    own = bias.clamp(-most, most).to(x.dtype)
    return own, bias - own


def _channel_view(bias: Tensor, ndim: int, dim: int) -> Tensor:
    shape = [1] * ndim
    shape[dim] = -1
    return bias.reshape(shape)


def _with_bias(x: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    x = x.to(opmath_dtype(x.dtype))
    return x if bias is None else x + _channel_view(bias.to(x.dtype), x.ndim, dim)


def bias_act(
    x: Tensor, bias: Tensor | None, spec: ActSpec, dim: int = 1, phi: Phi | None = None
) -> Tensor:
    """γ(φ(α(x + b) + β) + δ), with b along `dim`; float32 or better inside, rounded once.

    `phi` is φ in other operators than the table's.
    """
    u = spec.input_scale * _with_bias(x, bias, dim) + spec.input_shift
    v = (phi or get_activation(spec.activation).value)(u, spec.negative_slope)
    return rounded(spec.output_scale * (v + spec.output_shift), x.dtype)


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in `dtype`."""
    # Where an autograd node returns what `to` hands through, torch 2.11 compiles gradients of zero.
    return y if y.dtype == dtype else y.to(dtype)


def own_weight(residual_weight: float) -> float:
    """√(1 − w²): what a layer weighs in a normalised sum with a residual of weight w."""
    return math.sqrt((1 - residual_weight) * (1 + residual_weight))


def residual_act(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: float,
    spec: ActSpec,
    dim: int,
) -> Tensor:
    """φ̂(√(1 − w²)(x + b) + w r); without residual `bias_act`."""
    if residual is None:
        return bias_act(x, bias, spec, dim)
    return shaped_act(joined(x, bias, residual, residual_weight, dim), spec).to(x.dtype)


def joined(
    x: Tensor, bias: Tensor | None, residual: Tensor, residual_weight: float, dim: int
) -> Tensor:
    """√(1 − w²)(x + b) + w r, in float32 or better."""
    u = own_weight(residual_weight) * _with_bias(x, bias, dim)
    return u + residual_weight * residual.to(u.dtype)


def shaped_act(x: Tensor, spec: ActSpec) -> Tensor:
    """γ(φ(αx + β) + δ), elementwise."""
    return bias_act(x, None, spec)


def act_grad(
    grad: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    dim: int,
    from_output: bool | None = None,
) -> Tensor:
    """Gradient with respect to x + b, from the tensor that `spec` saves; differentiable again.

    Args:
        grad: gradient with respect to the output.
        saved: the output if `from_output`, else x (without the bias).
        bias: used only where the input is saved.
        spec: the constants.
        dim: the channel dimension.
        from_output: what `saved` is; None for what `spec` saves in saved's dtype.

    Returns:
        Tensor of grad's dtype, with saved's shape and strides.
    """
    if saves_output(spec, saved.dtype) if from_output is None else from_output:
        read_off = get_activation(spec.activation).d1_from_output
        assert read_off is not None
        v = saved.to(opmath_dtype(saved.dtype)) * (1 / spec.output_scale) - spec.output_shift
        slope = read_off(v, spec.negative_slope)
    else:
        u = spec.input_scale * _with_bias(saved, bias, dim) + spec.input_shift
        slope = get_activation(spec.activation).d1(u, spec.negative_slope)
    # slope first, so that the result takes the strides of what was saved, not the gradient's
    return (slope * (spec.input_scale * spec.output_scale) * grad.to(slope.dtype)).to(grad.dtype)


def channel_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over all dimensions but `dim`, accumulated in float32 or better."""
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    x = x.to(opmath_dtype(x.dtype))
    return x.sum(others) if others else x


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None = None,
    residual_weight: float = 0.0,
) -> Tensor:
    """φ̂(√(1 − w²)(conv(x, weight) + bias) + w · residual), channels in dimension 1."""
    no = [0] * len(stride)
    own, rest = product_bias(bias, x, weight)
    z = torch.convolution(x, weight, own, stride, padding, dilation, False, no, groups)
    return residual_act(z, rest, residual, residual_weight, spec, 1)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    residual: Tensor | None = None,
    residual_weight: float = 0.0,
) -> Tensor:
    """φ̂(√(1 − w²)(x weightᵀ + bias) + w · residual), features in the last dimension."""
    own, rest = product_bias(bias, x, weight)
    return residual_act(F.linear(x, weight, own), rest, residual, residual_weight, spec, -1)
