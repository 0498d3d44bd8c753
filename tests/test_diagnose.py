"""diagnose: its maps against closed forms, healthy nets, broken nets, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import json
import math
import random
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaped
from torch import Tensor, nn

import fusedshape
from fusedshape import (
    ACTIVATIONS,
    ActSpec,
    NormalizedSum,
    PerLocationNorm,
    convert,
    linear_act,
    native,
    theory,
)
from fusedshape.cli import main
from fusedshape.diagnose import CAUSES, Diagnosis, diagnose
from fusedshape.diagnose.layers import Affine, Phi, convolution, matrix
from fusedshape.diagnose.measure import sample
from fusedshape.diagnose.tape import Tape
from fusedshape.init import delta_orthogonal_, gaussian_, init_module_, suo_, suo_full_
from fusedshape.kinds import kind_of
from fusedshape.models.vanilla import vanilla_convnet
from fusedshape.nn import ShapedLinear
from fusedshape.ops.engine import Engine
from fusedshape.shortcuts import reweight_shortcuts

NATIVE = pytest.mark.skipif(not native.available(), reason=f"native: {native.why_not()}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp(depth: int, width: int = 64, inputs: int = 32) -> nn.Sequential:
    layers = [
        m for i in range(depth) for m in (nn.Linear(width if i else inputs, width), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def converted(net: nn.Module, **kwargs: Any) -> nn.Module:
    convert(net, **kwargs)
    return net


def initialised(net: nn.Module, **kwargs: Any) -> nn.Module:
    for m in net.modules():
        if kind_of(m):
            init_module_(m, **kwargs)
    return net


def assert_finds(found: Diagnosis, cause: str, path: str) -> None:
    """The first finding has this cause, and begins at this layer."""
    assert cause in CAUSES
    assert not found.agrees
    assert (found.cause, found.path) == (cause, path), str(found)
    assert f"1. {cause} at {path!r}" in str(found)


# The maps.


def phi_of(spec: ActSpec) -> Phi:
    phi = Phi.of(("spec", spec))
    assert phi is not None
    return phi


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_maps_at_q_1_are_those_of_the_theory(name: str) -> None:
    spec = shaped(name)
    phi = phi_of(spec)
    assert phi.q(1.0) == pytest.approx(theory.q_map(spec, 1.0), rel=1e-3)
    assert phi.slope(1.0) == pytest.approx(theory.c_slope(spec), rel=2e-3)
    for c in (-0.9, 0.0, 0.3, 0.95, 1.0):
        assert phi.c(c) == pytest.approx(theory.c_map(spec, c), abs=2e-3)
    of_q, of_c = phi.growth(1.0, 0.3)
    assert of_q == pytest.approx(theory.q_slope(spec) / phi.q(1.0), rel=1e-2, abs=1e-3)
    assert of_c == pytest.approx(theory.c_slope(spec, 0.3), rel=1e-2)


@pytest.mark.parametrize(("q", "other"), [(1.0, 1.0), (0.03, 2.0), (7.3, 40.0)])
def test_maps_of_erf_at_any_q(q: float, other: float) -> None:
    # The arcsine kernel, E[erf(x) erf(y)] = 2/π · asin(2k / √((1 + 2q)(1 + 2q′))).
    def kernel(a: float, b: float, k: float) -> float:
        return 2 / math.pi * math.asin(2 * k / math.sqrt((1 + 2 * a) * (1 + 2 * b)))

    phi = phi_of(ActSpec("erf"))
    for c in (-0.8, 0.1, 0.9, 0.999):
        k = c * math.sqrt(q * other)
        given = torch.tensor([q, other, k]).double().reshape(3, 1, 1)
        got = phi.map(given).flatten().tolist()
        want = [kernel(q, q, q), kernel(other, other, other), kernel(q, other, k)]
        assert got == pytest.approx(want, rel=3e-3)


@pytest.mark.parametrize("q", [1e-4, 0.3, 5.0, 1e4])
def test_maps_of_relu_at_any_q(q: float) -> None:
    phi = phi_of(ActSpec("leaky_relu", negative_slope=0.2, output_scale=1.7))
    assert phi.q(q) == pytest.approx(theory.q_map(ActSpec("leaky_relu", 1, 0, 0, 1.7, 0.2), q))
    assert phi.slope(q) == pytest.approx(1.0)
    assert phi.growth(q, 0.4) == pytest.approx((1.0, theory.c_slope(phi.spec, 0.4)))
    assert phi.c(0.4, q) == pytest.approx(theory.c_map(ActSpec("leaky_relu", 1, 0, 0, 1, 0.2), 0.4))


def test_functions_written_by_hand_have_maps_too() -> None:
    by_hand = Phi.of(
        (
            "f",
            torch.ops.aten.mul.Tensor,
            (("x",), ("f", torch.ops.aten.sigmoid.default, (("x",),), ())),
            (),
        )
    )
    assert by_hand is not None
    swish = phi_of(ActSpec("swish"))
    assert by_hand.q(0.7) == pytest.approx(swish.q(0.7), rel=1e-9)
    assert by_hand.name == "sigmoid"
    linear = Phi.of(("scale", ("x",), 3.0))
    assert linear is not None
    assert linear.is_linear
    assert not swish.is_linear


# What finite width explains.


def test_noise_of_relu_is_five_over_width() -> None:
    # Var[ln q] of one layer of He's ReLU: 2/n from Gaussian weights, 3/n from the activation.
    relu = phi_of(ActSpec("relu"))
    n = 400
    weights = gaussian_(torch.empty(n, n), gain=2**0.5)
    assert relu.noise(1.0, 0.5)[0] == pytest.approx(3.0, rel=0.05)
    assert matrix(weights.T, None).chance == pytest.approx(2 / n, rel=0.1)


def test_noise_of_one_layer_simulated() -> None:
    spec = theory.solve("TAT", "leaky_relu", depth=30)
    phi, n, c = phi_of(spec), 64, 0.4
    x = torch.randn(2, n, dtype=torch.float64)
    x[0] /= x[0].square().mean().sqrt()
    x[1] -= x[0] * (x[0] @ x[1]) / n
    x[1] /= x[1].square().mean().sqrt()
    x[1] = c * x[0] + math.sqrt(1 - c * c) * x[1]
    ln_q, cosines = [], []
    for _ in range(600):
        y = phi(x @ suo_(torch.empty(n, n, dtype=torch.float64)).T)
        q, other, k = (y[0] @ y[0]).item(), (y[1] @ y[1]).item(), (y[0] @ y[1]).item()
        ln_q.append(math.log(q / n))
        cosines.append(k / math.sqrt(q * other))
    noise_q, noise_c = phi.noise(1.0, c)
    # The standard error of a variance from 600 samples is 6 %.
    assert n * np.var(ln_q) == pytest.approx(noise_q, rel=0.3)
    assert n * np.var(cosines) == pytest.approx(noise_c, rel=0.3)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (160, 256), (256, 160)])
@pytest.mark.parametrize("fill", [suo_, gaussian_, delta_orthogonal_])
def test_chance_of_weights_simulated(fill: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    w = fill(torch.empty(shape, dtype=torch.float64))
    affine = matrix(w.T, None)
    x = torch.randn(4000, shape[1], dtype=torch.float64)
    x /= x.square().mean(1, keepdim=True).sqrt()
    q = (x @ w.T).square().mean(1)
    assert q.mean().item() == pytest.approx(affine.gain, rel=0.02)
    assert q.log().var().item() == pytest.approx(affine.chance, rel=0.25, abs=0.003)


def test_convolution_mixes_locations_as_its_taps_do() -> None:
    n = 512
    weight = suo_full_(torch.empty(n, 8, 3, 3))
    affine = convolution(weight, None, [2, 1], [1, 0], [1, 2], False, [0, 0], 1)
    x = torch.randn(2, 8, 7, 9) * torch.rand(2, 1, 7, 9)
    kernel = sample(x, 1).kernel.double()
    got = affine.over((7, 9))(kernel) * affine.gain
    want = sample(F.conv2d(x, weight, None, [2, 1], [1, 0], [1, 2]), 1).kernel
    assert got.shape == want.shape
    assert affine.gain == pytest.approx(1.0)
    # Products of different taps average out over channels, as 1/√n.
    assert (got - want).abs().max() < 8 / math.sqrt(n)
    delta = convolution(
        suo_(torch.empty(8, 8, 3, 3)), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    )
    assert torch.allclose(delta.over((7, 9))(kernel), kernel)


def test_transposed_and_grouped_weights_keep_q() -> None:
    for layer in (
        nn.ConvTranspose2d(8, 32, 4, stride=2, padding=1),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.Conv2d(16, 16, 3, groups=16),
    ):
        init_module_(layer, "suo" if layer.kernel_size == (3, 3) else "suo_full")
        tape = Tape(layer, 4, sample)
        with torch.no_grad():
            tape.run(torch.randn(4, layer.in_channels, 6, 6))
        (affine,) = (s.affine for s in tape.steps if s.affine is not None)
        assert affine.gain == pytest.approx(1.0, rel=1e-5)


# Healthy nets.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("depth", "kwargs"),
    [
        (50, {"method": "TAT", "activation": "leaky_relu"}),
        (100, {"method": "TAT", "activation": "leaky_relu"}),
        (100, {"method": "TAT", "activation": "tanh"}),
        (50, {"method": "DKS", "activation": "softplus"}),
        (100, {"method": "DKS", "activation": "leaky_relu"}),
        (50, {"method": "TAT", "activation": "gelu", "init": "gaussian"}),
    ],
)
def test_healthy_mlps_agree(depth: int, kwargs: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    found = diagnose(converted(mlp(depth), **kwargs), torch.randn(32, 32))
    assert found.agrees, found.verdict
    assert found.verdict.endswith("agree")
    assert sum(row.op == "nonlinear" for row in found.layers) == depth
    assert not found.notes


@pytest.mark.parametrize("seed", range(2))
def test_healthy_convnet_on_images_with_empty_pixels(seed: int) -> None:
    torch.manual_seed(seed)
    net = converted(vanilla_convnet(50, 64))
    net = nn.Sequential(PerLocationNorm(), net)
    images = torch.randn(16, 1, 8, 8) * (torch.rand(16, 1, 8, 8) < 0.4)
    found = diagnose(net, images)
    assert found.agrees, found.verdict
    (norm,) = (row for row in found.layers if row.op == "norm")
    assert norm.path == "0"
    assert norm.q_measured == pytest.approx(1)


def test_healthy_edge_of_chaos() -> None:
    found = diagnose(converted(mlp(20), method="EOC", activation="tanh"), torch.randn(32, 32))
    assert found.agrees, found.verdict
    assert found.sigma_w == pytest.approx(theory.eoc("tanh").sigma_w, rel=0.05)
    assert "own scale" in found.notes[0]


def test_every_number_follows_from_theory_or_data() -> None:
    spec = theory.solve("TAT", "leaky_relu", depth=40)
    x = torch.randn(64, 256)
    found = diagnose(converted(mlp(40, 256, 256)), x)
    first, *rest = found.layers
    assert (first.path, first.op, first.channels) == ("input", "input", 256)
    assert first.q_measured == pytest.approx(x.square().mean().item(), rel=1e-5)
    pairs = F.cosine_similarity(x[:32], x[32:], dim=1)
    assert first.c_measured == pytest.approx(pairs.mean().item(), abs=1e-5)
    assert first.q_quantiles[2] == pytest.approx(x.square().mean(1).median().item(), rel=0.02)
    c, q = pairs.double(), x.square().mean().item()
    for row in rest[:-1]:
        if row.op == "nonlinear":
            c = torch.tensor([theory.c_map(spec, v) for v in c.tolist()])
        assert row.q == pytest.approx(q, rel=1e-5)
        assert row.c == pytest.approx(c.mean().item(), abs=1e-5)
        assert row.sensitivity == pytest.approx(1.0, rel=1e-3)
    assert rest[-2].sensitivity_measured == pytest.approx(1.0, abs=0.9)
    assert rest[-2].c_measured == pytest.approx(rest[-2].c, abs=5 * rest[-2].c_spread)


def test_sensitivity_of_a_net_that_amplifies() -> None:
    spec = theory.solve("DKS", "tanh", depth=2, zeta=4.0)
    net = nn.Sequential(
        *(m for _ in range(4) for m in (nn.Linear(512, 512), fusedshape.ShapedActivation(spec)))
    )
    found = diagnose(initialised(net), torch.randn(32, 512))
    last = found.layers[-1]
    assert last.slope == pytest.approx(2.0, rel=0.01)
    assert last.sensitivity == pytest.approx(16.0, rel=0.05)
    assert last.sensitivity_measured == pytest.approx(last.sensitivity, rel=0.4)


# Broken nets.


def test_finds_weights_drawn_for_the_other_layout() -> None:
    # What the reference's sampler does: [out, in] is read as [in, out].
    net = nn.Sequential(
        *(
            m
            for i, o in ((64, 64), (64, 256), *[(256, 256)] * 20, (256, 64))
            for m in (nn.Linear(i, o), nn.ReLU())
        )
    )
    convert(net)
    for m in net.modules():
        if kind_of(m):
            m.weight.data = suo_(torch.empty_like(m.weight.T)).T.contiguous()
    found = diagnose(net, torch.randn(32, 64))
    assert_finds(found, "init layout", "2")
    assert found.findings[0].paths == ("2", "44")
    assert "64/256" in found.findings[0].text


@pytest.mark.parametrize("inputs", [20, 28, 40])
def test_names_the_nearest_of_two_causes(inputs: int) -> None:
    # Of so few weights, 1/3 and inputs/64 are both within what chance explains.
    layer = nn.Linear(inputs, 64)
    gaussian_(layer.weight, gain=(1 / 3) ** 0.5)
    nn.init.zeros_(layer.bias)
    net = nn.Sequential(layer, converted(mlp(20, 64, 64), init="suo"))
    found = diagnose(net, torch.randn(64, inputs))
    gain = matrix(layer.weight.T, None).gain
    swapped = abs(math.log(gain * 64 / inputs)) < abs(math.log(gain * 3))
    assert found.cause == ("init layout" if swapped else "weight scale")


def test_finds_the_other_layout_in_a_stem() -> None:
    net = converted(vanilla_convnet(30, 64, in_channels=3))
    stem = net[0].weight
    stem.data = suo_(torch.empty(3, 64, 3, 3)).transpose(0, 1).contiguous()
    assert_finds(diagnose(net, torch.randn(8, 3, 8, 8)), "init layout", "0")


def test_finds_missing_pln() -> None:
    net = converted(vanilla_convnet(30, 64, in_channels=1))
    images = torch.randn(16, 1, 8, 8) * (torch.rand(16, 1, 8, 8) < 0.4)
    found = diagnose(net, images)
    assert_finds(found, "no PLN", "input")
    assert "60" in found.findings[0].text or "% of its locations" in found.findings[0].text
    assert found.layers[0].q_quantiles[0] == 0


class Block(nn.Module):
    """x + f(x), pre-activation, with functional activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


