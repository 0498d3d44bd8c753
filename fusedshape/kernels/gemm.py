"""Linear layers and 1×1 convolutions of stride 1 in Triton: one GEMM, three directions.

These kernels have been interpreted and compiled, but not yet run on a GPU.

A layer is y = φ̂(x wᵀ + b) on row-major matrices x (M, C), w (K, C), y (M, K). Forward, dgrad and
wgrad are the same kernel over operands that lie differently in memory:

    fprop     (M, K) = x · wᵀ    rows of both run along the reduction    ends with φ̂
    dgrad     (M, C) = dz · w    rows of w run along the output          ends with the φ̂′ before it
    wgrad     (K, C) = dzᵀ · x   rows of both run along the output       split over M

In the code every product is (m, n) = (m, k) · (k, n). A program computes one tile; with
`Config.persistent` it computes several, so that loading the next overlaps finishing the last.
Operands are read through pointers, or with `Config.tma` through tensor descriptors (sm_90 and
later). Channel sums and the splits of wgrad are partial sums, added up in a fixed order, so that
every run gives the same bits.

The launchers allocate with torch.empty, read nothing from the device and never wait for it, so that
CUDA graphs can capture them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedshape.activations import ids_by_registers
from fusedshape.kernels import epilogue, host, reduction, tiles
from fusedshape.kernels.epilogue import IDENTITY, Epilogue, Kind, Operands
from fusedshape.kernels.host import DTYPES, Direction, Gpu, Launch, cdiv
from fusedshape.kernels.tiles import Tiling
from fusedshape.kernels.tuned import REMEMBERED, tunable
from fusedshape.spec import KernelArgs

#: Ids of the activations that take the most registers.
_HUNGRY = ids_by_registers("most")

_SIZES = ["m_vectors", "n_vectors", "k_vectors", "a_vectors", "b_vectors", "aux_vectors"]
_SIZES += ["splits", "chunk"]


@dataclass(frozen=True)
class Product:
    """One product (m, n) = (m, k) · (k, n).

    Attributes:
        direction: fprop, dgrad or wgrad.
        m, n, k: sizes.
        dtype: of the operands.
        precision: of products of float32: "ieee" or "tf32"; "ieee" for other dtypes.
        access: bytes of the narrowest memory access, 16 if all rows are 16-byte aligned.
        describable: whether tensor descriptors can address the operands.
        reads: whether the epilogue reads a tensor of the output's size: residual or saved.
    """

    direction: Direction
    m: int
    n: int
    k: int
    dtype: torch.dtype
    precision: str = "ieee"
    access: int = 16
    describable: bool = True
    reads: bool = False

    @property
    def tensor_cores(self) -> bool:
        """Whether tensor cores multiply."""
        return self.dtype != torch.float32 or self.precision == "tf32"

    @property
    def along_k(self) -> tuple[bool, bool]:
        """Whether the rows of either operand run along the reduction."""
        # Tensor cores take tf32 along the reduction only, so `linear_dgrad` transposes the weight.
        turned = self.direction == "dgrad" and self.dtype == torch.float32
        return self.direction != "wgrad", self.direction == "fprop" or turned


@dataclass(frozen=True)
class Config(Tiling):
    """How the kernel divides a product.

    Attributes:
        tma: read and write through tensor descriptors.
        persistent: launch one program a multiprocessor, each of which computes several tiles.
        splits: number of parts of wgrad's reduction; 0 lets `host.parts_of` choose.
    """

    tma: bool = False
    persistent: bool = False
    splits: int = 0

    def shared(self, problem: Product) -> int:
        """Upper bound of the bytes of shared memory that the kernel takes."""
        part = self.block_m * self.block_n // self.slices(IDENTITY.value)
        # tf32 operands that run along the output are transposed in shared memory.
        turned = problem.direction == "wgrad" and problem.dtype == torch.float32
        operands = (self.num_stages + turned) * (self.block_m + self.block_n) * self.bytes_k
        staged = (self.tma + self.persistent) * part * problem.dtype.itemsize
        return max(operands, 4 * part) + staged + 9_216

    def tiles(self, problem: Product) -> int:
        """Tiles of the output."""
        return cdiv(problem.m, self.block_m) * cdiv(problem.n, self.block_n)

    def steps(self, problem: Product) -> int:
        """Steps along the reduction."""
        return cdiv(problem.k, self.bytes_k // problem.dtype.itemsize)


@triton.jit
def _operand(
    ptr,
    first_j,
    first_k,
    size,
    k,
    stride,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALONG_K: tl.constexpr,
    SECOND: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    DEAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile (BLOCK_J, BLOCK_K) of the first operand or (BLOCK_K, BLOCK_J) of the second.

    The rows of an operand in memory run along k or along j. Beyond k the tile is 0. Beyond `size`
    its contents do not matter, because those elements are not stored.
    """
    if TMA:
        at_j, at_k = first_j.to(tl.int32), first_k.to(tl.int32)
        tile = ptr.load([at_j, at_k]) if ALONG_K else ptr.load([at_k, at_j])
        if DEAL:
            tile = tiles.deal(tile)
        if ALONG_K == SECOND:
            tile = tile.T
    else:
        # The first operand stays in registers, where only its order must match.
        rows = tiles.dealt_rows(BLOCK_K) if DEAL and not SECOND else tl.arange(0, BLOCK_K)
        i = tl.expand_dims(first_k + rows, 1 if SECOND else 0)
        j = tl.expand_dims(first_j + tl.arange(0, BLOCK_J), 0 if SECOND else 1)
        if ALONG_K:
            pointers = ptr + tl.minimum(j, size - 1) * stride + i
            tile = tl.load(pointers) if EVEN_K else tl.load(pointers, mask=i < k, other=0.0)
        else:
            inside = j < size
            if not EVEN_K:
                inside = inside & (i < k)
            tile = tiles.load_across(ptr + (i * stride + j), inside, PRECISION)
            if DEAL and SECOND:
                tile = tiles.deal(tile)
    return tile


