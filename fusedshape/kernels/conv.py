"""Convolutions in Triton: launchers of `implicit_gemm`, and which configuration they use.

These kernels have been interpreted and compiled, but not yet run on a GPU.

1×1 convolutions of stride 1 and linear layers go to `fusedshape.kernels.gemm`. The launchers
allocate with torch.empty, read nothing from the device and never wait for it, so that CUDA graphs
can capture them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fusedshape.kernels import epilogue, gemm, host, images, reduction
from fusedshape.kernels.epilogue import Epilogue, Kind
from fusedshape.kernels.host import Direction, Launch, cdiv
from fusedshape.kernels.images import why_not
from fusedshape.kernels.implicit_gemm import conv_kernel, wgrad_kernel
from fusedshape.kernels.roofline import Convolution
from fusedshape.kernels.tiles import Tiling
from fusedshape.kernels.tuned import REMEMBERED, tunable
from fusedshape.spec import KernelArgs

__all__ = ["conv", "conv_act", "conv_dgrad", "conv_wgrad", "why_not"]

#: Bytes of shared memory reserved for the barriers of kernels for sm_100, with a margin.
BARRIERS = 128
#: With at most this many channels, one block of the reduction spans taps and channels.
FLAT_CHANNELS = 16


@dataclass(frozen=True)
class Config(Tiling):
    """How a kernel cuts up a convolution.

    A tile of the output is `block_m` pixels by `block_n` channels; in wgrad, where tiles are not
    grouped, `block_m` output channels by `block_n` input channels of one tap.

    Attributes:
        splits: number of parts of wgrad's sum over pixels; 0 lets `host.parts_of` choose.
    """

    splits: int = 0

    def shared(self, itemsize: int) -> int:
        """Upper bound of the bytes of shared memory: operands in flight, or the finished tile."""
        operands = self.num_stages * (self.block_m + self.block_n) * self.bytes_k
        return max(operands, self.block_m * (self.block_n + 16) * itemsize) + BARRIERS


_TILES = (
    Config(128, 256, 128, 8, 3),
    Config(256, 128, 128, 8, 4),
    Config(128, 128, 64, 8, 4),
    Config(128, 128, 128, 8, 3),
    Config(256, 64, 64, 8, 4),
    Config(128, 64, 128, 4, 4),
    Config(128, 64, 64, 4, 4),
    Config(64, 128, 128, 4, 3),
    Config(64, 64, 128, 4, 4),
    Config(64, 32, 64, 4, 4),
)
#: The shipped configurations of each direction; the tests compile them ahead of time.
CONFIGS: dict[Direction, tuple[Config, ...]] = {
    "fprop": _TILES,
    "dgrad": _TILES,
    "wgrad": (
        Config(256, 128, 128, 8, 3),
        Config(128, 128, 128, 8, 3),
        Config(128, 64, 128, 4, 3),
        Config(64, 128, 128, 4, 3),
        Config(64, 64, 128, 4, 3),
        Config(64, 32, 64, 4, 4),
    ),
}
#: The configurations for float32 without tensor cores, in every direction.
FMA_CONFIGS = (Config(64, 64, 64, 8, 2), Config(32, 32, 64, 4, 2))


def candidates(direction: Direction, problem: Convolution, gpu: host.Gpu) -> tuple[Config, ...]:
    """The shipped configurations that fit into the shared memory and registers of a GPU."""
    shipped = CONFIGS[direction] if _tensor_cores(problem) else FMA_CONFIGS
    read = problem.out_channels if direction == "dgrad" else problem.channels
    if _flat(read, problem.taps):
        # Each loaded number needs its own address and mask in registers.
        shipped = tuple(c for c in shipped if c.bytes_k == 64 and c.block_m <= 128)
    return tuple(c for c in shipped if c.shared(problem.itemsize) <= gpu.shared)


@tunable(candidates)
def config_for(direction: Direction, problem: Convolution, gpu: host.Gpu) -> Config:
    """The first of the shipped configurations that `host.cost` finds cheapest.

    Args:
        direction: of the kernel.
        problem: the convolution.
        gpu: where it will run.
    """
    return min(
        candidates(direction, problem, gpu),
        key=lambda config: _cost(config, direction, problem, gpu),
    )


def _cost(config: Config, direction: Direction, problem: Convolution, gpu: host.Gpu) -> float:
    p = problem
    block_k = config.bytes_k // p.itemsize
    if direction == "wgrad":
        splits, steps = _splits(config, p, gpu)
        programs = _wgrad_tiles(config, p) * splits
        return host.cost(config, programs, steps * block_k, splits > 1, _tensor_cores(p), gpu)
    read, written, rows, subs = p.channels, p.out_channels, p.pixels, 1
    if direction == "dgrad":
        read, written, rows, subs = written, read, _dgrad_rows(p), p.stride[0] * p.stride[1]
    taps = (1, p.taps * read) if _flat(read, p.taps) else (p.taps, read)
    steps = taps[0] * cdiv(taps[1], block_k)
    programs = subs * cdiv(rows, config.block_m) * cdiv(written, config.block_n)
    # Each tap belongs to one remainder of the stride.
    return host.cost(config, programs, steps * block_k / subs, False, _tensor_cores(p), gpu)


def _flat(channels: int, taps: int) -> bool:
    return channels <= FLAT_CHANNELS and taps > 1


def _dgrad_rows(problem: Convolution) -> int:
    """Number of input pixels with remainder 0 of the stride; no other remainder has more."""
    height = cdiv(problem.height, problem.stride[0])
    return problem.batch * height * cdiv(problem.width, problem.stride[1])


def _wgrad_tiles(config: Config, problem: Convolution) -> int:
    p = problem
    if _flat(p.channels, p.taps):
        across = cdiv(p.taps * p.channels, config.block_n)
    else:
        across = p.taps * cdiv(p.channels, config.block_n)
    return across * cdiv(p.out_channels, config.block_m)


def _splits(config: Config, problem: Convolution, gpu: host.Gpu) -> tuple[int, int]:
    """Number of parts of wgrad's sum over pixels, and of steps of each; no part is empty."""
    block_k = config.bytes_k // problem.itemsize
    steps = cdiv(problem.pixels, block_k)
    tiles = _wgrad_tiles(config, problem)
    cores = _tensor_cores(problem)
    return host.parts_of(config, config.splits, tiles, steps, block_k, cores, gpu)


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel_args: KernelArgs,
    *,
    config: Config | gemm.Config | None = None,
) -> Tensor:
    """φ̂(√(1 − w²) (x ⋆ weight + bias) + w · residual) in one kernel; without residual, w = 0.

    Args:
        x: (N, C, H, W) or (N, C, L), channels_last; or (M, C).
        weight: (K, C, R, S), (K, C, R) or (K, C), of x's dtype; channels_last saves a copy of it.
        bias: (K,) or None.
        residual: of the result's shape, or None.
        residual_weight: w, between -1 and 1.
        stride: a number for each spatial dimension; none for a linear layer.
        padding: the same.
        dilation: the same.
        kernel_args: of the spec.
        config: the configuration to use; None asks `config_for`. A convolution that is one matrix
            product goes to the GEMM kernel if this is None or a `gemm.Config`.

    Returns:
        x's dtype, channels_last.

    Raises:
        ValueError: `why_not` gives a reason, or shapes do not match.
    """
    geometry = stride, padding, dilation
    after = bias, residual, residual_weight, kernel_args
    return _forward("conv_act", x, weight, geometry, after, config)


