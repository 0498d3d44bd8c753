"""diagnose's verdicts: what it finds of every kind of fault, and how seldom it cries wolf."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedshape import PerLocationNorm, convert
from fusedshape.diagnose import CAUSES, Diagnosis, diagnose
from fusedshape.diagnose.randomness import randomness
from fusedshape.init import init_module_, suo_

INITS = ("suo", "suo_full", "delta_orthogonal", "gaussian")
METHODS = (("TAT", "leaky_relu"), ("TAT", "tanh"), ("DKS", "softplus"), ("DKS", "gelu"))


def linear_net(depth: int, width: int, **kwargs: Any) -> nn.Sequential:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(width, 10))
    convert(net, clamp=True, **kwargs)
    return net


def conv_net(depth: int, width: int, **kwargs: Any) -> nn.Sequential:
    layers: list[nn.Module] = [PerLocationNorm()]
    for i in range(depth):
        layers += [nn.Conv2d(width if i else 4, width, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Conv2d(width, 10, 1))
    convert(net, clamp=True, **kwargs)
    return net


def data_for(net: nn.Sequential, size: int = 32) -> Tensor:
    if isinstance(net[0], PerLocationNorm):
        return torch.randn(size, 3, 6, 6)
    x = torch.randn(size, net[0].weight.shape[1])
    return x / x.square().mean(1, keepdim=True).sqrt()


def layers_of(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if getattr(m, "weight", None) is not None]


def middle(net: nn.Module) -> Any:
    layers = layers_of(net)
    return layers[len(layers) // 2]


def rescaled(w: Tensor) -> Tensor:
    """Multiplied so that q is kept on average."""
    return w * (len(w) / w.square().sum()).sqrt()


def scale_all(factor: float) -> Callable[[nn.Module], None]:
    def change(net: nn.Module) -> None:
        for layer in layers_of(net):
            layer.weight.mul_(factor)

    return change


def scale_one(factor: float) -> Callable[[nn.Module], None]:
    return lambda net: middle(net).weight.mul_(factor)


def filled(make: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """Replace the middle weight by `make(old)`, rescaled."""

    def change(net: nn.Module) -> None:
        weight = middle(net).weight
        weight.copy_(rescaled(make(weight.clone())))

    return change


def of_rank(rank: int) -> Callable[[Tensor], Tensor]:
    def make(w: Tensor) -> Tensor:
        centre = w.flatten(2).square().sum((0, 1)).argmax() if w.ndim > 2 else None
        matrix = w if centre is None else w.flatten(2)[..., centre]
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        short = u[:, :rank] @ v[:rank]
        if centre is None:
            return short
        w = torch.zeros_like(w)
        w.flatten(2)[..., centre] = short
        return w

    return make


def short_over_taps(w: Tensor) -> Tensor:
    out = len(w)
    u, s, v = torch.linalg.svd(torch.randn(w.shape).flatten(1), full_matrices=False)
    return ((u[:, : out // 8] * s[: out // 8]) @ v[: out // 8]).reshape(w.shape)


def copied(w: Tensor) -> Tensor:
    w[1::2] = w[: len(w) - 1 : 2]
    return w


def quantised(bits: int) -> Callable[[nn.Module], None]:
    """Weights rounded to so many bits, as a tensor's quantisation does."""

    def change(net: nn.Module) -> None:
        for layer in layers_of(net):
            step = layer.weight.abs().max() / (2 ** (bits - 1) - 1)
            layer.weight.copy_((layer.weight / step).round() * step)

    return change


