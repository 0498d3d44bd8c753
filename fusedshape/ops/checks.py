"""What every op requires of its arguments, and the errors it raises."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedshape.compiling import constant_for_dynamo
from fusedshape.spec import ActSpec, static
from fusedshape.validate import real, shown

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Size = int | Sequence[int]


class Geometry(NamedTuple):
    """How a convolution moves over its input, in the order in which torch.convolution takes it.

    Attributes:
        stride: one number for each spatial dimension, and so are the next two.
        padding: on both sides.
        dilation: distance of taps.
        transposed: False, as no engine has transposed convolutions.
        output_padding: zeros.
        groups: number of groups.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


_P = ParamSpec("_P")
_T = TypeVar("_T")
# At import, because Dynamo of torch 2.11 cannot trace is_autocast_available.
_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu")))
_LARGEST = 2**31  # no tensor has as many rows
_PAD_MODES = ("zeros", "reflect", "replicate", "circular")


def transformed() -> bool:
    """Whether plain PyTorch must serve: torch.func transforms, forward-mode AD, torch.export.

    Transforms look inside Functions. An export drops their backward, so that the exported program
    would lack their gradients without a warning; under torch.no_grad it may keep our operators,
    except for ONNX, which does not know them.

    Since torch 2.14, torch.compile rejects dual tensors if a full graph is asked for, and otherwise
    runs eagerly what takes them. `torch.func.jvp` inside compiled code works as before.
    """
    # Dynamo guards the level because it is read here.
    return (
        _functorch()
        or forward_ad._current_level >= 0
        or (_exporting() and (torch.is_grad_enabled() or _to_onnx()))
    )


# Dynamo enters transforms while it traces, and compiles anew under others.
@constant_for_dynamo
def _functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


# torch 2.11 takes everything that Dynamo traces for an export.
@constant_for_dynamo
def _exporting() -> bool:
    return torch.compiler.is_exporting()


@constant_for_dynamo
def _to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def plain_backward(grad: Tensor) -> bool:
    """Whether plain PyTorch must compute backward: to be differentiated again, or under vmap.

    ``torch.autograd.grad(..., is_grads_batched=True)`` uses an older vmap, which is not among the
    torch.func transforms and needs a test of its own.
    """
    if torch.is_grad_enabled() or transformed():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def check_tensor(op: str, name: str, x: Tensor) -> None:
    """Raise TypeError unless x is a dense tensor of a supported dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "is nested" if x.is_nested else f"has layout {x.layout}"
        raise TypeError(f"{op}: {name} {kind}; supported are dense tensors: convert it first")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} has dtype {x.dtype}; supported are float32, float64, bfloat16 and "
            "float16: convert it with .to() first"
        )


def check_spec(op: str, spec: ActSpec) -> ActSpec:
    """Raise TypeError unless spec is an ActSpec; return it, constant under torch.compile."""
    if not isinstance(spec, ActSpec):
        raise TypeError(f"{op}: spec must be an ActSpec, got {type(spec).__name__}")
    return static(spec)


def check_bias(op: str, bias: Tensor, x: Tensor, channels: int, why: str) -> None:
    """Raise unless bias is a vector of `channels` numbers beside x; `why` has a place for them."""
    check_tensor(op, "bias", bias)
    if bias.ndim != 1 or bias.shape[0] != channels:
        why = why.format(channels)
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, {why}; pass ({channels},)")
    if bias.device != x.device:
        raise ValueError(f"{op}: bias is on {bias.device}, x on {x.device}; move one of them")
    if bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{op}: bias has dtype {bias.dtype}, x {x.dtype}; make it {x.dtype} or float32"
        )


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    autocast = device in _AUTOCAST and torch.is_autocast_enabled(device)
    return autocast and x.dtype != torch.float64


def match(op: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Check x against weight, and cast both under autocast."""
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight)
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device}, x on {x.device}; move one of them")
    if _autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), weight.to(dtype)
    if weight.dtype != x.dtype:
        raise TypeError(f"{op}: weight has dtype {weight.dtype}, x {x.dtype}; convert one of them")
    return x, weight