def test_finds_a_sum_that_is_not_normalised() -> None:
    def residual() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64), *(Block(64) for _ in range(10)))

    found = diagnose(converted(residual(), depth=20), torch.randn(32, 32))
    assert_finds(found, "un-normalised sum", "1:add")
    assert len(found.findings[0].paths) == 10
    assert found.layers[-1].q == pytest.approx(2**10, rel=0.2)
    net = residual()
    reweight_shortcuts(net, 0.8)
    found = diagnose(converted(net, depth=20), torch.randn(32, 32))
    assert found.agrees, found.verdict


class Blur(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filter", (taps[:, None] * taps).expand(1, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.filter.expand(x.shape[1], 1, 3, 3)
        return F.conv2d(x, weight, padding=1, stride=2, groups=x.shape[1])


def test_fixed_averages_are_pools_and_no_weights() -> None:
    layers = [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), Blur(), nn.Conv2d(64, 64, 1), nn.ReLU()]
    found = diagnose(converted(nn.Sequential(*layers), depth=20), torch.randn(16, 64, 8, 8))
    assert found.agrees, found.verdict
    assert [row.op for row in found.layers if row.path == "2"] == ["pool"]


class ActivatesTheSum(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


@pytest.mark.parametrize("weight", [0.6, 0.9])
def test_finds_activated_sums_by_what_they_do_together(weight: float) -> None:
    # No single step is further off than its width explains.
    net = nn.Sequential(nn.Linear(128, 128), *(ActivatesTheSum(128) for _ in range(6)))
    reweight_shortcuts(net, weight)
    found = diagnose(converted(net, depth=20), torch.randn(64, 128))
    assert_finds(found, "activated sum", "2.shaped_0")
    assert "5 such step(s) changed q by a factor of" in found.findings[0].text
    assert len(found.findings) == 1


class Joined(nn.Module):
    """Two layers, and a shortcut that joins before the second activation."""

    def __init__(self, width: int, spec: ActSpec, engine: Engine) -> None:
        super().__init__()
        self.first = ShapedLinear(width, width, spec=spec)
        self.second = ShapedLinear(width, width, spec=spec)
        self.engine: Engine = engine

    def forward(self, x: Tensor) -> Tensor:
        return linear_act(
            self.first(x),
            *(self.second.weight, self.second.bias, self.second.spec),
            engine=self.engine,
            residual=x,
            residual_weight=0.6,
        )


@pytest.mark.parametrize("engine", ["aten", pytest.param("native", marks=NATIVE)])
def test_residuals_of_a_layer_are_normalised_sums(engine: Engine) -> None:
    spec = theory.solve("TAT", "tanh", depth=8)
    blocks = [Joined(128, spec, engine) for _ in range(4)]
    nn.init.constant_(blocks[1].second.bias, 0.5)
    net, x = nn.Sequential(ShapedLinear(64, 128, spec=spec), *blocks), torch.randn(64, 64)
    found = diagnose(net, x)
    assert {f.cause for f in found.findings} == {"biases"}
    assert found.findings[0].paths == ("2:bias",)
    with torch.no_grad():
        inputs = [net[:1](x), net[:2](x)]
        sums = [
            0.8 * F.linear(block.first(r), block.second.weight, block.second.bias) + 0.6 * r
            for r, block in zip(inputs, blocks[:2], strict=True)
        ]
    rows = {layer.path: layer for layer in found.layers}
    for i, total in enumerate(sums, 1):
        row = rows[f"{i}:add"]
        assert row.q_measured == pytest.approx(total.square().mean().item(), rel=1e-5)
        assert row.q_near == pytest.approx(row.q_measured, rel=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_finds_batchnorm_left_in(training: bool) -> None:
    spec = theory.solve("TAT", "leaky_relu", depth=20)
    layers = [
        m for i in range(20) for m in (nn.Conv2d(64 if i else 8, 64, 3, padding=1), nn.ReLU())
    ]
    net = initialised(converted(nn.Sequential(*layers), spec=spec))
    net.insert(6, nn.BatchNorm2d(64))
    before = copy.deepcopy(net.state_dict())
    found = diagnose(net.train(training), torch.randn(16, 8, 8, 8))
    assert_finds(found, "BatchNorm", "6")
    assert found.findings[0].paths == ("6",)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_finds_a_plain_relu_in_a_deep_net() -> None:
    found = diagnose(initialised(mlp(60, 256), gain=2**0.5), torch.randn(32, 32))
    # c = 0 passes 0.97 after 29 layers: ReLU's C map, 29 times.
    assert_finds(found, "plain activation", "57")
    c, layers = 0.0, 0
    while c <= 0.97:
        c, layers = theory.c_map(ActSpec("relu"), c), layers + 1
    assert f"{2 * layers - 1}" == "57"


def test_finds_one_activation_that_was_not_converted() -> None:
    net = converted(mlp(40), filter_fn=lambda name, module: name != "21")
    assert_finds(diagnose(net, torch.randn(32, 32)), "plain activation", "21")


def test_finds_a_net_too_narrow_for_its_depth() -> None:
    found = diagnose(converted(mlp(100, 8)), torch.randn(64, 32))
    cause, path = found.cause, found.path
    assert cause == "width"
    row = next(r for r in found.layers if r.path == path and r.op == "nonlinear")
    assert row.q_spread > math.log(10)
    before = found.layers[found.layers.index(row) - 2]
    assert before.q_spread <= math.log(10)


def test_finds_saturated_activations() -> None:
    net = nn.Sequential(*(m for _ in range(20) for m in (nn.Linear(64, 64), nn.Tanh())))
    found = diagnose(initialised(net, gain=10.0), torch.randn(32, 64))
    assert_finds(found, "saturated", "1")


@pytest.mark.parametrize(
    ("change", "cause", "words"),
    [
        (lambda m: m.weight.mul_(3), "weight scale", "gain 3"),
        (lambda m: m.weight.mul_(2**0.5), "weight scale", "He's"),
        (lambda m: nn.Linear.reset_parameters(m), "weight scale", "default"),
        (lambda m: m.weight.zero_(), "dead", "zero"),
        (lambda m: m.bias.normal_(), "biases", "mean square"),
    ],
)
def test_finds_one_bad_layer(change: Callable[[Any], object], cause: str, words: str) -> None:
    net = converted(mlp(50))
    with torch.no_grad():
        change(net[20])
    found = diagnose(net, torch.randn(32, 32))
    assert_finds(found, cause, "20")
    assert words in found.findings[0].text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.rand(32, 32) * 255, "standardise"),
        (1 + 0.1 * torch.rand(32, 32), "subtract the mean"),
    ],
)
def test_finds_bad_data(data: Tensor, words: str) -> None:
    net = converted(mlp(50), method="DKS", activation="tanh")
    found = diagnose(net, data)
    assert_finds(found, "input data", "input")
    assert words in found.findings[0].text


