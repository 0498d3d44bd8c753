"""The engine "native": csrc's convolutions on the CPU, which end with the activation."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedshape.ops.checks import is_channels_last

# csrc's kChannels.
_CHANNELS = 16


def why_not_native(x: Tensor, weight: Tensor, groups: int) -> str | None:
    """Why csrc cannot run a layer on an input on the CPU; None if it can."""
    if groups != 1:
        return f"groups={groups}, csrc's convolutions have groups=1 only; use another engine"
    if x.dtype != torch.float32:
        return f"csrc's convolutions are for float32, got {x.dtype}; use another engine"
    for channels in weight.shape[:2]:
        if channels == 0 or channels % _CHANNELS:
            return (
                f"{channels} channels or features, csrc's convolutions take multiples of "
                f"{_CHANNELS}; use another engine"
            )
    if weight.ndim == 2:
        if not x.is_contiguous():
            return (
                f"x of shape {tuple(x.shape)} and strides {x.stride()} is not contiguous; pass "
                "x.contiguous()"
            )
    elif not is_channels_last(x):
        return (
            f"x of shape {tuple(x.shape)} and strides {x.stride()} is not channels_last: channels "
            "must be innermost and memory dense; pass x.to(memory_format=torch.channels_last)"
        )
    return None
