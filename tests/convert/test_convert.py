"""convert: held to the plain model run with its ReLUs replaced by the reference, in float64."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fusedshape import reference, theory
from fusedshape.convert import convert
from fusedshape.diagnose import diagnose
from fusedshape.fold import fold
from fusedshape.nn import (
    NormalizedSum,
    PerLocationNorm,
    ShapedLinear,
)
from tests.support.convertible import (
    ROW,
    SPEC,
    VGG,
    ZOO,
    Asserting,
    Functional,
    Loop,
    Opaque,
    ResNet,
    Truth,
    batchnorms,
    check,
    conv,
    double,
    run,
    same,
    stack,
)
from tests.support.specs import shaped
from tests.support.zoo import AssertsShapes


def chain(n: int) -> Callable[[float, Callable[[float], float]], float]:
    def subnet_max(x: float, r: Callable[[float], float]) -> float:
        for _ in range(n):
            x = r(x)
        return x

    return subnet_max


@pytest.mark.parametrize("name", ZOO)
def test_computes_what_the_plain_model_would(name: str) -> None:
    make, x, fused, alone = ZOO[name]
    torch.manual_seed(0)
    report = check(make(), x)
    assert (report.counts["fused"], report.counts["shaped"]) == (fused, alone), str(report)
    report = check(make(), x, fuse=False)
    assert report.counts["fused"] == 0
    assert report.counts["shaped"] >= alone


@pytest.mark.parametrize("name", ["leaky_relu", "tanh", "swish"])
def test_other_activations(name: str) -> None:
    check(Functional(), ROW, shaped(name))


def test_parametrized_layers_are_left_to_themselves() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.ReLU()).double()
    plain = copy.deepcopy(net)
    report = convert(net, spec=SPEC)
    assert report.counts["fused"] == report.counts["initialised"] == 0
    assert "computed from other tensors" in report.skipped[0].note
    x = ROW.double()
    torch.testing.assert_close(net(x), reference.shaped_act(plain[0](x), SPEC))


def test_assertions_still_hold() -> None:
    net = AssertsShapes()
    convert(net, spec=SPEC)
    with pytest.raises(AssertionError, match="assert features == 6"):
        net(torch.zeros(3, 5))
    with pytest.raises(AssertionError, match="n > 1"):
        net(torch.zeros(1, 6))
    assert fold(net)(torch.zeros(2, 6)).shape == (2, 2, 3)


def test_delta_orthogonal_says_where_q_falls() -> None:
    def note(*widths: int) -> str:
        layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        notes = convert(nn.Sequential(*layers), spec=SPEC, init="delta_orthogonal").notes
        return " ".join(notes)

    assert note(6, 6, 4) == ""
    assert "2 layer(s) with more outputs than inputs" in note(4, 6, 6, 8)
    grouped = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.ConvTranspose2d(8, 8, 1, groups=4))
    report = convert(nn.Sequential(*grouped, nn.ReLU()), spec=SPEC, init="delta_orthogonal")
    assert "1 layer(s) with more" in report.notes[0]


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Linear(64, 64), ""),
        (nn.Linear(64, 32), ""),
        (nn.Linear(32, 128), "with more outputs"),
        (nn.Conv1d(16, 64, 3, padding=1), "with more outputs"),
        (nn.Conv2d(3, 64, 7, stride=2, padding=3), "with more outputs"),
        (nn.Conv2d(32, 64, 3, padding=1, groups=4), "with more outputs"),
        (nn.Conv2d(32, 64, 3, padding=1, groups=32), "with more outputs"),
        (nn.Conv2d(64, 64, 3, padding=1, stride=2), ""),
        (nn.Conv2d(16, 64, 2), "with an even kernel"),
        (nn.ConvTranspose2d(64, 64, 3, padding=1), ""),
        (nn.ConvTranspose2d(16, 64, 3, padding=1), "with more outputs"),
        (nn.ConvTranspose2d(64, 64, 3, stride=2, padding=1), "that are transposed and strided"),
        (nn.ConvTranspose2d(32, 64, 3, stride=2, groups=4), "that are transposed and strided"),
        (nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1), "with an even kernel"),
    ],
    ids=str,
)
def test_delta_orthogonal_keeps_the_q_that_constants_assume(layer: Any, why: str) -> None:
    layer = copy.deepcopy(layer).double()
    net = nn.Sequential(layer, nn.ReLU())
    draws = torch.Generator().manual_seed(0)
    report = convert(net, spec=SPEC, init="delta_orthogonal", generator=draws, fuse=False)
    notes = [note for note in report.notes if "Delta form" not in note]
    assert [why in note for note in notes] == [True] * bool(why)
    channels = getattr(layer, "in_channels", 0) or layer.in_features
    size = (20,) * (layer.weight.ndim - 2)
    x = torch.randn(64, channels, *size, dtype=torch.float64, generator=draws)
    z = layer(x)
    if size:  # without the border, where zero padding takes some
        z = z[(..., *[slice(4, -4)] * len(size))]
    # q is a mean over 64 locations and more, 64 · 32 numbers at least: 5 standard errors.
    assert z.square().mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(2 / (64 * 32)))


def test_delta_orthogonal_says_where_q_cannot_be_kept() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 4, 1, stride=2), nn.ReLU())
    notes = convert(net, spec=SPEC, init="delta_orthogonal").notes
    assert "does not reach all outputs alike, so that q falls there" in notes[0]


def test_diagnose_agrees_with_delta_orthogonal() -> None:
    torch.manual_seed(0)
    pairs = [(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(20)]
    first = [PerLocationNorm(), nn.Conv2d(4, 16, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*first, *itertools.chain(*pairs))
    convert(net, init="delta_orthogonal")
    assert "agree" in diagnose(net, torch.randn(16, 3, 8, 8)).verdict


def test_batchnorm_stripped() -> None:
    net = ResNet()
    report = convert(net, spec=SPEC, strip_batchnorm=True)
    assert report.counts["stripped"] == 6
    assert not batchnorms(net)
    assert "6 layer(s) have no bias" in str(report)


def test_hooks_come_along_and_can_still_be_removed() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.ReLU()).double()
    handle = net[2].register_forward_hook(double)
    convert(net, spec=SPEC)
    x = ROW.double()
    hooked = net(x)
    handle.remove()
    torch.testing.assert_close(hooked, 2 * net(x))


def test_forward_is_rewritten_once_for_all_alike() -> None:
    net = nn.Sequential(Functional(), Functional())
    convert(net, spec=SPEC)
    assert type(net[0]) is type(net[1])
    assert type(net[0]) is type(pickle.loads(pickle.dumps(net))[0])
    assert repr(net[0]).startswith("ShapedFunctional(")
    assert isinstance(net[0], Functional)
    assert list(inspect.signature(net[0].forward).parameters) == ["input"]
    single = nn.Sequential(Asserting())
    convert(single, spec=SPEC)
    assert "torch._assert" in inspect.getsource(single[0].forward)
    with pytest.raises(AssertionError, match="six columns"):
        single(torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("method", "activation"), [("TAT", "leaky_relu"), ("tat", "tanh"), ("DKS", "softplus")]
)
def test_depth_is_counted(method: str, activation: str) -> None:
    report = convert(stack(20), method=method, activation=activation)
    assert report.depth == 20
    assert report.spec == theory.solve(method, activation, depth=20)
    assert report.method == method.upper()


def test_depth_through_modules_and_functions() -> None:
    assert convert(nn.Sequential(Functional(), VGG().classifier), spec=SPEC).depth == 8
    assert convert(Loop(), spec=SPEC).depth == 4
    assert convert(VGG(), spec=SPEC).depth == 4
    assert convert(ResNet(), spec=SPEC, strip_batchnorm=True).depth == 5
    assert convert(Opaque(), spec=SPEC).depth == 2


class Shortcuts(nn.Module):
    """Three pre-activation blocks with normalised sums, and an activation before the head."""

    def __init__(self, join: nn.Module) -> None:
        super().__init__()
        self.fs = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(3)
        )
        self.join, self.act, self.head = join, nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs:
            x = self.join(x, f(x))
        return self.head(self.act(x))


class Plus(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def test_branches_need_no_recursion_by_hand() -> None:
    def recursion(x: float, r: Callable[[float], float]) -> float:
        alone = r(r(x))
        for _ in range(3):
            x = 0.36 * x + 0.64 * r(r(x))
        return max(alone, r(x))

    report = convert(Shortcuts(NormalizedSum((0.6, 0.8))), eta=0.5)
    assert report.depth == 7
    by_hand = theory.solve("TAT", "leaky_relu", subnet_max=recursion, eta=0.5)
    assert report.spec.negative_slope == pytest.approx(by_hand.negative_slope, rel=1e-12)
    with pytest.raises(ValueError, match=r"wiring: 'join:add' is a sum.*NormalizedSum"):
        convert(Shortcuts(Plus()), eta=0.5)


def test_depth_given() -> None:
    report = convert(stack(3), depth=20, dry_run=True)
    assert report.spec == theory.solve("TAT", "leaky_relu", depth=20)
    assert "longest path has 3" in str(report)
    wired = convert(ResNet(), subnet_max=chain(20), strip_batchnorm=True)
    assert wired.spec.negative_slope == pytest.approx(report.spec.negative_slope, rel=1e-9)
    clamped = convert(stack(3), clamp=True)
    assert clamped.spec == theory.solve("TAT", "leaky_relu", depth=3, clamp=True)


def test_edge_of_chaos() -> None:
    net = stack(3, 400)
    report = convert(
        net,
        method="EOC",
        activation="tanh",
        sigma_b=0.2,
        generator=torch.Generator().manual_seed(0),
    )
    edge = theory.eoc("tanh", sigma_b=0.2)
    assert report.spec == edge.spec
    w = net[2].weight.detach()
    torch.testing.assert_close(w @ w.T, edge.sigma_w**2 * torch.eye(400), rtol=1e-4, atol=1e-4)
    # The standard deviation of 400 draws is off by 3.5 %; five times that.
    assert net[2].bias.std().item() == pytest.approx(0.2, rel=0.18)


def test_initialises_every_layer() -> None:
    net = nn.Sequential(conv(3, 8), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    net[0].requires_grad_(False)
    net = net.to(memory_format=torch.channels_last).to(torch.bfloat16).eval()
    twin = copy.deepcopy(net)
    reports = [
        convert(m, spec=SPEC, generator=torch.Generator().manual_seed(3)) for m in (net, twin)
    ]
    assert reports[0].counts["initialised"] == 3
    assert "even kernel took suo_full" in str(reports[0])
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.dtype == torch.bfloat16
        assert p.requires_grad == (not name.startswith("0."))
        if p.ndim == 4 and p.shape[2] > 1:
            assert p.is_contiguous(memory_format=torch.channels_last)
        if p.ndim == 1:
            assert not p.any()
    assert not any(m.training for m in net.modules())
    taps = net[0].weight.count_nonzero((0, 1))
    assert taps[1, 1] > 0
    assert taps.sum() == taps[1, 1]


def test_plain_weights_load_into_the_converted_model() -> None:
    plain, net = Functional().double().eval(), Functional().double().eval()
    convert(net, spec=SPEC)
    net.load_state_dict(plain.state_dict())
    with Truth(SPEC):
        want = plain(ROW.double())
    torch.testing.assert_close(net(ROW.double()), want)


def test_a_failing_initialiser_leaves_the_model_alone() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.ConvTranspose1d(6, 6, 1, stride=2))
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match="at least as large as the stride"):
        convert(net, spec=SPEC)
    assert [type(m) for m in net.modules()] == [type(m) for m in before.modules()]
    for a, b in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_filter() -> None:
    asked = []

    def keep_first(name: str, module: nn.Module) -> bool:
        asked.append(name)
        return name != "1"

    net = nn.Sequential(*stack(2), Functional(), nn.LeakyReLU())
    report = convert(net, spec=SPEC, filter_fn=keep_first)
    assert sorted(asked) == ["1", "3", "5"]
    assert type(net[1]) is nn.ReLU
    assert type(net[2]) is ShapedLinear
    assert {(c.path, c.note) for c in report.skipped} == {
        ("1", "left alone by filter_fn"),
        ("6", "not among the classes to replace"),
    }
    functional = nn.Sequential(Functional(), nn.Linear(6, 6), nn.ReLU())
    convert(functional, spec=SPEC, filter_fn=lambda name, module: isinstance(module, nn.ReLU))
    assert type(functional[0]) is Functional
    assert type(functional[1]) is ShapedLinear


def test_replace_other_classes() -> None:
    class Gelus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.gelu(self.b(self.act(self.a(x)))))

    net = Gelus().double()
    x = ROW.double()
    want = reference.shaped_act(net.a(x), SPEC)
    want = F.relu(reference.shaped_act(net.b(want), SPEC))
    report = convert(net, spec=SPEC, init=None, replace=(nn.GELU, nn.SiLU))
    assert report.counts["fused"] == 2
    torch.testing.assert_close(net(x), want)


def test_parts_one_by_one() -> None:
    net = nn.Sequential(stack(2), stack(2))
    convert(net[0], spec=SPEC)
    convert(net[1], spec=shaped("tanh"))
    specs = [m.spec for m in net.modules() if isinstance(m, ShapedLinear)]
    assert specs == [SPEC, SPEC, shaped("tanh"), shaped("tanh")]


@pytest.mark.parametrize("name", ["vgg", "resnet", "functional", "by mode", "arithmetic"])
def test_compiles_whole(name: str) -> None:
    make, x, _, _ = ZOO[name]
    torch.manual_seed(0)
    net = make().double()
    x = x.double()
    convert(net, spec=SPEC, strip_batchnorm=True)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for training in (False, True):
        net.train(training)
        for got, want in zip(run(compiled, x), run(net, x), strict=True):
            same(got, want)


class Apply(nn.Module):
    """A layer and a functional activation, and another activation module handed in."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.relu(self.layer(x)) + self.layer(x))


