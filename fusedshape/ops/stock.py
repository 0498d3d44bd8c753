"""The ops in torch's own functions, for callers that look into an op instead of running it.

torch.jit's tracer, and with it the older ONNX exporter, keeps neither kernels nor autograd
functions of ours; a tensor of a class with a ``__torch_dispatch__`` (a DTensor) answers to torch's
operators alone; and ExpandedWeights, which make gradients sample by sample, know a handful of
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from fusedshape import reference
from fusedshape.activations import Phi
from fusedshape.ops.arguments import Moves, Options
from fusedshape.ops.checks import (
    check_bias,
    check_linear,
    check_residual,
    check_spec,
    check_tensor,
    conv_geometry,
    match,
)
from fusedshape.ops.choice import engine_named
from fusedshape.ops.dispatch import choose, refuse_kernels
from fusedshape.spec import ActSpec

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_ORDINARY = {Tensor, nn.Parameter, nn.Buffer}
_is_tracing: Callable[[], bool] = torch._C._is_tracing


def looked_into(*tensors: Any) -> bool:
    """Whether the ops of this file must compute, for these arguments or for all."""
    if torch.compiler.is_compiling():
        return False
    if _is_tracing():
        return True
    for t in tensors:  # any() is slower
        if type(t) not in _ORDINARY and isinstance(t, Tensor) and _dispatches(t):
            return True
    return False


def _dispatches(t: Tensor) -> bool:
    cls = type(t)
    if cls.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return False
    # The classes of torch.compile and torch.export work with kernels.
    return not cls.__module__.startswith("torch._subclasses")


def instead_of(
    op: Callable[..., Tensor],
    tensors: Sequence[Any],
    *args: Any,
    values: tuple[Moves | Options, ...] = (),
    **how: Any,
) -> Any:
    """What a call of `op` returns if one of its tensors is `looked_into` or overrides torch.

    An override (``__torch_function__``) is asked first, by torch's rules: of classes of tensors,
    proxies and modes. It is given the arguments of the public op.

    Args:
        op: the public op; the function of its name in this file serves instead.
        tensors: those among its arguments.
        args: arguments by position.
        values: arguments by name, as values, which the function here takes as they are.
        how: other arguments by name.
    """
    if has_torch_function(tensors) and not any(map(_is_expanded, tensors)):
        for value in values:
            how |= value._asdict()
        return handle_torch_function(op, tensors, *args, **how)
    return globals()[op.__name__](*args, *values, **how)


@contextmanager
def untraced() -> Iterator[None]:
    """Suspend torch.jit's tracer, so that sizes are numbers and nothing is recorded."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    set_state: Callable[[Any], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        yield
    finally:
        set_state(state)


def _checked(t: Any) -> Any:
    """The tensor to check: an ExpandedWeight supports only a few queries."""
    return t.orig_weight if _is_expanded(t) else t


def _is_expanded(t: Any) -> bool:
    # By name, because importing the class would import decompositions.
    return type(t).__name__ == "ExpandedWeight"


def shape_of(x: Tensor) -> torch.Size:
    """The shape of x, as numbers in torch.jit's tracer too."""
    if torch.compiler.is_compiling() or not _is_tracing():
        return x.shape
    with untraced():
        return x.shape


def shaped_act(x: Tensor, spec: ActSpec, *, backend: str = "auto") -> Tensor:
    """φ̂(x)."""
    check_tensor("shaped_act", "x", x)
    return bias_act(x, None, spec, dim=0, backend=backend)


def bias_act(
    x: Tensor, bias: Tensor | None, spec: ActSpec, *, dim: int = 1, backend: str = "auto"
) -> Tensor:
    """φ̂(x + b)."""
    check_tensor("bias_act", "x", _checked(x))
    check_spec("bias_act", spec)
    if _is_expanded(x) or _is_expanded(bias):
        raise RuntimeError(
            "bias_act: torch's ExpandedWeights have no sum of a tensor and a bias; use conv_act or "
            "linear_act, or gradients by torch.func.vmap"
        )
    _refuse_kernels(x, backend)
    if bias is not None:
        if not -x.ndim <= dim < x.ndim:
            shape = tuple(shape_of(x))
            raise IndexError(f"bias_act: dim={dim} is out of range for x of shape {shape}")
        with untraced():
            check_bias("bias_act", bias, x, x.shape[dim], "x has {} channels along dim")
    return reference.bias_act(x, bias, spec, dim, _phi(spec))


