"""reweight_shortcuts: all ways to write x + f(x), what is no skip, and convert afterwards."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import ActSpec, NormalizedSum, ShapedLinear, convert, reweight_shortcuts
from fusedshape.models import rescaled_resnet, vanilla_resnet
from fusedshape.models.resnet import RescaledBlock
from fusedshape.theory.network import resnet
from fusedshape.theory.trace import trace_wiring
from tests.support.zoo import V1

W = 0.8
SLOPED = ActSpec("leaky_relu", negative_slope=0.3, output_scale=1.2)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def iadd(x: Tensor, y: Tensor) -> Tensor:
    y += x
    return y


ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + f": lambda x, f: x + f,
    "f + x": lambda x, f: f + x,
    "f += x": iadd,
    "x += f": lambda x, f: iadd(f, x),
    "torch.add": lambda x, f: torch.add(x, f),
    "torch.add by name": lambda x, f: torch.add(input=f, other=x),
    "Tensor.add": lambda x, f: f.add(x),
    "Tensor.add_": lambda x, f: f.add_(x),
}


class Block(nn.Module):
    """A branch of two layers, and a way to add it to x."""

    def __init__(self, how: str, width: int = 6) -> None:
        super().__init__()
        self.one = nn.Linear(width, width)
        self.two = nn.Linear(width, width)
        self.how = how

    def branch(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))

    def forward(self, x: Tensor) -> Tensor:
        return ADDS[self.how](x, self.branch(x))


@pytest.mark.parametrize("how", ADDS)
@pytest.mark.parametrize("w", [0.0, 0.8, 1.0])
def test_every_way_to_add(how: str, w: float) -> None:
    net = nn.Sequential(Block(how), nn.ReLU(), Block(how)).double()
    keys = list(net.state_dict())
    x = rand(5, 6)
    want = x
    for layer in net:
        if isinstance(layer, Block):
            want = w * want + math.sqrt(1 - w * w) * layer.branch(want)
        else:
            want = layer(want)
    report = reweight_shortcuts(net, w)
    torch.testing.assert_close(net(x.clone()), want, rtol=1e-13, atol=1e-13)
    assert report.counts == {"reweighted": 2 * (w > 0), "removed": 2 * (w == 0), "left": 0}
    assert [change.path for change in report.changes] == ["0", "2"]
    assert list(net.state_dict()) == keys
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x.clone()), net(x.clone()))
        assert type(twin[0]) is type(net[0]) is type(net[2])


def test_weight_1_of_a_branch_that_overflows_is_not_nan() -> None:
    net = nn.Sequential(Block("x + f"))
    reweight_shortcuts(net, 1.0)
    with torch.no_grad():
        net[0].two.bias.fill_(math.inf)
    x = torch.ones(1, 6)
    assert torch.equal(net(x), x)


class V2(nn.Module):
    """Activation before the convolutions, the projection behind the first one."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.project = None
        if stride != 1 or channels != out:
            self.project = nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(x)
        shortcut = x if self.project is None else self.project(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(out))
        return shortcut + out

    def by_hand(self, x: Tensor, w: float) -> Tensor:
        shortcut = x if self.project is None else self.project(x.relu())
        branch = self.conv2(self.conv1(x.relu()).relu())
        return w * shortcut + math.sqrt(1 - w * w) * branch


def residual(kind: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), kind(8, 8), kind(8, 12, 2), kind(12, 12)
    ).double()


@pytest.mark.parametrize("kind", [V1, V2])
def test_blocks_of_residual_nets(kind: type[nn.Module]) -> None:
    net = residual(kind)
    x = rand(2, 3, 8, 8)
    want = net[0](x)
    for block, w in zip(net[1:], (0.5, 0.5, 0.0), strict=True):
        want = block.by_hand(want, w)
    report = reweight_shortcuts(net, {"3": 0.0, "[12]": 0.5})
    torch.testing.assert_close(net(x), want, rtol=1e-13, atol=1e-13)
    assert report.counts == {"reweighted": 2, "removed": 1, "left": 0}
    with pytest.raises(ValueError, match=r"\['\*'\] fit no module .* \['1', '2', '3'\]"):
        reweight_shortcuts(residual(kind), {"1": 0.1, "2": 0.1, "3": 0.1, "*": 0.1})


