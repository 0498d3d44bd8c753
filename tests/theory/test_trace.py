"""trace_wiring: the wirings of well-known models, of users' blocks, and of what cannot be read."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fusedshape import ActSpec, convert
from fusedshape.nn import NormalizedSum, PerLocationNorm, ShapedActivation, ShapedConv2d
from fusedshape.theory import UnreadableError, c_map, chain, resnet, solve, trace_wiring
from fusedshape.theory.maps import leaky_c_map
from tests.support import zoo

LayerMap = Callable[[float], float]
MAPS: list[tuple[float, LayerMap]] = [
    (0.0, lambda c: leaky_c_map(0.3, c)),
    (1.0, lambda y: 1.2 * y),
    (0.0, lambda y: 0.1 + y),
]


def same(net: Callable[..., float], recursion: Callable[..., float], rel: float = 1e-12) -> None:
    for x, r in MAPS:
        assert net(x, r) == pytest.approx(recursion(x, r), rel=rel)


def times(n: int, r: LayerMap) -> LayerMap:
    def many(x: float) -> float:
        for _ in range(n):
            x = r(x)
        return x

    return many


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("depth", zoo.BLOCKS)
def test_resnets_v2(depth: int, weight: float) -> None:
    wiring = trace_wiring(zoo.ResNet(depth, 2, weight))
    same(wiring, resnet(depth, weight))
    assert wiring.depth == sum(zoo.BLOCKS[depth]) * (3 if depth >= 50 else 2) + 1


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("depth", zoo.BLOCKS)
def test_resnets_v1(depth: int, weight: float) -> None:
    deep = depth >= 50

    def recursion(x: float, r: LayerMap) -> float:
        branch = times(2 if deep else 1, r)
        alone = branch(x)
        x = r(x)  # the stem's
        for _ in range(sum(zoo.BLOCKS[depth])):
            x = r(weight**2 * x + (1 - weight**2) * branch(x))
        return max(x, alone)

    wiring = trace_wiring(zoo.ResNet(depth, 1, weight))
    same(wiring, recursion)
    assert not wiring.notes


def test_resnet_152_as_the_papers_solve_it() -> None:
    spec = solve("TAT", "leaky_relu", subnet_max=trace_wiring(zoo.ResNet(152, 2, 0.8)))
    assert spec.negative_slope == pytest.approx(0.4500, abs=5e-5)
    assert "wiring of depth 151" in spec.origin


@pytest.mark.parametrize("version", [1, 2])
def test_plain_shortcuts_are_named(version: int) -> None:
    wiring = trace_wiring(zoo.ResNet(18, version))
    assert len(wiring.problems) == 8
    with pytest.raises(UnreadableError, match=r"'layer1.0.join:add' .*NormalizedSum .* 7 more"):
        wiring(0.0, lambda c: c)
    same(wiring.normalized(), trace_wiring(zoo.ResNet(18, version, math.sqrt(0.5))))


def test_vgg_is_a_chain() -> None:
    wiring = trace_wiring(zoo.VGG16())
    assert wiring.label == "depth=15"
    same(wiring, chain(15))
    assert {node.spec for node in wiring.nodes if node.op == "nonlinear"} == {ActSpec("relu")}


def test_densenet() -> None:
    def recursion(x: float, r: LayerMap) -> float:
        def block(channels: int, x: float) -> float:
            found = [(channels, x)]
            for _ in range(3):
                total = sum(n for n, _ in found)
                joined = sum(n * v for n, v in found) / total
                found.append((4, r(r(joined))))
            return sum(n * v for n, v in found) / (channels + 12)

        return max(r(block(9, r(block(6, x)))), r(r(x)))

    net = zoo.DenseNet()
    net(torch.zeros(1, 3, 8, 8))
    same(trace_wiring(net), recursion)
    same(trace_wiring(net, torch.zeros(1, 3, 8, 8)), recursion)


def test_convnext() -> None:
    wiring = trace_wiring(zoo.ConvNeXt(3, 0.8))

    def recursion(x: float, r: LayerMap) -> float:
        alone = r(x)
        for _ in range(3):
            x = 0.36 * x + 0.64 * r(x)
        return max(x, alone)

    same(wiring, recursion, rel=1e-6)  # γ is held in float32
    assert "'blocks.0:mul' has a learnt weight; its present value, 0.8, was read" in wiring.notes
    assert {n.spec for n in wiring.nodes if n.spec} == {ActSpec("gelu_exact")}
    # Layer scales begin near 0, and leave a linear network.
    linear = trace_wiring(zoo.ConvNeXt(3, 1e-6))
    assert linear(0.0, lambda y: y + 1) == 1  # that of a branch alone


def test_mixer() -> None:
    def recursion(x: float, r: LayerMap) -> float:
        alone = r(x)
        for _ in range(4):
            x = 0.36 * x + 0.64 * r(x)
        return max(x, alone)

    net = zoo.Mixer(2, 0.6)
    net(torch.zeros(1, 3, 16, 16))
    same(trace_wiring(net), recursion)


class Follow(nn.Module):
    """A forward given as a function of the module and its input."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.way = forward
        for name in "abc":
            setattr(self, name, nn.Linear(4, 4))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def one(x: float, r: LayerMap) -> float:
    return r(x)


