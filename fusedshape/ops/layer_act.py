"""One layer, a convolution or linear, and its activation as an autograd node, by any engine."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedshape import reference
from fusedshape.ops import plans
from fusedshape.ops.checks import Geometry, node, plain_backward, transformed
from fusedshape.ops.choice import engines_for, forward_engine
from fusedshape.ops.engines import ATEN
from fusedshape.ops.layer import Layer, channel_dim
from fusedshape.ops.passes import Kernels
from fusedshape.ops.pointwise import act_grad, remember
from fusedshape.spec import ActSpec, saves_output


class Step(NamedTuple):
    """A checked layer without its tensors, which an autograd node must be given one by one.

    Attributes:
        spec: as in `Layer`, and so are the next two.
        geometry: of the convolution.
        kernels: of the activation's pass.
        engine: the one that the caller asked for.
    """

    spec: ActSpec
    geometry: Geometry | None
    kernels: Kernels
    engine: str


def layer_act(x: Tensor, weight: Tensor, bias: Tensor | None, step: Step) -> Tensor:
    """φ̂(x ⋆ W + b) of checked arguments."""
    spec, geometry, kernels, asked = step
    if transformed():
        return composed(x, Layer(weight, bias, spec, geometry, kernels))
    wanted = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if wanted and torch.is_grad_enabled():
        return node(LayerAct)(x, weight, bias, step)
    layer = Layer(weight, bias, spec, geometry, kernels)
    return forward_engine(asked, x, layer).fprop_act(x, layer)


def layer_plan(bias: Tensor | None, x: Tensor, weight: Tensor, step: Step) -> plans.Plan:
    """The plan of `layer_act`, of the same arguments."""
    spec, geometry, kernels, asked = step
    place = weight, geometry, asked
    return plans.plan_of(x, bias, spec, kernels, LayerAct.backward, place)


def composed(x: Tensor, layer: Layer) -> Tensor:
    """A layer in plain PyTorch."""
    weight, bias, spec, geometry, _, shortcut = layer
    joining = () if shortcut is None else shortcut
    if geometry is None:
        return reference.linear_act(x, weight, bias, spec, *joining)
    sizes = *geometry[:3], geometry.groups
    return reference.conv_act(x, weight, bias, spec, *sizes, *joining)


class LayerAct(torch.autograd.Function):
    """A layer with one saved activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, step: Step) -> Tensor:
        spec, geometry, kernels, asked = step
        layer = Layer(weight, bias, spec, geometry, kernels)
        engines = engines_for(asked, x, layer)
        if saves_output(spec, x.dtype):
            y = saved = engines.fprop.fprop_act(x, layer)
            dim = channel_dim(y, geometry)
            ctx.save_for_backward(x, weight, y, None)
        else:
            own, rest = reference.product_bias(bias, x, weight)
            saved = engines.fprop.fprop(x, layer, own)
            dim = channel_dim(saved, geometry)
            y = kernels.bias_act(saved, rest, spec, dim)
            ctx.save_for_backward(x, weight, saved, bias)
        remember(ctx, spec, dim, kernels)
        ctx.geometry = geometry
        ctx.engines = engines
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, bias = ctx.saved_tensors
        own, rest = reference.product_bias(bias, x, weight)
        layer = Layer(weight, bias, ctx.spec, ctx.geometry, ctx.kernels)
        if torch.is_grad_enabled() and not saves_output(ctx.spec, x.dtype):
            # The saved tensor has no graph, so a second derivative needs it recomputed.
            saved = ATEN.fprop(x, layer, own)
        dz, dbias = act_grad(ctx, grads[0], saved, rest, bias_index=2)
        return *product_grads(ctx, dz, x, layer), dbias, None


def product_grads(
    ctx: Any, dz: Tensor, x: Tensor, layer: Layer
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x ⋆ W, for a Function that keeps `engines` on `ctx`.

    Under create_graph and vmap torch computes them, which can be differentiated again and batched.
    """
    need_x, need_weight = ctx.needs_input_grad[:2]
    _, dgrad, wgrad = (ATEN, ATEN, ATEN) if plain_backward(dz) else ctx.engines
    if need_x and need_weight and dgrad is wgrad:
        dx, _, dweight = dgrad.both(dz, x, layer, None)
        return dx, dweight
    return (
        dgrad.dgrad(dz, x, layer, None)[0] if need_x else None,
        wgrad.wgrad(dz, x, layer) if need_weight else None,
    )
