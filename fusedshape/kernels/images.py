"""Checks the arguments of convolution kernels, and views them as channels_last images.

A row of pixels (N, C, L) is an image of height 1, a matrix (M, C) are M images of one pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fusedshape.kernels import host
from fusedshape.kernels.host import DTYPES
from fusedshape.kernels.roofline import Arithmetic, Convolution
from fusedshape.kernels.tuned import REMEMBERED


def why_not(x: Tensor, weight: Tensor, *, groups: int = 1) -> str | None:
    """Why these kernels cannot compute a convolution or linear layer, or None if they can.

    Args:
        x: the input, (N, C, H, W), (N, C, L) or (M, C).
        weight: (K, C / groups, R, S), (K, C / groups, R) or (K, C).
        groups: of the convolution.

    Example:
        >>> why_not(torch.zeros(2, 8, 5, 5), torch.zeros(4, 2, 3, 3), groups=4)
        'groups=4, the Triton kernels have groups=1 only; use another engine'
    """
    if 0 in (x.shape[1], *weight.shape):
        return (
            f"x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)} leave nothing "
            "to sum; use another engine"
        )
    return _why_not(x, weight, groups)


def _why_not(x: Tensor, weight: Tensor, groups: int = 1, layout: bool = True) -> str | None:
    if groups != 1:
        return f"groups={groups}, the Triton kernels have groups=1 only; use another engine"
    if not 2 <= x.ndim <= 4 or x.ndim != weight.ndim:
        return (
            f"the Triton kernels take x and weight of 2, 3 or 4 dimensions each, got shapes "
            f"{tuple(x.shape)} and {tuple(weight.shape)}; use another engine"
        )
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return (
            f"the Triton kernels multiply two tensors of the same dtype out of {names}, got "
            f"{x.dtype} and {weight.dtype}; use another engine"
        )
    if layout and not _is_packed(as_images(x)):
        return (
            f"x of shape {tuple(x.shape)} and strides {x.stride()} is not channels_last: channels "
            "must be innermost and memory dense; pass x.to(memory_format=torch.channels_last), for "
            "three dimensions x.transpose(1, 2).contiguous().transpose(1, 2)"
        )
    if x.device != weight.device:
        return f"tensors are on {x.device} and {weight.device}; move them to one device"
    return host.no_products(x)


def check(op: str, x: Tensor, weight: Tensor, layout: bool = True) -> None:
    """Raise a ValueError if these kernels cannot run; `layout` also demands channels_last."""
    reason = _why_not(x, weight, layout=layout)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")


def check_shape(op: str, name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if t is given and has another shape."""
    if t is not None and tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, it must be {shape}")


def vector(op: str, bias: Tensor | None, channels: int) -> Tensor | None:
    """The bias made contiguous, or None; ValueError unless it has one number a channel."""
    check_shape(op, "bias", bias, (channels,))
    return None if bias is None else bias.contiguous()


def problem_of(
    op: str,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> Convolution:
    """Describe a convolution, in two dimensions: a one-dimensional one has height 1."""
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    multiplied = arithmetic(dtype, linear=len(weight_size) == 2)
    return _checked(op, tuple(input_size), tuple(weight_size), *geometry, multiplied)


@lru_cache(REMEMBERED)
def _checked(
    op: str,
    input_size: tuple[int, ...],
    weight_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    arithmetic: Arithmetic,
) -> Convolution:
    n = len(weight_size) - 2
    if len(input_size) != n + 2 or input_size[1] != weight_size[1]:
        raise ValueError(
            f"{op}: a weight of shape {weight_size} wants an input of {n + 2} dimensions "
            f"and {weight_size[1]} channels, got {input_size}"
        )
    if 0 in weight_size:
        raise ValueError(f"{op}: a weight of shape {weight_size} leaves nothing to sum")
    for name, numbers, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(numbers) != n or any(number < least for number in numbers):
            raise ValueError(
                f"{op}: {name}={list(numbers)} must be {n} numbers of at least {least}"
            )

    def two(numbers: Sequence[int], missing: int) -> tuple[int, int]:
        first, second = (*[missing] * (2 - n), *numbers)
        return first, second

    height, width = two(input_size[2:], 1)
    return Convolution(
        *(input_size[0], input_size[1], height, width, weight_size[0]),
        *(two(weight_size[2:], 1), two(stride, 1), two(padding, 0), two(dilation, 1)),
        arithmetic=arithmetic,
    )


def arithmetic(dtype: torch.dtype, linear: bool) -> Arithmetic:
    """The arithmetic torch would use; its switches for convolutions and products differ."""
    if dtype == torch.float16:
        return "float16"
    if dtype == torch.bfloat16:
        return "bfloat16"
    switch = torch.backends.cuda.matmul if linear else torch.backends.cudnn.conv
    return "tf32" if switch.fp32_precision == "tf32" else "float32"


def shape_like(x: Tensor, images: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of images, (N, C, H, W), with as many dimensions as x has."""
    return (*images[:2], *images[2:][4 - x.ndim :])


def as_images(t: Tensor) -> Tensor:
    """View t as (N, C, H, W)."""
    return t if t.ndim == 4 else t.unsqueeze(2) if t.ndim == 3 else t[:, :, None, None]


def _is_packed(images: Tensor) -> bool:
    return not images.numel() or images.is_contiguous(memory_format=torch.channels_last)


def packed(images: Tensor) -> Tensor:
    """Make images channels_last; copies them only if they are not."""
    return images.contiguous(memory_format=torch.channels_last)


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised channels_last tensor of a shape of 2 to 4 dimensions."""
    batch, channels, *rest = shape
    t = like.new_empty(batch, *rest, channels)
    return t.movedim(-1, 1)


def as_matrix(t: Tensor) -> Tensor:
    """Reshape (N, C, …) to (pixels, channels); a view if t is channels_last."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def from_matrix(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `as_matrix`, for the given shape."""
    batch, channels, *rest = shape
    return t.view(batch, *rest, channels).movedim(-1, 1)
