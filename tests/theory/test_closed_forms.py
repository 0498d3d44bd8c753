"""Across modules: C maps and whole networks against closed forms and google/neural-tangents."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from fusedshape import ActSpec
from fusedshape.nn import NormalizedSum, ShapedActivation
from fusedshape.theory import c_curve, c_map, c_slope, q_map, trace_wiring

CS = [-1.0, -0.7, -0.2, 0.0, 0.1, 0.5, 0.95, 0.999, 1.0]
# The last digits of acos near 1 are worth its square root.
TOLERANCE = 1e-12


def arc_cosine(a: float) -> Callable[[float], float]:
    """Leaky ReLU as a·x + (1−a)·relu(x), with the kernels of Cho and Saul, NeurIPS 2009.

    E[relu(x)relu(y)] = (sin θ + (π−θ) cos θ)/2π for cos θ = c, and E[x relu(y)] = c/2.
    """

    def value(c: float) -> float:
        theta = math.acos(c)
        rectified = (math.sin(theta) + (math.pi - theta) * c) / (2 * math.pi)
        return a * a * c + a * (1 - a) * c + (1 - a) ** 2 * rectified

    return value


def arcsine(alpha: float) -> Callable[[float], float]:
    """E[erf(αx)erf(αy)] of Williams, NeurIPS 1996."""
    s = 2 * alpha * alpha
    return lambda c: 2 / math.pi * math.asin(s * c / (1 + s))


# E[φ(αx)φ(αy)] of normal x, y with correlation c; the rest by the moments and characteristic
# function of the normal distribution.
CLOSED: dict[str, tuple[ActSpec, Callable[[float], float]]] = {
    "relu": (ActSpec("relu"), arc_cosine(0.0)),
    "leaky_relu": (ActSpec("leaky_relu", negative_slope=0.3), arc_cosine(0.3)),
    "falling": (ActSpec("leaky_relu", negative_slope=-0.5), arc_cosine(-0.5)),
    "erf": (ActSpec("erf"), arcsine(1.0)),
    "narrow erf": (ActSpec("erf", 0.2), arcsine(0.2)),
    "wide erf": (ActSpec("erf", -3.0), arcsine(3.0)),
    "square": (ActSpec("square"), lambda c: 1 + 2 * c * c),
    "shifted square": (
        ActSpec("square", output_shift=-1.0, output_scale=3.0),
        lambda c: 9 * 2 * c * c,
    ),
    "sin": (ActSpec("sin"), lambda c: math.exp(-1) * math.sinh(c)),
    "cos": (ActSpec("cos", 1.5), lambda c: math.exp(-2.25) * math.cosh(2.25 * c)),
    "sin and cos": (
        ActSpec("sin", 1.0, math.pi / 4),
        lambda c: 0.5 * math.exp(-1) * (math.sinh(c) + math.cosh(c)),
    ),
}


def exact(name: str) -> tuple[ActSpec, Callable[[float], float]]:
    """A spec scaled to Q(1) = 1, and its C map in closed form."""
    spec, kernel = CLOSED[name]
    q = kernel(1.0)
    return replace(spec, output_scale=spec.output_scale / math.sqrt(q)), lambda c: kernel(c) / q


@pytest.mark.parametrize("name", CLOSED)
def test_c_maps(name: str) -> None:
    spec, c_exact = exact(name)
    assert q_map(spec, 1.0) == pytest.approx(1.0, abs=TOLERANCE)
    for c in CS:
        assert c_map(spec, c) == pytest.approx(c_exact(c), abs=TOLERANCE)


def test_q_maps() -> None:
    for q in (0.01, 1.0, 20.0):
        erf = 2 / math.pi * math.asin(2 * q / (1 + 2 * q))
        assert q_map(ActSpec("erf"), q) == pytest.approx(erf, rel=1e-12)
        assert q_map(ActSpec("sin"), q) == pytest.approx(-0.5 * math.expm1(-2 * q), rel=1e-12)
        assert q_map(ActSpec("square"), q) == pytest.approx(3 * q * q, rel=1e-12)


@pytest.mark.parametrize("c", [-0.7, 0.0, 0.5, 0.95])
def test_slopes_and_curvatures(c: float) -> None:
    theta = math.acos(c)
    assert c_slope(ActSpec("relu"), c) == pytest.approx((math.pi - theta) / math.pi, abs=1e-12)
    assert c_curve(ActSpec("relu"), c) == pytest.approx(1 / (math.pi * math.sin(theta)), rel=1e-12)
    erf, top = ActSpec("erf"), math.asin(2 / 3)
    u = 2 * c / 3
    assert c_slope(erf, c) == pytest.approx(2 / 3 / math.sqrt(1 - u * u) / top, rel=1e-12)
    assert c_curve(erf, c) == pytest.approx(4 / 9 * u * (1 - u * u) ** -1.5 / top, abs=1e-12)
    assert c_slope(ActSpec("sin"), c) == pytest.approx(math.cosh(c) / math.sinh(1), rel=1e-12)


class Block(nn.Module):
    """0.6·x + 0.8·f(x) with two layers in f."""

    def __init__(self, spec: ActSpec) -> None:
        super().__init__()
        layers = [m for _ in range(2) for m in (ShapedActivation(spec), nn.Linear(4, 4))]
        self.f, self.join = nn.Sequential(*layers), NormalizedSum((0.6, 0.8))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.f(x))


def network(kind: str, spec: ActSpec) -> nn.Module:
    layer = lambda: nn.Sequential(ShapedActivation(spec), nn.Linear(4, 4))  # noqa: E731
    if kind == "resnet":
        return nn.Sequential(*(Block(spec) for _ in range(3)), layer())
    return nn.Sequential(*(layer() for _ in range(8 if kind == "chain" else 1)))


def composed(kind: str, r: Callable[[float], float], c: float) -> float:
    """The maps of the same networks, composed by hand."""
    if kind == "resnet":
        for _ in range(3):
            c = 0.36 * c + 0.64 * r(r(c))
        return r(c)
    for _ in range(8 if kind == "chain" else 1):
        c = r(c)
    return c


@pytest.mark.parametrize("kind", ["chain", "resnet"])
@pytest.mark.parametrize("name", CLOSED)
def test_whole_networks(name: str, kind: str) -> None:
    spec, c_exact = exact(name)
    wiring = trace_wiring(network(kind, spec))
    for c in CS:
        # Rounding may leave [−1, 1] by its last digit.
        truth = composed(kind, lambda v: c_exact(max(-1.0, min(1.0, v))), c)
        ours = wiring.whole(c, lambda v: c_map(spec, max(-1.0, min(1.0, v))))
        assert ours == pytest.approx(truth, abs=1e-9)


FILE = json.loads((Path(__file__).parent / "vectors/neural_tangents.json").read_text())


def test_the_file_is_whole() -> None:
    kinds = {(case["phi"], case["net"]) for case in FILE["cases"]}
    assert len(kinds) == len(FILE["cases"]) == 15


@pytest.mark.parametrize("case", FILE["cases"], ids=lambda case: f"{case['phi']}-{case['net']}")
def test_neural_tangents(case: dict[str, Any]) -> None:
    slope = 0.3 if case["phi"] == "leaky_relu" else 0.0
    spec = ActSpec(case["phi"], negative_slope=slope)
    spec = replace(spec, output_scale=q_map(spec, 1.0) ** -0.5)
    wiring = trace_wiring(network(case["net"], spec))
    for c, out in zip(case["c"], case["out"], strict=True):
        ours = wiring.whole(c, lambda v: c_map(spec, v))
        assert ours == pytest.approx(out, abs=1e-6)
