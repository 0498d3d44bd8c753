"""bias_act, act_grad and their in-place forms in Triton: the kernels and their launchers.

These kernels have been interpreted and compiled, but not yet run on a GPU.

A dense tensor is seen as a matrix whose rows are contiguous in memory. Channels innermost
(channels_last, linear layers): a row is a pixel, a column a channel. Otherwise (NCHW): a row is one
channel of one image, a column a position in it. Without bias and bias gradient: one long row. Each
program computes one tile. For the bias gradient it goes down its columns, or along its rows, and
writes one partial sum for each; a second kernel adds these up in a fixed order.

The launchers are what the ops `fusedshape::triton_*` run. They allocate with torch.empty, read
nothing from the device and never wait for it, so that CUDA graphs can capture them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedshape.activations import ids_by_registers
from fusedshape.kernels import epilogue, host, reduction
from fusedshape.kernels.host import cdiv, next_power_of_2
from fusedshape.kernels.tuned import REMEMBERED
from fusedshape.reference import opmath_dtype
from fusedshape.spec import KernelArgs

#: Bytes of a tensor that one program has in flight: two 16-byte vectors for each of 128 threads.
TILE_BYTES = 4096
#: Enough programs for any of today's GPUs. Larger tensors give each program more to sum instead.
PROGRAMS = 2048
#: Widest tile whose columns are summed over rows; wider ones would write more partial sums.
SUM_COLUMNS = 128

NUM_WARPS = 4
#: Limit for activations with which ptxas would otherwise spill registers to run more warps.
_MAX_REGISTERS = 128
_HUNGRY = ids_by_registers("many", "most")

_BIG_ARGS = ["rows", "vectors", "channels", "steps"]


@triton.jit
def _bias(bias_ptr, row, col, rows, cols, channels, BY_COLUMN: tl.constexpr, T: tl.constexpr):
    if BY_COLUMN:
        # Loaded for every row, so that each thread has the bias of its columns without exchange.
        column = col[None, :] + tl.zeros_like(row)[:, None]
        bias = tl.load(bias_ptr + column, mask=column < cols, other=0.0)
    else:
        bias = tl.load(bias_ptr + row % channels, mask=row < rows, other=0.0)[:, None]
    return bias.to(T)


@triton.jit(do_not_specialize=_BIG_ARGS)
def _bias_act_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    rows,
    vectors,
    channels,
    negative_slope: tl.float64,
    input_scale: tl.float64,
    input_shift: tl.float64,
    output_shift: tl.float64,
    output_scale: tl.float64,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    T: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    # This product shows the compiler that rows start at multiples of a vector's width.
    cols = (vectors.to(tl.int64) if WIDE else vectors) * VECTOR
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    # Avoid a division, which takes more instructions than all other index arithmetic.
    tiles = 1 if WHOLE_ROWS else tl.cdiv(cols, COLS)
    row = (pid // tiles) * ROWS + tl.arange(0, ROWS)
    col = (pid % tiles) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    index = row[:, None] * cols + col[None, :]

    z = tl.load(x_ptr + index, mask=inside, other=0.0).to(T)
    if HAS_BIAS:
        z += _bias(bias_ptr, row, col, rows, cols, channels, BY_COLUMN, T)
    numbers = epilogue.Spec(negative_slope, input_scale, input_shift, output_shift, output_scale)
    y = epilogue.act(z, epilogue.in_dtype(numbers, T), ACTIVATION)
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_BIG_ARGS)
def _act_grad_kernel(
    grad_ptr,
    saved_ptr,
    bias_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    vectors,
    channels,
    steps,
    negative_slope: tl.float64,
    input_scale: tl.float64,
    input_shift: tl.float64,
    output_shift: tl.float64,
    output_scale: tl.float64,
    output_unscale: tl.float64,
    scale: tl.float64,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_OUTPUT: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    T: tl.constexpr = tl.float64 if saved_ptr.dtype.element_ty == tl.float64 else tl.float32
    ROW_STEP: tl.constexpr = ROWS if BY_COLUMN else 0
    COL_STEP: tl.constexpr = 0 if BY_COLUMN else COLS
    cols = (vectors.to(tl.int64) if WIDE else vectors) * VECTOR
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    tiles = tl.cdiv(cols, COLS if BY_COLUMN else COLS * steps)
    first_row = (pid // tiles) * ROWS * (steps if BY_COLUMN else 1)
    first_col = (pid % tiles) * COLS * (1 if BY_COLUMN else steps)

    numbers = epilogue.Spec(negative_slope, input_scale, input_shift, output_shift, output_scale)
    spec = epilogue.in_dtype(numbers, T)
    rates = epilogue.Rates(output_unscale, scale)
    total = tl.zeros((ROWS, COLS), T)
    step = 0
    while step < steps:
        row = first_row + step * ROW_STEP + tl.arange(0, ROWS)
        col = first_col + step * COL_STEP + tl.arange(0, COLS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        index = row[:, None] * cols + col[None, :]
        # Outside the tensor the gradient is 0 and φ′ is finite, so the sums do not change.
        grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(T)
        saved = tl.load(saved_ptr + index, mask=inside, other=0.0)
        if not SAVE_OUTPUT:
            saved = saved.to(T)
            if HAS_BIAS:
                saved += _bias(bias_ptr, row, col, rows, cols, channels, BY_COLUMN, T)
        dx = epilogue.act_grad(grad, saved, spec, rates, ACTIVATION, SAVE_OUTPUT)
        tl.store(dx_ptr + index, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if BIAS_GRAD:
            total += dx
        step += 1
    if BIAS_GRAD:
        if BY_COLUMN:
            col = first_col + tl.arange(0, COLS)
            tl.store(sums_ptr + (pid // tiles) * cols + col, tl.sum(total, 0), mask=col < cols)
        else:
            row = first_row + tl.arange(0, ROWS)
            tl.store(sums_ptr + (pid % tiles) * rows + row, tl.sum(total, 1), mask=row < rows)


@dataclass(frozen=True)
class Plan:
    """How a tensor is divided among programs; see the module's docstring.

    Attributes:
        rows, cols: the matrix.
        channels: number of channels; 1 if they do not matter.
        by_column: whether a column, not a row, is one channel.
        vector: elements of one memory access; divides `cols`.
        tile_rows, tile_cols: the tile of one step, powers of two.
        steps: tiles that one program does, down the columns if `by_column`, else along the rows.
        parts: partial sums of one channel.
        programs: size of the grid.
        wide: whether indices need 64 bits.
    """

    rows: int
    cols: int
    channels: int
    by_column: bool
    vector: int
    tile_rows: int
    tile_cols: int
    steps: int
    parts: int
    programs: int
    wide: bool

    @property
    def whole_rows(self) -> bool:
        """Whether a tile is as wide as the matrix."""
        return self.tile_cols >= self.cols


@lru_cache(REMEMBERED)
def make_plan(numel: int, channels: int, inner: int, itemsize: int, sums: bool) -> Plan:
    """Divide a dense tensor whose element i has channel ``(i // inner) % channels``.

    Args:
        numel: elements, at least one.
        channels: channels; 1 where they do not matter.
        inner: stride of the channel dimension.
        itemsize: bytes of the smallest element read or written.
        sums: whether sums over channels are wanted.
    """
    by_column = inner == 1 and channels > 1
    inner = numel if channels == 1 else inner
    cols = channels if by_column else inner
    rows = numel // cols
    tile = max(1, TILE_BYTES // itemsize)
    tile_cols = _tile_cols(cols, min(tile, SUM_COLUMNS) if sums and by_column else tile)
    tile_rows = max(1, tile // tile_cols)
    across, down = cdiv(cols, tile_cols), cdiv(rows, tile_rows)
    steps = 1
    if sums:
        steps = min(cdiv(across * down, PROGRAMS), down if by_column else across)
        if by_column:
            down = cdiv(down, steps)
        else:
            across = cdiv(across, steps)
    return Plan(
        rows=rows,
        cols=cols,
        channels=channels,
        by_column=by_column,
        vector=math.gcd(cols, 16 // itemsize),
        tile_rows=tile_rows,
        tile_cols=tile_cols,
        steps=steps,
        parts=down if by_column else across * (rows // channels),
        programs=across * down,
        wide=numel >= host.WIDE,
    )


def _tile_cols(cols: int, limit: int) -> int:
    """The largest power of two that pads `cols` by an eighth or less, or else pads it least."""
    if cols <= 32:
        return min(limit, next_power_of_2(cols))
    widths = [1 << k for k in range(5, limit.bit_length())] or [limit]
    padded = {width: cdiv(cols, width) * width for width in widths}
    allowed = max(cols * 9 // 8, min(padded.values()))
    return max(width for width in widths if padded[width] <= allowed)


def bias_act(
    x: Tensor,
    bias: Tensor | None,
    dim: int,
    kernel_args: KernelArgs,
) -> Tensor:
    """γ(φ(α(x + b) + β) + δ) in a fresh tensor.

    Args:
        x: any shape and strides.
        bias: one number for each channel, or None.
        dim: the channel dimension; means nothing without bias.
        kernel_args: of the spec.

    Returns:
        Tensor of x's dtype and shape; x's strides where x is dense.

    Raises:
        ValueError: x is on a device that Triton does not serve, or bias has not a number a channel.
    """
    y = torch.empty_like(x)
    _bias_act(_laid_out_like(y, x), bias, dim, kernel_args, y)
    return y


def bias_act_(
    x: Tensor,
    bias: Tensor | None,
    dim: int,
    kernel_args: KernelArgs,
) -> None:
    """`bias_act` that overwrites x.

    Raises:
        ValueError: as `bias_act`, or x is not dense in memory.
    """
    if not _is_dense(x):
        raise ValueError(
            f"bias_act_: x of shape {tuple(x.shape)} and strides {x.stride()} is not dense in "
            "memory; use bias_act, or pass x.contiguous()"
        )
    _bias_act(x, bias, dim, kernel_args, x)


def act_grad(
    grad: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    dim: int,
    kernel_args: KernelArgs,
    save_output: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of x + b, and its sum over all but the channel.

    Args:
        grad: gradient of the output; any strides, also those of an expanded tensor.
        saved: the output if `save_output`, else x without the bias.
        bias: used only where x was saved.
        dim: the channel dimension; means nothing without bias and `bias_grad`.
        kernel_args: of the spec.
        save_output: what `saved` is.
        bias_grad: whether the sums are wanted.

    Returns:
        The gradient, with grad's dtype and saved's strides (where saved is dense), and the sums of
        the unrounded gradient, float32 (float64 for float64), empty unless `bias_grad`. The sums
        are the same bits in every run.

    Raises:
        ValueError: a device that Triton does not serve, shapes that differ, or bias has not a
            number a channel.
    """
    _check_alike("act_grad", grad, saved)
    dx = torch.empty_like(saved, dtype=grad.dtype)
    if not _is_dense(saved):
        saved = torch.empty_like(saved).copy_(saved)
    grad = _laid_out_like(dx, grad)
    return dx, _act_grad(grad, saved, bias, dim, kernel_args, save_output, bias_grad, dx)


def act_grad_(
    grad: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    dim: int,
    kernel_args: KernelArgs,
    save_output: bool,
    bias_grad: bool,
) -> Tensor:
    """`act_grad` that overwrites grad; returns the sums.

    Raises:
        ValueError: as `act_grad`, or grad and saved do not lie in memory alike, without gaps.
    """
    _check_alike("act_grad_", grad, saved)
    if not _is_dense(saved) or _strides(grad) != _strides(saved):
        raise ValueError(
            f"act_grad_: grad of shape {tuple(grad.shape)} has strides {grad.stride()}, saved "
            f"{saved.stride()}; both must be dense and the same, or use act_grad"
        )
    return _act_grad(grad, saved, bias, dim, kernel_args, save_output, bias_grad, grad)


def _check_alike(op: str, grad: Tensor, saved: Tensor) -> None:
    if grad.shape != saved.shape:
        raise ValueError(
            f"{op}: grad has shape {tuple(grad.shape)}, saved {tuple(saved.shape)}; "
            "they must be the same"
        )


def _act_grad(
    grad: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    dim: int,
    kernel_args: KernelArgs,
    save_output: bool,
    bias_grad: bool,
    dx: Tensor,
) -> Tensor:
    """Write dx, which may be grad, and return the sums; grad, saved and dx share their strides."""
    sum_dtype = opmath_dtype(saved.dtype)
    bias = _check("act_grad", saved, None if save_output else bias, dim)
    if not saved.numel():
        return saved.new_zeros(saved.shape[dim] if bias_grad else 0, dtype=sum_dtype)
    itemsize = min(saved.element_size(), grad.element_size())
    channels, inner = _channels(saved, dim, bias is not None or bias_grad)
    plan = make_plan(saved.numel(), channels, inner, itemsize, bias_grad)
    with host.on_device(saved):
        sums = saved.new_empty((plan.parts, channels) if bias_grad else 0, dtype=sum_dtype)
        _act_grad_kernel[(plan.programs,)](
            grad,
            saved,
            bias,
            dx,
            sums,
            plan.rows,
            plan.cols // plan.vector,
            channels,
            plan.steps,
            *kernel_args[1:],
            *epilogue.rates_of(epilogue.Spec(*kernel_args[1:])),
            ACTIVATION=kernel_args[0],
            HAS_BIAS=bias is not None,
            SAVE_OUTPUT=save_output,
            BIAS_GRAD=bias_grad,
            BY_COLUMN=plan.by_column,
            VECTOR=plan.vector,
            ROWS=plan.tile_rows,
            COLS=plan.tile_cols,
            WIDE=plan.wide,
            **launch_options(kernel_args[0], saved.dtype),
        )
        return reduction.channel_sums(sums) if bias_grad else sums


def launch_options(activation: int, dtype: torch.dtype) -> dict[str, int]:
    """Number of warps of both kernels and, for some activations, a limit on registers."""
    if dtype == torch.float64 or activation in _HUNGRY:
        return {"num_warps": NUM_WARPS, "maxnreg": _MAX_REGISTERS}
    return {"num_warps": NUM_WARPS}


def _bias_act(
    x: Tensor,
    bias: Tensor | None,
    dim: int,
    kernel_args: KernelArgs,
    out: Tensor,
) -> None:
    bias = _check("bias_act", x, bias, dim)
    if not x.numel():
        return
    channels, inner = _channels(x, dim, bias is not None)
    plan = make_plan(x.numel(), channels, inner, x.element_size(), False)
    with host.on_device(x):
        _bias_act_kernel[(plan.programs,)](
            x,
            bias,
            out,
            plan.rows,
            plan.cols // plan.vector,
            channels,
            *kernel_args[1:],
            ACTIVATION=kernel_args[0],
            HAS_BIAS=bias is not None,
            BY_COLUMN=plan.by_column,
            VECTOR=plan.vector,
            ROWS=plan.tile_rows,
            COLS=plan.tile_cols,
            WHOLE_ROWS=plan.whole_rows,
            WIDE=plan.wide,
            **launch_options(kernel_args[0], x.dtype),
        )


def _check(op: str, x: Tensor, bias: Tensor | None, dim: int) -> Tensor | None:
    """Raise if a kernel would read beyond its tensors; return the bias made contiguous."""
    reason = host.not_served(x)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")
    if bias is None:
        return None
    if bias.shape != (x.shape[dim],):
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}, x {x.shape[dim]} channels in dim {dim}; "
            f"pass ({x.shape[dim]},)"
        )
    return bias.contiguous()


def _channels(x: Tensor, dim: int, matter: bool) -> tuple[int, int]:
    """Number of channels and their stride; (1, 1) if they do not matter."""
    if not matter or x.shape[dim] == 1:  # the stride of a dimension of size 1 means nothing
        return 1, 1
    return x.shape[dim], x.stride(dim)


def _strides(x: Tensor) -> list[tuple[int, int]]:
    """Stride and size of the dimensions of more than one element."""
    return [(s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1]


def _is_dense(x: Tensor) -> bool:
    """Whether x is a permutation of a contiguous tensor."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(_strides(x)):
        if stride != expected:
            return False
        expected *= size
    return True


def _laid_out_like(out: Tensor, x: Tensor) -> Tensor:
    """Return x if it has the strides of `out`, else `out` filled with x."""
    return x if _strides(x) == _strides(out) else out.copy_(x)