@triton.jit(do_not_specialize=_SIZES)
def _gemm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    operands,
    m_vectors,
    n_vectors,
    k_vectors,
    a_vectors,
    b_vectors,
    aux_vectors,
    splits,
    chunk,
    KIND: tl.constexpr,
    ALONG_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTORS: tl.constexpr,
    TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    DEAL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tiles of out = epilogue(a · b), or of the parts of a sum that is split."""
    A_ALONG_K: tl.constexpr = ALONG_K[0]
    B_ALONG_K: tl.constexpr = ALONG_K[1]
    VECTOR_M: tl.constexpr = VECTORS[0]
    VECTOR_N: tl.constexpr = VECTORS[1]
    VECTOR_K: tl.constexpr = VECTORS[2]
    BLOCK_M: tl.constexpr = TILE.m
    BLOCK_N: tl.constexpr = TILE.n
    BLOCK_K: tl.constexpr = TILE.k
    SLICES: tl.constexpr = TILE.slices
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    # These products show the compiler that rows start at multiples of a vector's width.
    m = m_vectors.to(INDEX) * VECTOR_M
    n = n_vectors.to(INDEX) * VECTOR_N
    k = k_vectors.to(INDEX) * VECTOR_K
    a_stride = a_vectors.to(INDEX) * (VECTOR_K if A_ALONG_K else VECTOR_M)
    b_stride = b_vectors.to(INDEX) * (VECTOR_K if B_ALONG_K else VECTOR_N)
    tiles_m = tl.cdiv(m, BLOCK_M).to(tl.int32)
    tiles_n = tl.cdiv(n, BLOCK_N).to(tl.int32)
    steps = tl.cdiv(k, BLOCK_K).to(tl.int32)
    if not TMA:
        # Run one all-zero step when k = 0: with a possibly empty loop the compiler may serialise
        # the wgmma instructions.
        steps = tl.maximum(steps, 1)
    count = tiles_m * tiles_n * splits

    first = tl.program_id(0)
    # With one tile a program, as in wgrad, the compiler reserves no registers for the next. In the
    # other directions it would then spill to raise occupancy.
    LOOP: tl.constexpr = PERSISTENT or A_ALONG_K
    stop = count if LOOP else first + 1
    hop = tl.num_programs(0) if LOOP else 1
    for tile in tl.range(first, stop, hop, flatten=PERSISTENT):
        index = tile
        begin = 0
        end = steps
        if SPLIT:
            index = tile % (tiles_m * tiles_n)
            split = tile // (tiles_m * tiles_n)
            begin = split * chunk
            end = tl.minimum(begin + chunk, steps)
        tile_m, tile_n = tiles.place(index, tiles_m, tiles_n, TILE.group)
        first_m = tile_m.to(INDEX) * BLOCK_M
        first_n = tile_n.to(INDEX) * BLOCK_N
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(begin, end):
            first_k = tl.full((), BLOCK_K, INDEX) * step
            a = _operand(
                *(a_ptr, first_m, first_k, m, k, a_stride),
                *(BLOCK_M, BLOCK_K, A_ALONG_K, False, EVEN_K, TMA, DEAL, PRECISION),
            )
            b = _operand(
                *(b_ptr, first_n, first_k, n, k, b_stride),
                *(BLOCK_N, BLOCK_K, B_ALONG_K, True, EVEN_K, TMA, DEAL, PRECISION),
            )
            z = tl.dot(a, b, z, input_precision=PRECISION)

        if DEAL:
            z = tiles.gather_columns(z)
            if TMA:
                z = tiles.gather_columns(z.T).T
        if SPLIT:
            row = first_m + tl.arange(0, BLOCK_M)
            col = first_n + tl.arange(0, BLOCK_N)
            index = (row * n)[:, None] + col[None, :]
            tl.store(out_ptr + split * m * n + index, z, (row < m)[:, None] & (col < n)[None, :])
        else:
            aux_stride = aux_vectors.to(INDEX) * VECTOR_N
            row = first_m + tl.arange(0, BLOCK_M)
            parts = tiles.slices(z, SLICES)
            for s in tl.static_range(SLICES):
                part_n = first_n + s * (BLOCK_N // SLICES)
                y = epilogue.finish(
                    parts[s], operands, row, row < m, part_n, n, aux_stride, tile_m, KIND
                )
                if TMA:
                    out_ptr.store([first_m.to(tl.int32), part_n.to(tl.int32)], y.to(out_ptr.dtype))
                else:
                    col = part_n + tl.arange(0, y.shape[1])
                    out_at = out_ptr + (row * n)[:, None] + col[None, :]
                    inside = (row < m)[:, None] & (col < n)[None, :]
                    tl.store(out_at, y.to(out_ptr.dtype.element_ty), inside)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: float,
    kernel_args: KernelArgs,
    *,
    tf32: bool | None = None,
    config: Config | None = None,
) -> Tensor:
    """φ̂(√(1 − w²)(x weightᵀ + bias) + w · residual); without residual φ̂(x weightᵀ + bias).

    Args:
        x: (M, C); rows may be strided.
        weight: (K, C), of x's dtype.
        bias: (K,) or None.
        residual: (M, K) or None.
        residual_weight: w, between -1 and 1; means nothing without residual.
        kernel_args: of the spec.
        tf32: whether products of float32 may be rounded; None asks torch.backends.cuda.matmul.
        config: one of `configs_for`; None takes `config_for`'s.

    Returns:
        (M, K), contiguous, of x's dtype.

    Raises:
        ValueError: `why_not` has a reason, shapes do not fit, or `config` cannot run here.
    """
    _require("linear_act", x, weight, residual)
    (m, k), n = x.shape, weight.shape[0]
    _fit("linear_act", weight=(weight, (n, k)), residual=(residual, (m, n)), bias=(bias, (n,)))
    y = x.new_empty(m, n)
    bias = None if bias is None else bias.contiguous()
    end = epilogue.forward(bias, residual, residual_weight, kernel_args)
    _multiply("fprop", k, (x, weight, y), end, tf32, config)
    return y


def linear(
    x: Tensor, weight: Tensor, *, tf32: bool | None = None, config: Config | None = None
) -> Tensor:
    """Compute x @ weight.T; see `linear_act` for the shapes."""
    _require("linear", x, weight)
    (m, k), n = x.shape, weight.shape[0]
    _fit("linear", weight=(weight, (n, k)))
    y = x.new_empty(m, n)
    _multiply("fprop", k, (x, weight, y), Epilogue(), tf32, config)
    return y


def linear_dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    bias: Tensor | None,
    kernel_args: KernelArgs,
    save_output: bool,
    bias_grad: bool,
    *,
    tf32: bool | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dz @ weight, times φ̂′ of the layer before if `saved` is given, and channel sums.

    Args:
        dz: (M, K), gradient of this layer's pre-activation.
        weight: (K, C), of dz's dtype.
        saved: (M, C), the output of the layer before if `save_output`, else its pre-activation
            without bias; None leaves φ̂′ and the constants out.
        bias: (C,) of the layer before; used only where the pre-activation was saved.
        kernel_args: of the spec of the layer before.
        save_output: what `saved` is.
        bias_grad: whether the sums are wanted.
        tf32: as in `linear_act`.
        config: as in `linear_act`.

    Returns:
        (M, C), contiguous, of dz's dtype; and float32 (C,), the sums of the unrounded gradient,
        empty unless `bias_grad`.

    Raises:
        ValueError: as `linear_act`.
    """
    _require("linear_dgrad", dz, weight, saved)
    (m, k), n = dz.shape, weight.shape[1]
    if saved is None or save_output:
        bias = None
    _fit("linear_dgrad", weight=(weight, (k, n)), saved=(saved, (m, n)), bias=(bias, (n,)))
    if dz.dtype == torch.float32:
        weight = weight.t().contiguous()  # see Product.along_k
    dx = dz.new_empty(m, n)
    bias = None if bias is None else bias.contiguous()
    end = epilogue.backward(bias, saved, None, kernel_args, save_output)
    sums = _multiply("dgrad", k, (dz, weight, dx), end, tf32, config, bias_grad)
    return dx, dz.new_empty(0, dtype=torch.float32) if sums is None else sums