@pytest.mark.parametrize("kind", [V1, V2])
@pytest.mark.parametrize("drop", [False, True])
def test_no_skips_at_all(kind: type[nn.Module], drop: bool) -> None:
    net = residual(kind)
    x = rand(2, 3, 8, 8)
    want = net[0](x)
    for block in net[1:]:
        want = block.by_hand(want, 0.0)
    keys = set(net.state_dict())
    report = reweight_shortcuts(net, 0.0, drop_unused=drop)
    torch.testing.assert_close(net(x), want, rtol=1e-13, atol=1e-13)
    (projection,) = report.unused
    assert projection in ("2.downsample", "2.project")
    gone = keys - set(net.state_dict())
    assert gone == ({k for k in keys if k.startswith(projection)} if drop else set())
    assert f"no longer called: {projection}" in str(report)
    assert not any(isinstance(m, NormalizedSum) for m in net.modules())
    net(x).sum().backward()
    assert all((p.grad is None) == n.startswith(projection) for n, p in net.named_parameters())


class PassedOn(nn.Module):
    """A branch without activation, and a shortcut that an identity passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x) + self.layer(x)


def test_a_shortcut_may_pass_an_identity() -> None:
    net, x = PassedOn().double(), rand(3, 4)
    want = 0.8 * x + 0.6 * net.layer(x)
    assert reweight_shortcuts(net, 0.8).changes[0].now == "0.8·scale + 0.6·layer"
    torch.testing.assert_close(net(x), want)


class Odd(nn.Module):
    """Holds a forward given from outside, and layers for it."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcd":
            self.add_module(name, nn.Linear(4, 4))
        self.position = nn.Parameter(torch.randn(4))


class Position(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu() + self.position


class Pyramid(Odd):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.a(x).relu()
        high = self.b(low).relu()
        return self.c(low) + high, high


class TwoInputs(Odd):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x).relu() + y


class ThreeBranches(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x).relu() + self.b(x).relu()


class Weighted(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.a(x).relu()


class Alpha(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.a(x).relu(), alpha=2)


class Twice(Odd):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return x + x


@pytest.mark.parametrize(
    ("kind", "inputs", "why"),
    [
        (Position, 1, "does not depend on the input"),
        (Pyramid, 1, "relu_1, inside a branch, is used outside"),
        (TwoInputs, 2, "come from different inputs"),
        (ThreeBranches, 1, "more than two branches"),
        (Weighted, 1, "a number as its weight already"),
        (Alpha, 1, "a number as its weight already"),
        (Twice, 1, "both operands are the same"),
    ],
)
def test_what_is_no_skip_is_left_alone(kind: type[Odd], inputs: int, why: str) -> None:
    net = nn.ModuleList([kind(), Block("x + f", 4)]).double()
    x = rand(3, 4)
    before = net[0](*[x] * inputs)
    report = reweight_shortcuts(net, W)
    torch.testing.assert_close(net[0](*[x] * inputs), before, rtol=0, atol=0)
    assert type(net[0]) is kind
    assert {change.path for change in report.skipped} == {"0"}
    assert all(why in change.note for change in report.skipped)
    assert report.counts["left"] == len(report.skipped) == (2 if kind is ThreeBranches else 1)
    assert report.to_dict()["counts"] == report.counts
    assert str(report).count(why) == len(report.skipped)


class Nested(Odd):
    """A skip inside the branch of another."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.a(x).relu()
        return x + self.d(inner + self.c(self.b(inner).relu()))

    def by_hand(self, x: Tensor, w: float) -> Tensor:
        v = math.sqrt(1 - w * w)
        inner = self.a(x).relu()
        return w * x + v * self.d(w * inner + v * self.c(self.b(inner).relu()))


class Transformer(Odd):
    """Two skips, one after the other, the first branch without a nonlinear layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.c(self.b(x).relu())

    def by_hand(self, x: Tensor, w: float) -> Tensor:
        v = math.sqrt(1 - w * w)
        x = w * x + v * self.a(x)
        return w * x + v * self.c(self.b(x).relu())


class Reused(Odd):
    """The sum in place, known by its old name afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.add_(self.c(self.b(x).relu()))
        return self.d(x)

    def by_hand(self, x: Tensor, w: float) -> Tensor:
        x = self.a(x)
        return self.d(w * x + math.sqrt(1 - w * w) * self.c(self.b(x).relu()))


@pytest.mark.parametrize("kind", [Nested, Transformer, Reused])
def test_several_in_one_forward(kind: type[Odd]) -> None:
    net = kind().double()
    x = rand(3, 4)
    want = net.by_hand(x, W)
    report = reweight_shortcuts(net, W)
    torch.testing.assert_close(net(x), want, rtol=1e-13, atol=1e-13)
    assert report.counts["reweighted"] == (1 if kind is Reused else 2)


class PostActivation(Odd):
    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.a(x)).relu()
        return (x + self.c(self.b(x).relu())).relu()


class PreActivation(Odd):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.b(x.relu())
        return (x + self.d(self.c(x.relu()).relu())).relu()


@pytest.mark.parametrize("kind", [PostActivation, PreActivation])
def test_warns_of_sums_of_activations_that_are_activated(kind: type[Odd]) -> None:
    report = reweight_shortcuts(kind(), W)
    assert [bool(change.note) for change in report.changes] == [kind is PostActivation] * 2


def test_long_forwards_take_linear_time() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(500))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x.relu())
            return x

    assert reweight_shortcuts(Long(), W).counts["reweighted"] == 500


class ByMode(Odd):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if self.training:
            y = self.b(y).relu()
        return x + y


def test_training_and_evaluation_stay_apart() -> None:
    net = ByMode().double()
    x = rand(3, 4)
    inner = net.a(x).relu()
    report = reweight_shortcuts(net, W)
    assert report.counts["reweighted"] == 2
    torch.testing.assert_close(net(x), W * x + 0.6 * net.b(inner).relu(), rtol=1e-13, atol=1e-13)
    net.eval()
    torch.testing.assert_close(net(x), W * x + 0.6 * inner, rtol=1e-13, atol=1e-13)
    assert convert(net, spec=SLOPED).counts["rewritten"] == 1
    assert net.train()(x).shape == net.eval()(x).shape


class Tie(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu() + self.b(x).relu()


class Unreadable(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x).relu() if x.sum() > 0 else x


class Halves(Odd):
    """Its only sum is one of sizes; it cannot be traced, as it takes an optional argument."""

    def forward(self, x: Tensor, at: int | None = None) -> Tensor:
        low = x.shape[-1] // 2 if at is None else at
        return torch.cat([self.a(x)[:, : low + 1], self.b(x)[:, low + 1 :]], 1)


def test_a_sum_of_sizes_is_no_skip() -> None:
    net = nn.Sequential(Halves(), Block("x + f", 4))
    assert reweight_shortcuts(net, W).counts["reweighted"] == 1
    assert type(net[0]) is Halves


class Keeper(Odd):
    """Goes on using a tensor that its child has added to."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block("x += f", 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.block(x)) * x


class Viewer(Odd):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        rows = x.view(-1)
        x += self.b(x).relu()
        return x * rows.view(-1, 4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Tie, "adds relu \\+ relu_1, each 1 nonlinear layer.*which is the shortcut.*filter_fn"),
        (Unreadable, "may hold a skip connection, but its forward cannot be traced.*filter_fn"),
        (Keeper, "adds in place to a tensor that Keeper uses again afterwards"),
        (Viewer, "adds in place to a tensor that Viewer uses again afterwards"),
    ],
)
def test_refusals_name_the_module_and_change_nothing(kind: type[Odd], message: str) -> None:
    net = kind()
    classes = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=message):
        reweight_shortcuts(net, W)
    assert [type(m) for m in net.modules()] == classes
    pair = nn.ModuleList([net, Block("x + f", 4)])
    report = reweight_shortcuts(pair, W, filter_fn=lambda path, module: not path.startswith("0"))
    assert report.counts["reweighted"] == 1
    assert [type(m) for m in net.modules()] == classes


