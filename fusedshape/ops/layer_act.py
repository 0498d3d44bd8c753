"""One layer, a convolution or linear, and its activation as an autograd node, by any engine."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedshape import reference
from fusedshape.ops.checks import Geometry, node, plain_backward, transformed
from fusedshape.ops.choice import engines_for, forward_engine
from fusedshape.ops.dispatch import Kernels
from fusedshape.ops.engines import ATEN
from fusedshape.ops.engines.protocol import Engines
from fusedshape.ops.layer import Shortcut, channel_dim
from fusedshape.ops.pointwise import act_grad, remember
from fusedshape.spec import ActSpec, saves_output


class Step(NamedTuple):
    """A checked layer without its tensors; no geometry for a linear one."""

    spec: ActSpec
    geometry: Geometry | None
    kernels: Kernels
    engine: str


def run(x: Tensor, weight: Tensor, bias: Tensor | None, step: Step) -> Tensor:
    """φ̂(x ⋆ W + b) of checked arguments."""
    spec, geometry, kernels, asked = step
    if transformed():
        return composed(x, weight, bias, spec, geometry)
    wanted = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if not (wanted and torch.is_grad_enabled()):
        engine = forward_engine(asked, x, weight, spec, geometry)
        return engine.fprop_act(x, weight, bias, spec, geometry, kernels)
    engines = engines_for(asked, x, weight, spec, geometry)
    return node(LayerAct)(x, weight, bias, spec, geometry, kernels, engines)


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    geometry: Geometry | None,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """A layer in plain PyTorch."""
    joining = () if shortcut is None else shortcut
    if geometry is None:
        return reference.linear_act(x, weight, bias, spec, *joining)
    stride, padding, dilation, _, _, groups = geometry
    sizes = stride, padding, dilation, groups
    return reference.conv_act(x, weight, bias, spec, *sizes, *joining)


class LayerAct(torch.autograd.Function):
    """A layer with one saved activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        geometry: Geometry | None,
        kernels: Kernels,
        engines: Engines,
    ) -> Tensor:
        from_output = saves_output(spec, x.dtype)
        if from_output:
            y = saved = engines.fprop.fprop_act(x, weight, bias, spec, geometry, kernels)
        else:
            own, rest = reference.product_bias(bias, x, weight)
            saved = engines.fprop.fprop(x, weight, geometry, None, own)
            y = kernels.bias_act(saved, rest, spec, channel_dim(saved, geometry))
        remember(ctx, spec, channel_dim(saved, geometry), kernels)
        ctx.geometry = geometry
        ctx.engines = engines
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, saved, None if from_output else bias)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, bias = ctx.saved_tensors
        own, rest = reference.product_bias(bias, x, weight)
        if torch.is_grad_enabled() and not saves_output(ctx.spec, x.dtype):
            # What was saved has no graph to differentiate again.
            saved = ATEN.fprop(x, weight, ctx.geometry, None, own)
        dz, dbias = act_grad(ctx, grads[0], saved, rest, bias_index=2)
        dx, dweight = product_grads(ctx, dz, x, weight)
        return dx, dweight, dbias, None, None, None, None


def product_grads(
    ctx: Any, dz: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x ⋆ W, for a Function that keeps `engines` and `geometry` on `ctx`.

    Under create_graph and vmap torch makes them, which serves both.
    """
    need_x, need_weight = ctx.needs_input_grad[:2]
    _, dgrad, wgrad = (ATEN, ATEN, ATEN) if plain_backward(dz) else ctx.engines
    if need_x and need_weight and dgrad is wgrad:
        dx, _, dweight = dgrad.both(dz, weight, x, ctx.geometry, None)
        return dx, dweight
    return (
        dgrad.dgrad(dz, weight, x, ctx.geometry, None)[0] if need_x else None,
        wgrad.wgrad(dz, x, weight, ctx.geometry) if need_weight else None,
    )
