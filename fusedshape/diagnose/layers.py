r"""What one layer does to kernels: `Phi` for nonlinear layers, `Affine` for those with weights.

A kernel is a tensor (3, pairs, *locations) of q, q′ and k: the mean squares over channels of two
inputs x and x′, and the mean of x·x′, so that c = k / √(q q′). The maps of `fusedshape.theory.maps`
hold for q = 1. These hold for any q and q′, because a diagnosis must follow the actual values:

    q ↦ E[φ(√q z)²]        k ↦ E[φ(√q z₁) φ(√q′ (c z₁ + √(1−c²) z₂))] = Σᵢ aᵢ(q) aᵢ(q′) cⁱ

with aᵢ(q) = E[φ(√q z) hᵢ(z)] for the normalised Hermite polynomials hᵢ (Mehler's formula).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape import reference
from fusedshape.diagnose.randomness import randomness, taps_alike
from fusedshape.kinds import matrices, phases
from fusedshape.spec import ActSpec
from fusedshape.theory.gaussian import Array, rule
from fusedshape.torch_ops import ARITHMETIC

_TERMS = 20  # of the Hermite series; the rest of E[φ²] is taken with the next power of c
_PER_OCTAVE = 4  # values of q with a series of their own; between them, cubic interpolation
_FAR = 60 * _PER_OCTAVE  # largest |log₂ q|, in steps of 1/_PER_OCTAVE
_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class Phi:
    """A pointwise function, and its map of kernels in a wide layer.

    Attributes:
        expr: the expression that computes it; see `evaluate`.
        name: name to display.
        spec: its constants, if the activation table has it.
    """

    expr: tuple[Any, ...]
    name: str
    spec: ActSpec | None = None

    @staticmethod
    def of(expr: tuple[Any, ...]) -> Phi | None:
        """The function of an expression; None if it cannot be computed on numbers."""
        try:
            return _phi(expr)
        except TypeError:  # an argument without a hash
            return None

    def __call__(self, u: Tensor) -> Tensor:
        """φ(u), in float64."""
        return evaluate(self.expr, u)

    def at(self, u: Array) -> Array:
        """φ(u) for an array."""
        found: Array = self(torch.from_numpy(np.ascontiguousarray(u))).numpy()
        return found

    @cached_property
    def slopes(self) -> tuple[float, float] | None:
        """φ(1) and −φ(−1) if φ is positively homogeneous, else None."""
        points = torch.tensor([1.0, 2.0, 1e-3, 50.0, -1.0, -2.0, -1e-3, -50.0, 0.0]).double()
        got = self(points)
        right, left = got[0], -got[4]
        line = torch.where(points > 0, right, left) * points
        same = torch.allclose(got, line, rtol=1e-6, atol=1e-12)
        return (right.item(), left.item()) if same else None

    @property
    def is_linear(self) -> bool:
        """Whether φ(u) = wu."""
        return self.slopes is not None and math.isclose(*self.slopes, rel_tol=1e-9)

    def q(self, q: float) -> float:
        """E[φ(√q z)²]."""
        z, w = _nodes(self, q)
        return float(w @ self.at(math.sqrt(q) * z) ** 2)

    @property
    def keeps_q(self) -> bool:
        """Whether q = 1 is mapped to 1, as by the activations of DKS and TAT."""
        return abs(self.q(1.0) - 1) < 0.05

    def growth(self, q: float, c: float) -> tuple[float, float]:
        """d ln Q / d ln q, which is 1 for DKS and TAT at q = 1, and dC / dc."""
        if self.slopes is None:
            return _growth(self, _rounded(q), round(c, 2))
        right, left = self.slopes
        bend = (right - left) ** 2 / (math.pi * (right**2 + left**2)) if right or left else 0.0
        return 1.0, 1 - bend * math.acos(min(max(c, -1.0), 1.0))

    def slope(self, q: float) -> float:
        """C′(1) at q: E[φ′(√q z)²] q / Q(q)."""
        return _slope(self, self._where(q))

    def c(self, c: float, q: float = 1.0) -> float:
        """C(c) for two inputs of mean square q."""
        kernel = torch.tensor([q, q, c * q], dtype=torch.float64).reshape(3, 1)
        first, _, k = self.map(kernel).flatten().tolist()
        return k / first if first > 0 else math.nan

    def noise(self, q: float, c: float) -> tuple[float, float]:
        """n·Var of ln q and of c after a layer of n channels, given q and c before it."""
        return _noise(self, self._where(q), round(min(max(c, -0.99), 0.9999), 3))

    def _where(self, q: float) -> float:
        """The q at which to evaluate what does not depend on q for homogeneous functions."""
        return _rounded(q) if self.slopes is None else 1.0

    def idle(self, q: float) -> float:
        """The share of Gaussian inputs at which |φ′| is below a tenth of its maximum."""
        q = self._where(q)
        z, w = _nodes(self, q)
        steepest = np.abs(_slopes_at(self, np.linspace(-8, 8, 801, dtype=np.float64))).max()
        return float(w @ (np.abs(_slopes_at(self, math.sqrt(q) * z)) < 0.1 * steepest))

    def map(self, kernel: Tensor) -> Tensor:
        """The kernel after the layer."""
        first, second, k = kernel
        root = (first * second).sqrt()
        c = torch.where(root > 0, k / root, 0.0).clamp(-1, 1)
        if self.slopes is not None:
            return self._homogeneous(first, second, root, c)
        a, rest = self._series(first)
        b, other = self._series(second)
        power = torch.ones_like(c)
        total = torch.zeros_like(c)
        for i in range(_TERMS):
            total += a[..., i] * b[..., i] * power
            power *= c
        total += (rest * other).sqrt() * power
        squares = a.square().sum(-1) + rest, b.square().sum(-1) + other
        return torch.stack((*squares, total))

    def _homogeneous(self, first: Tensor, second: Tensor, root: Tensor, c: Tensor) -> Tensor:
        assert self.slopes is not None
        right, left = self.slopes
        scale = 0.5 * (right**2 + left**2)
        kappa = (right - left) ** 2 / (2 * math.pi)
        bend = ((1 - c) * (1 + c)).sqrt() - c * c.arccos()
        return torch.stack((scale * first, scale * second, root * (scale * c + kappa * bend)))

    def _series(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """aᵢ(q), and E[φ²] − Σ aᵢ²."""
        is_known = q.isfinite()
        at = q.where(is_known, 1.0).clamp(min=2.0 ** (-_FAR / _PER_OCTAVE)).log2() * _PER_OCTAVE
        at = at.clamp(max=float(_FAR))
        low = at.min().floor().int().item() - 1
        high = at.max().floor().int().item() + 2
        table = torch.stack([_coefficients(self, j) for j in range(int(low), int(high) + 1)])
        left = at.floor()
        t = (at - left).unsqueeze(-1)
        i = (left - low).long()
        weights = (
            -t * (t - 1) * (t - 2) / 6,
            (t + 1) * (t - 1) * (t - 2) / 2,
            -(t + 1) * t * (t - 2) / 2,
            (t + 1) * t * (t - 1) / 6,
        )
        found = sum(w * table[i + d] for d, w in zip((-1, 0, 1, 2), weights, strict=True))
        assert isinstance(found, Tensor)
        found = found.where(is_known.unsqueeze(-1), math.nan)
        return found[..., :-1], found[..., -1].clamp(min=0)


def evaluate(expr: tuple[Any, ...], u: Tensor) -> Tensor:
    """Evaluate a pointwise expression at u.

    Expressions are ("x",), ("c", number), ("scale", a, factor), ("add", a, b, alpha),
    ("spec", ActSpec) and ("f", function, arguments, options).
    """
    kind, *rest = expr
    if kind == "x":
        return u
    if kind == "c":
        return torch.tensor(rest[0], dtype=torch.float64)
    if kind == "scale":
        return evaluate(rest[0], u) * rest[1]
    if kind == "add":
        return evaluate(rest[0], u) + rest[2] * evaluate(rest[1], u)
    if kind == "spec":
        return reference.shaped_act(u, rest[0])

    def leaf(a: Any) -> Any:
        return evaluate(a, u) if isinstance(a, tuple) and a and isinstance(a[0], str) else a

    function, args, options = rest
    found: Tensor = function(*map(leaf, args), **{k: leaf(v) for k, v in options})
    return found


@lru_cache(maxsize=256)
def _phi(expr: tuple[Any, ...]) -> Phi | None:
    phi = Phi(expr, _name(expr), expr[1] if expr[0] == "spec" else None)
    u = torch.linspace(-3, 3, 7, dtype=torch.float64)
    try:
        found = phi(u)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    whole = found.shape == u.shape and found.dtype == u.dtype
    return phi if whole and bool(found.isfinite().all()) else None


def _name(expr: tuple[Any, ...]) -> str:
    """Join the names of an expression's functions, innermost first."""
    found: dict[str, None] = {}

    def visit(e: Any) -> None:
        if not isinstance(e, tuple) or not e or not isinstance(e[0], str):
            return
        for part in e[2] if e[0] == "f" else e[1:]:
            visit(part)
        if e[0] == "f":
            found[e[1]._schema.name.partition("::")[2].strip("_")] = None
        elif e[0] == "spec":
            found[e[1].activation] = None

    visit(expr)
    return "·".join([n for n in found if n not in ARITHMETIC] or found) or "scale"