def two(x: float, r: LayerMap) -> float:
    return r(r(x))


def half(x: float, r: LayerMap) -> float:
    return max(r(x), r(0.36 * x + 0.64 * r(x)))


def in_place_arithmetic(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    alias = y.view(-1, 4)
    y *= 0.6
    y += 0.8 * m.b(torch.tanh(m.c(x)))
    return torch.relu(m.a(alias))


def two_functions(m: Any, x: Tensor) -> Tensor:
    def f(y: Tensor) -> Tensor:
        return F.gelu(m.a(y), approximate="tanh")

    return f(f(x))


class Pair(NamedTuple):
    features: Tensor
    out: Tensor


READ: dict[str, tuple[Callable[..., Any], Callable[..., float]]] = {
    "functional": (lambda m, x: F.relu(m.b(m.a(x).tanh())), two),
    "in place": (lambda m, x: m.b(torch.relu_(m.a(x))), one),
    "one after the other": (lambda m, x: torch.tanh(F.relu(m.a(x))), two),
    "twice the same": (two_functions, two),
    "after a pool": (lambda m, x: F.relu(F.avg_pool1d(m.a(x), 2)), one),
    "a weighted sum": (lambda m, x: F.relu(m.c(0.6 * m.a(x) + 0.8 * m.b(F.elu(x)))), half),
    "subtracted": (lambda m, x: F.relu(-0.6 * m.a(x) - m.b(F.elu(x)) * 0.8), half),
    "divided": (lambda m, x: F.relu((m.a(x) * 3 + 4 * m.b(F.elu(x))) / 5), half),
    "add with alpha": (
        lambda m, x: F.relu(torch.add(m.a(x) * 0.6, m.b(F.elu(x)), alpha=0.8)),
        half,
    ),
    "sum of a list": (lambda m, x: F.relu(sum([0.6 * m.a(x), 0.8 * m.b(F.elu(x))])), half),
    "worked in place, seen through a view": (in_place_arithmetic, half),
    "swish written out": (lambda m, x: (y := m.a(x)) * torch.sigmoid(y), one),
    "clamped": (lambda m, x: m.a(x).clamp(min=0), one),
    "squared": (lambda m, x: m.a(x) ** 2, one),
    "matmul with a parameter": (lambda m, x: F.relu(x @ m.a.weight), one),
    "addmm": (lambda m, x: F.relu(torch.addmm(m.a.bias, x, m.a.weight)), one),
    "named outputs": (lambda m, x: Pair(m.a(x), F.relu(m.b(x))), one),
    "einsum": (lambda m, x: torch.einsum("ni,oi->no", x, m.a.weight).relu(), one),
    "split and joined": (
        lambda m, x: m.c(torch.cat([F.relu(m.a(p)) for p in m.b(x).chunk(2, -1)], -1)),
        one,
    ),
    "scaled logits": (lambda m, x: m.b(F.relu(m.a(x))) / 0.07, one),
    "softmax at the end": (lambda m, x: F.log_softmax(m.b(F.relu(m.a(x))), dim=1), one),
    "normalised": (lambda m, x: F.relu(F.layer_norm(0.3 * m.a(x), (4,))), one),
    "dictionaries": (lambda m, x: {"y": m.b(F.relu(m.a(x))), "features": [m.a(x)]}, one),
    "shapes": (lambda m, x: F.relu(m.a(x)).reshape(x.shape[0], -1, x.size(-1)).mean(1), one),
}


@pytest.mark.parametrize("name", READ)
def test_reads_users_code(name: str) -> None:
    way, recursion = READ[name]
    net = Follow(way)
    state = copy.deepcopy(net.state_dict())
    wiring = trace_wiring(net)
    assert not wiring.problems
    same(wiring, recursion)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net.training


def test_paths() -> None:
    net = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Follow(lambda m, x: m.a(x.relu()))
    )
    nodes = trace_wiring(net).nodes
    assert [(n.op, n.path) for n in nodes] == [
        ("input", ""),
        ("affine", "0.0"),
        ("nonlinear", "0.1"),
        ("nonlinear", "1:relu"),
        ("affine", "1.a"),
    ]
    assert [n.inputs for n in nodes] == [(), (0,), (1,), (2,), (3,)]