def _remembered(check: Callable[_P, _T]) -> Callable[_P, _T]:
    """Cache the results of `check`, which takes several microseconds."""
    # Typed, so that 1.0 does not find the result for 1.
    known = functools.lru_cache(4096, typed=True)(check)

    def look_up(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not torch.compiler.is_compiling():
            try:
                return known(*args, **kwargs)  # type: ignore[arg-type]
            except TypeError:  # lists and symbols are not hashable
                pass
        return check(*args, **kwargs)

    return look_up


@_remembered
def conv_geometry(
    op: str,
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    mode: str = "zeros",
) -> tuple[Geometry, list[int] | None]:
    """Check a convolution: how torch convolves, and what F.pad must add to the input before.

    Args:
        op: the caller, for messages.
        shape: of the input, with its batch.
        weight: shape of the weight.
        stride: as in `conv_act`, and so are the next four.
        padding: on both sides of each spatial dimension.
        dilation: distance of taps.
        groups: number of groups.
        mode: of the padding.

    Returns:
        The geometry, not to be written on; and F.pad's widths, None where there is nothing to add.

    Raises:
        ValueError: shapes or sizes that do not match.
    """
    n = _check_conv(op, shape, weight, groups)
    strides = expand(op, "stride", stride, n, 1)
    dilations = expand(op, "dilation", dilation, n, 1)
    kernel, sizes = weight[2:], list(shape[2:])
    pads, extra = padding_of(op, kernel, strides, padding, dilations, mode)
    widths = None
    if any(extra) or (mode != "zeros" and any(pads)):
        before = [0] * n if mode == "zeros" else pads
        _check_pad(op, sizes, before, extra, mode)
        pads = pads if mode == "zeros" else [0] * n
        sides = [(p, p + more) for p, more in zip(before, extra, strict=True)]
        sizes = [size + sum(side) for size, side in zip(sizes, sides, strict=True)]
        widths = [p for side in reversed(sides) for p in side]
    _check_reach(op, sizes, kernel, pads, dilations)
    return Geometry(strides, pads, dilations, False, [0] * n, groups), widths


def _check_conv(op: str, shape: Sequence[int], weight: Sequence[int], groups: int) -> int:
    """Raise unless weight convolves an input of `shape`; return the spatial dimensions."""
    n = len(weight) - 2
    if not 1 <= n <= 3:
        raise ValueError(f"{op}: weight must have 3, 4 or 5 dimensions, got {tuple(weight)}")
    if len(shape) != n + 2:
        raise ValueError(
            f"{op}: x has shape {tuple(shape)}; a weight of shape {tuple(weight)} "
            f"wants {n + 2} dimensions, or {n + 1} without a batch"
        )
    out, per_group = weight[:2]
    if not isinstance(groups, int) or groups is True or groups < 1 or out < 1 or out % groups:
        raise ValueError(
            f"{op}: groups={shown(groups)} must be a positive divisor of the {out} output channels"
        )
    channels = shape[1]
    if channels < 1:
        raise ValueError(f"{op}: x has {channels} channels; at least 1 is needed")
    if channels != per_group * groups:
        raise ValueError(
            f"{op}: weight has {per_group} input channels per group, input has {channels} "
            f"and groups={groups}; weight.shape[1] * groups must equal the input's channels"
        )
    return n


def check_linear(op: str, shape: Sequence[int], weight: Tensor) -> None:
    """Raise unless weight is a matrix for an input of `shape`."""
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight must have 2 dimensions, got {tuple(weight.shape)}")
    if not shape or shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x has shape {tuple(shape)}, weight {tuple(weight.shape)}; "
            f"x's last dimension must be {weight.shape[1]}"
        )


def _check_reach(
    op: str, sizes: Sequence[int], kernel: Sequence[int], pads: list[int], dilation: list[int]
) -> None:
    """Raise where the kernel reaches beyond the padded input, whose spatial sizes are `sizes`."""
    for d in range(len(kernel)):
        _check_size(op, sizes[d], d)
        reach = dilation[d] * (kernel[d] - 1) + 1
        if kernel[d] < 1 or sizes[d] + 2 * pads[d] < reach:
            raise ValueError(
                f"{op}: a kernel of {kernel[d]} with dilation {dilation[d]} reaches over "
                f"{reach}, but the padded input has {sizes[d] + 2 * pads[d]} in spatial "
                f"dimension {d}; pad more or use a smaller kernel"
            )


def _check_pad(
    op: str, sizes: Sequence[int], pads: Sequence[int], extra: Sequence[int], mode: str
) -> None:
    """Raise where `mode` has not the numbers to pad spatial sizes by pads, and extra at the end."""
    for d, size in enumerate(sizes):
        _check_size(op, size, d)
        pad = pads[d] + extra[d]
        most = {"reflect": size - 1, "circular": size}.get(mode, pad)
        if pad > most:
            raise ValueError(
                f"{op}: padding_mode={mode!r} pads size {size} by {most} at most, got a padding of "
                f"{pad} in spatial dimension {d}; pad less, or use padding_mode='replicate'"
            )


def _check_size(op: str, size: int, d: int) -> None:
    """Raise where x has nothing in spatial dimension d."""
    if size < 1:
        raise ValueError(
            f"{op}: x has size {size} in spatial dimension {d}; at least 1 is needed, whatever the "
            "padding"
        )