def _rounded(q: float) -> float:
    """Round q to a thirtieth of an octave, for caches."""
    return 2 ** (round(30 * math.log2(q)) / 30) if 0 < q < math.inf else 1.0


@lru_cache(maxsize=4096)
def _nodes(phi: Phi, q: float) -> tuple[Array, Array]:
    # A function that is not in the table is assumed to have a kink at 0 only. Beyond a scale of
    # 1000 the behaviour near kinks is negligible, and there would be too many panels.
    scale = min(max(math.sqrt(q), 1e-3), 1e3)
    if phi.spec is None:
        return rule(scale)
    spec = phi.spec
    return rule(scale * spec.input_scale, spec.input_shift, spec.row.kinks or (0.0,))


def _slopes_at(phi: Phi, u: Array) -> Array:
    h = 1e-5 * (1 + np.abs(u))
    return (phi.at(u + h) - phi.at(u - h)) / (2 * h)


@lru_cache(maxsize=4096)
def _slope(phi: Phi, q: float) -> float:
    z, w = _nodes(phi, q)
    out = phi.q(q)
    return float(w @ _slopes_at(phi, math.sqrt(q) * z) ** 2) * q / out if out > 0 else math.nan


@lru_cache(maxsize=4096)
def _growth(phi: Phi, q: float, c: float) -> tuple[float, float]:
    h = 1e-3
    up, down = phi.q(q * (1 + h)), phi.q(q * (1 - h))
    of_q = (math.log(up) - math.log(down)) / (2 * h) if up > 0 and down > 0 else 1.0
    low, high = max(c - 0.01, -1.0), min(c + 0.01, 1.0)
    return of_q, (phi.c(high, q) - phi.c(low, q)) / (high - low)


