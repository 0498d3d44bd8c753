"""Q and C maps against independent quadrature, closed forms, differences and Hermite series."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fusedshape import ActSpec
from fusedshape.theory import c_curve, c_map, c_slope, q_map, q_slope
from tests.support.oracle import derivatives, local, nodes
from tests.support.specs import SPECS

CS = [-1.0, -0.8, -0.1, 0.0, 0.3, 0.95, 1.0]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_values_at_one(spec: ActSpec) -> None:
    truth = local(spec)
    assert q_map(spec, 1.0) == pytest.approx(truth["Q(1)"], rel=1e-12)
    assert q_slope(spec) == pytest.approx(truth["Q'(1)"], rel=1e-12)
    assert c_map(spec, 0.0) == pytest.approx(truth["C(0)"], rel=1e-11, abs=1e-14)
    assert c_map(spec, 1.0) == pytest.approx(1.0, rel=1e-14)
    assert c_slope(spec) == pytest.approx(truth["C'(1)"], rel=1e-12)
    assert c_curve(spec, corners=False) == pytest.approx(truth["C''(1)"], rel=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_c_map_is_its_hermite_series(spec: ActSpec) -> None:
    # C(c) = Σ bₖ cᵏ with bₖ = E[φ̂ hₖ]² / Q, so that C(−c) shares every coefficient but the sign.
    z, w = nodes(spec)
    f = derivatives(spec, z)[0]
    q = w @ f**2
    before, h = np.zeros_like(z), np.ones_like(z)
    series = dict.fromkeys((-0.5, 0.2, 0.6), 0.0)
    for k in range(80):
        b = (w @ (f * h)) ** 2 / q
        for c in series:
            series[c] += b * c**k
        before, h = h, (z * h - math.sqrt(k) * before) / math.sqrt(k + 1)
    for c, value in series.items():
        assert c_map(spec, c) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
@pytest.mark.parametrize("c", [-0.7, 0.1, 0.8])
def test_slopes_are_derivatives(spec: ActSpec, c: float) -> None:
    # Central differences of fourth order: the error is some 1e-11 from rounding and h⁴.
    h = 1e-3

    def difference(f) -> float:  # type: ignore[no-untyped-def]
        return (8 * (f(c + h) - f(c - h)) - (f(c + 2 * h) - f(c - 2 * h))) / (12 * h)

    assert c_slope(spec, c) == pytest.approx(difference(lambda x: c_map(spec, x)), abs=1e-8)
    assert c_curve(spec, c) == pytest.approx(difference(lambda x: c_slope(spec, x)), abs=1e-8)
    q = 1 + c
    rise = (q_map(spec, q + h) - q_map(spec, q - h)) / (2 * h)
    assert q_slope(spec, q) == pytest.approx(rise, rel=1e-4)


@pytest.mark.parametrize("a", [0.0, 0.3, -0.5, 1.0, 1.7])
@pytest.mark.parametrize("c", CS)
def test_closed_forms_are_the_integrals(a: float, c: float) -> None:
    # A shift too small to change anything sends the same φ̂ through quadrature.
    spec = ActSpec("leaky_relu", negative_slope=a, input_scale=-0.7, output_scale=2.0)
    general = replace(spec, input_shift=1e-300)
    for f in (c_map, c_slope):
        assert f(spec, c) == pytest.approx(f(general, c), abs=1e-13)
    assert q_map(spec, 2.5) == pytest.approx(q_map(general, 2.5), rel=1e-13)
    if abs(c) < 1:
        curve = (1 - a) ** 2 / (math.pi * (1 + a * a) * math.sqrt(1 - c * c))
        assert c_curve(spec, c) == pytest.approx(curve, rel=1e-12, abs=1e-15)


def test_corners_make_the_curvature_infinite() -> None:
    selu = ActSpec("selu")
    assert c_curve(selu) == math.inf
    assert c_curve(ActSpec("leaky_relu", negative_slope=1.0)) == 0
    assert c_curve(ActSpec("elu")) == c_curve(ActSpec("elu"), corners=False)
    # Near 1 the point mass goes like (1 − c)^(−1/2).
    ratio = c_curve(selu, 1 - 1e-10) / c_curve(selu, 1 - 1e-8)
    assert ratio == pytest.approx(10, rel=1e-3)


def test_trelu_facts() -> None:
    for a in (0.0, 0.25, 0.9):
        spec = ActSpec("leaky_relu", negative_slope=a, output_scale=math.sqrt(2 / (1 + a * a)))
        for q in (0.1, 1.0, 7.0):
            assert q_map(spec, q) == pytest.approx(q, rel=1e-14)
            assert q_slope(spec, q) == pytest.approx(1.0, rel=1e-12)
        assert c_slope(spec) == 1.0


def test_q_map_at_zero() -> None:
    spec = ActSpec("sigmoid", 0.7, 0.2, -0.35, 1.9)
    assert q_map(spec, 0.0) == pytest.approx(q_map(spec, 1e-12), rel=1e-9)


@pytest.mark.parametrize("c", [1.0000001, -2.0, math.nan, math.inf])
@pytest.mark.parametrize("f", [c_map, c_slope, c_curve])
def test_correlations_are_checked(f, c: float) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="correlation"):
        f(ActSpec("tanh"), c)


@pytest.mark.parametrize("q", [-1e-9, math.nan, math.inf])
def test_mean_squares_are_checked(q: float) -> None:
    with pytest.raises(ValueError, match="q must be finite"):
        q_map(ActSpec("tanh"), q)
    with pytest.raises(ValueError, match="q must be finite"):
        q_slope(ActSpec("tanh"), q)
    with pytest.raises(ValueError, match="> 0"):
        q_slope(ActSpec("tanh"), 0.0)