@pytest.mark.parametrize(
    ("act", "spec"),
    [
        (nn.ReLU(), ActSpec("relu")),
        (nn.LeakyReLU(0.2), ActSpec("leaky_relu", negative_slope=0.2)),
        (nn.PReLU(init=0.3), ActSpec("leaky_relu", negative_slope=torch.tensor(0.3).item())),
        (nn.ELU(), ActSpec("elu")),
        (nn.ELU(0.5), None),
        (nn.CELU(2.0), ActSpec("elu", 0.5, output_scale=2.0)),
        (nn.SELU(), ActSpec("selu")),
        (nn.GELU(), ActSpec("gelu_exact")),
        (nn.GELU(approximate="tanh"), ActSpec("gelu")),
        (nn.SiLU(), ActSpec("swish")),
        (nn.Tanh(), ActSpec("tanh")),
        (nn.Sigmoid(), ActSpec("sigmoid")),
        (nn.Softplus(), ActSpec("softplus")),
        (nn.Softplus(beta=2.0), ActSpec("softplus", 2.0, output_scale=0.5)),
        (nn.Softsign(), ActSpec("softsign")),
        (nn.Mish(), None),
        (nn.Hardswish(), None),
        (ShapedActivation(ActSpec("sin", 0.5)), ActSpec("sin", 0.5)),
    ],
    ids=str,
)
def test_activation_modules(act: nn.Module, spec: ActSpec | None) -> None:
    wiring = trace_wiring(nn.Sequential(nn.Linear(4, 4), act))
    (node,) = (n for n in wiring.nodes if n.op == "nonlinear")
    assert node.spec == spec
    assert node.path == "1"
    if spec is None:
        assert node.note
        return
    # The spec is the activation: the same numbers, with the table's φ.
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    y = spec.output_scale * spec.row.value(spec.input_scale * x, spec.negative_slope)
    torch.testing.assert_close(act.double()(x), y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("function", "spec"),
    [
        (F.leaky_relu, ActSpec("leaky_relu", negative_slope=0.01)),
        (lambda x: F.leaky_relu(x, 0.3, True), ActSpec("leaky_relu", negative_slope=0.3)),
        (lambda x: F.leaky_relu(x, negative_slope=0.3), ActSpec("leaky_relu", negative_slope=0.3)),
        (F.gelu, ActSpec("gelu_exact")),
        (F.silu, ActSpec("swish")),
        (torch.erf, ActSpec("erf")),
        (torch.atan, ActSpec("atan")),
        (lambda x: x.asinh(), ActSpec("asinh")),
        (torch.square, ActSpec("square")),
        (torch.cos, ActSpec("cos")),
        (lambda x: F.softplus(x, 2.0), ActSpec("softplus", 2.0, output_scale=0.5)),
        (F.elu_, ActSpec("elu")),
        (F.hardtanh, None),
        (lambda x: x.clamp(0, 6), None),
    ],
)
def test_activation_functions(function: Callable[[Tensor], Tensor], spec: ActSpec | None) -> None:
    wiring = trace_wiring(Follow(lambda m, x: function(m.a(x))))
    (node,) = (n for n in wiring.nodes if n.op == "nonlinear")
    assert node.spec == spec


