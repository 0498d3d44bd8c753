"""Tiles of a product: how the host cuts it into them, and what a kernel does with one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from fusedshape.kernels import epilogue


@dataclass(frozen=True)
class Tiling:
    """How a kernel that ends with an activation divides its work.

    Attributes:
        block_m, block_n: the tile of the output, powers of two, 16 or more.
        bytes_k: of the reduction in one step, a power of two.
        num_warps: warps of one program.
        num_stages: steps in flight at a time.
        group_m: rows of tiles that are done together, to share operands in L2.
    """

    block_m: int
    block_n: int
    bytes_k: int = 128
    num_warps: int = 8
    num_stages: int = 3
    group_m: int = 8

    def tile(self, itemsize: int, activation: int = -1, mixes: bool = False) -> Tile:
        """The tile for operands of elements of so many bytes."""
        slices = self.slices(activation, mixes)
        return Tile(self.block_m, self.block_n, self.bytes_k // itemsize, slices, self.group_m)

    def slices(self, activation: int, mixes: bool = False) -> int:
        """Number of column slices in which a tile goes through the epilogue.

        A slice has 32 numbers a thread; 16 with a residual, or if there are several slices and the
        activation is curved. Registers hold the rest of the tile meanwhile, so larger slices spill.
        """
        each = self.block_m * self.block_n // (32 * self.num_warps)
        parts = max(1, min(4, each // 32))
        finer = (mixes and each > 16) or (parts > 1 and activation not in epilogue.STRAIGHT)
        return 2 * parts if finer else parts


class Tile(NamedTuple):
    """A tile of a product, as a kernel takes it.

    Attributes:
        m, n: rows and columns.
        k: of the reduction in one step.
        slices: number of column slices in which it goes through the epilogue.
        group: rows of tiles that are done together.
    """

    m: int
    n: int
    k: int
    slices: int = 1
    group: int = 1


@triton.jit
def place(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of the index-th tile, going down GROUP_M tiles before moving right."""
    width = GROUP_M * tiles_n
    first = (index // width) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + (index % width) % height, (index % width) // height


@triton.jit
def load_across(pointers, mask, PRECISION: tl.constexpr):
    """Load a tile whose rows in memory run across the reduction.

    Tensor cores take tf32 along the reduction only. By default the compiler transposes the tile
    while it copies it to shared memory, 4 bytes at a time. Loaded as integers, rows are copied as
    they lie, 16 bytes at a time, and transposed on the way to the tensor cores.
    """
    if PRECISION == "tf32":
        integers = pointers.to(tl.pointer_type(tl.int32), bitcast=True)
        tile = tl.load(integers, mask=mask, other=0).to(tl.float32, bitcast=True)
    else:
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def deal(tile):
    """Reorder the rows and columns of a tile that is transposed in shared memory.

    A thread loads 4 neighbours of a row. Transposed as they are, they belong to 4 rows: writes of 4
    bytes, with up to 16 threads on one bank. Reordered, a thread has 4 neighbours of a column, and
    the next thread those of the next column: writes of 16 bytes, over all banks. `dealt_rows` gives
    the new order of rows; in every 32 columns, 8 · 4 become 4 · 8.
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1]
    parts = tl.reshape(tile, (4, ROWS // 4, COLS // 32, 8, 4))
    return tl.reshape(tl.permute(parts, (1, 0, 2, 4, 3)), (ROWS, COLS))


@triton.jit
def dealt_rows(ROWS: tl.constexpr):
    """The rows of a tile in the order in which `deal` leaves them."""
    i = tl.arange(0, ROWS)
    return (i % 4) * (ROWS // 4) + i // 4


@triton.jit
def gather_columns(tile):
    """Undo what `deal` did to the columns."""
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1]
    parts = tl.reshape(tile, (ROWS, COLS // 32, 4, 8))
    return tl.reshape(tl.permute(parts, (0, 1, 3, 2)), (ROWS, COLS))


@triton.jit
def slices(z, COUNT: tl.constexpr):
    """Split tile z into COUNT column slices, a power of two, as a tuple.

    A tile of tensor cores has up to 128 numbers a thread. Computing an activation on all of them at
    once spills registers; on 32 at a time few activations do, on 16 hardly any.
    """
    if COUNT == 1:
        parts = (z,)
    else:
        left, right = z.reshape(z.shape[0], 2, z.shape[1] // 2).permute(0, 2, 1).split()
        parts = slices(left, COUNT // 2) + slices(right, COUNT // 2)
    return parts
