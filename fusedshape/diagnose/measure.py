"""Measures the value of one step, and accumulates measurements over batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_KEPT = 2048  # values of each batch that quantiles use
_TRACED = 2048  # pairs · locations of each batch whose kernels are predicted


@dataclass(frozen=True)
class Sample:
    """One batch's measurements of one step; tensors stay where the model is.

    Attributes:
        kernel: q, q′ and k of some pairs of inputs at every location, (3, pairs, *locations).
        q: mean squares over channels, a subsample over inputs and locations.
        q_mean: mean of q over all inputs and locations.
        c: cosines between paired inputs, a subsample over pairs and locations.
        channel_mean: mean of every channel over inputs and locations.
        channel_square: mean square of every channel.
    """

    kernel: Tensor
    q: Tensor
    q_mean: Tensor
    c: Tensor
    channel_mean: Tensor
    channel_square: Tensor


def sample(t: Tensor, dim: int) -> Sample:
    """Measure a value with inputs in dimension 0 and channels in `dim`, in float32 or float64."""
    x = t if t.dtype == torch.float64 else t.float()
    half = len(x) // 2
    others = [d for d in range(x.ndim) if d != dim]
    work = x.square()
    q, channel_square = work.mean(dim), work.mean(others)
    # In the same memory, because touching new memory takes longer than the products.
    k = torch.mul(x[:half], x[half : 2 * half], out=work[:half]).mean(dim)
    first, second = q[:half], q[half : 2 * half]
    pairs = min(half, max(1, _TRACED // max(1, k[0].numel())))
    cosine = k / (first * second).sqrt()
    return Sample(
        torch.stack((first[:pairs], second[:pairs], k[:pairs])),
        _thinned(q),
        q.mean(),
        _thinned(cosine),
        x.mean(others),
        channel_square,
    )


def parted(t: Tensor, dim: int) -> Tensor:
    """|x − x′|² / |x|² between the first and the second half of a batch."""
    x = t if t.dtype == torch.float64 else t.float()
    first, second = x.chunk(2)
    work = first - second
    apart = work.square_().sum()
    return apart / torch.mul(first, first, out=work).sum()


def _thinned(values: Tensor) -> Tensor:
    flat = values.flatten()
    return flat[:: max(1, len(flat) // _KEPT)]


@dataclass
class Stats:
    """Measurements of one step over all batches."""

    q_means: list[float] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)
    c: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)
    square: list[Tensor] = field(default_factory=list)

    def add(self, s: Sample) -> None:
        """Add the measurements of a batch."""
        self.q_means.append(float(s.q_mean))
        self.q.append(s.q.cpu())
        self.c.append(s.c.cpu())
        self.mean.append(s.channel_mean.cpu())
        self.square.append(s.channel_square.cpu())

    @property
    def q_mean(self) -> float:
        """The mean of q over batches, inputs and locations."""
        return sum(self.q_means) / len(self.q_means) if self.q_means else math.nan

    @property
    def c_mean(self) -> float:
        """The mean of c where it is defined."""
        return float(torch.cat(self.c).nanmean()) if self.c else math.nan

    def quantiles(self, what: str) -> tuple[float, ...]:
        """`QUANTILES` of "q" and "c" over inputs and locations, or of q over "channels"."""
        values = {"q": self.q, "c": self.c}.get(what) or self._channels()
        return quantiles(values)

    def _channels(self) -> list[Tensor]:
        return [torch.stack(self.square).mean(0)] if self.square else []

    @property
    def still(self) -> float:
        """The share of channels that are constant over inputs and locations."""
        if not self.square:
            return math.nan
        square, mean = torch.stack(self.square).mean(0), torch.stack(self.mean).mean(0)
        return float((square - mean.square() <= 1e-6 * square).double().mean())

    @property
    def empty(self) -> float:
        """The share of locations at which all channels are zero."""
        return float((torch.cat(self.q) == 0).double().mean()) if self.q else math.nan

    @property
    def offset(self) -> float:
        """The share of the mean square that comes from the channels' means."""
        if not self.square:
            return math.nan
        total = torch.stack(self.square).mean()
        return float(torch.stack(self.mean).mean(0).square().mean() / total) if total else 0.0


def quantiles(values: Sequence[Tensor]) -> tuple[float, ...]:
    """`QUANTILES` of values, without nan; nan if no values are left."""
    if not values:
        return (math.nan,) * len(QUANTILES)
    flat = torch.cat(list(values)).double()
    flat = flat[flat.isfinite()]
    if not len(flat):
        return (math.nan,) * len(QUANTILES)
    return tuple(flat.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist())