def test_converted_models_are_read_again() -> None:
    layers = [m for _ in range(20) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    for fuse in (True, False):
        net = nn.Sequential(PerLocationNorm(), nn.Conv2d(4, 4, 3), nn.ReLU(), *layers)
        report = convert(copy.deepcopy(net), fuse=fuse, dry_run=True)
        convert(net, fuse=fuse)
        wiring = trace_wiring(net)
        assert wiring.depth == report.depth == 21
        assert {n.spec for n in wiring.nodes if n.op == "nonlinear"} == {report.spec}
        assert wiring.nodes[1].op == "norm"
    single = trace_wiring(nn.Sequential(ShapedConv2d(3, 4, 3, spec=ActSpec("tanh"))))
    assert [(n.op, n.path) for n in single.nodes[1:]] == [("affine", "0"), ("nonlinear", "0")]


def test_learnt_weights() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        w = torch.sigmoid(m.gate)
        return F.relu(w * m.a(x) + torch.sqrt(1 - w**2) * m.b(F.relu(x)))

    gate = nn.Parameter(torch.logit(torch.tensor(0.6, dtype=torch.float64)))
    wiring = trace_wiring(Follow(way, gate=gate))
    same(wiring, half)
    assert "':mul' has a learnt weight; its present value, 0.6, was read" in wiring.notes


def test_normalized_sums() -> None:
    net = Follow(
        lambda m, x: F.relu(m.join(m.a(x), m.b(x), m.c(F.relu(x)))),
        join=NormalizedSum((math.sqrt(0.18), -math.sqrt(0.18), 0.8)),
    )
    wiring = trace_wiring(net)
    same(wiring, half)
    (node,) = (n for n in wiring.nodes if n.op == "sum")
    assert (node.path, len(node.weights)) == ("join", 3)


def test_an_in_place_activation_reaches_the_shortcut() -> None:
    # x is overwritten before it is added, so the branches fork after the activation.
    def way(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return 0.6 * x + 0.8 * m.b(F.relu(m.c(m.act(x))))

    def after(x: float, r: LayerMap) -> float:
        return max(r(x), 0.36 * r(x) + 0.64 * r(r(x)))

    def before(x: float, r: LayerMap) -> float:
        return max(r(r(x)), 0.36 * x + 0.64 * r(r(x)))

    # Python multiplies first: 0.6·x is computed from the old values, and x itself is overwritten.
    same(trace_wiring(Follow(way, act=nn.ReLU(inplace=True))), before)
    same(trace_wiring(Follow(way, act=nn.ReLU())), before)
    late = lambda m, x: _late(m, m.a(x))  # noqa: E731
    same(trace_wiring(Follow(late, act=nn.ReLU(inplace=True))), after)
    same(trace_wiring(Follow(late, act=nn.ReLU())), before)


def _late(m: Any, x: Tensor) -> Tensor:
    y = m.b(F.relu(m.c(m.act(x))))
    return 0.6 * x + 0.8 * y


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Any:
            z = 0.6 * self.a(x) + 0.8 * F.relu(self.b(y))
            return (z, F.relu(z)) if mask is None else z * mask

    wiring = trace_wiring(Two())
    assert [n.path for n in wiring.nodes if n.op == "input"] == ["x", "y"]
    assert len(wiring.outputs) == 2
    same(wiring, half)


def test_shared_modules() -> None:
    act, layer = nn.ReLU(), nn.Linear(4, 4)
    net = nn.Sequential(layer, act, layer, act, nn.Sequential(act, layer))
    wiring = trace_wiring(net)
    assert wiring.depth == 3
    assert [n.path for n in wiring.nodes if n.op == "nonlinear"] == ["1", "3", "4.0"]


class Decoder(nn.Module):
    """Joins channels of an encoder to those of a decoder, as a U-Net does."""

    def __init__(self, way: Callable[[Any, Tensor, Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)
        self.up, self.pad = nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1)
        self.last, self.way = nn.Conv2d(12, 1, 1), way

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        return self.last(torch.cat(self.way(self, a, F.relu(self.b(a))), 1))


@pytest.mark.parametrize(
    "way",
    [
        lambda m, a, b: [m.up(b), a],
        lambda m, a, b: [b, m.pad(a)],
        lambda m, a, b: [F.pad(b, [1, a.size(3) - 1, 2, 0]), a],
        lambda m, a, b: [F.pad(b, pad=(1, 1)), F.interpolate(a, scale_factor=2.0)],
        lambda m, a, b: [b, a[:, :, 1:-1, 1:-1]],
    ],
)
def test_locations_can_be_resized_before_channels_are_joined(way: Any) -> None:
    wiring = trace_wiring(Decoder(way))
    (joined,) = (n for n in wiring.nodes if n.op == "concat")

    def depth(i: int) -> int:
        node = wiring.nodes[i]
        return (node.op == "nonlinear") + max(map(depth, node.inputs), default=0)

    assert {depth(i): w for i, w in zip(joined.inputs, joined.weights, strict=True)} == {1: 4, 2: 8}


@pytest.mark.parametrize(
    "way",
    [
        lambda m, a, b: [b, F.pad(a, (0, 0, 0, 0, 1, 1))],
        lambda m, a, b: [b, a[:, 1:]],
        lambda m, a, b: [b, a[:, 0, None]],
    ],
)
def test_what_cuts_or_pads_channels_leaves_their_number_unknown(way: Any) -> None:
    with pytest.raises(UnreadableError, match="subnet_max"):
        trace_wiring(Decoder(way))(0.0, lambda c: c)


def halves(m: Any, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, -1)
    return torch.cat([left, m.b(F.relu(right))], -1)


def thirds(m: Any, x: Tensor) -> Tensor:
    left, right = m.a(x).split([1, 3], -1)
    first, second = m.a(x).split(2, dim=-1)
    return torch.cat([left, m.b(F.relu(right)), first, F.relu(second)], -1)


def test_joining_needs_to_know_the_channels() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        wide = F.relu(m.a(x.flatten(1))).repeat(1, 3).flatten(1)
        return m.b(torch.cat([m.c(x.flatten(1)), wide], 1)[:, :4])

    net = Follow(way)
    blind = trace_wiring(net)
    with pytest.raises(UnreadableError, match=r"':cat' joins channels in proportions .* example"):
        blind(0.0, lambda c: c)
    net.eval()
    seen = trace_wiring(net, torch.zeros(2, 4))
    assert not any(m.training for m in net.modules())
    assert [n.weights for n in seen.nodes if n.op == "concat"] == [(4.0, 12.0)]
    same(seen, lambda x, r: max(r(x), 0.25 * x + 0.75 * r(x)))
    parts = trace_wiring(Follow(halves))
    assert [n.weights for n in parts.nodes if n.op == "concat"] == [(2.0, 4.0)]
    parts = trace_wiring(Follow(thirds))
    assert [n.weights for n in parts.nodes if n.op == "concat"] == [(1.0, 4.0, 2.0, 2.0)]
    tokens = trace_wiring(Follow(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1))))
    assert tokens.notes == ("':cat' joins along dimension 1, taken for that of channels",)


class Steered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if x.sum() > 0 else x


class Itself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.__dict__["me"] = self

    def forward(self, x: Tensor) -> Tensor:
        return self.me(self.layer(x))


UNREAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm1d(4), r"'1' .*BatchNorm1d.*strip_batchnorm=True"),
    "group norm": (lambda: nn.GroupNorm(2, 4), r"'1' .*GroupNorm.*nn.LayerNorm"),
    "functional norm": (lambda: Follow(lambda m, x: F.group_norm(x, 2)), "'1:group_norm' .*undoes"),
    "torch's attention": (lambda: nn.TransformerEncoderLayer(4, 2), "'1' .*Transformer.*attention"),
    "recurrent": (lambda: nn.LSTM(4, 4), "'1' .*LSTM is recurrent"),
    "steered by data": (Steered, r"'1' .*Steered cannot be followed.*control flow.*by hand"),
    "calls itself": (Itself, "'1.Itself' .*calls itself"),
    "gate": (lambda: Follow(lambda m, x: m.a(x) * m.b(x)), "'1:mul' .*multiplies values"),
    "its own sum": (
        lambda: Follow(lambda m, x: 0.6 * x + 0.8 * F.relu(x)),
        "'1:add' .*not independent.*'0'",
    ),
    "shared weights in a sum": (
        lambda: Follow(lambda m, x: 0.6 * m.a(x) + 0.8 * m.a(F.relu(x))),
        "'1:add' .*not independent.*'1.a'",
    ),
    "softmax inside": (lambda: Follow(lambda m, x: m.a(x.softmax(-1))), "'1:softmax' .*couples"),
    "unknown factor": (lambda: Follow(lambda m, x: x / x.shape[0]), "'1:truediv' .*its factor"),
    "comparison": (lambda: Follow(lambda m, x: torch.where(x > 0, x, 0.1 * x)), "'1:gt' .*gt is"),
    "along the batch": (
        lambda: Follow(lambda m, x: torch.cat([m.a(x), m.b(x)])),
        "'1:cat' .*dimension 0",
    ),
    "constants joined": (
        lambda: Follow(lambda m, x: torch.cat([x, torch.ones_like(x)], -1)),
        "'1:cat' .*does not depend",
    ),
    "scaled": (lambda: Follow(lambda m, x: F.relu(0.5 * x)), "'1:mul' multiplies by 0.5"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_names_what_it_cannot_read(name: str) -> None:
    make, message = UNREAD[name]
    wiring = trace_wiring(nn.Sequential(nn.Linear(4, 4), make(), nn.Tanh()))
    with pytest.raises(UnreadableError, match=message):
        wiring(0.0, lambda c: c)


def test_values_that_are_not_there_yet() -> None:
    net = Follow(lambda m, x: F.relu(m.gamma * m.a(x)), gamma=nn.Parameter(torch.ones(4)))
    with pytest.raises(UnreadableError, match=r"':mul' .*its factor is not known"):
        trace_wiring(net.to("meta"))(0.0, lambda c: c)
    assert trace_wiring(zoo.ResNet(50, 2, 0.5).to("meta")).depth == 49


def test_strips_batchnorm() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    same(trace_wiring(net, strip_batchnorm=True), one)


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv, self.add = zoo.conv(4, 4), NormalizedSum.shortcut(0.6)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.conv(self.act(self.norm(x))))