def _refuse_kernels(x: Tensor, backend: str, engine: str = "auto") -> None:
    choose(backend, x)
    refuse_kernels("backend", backend)
    if engine != "auto":
        engine_named(engine)
        refuse_kernels("engine", engine)


def conv_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: ActSpec, moves: Moves, options: Options
) -> Tensor:
    """φ̂(√(1 − w²)·(x ⋆ W + b) + w·r)."""
    check_spec("conv_act", spec)
    with untraced():
        w, b = _checked(weight), _checked(bias)
        match("conv_act", x, w)
        shape = x.shape if x.ndim == w.ndim else (1, *x.shape)
        geometry, widths = conv_geometry("conv_act", tuple(shape), tuple(w.shape), *moves)
        if b is not None:
            check_bias("conv_act", b, x, w.shape[0], "weight has {} output channels")
    if widths is not None:
        x = F.pad(
            x, widths, mode="constant" if moves.padding_mode == "zeros" else moves.padding_mode
        )
    # Tuples, because torch's ExpandedWeights take a list of ones for a dilation.
    strides, pads, dilations = map(tuple, geometry[:3])
    convolve = _CONVOLUTIONS[len(strides) - 1]
    z = convolve(x, weight, bias, strides, pads, dilations, geometry.groups)
    return _joined("conv_act", z, spec, options)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: ActSpec, options: Options
) -> Tensor:
    """φ̂(√(1 − w²)·(x Wᵀ + b) + w·r)."""
    check_spec("linear_act", spec)
    with untraced():
        w, b = _checked(weight), _checked(bias)
        match("linear_act", x, w)
        check_linear("linear_act", tuple(x.shape), w)
        if b is not None:
            check_bias("linear_act", b, x, w.shape[0], "weight has {} output features")
    z = F.linear(x, weight, bias)
    return _joined("linear_act", z, spec, options)


def conv_chain(x: Tensor, layers: Sequence[Any], *, max_length: int | None = None) -> Tensor:
    """φ̂ₗ(yₗ₋₁ ⋆ Wₗ + bₗ), layer after layer."""
    dims = [_checked(layer.weight).ndim for layer in layers]
    for i, layer in enumerate(layers):
        if dims[i] != dims[0]:
            raise ValueError(
                f"conv_chain: layer {i}: weight has {dims[i]} dimensions, that of layer 0 has "
                f"{dims[0]}; make a chain of each kind"
            )
        tensors = layer.weight, layer.bias
        options = Options(layer.backend, layer.engine)
        if dims[i] == 2:
            x = linear_act(x, *tensors, layer.spec, options)
        else:
            moves = Moves(layer.stride, layer.padding, layer.dilation, layer.groups)
            x = conv_act(x, *tensors, layer.spec, moves, options)
    return x


def _joined(op: str, z: Tensor, spec: ActSpec, options: Options) -> Tensor:
    """φ̂ of a product, and of what joins it."""
    backend, engine, residual, residual_weight = options
    _refuse_kernels(z, backend, engine)
    if residual is not None or residual_weight is not None:
        with untraced():
            r, w = check_residual(op, residual, residual_weight, z, tuple(z.shape))
        if w:
            assert residual is not None
            z = reference.joined(z, None, residual.to(r.dtype), w, 0).to(z.dtype)
    return reference.bias_act(z, None, spec, 0, _phi(spec))


def _phi(spec: ActSpec) -> Phi:
    """φ, in operators that the older ONNX exporter knows if that is tracing."""
    row = spec.row
    if row.exported is not None and _is_tracing() and torch.onnx.is_in_onnx_export():
        return row.exported
    return row.value
