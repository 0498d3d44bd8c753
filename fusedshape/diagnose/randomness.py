"""Whether a weight looks random: compares its rank, filters and taps with random weights.

Random means Gaussian, or with orthonormal rows or columns. Let W have m rows and n columns, and let
p = min(m, n), N = max(m, n), G = WWᵀ. The number of directions that W acts on is
r = tr(G)² / tr(G²). It is p for orthogonal weights. For Gaussian ones
E[1/r] = (m + n + 1) / (mn + 2), and N (p/r − 1) p/2 is about χ² with d = p(p + 1)/2 − 1 degrees of
freedom (John's test of sphericity). Its tail is bounded by
P(χ²_d > d + 2√(dt) + 2t) ≤ e⁻ᵗ (Laurent and Massart 2000).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_TAIL = 21.0  # e⁻²¹, one in a billion: six standard deviations
_HARM = 1.25  # factor on tr(G²) up to which a weight acts much as a random one
_MISSING = 0.1  # share of rows that may depend on other rows
_SMALL = 128  # largest p for which tr(G²) is computed and not estimated
_SKETCH = 8  # random directions in which rows are compared
_COARSE = 4  # fewer distinct absolute values make short rows equal by chance, as with signs


@dataclass(frozen=True)
class Randomness:
    """How a weight compares with random weights of its shape.

    Attributes:
        chance: Var of ln q_out / q_in for random weights; near 0 for orthogonal ones.
        is_orthogonal: whether its rows or columns are orthonormal, up to a factor.
        flaw: how it differs from random weights, in words; "" if it looks random.
    """

    chance: float = 0.0
    is_orthogonal: bool = False
    flaw: str = ""


def randomness(w: Tensor) -> Randomness:
    """Compare weights (groups, out, in), in float32 or float64, with random ones."""
    groups, out, n = w.shape
    energy = float(w.square().sum()) / max(groups, 1)
    if not w.numel() or not 0 < energy < math.inf:
        return Randomness()
    p, wide = min(out, n), max(out, n)
    small = w if out <= n else w.mT
    if p <= _SMALL:
        w64 = small.double()
        gram = w64 @ w64.mT
        squared = float(gram.square().sum((1, 2)).mean())
        rank = _rank(gram)
    else:
        generator = torch.Generator().manual_seed(0)
        # Multiply rows: BLAS is several times slower for a wide matrix times a few columns.
        size = groups, max(4, 2**14 // wide), p
        signs = 2 * torch.randint(0, 2, size, generator=generator).to(w) - 1
        squared = float((signs @ small @ small.mT).square().sum(2).mean())
        rank = float(p)
    spread = squared / energy**2  # 1/r
    gaussian = (out + n + 1) / (out * n + 2)
    # Fewer than four rows rarely tell Gaussian from orthogonal weights.
    is_orthogonal = p >= 4 and p * spread - 1 < 0.01 * (p + 1) / wide
    chance = 2 / (n + 2) * max(n * min(spread, gaussian) - 1, 0.0)
    return Randomness(
        chance / groups, is_orthogonal, _flaw(w, spread, gaussian, rank) or _copied(w)
    )


def taps_alike(w: Tensor) -> str:
    """Describe how the taps of weights (groups, out, in, taps) depend on each other."""
    taps = w.flatten(0, 2).double()
    count, k = taps.shape
    if k < 2 or count < 4 * k:
        return ""
    taps = taps / torch.linalg.vector_norm(taps, dim=0)
    correlation = taps.mT @ taps
    pairs = float(correlation.square().sum() - k) / 2
    if pairs <= _above(k * (k - 1) / 2) / count or 1 + 2 * pairs / k <= _HARM:
        return ""
    r = k**2 / float(correlation.square().sum())
    return f"the patterns of its {k} taps have {_number(r)} dimension(s), as if filters were copies"


def _above(freedoms: float) -> float:
    """A bound that a χ² variable exceeds with probability e^−t only."""
    return freedoms + 2 * math.sqrt(max(freedoms, 0.0) * _TAIL) + 2 * _TAIL


def _rank(gram: Tensor) -> float:
    """The mean rank of WWᵀ over some W: rows that are no combination of earlier rows."""
    scale = gram.diagonal(dim1=1, dim2=2).clone()
    scale[scale == 0] = 1.0
    root = scale.sqrt()
    unit = gram / root[:, :, None] / root[:, None, :]
    unit.diagonal(dim1=1, dim2=2).add_(1e-9)
    rest = torch.linalg.cholesky_ex(unit).L.diagonal(dim1=1, dim2=2).square()
    return float((rest > 1e-5).sum(1).double().mean())


def _flaw(w: Tensor, spread: float, gaussian: float, rank: float) -> str:
    groups, out, n = w.shape
    p, wide = min(out, n), max(out, n)
    limit = (1 + 2 / (p * wide) * _above(p * (p + 1) / 2 - 1) / math.sqrt(groups)) / p
    is_uneven = spread > limit and spread > _HARM * gaussian
    is_short = p - rank >= max(2.0, _MISSING * p) and not (p < 16 and _is_coarse(w))
    if not is_uneven and not is_short:
        return ""
    positive = float((w > 0).double().sum() / w.count_nonzero())
    sorted_energy = w.square().flatten().sort(descending=True).values
    top = float(sorted_energy[: max(1, w.numel() // 100)].sum() / sorted_energy.sum())
    usual = _number(1 / gaussian)
    if is_short:
        return f"its weights have rank {_number(rank)}, and random ones of their shape {p}"
    seen = (
        f"its weights act on {_number(1 / spread)} direction(s), and random ones of their shape on "
        f"{usual}"
    )
    if max(positive, 1 - positive) > 0.95:
        return f"{seen}: they have one sign"
    if top > 0.5:
        return f"{seen}: a hundredth of them holds {100 * top:.0f} % of their squares"
    return seen


def _copied(w: Tensor) -> str:
    """Whether filters are copies of one another, up to a factor."""
    rows = w.flatten(0, 1)
    count, n = rows.shape
    if n < 8 or count < 4 or (n < 16 and _is_coarse(w)):
        return ""
    generator = torch.Generator().manual_seed(1)
    sketch = rows @ torch.randn(n, _SKETCH, generator=generator).to(rows)
    length = torch.linalg.vector_norm(sketch, dim=1, keepdim=True)
    sketch = (sketch / length)[length.flatten() > 0]
    sketch = sketch * sketch[:, :1].sign()
    sketch = sketch[sketch[:, 0].argsort()]
    copies = int(((sketch[1:] - sketch[:-1]).abs().amax(1) < 1e-4).sum()) if len(sketch) else 0
    if copies < max(2, _MISSING * count):
        return ""
    return f"{copies} of its {count} filters are copies of others"


def _is_coarse(w: Tensor) -> bool:
    return len(w.flatten()[:256].abs().unique()) <= _COARSE


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 10 or abs(x - round(x)) < 0.05 else f"{x:.1f}"
