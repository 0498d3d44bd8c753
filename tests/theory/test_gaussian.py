"""The quadrature rules against SciPy's adaptive one and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from fusedshape import ACTIVATIONS
from fusedshape.theory.gaussian import pair_rule, rule

NAMES = list(ACTIVATIONS)
# (α, β) as solutions have them, as a search meets on its way, and with the kink far out.
AFFINE = [(1.0, 0.0), (0.06, -0.5), (-0.3, 0.6), (3.4, 0.44), (2.1, 6.85), (0.005, 0.02), (12.0, 3)]


def density(z: float) -> float:
    return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("name", NAMES)
def test_rule_agrees_with_adaptive_quadrature(name: str) -> None:
    row = ACTIVATIONS[name]
    slope = 0.3 if row.has_slope else 0.0
    for scale, shift in AFFINE:
        z, w = rule(scale, shift, row.kinks or (0.0,))
        for phi in (row.value, row.d1, row.d2):

            def square(x: float, phi=phi, scale=scale, shift=shift) -> float:  # type: ignore[no-untyped-def]
                u = torch.tensor(scale * x + shift, dtype=torch.float64)
                return phi(u, slope).item() ** 2 * density(x)

            middle = min(10.0, max(-10.0, -shift / scale))
            truth = sum(
                integrate.quad(square, a, b, epsabs=1e-15, epsrel=1e-13, limit=400)[0]
                for a, b in ((-10.5, middle), (middle, 10.5))
            )
            got = w @ phi(torch.from_numpy(scale * z + shift), slope).numpy() ** 2
            assert got == pytest.approx(truth, rel=1e-12, abs=1e-14), (scale, shift, phi)


@pytest.mark.parametrize("power", range(0, 21, 2))
def test_moments(power: int) -> None:
    z, w = rule()
    assert w @ z**power == pytest.approx(math.prod(range(1, power, 2)), rel=1e-13)


@pytest.mark.parametrize("c", [-1 + 1e-9, -0.9, -0.2, 0.0, 1e-6, 0.5, 0.99, 1 - 1e-6, 1 - 1e-12])
def test_pairs_with_kinks_have_the_closed_forms_of_relu(c: float) -> None:
    # Whole layers of the recursion are built on E[relu relu] and E[step step].
    x, y, w = pair_rule(c)
    relu = (w * x.clip(0) * y.clip(0)).sum()
    step = (w * (x > 0) * (y > 0)).sum()
    angle = math.acos(c)
    bend = math.sqrt((1 - c) * (1 + c)) + (math.pi - angle) * c
    assert relu == pytest.approx(bend / (2 * math.pi), abs=1e-13)
    assert step == pytest.approx(0.5 - angle / (2 * math.pi), abs=1e-13)


@pytest.mark.parametrize("c", [-0.97, -0.3, 0.1, 0.6, 0.999])
def test_pairs_of_sines_have_their_closed_form(c: float) -> None:
    # E[sin(αx) sin(αy)] = e^{−α²} sinh(α²c), and the shifted kink must not disturb it.
    alpha = 1.7
    x, y, w = pair_rule(c, alpha, 0.4)
    got = (w * np.sin(alpha * x) * np.sin(alpha * y)).sum()
    assert got == pytest.approx(math.exp(-(alpha**2)) * math.sinh(alpha**2 * c), abs=1e-14)