@pytest.mark.parametrize("activation", ["tanh", "softplus", "leaky_relu"])
@pytest.mark.parametrize("size", [1e-15, 1e12])
def test_data_of_absurd_size(activation: str, size: float) -> None:
    net = converted(mlp(12), method="DKS", activation=activation)
    assert_finds(diagnose(net, size * torch.randn(32, 32)), "input data", "input")


def test_finds_constants_for_another_depth() -> None:
    found = diagnose(converted(mlp(100), depth=20), torch.randn(32, 32))
    assert found.cause == "wrong depth"


def test_finds_trained_weights_that_fit_the_data() -> None:
    net = converted(mlp(20, 256, 256))
    x = torch.randn(128, 256)
    with torch.no_grad():
        # The right scale, and half of all directions twice as strong: those that the inputs take.
        basis = torch.linalg.svd(net[:20](x)).Vh
        strength = torch.where(torch.arange(256) < 128, 1.9, 0.1).sqrt()
        net[20].weight.copy_(suo_(torch.empty(256, 256)) @ (strength[:, None] * basis))
    assert_finds(diagnose(net, x), "weights not random", "20")


def test_finds_what_is_not_finite() -> None:
    net = converted(mlp(10), depth=20)
    with torch.no_grad():
        net[6].weight[3, 3] = math.inf
    assert_finds(diagnose(net, torch.randn(32, 32)), "non-finite", "6")