def test_the_caller_may_go_on_with_what_it_gets() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Block("x += f", 4), nn.ReLU()).double()
    x = rand(2, 4)
    want = (W * net[0](x) + 0.6 * net[1].branch(net[0](x))).relu()
    reweight_shortcuts(net, W)
    torch.testing.assert_close(net(x), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (1.5, ValueError, "=1.5 is outside 0"),
        (math.nan, ValueError, "=nan is outside 0"),
        ({"0": -0.1}, ValueError, r"\['0'\]=-0.1 is outside"),
        ("0.5", TypeError, "'0.5' is no number"),
        ({"1": True}, TypeError, "True is no number"),
        ({"7": 0.5}, ValueError, r"\['7'\] fit no module.*\['0'\]"),
    ],
)
def test_bad_weights(weight, error, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        reweight_shortcuts(nn.Sequential(Block("x + f")), weight)


def test_bad_models() -> None:
    with pytest.raises(TypeError, match=r"must be an nn.Module, got int"):
        reweight_shortcuts(3, W)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found no sum"):
        reweight_shortcuts(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), W)
    report = reweight_shortcuts(
        nn.Sequential(nn.TransformerEncoderLayer(4, 2), Block("x + f", 4)), W
    )
    assert "torch's own forward" in report.skipped[0].note


def test_dry_run_and_no_entry() -> None:
    net = residual(V1)
    report = reweight_shortcuts(net, {"1": 0.5}, dry_run=True)
    assert [type(m) for m in net] == [nn.Conv2d, V1, V1, V1]
    assert report.counts == {"reweighted": 1, "removed": 0, "left": 2}
    assert "would change" in str(report)
    assert {c.note for c in report.skipped} == {"no entry of shortcut_weight fits"}
    assert str(reweight_shortcuts(net, {"1": 0.5})).replace("changed", "would change") == str(
        report
    )