def redrawn(draw: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """Other random numbers of the right variance in all layers."""

    def change(net: nn.Module) -> None:
        for layer in layers_of(net):
            w = draw(torch.randn_like(layer.weight))
            layer.weight.copy_(w / (w.square().mean() * w[0].numel()).sqrt())

    return change


def tie(net: nn.Module) -> None:
    first, *others = layers_of(net)[1:-1]
    for layer in others:
        layer.weight = first.weight


def repeat_module(net: nn.Module) -> None:
    assert isinstance(net, nn.Sequential)
    layers = layers_of(net)
    paths = {m: i for i, m in enumerate(net)}
    for layer in layers[2:-1]:
        net[paths[layer]] = layers[1]


class DropPath(nn.Module):
    """Leaves whole examples out, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(0.8)
        return x * kept / 0.8


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.2, self.training)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.randn_like(x)


def insert(module: nn.Module) -> Callable[[nn.Module], None]:
    def change(net: nn.Module) -> None:
        assert isinstance(net, nn.Sequential)
        at = list(net).index(middle(net))
        net.insert(at, module)

    return change


def batchnorm(net: nn.Module) -> None:
    insert(nn.BatchNorm2d(middle(net).weight.shape[1]))(net)


# What changes a healthy net, and the causes that name it rightly.
FAULTS: dict[str, tuple[Callable[[nn.Module], Any], set[str]]] = {
    "all x1.1": (scale_all(1.1), {"weight scale"}),
    "all x0.9": (scale_all(0.9), {"weight scale"}),
    "all x1.05": (scale_all(1.05), {"weight scale"}),
    "all x0.95": (scale_all(0.95), {"weight scale"}),
    "one x3": (scale_one(3.0), {"weight scale"}),
    "one x0.5": (scale_one(0.5), {"weight scale"}),
    "biases": (lambda net: middle(net).bias.normal_(), {"biases"}),
    "zeroed": (lambda net: middle(net).weight.zero_(), {"dead"}),
    "rank 1": (filled(of_rank(1)), {"low rank"}),
    "rank 2": (filled(of_rank(2)), {"low rank"}),
    "rank 4": (filled(of_rank(4)), {"low rank"}),
    "rank 8": (filled(of_rank(8)), {"low rank"}),
    "copies": (filled(copied), {"low rank"}),
    "one sign": (filled(torch.abs), {"low rank"}),
    "cauchy": (filled(lambda w: torch.empty_like(w).cauchy_()), {"low rank"}),
    "tied": (tie, {"shared weights"}),
    "one module": (repeat_module, {"shared weights"}),
    "dropout": (insert(nn.Dropout(0.1)), {"dropout"}),
    "functional": (insert(FunctionalDropout()), {"dropout"}),
    "drop path": (insert(DropPath()), {"dropout"}),
    "noise": (insert(Noise()), {"dropout"}),
}
CONV_FAULTS: dict[str, tuple[Callable[[nn.Module], Any], set[str]]] = {
    "rank over taps": (filled(short_over_taps), {"low rank"}),
    "one filter": (
        filled(lambda w: torch.randn(*w.shape[:2], 1, 1) * torch.randn(w.shape[2:])),
        {"low rank"},
    ),
    "BatchNorm": (batchnorm, {"BatchNorm"}),
}


HARMLESS = {
    "quantised": quantised(8),
    "uniform": redrawn(lambda w: w.uniform_(-1, 1)),
    "signs": redrawn(torch.sign),
    "three values": redrawn(lambda w: w.sign() * (w.abs() > 0.5)),
    "sparse": redrawn(lambda w: w * (torch.rand(w.shape) < 0.3)),
    "heavier tails": redrawn(lambda w: w * w.abs().sqrt()),
    "eval": lambda net: insert(nn.Dropout())(net.eval()) or net.eval(),
}


def faulty(kind: str, net: nn.Module) -> nn.Module:
    change, _ = {**FAULTS, **CONV_FAULTS}[kind]
    with torch.no_grad():
        change(net)
    return net


def diagnosed(kind: str, net: nn.Module, data: Tensor) -> Diagnosis:
    found = diagnose(faulty(kind, net), data)
    assert found.cause in CAUSES
    return found


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("init", ["suo", "gaussian"])
def test_faults_of_linear_nets(kind: str, init: str) -> None:
    torch.manual_seed(0)
    net = linear_net(30, 64, init=init)
    data = data_for(net)
    assert diagnose(net, data).agrees
    found = diagnosed(kind, net, data)
    assert found.cause in FAULTS[kind][1], found.verdict


@pytest.mark.parametrize("kind", [*FAULTS, *CONV_FAULTS])
def test_faults_of_convolutions(kind: str) -> None:
    torch.manual_seed(0)
    net = conv_net(20, 32, init="suo_full")
    data = data_for(net, 16)
    assert diagnose(net, data).agrees
    found = diagnosed(kind, net, data)
    assert found.cause in {**FAULTS, **CONV_FAULTS}[kind][1], found.verdict


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("make", [linear_net, conv_net])
def test_other_random_weights_agree(kind: str, make: Callable[..., nn.Sequential]) -> None:
    torch.manual_seed(0)
    net = make(12, 64, init="suo_full")
    with torch.no_grad():
        HARMLESS[kind](net)
    found = diagnose(net, data_for(net, 16))
    assert found.agrees, found.verdict


def test_small_differences_of_scale_add_up() -> None:
    torch.manual_seed(0)
    net = linear_net(30, 64)
    data = data_for(net)
    gain = 1.05
    with torch.no_grad():
        scale_all(gain)(net)
    found = diagnose(net, data)
    # The first layer at which q is more than 1.5 times what it should be; two modules a layer.
    first = next(k for k in range(30) if gain ** (2 * (k + 1)) > 1.5)
    assert (found.cause, found.path) == ("weight scale", str(2 * first))
    assert "small differences" in found.verdict
    assert "gain 1.05 on average" in found.verdict
    with torch.no_grad():
        scale_all(1.1 / gain)(net)
    assert "gain 1.1)" in diagnose(net, data).verdict


def test_small_differences_of_biases_and_activations_add_up_too() -> None:
    torch.manual_seed(0)
    net = linear_net(60, 64)
    data = data_for(net)
    for layer in layers_of(net):
        nn.init.constant_(layer.bias, 0.15)  # q + 0.0225 each time, too little for one layer
    found = diagnose(net, data)
    assert found.cause == "biases"
    assert "add up" in found.verdict

    class Wider(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1.43 * nn.functional.relu(x)  # √2 is right

    net = nn.Sequential(*(m for _ in range(25) for m in (nn.Linear(64, 64), Wider())))
    for layer in layers_of(net):
        init_module_(layer)
    found = diagnose(net, data)
    assert (found.cause, "add up" in found.verdict) == ("plain activation", True), found.verdict


@pytest.mark.parametrize("uses", [1, 2, 4, 5])
def test_a_weight_may_be_used_side_by_side_or_a_few_times(uses: int) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            for _ in range(uses):
                a, b = self.layer(a), self.layer(b)
            return self.last(torch.cat((a[:, :32], b[:, 32:]), 1))

    torch.manual_seed(0)
    net = Loop()
    for layer in layers_of(net):
        init_module_(layer)
    found = diagnose(net, [{"a": torch.randn(16, 64), "b": torch.randn(16, 64)}])
    assert (found.cause == "shared weights") == (uses > 4), found.verdict


def test_tied_weights_of_an_encoder_and_its_decoder() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.decoder = nn.Linear(64, 64), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.selu(self.layer(x))
            return self.decoder(nn.functional.linear(h, self.layer.weight.t()))

    torch.manual_seed(0)
    net = Tied()
    init_module_(net.layer)
    found = diagnose(net, torch.randn(16, 64))
    assert (found.cause, found.path) == ("shared weights", ":linear"), found.verdict


@pytest.mark.parametrize(
    ("make", "cause", "words"),
    [
        (lambda x: x[:1].expand_as(x), "input data", "all the same"),
        (lambda x: x * 5, "input data", "q is 25"),
        (lambda x: x * math.nan, "non-finite", "look at the data"),
        (lambda x: x.index_fill(0, torch.tensor([3]), math.inf), "non-finite", "look at the data"),
    ],
)
def test_bad_data(make: Callable[[Tensor], Tensor], cause: str, words: str) -> None:
    torch.manual_seed(0)
    net = linear_net(20, 64, method="DKS", activation="tanh")
    found = diagnose(net, make(data_for(net)))
    assert (found.cause, found.path) == (cause, "input")
    assert words in found.verdict


@pytest.mark.parametrize(
    "shape", [(2, 2), (3, 64), (4, 4), (16, 16), (64, 64), (24, 9), (10, 100), (200, 256)]
)
@pytest.mark.parametrize("fill", [torch.randn, torch.rand, None])
def test_random_weights_look_random(shape: tuple[int, int], fill: Any) -> None:
    torch.manual_seed(0)
    p, wide = min(shape), max(shape)
    for _ in range(60):
        w = suo_(torch.empty(shape)) if fill is None else fill(shape) - (fill is torch.rand) / 2
        seen = randomness(w[None])
        assert not seen.flaw
        assert seen.is_orthogonal == (fill is None and p >= 4)
        if fill is None:
            # Of orthonormal rows, x uniform on a sphere, only out < in leaves anything to chance.
            want = 2 / (shape[1] + 2) * (shape[1] / p - 1)
            assert seen.chance == pytest.approx(want, abs=1e-4)
    assert wide >= p


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32), (200, 300)])
@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("even", [True, False])
def test_low_rank_is_seen(shape: tuple[int, int], rank: int, even: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
    w = torch.linalg.qr(a).Q @ torch.linalg.qr(b.T).Q.T if even else a @ b
    seen = randomness(w[None])
    assert seen.flaw
    assert min(shape) > 128 or f"rank {rank}," in seen.flaw
    # What it may do by chance is what a random one may, not what it does itself.
    out, n = shape
    assert seen.chance <= 2 / (n + 2) * (n * (out + n + 1) / (out * n + 2) - 1) + 1e-12


def healthy(seed: int, most: float) -> tuple[nn.Sequential, Tensor, str]:
    """A net at random: width, depth, kind, initialiser and constants; its data; what it is."""
    draw = random.Random(seed)
    is_conv = draw.random() < 0.35
    method, activation = draw.choice(METHODS)
    init = draw.choice(INITS)
    width = draw.choice((16, 32, 64, 128) if is_conv else (16, 24, 32, 64, 128, 256, 512))
    depth = draw.choice((5, 8, 12, 20) if is_conv else (5, 10, 20, 30, 50, 100))
    while width**2 * depth * (36 if is_conv else 1) > most and (width > 32 or depth > 5):
        width, depth = max(width // 2, min(width, 32)), max(depth // 2, 5)
    torch.manual_seed(seed)
    make = conv_net if is_conv else linear_net
    net = make(depth, width, method=method, activation=activation, init=init)
    return net, data_for(net), f"{make.__name__} {width=} {depth=} {init} {method} {activation}"


def assert_no_alarm(seed: int, most: float) -> None:
    net, data, what = healthy(seed, most)
    found = diagnose(net, data)
    # Where chance alone changes q tenfold, to say so is right.
    assert found.agrees or found.cause == "width", f"{seed}: {what}: {found.verdict}"


@pytest.mark.parametrize("seed", range(12))
def test_healthy_nets_raise_no_alarm(seed: int) -> None:
    assert_no_alarm(seed, 3e5)


@pytest.mark.exhaustive
def test_few_of_many_healthy_nets_raise_an_alarm() -> None:
    # At most 3 of 200: with 95 % confidence, fewer than 4 % do (Clopper and Pearson).
    alarms = []
    for seed in range(1000, 1200):
        try:
            assert_no_alarm(seed, 4e6)
        except AssertionError as alarm:
            alarms.append(str(alarm))
    assert len(alarms) <= 3, alarms