@st.composite
def stacks(draw: st.DrawFn) -> nn.Module:
    acts = [nn.ReLU(), nn.ReLU()]
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)]

    def menu(depth: int) -> nn.Module:
        kind = draw(st.integers(0, 9 if depth else 8))
        if kind == 9:
            return nn.Sequential(*(menu(depth - 1) for _ in range(draw(st.integers(1, 4)))))
        return [
            *(lambda: nn.Linear(6, 6), nn.ReLU, lambda: nn.ReLU(inplace=True)),
            *(lambda: draw(st.sampled_from(acts)), lambda: draw(st.sampled_from(layers))),
            *(nn.Identity, lambda: nn.BatchNorm1d(6), lambda: nn.Dropout(0.5)),
            lambda: Apply(draw(st.sampled_from(acts))),
        ][kind]()  # type: ignore[operator]

    return nn.Sequential(*(menu(2) for _ in range(draw(st.integers(1, 6)))), nn.ReLU())


@hypothesis.settings(max_examples=40, deadline=None, database=None, derandomize=True)
@hypothesis.given(stacks(), st.integers(0, 2**31))
def test_random_stacks(net: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    plain, ours = net.double(), copy.deepcopy(net)
    x = ROW.double()
    convert(ours, spec=SPEC, init=None, strip_batchnorm=True)
    assert not any(isinstance(m, nn.ReLU) for m in ours.modules())
    for training in (True, False):
        plain.train(training)
        ours.train(training)
        torch.manual_seed(seed)
        with Truth(SPEC):
            want = plain(x.clone())
        torch.manual_seed(seed)
        torch.testing.assert_close(ours(x.clone()), want, rtol=1e-9, atol=1e-9)


class Choosy(nn.Module):
    """Asks for the type and the length of what it is given, as dense blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else x
        return self.body(torch.cat(parts, -1) if len(parts) > 1 else parts[0])


def test_one_untraceable_forward_costs_neither_the_wiring_nor_fusion_in_its_children() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Choosy(), nn.Linear(6, 6), nn.ReLU())
    report = convert(net, clamp=True)
    assert (report.depth, report.counts["fused"]) == (4, 4)
