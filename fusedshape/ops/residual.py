"""conv_act and linear_act that a second tensor joins before the activation, by any engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedshape import reference
from fusedshape.ops.checks import node, transformed
from fusedshape.ops.engine import (
    ATEN,
    Engines,
    Shortcut,
    channel_dim,
    engines_for,
    forward_engine,
    is_apart,
    joined_spec,
    share,
)
from fusedshape.ops.layer import Step, composed, product_grads
from fusedshape.ops.pointwise import BiasAct, act_grad, remember


def join(x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Shortcut, step: Step) -> Tensor:
    """φ̂(√(1 − w²)·(x ⋆ W + b) + w·r) of checked arguments."""
    spec, geometry, kernels, asked = step
    if torch.compiler.is_compiling():  # which takes no tensor for two arguments of a node
        shortcut = Shortcut(shortcut.residual.view_as(shortcut.residual), shortcut.weight)
    if transformed():
        return composed(x, weight, bias, spec, geometry, shortcut)
    if is_apart():
        z = ATEN.fprop(x, weight, geometry)
        dim = channel_dim(z, geometry)
        z = reference.joined(z, bias, *shortcut, dim).to(z.dtype)
        return node(BiasAct)(z, None, spec, dim, kernels)
    tensors = x, weight, bias, shortcut.residual
    wanted = any(t is not None and t.requires_grad for t in tensors)
    if not (wanted and torch.is_grad_enabled()):
        engine = forward_engine(asked, x, weight, spec, geometry)
        return engine.fprop_act(x, weight, bias, spec, geometry, kernels, shortcut)
    engines = engines_for(asked, x, weight, spec, geometry)
    if spec.saves_output:
        return node(Joined)(x, weight, bias, *shortcut, step, engines)
    z = node(Joined)(x, weight, None, *shortcut, step, engines)
    dim = channel_dim(z, geometry)
    return node(BiasAct)(z, bias, joined_spec(spec, shortcut.weight), dim, kernels)


class Joined(torch.autograd.Function):
    """A layer and its residual; with the activation where backward can read φ′ off the output.

    Else the sum that the activation is to be applied to: that is what it then saves, and its second
    derivative needs no tensor more.
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
        engines: Engines,
    ) -> Tensor:
        spec, geometry, kernels, _ = step
        engine = engines.fprop
        shortcut = Shortcut(residual, residual_weight)
        if spec.saves_output:
            y = engine.fprop_act(x, weight, bias, spec, geometry, kernels, shortcut)
        else:
            y = engine.fprop(x, weight, geometry, shortcut)
        remember(ctx, joined_spec(spec, residual_weight), channel_dim(y, geometry), kernels)
        ctx.geometry = geometry
        ctx.engines = engines
        ctx.share = share(residual_weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, y if spec.saves_output else None)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        dz, dbias = grads[0], None
        if saved is not None:
            dz, dbias = act_grad(ctx, dz, saved, None, bias_index=2)
        dx, dweight = product_grads(ctx, dz, x, weight)
        dresidual = dz * ctx.share if ctx.needs_input_grad[3] else None
        return dx, dweight, dbias, dresidual, None, None, None