def check_residual(
    op: str,
    residual: Tensor | None,
    residual_weight: float | None,
    x: Tensor,
    shape: Sequence[int],
) -> tuple[Tensor, float]:
    """Check what joins an output of `shape` and x's dtype; return it in the dtype of autocast.

    Raises:
        TypeError, ValueError: one without the other, a weight outside [0, 1), or a tensor that is
            not like the output.
    """
    if residual is None or residual_weight is None:
        given, other = "residual", "residual_weight"
        if residual is None:
            given, other = other, given
        raise ValueError(f"{op}: {given} was given without {other}; give both or neither")
    check_tensor(op, "residual", residual)
    if isinstance(residual_weight, bool) or not isinstance(residual_weight, (int, float)):
        if isinstance(residual_weight, Tensor):  # real's message says how to pass a fixed number
            real(op, "residual_weight", residual_weight)
        kind = type(residual_weight).__name__
        raise TypeError(f"{op}: residual_weight must be a number, got a {kind}")
    if not 0 <= residual_weight < 1:
        raise ValueError(
            f"{op}: residual_weight={residual_weight} is outside [0, 1), which leaves nothing of "
            "the layer in √(1 − w²)·(x ⋆ W + b) + w·residual; take a smaller weight, or leave the "
            "layer out"
        )
    if list(residual.shape) != list(shape):
        raise ValueError(
            f"{op}: residual has shape {tuple(residual.shape)}, the output {tuple(shape)}; they "
            "must be the same"
        )
    if residual.device != x.device:
        raise ValueError(
            f"{op}: residual is on {residual.device}, x on {x.device}; move one of them"
        )
    if residual.dtype != x.dtype:
        if not _autocasts(x):
            raise TypeError(
                f"{op}: residual has dtype {residual.dtype}, the output {x.dtype}; convert it"
            )
        residual = residual.to(x.dtype)
    # A float that varies is symbolic under torch.compile; its methods make a constant of it.
    return residual, residual_weight.__float__()


def is_channels_last(x: Tensor) -> bool:
    """Whether x, (N, C, *spatial), is dense in memory with its channels innermost."""
    return x.movedim(1, -1).is_contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Copy x, if needed, to be dense in memory with its channels innermost."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def conv_shape(shape: Sequence[int], weight: Tensor, geometry: Geometry) -> list[int]:
    """Shape of a convolution's output for an input of `shape`."""
    strides, pads, dilations, *_ = geometry
    out = [shape[0], weight.shape[0]]
    for d in range(len(strides)):
        reach = dilations[d] * (weight.shape[2 + d] - 1) + 1
        out.append((shape[2 + d] + 2 * pads[d] - reach) // strides[d] + 1)
    return out


def expand(op: str, name: str, value: Size, n: int, least: int) -> list[int]:
    """One integer for each of n spatial dimensions.

    Raises:
        ValueError: other than one or n integers, or one below `least`.
    """
    values = [value] * n if isinstance(value, int) else _listed(value)
    if len(values) == 1:
        values *= n
    fit = len(values) == n
    for v in values:  # twice as fast as any(), and this runs three times a layer
        fit = fit and isinstance(v, int) and v is not True and least <= v < _LARGEST
    if not fit:
        raise ValueError(
            f"{op}: {name}={shown(value)} must be an integer of at least {least} and below "
            f"{_LARGEST}, or {n} of them"
        )
    return values


def _listed(value: Any) -> list[int]:
    """The integers in a value, NumPy's included; empty if it holds anything else."""
    try:
        values = value if isinstance(value, Sequence) else [value]
        return [v if isinstance(v, int) else operator.index(v) for v in values]
    except TypeError:
        return []


def padding_of(
    op: str,
    kernel: Sequence[int],
    stride: list[int],
    padding: Size | str,
    dilation: list[int],
    mode: str,
) -> tuple[list[int], list[int]]:
    """Padding on both sides of each spatial dimension, and what comes on top of it at the end.

    Raises:
        ValueError: an unknown mode or word, "same" with a stride, or sizes below 0.
    """
    if not isinstance(mode, str) or mode not in _PAD_MODES:
        raise ValueError(
            f"{op}: padding_mode={shown(mode)} is unknown; known: {', '.join(_PAD_MODES)}"
        )
    n = len(kernel)
    if not isinstance(padding, str):
        return expand(op, "padding", padding, n, 0), [0] * n
    if padding == "valid":
        return [0] * n, [0] * n
    if padding != "same":
        raise ValueError(f"{op}: padding={padding!r}; known words: 'valid', 'same'")
    if any(s != 1 for s in stride):
        raise ValueError(
            f"{op}: padding='same' needs stride 1, got {tuple(stride)}; give the padding as numbers"
        )
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [t // 2 for t in totals], [t % 2 for t in totals]


def node(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """`function.apply` without torch's Python wrapper, which only torch.func needs.

    Right after a convolution has emptied the CPU's caches, the wrapper takes about 50 µs.
    """
    if torch.compiler.is_compiling():
        return function.apply
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
