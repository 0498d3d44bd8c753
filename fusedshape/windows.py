"""Which positions a moving window reads: the kernel of a convolution or a pool."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def read_share(
    taps: Tensor,
    locations: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> float:
    """The share of input positions that a moving window reads.

    Args:
        taps: (*kernel), not 0 where the window reads.
        locations: positions of the input in each dimension; None ignores the borders.
        stride: one number for each dimension, as for the next two.
        padding: zeros before and after; ignored without `locations`.
        dilation: distance between taps.

    Example:
        >>> read_share(torch.ones(1, 1), (8, 8), (2, 2), (0, 0), (1, 1))
        0.25
        >>> read_share(torch.ones(3, 3), (8, 8), (2, 2), (1, 1), (1, 1))
        1.0
        >>> read_share(torch.ones(2), None, (4,), (0,), (2,))
        0.5
    """
    if max(stride) == 1:
        return 1.0
    if locations is None:
        offsets = zip(*taps.nonzero().T.tolist(), strict=True)
        seen = {
            tuple(j * d % s for j, d, s in zip(tap, dilation, stride, strict=True))
            for tap in offsets
        }
        return len(seen) / math.prod(stride)
    window = (taps != 0).double().cpu()[None, None]
    steps = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(locations, taps.shape, stride, padding, dilation, strict=True)
    ]
    windows = torch.ones(1, 1, *steps, dtype=torch.float64)
    # Positions after the last window are missing from the result, and not read.
    read = _TRANSPOSED[len(locations) - 1](windows, window, None, stride, dilation=dilation)
    for dim, (start, length) in enumerate(zip(padding, locations, strict=True)):
        read = read.narrow(dim + 2, start, min(length, read.shape[dim + 2] - start))
    return int(read.count_nonzero()) / math.prod(locations)


def overlaps(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether neighbouring windows share positions.

    Example:
        >>> overlaps((2, 2), (2, 2), (1, 1)), overlaps((3, 3), (2, 2), (1, 1))
        (False, True)
    """
    return any(d * (k - 1) >= s for k, s, d in zip(kernel, stride, dilation, strict=True))