def conv(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    config: Config | gemm.Config | None = None,
) -> Tensor:
    """Compute x ⋆ weight alone; arguments, result and errors are those of `conv_act`."""
    geometry = stride, padding, dilation
    return _forward("conv", x, weight, geometry, (None, None, 0.0, epilogue.PLAIN), config)


def _forward(
    op: str,
    x: Tensor,
    weight: Tensor,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
    after: tuple[Tensor | None, Tensor | None, float, KernelArgs],
    config: Config | gemm.Config | None,
) -> Tensor:
    images.check(op, x, weight)
    problem = images.problem_of(op, x.shape, weight.shape, *geometry, x.dtype)
    bias, residual, residual_weight, kernel_args = after
    bias = images.vector(op, bias, problem.out_channels)
    shape = images.shape_like(x, problem.output)
    images.check_shape(op, "residual", residual, shape)
    if _is_gemm(problem, config):
        other = None if residual is None else images.as_matrix(residual)
        y = gemm.linear_act(
            *(images.as_matrix(x), images.as_matrix(weight), bias, other),
            *(residual_weight, kernel_args),
            tf32=problem.arithmetic == "tf32",
            config=config,
        )
        return images.from_matrix(y, shape)
    residual = None if residual is None else images.packed(images.as_images(residual))
    end = epilogue.forward(bias, residual, residual_weight, kernel_args)
    y = images.empty(x, shape)
    if y.numel():
        config = config or config_for("fprop", problem, host.gpu_of(x.device))
        _launch(problem, config, images.as_images(x), images.as_images(weight), y, end)
    return y