@pytest.mark.parametrize("block", [PreActivation, lambda: zoo.NormActBlock(4)])
def test_what_norms_give_is_no_longer_their_input(block: Callable[[], nn.Module]) -> None:
    net = nn.Sequential(zoo.conv(3, 4), block(), block())
    wiring = trace_wiring(net, strip_batchnorm=True)
    assert not wiring.unmixed
    first = next(i for i, node in enumerate(wiring.nodes) if node.op == "sum")
    assert {wiring.nodes[i].op for i in wiring.nodes[first].inputs} == {"affine"}


def test_weights_computed_from_others_are_independent() -> None:
    layers = [parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2)]
    net = Follow(lambda m, x: F.relu(0.6 * m.p(x) + 0.8 * m.q(F.relu(x))), p=layers[0], q=layers[1])
    same(trace_wiring(net), half)


def test_leaves_buffers_alone() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        m.count.add_(1)
        m.steps = m.count
        with torch.no_grad():
            m.a.weight.zero_()
        return F.relu(m.a(x)) * m.count

    net = Follow(way)
    net.register_buffer("count", torch.zeros(()))
    before = copy.deepcopy(net.state_dict())
    same(trace_wiring(net), one)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not hasattr(net, "steps")


ASKED: dict[str, Callable[[Any], bool]] = {
    "type": lambda y: type(y) is Tensor,
    "another name": lambda y, of=isinstance: of(y, Tensor),
    "map": lambda y: all(map(isinstance, [y], [Tensor])),
    "attrgetter": lambda y: operator.attrgetter("__class__")(y) is Tensor,
    "stars": lambda y: isinstance(*(y, Tensor)),
    "callable": lambda y: not callable(y),
    "error": lambda y: not raises(lambda: y + y.dim()) and raises(lambda: y.size(7)),
    "text": lambda y: f"{y}".startswith("tensor"),
    "text of an attribute": lambda y: str(y.device) == "cpu",
    "is": lambda y: y.dtype is torch.float32,
    "gradient": lambda y: y.requires_grad is False or y.requires_grad is True,
    "None": lambda y: y.grad_fn is None or not y.grad_fn is None,  # noqa: E714
    "key": lambda y: {torch.float32: True}.get(y.dtype, False),
}


