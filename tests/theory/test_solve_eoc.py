"""The edge of chaos against its definition, the closed form of relu, and an affine twin."""

from __future__ import annotations

import math

import pytest

from fusedshape import ACTIVATIONS, ActSpec
from fusedshape.theory import EdgeOfChaos, Unreachable, eoc
from tests.support.oracle import derivatives, nodes


def check(edge: EdgeOfChaos) -> None:
    """q = σ_w² E[φ²] + σ_b², χ₁ = 1, and the Q map is no steeper than 1 there."""
    root = math.sqrt(edge.q)
    wide = ActSpec(edge.spec.activation, root, negative_slope=edge.spec.negative_slope)
    z, w = nodes(wide)
    f, d1, _ = derivatives(wide, z)
    scale2 = edge.sigma_w**2
    assert scale2 * (w @ f**2) + edge.sigma_b**2 == pytest.approx(edge.q, rel=1e-9)
    assert scale2 * (w @ d1**2) / edge.q == pytest.approx(1.0, rel=1e-9)
    assert abs(scale2 * (w @ (f * d1 * z)) / edge.q) <= 1 + 1e-9


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in ("sin", "cos")])
def test_definition(name: str) -> None:
    bias = 1.0 if name in ("swish", "gelu", "gelu_exact") else None
    try:
        edge = eoc(name, sigma_b=bias)
    except Unreachable:
        assert name in ("softplus", "bentid", "square")
        return
    assert edge.spec == ActSpec(name)
    check(edge)


# Published to three digits; the definition gives 1.3041 and 1.2293.
@pytest.mark.parametrize(("name", "sigma_w"), [("tanh", 1.302), ("elu", 1.227)])
def test_published_values(name: str, sigma_w: float) -> None:
    edge = eoc(name)
    assert edge.sigma_b == 0.2
    assert edge.sigma_w == pytest.approx(sigma_w, abs=3e-3)


@pytest.mark.parametrize("a", [0.0, 0.01, -0.5])
def test_rectifiers(a: float) -> None:
    edge = eoc("leaky_relu", negative_slope=a)
    assert (edge.sigma_w, edge.sigma_b) == (math.sqrt(2 / (1 + a * a)), 0.0)
    check(edge)
    assert eoc("relu").sigma_w == math.sqrt(2)


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_rectifiers_take_no_bias(name: str) -> None:
    with pytest.raises(Unreachable, match="pass sigma_b=0"):
        eoc(name, sigma_b=0.2)


@pytest.mark.parametrize("name", ["tanh", "elu", "softsign", "erf", "asinh"])
def test_without_bias_q_vanishes(name: str) -> None:
    edge = eoc(name, sigma_b=0.0)
    slope = 2 / math.sqrt(math.pi) if name == "erf" else 1.0
    assert (edge.sigma_w, edge.q) == (pytest.approx(1 / slope), 0.0)
    near = eoc(name, sigma_b=1e-4)
    assert near.sigma_w == pytest.approx(edge.sigma_w, rel=0.02)


@pytest.mark.parametrize("bias", [0.0, 0.2, 1.5])
def test_sigmoid_has_the_edge_of_tanh(bias: float) -> None:
    # With x = 2y, W sigmoid(x) + b is 2 (W/4 tanh(y) + (W·1/4 + b/2)): tanh with more bias.
    edge = eoc("sigmoid", sigma_b=bias)
    check(edge)
    assert edge.sigma_w > 10
    sigma_b = math.sqrt(edge.sigma_w**2 / 16 + bias**2 / 4)
    twin = eoc("tanh", sigma_b=sigma_b)
    assert twin.sigma_w == pytest.approx(edge.sigma_w / 4, rel=1e-9)
    assert twin.q == pytest.approx(edge.q / 4, rel=1e-9)


@pytest.mark.parametrize("bias", [0.0, 0.2, 3.0])
def test_softplus_has_none(bias: float) -> None:
    with pytest.raises(Unreachable, match="whatever sigma_b; use DKS or TAT"):
        eoc("softplus", sigma_b=bias)


def test_an_unstable_one_is_refused() -> None:
    with pytest.raises(Unreachable, match=r"pass sigma_b between 0\.769 and"):
        eoc("swish")


@pytest.mark.parametrize("bias", [-0.1, math.nan, math.inf])
def test_bad_sigma_b(bias: float) -> None:
    with pytest.raises(ValueError, match="sigma_b must be finite"):
        eoc("tanh", sigma_b=bias)


@pytest.mark.parametrize("bias", [True, "0.2"])
def test_sigma_b_is_a_number(bias: object) -> None:
    with pytest.raises(TypeError, match="sigma_b must be a number"):
        eoc("tanh", sigma_b=bias)  # type: ignore[arg-type]


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="unknown activation"):
        eoc("nope")
