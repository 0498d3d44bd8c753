"""Network maps: facts about depth, the official ResNets, and what shallow nets cannot reach."""

from __future__ import annotations

import math

import pytest

from fusedshape.theory import chain, resnet
from fusedshape.theory.maps import leaky_c_map


def relu(c: float) -> float:
    return leaky_c_map(0.0, c)


@pytest.mark.parametrize(
    ("depth", "c"), [(10, 0.8715), (49, 0.98744), (100, 0.99642), (200, 0.99902)]
)
def test_relu_forgets_angles(depth: int, c: float) -> None:
    assert chain(depth)(0.0, relu) == pytest.approx(c, abs=0.6 * 10 ** -len(f"{c}"[2:]))


def test_relu_forgets_as_one_over_depth_squared() -> None:
    # 1 − c ~ 9π²/(2L²), to first order in the logarithm of L over L.
    for depth in (1000, 10_000, 100_000):
        ratio = (1 - chain(depth)(0.0, relu)) * 2 * depth**2 / (9 * math.pi**2)
        assert abs(ratio - 1) < 6 * math.log(depth) / depth


@pytest.mark.parametrize(
    ("depth", "layers"), [(18, 17), (34, 33), (50, 49), (101, 100), (152, 151), (200, 199)]
)
def test_vanilla_resnets_are_chains(depth: int, layers: int) -> None:
    for x, r in ((0.0, relu), (1.0, lambda y: 1.01 * y), (0.0, lambda y: 0.01 + y)):
        assert resnet(depth)(x, r) == chain(layers)(x, r)


def test_shortcuts_keep_angles() -> None:
    values = [resnet(50, w)(0.0, relu) for w in (0.0, 0.3, 0.6, 0.9, 0.99)]
    assert values == sorted(values, reverse=True)
    # The largest a weighted graph can reach.
    assert resnet(50, 0.9)(0.0, relu) == pytest.approx(0.8879, abs=5e-5)
    assert resnet(18, 0.8)(0.0, relu) == pytest.approx(0.8280, abs=5e-5)


def test_a_lone_branch_can_be_the_largest() -> None:
    # With r(y) = y/2 the whole net goes through four of them at least, one branch through two.
    assert resnet(18, 0.999)(1.0, lambda y: y / 2) == 0.25


def test_shortcuts_by_hand() -> None:
    # Slope of two kinds of blocks: (w² + (1−w²)s²) without projection, (w²s + (1−w²)s²) with.
    w2, s = 0.36, 1.1
    plain, projected = w2 + (1 - w2) * s**2, w2 * s + (1 - w2) * s**2
    expected = plain**5 * projected**3 * s
    assert resnet(18, 0.6)(1.0, lambda y: s * y) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("depth", [0, -1, -(10**9)])
def test_depth_is_positive(depth: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        chain(depth)


@pytest.mark.parametrize("depth", [True, False, 3.0, 2.5, "3", None, math.nan])
def test_depth_is_an_int(depth: object) -> None:
    with pytest.raises(TypeError, match="must be an int"):
        chain(depth)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [20, 0, True, "50", 50.5])
def test_resnets_are_the_official_ones(depth: int) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        resnet(depth)


@pytest.mark.parametrize("weight", [1.0, -0.1, math.nan, math.inf])
def test_shortcut_weight_is_checked(weight: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        resnet(50, weight)
