"""conv_act and linear_act with a residual that joins before the activation, by any engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedshape import reference
from fusedshape.ops.apart import is_apart
from fusedshape.ops.checks import node, transformed
from fusedshape.ops.choice import engines_for, forward_engine
from fusedshape.ops.engines import ATEN
from fusedshape.ops.layer import (
    Layer,
    Shortcut,
    channel_dim,
    joined_spec,
    residual_spec,
    share,
    wide,
)
from fusedshape.ops.layer_act import Step, composed, product_grads
from fusedshape.ops.pointwise import BiasAct, act_grad, act_grad_alone, remember
from fusedshape.spec import is_half, saves_output


def join(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Shortcut, step: Step) -> Tensor:
    """φ̂(√(1 − w²)·(x ⋆ W + b) + w·r) of checked arguments."""
    spec, geometry, kernels, asked = step
    if torch.compiler.is_compiling():  # Dynamo rejects one tensor as two arguments of a Function
        shortcut = Shortcut(shortcut.residual.view_as(shortcut.residual), shortcut.weight)
    if transformed():
        return composed(x, Layer(weight, bias, spec, geometry, kernels, shortcut))
    if is_apart():
        own, rest = reference.product_bias(bias, x, weight)
        z = ATEN.fprop(x, Layer(weight, None, spec, geometry, kernels), own)
        dim = channel_dim(z, geometry)
        z = reference.joined(z, rest, *shortcut, dim).to(z.dtype)
        return node(BiasAct)(z, None, spec, dim, kernels)
    tensors = x, weight, bias, shortcut.residual
    wanted = any(t is not None and t.requires_grad for t in tensors)
    if not (wanted and torch.is_grad_enabled()):
        layer = Layer(weight, bias, spec, geometry, kernels, shortcut)
        return forward_engine(asked, x, layer).fprop_act(x, layer)
    if saves_output(spec, x.dtype) or is_half(x.dtype):
        return node(JoinedAct)(x, weight, bias, *shortcut, step)
    z = node(Joined)(x, weight, *shortcut, step)
    dim = channel_dim(z, geometry)
    return node(BiasAct)(z, bias, joined_spec(spec, shortcut.weight), dim, kernels)


class Joined(torch.autograd.Function):
    """A product plus its residual, which the activation after it saves.

    A node of its own saves nothing more for a second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        residual: Tensor,
        residual_weight: float,
        step: Step,
    ) -> Tensor:
        spec, geometry, kernels, asked = step
        shortcut = Shortcut(residual, residual_weight)
        layer = Layer(weight, None, spec, geometry, kernels, shortcut)
        ctx.step = step
        ctx.engines = engines_for(asked, x, layer)
        ctx.share = share(residual_weight)
        ctx.save_for_backward(x, weight)
        return ctx.engines.fprop.fprop(x, layer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dz = grads[0]
        x, weight = ctx.saved_tensors
        spec, geometry, kernels, _ = ctx.step
        layer = Layer(weight, None, spec, geometry, kernels)
        dx, dweight = product_grads(ctx, dz, x, layer)
        dresidual = dz * ctx.share if ctx.needs_input_grad[2] else None
        return dx, dweight, dresidual, None, None


class JoinedAct(torch.autograd.Function):
    """A layer, its residual and its activation, where backward works from y or in half precision.

    In half precision the sum is not rounded before φ̂, nor dz before it becomes the residual's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        residual_weight: float,
        step: Step,
    ) -> Tensor:
        spec, geometry, kernels, asked = step
        shortcut = Shortcut(residual, residual_weight)
        layer = Layer(weight, bias, spec, geometry, kernels, shortcut)
        engines = engines_for(asked, x, layer)
        engine = engines.fprop
        own_spec = joined_spec(spec, residual_weight)
        if saves_output(spec, x.dtype):
            y = engine.fprop_act(x, layer)
            kept: tuple[Tensor | None, ...] = y, None, None
        else:
            own, rest = reference.product_bias(bias, x, weight)
            z = engine.fprop(x, layer, own)
            y = kernels.bias_act(z, wide(rest, z), own_spec, channel_dim(z, geometry))
            y = reference.rounded(y, x.dtype)
            # A second derivative recomputes the sum, and needs the residual for it.
            kept = reference.rounded(z, x.dtype), bias, residual
        remember(ctx, own_spec, channel_dim(y, geometry), kernels)
        ctx.geometry = geometry
        ctx.engines = engines
        ctx.residual_weight = residual_weight
        ctx.residual_spec = residual_spec(spec, residual_weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, bias, residual = ctx.saved_tensors
        own, rest = reference.product_bias(bias, x, weight)
        layer = Layer(weight, bias, ctx.spec, ctx.geometry, ctx.kernels)
        if torch.is_grad_enabled() and residual is not None:
            # The saved tensor has no graph, so a second derivative needs it recomputed.
            shortcut = Shortcut(residual, ctx.residual_weight)
            z = ATEN.fprop(x, layer._replace(shortcut=shortcut), own)
            saved = reference.rounded(z, x.dtype)
        dz, dbias = act_grad(ctx, grads[0], saved, rest, bias_index=2)
        dx, dweight = product_grads(ctx, dz, x, layer)
        dresidual = None
        if ctx.needs_input_grad[3]:
            if is_half(dz.dtype):  # dz is rounded already: start from the gradient of y again
                dresidual = act_grad_alone(ctx, grads[0], saved, rest, ctx.residual_spec)
            else:
                dresidual = dz * share(ctx.residual_weight)
        return dx, dweight, dbias, dresidual, None, None
