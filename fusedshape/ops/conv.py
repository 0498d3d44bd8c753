"""conv_act: a convolution and its activation, saving one activation tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape import reference
from fusedshape.ops import chain
from fusedshape.ops.checks import (
    Geometry,
    Size,
    check_bias,
    check_conv,
    check_reach,
    check_spec,
    expand,
    match,
    node,
    padding_of,
    transformed,
)
from fusedshape.ops.dispatch import Backend, Kernels, choose
from fusedshape.ops.engine import Engine, asked_engine, only_aten
from fusedshape.ops.linear import activate
from fusedshape.ops.pointwise import act_grad, remember
from fusedshape.spec import ActSpec


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
    engine: Engine = "auto",
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
        backend: as in `shaped_act`, for a pass of the activation by itself.
        engine: who convolves. "aten" is torch, with a pass of the activation after it; "triton" on
            CUDA, and "native" on the CPU, are one kernel for both, for x in channels_last layout;
            "auto" is the fastest where that has been measured, else `pinned_engine`'s choice, and
            "aten" where a backend is named.

    Returns:
        (N, K, *out) or (K, *out).

    Raises:
        TypeError: dtypes that are not supported or do not match.
        ValueError: shapes, devices or sizes that do not match, or a backend or engine that cannot
            run.
        RuntimeError: the backend named is not built or not installed.

    Example:
        >>> spec = ActSpec("relu", output_scale=2.0)
        >>> x, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
        >>> conv_act(x, weight, torch.tensor([1.0]), spec, padding="same")[0, 0, 0]
        tensor([10., 14., 14., 10.])
    """
    spec = check_spec("conv_act", spec)
    x, weight = match("conv_act", x, weight)
    n = check_conv("conv_act", x.shape, weight, groups)
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
            engine=engine,
        )
        return y.squeeze(0)
    if bias is not None:
        out = weight.shape[0]
        check_bias("conv_act", bias, x, out, f"weight has {out} output channels")
    strides = expand("conv_act", "stride", stride, n, 1)
    dilations = expand("conv_act", "dilation", dilation, n, 1)
    kernel = weight.shape[2:]
    pads, extra = padding_of("conv_act", kernel, strides, padding, dilations, padding_mode)
    if padding_mode != "zeros" or any(extra):
        x, pads = _pad(x, pads, extra, padding_mode)
    check_reach("conv_act", x.shape[2:], kernel, pads, dilations)
    kernels = choose(backend, x)
    geometry = (strides, pads, dilations, False, [0] * n, groups)
    asked = asked_engine(engine, backend)
    if not only_aten(asked, x):
        return chain.run(x, (chain.Step(spec, geometry, kernels, asked),), (weight, bias))
    if transformed():
        return reference.conv_act(x, weight, bias, spec, strides, pads, dilations, groups)
    return node(ConvAct)(x, weight, bias, spec, geometry, kernels)


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


def _pad(x: Tensor, pads: list[int], extra: list[int], mode: str) -> tuple[Tensor, list[int]]:
    """Pad by what a convolution cannot: returns x and the padding that is left for it to do."""
    none = [0] * len(pads)
    before, left = (none, pads) if mode == "zeros" else (pads, none)
    if any(before) or any(extra):
        sides = zip(reversed(before), reversed(extra), strict=True)
        widths = [p for pad, more in sides for p in (pad, pad + more)]
        x = F.pad(x, widths, mode="constant" if mode == "zeros" else mode)
    return x, left