def raises(run: Callable[[], Any]) -> bool:
    try:
        run()
    except Exception:
        return True
    return False


@pytest.mark.parametrize("name", ASKED)
def test_decisions_by_what_a_value_is_are_a_tensors_or_refused(name: str) -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return F.relu(m.b(y)) if ASKED[name](y) else y

    wiring = trace_wiring(Follow(way))
    if not wiring.problems:
        same(wiring, two)


def test_values_in_messages_and_lists_that_are_written_are_read() -> None:
    class Appends(nn.Module):
        def forward(self, parts: list[Tensor]) -> Tensor:
            parts[0] = F.relu(parts[0])
            return parts[0]

    def way(m: Any, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 2, f"expected 2 dimensions, got {x.ndim} of {x.shape!s}")
        return F.relu(m.b(m.appends([m.a(x)])))

    wiring = trace_wiring(Follow(way, appends=Appends()))
    assert not any("gives" in problem or "text" in problem for problem in wiring.problems)


def test_what_is_read_is_compared_on_an_example() -> None:
    class Odd(nn.Module):  # no input that fits is found for it
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x.view(3, 4)))
            return F.relu(self.b(y)) if ASKED["type"](y) else y

    assert "a decision that a trace does not see" in trace_wiring(Odd(), torch.ones(12)).problems[0]