def linear_wgrad(
    dz: Tensor, x: Tensor, *, tf32: bool | None = None, config: Config | None = None
) -> Tensor:
    """Compute dz.T @ x, the gradient of the weight.

    Args:
        dz: (M, K), gradient of the pre-activation.
        x: (M, C), the layer's input, of dz's dtype.
        tf32: as in `linear_act`.
        config: as in `linear_act`.

    Returns:
        (K, C), contiguous, of x's dtype; accumulated in float32 and rounded once.

    Raises:
        ValueError: as `linear_act`.
    """
    _require("linear_wgrad", dz, x)
    (k, m), n = dz.shape, x.shape[1]
    _fit("linear_wgrad", x=(x, (k, n)))
    dw = x.new_empty(m, n)
    _multiply("wgrad", k, (dz, x, dw), Epilogue(), tf32, config)
    return dw


def deals(gpu: Gpu, block_m: int, block_n: int) -> bool:
    """Whether wgrad of tf32 reorders its operands with `tiles.deal`.

    Only the tensor cores of sm_90 and sm_100 read operands from shared memory.
    """
    return 90 <= gpu.arch < 120 and min(block_m, block_n) >= 32


def why_not(*matrices: Tensor | None) -> str | None:
    """Why these kernels cannot run on such operands, or None if they can.

    Args:
        matrices: x, weight, dz, residual or saved, whichever will be passed; None is skipped.
    """
    given = [t for t in matrices if t is not None]
    for t in given:
        what = f"of shape {tuple(t.shape)} and strides {t.stride()}"
        if t.ndim != 2:
            return f"a tensor {what} has {t.ndim} dimensions, a GEMM takes 2: (rows, channels)"
        if t.dtype not in DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            return f"{t.dtype} has no Triton GEMM, only {names}; use another engine"
        if t.shape[1] > 1 and t.numel() and t.stride(1) != 1:
            return f"a matrix {what} has channels {t.stride(1)} apart, not 1; pass .contiguous()"
    if len({t.device for t in given}) > 1:
        return f"operands are on {' and '.join(sorted({str(t.device) for t in given}))}"
    return host.no_products(given[0])


