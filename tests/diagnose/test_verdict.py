"""diagnose's verdicts: broken nets, each by its cause and place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import (
    ActSpec,
    NormalizedSum,
    convert,
    linear_act,
    theory,
)
from fusedshape.diagnose import diagnose
from fusedshape.diagnose.layers import matrix
from fusedshape.init import gaussian_, suo_
from fusedshape.kinds import kind_of
from fusedshape.models.vanilla import vanilla_convnet
from fusedshape.nn import ShapedLinear
from fusedshape.ops.choice import Engine
from fusedshape.shortcuts import reweight_shortcuts
from tests.support.backends import NATIVE
from tests.support.nets import assert_finds, converted, initialised, mlp


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
    net = nn.Sequential(nn.Linear(128, 128), *(ActivatesTheSum(128) for _ in range(8)))
    reweight_shortcuts(net, weight)
    found = diagnose(converted(net, depth=20), torch.randn(64, 128))
    assert_finds(found, "activated sum", "2.shaped_0")
    assert "7 such step(s) changed q by a factor of" in found.findings[0].text
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