def test_dead_branches_and_modules_never_called() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        m.b(torch.sigmoid(x)).softmax(-1)
        return F.relu(m.a(x))

    wiring = trace_wiring(Follow(way, unused=nn.ReLU()))
    same(wiring, one)
    assert wiring.notes == (
        "'c' (Linear) is never called",
        "'unused' (ReLU) is never called",
    )
    hooked = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    hooked[1].register_forward_hook(lambda *_: None)
    assert trace_wiring(hooked).notes == ("'1' (ReLU) has forward hooks, which were not read",)


def test_wrapped_models() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    same(trace_wiring(nn.DataParallel(net)), one)
    same(trace_wiring(torch.compile(net)), one)


def test_refuses() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        trace_wiring(one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no output of the model depends"):
        trace_wiring(Follow(lambda m, x: m.a.weight.sum()))


def test_ten_thousand_layers() -> None:
    layers = [m for _ in range(10_000) for m in (nn.Linear(1, 1), nn.ReLU())]
    assert trace_wiring(nn.Sequential(*layers)).label == "depth=10000"


class Branches(nn.Module):
    """A sum, a concatenation and a chain, wide enough to measure."""

    def __init__(self, width: int, spec: ActSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(5))
        self.halves = nn.ModuleList(nn.Linear(width, n * width // 4) for n in (1, 3))
        self.join = NormalizedSum.shortcut(0.6)
        self.act = ShapedActivation(spec)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e = self.layers
        x = self.join(a(x), b(self.act(c(x))))
        x = torch.cat([self.halves[0](x), self.act(self.halves[1](self.act(x)))], -1)
        return e(self.act(d(x)))


@pytest.mark.parametrize("activation", ["softplus", "leaky_relu"])
def test_predicts_what_wide_networks_do(activation: str) -> None:
    """The angle between two inputs comes out as the wiring says."""
    spec = ActSpec("leaky_relu", negative_slope=0.1, output_scale=math.sqrt(2 / 1.01))
    if activation == "softplus":
        spec = solve("DKS", "softplus", depth=5, zeta=3.0)
    width, c = 1600, 0.5
    wiring = trace_wiring(Branches(8, spec))
    predicted = wiring.whole(c, lambda v: c_map(spec, v))
    measured = []
    for seed in range(6):
        net = Branches(width, spec).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in net.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(0, width**-0.5, generator=generator)
                    layer.bias.zero_()
            x = torch.zeros(2, width, dtype=torch.float64)
            x[0, 0] = width**0.5
            x[1, :2] = width**0.5 * torch.tensor([c, math.sqrt(1 - c * c)])
            measured.append(F.cosine_similarity(*net(x), 0).item())
    # One layer of width n is off by about 1/√n, five of them by √5 as much, the mean of six nets
    # by 1/√6 of that; three times that.
    assert abs(sum(measured) / 6 - predicted) < 3 * math.sqrt(5 / 6 / width)
    assert abs(predicted - c) > 0.1


def test_torchvision_where_it_is() -> None:
    models = pytest.importorskip("torchvision.models")
    for name, depth in {"vgg11": 10, "vgg16": 15, "alexnet": 7}.items():
        assert trace_wiring(getattr(models, name)()).label == f"depth={depth}"
    for name, depth in {"resnet18": 17, "resnet50": 49, "resnet152": 151}.items():
        wiring = trace_wiring(getattr(models, name)(), strip_batchnorm=True)
        assert wiring.depth == depth
        own = trace_wiring(zoo.ResNet(int(name[6:]), 1, math.sqrt(0.5)))
        same(wiring.normalized(), own)


def test_names_what_has_no_forward_and_nothing_that_is_part_of_a_layer() -> None:
    lone = trace_wiring(nn.ModuleList([nn.Linear(4, 4), nn.ReLU()]))
    with pytest.raises(UnreadableError, match="ModuleList has no forward"):
        lone(0.0, lambda c: c)
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    assert trace_wiring(nn.Sequential(layer, nn.ReLU())).notes == ()
