"""The host half that all kernels share: the GPU's numbers, cost and parts, what a launch takes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from fusedshape.compiling import constant_for_dynamo
from fusedshape.kernels.tiles import Tiling
from fusedshape.kernels.tuned import REMEMBERED

Direction = Literal["fprop", "dgrad", "wgrad"]
#: The dtypes that the kernels multiply.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)
#: From this many elements on, indices are 64 bits wide; the margin is for masked tiles, which may
#: reach beyond the tensor.
WIDE = 2**31 - 2**22
#: Bytes of shared memory that one block may use, by compute capability; others have 99 KiB.
SHARED = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
LEAST_SHARED = 101_376
#: For `cost`, in multiplications: the time to read one element from L2, without and with tensor
#: cores, and the time a program spends on each number of its tile before and after the loop. The
#: first are estimated (an H200 multiplies 2048 pairs while it reads 16 elements, an A100 1024 while
#: it reads 12, without tensor cores 128 while it reads 8), the last from counted instructions.
READ, ENDS = (16, 96), 256


def cdiv(a: int, b: int) -> int:
    """a divided by b, rounded up; Triton's own takes microseconds a call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n ≥ 1."""
    return 1 << (n - 1).bit_length()


class Gpu(NamedTuple):
    """What the choice of a configuration depends on.

    Attributes:
        arch: compute capability, 80 for 8.0.
        processors: number of multiprocessors.
    """

    arch: int
    processors: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory of one block."""
        return SHARED.get(self.arch, LEAST_SHARED)


@constant_for_dynamo
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a device; in the interpreter a small one of compute capability 9.0."""
    return _gpu_of(device)


@lru_cache
def _gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu(90, 4)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)


def not_served(t: Tensor) -> str | None:
    """Why Triton runs nothing on a tensor's device, or None if it does."""
    if t.device.type == "cuda" or INTERPRETED:
        return None
    return (
        f"Triton serves CUDA tensors, got one on {t.device}; on the CPU it only runs in its "
        "interpreter (TRITON_INTERPRET=1, set before Python starts)"
    )


def no_products(t: Tensor) -> str | None:
    """Why Triton multiplies nothing of a tensor's dtype on its device, or None if it does."""
    reason = not_served(t)
    if reason is not None:
        return reason
    if INTERPRETED and t.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 in it"
    arch = gpu_of(t.device).arch
    if arch < 80:
        return f"{t.device} has compute capability {arch / 10}, needed is 8.0; use another engine"
    return None


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device current: Triton launches on the current device."""
    if t.is_cuda:
        return torch.cuda.device(t.device)
    # In the interpreter NumPy would warn where hardware silently returns inf or NaN.
    return np.errstate(all="ignore")


class Launch(NamedTuple):
    """Launch parameters that depend only on shapes.

    Attributes:
        grid: programs.
        sizes: the kernel's integer arguments, in its order.
        constants: its constexprs and options, except WIDE.
        reach: largest element offset that it computes.
        parts: number of parts of the reduction; each writes to its own buffer.
    """

    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    reach: int
    parts: int = 1

    @property
    def wide(self) -> bool:
        """Whether indices need 64 bits."""
        return self.reach >= WIDE


def cost(
    tiling: Tiling,
    programs: int,
    reduction: float,
    partial: bool,
    tensor_cores: bool,
    gpu: Gpu,
) -> float:
    """Modelled time of a launch, in multiplications of one multiprocessor.

    The launch ends when the multiprocessor with the most programs does. That one multiplies their
    tiles, padding included, and pays for the beginning and end of each. L2 serves the rows and
    columns of all tiles to all multiprocessors.

    Args:
        tiling: of the kernel.
        programs: tiles, times the parts of the reduction.
        reduction: of one program, padding included.
        partial: whether programs write partial sums, which are read and added afterwards.
        tensor_cores: whether tensor cores multiply.
        gpu: where it runs.
    """
    rounds = cdiv(programs, gpu.processors)
    ends = 2 * ENDS if partial else ENDS
    elements = (tiling.block_m + tiling.block_n) * reduction * programs
    products = rounds * tiling.block_m * tiling.block_n * (reduction + ends)
    return products + READ[tensor_cores] * elements / gpu.processors


@lru_cache(REMEMBERED)
def parts_of(
    tiling: Tiling,
    wanted: int,
    tiles: int,
    steps: int,
    block_k: int,
    tensor_cores: bool,
    gpu: Gpu,
) -> tuple[int, int]:
    """Number of parts of wgrad's reduction, none of them empty, and of steps of each.

    Args:
        tiling: of the kernel.
        wanted: number of parts; 0 takes the cheapest of 1 and of as many as occupy all
            multiprocessors once, twice, three or four times.
        tiles: of the output.
        steps: of the whole reduction, 1 or more.
        block_k: length of a step.
        tensor_cores: as in `cost`.
        gpu: where it runs.
    """

    def cut(parts: int) -> tuple[int, int]:
        each = cdiv(steps, max(1, min(parts, steps)))
        return cdiv(steps, each), each

    if wanted:
        return cut(wanted)
    # A multiprocessor with fewer than eight warps is not busy.
    busy = gpu.processors * max(1, 8 // tiling.num_warps)
    tries = [cut(1), *(cut(times * busy // tiles) for times in range(1, 5))]

    def cost_of(way: tuple[int, int]) -> float:
        parts, each = way
        return cost(tiling, tiles * parts, each * block_k, parts > 1, tensor_cores, gpu)

    return min(tries, key=cost_of)