@pytest.mark.parametrize(
    "add",
    [
        NormalizedSum.shortcut(0.6),
        lambda a, b: 0.6 * a + 0.8 * b,
        lambda a, b: a.mul(0.6).add(b, alpha=0.8),
        lambda a, b: 0.8 * b + a * 0.6,
        lambda a, b: b * 0.8 - a * -0.6,
    ],
)
def test_a_sum_may_take_an_activation_that_nobody_else_takes(add: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.add = add

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.add(F.relu(self.a(x)), self.b(x)))

    net, x = converted(Net(), spec=theory.solve("TAT", "tanh", depth=20)), torch.randn(64, 64)
    found = diagnose(net, x)
    assert found.agrees, found.verdict
    rows = {layer.op: layer for layer in found.layers}
    assert isinstance(net, Net)
    with torch.no_grad():
        activated = net.a(x)
        total = add(activated, net.b(x))
    assert rows["nonlinear"].q_measured == pytest.approx(activated.square().mean().item(), rel=1e-5)
    assert rows["sum"].q_measured == pytest.approx(total.square().mean().item(), rel=1e-5)
    assert rows["sum"].q == pytest.approx(rows["sum"].q_measured, rel=0.15)


def test_an_activation_written_by_hand_may_be_added_to() -> None:
    spec = theory.solve("TAT", "tanh", depth=20)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            u = torch.tanh(spec.input_scale * self.a(x) + spec.input_shift)
            return self.b(spec.output_scale * (u + spec.output_shift) + 0.0 * x)

    found = diagnose(initialised(Net()), torch.randn(64, 64))
    assert found.agrees, found.verdict


