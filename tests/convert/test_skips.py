"""convert(shortcuts=w): every sum of a model becomes a normalised one, before it is read."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedshape import TAT, NormalizedSum, ShapedActivation, convert, diagnose, theory
from fusedshape.theory import DKS, Unreachable


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


W = 0.8
V = 0.6
ROOT2 = 1 / math.sqrt(2)


class Given(nn.Module):
    """Layers a … e, and a forward given from outside."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        for name in "abcde":
            self.add_module(name, nn.Linear(6, 6))
        self.wide = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6))
        self.how = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


class Basic(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or inputs != width:
            conv = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet(width: int = 48, blocks: int = 2) -> nn.Sequential:
    """A small ResNet in the form of torchvision's."""
    stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
    body = [Basic(width, width) for _ in range(blocks)]
    body += [Basic(width, 2 * width, 2), *(Basic(2 * width, 2 * width) for _ in range(blocks - 1))]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)
    return nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(inplace=True), *body, *head)


@pytest.mark.parametrize(("w", "reweighted"), [(0.0, 0), (W, 4)])
def test_a_resnet_in_one_call(w: float, reweighted: int) -> None:
    net, x = resnet(), rand(2, 3, 8, 8).float()
    report = convert(net, normalisation="strip", shortcuts=w, example=x)
    assert report.counts["reweighted"] == reweighted
    assert report.counts["removed"] == 4 - reweighted
    assert net(x).isfinite().all()
    gone = [note for note in report.notes if "no longer called" in note]
    assert ["'5.downsample'" in note for note in gone] == [True] * (w == 0)
    assert any("the nearest was taken" in note for note in report.notes)


def test_a_target_that_was_given_is_not_replaced() -> None:
    for recipe in (TAT(eta=0.9), DKS("sin", zeta=5)):
        with pytest.raises(Unreachable, match="clamp=True"):
            convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), recipe)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    report = convert(net)
    assert report.spec == theory.solve(TAT(clamp=True), depth=1)
    assert report.recipe == TAT()


def test_dry_run_changes_nothing_and_says_the_same() -> None:
    net, x = resnet(), rand(2, 3, 8, 8).float()
    kinds, keys = [type(m) for m in net.modules()], list(net.state_dict())
    report = convert(net, strip_batchnorm=True, shortcuts=W, dry_run=True, example=x)
    assert [type(m) for m in net.modules()] == kinds
    assert list(net.state_dict()) == keys
    again = convert(net, strip_batchnorm=True, shortcuts=W, example=x)
    assert [row.path for row in report.changes] == [row.path for row in again.changes]
    assert report.counts == again.counts


def linear_pair(m: nn.Module, x: Tensor) -> Tensor:
    return F.relu(m.a(x) + m.b(x))  # type: ignore[operator]


def linear_three(m: nn.Module, x: Tensor) -> Tensor:
    return F.relu(x + m.a(x) + m.b(x))  # type: ignore[operator]


def three(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.b(F.relu(m.a(x))) + m.d(F.relu(m.c(x)))  # type: ignore[operator]


def merged(m: nn.Module, x: Tensor) -> Tensor:
    low = F.relu(m.a(x))  # type: ignore[operator]
    high = F.relu(m.b(low))  # type: ignore[operator]
    return torch.cat([m.c(low) + m.d(high), high], -1)  # type: ignore[operator]


def numbered(m: nn.Module, x: Tensor) -> Tensor:
    return x + 0.17 * m.b(F.relu(m.a(x)))  # type: ignore[operator]


def alpha(m: nn.Module, x: Tensor) -> Tensor:
    return torch.add(x, m.b(F.relu(m.a(x))), alpha=2)  # type: ignore[operator]


def by_size(m: nn.Module, x: Tensor) -> Tensor:
    return m.wide(F.relu(m.a(x))) + m.c(F.relu(m.b(x)))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("forward", "weights"),
    [
        (linear_pair, [(ROOT2, ROOT2)]),
        (linear_three, [(3**-0.5,) * 3]),
        (three, [(W, V * ROOT2, V * ROOT2)]),
        (merged, [(ROOT2, ROOT2)]),
        (numbered, [(W, V)]),
        (alpha, [(W, V)]),
        (by_size, [(W, V)]),
    ],
)
def test_every_sum_keeps_q(forward: Callable[..., Tensor], weights: list[tuple[float]]) -> None:
    net = nn.Sequential(nn.Linear(6, 6), Given(forward), nn.ReLU())
    convert(net, TAT(clamp=True), shortcuts=W)
    sums = [m.weights for m in net.modules() if isinstance(m, NormalizedSum)]
    assert len(sums) == len(weights)
    for got, want in zip(sums, weights, strict=True):
        assert got == pytest.approx(want)


def test_the_number_is_gone_from_the_forward() -> None:
    net = nn.Sequential(nn.Linear(6, 6), Given(numbered), nn.ReLU()).double()
    convert(net, TAT(clamp=True), shortcuts=W, fuse=False)
    x = rand(3, 6)
    block = net[1]
    x = net[0](x)
    act = next(m for n, m in block.named_modules() if "shaped" in n)
    want = W * x + V * block.b(act(block.a(x)))
    torch.testing.assert_close(block(x), want, rtol=1e-13, atol=1e-13)


