"""DKS and TAT: tables, the whole activation table, invariance, extremes, and what is refused."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedshape import ACTIVATIONS, ActSpec, reference
from fusedshape.theory import Unreachable, c_map, chain, dks, eoc, resnet, solve, tat
from fusedshape.theory.maps import leaky_c_map
from fusedshape.theory.network import Scaled, Shifted
from fusedshape.theory.solve import SPREAD, STEEPEST, _spread, _steepest
from tests.support.oracle import MIRRORED, canonical, derivatives, local

TOLERANCE = 1e-9
RECTIFIERS = ("relu", "leaky_relu")
SOLVABLE = [name for name in ACTIVATIONS if name != "square"]
SMOOTH = [name for name in SOLVABLE if name not in RECTIFIERS]
NETS = {
    "resnet50": resnet(50),
    "resnet101_w0.6": resnet(101, 0.6),
    "chain20": chain(20),
    "chain100": chain(100),
}


def unmet(spec: ActSpec, wanted: dict[str, float]) -> dict[str, float]:
    at = local(spec)
    return {k: at[k] - v for k, v in wanted.items() if not abs(at[k] - v) <= TOLERANCE}


@pytest.mark.parametrize(
    ("depth", "weight", "slope"),
    [
        (18, 0.0, 0.1262),
        (34, 0.0, 0.3284),
        (50, 0.0, 0.4259),
        (101, 0.0, 0.5704),
        (152, 0.0, 0.6386),
        (200, 0.0, 0.6789),
        (50, 0.5, 0.3573),
        (101, 0.5, 0.5166),
        (50, 0.8, 0.1541),
        (101, 0.8, 0.3536),
        (152, 0.8, 0.4500),
        (101, 0.9, 0.1807),
        (152, 0.9, 0.2959),
    ],
)
def test_trelu_of_resnets(depth: int, weight: float, slope: float) -> None:
    spec = tat("leaky_relu", subnet_max=resnet(depth, weight))
    assert spec.negative_slope == pytest.approx(slope, abs=6e-5)


@pytest.mark.parametrize(
    ("depth", "slope"),
    [
        (16, 0.1045),
        (24, 0.2385),
        (32, 0.3202),
        (64, 0.4843),
        (128, 0.6125),
        (256, 0.7122),
        (1000, 0.8444),
    ],
)
def test_trelu_of_chains(depth: int, slope: float) -> None:
    spec = tat("relu", depth=depth)
    assert spec.activation == "leaky_relu"
    assert spec.negative_slope == pytest.approx(slope, abs=6e-5)
    c = 0.0
    for _ in range(depth):
        c = c_map(spec, c)
    assert c == pytest.approx(0.9, abs=1e-10)


@pytest.mark.parametrize(
    ("depth", "scale"),
    [(50, 1.301119175166785), (101, 1.2284042441106242), (152, 1.1918827706862754)],
)
def test_trelu_output_scales(depth: int, scale: float) -> None:
    # The reference bisects C_f(0) to 1e-8.
    assert tat("relu", subnet_max=resnet(depth)).output_scale == pytest.approx(scale, abs=1e-7)


def test_very_deep_trelu() -> None:
    spec = tat("leaky_relu", depth=10_000)
    assert (1 - spec.negative_slope) * 100 == pytest.approx(5.32, rel=0.03)


@pytest.mark.parametrize("eta", [0.05, 0.9, 0.99])
def test_a_long_chain_is_the_flow_of_its_layers(eta: float) -> None:
    depth = 120_000
    spec = tat("relu", depth=depth, eta=eta)
    reached = chain(depth)(0.0, lambda c: leaky_c_map(spec.negative_slope, c))
    assert reached == pytest.approx(eta, abs=1e-11)


@pytest.mark.parametrize("depth", [10**7, 10**9, 10**12])
def test_no_chain_takes_long(depth: int) -> None:
    # In a flow, time times speed is what counts: (1 − a)²L tends to a constant.
    start = time.process_time()
    spec = tat("relu", depth=depth)
    assert time.process_time() - start < 1.0
    kappa = (1 - spec.negative_slope) ** 2 / (math.pi * (1 + spec.negative_slope**2))
    shorter = tat("relu", depth=10**6).negative_slope
    limit = (1 - shorter) ** 2 / (math.pi * (1 + shorter**2)) * 10**6
    assert kappa * depth == pytest.approx(limit, rel=1e-5)
    assert spec.origin == f"TAT eta=0.9, depth={depth}"


@pytest.mark.parametrize("depth", [10**12 + 1, 2**70, 2**2000, 10**5000], ids=range(4))
@pytest.mark.parametrize(("method", "name"), [("DKS", "tanh"), ("TAT", "tanh"), ("TAT", "relu")])
def test_depths_beyond_the_limit(method: str, name: str, depth: int) -> None:
    with pytest.raises(ValueError, match=r"depth=.* is beyond 1e"):
        solve(method, name, depth=depth)


def test_chains_say_how_far_they_can_be_followed() -> None:
    with pytest.raises(ValueError, match="depth=100000000 is beyond 10000000"):
        chain(10**8)(0.0, lambda y: y + 1e-9)
    for method, name in (("DKS", "zeta"), ("TAT", "tau")):
        with pytest.raises(ValueError, match=rf"{name}=.* leaves depth=1000000000 less nonlinear"):
            solve(method, "tanh", depth=10**9)
    with pytest.raises(ValueError, match="depth=200000000 is beyond 10000000"):
        tat("relu", depth=2 * 10**8, eta=1 - 1e-14)


@pytest.mark.parametrize("depth", [1, 7, 100, 100_000])
def test_closed_forms_of_chains(depth: int) -> None:
    net = chain(depth)
    scaled, shifted = Scaled(1e-3), Shifted(1e-3)
    assert net(1.5, scaled) == pytest.approx(net(1.5, lambda y: scaled(y)), rel=1e-10)
    assert net(1.5, shifted) == pytest.approx(net(1.5, lambda y: shifted(y)), rel=1e-10)
    assert chain(10**9)(1.0, Scaled(1.0)) == math.inf


@pytest.mark.parametrize(
    ("depth", "slope", "curve"),
    [(50, 1.008309, 0.006122), (101, 1.004063, 0.003000), (152, 1.002689, 0.001987)],
)
def test_local_targets_of_resnets(depth: int, slope: float, curve: float) -> None:
    net = resnet(depth)
    assert local(dks("softplus", subnet_max=net))["C'(1)"] == pytest.approx(slope, abs=6e-7)
    assert local(tat("softplus", subnet_max=net))["C''(1)"] == pytest.approx(curve, abs=6e-7)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", SMOOTH)
def test_tat_solves_the_table(name: str, net: str) -> None:
    spec = tat(name, subnet_max=NETS[net])
    t = 0.3 / NETS[net](0.0, lambda y: 1 + y)
    assert not unmet(spec, {"Q(1)": 1, "Q'(1)": 1, "C'(1)": 1, "C''(1)": t})
    assert _steepest(spec) < STEEPEST
    assert _spread(spec) >= SPREAD


@pytest.mark.parametrize("depth", [4, 49, 2000])
@pytest.mark.parametrize("name", SOLVABLE)
def test_dks_solves_the_table(name: str, depth: int) -> None:
    wanted = {"Q(1)": 1.0, "Q'(1)": 1.0, "C(0)": 0.0, "C'(1)": 1.5 ** (1 / depth)}
    if name == "relu":
        del wanted["Q'(1)"]
    assert not unmet(dks(name, depth=depth), wanted)


@pytest.mark.parametrize("name", SMOOTH)
def test_ten_thousand_layers(name: str) -> None:
    # What counts for a deep net is the target's relative error.
    assert local(tat(name, depth=10_000))["C''(1)"] * 1e4 == pytest.approx(0.3, rel=1e-5)
    assert local(dks(name, depth=10_000))["C'(1)"] ** 1e4 == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize(("name", "twin"), [("sigmoid", "tanh"), ("cos", "sin")])
@pytest.mark.parametrize("method", ["DKS", "TAT"])
def test_affine_images_get_the_same_activation(name: str, twin: str, method: str) -> None:
    one, other = (solve(method, n, depth=49) for n in (name, twin))
    x = np.linspace(-30, 30, 301)
    for ours, theirs in zip(derivatives(one, x), derivatives(other, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max())
    # And so the tests that choose a root cannot tell them apart.
    assert _steepest(one) == pytest.approx(_steepest(other), rel=1e-3)
    assert _spread(one) == pytest.approx(_spread(other), rel=1e-10)


def equivalents(spec: ActSpec) -> list[ActSpec]:
    """Other constants with which φ̂(x) is the same, or φ̂(−x), −φ̂(x) or −φ̂(−x)."""
    beta, delta = spec.input_shift, spec.output_shift
    pairs = [(beta, delta)]
    if spec.activation in ("sin", "cos"):
        pairs = [(beta + k * math.pi, delta * (-1) ** k) for k in range(-40, 41)]
    if spec.activation in MIRRORED:
        pairs += [(-b, -d) for b, d in pairs]
    if spec.activation == "cos":
        pairs += [(-b, d) for b, d in pairs]
    if spec.activation == "sigmoid":
        pairs += [(-b, -1 - d) for b, d in pairs]
    return [replace(spec, input_shift=b, output_shift=d) for b, d in pairs]


def float32_error(spec: ActSpec) -> float:
    """Relative error of φ̂ on N(0, 1), against float64."""
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    truth = reference.shaped_act(x.double(), spec)
    return float((reference.shaped_act(x, spec) - truth).norm() / truth.norm())


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(["DKS", "TAT"]),
    name=st.sampled_from(["sin", "cos", "sigmoid", "tanh", "erf", "asinh"]),
    depth=st.integers(3, 400),
)
def test_the_best_conditioned_constants(method: str, name: str, depth: int) -> None:
    spec = solve(method, name, depth=depth)
    x = np.linspace(-4, 4, 33)
    ours = [sign * derivatives(spec, at)[0] for sign in (1, -1) for at in (x, -x)]
    others = equivalents(spec)
    for other in others:
        theirs = derivatives(other, x)[0]
        assert min(np.abs(theirs - our).max() for our in ours) < 1e-11 * spec.output_scale
    # Where two are equally good, rounding tells them apart by a few percent.
    assert float32_error(spec) <= 1.15 * min(map(float32_error, others))
    assert spec.output_scale > 0


@pytest.mark.parametrize("method", ["DKS", "TAT"])
def test_same_question_same_answer(method: str) -> None:
    state = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # type: ignore[union-attr]
    first = solve(method, "softsign", depth=100)
    assert solve(method, "softsign", depth=100) == first
    assert (np.random.get_state()[1] == state[0]).all()
    assert torch.equal(torch.random.get_rng_state(), state[1])


def test_depth_and_its_chain_are_one() -> None:
    assert solve("tat", "gelu", depth=30) == solve("TAT", "gelu", subnet_max=chain(30))


def test_origin_says_how() -> None:
    assert tat("leaky_relu", depth=49).origin == "TAT eta=0.9, depth=49"
    assert tat("tanh", depth=49, tau=0.2).origin == "TAT tau=0.2, depth=49"
    net = resnet(50, 0.5)
    assert dks("tanh", subnet_max=net).origin == "DKS zeta=1.5, subnet_max=resnet(50, 0.5)"


def test_relu_turns() -> None:
    assert dks("relu", depth=2).input_shift == 1
    assert dks("relu", depth=1).input_shift == -1
    assert local(dks("relu", depth=1))["C'(1)"] == pytest.approx(1.5, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["tanh", "gelu", "elu"])
def test_q_slope_is_a_target(name: str) -> None:
    at = local(dks(name, depth=49, zeta=5.0, q_slope=0.97))
    assert at["Q'(1)"] == pytest.approx(0.97, abs=TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["tanh", "softplus", "gelu", "leaky_relu", "asinh", "erf"]),
    depth=st.integers(4, 400),
    zeta=st.floats(1.05, 2.0),
    tau=st.floats(0.05, 1.0),
)
def test_any_target_is_met_or_refused(name: str, depth: int, zeta: float, tau: float) -> None:
    wanted = {"Q(1)": 1, "Q'(1)": 1, "C(0)": 0, "C'(1)": zeta ** (1 / depth)}
    assert not unmet(dks(name, depth=depth, zeta=zeta), wanted)
    if name != "leaky_relu":
        wanted = {"Q(1)": 1, "Q'(1)": 1, "C'(1)": 1, "C''(1)": tau / depth}
        assert not unmet(tat(name, depth=depth, tau=tau), wanted)


@settings(max_examples=100, deadline=None)
@given(depth=st.integers(1, 60), eta=st.floats(0.001, 0.999))
def test_any_eta_is_met_or_refused(depth: int, eta: float) -> None:
    most = chain(depth)(0.0, lambda c: c_map(ActSpec("relu"), c))
    if eta > most:
        with pytest.raises(Unreachable, match=re.escape(f"C_f(0) = {most:.6g}")):
            tat("relu", depth=depth, eta=eta)
        clamped = tat("relu", depth=depth, eta=eta, clamp=True)
        assert clamped.negative_slope == 0
        assert "clamped" in clamped.origin
        return
    spec = tat("relu", depth=depth, eta=eta)
    assert 0 <= spec.negative_slope <= 1
    assert chain(depth)(0.0, lambda c: c_map(spec, c)) == pytest.approx(eta, abs=1e-11)


# The least upper bound of C′(1) under DKS, which α → ∞ approaches: there softplus and elu turn into
# relu, and bentid into leaky_relu of slope 1/3.
EXTREMES = [("softplus", 1, 1.466942), ("elu", 1, 1.466942), ("bentid", 2, 1.145904**2)]


@pytest.mark.parametrize(("name", "depth", "zeta"), EXTREMES)
def test_extremes(name: str, depth: int, zeta: float) -> None:
    with pytest.raises(Unreachable, match="clamp=True") as caught:
        dks(name, depth=depth)
    limit = float(re.search(r"pass zeta <= ([\d.]+)", str(caught.value))[1])  # type: ignore[index]
    assert zeta - 0.02 < limit < zeta
    assert dks(name, depth=depth, zeta=limit).origin == f"DKS zeta={limit:g}, depth={depth}"
    clamped = dks(name, depth=depth, clamp=True)
    assert clamped.origin.endswith(f"clamped from 1.5, depth={depth}")
    wanted = {"Q(1)": 1.0, "Q'(1)": 1.0, "C(0)": 0.0}
    assert not unmet(clamped, wanted)
    assert limit <= local(clamped)["C'(1)"] ** depth < limit + 1e-3
    assert abs(clamped.input_scale) == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize(
    ("net", "reachable"),
    [(resnet(50, 0.9), 0.8879), (resnet(18, 0.8), 0.8280), (chain(12), 0.8971)],
)
def test_shallow_nets_say_what_they_reach(net: Any, reachable: float) -> None:
    with pytest.raises(Unreachable, match=r"pass eta <= ([\d.]+), a deeper") as caught:
        tat("leaky_relu", subnet_max=net)
    limit = float(re.search(r"<= ([\d.]+)", str(caught.value))[1])  # type: ignore[index]
    assert limit == pytest.approx(reachable, abs=1e-4)
    assert tat("leaky_relu", subnet_max=net, eta=limit).negative_slope < 0.01
    clamped = tat("leaky_relu", subnet_max=net, clamp=True)
    assert (clamped.negative_slope, clamped.output_scale) == (0.0, math.sqrt(2))
    assert tat("leaky_relu", depth=13).negative_slope > 0


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 5), st.floats(-4, 4), st.floats(-4, 4))
def test_square_cannot_be_shaped(alpha: float, beta: float, delta: float) -> None:
    # The identity that both proofs rest on: Q′(1) − C′(1) = E[φ̂φ̂″], for any constants.
    plain = local(ActSpec("square", alpha, beta, delta))
    spec = ActSpec("square", alpha, beta, delta, plain["Q(1)"] ** -0.5)
    at = local(spec)
    constant = spec.output_scale * 2 * alpha**2
    assert at["Q'(1)"] - at["C'(1)"] == pytest.approx(constant * at["E"], abs=1e-9)
    # C(0) = 0, or Q′(1) = C′(1), means E[φ̂] = 0; then C′(1) = 1 + C″(1)/2.
    centred = local(ActSpec("square", alpha, beta, -(alpha**2) - beta**2))
    assert centred["C'(1)"] == pytest.approx(1 + 0.5 * centred["C''(1)"], rel=1e-9)


@pytest.mark.parametrize("clamp", [False, True])
def test_square_is_refused(clamp: bool) -> None:
    for method in ("DKS", "TAT"):
        with pytest.raises(Unreachable, match="square"):
            solve(method, "square", depth=20, clamp=clamp)


BAD = [
    ({"depth": 0}, ValueError, "depth must be at least 1"),
    ({"depth": -3}, ValueError, "depth must be at least 1"),
    ({"depth": True}, TypeError, "depth must be an int"),
    ({"depth": 12.0}, TypeError, "depth must be an int"),
    ({"depth": math.nan}, TypeError, "depth must be an int"),
    ({}, ValueError, "exactly one of depth="),
    ({"depth": 3, "subnet_max": chain(3)}, ValueError, "exactly one of depth="),
    ({"subnet_max": 17}, TypeError, "subnet_max must be called"),
    ({"subnet_max": lambda x, r: math.nan}, ValueError, "subnet_max returned nan"),
    ({"subnet_max": lambda x, r: None}, TypeError, "subnet_max must return a number"),
    ({"subnet_max": lambda x, r: "1.2"}, TypeError, "subnet_max must return a number"),
    ({"subnet_max": lambda x, r: x}, Unreachable, "does it apply r"),
    ({"subnet_max": lambda x, r: 7.0}, ValueError, "with linear layers already"),
]


@pytest.mark.parametrize(("how", "error", "message"), BAD)
@pytest.mark.parametrize(
    ("method", "name"), [("DKS", "tanh"), ("TAT", "tanh"), ("TAT", "leaky_relu")]
)
def test_bad_networks(
    method: str, name: str, how: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        solve(method, name, **how)


NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


@given(NOT_FINITE | st.floats(max_value=1.0))
def test_bad_zeta(zeta: float) -> None:
    with pytest.raises(ValueError, match="zeta must be finite and above 1"):
        dks("tanh", depth=10, zeta=zeta)


@given(NOT_FINITE | st.floats(max_value=0.0) | st.floats(min_value=1.0))
def test_bad_eta(eta: float) -> None:
    with pytest.raises(ValueError, match="eta must be"):
        tat("relu", depth=10, eta=eta)


def test_bad_sigma_b() -> None:
    with pytest.raises(ValueError, match="sigma_b must be finite and at least 0, got -1"):
        eoc("tanh", sigma_b=-1)


@given(NOT_FINITE | st.floats(max_value=0.0))
def test_bad_tau(tau: float) -> None:
    with pytest.raises(ValueError, match="tau must be finite and above 0"):
        tat("tanh", depth=10, tau=tau)


@given(NOT_FINITE | st.floats(max_value=0.0) | st.floats(min_value=1.0, exclude_min=True))
def test_bad_q_slope(q_slope: float) -> None:
    with pytest.raises(ValueError, match="q_slope must be"):
        dks("tanh", depth=10, q_slope=q_slope)


def test_targets_too_close_to_linear_are_refused() -> None:
    with pytest.raises(ValueError, match="pass a larger zeta"):
        dks("tanh", depth=100, zeta=1 + 1e-9)
    with pytest.raises(ValueError, match="pass a larger tau"):
        tat("tanh", depth=100, tau=1e-9)


@pytest.mark.parametrize("name", ["tanh", "gelu", "elu", "bentid"])
def test_nearly_linear_targets(name: str) -> None:
    assert local(tat(name, depth=100, tau=4e-4))["C''(1)"] == pytest.approx(4e-6, rel=1e-5)


@pytest.mark.parametrize("bad", [True, "1.5", None, b"2", [1.5]])
def test_targets_are_numbers(bad: Any) -> None:
    for name in ("zeta", "q_slope"):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            dks("tanh", depth=10, **{name: bad})
    for name in ("eta", "tau"):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            tat("tanh", depth=10, **{name: bad})


@given(st.text(max_size=8).filter(lambda s: s.upper() not in ("DKS", "TAT")) | st.integers())
def test_unknown_methods(method: Any) -> None:
    with pytest.raises(ValueError, match="unknown method"):
        solve(method, "tanh", depth=10)


@given(st.text(max_size=8).filter(lambda s: s not in ACTIVATIONS) | st.integers())
def test_unknown_activations(name: Any) -> None:
    with pytest.raises(ValueError, match="unknown activation"):
        solve("DKS", name, depth=10)


def test_symmetry_of_canonical() -> None:
    # The comparison with the reference is by φ̂ up to signs: check that it identifies just those.
    spec = ActSpec("sigmoid", 0.5, 1.2, -0.7, 3.0)
    mirrored = ActSpec("sigmoid", -0.5, -1.2, -0.3, 3.0)
    x = np.linspace(-4, 4, 33)
    np.testing.assert_allclose(derivatives(spec, x)[0], -derivatives(mirrored, x)[0], atol=1e-14)
    np.testing.assert_allclose(canonical(spec), canonical(mirrored))
