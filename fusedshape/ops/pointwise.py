"""shaped_act and bias_act, and the backward that one layer's ops share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary, has_torch_function_variadic

from fusedshape import reference
from fusedshape.ops import plans, stock
from fusedshape.ops.checks import (
    check_bias,
    check_spec,
    check_tensor,
    node,
    plain_backward,
    transformed,
)
from fusedshape.ops.dispatch import Backend, choose
from fusedshape.ops.passes import Kernels
from fusedshape.spec import ActSpec, saves_output
from fusedshape.validate import integer


def shaped_act(x: Tensor, spec: ActSpec, *, backend: Backend = "auto") -> Tensor:
    r"""Affine-transformed activation, y = γ(φ(αx + β) + δ), in one pass over memory.

    Computed in float32 (float64 for float64) and rounded once. Backward needs one saved tensor: y
    itself where φ′ is a function of φ, else x.

    Args:
        x: floating tensor of any shape; its strides are kept where it is dense.
        spec: the constants.
        backend: "auto", or one of "reference", "native", "triton" to insist on it. Under torch.func
            transforms, and in torch.export unless under torch.no_grad, "auto" is the reference, and
            the kernels raise.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        TypeError: x is not a float32, float64, bfloat16 or float16 tensor, or spec no ActSpec.
        ValueError, RuntimeError: the backend named cannot run here.

    Example:
        >>> spec = ActSpec("leaky_relu", negative_slope=0.5, output_scale=2.0)
        >>> shaped_act(torch.tensor([-1.0, 3.0]), spec)
        tensor([-1.,  6.])
    """
    y = None if torch.compiler.is_compiling() else plans.run(_plan, x, None, None, spec, 0, backend)
    if y is not None:
        return y
    if has_torch_function_unary(x) or stock.looked_into(x):
        return stock.instead_of(shaped_act, (x,), x, spec, backend=backend)
    spec = _checked_pass("shaped_act", x, spec)
    kernels = choose(backend, x)
    if transformed():
        return reference.bias_act(x, None, spec, 0)
    return node(BiasAct)(x, None, spec, 0, kernels)


def bias_act(
    x: Tensor, bias: Tensor | None, spec: ActSpec, *, dim: int = 1, backend: Backend = "auto"
) -> Tensor:
    r"""Bias and affine-transformed activation, y = γ(φ(α(x + b) + β) + δ), in one pass.

    Backward writes the gradient of x and sums that of the bias in one pass too, deterministically.

    Args:
        x: floating tensor with the channels in dimension `dim`; its strides are kept where it is
            dense, so channels_last stays channels_last.
        bias: (channels,) on x's device; x's dtype or float32. None for no bias.
        spec: the constants.
        dim: the channel dimension, negative counts from the end.
        backend: as in `shaped_act`.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        TypeError: dtypes that are not supported.
        IndexError: `dim` is no dimension of x.
        ValueError: bias of the wrong shape or on another device, or a backend that cannot run.
        RuntimeError: the backend named is not built or not installed.

    Example:
        >>> spec = ActSpec("relu", output_scale=2.0)
        >>> bias_act(torch.zeros(1, 2), torch.tensor([-1.0, 3.0]), spec)
        tensor([[0., 6.]])
    """
    y = (
        None
        if torch.compiler.is_compiling()
        else plans.run(_plan, x, None, bias, spec, dim, backend)
    )
    if y is not None:
        return y
    if has_torch_function_variadic(x, bias) or stock.looked_into(x, bias):
        return stock.instead_of(bias_act, (x, bias), x, bias, spec, dim=dim, backend=backend)
    spec = _checked_pass("bias_act", x, spec)
    if bias is None:
        return shaped_act(x, spec, backend=backend)
    dim = _checked_bias(x, bias, dim)
    kernels = choose(backend, x)
    if transformed():
        return reference.bias_act(x, bias, spec, dim)
    return node(BiasAct)(x, bias, spec, dim, kernels)


def _plan(
    x: Tensor, weight: None, bias: Tensor | None, spec: ActSpec, dim: int, backend: Backend
) -> plans.Plan:
    """The plan of a pass."""
    spec = _checked_pass("shaped_act" if bias is None else "bias_act", x, spec)
    if bias is not None:
        dim = _checked_bias(x, bias, dim)
    return plans.plan_of(x, bias, spec, choose(backend, x), BiasAct.backward, dim)


def _checked_pass(op: str, x: Tensor, spec: ActSpec) -> ActSpec:
    check_tensor(op, "x", x)
    return check_spec(op, spec)


def _checked_bias(x: Tensor, bias: Tensor, dim: int) -> int:
    """The channel dimension, counted from the front."""
    if type(dim) is not int:
        dim = integer("bias_act", "dim", dim, -x.ndim)
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(f"bias_act: dim={dim} is out of range for x of shape {tuple(x.shape)}")
    dim %= x.ndim
    check_bias("bias_act", bias, x, x.shape[dim], "x has {} channels along dim")
    return dim


class BiasAct(torch.autograd.Function):
    """bias_act with one saved tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, spec: ActSpec, dim: int, kernels: Kernels
    ) -> Tensor:
        y = kernels.bias_act(x, bias, spec, dim)
        remember(ctx, spec, dim, kernels)
        ctx.save_for_backward(*((y, None) if saves_output(spec, x.dtype) else (x, bias)))
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, bias = ctx.saved_tensors
        dx, dbias = act_grad(ctx, grads[0], saved, bias)
        return dx if ctx.needs_input_grad[0] else None, dbias, None, None, None


def remember(ctx: Any, spec: ActSpec, dim: int, kernels: Kernels) -> None:
    """Store on `ctx` what `act_grad` reads."""
    ctx.spec = spec
    ctx.dim = dim
    ctx.kernels = kernels


def act_grad(
    ctx: Any, grad: Tensor, saved: Tensor, bias: Tensor | None, bias_index: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x + b and of the bias, for a Function that called `remember`.

    Under create_graph and vmap plain PyTorch computes them, otherwise one fused pass.
    """
    need_bias = ctx.needs_input_grad[bias_index]
    if plain_backward(grad):
        dx = reference.act_grad(grad, saved, bias, ctx.spec, ctx.dim)
        dbias = reference.channel_sum(dx, ctx.dim) if need_bias else None
    else:
        dx, dbias = ctx.kernels.act_grad(grad, saved, bias, ctx.spec, ctx.dim, need_bias)
    if dbias is not None and dbias.dtype != ctx.bias_dtype:
        dbias = dbias.to(ctx.bias_dtype)
    return dx, dbias


def act_grad_alone(
    ctx: Any, grad: Tensor, saved: Tensor, bias: Tensor | None, spec: ActSpec
) -> Tensor:
    """The gradient of x + b alone, for other constants than those on `ctx`."""
    if plain_backward(grad):
        return reference.act_grad(grad, saved, bias, spec, ctx.dim)
    dx, _ = ctx.kernels.act_grad(grad, saved, bias, spec, ctx.dim, False)
    return dx
