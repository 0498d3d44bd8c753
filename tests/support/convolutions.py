"""Convolutions of every kind that csrc serves, and their numbers in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fusedshape import ActSpec, reference
from tests.support import operands
from tests.support.operands import F32, last

OPS = torch.ops.fusedshape
EPS = torch.finfo(F32).eps
LAST = torch.channels_last


def draw(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return operands.draw(*shape, dtype=dtype, seed=seed)


class Case(NamedTuple):
    x: tuple[int, ...]
    out: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.out, self.x[1], *self.kernel)

    @property
    def y(self) -> tuple[int, ...]:
        sizes = zip(*(self.x[2:], *self[2:]), strict=True)
        spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
        return (self.x[0], self.out, *spatial)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.dilation)


def conv2d(
    x: tuple[int, ...],
    out: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Case:
    kernels = (kernel, kernel) if isinstance(kernel, int) else kernel
    return Case(x, out, kernels, (stride,) * 2, (padding,) * 2, (dilation,) * 2)


CHANNELS = [16, 32, 48, 64, 80, 96, 112, 144, 528]


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    """Layers of any kind that csrc takes, each of some 10⁷ products at most."""
    n = draw_(st.sampled_from([2, 1, 3, 0]))
    widest = (60, 40, 9, 5)[n]
    batch = draw_(st.integers(0, 20) | st.sampled_from([1, 12, 13]))
    kernel, stride, padding, dilation, size = [], [], [], [], []
    for _ in range(n):
        kernel.append(draw_(st.integers(1, 5)))
        stride.append(draw_(st.integers(1, 3)))
        dilation.append(draw_(st.integers(1, 3)))
        padding.append(draw_(st.integers(0, kernel[-1] + 2)))
        least = max(1, dilation[-1] * (kernel[-1] - 1) + 1 - 2 * padding[-1])
        size.append(draw_(st.integers(least, least + widest)))
    geometry = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    positions = math.prod(Case((batch, 16, *size), 16, *geometry).y) // 16
    if n == 0:
        batch = positions = draw_(st.integers(0, 300))
    budget = 10**7 // max(1, positions * math.prod(kernel))
    channels = draw_(st.sampled_from([c for c in CHANNELS if c * 16 <= budget] or [16]))
    out = draw_(st.sampled_from([c for c in CHANNELS if c * channels <= budget] or [16]))
    if draw_(st.booleans()):
        channels, out = out, channels
    return Case((batch, channels, *size), out, *geometry)


KINDS = {
    "linear": Case((7, 32), 48),
    "linear, one row": Case((1, 16), 16),
    "linear, many rows": Case((1000, 80), 144),
    "linear, sum in pieces": Case((13, 1040), 528),
    "sum in pieces": conv2d((2, 1040, 3, 4), 528, 1),
    "sum in uneven pieces": conv2d((1, 544, 4, 4), 1168, (2, 1), padding=1),
    "taps in runs": conv2d((2, 144, 5, 5), 96, 5, padding=2),
    "a tap a run": conv2d((1, 272, 4, 5), 272, 3, padding=1),
    "weight in parts": conv2d((1, 1040, 2, 2), 528, 3, padding=1),
    "many rows": conv2d((20, 16, 10, 9), 32, 3, padding=1),
    "chunks of wgrad": conv2d((13, 32, 13, 11), 16, 3, 2, 1),
    "stride beyond kernel": conv2d((3, 32, 10, 11), 16, 1, 3),
    "stride 3, kernel 2": conv2d((13, 16, 11, 10), 80, 2, 3, 1),
    "even kernel": conv2d((2, 48, 7, 6), 16, 4, 1, 2),
    "dilated": conv2d((2, 32, 9, 12), 112, 3, 1, 2, 2),
    "dilated 3, stride 2": conv2d((13, 16, 9, 8), 16, 3, 2, 3, 3),
    "padding beyond kernel": conv2d((13, 16, 2, 3), 32, 2, 1, 4),
    "kernel beyond input": conv2d((2, 16, 2, 3), 64, 5, 1, 2),
    "one position": conv2d((25, 64, 1, 1), 80, 1),
    "height below stride": Case((3, 16, 1, 5), 16, (3, 3), (3, 2), (1, 1), (1, 1)),
    "1d": Case((13, 32, 45), 48, (4,), (2,), (3,), (2,)),
    "3d": Case((2, 16, 4, 5, 6), 32, (2, 3, 1), (1, 2, 3), (1, 0, 2), (2, 1, 1)),
    "no images": conv2d((0, 16, 5, 5), 32, 3, 2, 1),
    "no rows": Case((0, 48), 32),
}

X, W = last(torch.ones(2, 16, 5, 4)), torch.ones(32, 16, 3, 3)

ONE = ([1, 1], [0, 0], [1, 1])

Call = Callable[[], object]


def conv(x: Tensor = X, w: Tensor = W, s: Any = ONE[0], p: Any = ONE[1], d: Any = ONE[2]) -> Call:
    return lambda: OPS.native_conv(x, w, s, p, d)


def plain(case: Case, x: Tensor, w: Tensor, b: Tensor | None, spec: ActSpec) -> Tensor:
    """The layer in torch's own operations."""
    if not case.kernel:
        return reference.bias_act(F.linear(x, w, b), None, spec)
    f = (F.conv1d, F.conv2d, F.conv3d)[len(case.kernel) - 1]
    return reference.bias_act(f(x, w, b, *case.geometry), None, spec)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]
