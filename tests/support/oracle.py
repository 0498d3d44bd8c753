"""Expectations by a rule that shares nothing with the package's, derivatives by autograd."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from fusedshape import ActSpec

Array = NDArray[np.float64]
END = 13.0
MIRRORED = {"tanh", "erf", "atan", "asinh", "softsign", "sin"}  # odd φ


@cache
def legendre() -> tuple[Array, Array]:
    x, w = special.roots_legendre(40)
    return x, w


def nodes(spec: ActSpec) -> tuple[Array, Array]:
    """Nodes and weights: 60 equal panels on each side of each kink, 40 nodes per panel."""
    at = [(k - spec.input_shift) / spec.input_scale for k in spec.row.kinks]
    sides = itertools.pairwise([-END, *sorted(x for x in at if abs(x) < END), END])
    ends = np.unique(np.concatenate([np.linspace(*side, 61) for side in sides]))
    x, w = legendre()
    half, middle = np.diff(ends) / 2, (ends[:-1] + ends[1:]) / 2
    z = (middle[:, None] + half[:, None] * x).ravel()
    weight = (half[:, None] * w).ravel() * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    return z, weight


def derivatives(spec: ActSpec, x: Array) -> tuple[Array, Array, Array]:
    """φ̂, φ̂′ and φ̂″ at x; φ̂ = γ(φ(αx + β) + δ)."""
    at = torch.from_numpy(x).requires_grad_()
    u = spec.input_scale * at + spec.input_shift
    value = spec.row.value(u, spec.negative_slope) + spec.output_shift
    y = spec.output_scale * value
    (d1,) = torch.autograd.grad(y.sum(), at, create_graph=True)
    d2 = np.zeros_like(x)
    if d1.requires_grad:
        (second,) = torch.autograd.grad(d1.sum(), at, allow_unused=True)
        d2 = d2 if second is None else second.numpy()
    return y.detach().numpy(), d1.detach().numpy(), d2


def local(spec: ActSpec) -> dict[str, float]:
    """The quantities that the conditions fix, at q = 1."""
    z, w = nodes(spec)
    f, d1, d2 = derivatives(spec, z)
    q = w @ f**2
    return {
        "Q(1)": q,
        "Q'(1)": w @ (f * d1 * z),
        "C(0)": (w @ f) ** 2 / q,
        "E": w @ f,
        "C'(1)": w @ d1**2 / q,
        "C''(1)": w @ d2**2 / q,
    }


def numbers(spec: ActSpec) -> Array:
    return np.array(
        [
            spec.negative_slope,
            spec.input_scale,
            spec.input_shift,
            spec.output_shift,
            spec.output_scale,
        ]
    )


def canonical(spec: ActSpec) -> Array:
    """The constants, up to x → −x of any φ̂ and φ̂(x) → −φ̂(−x) of an odd φ."""
    a, alpha, beta, delta, gamma = numbers(spec)
    if spec.activation in MIRRORED and beta < 0:
        beta, delta = -beta, -delta
    if spec.activation == "sigmoid" and beta < 0:
        beta, delta = -beta, -1 - delta
    return np.array([a, abs(alpha), beta, delta, gamma])