def test_finds_branches_that_are_not_independent() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.add = nn.Linear(256, 256), NormalizedSum((0.6, 0.8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return self.add(x, x.clone().roll(0, 1))

    found = diagnose(initialised(Twice()), torch.randn(32, 256))
    assert_finds(found, "correlated branches", "add")


# Any forward.


def test_functional_activations_in_place_views_and_repeated_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.act = nn.ReLU(inplace=True)
            self.scale = nn.Parameter(torch.tensor(2**0.5))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            for _ in range(3):  # one layer, called three times
                x = self.act(self.layer(x)) * self.scale
            if x.mean() > 0:  # data-dependent
                x = F.leaky_relu_(self.layer(x), 0.5) * (2 / 1.25) ** 0.5
            return {"y": x, "other": None}

    found = diagnose(initialised(Net()), torch.randn(32, 64))
    assert found.agrees, found.verdict
    names = [row.name for row in found.layers]
    assert names == ["input", *["linear", "relu"] * 3, "linear", "leaky_relu"]
    assert [row.path for row in found.layers[1:3]] == ["layer", ":mul"]
    assert found.layers[-1].q == pytest.approx(found.layers[0].q_measured, rel=1e-4)
    assert found.layers[-1].slope == pytest.approx(1.0)


def test_concat_pool_flatten_and_norm() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(4, 64, 3, padding=1)
            self.grow = nn.Conv2d(64, 32, 3, padding=1, padding_mode="circular")
            self.norm = nn.LayerNorm(96)
            self.mix = nn.Linear(96, 64)
            self.head = nn.Linear(64 * 9, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = torch.cat([x, self.grow(F.relu(x) * 2**0.5)], 1)
            x = self.mix(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            return self.head(F.max_pool2d(x, 2).flatten(1))

    found = diagnose(initialised(Net(), method="suo_full"), torch.randn(16, 4, 6, 6))
    assert found.agrees, found.verdict
    ops = [(row.op, row.channels) for row in found.layers]
    assert ops == [
        ("input", 4),
        ("affine", 64),
        ("nonlinear", 64),
        ("affine", 32),
        ("concat", 96),
        ("norm", 96),
        ("affine", 64),
        ("pool", 64),
        ("affine", 5),
    ]
    assert found.layers[5].q_measured == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "view",
    [
        lambda h: h[:, 1:3],
        lambda h: h[:, -1],
        lambda h: h.flatten(0, 1),
        lambda h: h.chunk(2, 1)[0],
        lambda h: h.transpose(1, 2).transpose(1, 2),
    ],
)
def test_views_of_what_was_changed_in_place_are_followed(view: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(view(F.relu_(self.a(x))))

    found = diagnose(initialised(Net(), gain=2**0.5), torch.randn(32, 4, 64))
    assert found.agrees, found.verdict
    assert not [note for note in found.notes if "in place" in note]
    assert not [layer for layer in found.layers if layer.op == "unknown"]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_are_looked_at_from_outside(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
            self.cells = kind(64, 64, batch_first=True)
            self.after = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.cells(self.before(x))[0][:, -1])

    net, x = converted(Net(), depth=20), torch.randn(32, 5, 16)
    found = diagnose(net, x)
    # Gates keep no q = 1, but they are no reason to doubt the layers' scale.
    assert (found.sigma_w, found.agrees) == (1.0, True), found.verdict
    (row,) = [layer for layer in found.layers if layer.op == "unknown"]
    with torch.no_grad():
        assert isinstance(net, Net)
        h = net.cells(net.before(x))[0]
    assert (row.path, row.name, row.channels) == ("cells", kind.__name__, 64)
    assert row.q_measured == pytest.approx(h.square().mean().item(), rel=1e-5)


def test_what_no_map_is_known_for_is_measured_and_named() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    found = diagnose(nn.Sequential(layer, nn.Linear(32, 8)), torch.randn(8, 5, 32))
    assert any("is known here" in note for note in found.notes)
    assert found.layers[-1].path == "1"
    assert math.isfinite(found.layers[-1].q_measured)

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x).sigmoid()

    found = diagnose(initialised(Gate()), torch.randn(16, 32))
    assert found.layers[-1].op == "unknown"
    assert "different layers" in found.notes[0]
    assert found.layers[-1].q == pytest.approx(found.layers[-1].q_measured, rel=0.2)


def test_a_normalised_sum_of_three_branches_is_one_sum() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
            self.add = NormalizedSum((0.5, -0.5, 0.5**0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.add(*(layer(x) for layer in self.layers))

    found = diagnose(initialised(Three()), torch.randn(32, 64))
    assert found.agrees, found.verdict
    assert [row.op for row in found.layers] == ["input", *["affine"] * 3, "sum"]
    assert found.layers[-1].path == "add"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_compiled_and_scripted_models() -> None:
    x = torch.randn(32, 64)
    net = converted(mlp(16, 64, 64))
    want = diagnose(net, x)
    plain = initialised(nn.Sequential(nn.Linear(64, 64), nn.SELU(), nn.Linear(64, 64)))
    scripted = diagnose(torch.jit.trace(plain, x), x)
    assert scripted.agrees
    assert [row.op for row in scripted.layers] == ["input", "affine", "nonlinear", "affine"]
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    found = diagnose(compiled, x)
    assert [row.q_measured for row in found.layers] == [row.q_measured for row in want.layers]
    assert found.layers[1].path == "_orig_mod.0"


def test_a_net_without_activation() -> None:
    found = diagnose(
        initialised(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))), torch.randn(8, 64)
    )
    assert found.agrees
    assert "no nonlinear layer" in found.notes[0]


def test_backends_and_chains_give_the_same_numbers() -> None:
    spec = theory.solve("TAT", "tanh", depth=10)
    layers = [fusedshape.ShapedConv2d(16, 16, 3, padding=1, spec=spec) for _ in range(4)]
    plain = [
        m
        for layer in layers
        for m in (nn.Conv2d(16, 16, 3, padding=1), fusedshape.ShapedActivation(spec, "reference"))
    ]
    chain = initialised(fusedshape.ShapedChain(*layers))
    plain_net = nn.Sequential(*plain)
    for layer, twin in zip(layers, plain_net[::2], strict=True):
        twin.load_state_dict(layer.state_dict())
    x = torch.randn(8, 16, 6, 6)
    one, two = diagnose(chain, x), diagnose(plain_net, x)
    assert one.agrees
    assert two.agrees
    assert [r.op for r in one.layers] == [r.op for r in two.layers]
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.q == pytest.approx(b.q, rel=1e-3)
        assert a.q_measured == pytest.approx(b.q_measured, rel=1e-3)
        assert a.slope == pytest.approx(b.slope, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_measured_in_float32_or_better(dtype: torch.dtype) -> None:
    net = converted(mlp(20, 64))
    x = torch.randn(32, 32)
    want = diagnose(net, x)
    got = diagnose(net.to(dtype), x)
    assert got.agrees, got.verdict
    # A hundred in every input: squares beyond float16's 65504, if they were added up in it.
    assert diagnose(net, 100 * x).layers[-1].q_measured < math.inf
    for a, b in zip(want.layers, got.layers, strict=True):
        assert b.q_measured == pytest.approx(a.q_measured, rel=0.1)


def test_batches_stream_and_add_up() -> None:
    net = converted(mlp(20))
    x = torch.randn(96, 32)
    pulled = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for part in x.chunk(6):
            pulled.append(len(part))
            yield part, torch.zeros(len(part))

    found = diagnose(net, loader(), batches=3)
    assert pulled[:3] == [16, 16, 16]
    assert found.inputs == 48
    assert found.layers[0].q_measured == pytest.approx(x[:48].square().mean().item(), rel=1e-5)
    assert found.agrees


def test_a_batch_that_goes_another_way_is_left_out() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x.tanh() if x.mean() > 100 else self.layer(x)

    x = torch.randn(8, 32)
    net = initialised(Fork())
    found = diagnose(net, [x, x + 1e5 * net.layer.weight.sum(0).detach(), x])
    assert found.inputs == 16
    assert "batch 1 takes another way" in found.notes[0]


def test_keyword_batches() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.add = nn.Linear(64, 64), NormalizedSum((0.6, 0.8))
            self.other = nn.Linear(64, 64)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.add(self.layer(a), self.other(b))

    found = diagnose(initialised(Two()), [{"a": torch.randn(16, 64), "b": torch.randn(16, 64)}])
    assert found.agrees
    assert [r.op for r in found.layers] == ["input", "input", "affine", "affine", "sum"]


def test_activations_are_not_kept() -> None:
    class Witness(nn.Module):
        seen: list[Any] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            gc.collect()
            alive = sum(ref() is not None for ref in self.seen)
            assert alive <= 2, f"{alive} of {len(self.seen)} activations are still in memory"
            self.seen.append(weakref.ref(x))
            return x

    layers = [m for _ in range(6) for m in (nn.Linear(64, 64), nn.Tanh(), Witness())]
    diagnose(initialised(nn.Sequential(*layers)), torch.randn(32, 64), batches=1)
    assert len(Witness.seen) == 12  # the inputs, and a few of them changed a little


# What it leaves alone.


class Nosy(nn.Module):
    """Changes all it can in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = x
        self.count += 1
        self.count = self.count + 1
        random.random()
        np.random.rand()
        x = F.dropout(self.norm(self.layer(x)), 0.5, self.training)
        if self.fails:
            raise RuntimeError("on purpose")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_numbers_stay_as_they_were(fails: bool) -> None:
    net = nn.Sequential(Nosy(), nn.ReLU())
    net[0].fails = fails
    net[1].eval()
    calls = []
    handle = net[0].register_forward_hook(lambda *args: calls.append(1))
    net[0].layer.weight.grad = torch.ones(8, 8)
    buffer = net[0].count
    before = copy.deepcopy(net.state_dict())
    attributes = [set(vars(m)) for m in net.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    if fails:
        with pytest.raises(ValueError, match="on purpose"):
            diagnose(net, torch.ones(4, 8))
    else:
        assert diagnose(net, torch.randn(4, 8, generator=torch.Generator())).cause == "BatchNorm"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert net[0].count is buffer
    assert net[0].calls == 0
    assert [set(vars(m)) for m in net.modules()] == attributes
    assert net[0].training
    assert not net[1].training
    assert torch.equal(net[0].layer.weight.grad, torch.ones(8, 8))
    assert list(net[0]._forward_hooks) == [handle.id]
    assert fails or calls, "the user's own hooks run"
    everywhere = nn.modules.module
    assert not everywhere._global_forward_hooks
    assert not everywhere._global_forward_pre_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("model", "data", "error", "words"),
    [
        ("net", torch.zeros(4, 8), TypeError, "must be an nn.Module, got str"),
        (nn.Linear(8, 8), torch.zeros(4, 7), ValueError, r"fails on data of shape \(4, 7\)"),
        (nn.Linear(8, 8), torch.zeros(1, 8), ValueError, "at least 2 inputs"),
        (nn.Linear(8, 8), torch.zeros(()), ValueError, "at least 2 inputs"),
        (nn.Linear(8, 8), [], ValueError, "hold no batch"),
        (nn.Linear(8, 8), 3, TypeError, "got int"),
        (nn.Linear(8, 8), {"x": torch.zeros(4, 8)}, TypeError, "got dict"),
        (nn.Linear(8, 8), ["x"], TypeError, "batch 0 must be a tensor"),
        (nn.LazyLinear(8), torch.zeros(4, 8), ValueError, "without memory"),
        (nn.Linear(8, 8, device="meta"), torch.zeros(4, 8), ValueError, "without memory"),
    ],
)
def test_errors(model: Any, data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        diagnose(model, data)


def test_errors_of_options() -> None:
    with pytest.raises(ValueError, match="batches must be a positive int, got 0"):
        diagnose(nn.Linear(8, 8), torch.zeros(4, 8), batches=0)
    with pytest.raises(ValueError, match="sigma_w=nan"):
        diagnose(nn.Linear(8, 8), torch.zeros(4, 8), sigma_w=math.nan)


def test_given_sigmas_are_what_the_weights_should_be() -> None:
    net = initialised(mlp(10, 64, 64), gain=1.0)
    found = diagnose(net, torch.randn(32, 64), sigma_w=2**0.5, sigma_b=0.0)
    assert_finds(found, "weight scale", "0")
    assert found.sigma_w == pytest.approx(2**0.5)


# Forms.


def test_given_sigmas_of_the_edge_of_chaos() -> None:
    edge = theory.eoc("tanh")
    net = converted(mlp(12, 256, 256), method="EOC", activation="tanh")
    sigmas = {"sigma_w": edge.sigma_w, "sigma_b": edge.sigma_b}
    found = diagnose(net, torch.randn(64, 256), **sigmas)
    assert found.agrees, found.verdict


def test_zero_weights_among_others_are_dead() -> None:
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(64, 64), nn.Tanh())))
    for layer in net[:4]:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight)
    assert diagnose(net, torch.randn(32, 64)).cause == "dead"
    with pytest.raises(ValueError, match="sigma_w=0 would leave nothing"):
        diagnose(net, torch.randn(32, 64), sigma_w=0)


def test_forms(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = diagnose(converted(mlp(50)), torch.randn(32, 32))
    found.save(tmp_path / "d.json")
    data = json.loads((tmp_path / "d.json").read_text())
    assert data["agrees"] is True
    assert len(data["layers"]) == 102
    assert data["layers"][0]["slope"] is None
    assert data["layers"][2]["slope"] == pytest.approx(1.0)
    assert data["machine"]["torch"] == torch.__version__
    found.plot(tmp_path / "d.svg")
    text = (tmp_path / "d.svg").read_text()
    assert "<svg" in text
    # 51 layers with weights, every third of them named on the axis.
    labels = re.findall(r"<!-- (\d+): (\d+) -->", text)
    assert labels == [(str(k), str(2 * k - 2)) for k in range(1, 52, 3)]
    assert "<!-- layer with weights -->" in text
    assert found.table().count("\n") == 102
    lines = str(found).splitlines()
    assert len(lines) < 60
    assert "of 102 layers" in lines[-2]
    assert lines[0].split()[:3] == ["layer", "q", "measured"]


def test_figure_of_a_broken_net(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = converted(mlp(20))
    with torch.no_grad():
        net[6].weight.zero_()
    found = diagnose(net, torch.randn(32, 32))
    found.plot(tmp_path / "d.png", "title")
    assert (tmp_path / "d.png").stat().st_size > 10_000


MINE = """
import torch
from torch import nn
import fusedshape

def good():
    net = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(64, 64), nn.ReLU())])
    fusedshape.convert(net)
    return net

def bad():
    net = good()
    nn.init.constant_(net[4].bias, 3.0)
    return net

def batches():
    return [torch.randn(8, 64) for _ in range(2)]

wrong = torch.randn(8, 63)
"""


def test_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "diagnosed.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(["diagnose", *argv])
        return code, *capsys.readouterr()

    code, out, err = run("diagnosed:good", "--json", "d.json")
    assert (code, err) == (0, "")
    assert "theory and measurement agree" in out
    assert json.loads((tmp_path / "d.json").read_text())["inputs"] == 64
    code, out, _ = run("diagnosed:bad", "--data", "diagnosed:batches", "--all")
    assert code == 0
    assert "1. biases at '4'" in out
    code, out, err = run("diagnosed:good", "--data", "diagnosed:wrong")
    assert code == 1
    assert err.startswith("fusedshape: error: diagnose: the model fails on data of shape (8, 63)")
    assert run("diagnosed:good", "--input", "4,64")[0] == 0
    with pytest.raises(SystemExit):
        run("diagnosed:good", "--input", "4,x")


def test_affine_says_what_it_knows() -> None:
    assert Affine(bias=1.0).has_weights is False
    assert matrix(torch.eye(3), torch.ones(3)).bias == 1.0