#: The configurations `config_for` chooses from; among those of equal cost it takes the first.
CONFIGS: tuple[Config, ...] = (
    Config(128, 256, tma=True, persistent=True),
    Config(128, 128, num_stages=4, tma=True, persistent=True),
    Config(128, 64, num_warps=4, num_stages=4, tma=True, persistent=True),
    Config(64, 64, num_warps=4, num_stages=4, tma=True),
    Config(64, 32, num_warps=4, num_stages=6, tma=True),
    Config(128, 128, tma=True),
    Config(128, 64, num_warps=4, tma=True),
    Config(128, 128),
    Config(128, 64, num_warps=4),
    Config(64, 64, num_warps=4, num_stages=4),
    Config(64, 32, num_warps=4, num_stages=6),
    Config(128, 64, bytes_k=64),
    Config(64, 64, bytes_k=64, num_warps=4),
    Config(64, 32, bytes_k=64, num_warps=4),
)


def runs(config: Config, problem: Product, gpu: Gpu) -> bool:
    """Whether a configuration can run; it need not be one of `CONFIGS`."""
    if config.tma and (gpu.arch < 90 or not problem.describable):
        return False
    return config.shared(problem) <= gpu.shared


def configs_for(problem: Product, gpu: Gpu) -> tuple[Config, ...]:
    """Those of `CONFIGS` that can run and do not spill registers."""

    def suits(config: Config) -> bool:
        # Without tensor cores a longer step is unrolled and takes too many registers.
        if (config.bytes_k == 64) == problem.tensor_cores:
            return False
        each = config.block_m * config.block_n // (32 * config.num_warps)
        if each > 64:
            mixes = problem.direction == "fprop" and problem.reads
            return gpu.arch == 90 and problem.dtype.itemsize == 2 and not mixes
        # Unaligned rows need more addresses, and so more registers.
        return problem.access == 16 or each < 64 or config.num_warps == 8

    return tuple(c for c in CONFIGS if suits(c) and runs(c, problem, gpu))