def test_compiles_and_trains() -> None:
    net = residual(V2).float()
    reweight_shortcuts(net, {"1": 0.8, "2": 0.0, "3": 0.5})
    run = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = rand(2, 3, 8, 8).float()
    torch.testing.assert_close(run(x), net(x))
    run(x).sum().backward()


def q_values(net: nn.Sequential) -> list[float]:
    """Mean squares behind each module, for inputs of q = 1 everywhere."""
    seen: list[float] = []
    for block in net:
        block.register_forward_hook(lambda m, args, y: seen.append(y.square().mean().item()))
    x = torch.randn(4, 128, 6, 6, generator=torch.Generator().manual_seed(1))
    net(x / x.square().mean(1, keepdim=True).sqrt())
    return seen


def wide(kind: type[nn.Module], w: float | None) -> tuple[nn.Sequential, str]:
    net = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), *(kind(128, 128) for _ in range(6)))
    report = "" if w is None else str(reweight_shortcuts(net, w))
    convert(net, method="TAT", depth=20, generator=torch.Generator().manual_seed(0))
    return net, report


@pytest.mark.parametrize(("kind", "w"), [(V1, 0.0), (V2, 0.0), (V2, 0.6), (V2, 0.9)])
def test_then_convert_keeps_q_at_1(kind: type[nn.Module], w: float) -> None:
    net, report = wide(kind, w)
    assert "drifts" not in report
    # What a width of 128 lets it wander over the twelve layers of the branches.
    assert q_values(net) == pytest.approx([1.0] * 7, abs=0.3)


def test_the_warning_about_activated_sums_is_true() -> None:
    net, report = wide(V1, 0.6)
    assert report.count("q drifts from 1") == 6
    assert q_values(net)[-1] > 4


@pytest.mark.parametrize("kind", [V1, V2])
def test_without_reweighting_q_explodes(kind: type[nn.Module]) -> None:
    net, _ = wide(kind, None)
    assert q_values(net)[-1] > 15


def test_convert_then_reweight_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Block("x + f", 4))
    convert(net, spec=SLOPED)
    with pytest.raises(ValueError, match=r"'0' is a ShapedLinear.*reweight first, then convert"):
        reweight_shortcuts(net, W)


def test_reweighted_then_converted_is_the_block_by_hand() -> None:
    net = nn.Sequential(Block("x + f", 4)).double()
    reweight_shortcuts(net, W)
    convert(net, spec=SLOPED, init=None)
    block = net[0]
    x = rand(3, 4)
    inner = SLOPED.output_scale * F.leaky_relu(F.linear(x, block.one.weight, block.one.bias), 0.3)
    want = W * x + 0.6 * block.two(inner)
    torch.testing.assert_close(net(x), want, rtol=1e-13, atol=1e-13)
    assert isinstance(block.one, ShapedLinear)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def test_rescaled_resnet_without_shortcuts_is_vanilla() -> None:
    rescaled = rescaled_resnet(50, 0.0, num_classes=5, width=4).double()
    vanilla = vanilla_resnet(50, num_classes=5, width=4).double()
    layers = [
        layer
        for part in rescaled
        for layer in (
            [m for m in part.branch if isinstance(m, nn.Conv2d)]
            if isinstance(part, RescaledBlock)
            else [part]
        )
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    plain = [m for m in vanilla if isinstance(m, (nn.Conv2d, nn.Linear))]
    for ours, theirs in zip(layers, plain, strict=True):
        theirs.load_state_dict(ours.state_dict())
    x = rand(2, 3, 32, 32)
    torch.testing.assert_close(rescaled(x), vanilla(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("w", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("depth", [18, 34, 50])
def test_rescaled_resnet_has_the_wiring_of_the_theory(depth: int, w: float) -> None:
    net = rescaled_resnet(depth, w, num_classes=5, width=2)
    wiring, theory = trace_wiring(net), resnet(depth, w)
    for r in (lambda y: 1.02 * y, lambda y: y + 0.01):
        assert wiring(1.0, r) == pytest.approx(theory(1.0, r), rel=1e-12)
    report = convert(net, method="TAT", clamp=True)
    assert report.counts["fused"] + report.counts["shaped"] == wiring.depth
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_rescaled_resnet_refuses() -> None:
    with pytest.raises(ValueError, match=r"depth=20; known: \[18, 34"):
        rescaled_resnet(20)
    with pytest.raises(ValueError, match="weight=2 is outside"):
        rescaled_resnet(18, 2, width=1)
