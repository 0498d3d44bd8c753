"""linear_act: a linear layer and its activation, saving one activation tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape import reference
from fusedshape.ops import chain
from fusedshape.ops.checks import check_bias, check_linear, check_spec, match, node, transformed
from fusedshape.ops.dispatch import Backend, Kernels, choose
from fusedshape.ops.engine import Engine, asked_engine, only_aten
from fusedshape.ops.pointwise import act_grad, remember
from fusedshape.spec import ActSpec


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    *,
    backend: Backend = "auto",
    engine: Engine = "auto",
) -> Tensor:
    r"""Linear layer and affine-transformed activation, y = γ(φ(α(x Wᵀ + b) + β) + δ).

    The activation runs in place on the product; backward makes one pass for the gradients of
    activation and bias. Where φ′ is a function of φ, only x and y are saved. Autocast applies as
    to `torch.nn.functional.linear`, but the bias is added in float32.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), x's dtype.
        bias: (out_features,) or None; x's dtype or float32.
        spec: the constants.
        backend: as in `shaped_act`, for a pass of the activation by itself.
        engine: as in `conv_act`.

    Returns:
        (..., out_features).

    Raises:
        TypeError: dtypes that are not supported or do not match.
        ValueError: shapes or devices that do not match, or a backend or engine that cannot run.
        RuntimeError: the backend named is not built or not installed.

    Example:
        >>> spec = ActSpec("relu", output_scale=2.0)
        >>> linear_act(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([1.0]), spec)
        tensor([[8.]])
    """
    spec = check_spec("linear_act", spec)
    x, weight = match("linear_act", x, weight)
    check_linear("linear_act", x.shape, weight)
    if bias is not None:
        out = weight.shape[0]
        check_bias("linear_act", bias, x, out, f"weight has {out} output features")
    kernels = choose(backend, x)
    asked = asked_engine(engine, backend)
    if not only_aten(asked, x):
        return chain.run(x, (chain.Step(spec, None, kernels, asked),), (weight, bias))
    if transformed():
        return reference.linear_act(x, weight, bias, spec)
    return node(LinearAct)(x, weight, bias, spec, kernels)


class LinearAct(torch.autograd.Function):
    """linear_act with one saved activation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ActSpec, kernels: Kernels
    ) -> Tensor:
        z = F.linear(x, weight)
        y, saved = activate(z, bias, spec, z.ndim - 1, kernels)
        remember(ctx, spec, z.ndim - 1, kernels)
        ctx.save_for_backward(x, weight, saved, None if spec.saves_output else bias)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, bias = ctx.saved_tensors
        if torch.is_grad_enabled() and not ctx.spec.saves_output:
            saved = F.linear(x, weight)  # what was saved has no graph to differentiate again
        dz, dbias = act_grad(ctx, grads[0], saved, bias, bias_index=2)
        dx = dz @ weight if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = dz.reshape(-1, weight.shape[0]).t() @ x.reshape(-1, weight.shape[1])
        return dx, dweight, dbias, None, None


def activate(
    z: Tensor, bias: Tensor | None, spec: ActSpec, dim: int, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Activate a product that nobody else holds; returns y and what backward must save.

    In place where the output is what is saved, so that z costs nothing.
    """
    if not spec.saves_output:
        return kernels.bias_act(z, bias, spec, dim), z
    kernels.bias_act_(z, bias, spec, dim)
    return z, z