def launch_options(tiling: Tiling, activation: int, persistent: bool = False) -> dict[str, int]:
    """Compiler options of a launch with this activation."""
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    alone = persistent and activation not in epilogue.STRAIGHT
    if tiling.slices(activation) > 1 and (alone or activation in _HUNGRY):
        # Without a limit ptxas spills a few registers to make room for one more program.
        options["maxnreg"] = 255
    return options


@tunable(configs_for)
def config_for(problem: Product, gpu: Gpu) -> Config:
    """The first of the configurations that `host.cost` finds cheapest, without measuring."""

    def cost_of(config: Config) -> float:
        splits, chunk = _splits(problem, config, gpu)
        reduction = chunk * config.bytes_k // problem.dtype.itemsize
        programs = config.tiles(problem) * splits
        return host.cost(config, programs, reduction, splits > 1, problem.tensor_cores, gpu)

    return min(configs_for(problem, gpu), key=cost_of)


def _require(op: str, *matrices: Tensor | None) -> None:
    reason = why_not(*matrices)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")


def _fit(op: str, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, must have {shape}")


class _Layout(NamedTuple):
    """Where a matrix lies.

    Attributes:
        rows, cols: its shape.
        stride: elements from row to row; the number of columns for a single row.
        aligned: whether it begins at a multiple of 16 bytes.
    """

    rows: int
    cols: int
    stride: int
    aligned: bool

    def access(self, itemsize: int) -> int:
        """Bytes of the widest access that all rows are aligned to, at most 16."""
        if not self.aligned:
            return itemsize
        return math.gcd(16, self.stride * itemsize, self.cols * itemsize)

    @property
    def reach(self) -> int:
        """Number of elements from the first to the last, both included."""
        return (self.rows - 1) * self.stride + self.cols


def _layout(matrix: Tensor) -> _Layout:
    rows, cols = matrix.shape
    stride = matrix.stride(0) if rows > 1 else cols
    return _Layout(rows, cols, stride, matrix.data_ptr() % 16 == 0)


def _precision(dtype: torch.dtype, tf32: bool | None) -> str:
    if tf32 is None:
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


class _Layouts(NamedTuple):
    """Where the matrices of a product lie; `aux` is the epilogue's."""

    a: _Layout
    b: _Layout
    out: _Layout
    aux: _Layout | None


@lru_cache(REMEMBERED)
def _problem(
    direction: Direction, dtype: torch.dtype, precision: str, k: int, layouts: _Layouts
) -> Product:
    *operands, aux = layouts
    access = min(t.access(dtype.itemsize) for t in layouts if t is not None)
    describable = all(
        t.access(dtype.itemsize) == 16 and 0 < t.rows < 2**31 and 0 < t.cols <= t.stride
        for t in operands
    )
    sizes = layouts.out.rows, layouts.out.cols, k
    return Product(direction, *sizes, dtype, precision, access, describable, aux is not None)


@lru_cache(REMEMBERED)
def _plan(problem: Product, config: Config, gpu: Gpu, layouts: _Layouts, kind: Kind) -> Launch:
    m, n, k = problem.m, problem.n, problem.k
    a, b, _, aux = layouts
    a_along_k, b_along_k = problem.along_k
    aux_stride = n if aux is None else aux.stride
    vector = 16 // problem.dtype.itemsize
    vector_m = 1 if a_along_k else math.gcd(vector, m, a.stride)
    vector_n = math.gcd(vector, n, aux_stride, 0 if b_along_k else b.stride)
    vector_k = math.gcd(vector, k, a.stride if a_along_k else 0, b.stride if b_along_k else 0)
    splits, chunk = _splits(problem, config, gpu)
    programs = config.tiles(problem) * splits
    if config.persistent:
        programs = min(programs, gpu.processors)
    mixes = problem.direction == "fprop" and problem.reads
    tile = config.tile(problem.dtype.itemsize, kind.activation, mixes)
    sizes = (
        *(m // vector_m, n // vector_n, k // vector_k),
        a.stride // (vector_k if a_along_k else vector_m),
        b.stride // (vector_k if b_along_k else vector_n),
        *(aux_stride // vector_n, splits, chunk),
    )
    wgrad_of_tf32 = problem.direction == "wgrad" and problem.precision == "tf32"
    constants: dict[str, Any] = {
        "KIND": kind,
        "ALONG_K": problem.along_k,
        "SPLIT": splits > 1,
        "PRECISION": problem.precision,
        "VECTORS": (vector_m, vector_n, vector_k),
        "TILE": tile,
        "EVEN_K": k > 0 and k % tile.k == 0,
        "TMA": config.tma,
        "PERSISTENT": config.persistent,
        "DEAL": wgrad_of_tf32 and deals(gpu, config.block_m, config.block_n),
        **launch_options(config, kind.activation, config.persistent),
        # The same from Blackwell's ptxas, with any activation.
        **({"maxnreg": 255} if gpu.arch >= 100 else {}),
    }
    reach = max(splits * m * n, *(t.reach for t in layouts if t is not None))
    return Launch((programs,), sizes, constants, reach, splits)


def _multiply(
    direction: Direction,
    k: int,
    operands: tuple[Tensor, Tensor, Tensor],
    end: Epilogue,
    tf32: bool | None,
    config: Config | None,
    column_sums: bool = False,
) -> Tensor | None:
    """Fill the last operand with the product of the others; return its columns' sums if wanted."""
    a, b, out = operands
    if a.dtype != b.dtype:
        raise ValueError(f"operands must share a dtype, got {a.dtype} and {b.dtype}")
    aux = end.operands.aux
    layouts = _Layouts(_layout(a), _layout(b), _layout(out), None if aux is None else _layout(aux))
    problem = _problem(direction, a.dtype, _precision(a.dtype, tf32), k, layouts)
    m, n = out.shape
    gpu = host.gpu_of(out.device)
    if not out.numel():
        return out.new_zeros(n, dtype=torch.float32) if column_sums else None
    if config is None:
        config = config_for(problem, gpu)
    elif not runs(config, problem, gpu):
        raise ValueError(
            f"{config} cannot run {problem} on {gpu}; take one of gemm.configs_for(problem, gpu)"
        )
    plan = _plan(problem, config, gpu, layouts, end.kind)
    with host.on_device(out):
        parts = out if plan.parts == 1 else out.new_empty(plan.parts * m, n, dtype=torch.float32)
        sums, ends = None, end.operands
        if column_sums:
            sums = out.new_empty(cdiv(m, config.block_m), n, dtype=torch.float32)
            ends = Operands(ends.bias, ends.aux, sums, ends.spec, ends.factors)
        tensors: tuple[Tensor | TensorDescriptor, ...] = a, b, parts
        if config.tma:
            tile, (a_along_k, b_along_k) = plan.constants["TILE"], problem.along_k
            written = tile.n // tile.slices
            tensors = (
                _describe(a, layouts.a, tile.m, tile.k, a_along_k),
                _describe(b, layouts.b, tile.n, tile.k, b_along_k),
                parts if plan.parts > 1 else _describe(out, layouts.out, tile.m, written),
            )
        _gemm_kernel[plan.grid](*tensors, ends, *plan.sizes, WIDE=plan.wide, **plan.constants)
        if plan.parts > 1:
            reduction.add_parts(parts.view(plan.parts, m, n), out)
        return None if sums is None else reduction.channel_sums(sums)


def _splits(problem: Product, config: Config, gpu: Gpu) -> tuple[int, int]:
    """Number of parts of the reduction, none of them empty, and of steps of each."""
    steps = config.steps(problem)
    if problem.direction != "wgrad" or steps < 2:
        return 1, steps
    block_k = config.bytes_k // problem.dtype.itemsize
    tiles = config.tiles(problem)
    return host.parts_of(config, config.splits, tiles, steps, block_k, problem.tensor_cores, gpu)


def _describe(
    matrix: Tensor, layout: _Layout, block_j: int, block_i: int, rows: bool = True
) -> TensorDescriptor:
    """Tensor descriptor for tiles (block_j, block_i), transposed unless `rows`."""
    block = [block_j, block_i] if rows else [block_i, block_j]
    return TensorDescriptor(matrix, [layout.rows, layout.cols], [layout.stride, 1], block)
