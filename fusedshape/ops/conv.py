"""conv_act: a convolution and its activation, saving one activation tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape import reference
from fusedshape.ops.dispatch import Backend, Kernels, choose
from fusedshape.ops.linear import activate, match
from fusedshape.ops.pointwise import act_grad, check_bias, check_spec, remember, transformed
from fusedshape.spec import ActSpec

Size = int | Sequence[int]
#: Stride, padding, dilation, transposed, output padding, groups, as torch.convolution takes them.
Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]
_PAD_MODES = ("zeros", "reflect", "replicate", "circular")


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    backend: Backend = "auto",
) -> Tensor:
    r"""Convolution and affine-transformed activation, y = γ(φ(α(x ⋆ W + b) + β) + δ).

    One, two or three spatial dimensions, as weight has. The activation runs in place on the
    convolution's output; backward makes one pass for the gradients of activation and bias. Where φ′
    is a function of φ, only x and y are saved. Autocast applies as to
    `torch.nn.functional.conv2d`, but the bias is added in float32.

    Args:
        x: (N, C, *spatial) or (C, *spatial), contiguous or channels_last.
        weight: (K, C / groups, *kernel), x's dtype.
        bias: (K,) or None; x's dtype or float32.
        spec: the constants.
        stride: one number, or one for each spatial dimension.
        padding: the same, or "valid", or "same" (stride 1; an odd total pads more at the end).
        dilation: the same as stride.
        groups: number of groups.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        backend: as in `shaped_act`, for the activation; the convolution is torch's.

    Returns:
        (N, K, *out) or (K, *out).

    Raises:
        TypeError: dtypes that are not supported or do not match.
        ValueError: shapes, devices or sizes that do not match, or a backend that cannot run.
        RuntimeError: the backend named is not built or not installed.

    Example:
        >>> spec = ActSpec("relu", output_scale=2.0)
        >>> x, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
        >>> conv_act(x, weight, torch.tensor([1.0]), spec, padding="same")[0, 0, 0]
        tensor([10., 14., 14., 10.])
    """
    spec = check_spec("conv_act", spec)
    x, weight = match("conv_act", x, weight, bias)
    n = weight.ndim - 2
    if not 1 <= n <= 3:
        raise ValueError(
            f"conv_act: weight must have 3, 4 or 5 dimensions, got {tuple(weight.shape)}"
        )
    if x.ndim not in (n + 1, n + 2):
        raise ValueError(
            f"conv_act: x has shape {tuple(x.shape)}; a weight of shape {tuple(weight.shape)} "
            f"wants {n + 2} dimensions, or {n + 1} without a batch"
        )
    if x.ndim == n + 1:
        y = conv_act(
            x.unsqueeze(0),
            weight,
            bias,
            spec,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            backend=backend,
        )
        return y.squeeze(0)
    out, per_group = weight.shape[:2]
    if not isinstance(groups, int) or groups < 1 or out % groups:
        raise ValueError(
            f"conv_act: groups={groups!r} must be a positive divisor of the {out} output channels"
        )
    if x.shape[1] != per_group * groups:
        raise ValueError(
            f"conv_act: weight has {per_group} input channels per group, input has {x.shape[1]} "
            f"and groups={groups}; weight.shape[1] * groups must equal the input's channels"
        )
    if bias is not None:
        check_bias("conv_act", bias, x, out, f"weight has {out} output channels")
    strides = _expand("stride", stride, n, 1)
    dilations = _expand("dilation", dilation, n, 1)
    kernel = weight.shape[2:]
    x, pads = _pad(x, kernel, strides, padding, dilations, padding_mode)
    for d in range(n):
        reach = dilations[d] * (kernel[d] - 1) + 1
        if kernel[d] < 1 or x.shape[2 + d] + 2 * pads[d] < reach:
            raise ValueError(
                f"conv_act: a kernel of {kernel[d]} with dilation {dilations[d]} reaches over "
                f"{reach}, but the padded input has {x.shape[2 + d] + 2 * pads[d]} in spatial "
                f"dimension {d}; pad more or use a smaller kernel"
            )
    kernels = choose(backend, x)
    if transformed():
        return reference.conv_act(x, weight, bias, spec, strides, pads, dilations, groups)
    geometry = (strides, pads, dilations, False, [0] * n, groups)
    return ConvAct.apply(x, weight, bias, spec, geometry, kernels)


class ConvAct(torch.autograd.Function):
    """conv_act with one saved activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        geometry: Geometry,
        kernels: Kernels,
    ) -> Tensor:
        z = torch.convolution(x, weight, None, *geometry)
        y, saved = activate(z, bias, spec, 1, kernels)
        remember(ctx, spec, 1, kernels)
        ctx.geometry = geometry
        ctx.save_for_backward(x, weight, saved, None if spec.saves_output else bias)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, bias = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not ctx.spec.saves_output:
            # What was saved has no graph to differentiate again.
            saved = torch.convolution(x, weight, None, *ctx.geometry)
        dz, dbias = act_grad(ctx, grads[0], saved, bias, bias_index=2)
        dx, dweight, _ = torch.ops.aten.convolution_backward.default(
            dz, x, weight, None, *ctx.geometry, [need_x, need_weight, False]
        )
        return dx, dweight, dbias, None, None, None


def _expand(name: str, value: Size, n: int, least: int) -> list[int]:
    values = [value] * n if isinstance(value, int) else list(value)
    if len(values) == 1:
        values *= n
    if len(values) != n or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(
            f"conv_act: {name}={value!r} must be an integer of at least {least}, or {n} of them"
        )
    return values


def _pad(
    x: Tensor,
    kernel: Sequence[int],
    stride: list[int],
    padding: Size | str,
    dilation: list[int],
    mode: str,
) -> tuple[Tensor, list[int]]:
    """Split padding into what the convolution does itself and what must be done before."""
    if mode not in _PAD_MODES:
        raise ValueError(
            f"conv_act: padding_mode={mode!r} is unknown; known: {', '.join(_PAD_MODES)}"
        )
    n = len(kernel)
    extra = [0] * n
    if isinstance(padding, str):
        if padding == "valid":
            pads = [0] * n
        elif padding == "same":
            if any(s != 1 for s in stride):
                raise ValueError(
                    f"conv_act: padding='same' needs stride 1, got {tuple(stride)}; "
                    "give the padding as numbers"
                )
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads, extra = [t // 2 for t in totals], [t % 2 for t in totals]
        else:
            raise ValueError(f"conv_act: padding={padding!r}; known words: 'valid', 'same'")
    else:
        pads = _expand("padding", padding, n, 0)
    if mode == "zeros":
        if any(extra):
            x = F.pad(x, [p for e in reversed(extra) for p in (0, e)])
        return x, pads
    if any(pads) or any(extra):
        both = zip(reversed(pads), reversed(extra), strict=True)
        x = F.pad(x, [p for pad, e in both for p in (pad, pad + e)], mode=mode)
    return x, [0] * n