def conv_dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    bias: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel_args: KernelArgs,
    save_output: bool,
    bias_grad: bool,
    *,
    config: Config | gemm.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of the input, times φ̂′ of the layer before if `saved` is given, and its sums.

    Args:
        dz: gradient of this layer's pre-activation; any strides, channels_last saves a copy of it.
        weight: (K, C, R, S), (K, C, R) or (K, C), of dz's dtype.
        saved: of the shape `input_size`: the output of the layer before if `save_output`, else its
            pre-activation without bias; None leaves φ̂′ and the constants out.
        bias: (C,) of the layer before; used only where the pre-activation was saved.
        input_size: shape of the input.
        stride: as in `conv_act`, like `padding` and `dilation`.
        padding: zeros on either side.
        dilation: distance of taps.
        kernel_args: of the spec of the layer before.
        save_output: what `saved` is.
        bias_grad: whether the sums are wanted.
        config: as in `conv_act`.

    Returns:
        The gradient, of dz's dtype, channels_last; and float32 (C,), the sums of the unrounded
        gradient over all but the channel, empty unless `bias_grad`. The same bits in every run.

    Raises:
        ValueError: as `conv_act`.
    """
    op = "conv_dgrad"
    images.check(op, dz, weight, layout=False)
    problem = images.problem_of(op, input_size, weight.shape, stride, padding, dilation, dz.dtype)
    shape = tuple(input_size)
    images.check_shape(op, "dz", dz, images.shape_like(dz, problem.output))
    images.check_shape(op, "saved", saved, shape)
    bias = None if saved is None or save_output else images.vector(op, bias, problem.channels)
    if _is_gemm(problem, config):
        before = None if saved is None else images.as_matrix(saved)
        dx, sums = gemm.linear_dgrad(
            *(images.as_matrix(dz), images.as_matrix(weight), before, bias),
            *(kernel_args, save_output, bias_grad),
            tf32=problem.arithmetic == "tf32",
            config=config,
        )
        return images.from_matrix(dx, shape), sums
    dx = images.empty(dz, shape)
    channels = problem.channels if bias_grad else 0
    if not dx.numel():
        return dx, dz.new_zeros(channels, dtype=torch.float32)
    config = config or config_for("dgrad", problem, host.gpu_of(dz.device))
    parts = math.prod(problem.stride) * cdiv(_dgrad_rows(problem), config.block_m)
    sums = dz.new_empty((parts, channels) if bias_grad else 0, dtype=torch.float32)
    saved = None if saved is None else images.packed(images.as_images(saved))
    end = epilogue.backward(bias, saved, sums if bias_grad else None, kernel_args, save_output)
    _launch(problem, config, images.as_images(dz), images.as_images(weight), dx, end)
    if bias_grad:
        with host.on_device(dz):
            sums = reduction.channel_sums(sums)
    return dx, sums


def conv_wgrad(
    dz: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    config: Config | gemm.Config | None = None,
) -> Tensor:
    """Gradient of the weight.

    Args:
        dz: gradient of this layer's pre-activation; any strides, channels_last saves a copy of it.
        x: the layer's input, channels_last, of dz's dtype.
        weight_size: shape of the weight.
        stride: as in `conv_act`, like `padding` and `dilation`.
        padding: zeros on either side.
        dilation: distance of taps.
        config: as in `conv_act`.

    Returns:
        x's dtype, channels_last; accumulated in float32 and rounded once. The same bits in every
        run.

    Raises:
        ValueError: as `conv_act`.
    """
    op = "conv_wgrad"
    images.check(op, x, dz)
    problem = p = images.problem_of(op, x.shape, weight_size, stride, padding, dilation, x.dtype)
    shape = tuple(weight_size)
    images.check_shape(op, "dz", dz, images.shape_like(x, p.output))
    if _is_gemm(problem, config):
        dw = gemm.linear_wgrad(
            images.as_matrix(dz), images.as_matrix(x), tf32=p.arithmetic == "tf32", config=config
        )
        return dw.view(shape)
    dw = images.empty(x, shape)
    if not dz.numel():
        return dw.zero_()
    gpu = host.gpu_of(x.device)
    config = config or config_for("wgrad", p, gpu)
    plan = _wgrad_plan(p, config, gpu)
    splits = plan.parts
    dz, x = images.as_images(dz), images.as_images(x)
    with host.on_device(x):
        out = dw if splits == 1 else x.new_empty(splits, p.weights, dtype=torch.float32)
        tensors = images.packed(dz), x, out
        wgrad_kernel[plan.grid](*tensors, *plan.sizes, WIDE=plan.wide, **plan.constants)
        if splits > 1:
            reduction.add_parts(out, dw)
    return dw


def _launch(
    problem: Convolution, config: Config, a: Tensor, weight: Tensor, out: Tensor, end: Epilogue
) -> None:
    plan = _plan(problem, config, end.kind, end.mixes)
    with host.on_device(a):
        if end.kind.grad and problem.itemsize == 4:
            # Tensor cores take tf32 along the reduction only.
            weight = weight.permute(1, 2, 3, 0).contiguous()
        else:
            weight = images.packed(weight)
        tensors = images.packed(a), weight, out, end.operands
        conv_kernel[plan.grid](*tensors, *plan.sizes, WIDE=plan.wide, **plan.constants)


@lru_cache(REMEMBERED)
def _plan(problem: Convolution, config: Config, kind: Kind, mixes: bool) -> Launch:
    p, dgrad = problem, kind.grad
    sides = (p.channels, p.height, p.width), (p.out_channels, p.out_height, p.out_width)
    (channels, height, width), (written, *written_size) = sides[::-1] if dgrad else sides
    rows, subs = (_dgrad_rows(p), math.prod(p.stride)) if dgrad else (p.pixels, 1)
    tiles_m = cdiv(rows, config.block_m)
    # In dgrad, the distance between taps that belong to the same remainder of the stride.
    step = [s // math.gcd(s, d) if dgrad else 1 for s, d in zip(p.stride, p.dilation, strict=True)]
    w_tap, w_c, w_n = p.channels, 1, p.taps * p.channels
    if dgrad and p.itemsize == 4:
        w_tap, w_n = p.out_channels, p.taps * p.out_channels
    elif dgrad:
        w_c, w_n = w_n, w_c
    reach = _reach(p, channels, height, width), p.batch * written * math.prod(written_size)
    constants: dict[str, Any] = {
        "KIND": kind,
        "C": channels,
        "N": written,
        "GEOMETRY": p.geometry,
        "STEP": tuple(step),
        "W_STRIDES": (w_tap, w_c, w_n),
        "PRECISION": _precision(p),
        "FLAT": _flat(channels, p.taps),
        "TILE": config.tile(p.itemsize, kind.activation, mixes),
        **gemm.launch_options(config, kind.activation),
    }
    sizes = p.batch, height, width, *written_size, tiles_m
    grid = (subs * tiles_m * cdiv(written, config.block_n),)
    return Launch(grid, sizes, constants, max(*reach, p.weights))


@lru_cache(REMEMBERED)
def _wgrad_plan(problem: Convolution, config: Config, gpu: host.Gpu) -> Launch:
    p = problem
    block_k = config.bytes_k // p.itemsize
    splits, steps = _splits(config, p, gpu)
    parts = splits * p.weights if splits > 1 else 0
    reach = _reach(p, p.channels, p.height, p.width), p.pixels * p.out_channels, p.weights, parts
    place = block_k // (p.out_height * p.out_width), block_k // p.out_width % p.out_height
    sizes = p.pixels, p.height, p.width, p.out_height, p.out_width
    constants: dict[str, Any] = {
        "C": p.channels,
        "K": p.out_channels,
        "GEOMETRY": p.geometry,
        "PRECISION": _precision(p),
        "FLAT": _flat(p.channels, p.taps),
        "EVEN": p.pixels % block_k == 0,
        "SAME": p.stride == (1, 1) and (p.out_height, p.out_width) == (p.height, p.width),
        "DEAL": p.arithmetic == "tf32" and gemm.deals(gpu, config.block_m, config.block_n),
        "TILE": config.tile(p.itemsize),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    sizes = *sizes, *place, block_k % p.out_width, steps
    return Launch((_wgrad_tiles(config, p), splits), sizes, constants, max(reach), splits)


def _reach(problem: Convolution, channels: int, height: int, width: int) -> int:
    """Largest element offset that any tap can address in such images, padding included."""
    rows, cols = (
        pad + dilation * taps
        for pad, dilation, taps in zip(
            problem.padding, problem.dilation, problem.kernel, strict=True
        )
    )
    return (problem.batch * height * width + rows * width + cols) * channels


def _tensor_cores(problem: Convolution) -> bool:
    return problem.arithmetic != "float32"


def _precision(problem: Convolution) -> str:
    return "tf32" if problem.arithmetic == "tf32" else "ieee"


def _is_gemm(problem: Convolution, config: Config | gemm.Config | None) -> bool:
    return problem.is_gemm and not isinstance(config, Config)
