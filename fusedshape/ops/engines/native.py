"""The engine "native": csrc's kernels for float32 layers on the CPU, activation included."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedshape import native
from fusedshape.compiling import constant_for_dynamo
from fusedshape.ops.checks import is_channels_last
from fusedshape.ops.engines.kernel_engine import KernelEngine
from fusedshape.ops.engines.triton import INTERPRET
from fusedshape.ops.layer import Layer
from fusedshape.ops.problem import Problem

# csrc's kChannels.
_CHANNELS = 16
# An input of fewer numbers is not worth the time that choosing takes.
_WORTH_CHOOSING = 1 << 15
# A linear layer of fewer rows spends its time on reading its weight, which csrc first copies.
_WORTH_PACKING = 16


class Native(KernelEngine):
    """csrc, found and loaded by `fusedshape.native`.

    "auto" takes it, unmeasured, for float32 in channels_last layout: for convolutions of 32
    channels and more, those with several taps and no stride of 256 and more; and for linear layers
    of 16 rows and more on AMD's CPUs, which torch leaves to MKL.
    """

    name = "native"
    devices = () if INTERPRET else ("cpu",)  # else Triton's interpreter takes its place
    pinned = True
    pass_devices = ("cpu",)

    def __init__(self) -> None:
        super().__init__()
        native.load()

    def unavailable(self, device: str) -> Exception | None:
        if device != "cpu":
            return ValueError(f"backend 'native' serves CPU tensors, got one on {device}")
        if not native.available():
            return RuntimeError(f"backend 'native' is not to be had: {native.why_not()}")
        return None

    def considers(self, x: Tensor) -> bool:
        if x.dtype != torch.float32 or not native.available():
            return False
        # Under torch.compile the comparison would be a guard on sizes that may vary.
        return torch.compiler.is_compiling() or x.numel() >= _WORTH_CHOOSING

    def prefers(self, problem: Problem) -> bool:
        if problem.device != "cpu" or problem.dtype != torch.float32 or not problem.channels_last:
            return False
        out, per_group, *kernel = problem.weight
        if not kernel:
            # Under torch.compile the comparison would be a guard on sizes that may vary.
            compiling = torch.compiler.is_compiling()
            few = not compiling and math.prod(problem.input[:-1]) < _WORTH_PACKING
            return not few and _is_amd()
        dense = any(k > 1 for k in kernel) and all(s == 1 for s in problem.stride)
        least = 256 if dense else 32  # below, oneDNN is faster by more than the activation's pass
        return min(out, per_group) >= least

    def refuses(self, x: Tensor, layer: Layer) -> str | None:
        weight, geometry = layer.weight, layer.geometry
        if geometry is not None and geometry.groups != 1:
            return (
                f"groups={geometry.groups}, csrc's convolutions have groups=1 only; use another "
                "engine"
            )
        if x.dtype != torch.float32:
            return f"csrc's convolutions are for float32, got {x.dtype}; use another engine"
        for channels in weight.shape[:2]:
            if channels == 0 or channels % _CHANNELS:
                return (
                    f"{channels} channels or features, csrc's convolutions take multiples of "
                    f"{_CHANNELS}; use another engine"
                )
        where = f"x of shape {tuple(x.shape)} and strides {x.stride()}"
        if geometry is None:
            if not x.is_contiguous():
                return f"{where} is not contiguous; pass x.contiguous()"
        elif not is_channels_last(x):
            return (
                f"{where} is not channels_last: channels must be innermost and memory dense; pass "
                "x.to(memory_format=torch.channels_last)"
            )
        return None


@constant_for_dynamo
def _is_amd() -> bool:
    return native.cpu_vendor() == "AuthenticAMD"
