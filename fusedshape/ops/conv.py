"""conv_act: a convolution and its activation, saving one activation tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fusedshape.ops import plans, stock
from fusedshape.ops.arguments import Moves, Options
from fusedshape.ops.checks import (
    Geometry,
    Size,
    channels_last,
    check_bias,
    check_residual,
    check_spec,
    conv_geometry,
    conv_shape,
    is_channels_last,
    match,
)
from fusedshape.ops.choice import Engine, asked_engine
from fusedshape.ops.dispatch import Backend, choose
from fusedshape.ops.layer import Shortcut
from fusedshape.ops.layer_act import Step, layer_act, layer_plan
from fusedshape.ops.residual import join
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
    residual: Tensor | None = None,
    residual_weight: float | None = None,
) -> Tensor:
    r"""Convolution and affine-transformed activation, y = γ(φ(α(x ⋆ W + b) + β) + δ).

    One, two or three spatial dimensions, as weight has. The activation runs in place on the
    convolution's output; backward makes one pass for the gradients of activation and bias. Where φ′
    is a function of φ, only x and y are saved. Autocast applies as to
    `torch.nn.functional.conv2d`, but a float32 bias is not rounded.

    With a residual r of weight w the activation is that of their normalised sum,
    y = φ̂(√(1 − w²)·(x ⋆ W + b) + w·r): a shortcut that joins before the activation. The kernels of
    "triton" and "native" take it in, "aten" adds it in one pass in place; it is not saved. "aten",
    and in training every engine where φ′ is no function of φ, hold x ⋆ W + w/√(1 − w²)·r in x's
    dtype on the way: in float16 that must not go beyond 65504.

    Where weights of inf or nan meet a padding of zeros, the result is nan or the sum of the other
    taps, depending on engine, shape and position, as in torch's own convolutions.

    Args:
        x: `(N, C, *spatial)` or `(C, *spatial)`, contiguous or channels_last.
        weight: `(K, C / groups, *kernel)`, x's dtype.
        bias: (K,) or None; x's dtype or float32.
        spec: the constants.
        stride: one number, or one for each spatial dimension.
        padding: the same, or "valid", or "same" (stride 1; an odd total pads more at the end).
        dilation: the same as stride.
        groups: number of groups.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        backend: as in `shaped_act`, for a pass of the activation by itself.
        engine: what computes the convolution. "aten" is torch, with a pass of the activation after
            it. "triton" on CUDA and "native" on the CPU are one kernel for both, for x in
            channels_last layout. "auto" is the fastest if that has been measured, else
            `pinned_engine`'s choice, and "aten" if a backend is named. Under torch.func transforms,
            and in torch.export unless under torch.no_grad, "auto" and "aten" are plain PyTorch, and
            the two others raise. Second derivatives are torch's with every engine.
        residual: r, of the result's shape and dtype, in any layout; None for the plain layer.
        residual_weight: w, from 0 up to but not 1, needed with residual and refused without. At 0
            the residual takes no part: it gets no gradient, and its inf and nan do not count.

    Returns:
        `(N, K, *out)` or `(K, *out)`.

    Raises:
        TypeError: dtypes that are not supported or do not match.
        ValueError: shapes, devices or sizes that do not match, a residual_weight outside [0, 1) or
            without its residual, or a backend or engine that cannot run, here or under a transform.
        RuntimeError: the backend named is not built or not installed.

    Source: Martens et al. 2021, arXiv 2110.01765 (normalised sums).

    Example:
        >>> import torch
        >>> spec = ActSpec("relu", output_scale=2.0)
        >>> x, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
        >>> conv_act(x, weight, torch.tensor([1.0]), spec, padding="same")[0, 0, 0]
        tensor([10., 14., 14., 10.])
        >>> conv_act(x, weight, None, spec, padding=1, residual=x, residual_weight=0.6)[0, 0, 0]
        tensor([ 7.6000, 10.8000, 10.8000,  7.6000])
    """
    moves = stride, padding, dilation, groups, padding_mode
    if residual is None and residual_weight is None and not torch.compiler.is_compiling():
        y = plans.run(_plan, x, weight, bias, spec, *moves, backend, engine)
        if y is not None:
            return y
    tensors = x, weight, bias, residual
    if has_torch_function_variadic(*tensors) or stock.looked_into(*tensors):
        values = Moves(*moves), Options(backend, engine, residual, residual_weight)
        return stock.instead_of(conv_act, tensors, x, weight, bias, spec, values=values)
    unbatched = isinstance(x, Tensor) and isinstance(weight, Tensor) and x.ndim == weight.ndim - 1
    x, weight, step = _checked(x, weight, bias, spec, moves, backend, engine)
    if unbatched and isinstance(residual, Tensor):
        residual = residual.unsqueeze(0)
    y = None
    if residual is not None or residual_weight is not None:
        assert step.geometry is not None
        shape = conv_shape(x.shape, weight, step.geometry)
        residual, w = check_residual("conv_act", residual, residual_weight, x, shape)
        if w:
            y = join(x, weight, bias, Shortcut(residual, w), step)
    if y is None:
        y = layer_act(x, weight, bias, step)
    return y.squeeze(0) if unbatched else y


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    moves: tuple[Size, Size | str, Size, int, str],
    backend: Backend,
    engine: Engine,
) -> tuple[Tensor, Tensor, Step]:
    """Check a layer; return its batch, padded where torch's convolutions cannot, and its weight."""
    spec = check_spec("conv_act", spec)
    x, weight = match("conv_act", x, weight)
    if x.ndim == weight.ndim - 1:
        x = x.unsqueeze(0)
    x, geometry = padded("conv_act", x, weight, moves)
    if bias is not None:
        check_bias("conv_act", bias, x, weight.shape[0], "weight has {} output channels")
    return x, weight, Step(spec, geometry, choose(backend, x), asked_engine(engine, backend))


def _plan(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ActSpec, *how: Any) -> plans.Plan:
    """The plan of a layer, unless its input is made for it."""
    *moves, backend, engine = how
    batch, weight, step = _checked(x, weight, bias, spec, tuple(moves), backend, engine)
    return layer_plan(bias, batch, weight, step) if batch is x else None


def padded(
    op: str, x: Tensor, weight: Tensor, moves: tuple[Size, Size | str, Size, int, str]
) -> tuple[Tensor, Geometry]:
    """The batch and the convolution of it that an engine is given.

    Args:
        op: who asks, for messages.
        x: a batch.
        weight: of the convolution.
        moves: the fields of a `Moves`.

    Raises:
        ValueError: shapes or sizes that do not match.
    """
    geometry, widths = conv_geometry(op, x.shape, weight.shape, *moves)
    if widths is None:
        return x, geometry
    mode = moves[-1]
    wide = F.pad(x, widths, mode="constant" if mode == "zeros" else mode)
    # F.pad drops the memory format, except for some modes in two dimensions.
    return channels_last(wide) if is_channels_last(x) else wide, geometry
