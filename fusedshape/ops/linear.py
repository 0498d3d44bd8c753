"""linear_act: a linear layer and its activation, saving one activation tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fusedshape.ops import plans, stock
from fusedshape.ops.arguments import Options
from fusedshape.ops.checks import (
    check_bias,
    check_linear,
    check_residual,
    check_spec,
    match,
)
from fusedshape.ops.choice import Engine, asked_engine
from fusedshape.ops.dispatch import Backend, choose
from fusedshape.ops.layer import Shortcut
from fusedshape.ops.layer_act import Step, layer_act, layer_plan
from fusedshape.ops.residual import join
from fusedshape.spec import ActSpec


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    *,
    backend: Backend = "auto",
    engine: Engine = "auto",
    residual: Tensor | None = None,
    residual_weight: float | None = None,
) -> Tensor:
    r"""Linear layer and affine-transformed activation, y = γ(φ(α(x Wᵀ + b) + β) + δ).

    The activation runs in place on the product; backward makes one pass for the gradients of
    activation and bias. Where φ′ is a function of φ, only x and y are saved. Autocast applies as
    to `torch.nn.functional.linear`, but a float32 bias is not rounded.

    With a residual r of weight w it is y = φ̂(√(1 − w²)·(x Wᵀ + b) + w·r); see `conv_act`.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), x's dtype.
        bias: (out_features,) or None; x's dtype or float32.
        spec: the constants.
        backend: as in `shaped_act`, for a pass of the activation by itself.
        engine: as in `conv_act`.
        residual: r, of the result's shape and dtype; None for the plain layer.
        residual_weight: w, as in `conv_act`.

    Returns:
        (..., out_features).

    Raises:
        TypeError: dtypes that are not supported or do not match.
        ValueError: shapes or devices that do not match, a residual_weight outside [0, 1) or
            without its residual, or a backend or engine that cannot run.
        RuntimeError: the backend named is not built or not installed.

    Example:
        >>> import torch
        >>> spec = ActSpec("relu", output_scale=2.0)
        >>> linear_act(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([1.0]), spec)
        tensor([[8.]])
    """
    if residual is None and residual_weight is None and not torch.compiler.is_compiling():
        y = plans.run(_plan, x, weight, bias, spec, backend, engine)
        if y is not None:
            return y
    tensors = x, weight, bias, residual
    if has_torch_function_variadic(*tensors) or stock.looked_into(*tensors):
        values = (Options(backend, engine, residual, residual_weight),)
        return stock.instead_of(linear_act, tensors, x, weight, bias, spec, values=values)
    x, weight, step = _checked(x, weight, bias, spec, backend, engine)
    if residual is not None or residual_weight is not None:
        shape = [*x.shape[:-1], weight.shape[0]]
        residual, w = check_residual("linear_act", residual, residual_weight, x, shape)
        if w:
            return join(x, weight, bias, Shortcut(residual, w), step)
    return layer_act(x, weight, bias, step)


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    backend: Backend,
    engine: Engine,
) -> tuple[Tensor, Tensor, Step]:
    """Check a layer; return its tensors in the dtype of autocast."""
    spec = check_spec("linear_act", spec)
    x, weight = match("linear_act", x, weight)
    check_linear("linear_act", x.shape, weight)
    if bias is not None:
        check_bias("linear_act", bias, x, weight.shape[0], "weight has {} output features")
    kernels = choose(backend, x)
    return x, weight, Step(spec, None, kernels, asked_engine(engine, backend))


def _plan(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> plans.Plan:
    """The plan of a layer."""
    return layer_plan(bias, *_checked(x, weight, bias, *how))
