r"""Q and C maps of a shaped activation: what one wide layer does to lengths and to angles.

With z, z₁, z₂ independent N(0, 1), weights that keep q, and no biases, φ̂ sends the mean square q of
its inputs to Q(q), and the correlation c of two inputs of mean square 1 to C(c):

    Q(q) = E[φ̂(√q z)²]        C(c) = E[φ̂(z₁) φ̂(c z₁ + √(1−c²) z₂)] / Q(1)

See Martens et al., "Rapid training of deep neural networks without skip connections or
normalization layers using Deep Kernel Shaping", arXiv 2110.01765.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from fusedshape.activations import Activation, Phi
from fusedshape.spec import ActSpec
from fusedshape.theory.gaussian import Array, pair_rule, rule
from fusedshape.validate import flag, instance, number, real

# The number of the quadrature's panels grows as √q.
_LARGEST_Q = 1e8


class Local(NamedTuple):
    """f(z) = φ(αz + β), its derivatives by z, and the rule to average them with."""

    z: Array
    w: Array
    f: Array
    d1: Array
    d2: Array

    @classmethod
    def of(cls, row: Activation, scale: float, shift: float, slope: float = 0.0) -> Local:
        """Evaluate φ, φ′ and φ″ of a row at the nodes of its rule."""
        z, w = rule(scale, shift, row.kinks or (0.0,))
        u = torch.from_numpy(scale * z + shift)
        f, d1, d2 = (phi(u, slope).numpy() for phi in (row.value, row.d1, row.d2))
        return cls(z, w, f, scale * d1, scale * scale * d2)


def q_map(spec: ActSpec, q: float) -> float:
    r"""Q(q) = E[φ̂(√q z)²].

    Args:
        spec: the activation φ̂.
        q: mean square of the inputs, q ≥ 0.

    Returns:
        Mean square of the outputs.

    Raises:
        ValueError: q is negative or not finite.

    Example:
        >>> round(q_map(ActSpec("relu", output_scale=2**0.5), 3.0), 12)
        3.0
    """
    spec, q = _spec("q_map", spec), number("q_map", "q", q, 0.0, _LARGEST_Q)
    if _is_leaky(spec):
        both = (spec.input_scale * spec.output_scale) ** 2
        return both * 0.5 * (1 + spec.negative_slope**2) * q
    if q == 0:
        u = torch.tensor(spec.input_shift, dtype=torch.float64)
        still = spec.row.value(u, spec.negative_slope).item()
        return (spec.output_scale * (still + spec.output_shift)) ** 2
    at = Local.of(spec.row, spec.input_scale * math.sqrt(q), spec.input_shift, spec.negative_slope)
    return spec.output_scale**2 * float(at.w @ (at.f + spec.output_shift) ** 2)


def q_slope(spec: ActSpec, q: float = 1.0) -> float:
    r"""Q′(q) = E[φ̂(√q z) φ̂′(√q z) z] / √q.

    Args:
        spec: the activation φ̂.
        q: mean square of the inputs, q > 0.

    Returns:
        Slope of the Q map; DKS and TAT make it 1 at q = 1.

    Raises:
        ValueError: q is not positive or not finite.

    Example:
        >>> round(q_slope(ActSpec("tanh")), 6)
        0.181798
    """
    spec, q = _spec("q_slope", spec), number("q_slope", "q", q, 0.0, _LARGEST_Q)
    if q == 0:
        raise ValueError("q_slope: q must be finite and > 0, got 0")
    at = Local.of(spec.row, spec.input_scale * math.sqrt(q), spec.input_shift, spec.negative_slope)
    moment = float(at.w @ ((at.f + spec.output_shift) * at.d1 * at.z))
    return spec.output_scale**2 * moment / q


def c_map(spec: ActSpec, c: float) -> float:
    r"""C(c) = E[φ̂(z₁) φ̂(c z₁ + √(1−c²) z₂)] / Q(1).

    For relu and leaky_relu of slope a without shifts, c + κ(√(1−c²) − c arccos c) with
    κ = (1−a)² / (π(1+a²)).

    Args:
        spec: the activation φ̂.
        c: correlation of the inputs, −1 ≤ c ≤ 1.

    Returns:
        Correlation of the outputs.

    Raises:
        ValueError: c is outside [−1, 1].

    Example:
        >>> round(c_map(ActSpec("relu"), 0.0) * math.pi, 12)
        1.0
    """
    spec, c = _spec("c_map", spec), _correlation("c_map", c)
    if _is_leaky(spec):
        return leaky_c_map(spec.negative_slope, c)
    return _correlate(spec, spec.row.value, spec.output_shift, c) / _unscaled_q(spec)


def c_slope(spec: ActSpec, c: float = 1.0) -> float:
    r"""C′(c) = E[φ̂′(z₁) φ̂′(c z₁ + √(1−c²) z₂)] / Q(1).

    For relu and leaky_relu of slope a without shifts, 1 − κ arccos c, with κ as for `c_map`.

    Args:
        spec: the activation φ̂.
        c: correlation of the inputs, −1 ≤ c ≤ 1.

    Returns:
        Slope of the C map; at c = 1 it tells how fast nearby inputs separate.

    Raises:
        ValueError: c is outside [−1, 1].

    Example:
        >>> round(c_slope(ActSpec("relu")), 12)
        1.0
    """
    spec, c = _spec("c_slope", spec), _correlation("c_slope", c)
    if _is_leaky(spec):
        return 1 - _kappa(spec.negative_slope) * math.acos(c)
    return spec.input_scale**2 * _correlate(spec, spec.row.d1, 0.0, c) / _unscaled_q(spec)


def c_curve(spec: ActSpec, c: float = 1.0, *, corners: bool = True) -> float:
    r"""C″(c) = E[φ̂″(z₁) φ̂″(c z₁ + √(1−c²) z₂)] / Q(1).

    At a corner of φ (relu, leaky_relu, selu) φ″ holds a point mass, and C″(1) is infinite.

    Args:
        spec: the activation φ̂.
        c: correlation of the inputs, −1 ≤ c ≤ 1.
        corners: whether to count the point masses. Without them the value is what TAT's
            condition on C″(1) uses for selu, and 0 for relu and leaky_relu.

    Returns:
        Curvature of the C map; `math.inf` where it diverges.

    Raises:
        ValueError: c is outside [−1, 1].

    Example:
        >>> c_curve(ActSpec("selu")), round(c_curve(ActSpec("relu"), 0.0) * math.pi, 12)
        (inf, 1.0)
    """
    spec, c = _spec("c_curve", spec), _correlation("c_curve", c)
    flag("c_curve", "corners", corners)
    row, scale, shift = spec.row, spec.input_scale, spec.input_shift
    total = scale**4 * _correlate(spec, row.d2, 0.0, c)
    s = math.sqrt((1 - c) * (1 + c))
    for x, jump in corners_of(spec) if corners else []:
        if s == 0 and c * x == x:
            return math.inf
        # The point mass of one φ̂″ times the regular part of the other; then both point masses.
        z, w = rule(scale * s, scale * c * x + shift, row.kinks) if s else (np.zeros(1), np.ones(1))
        u = torch.from_numpy(scale * (c * x + s * z) + shift)
        regular = scale**2 * float(w @ row.d2(u, spec.negative_slope).numpy())
        total += 2 * jump * normal_pdf(x) * regular
        if s:
            total += jump**2 * math.exp(-x * x / (1 + c)) / (2 * math.pi * s)
    return total / _unscaled_q(spec)


def corners_of(spec: ActSpec) -> list[tuple[float, float]]:
    """Each corner of φ(αx + β): its x, and the jump of the slope there."""
    found = []
    for kink in () if spec.row.smooth else spec.row.kinks:
        left, right = _sides(spec.row.d1, kink, spec.negative_slope)
        if left != right:
            x = (kink - spec.input_shift) / spec.input_scale
            found.append((x, abs(spec.input_scale) * (right - left)))
    return found


def normal_pdf(x: float) -> float:
    """Density of N(0, 1)."""
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def leaky_c_map(negative_slope: float, c: float) -> float:
    """C(c) of leaky_relu without shifts, in closed form; c is clamped to [−1, 1]."""
    c = min(1.0, max(-1.0, c))
    bend = math.sqrt((1 - c) * (1 + c)) - c * math.acos(c)
    return c + _kappa(negative_slope) * bend


def _kappa(a: float) -> float:
    return (1 - a) ** 2 / (math.pi * (1 + a * a))


def _is_leaky(spec: ActSpec) -> bool:
    return (
        spec.activation in ("relu", "leaky_relu")
        and spec.input_shift == 0
        and spec.output_shift == 0
    )


def _unscaled_q(spec: ActSpec) -> float:
    """Q(1) / γ²: γ cancels from the C map, and so does its rounding."""
    at = Local.of(spec.row, spec.input_scale, spec.input_shift, spec.negative_slope)
    return float(at.w @ (at.f + spec.output_shift) ** 2)


def _correlate(spec: ActSpec, phi: Phi, shift: float, c: float) -> float:
    """E[f(x) f(y)] with f = phi(α · + β) + shift, for x and y of correlation c."""
    alpha, beta = spec.input_scale, spec.input_shift
    kinks = spec.row.kinks or (0.0,)

    def f(x: Array) -> Array:
        u = torch.from_numpy(alpha * np.ascontiguousarray(x) + beta)
        return phi(u, spec.negative_slope).numpy() + shift

    if abs(c) == 1:
        mirrored = [-(k - beta) / alpha for k in kinks]
        z, w = rule(alpha, beta, kinks, mirrored)
        return float(w @ (f(z) * f(c * z)))
    if c == 0:
        z, w = rule(alpha, beta, kinks)
        return float(w @ f(z)) ** 2
    x, y, w = pair_rule(c, alpha, beta, kinks)
    return float((w * f(x) * f(y)).sum())


def _sides(phi: Phi, at: float, slope: float) -> tuple[float, float]:
    """Limits of phi from the left and from the right."""
    point = torch.tensor(at, dtype=torch.float64)
    ends = (torch.nextafter(point, point + sign) for sign in (-1, 1))
    left, right = (phi(end, slope).item() for end in ends)
    return left, right


def _spec(who: str, spec: ActSpec) -> ActSpec:
    return instance(who, "spec", spec, ActSpec)


def _correlation(who: str, c: float) -> float:
    c = real(who, "c", c)
    if not -1 <= c <= 1:
        raise ValueError(f"{who}: c must be a correlation, −1 ≤ c ≤ 1, got {c}")
    return c
