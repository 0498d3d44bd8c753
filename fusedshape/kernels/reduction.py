"""Adds up the partial sums of programs in a fixed order, so that every run gives the same bits."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fusedshape.kernels import host
from fusedshape.kernels.host import cdiv, next_power_of_2

#: Partial sums of a channel that one program adds up.
CHANNEL_PARTS = 4096
#: How many numbers one program of `add_parts` reads at a time, and from at most how many parts.
SUM_TILE, SUM_PARTS = 2048, 32


@triton.jit(do_not_specialize=["parts"])
def _reduce_kernel(
    sums_ptr,
    out_ptr,
    parts,
    channels,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    T: tl.constexpr = sums_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    if WIDE:
        chunk = chunk.to(tl.int64)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    end = tl.minimum((chunk + 1) * PARTS, parts)
    total = tl.zeros((ROWS, COLS), T)
    first = chunk * PARTS
    while first < end:
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (col < channels)[None, :]
        total += tl.load(sums_ptr + row[:, None] * channels + col[None, :], mask=inside, other=0.0)
        first += ROWS
    tl.store(out_ptr + chunk * channels + col, tl.sum(total, 0), mask=col < channels)


def channel_sums(sums: Tensor) -> Tensor:
    """Add up the rows of a matrix (parts, channels)."""
    while sums.shape[0] > 1:
        parts, channels = sums.shape
        out = sums.new_empty(cdiv(parts, CHANNEL_PARTS), channels)
        _reduce_kernel[(cdiv(channels, 16), out.shape[0])](
            sums,
            out,
            parts,
            channels,
            PARTS=CHANNEL_PARTS,
            ROWS=min(256, next_power_of_2(parts)),
            COLS=16,
            WIDE=sums.numel() >= host.WIDE,
            num_warps=8,
        )
        sums = out
    return sums.view(-1)


@triton.jit(do_not_specialize=["vectors", "parts"])
def _sum_kernel(
    parts_ptr,
    out_ptr,
    vectors,
    parts,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    size = vectors.to(INDEX) * VECTOR
    i = tl.program_id(0).to(INDEX) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    # Several parts are loaded at a time, because each load waits for memory.
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)
        inside = (part < parts)[:, None] & (i < size)[None, :]
        total += tl.load(parts_ptr + (part * size)[:, None] + i[None, :], inside, 0.0)
    tl.store(out_ptr + i, tl.sum(total, 0).to(out_ptr.dtype.element_ty), i < size)


def add_parts(parts: Tensor, out: Tensor) -> None:
    """Add up `parts`, float32 (number, *out.shape), and write the sum to `out`."""
    number, size = parts.shape[0], out.numel()
    vector = math.gcd(4, size)
    rows = min(SUM_PARTS, next_power_of_2(number))
    cols = SUM_TILE // rows
    _sum_kernel[(cdiv(size, cols),)](
        *(parts, out, size // vector, number),
        VECTOR=vector,
        ROWS=rows,
        COLS=cols,
        WIDE=parts.numel() >= host.WIDE,
    )