@lru_cache(maxsize=4096)
def _coefficients(phi: Phi, j: int) -> Tensor:
    """aᵢ at q = 2^(j / _PER_OCTAVE), and E[φ²] − Σ aᵢ²."""
    q = 2.0 ** (j / _PER_OCTAVE)
    z, w = _nodes(phi, q)
    f = phi.at(math.sqrt(q) * z)
    before, h = np.zeros_like(z), np.ones_like(z)
    found = []
    for i in range(_TERMS):
        found.append(float(w @ (f * h)))
        before, h = h, (z * h - math.sqrt(i) * before) / math.sqrt(i + 1)
    rest = max(float(w @ f**2) - sum(a * a for a in found), 0.0)
    return torch.tensor([*found, rest], dtype=torch.float64)


@lru_cache(maxsize=4096)
def _noise(phi: Phi, q: float, c: float) -> tuple[float, float]:
    x, y, w = _pairs(c)
    f, g = phi.at(math.sqrt(q) * x), phi.at(math.sqrt(q) * y)
    size = float(w @ f**2)
    if not size > 0:
        return 0.0, 0.0
    correlation = float(w @ (f * g)) / size
    # The mean squares and product of x and y are given, so what they explain is not noise.
    given = np.stack((np.ones_like(x), x * x, y * y, x * y))
    gram = (given * w) @ given.T

    def spread(effect: Array) -> float:
        left = effect - given.T @ np.linalg.lstsq(gram, (given * w) @ effect, rcond=None)[0]
        return float(w @ left**2)

    effect = (f * g - 0.5 * correlation * (f * f + g * g)) / size
    return spread(f * f / size), spread(effect)


@lru_cache(maxsize=256)
def _pairs(c: float) -> tuple[Array, Array, Array]:
    """Quadrature nodes for normal x and y of correlation c; coarse, which is enough for noise."""
    z, w = np.polynomial.hermite_e.hermegauss(40)
    w = w / w.sum()
    x, other = np.meshgrid(z, z, indexing="ij")
    y = c * x + math.sqrt(1 - c * c) * other
    return x.ravel(), y.ravel(), np.outer(w, w).ravel()