def tie(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x))) + m.d(F.relu(m.c(x)))  # type: ignore[operator]


def test_what_nobody_can_tell() -> None:
    net = nn.Sequential(nn.Linear(6, 6), Given(tie), nn.ReLU())
    with pytest.raises(ValueError, match=r"which is the shortcut.*on_ambiguous='report'"):
        convert(net, shortcuts=W)
    report = convert(net, shortcuts=W, on_ambiguous="report")
    assert any("nobody can tell" in row.note for row in report.changes)
    assert net[1].skip_0.weights == pytest.approx((ROOT2, ROOT2))


class Opaque(Given):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x) if x.sum() > 0 else x


def test_one_module_does_not_refuse_the_model() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Given(numbered), Opaque(numbered))
    with pytest.raises(ValueError, match=r"may hold a skip connection.*on_untraceable='report'"):
        convert(net, shortcuts=W, depth=3)
    report = convert(net, shortcuts=W, depth=3, on_untraceable="report", clamp=True)
    assert any(row.path == "3" and "may hold a skip" in row.note for row in report.skipped)
    assert report.counts["reweighted"] == 1


def test_no_sum_is_a_note_and_a_wrong_name_an_error() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))

    assert any("no sum x + f(x)" in note for note in convert(net(), shortcuts=W).notes)
    with pytest.raises(ValueError, match=r"convert: \['9'\] fit no module"):
        convert(net(), shortcuts={"9": 0.5})
    with pytest.raises(ValueError, match=r"convert: shortcuts=1\.5 is outside 0"):
        convert(net(), shortcuts=1.5)


@pytest.mark.parametrize("w", [0.0, W])
def test_a_preactivation_net_is_healthy(w: float) -> None:
    def block(m: nn.Module, x: Tensor) -> Tensor:
        return x + m.b(F.relu(m.a(F.relu(x))))  # type: ignore[operator]

    def wide() -> Given:
        net = Given(block)
        net.a, net.b = nn.Linear(128, 128), nn.Linear(128, 128)
        return net

    net = nn.Sequential(nn.Linear(128, 128), *(wide() for _ in range(8)), nn.ReLU())
    convert(net, shortcuts=w)
    assert diagnose(net, torch.randn(64, 128)).verdict == "theory and measurement agree"


class Stem(nn.Module):
    """The order of torchvision's ResNet: an activation, a max-pool, and blocks without a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer = nn.Sequential(*(Basic(width, width) for _ in range(3)))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(self.maxpool(self.relu(self.conv(x)))).mean((2, 3)))


def test_blocks_that_activate_the_sum_become_healthy() -> None:
    net, x = Stem(96), torch.randn(8, 3, 12, 12)
    keys = [key for key in net.state_dict() if "bn" not in key]
    report = convert(net, strip_batchnorm=True, shortcuts=W)
    assert any("3 activation(s) before a skip connection" in note for note in report.notes)
    assert not any("q drifts" in note for note in report.notes)
    assert list(net.state_dict()) == keys
    assert diagnose(net, x).verdict == "theory and measurement agree"


def test_the_shortcut_carries_what_the_activation_took() -> None:
    net, x = Stem(4).double(), rand(2, 3, 6, 6)
    convert(net, TAT(clamp=True), strip_batchnorm=True, shortcuts=W, fuse=False)
    phi = next(m for m in net.modules() if isinstance(m, ShapedActivation))
    z = net.maxpool(net.conv(x))
    for block in net.layer:
        z = W * z + V * block.conv2(phi(block.conv1(phi(z))))
    torch.testing.assert_close(net(x), net.fc(phi(z).mean((2, 3))), rtol=1e-12, atol=1e-12)
    again = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)


def in_one_forward(m: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))  # type: ignore[operator]
    x = F.relu_(x + m.b(x))  # type: ignore[operator]
    return F.relu(x + m.d(F.relu(m.c(x))))  # type: ignore[operator]


def test_the_same_in_one_forward() -> None:
    net, x = Given(in_one_forward).double(), rand(3, 6)
    convert(net, TAT(clamp=True), shortcuts=W, fuse=False)
    phi = next(m for m in net.modules() if isinstance(m, ShapedActivation))
    z = net.a(x)
    z = W * z + V * net.b(phi(z))
    z = W * z + V * net.d(phi(net.c(phi(z))))
    torch.testing.assert_close(net(x), phi(z), rtol=1e-12, atol=1e-12)


class Feature(Stem):
    """Returns what its first activation gives, which therefore stays where it is."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        return torch.cat([self.layer(x).mean((2, 3)), x.mean((2, 3))], 1)


def test_an_activation_that_others_take_stays() -> None:
    report = convert(Feature(4), TAT(clamp=True), strip_batchnorm=True, shortcuts=W)
    assert any("2 activation(s) before a skip connection" in note for note in report.notes)
    assert any("q drifts" in note for note in report.notes)
