"""The eager oracle: every op as plain PyTorch, for any dtype, device and transform.

Tests compare against it in float64. It also computes wherever no kernel is available or a
torch.func transform is active, and the benchmarks time it.
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

    On the CPU, torch.add rounds its alpha to the tensors' dtype. In half precision, backward would
    then apply another scale than forward, so this computes in float32.
    """
    if has_torch_function_variadic(a, b):  # proxies have no dtype
        return handle_torch_function(add_scaled, (a, b), a, b, scale)
    if a.is_cpu and is_half(a.dtype) and a.dtype == b.dtype:
        return torch.add(a.float(), b, alpha=scale).to(a.dtype)
    return torch.add(a, b, alpha=scale)


def product_bias(
    bias: Tensor | None, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Split a layer's bias: what its product x ⋆ W takes, in x's dtype, and what is added later.

    Where the product and the bias nearly cancel in half precision, rounding the product first loses
    the difference, and with it the side of a kink or the place where φ does not saturate. So the
    product takes the bias before it is rounded, as in torch's own layers, except for convolutions
    on accelerators. What a float32 bias has beyond x's dtype is added later.
    """
    once = x.is_cpu or weight.ndim == 2
    if bias is None or not is_half(x.dtype) or not once:
        return None, bias
    if bias.dtype == x.dtype:
        return bias, None
    most = torch.finfo(x.dtype).max / 2  # what float16 cannot hold is added later
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
    """Compute γ(φ(α(x + b) + β) + δ) in float32 or better, with b along `dim`, and round once.

    `phi` replaces the table's φ, for exporters that do not know its operators.
    """
    u = spec.input_scale * _with_bias(x, bias, dim) + spec.input_shift
    v = (phi or get_activation(spec.activation).value)(u, spec.negative_slope)
    return rounded(spec.output_scale * (v + spec.output_shift), x.dtype)


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert y to `dtype`."""
    # Not by `to` alone: if an autograd node returns a tensor that `to` left unchanged, torch 2.11
    # compiles gradients of zero.
    return y if y.dtype == dtype else y.to(dtype)


def own_weight(residual_weight: float) -> float:
    """√(1 − w²): the layer's own weight in a normalised sum with a residual of weight w."""
    return math.sqrt((1 - residual_weight) * (1 + residual_weight))


def residual_act(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: float,
    spec: ActSpec,
    dim: int,
) -> Tensor:
    """Compute φ̂(√(1 − w²)(x + b) + w r), or φ̂(x + b) if there is no residual."""
    if residual is None:
        return bias_act(x, bias, spec, dim)
    return shaped_act(joined(x, bias, residual, residual_weight, dim), spec).to(x.dtype)


def joined(
    x: Tensor, bias: Tensor | None, residual: Tensor, residual_weight: float, dim: int
) -> Tensor:
    """Compute √(1 − w²)(x + b) + w r, in float32 or better."""
    u = own_weight(residual_weight) * _with_bias(x, bias, dim)
    return u + residual_weight * residual.to(u.dtype)


def shaped_act(x: Tensor, spec: ActSpec) -> Tensor:
    """Compute γ(φ(αx + β) + δ), elementwise."""
    return bias_act(x, None, spec)


def act_grad(
    grad: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    dim: int,
    from_output: bool | None = None,
) -> Tensor:
    """Compute the gradient of x + b from the tensor that `spec` saves; differentiable again.

    Args:
        grad: gradient with respect to the output.
        saved: the output if `from_output`, else x (without the bias).
        bias: used only where the input is saved.
        spec: the constants.
        dim: the channel dimension.
        from_output: whether `saved` is the output; None: whatever `spec` saves in saved's dtype.

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
    # The slope comes first, so that the result has the strides of `saved`, not those of `grad`.
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