@dataclass(frozen=True)
class Affine:
    """What the theory needs to know about an affine layer's weights.

    Attributes:
        gain: the factor on q for inputs of random direction, ‖W‖² per output channel.
        chance: Var of ln q_out / q_in for random weights of this shape; 0 for orthogonal ones.
        bias: mean square of the bias.
        fan: input and output channels of a group, in PyTorch's layout.
        spread: standard deviation of ln gain for random weights of the right scale.
        flaw: how the weights differ from random ones, in words; see `randomness`.
        taps: each tap's share of `gain`, (1, 1, *kernel); None for a linear layer.
        geometry: stride, padding, dilation, transposed, output_padding.
    """

    gain: float = 1.0
    chance: float = 0.0
    bias: float = 0.0
    fan: tuple[int, int] = (0, 0)
    spread: float = 0.0
    flaw: str = ""
    taps: Tensor | None = None
    geometry: tuple[Any, ...] = ()

    @property
    def is_orthogonal(self) -> bool:
        """Whether the rows or columns of the weights are orthonormal, up to a factor."""
        return self.has_weights and self.spread == 0

    @property
    def has_weights(self) -> bool:
        """Whether there are weights, not only a bias."""
        return self.fan != (0, 0)

    def over(self, locations: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """The map of kernels by weights of gain 1, for inputs with these locations."""
        taps = self.taps
        if taps is None:
            return lambda kernel: kernel
        stride, padding, dilation, transposed, output_padding = self.geometry
        n, place = taps.ndim - 3, tuple(locations)

        def move(kernel: Tensor) -> Tensor:
            flat = kernel.reshape(-1, 1, *place)
            if transposed:
                out = _TRANSPOSED[n](
                    flat,
                    taps * math.prod(stride),
                    None,
                    stride,
                    padding,
                    output_padding,
                    1,
                    dilation,
                )
            else:
                out = _CONVS[n](flat, taps, None, stride, padding, dilation)
            return out.reshape(*kernel.shape[:2], *out.shape[2:])

        return move


def matrix(weight: Tensor, bias: Tensor | None) -> Affine:
    """Describe the weights (in, out) of a linear layer."""
    w = weight.detach().float().t()
    energy = float(torch.linalg.vector_norm(w)) ** 2
    seen = randomness(w.unsqueeze(0))
    return Affine(
        energy / len(w),
        seen.chance,
        _bias(bias),
        (w.shape[1], w.shape[0]),
        0.0 if seen.is_orthogonal else math.sqrt(2 / w.numel()),
        seen.flaw,
    )


def convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Affine:
    """Describe the weights of a convolution, in PyTorch's layout."""
    w = matrices(weight.detach().float(), groups, transposed)
    taps = w.square().sum((0, 1, 2)).double().cpu()
    total = float(taps.sum())
    used = w.flatten(3)[..., (taps > 0).flatten().to(w.device)]
    shares = taps / total if total > 0 else torch.full_like(taps, 1 / taps.numel())
    out = w.shape[0] * w.shape[1]
    parts = list(_by_phase(w, stride)) if transposed else [used.flatten(2)]
    seen = [randomness(part) for part in parts]
    flaws = [s.flaw for s in seen if s.flaw]
    if not transposed and not flaws:
        # Equal taps are fine in a transposed convolution: that is nearest-neighbour upsampling.
        flaws = [taps_alike(used)]
    return Affine(
        total / out / (math.prod(stride) if transposed else 1),
        sum(s.chance for s in seen) / max(len(seen), 1),
        _bias(bias),
        (w.shape[2], w.shape[1] if transposed else out),
        0.0 if all(s.is_orthogonal for s in seen) else math.sqrt(2 / max(used.numel(), 1)),
        flaws[0] if flaws else "",
        shares[None, None],
        (tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding)),
    )


def _by_phase(w: Tensor, stride: Sequence[int]) -> Iterator[Tensor]:
    """A transposed convolution's weights, (groups, out, in · taps) for each phase of outputs."""
    for taps in phases(stride):
        part = w[(slice(None),) * 3 + taps].flatten(3)
        used = part[..., part.square().sum((0, 1, 2)) > 0]
        if used.numel():
            yield used.flatten(2)


def _bias(bias: Tensor | None) -> float:
    return 0.0 if bias is None else float(bias.detach().double().square().mean())
