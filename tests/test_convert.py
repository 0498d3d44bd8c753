"""convert: held to the plain model run with its ReLUs replaced by the reference, in float64."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from conftest import shaped
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from zoo import AssertsShapes, NormAct, NormActBlock

from fusedshape import ActSpec, reference, theory
from fusedshape.convert import Report, convert
from fusedshape.diagnose import diagnose
from fusedshape.fold import fold
from fusedshape.kinds import FusedLayer, kind_of
from fusedshape.nn import (
    NormalizedSum,
    PerLocationNorm,
    ShapedActivation,
    ShapedConv2d,
    ShapedLinear,
    is_place,
)
from fusedshape.shortcuts import reweight_shortcuts

SPEC = shaped("softplus")


class Truth(TorchFunctionMode):
    """Runs a plain model as if its ReLUs were the reference's activation and its BatchNorms not."""

    def __init__(self, spec: ActSpec) -> None:
        super().__init__()
        self.spec = spec

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return args[0].clone()  # what may be changed in place
        name = getattr(func, "__name__", "")
        if name not in ("relu", "relu_"):
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        y = reference.shaped_act(x, self.spec)
        return x.copy_(y) if name == "relu_" or kwargs.get("inplace") else y


def chain(n: int) -> Callable[[float, Callable[[float], float]], float]:
    def subnet_max(x: float, r: Callable[[float], float]) -> float:
        for _ in range(n):
            x = r(x)
        return x

    return subnet_max


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for item in (out.values() if isinstance(out, dict) else out) for t in tensors(item)]


def run(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of all parameters."""
    torch.manual_seed(0)  # dropout
    out = tensors(model(x.clone()))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = sum((t.sin() * torch.arange(1, t.numel() + 1).view_as(t)).sum() for t in out)
    return out, list(
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    )


def same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def batchnorms(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def check(model: nn.Module, x: Tensor, spec: ActSpec = SPEC, **kwargs: Any) -> Report:
    """Convert a copy, hold it to the truth in both modes, and to all the promises on the way."""
    plain = model.double()
    x = x.double()
    norms = batchnorms(plain)
    kwargs = {"spec": spec, "init": None, "strip_batchnorm": bool(norms), **kwargs}
    ours = copy.deepcopy(plain)
    objects, before = list(ours.modules()), {k: id(v) for k, v in ours.named_parameters()}
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    dry = convert(ours, dry_run=True, **kwargs)
    assert [id(m) for m in ours.modules()] == [id(m) for m in objects]
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())

    report = convert(ours, **kwargs)
    assert report.changes == dry.changes
    assert report.counts == dry.counts
    assert isinstance(ours, type(plain))
    keys = [k for k in state if k.rpartition(".")[0] not in norms]
    assert list(ours.state_dict()) == keys
    assert all(id(p) == before[k] for k, p in ours.named_parameters())
    for path, module in plain.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) or module in objects[:1]:
            found = ours.get_submodule(path)
            assert type(found) is type(module) or isinstance(found, FusedLayer)
            assert kind_of(found) == kind_of(module)
    again = pickle.loads(pickle.dumps(ours))
    copied = copy.deepcopy(ours)
    for training in (False, True):
        for net in (plain, ours, again, copied):
            net.train(training)
        with Truth(spec):
            outputs, grads = run(plain, x)
        grads = [
            g
            for g, (k, _) in zip(grads, plain.named_parameters(), strict=True)
            if k.rpartition(".")[0] not in norms
        ]
        for net in (ours, again, copied):
            got, got_grads = run(net, x)
            same(got, outputs)
            same(got_grads, grads)
    return report


def count(model: nn.Module, cls: type) -> int:
    return sum(type(m) is cls for m in model.modules())


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROW = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def conv(i: int, o: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **kwargs)


class BasicBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(i, o, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(o, o, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 4, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 8, 2))
        self.fc = nn.Linear(8, 2)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = F.adaptive_avg_pool2d(self.layer1(x), 1)
        return self.fc(torch.flatten(x, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(conv(3, 4), nn.ReLU(True), conv(4, 4), nn.ReLU(True), nn.MaxPool2d(2)),
            *(conv(4, 8), nn.ReLU(True), nn.MaxPool2d(2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(32, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(x.view(x.size(0), -1))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(7))
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.register_buffer("shift", torch.tensor(0.1))

    def forward(self, input: Tensor) -> Tensor:
        a, b, c, d, e, f, g = self.layers
        x = F.relu(a(input))
        x = torch.relu(b(x) * self.scale)
        x = c(x).relu()
        x = F.relu(input=d(x), inplace=True)
        x = e(x).relu_()
        x = F.dropout(f(x), 0.5, self.training)
        x = torch.relu_(x + self.shift)
        return F.relu_(g(x))


class ByMode(nn.Module):
    """Training's graph is not evaluation's, and F.relu follows a layer in one of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = x * 2
        x = F.relu(x)
        return F.relu(self.b(x)) if self.training else F.relu(self.b(x)) + 1


class Twice(nn.Module):
    """One layer called twice, once followed by ReLU and once not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.act(self.layer(x)))


class TwiceAlike(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(self.act(self.layer(x))))


class Features(nn.Module):
    """Hands out what lies between layer and activation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Any]:
        kept = []
        for layer in self.body:
            x = layer(x)
            kept.append(x)
        return {"last": x, "all": kept[:2]}


class Loop(nn.Module):
    """Calls the layers of a Sequential itself, and the Sequential too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = layer(x)
        return self.body(x)


class Opaque(nn.Module):
    """Branches on its input's shape, which no trace can follow; only calls its children."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.layer, self.relu = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            x = self.body(x)
        return self.relu(self.layer(x))


class OpaqueLoop(Opaque):
    def forward(self, x: Tensor) -> list[Tensor]:
        kept = [x] if x.shape[0] > 1 else []
        for layer in self.body:
            kept.append(layer(kept[-1]))
        return kept


class OpaqueReaching(nn.Module):
    """Cannot be traced, and calls a layer inside its child besides the child."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Asserting()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block.layer(x) if x.shape[0] > 1 else x


class OpaqueSharing(nn.Module):
    """Cannot be traced, and shares its activation with its child."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.body = nn.Sequential(nn.Linear(6, 6), self.relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x) if x.shape[0] > 1 else x


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = conv(3, 3), conv(3, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.conv1(self.relu(x))))


class Arithmetic(nn.Module):
    """Arithmetic in place, seen through another name; numbers that only look like it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = y
        y += 1
        y *= 2
        n = rows = x.size(0)
        n *= 2
        y = F.relu(y.view(n, -1)).view(rows, -1) + z
        y -= self.b(F.relu(self.b(x)))
        y /= 3
        return y + z


class Asserting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == 6, "six columns")
        rows, columns = x.shape
        return F.relu(self.layer(x)).view(rows, columns)


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Outer(nn.Module):
    """The same functional code in several instances, one of them registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Functional()
        self.again = self.first
        self.other = Functional()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.again(self.first(x)), self.other(x)


def hooked(name: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    net[int(name == "act")].register_forward_hook(double)
    return net


def hooked_twice_alike() -> nn.Module:
    net = TwiceAlike()
    net.act.register_forward_hook(double)
    return net


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


def shared_sequential() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(6, 6), relu, nn.Linear(6, 6), relu, nn.Tanh(), relu)


def shared_everywhere() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(6, 6), relu, nn.Sequential(nn.Linear(6, 6), relu))


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    return net


LINE = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(2))


class First(nn.Module):
    """Activates what it is given; its last layer's output goes out as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(F.relu(x)).relu())


class LayerNorms(nn.Module):
    """A layer and its BatchNorm, called twice, and activated outside."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.act, self.last = nn.ReLU(inplace=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.block(self.act(self.block(x)))))


class EndsByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.training else self.b(x)


class TakesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.first = nn.Linear(6, 6), First()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.first(y) + y


def see(module: nn.Module, args: Any, out: Any) -> None:
    """A hook that only looks."""


def watched_block() -> nn.Module:
    net = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.ReLU())
    net[0].register_forward_hook(see)
    return net


def block_twice() -> nn.Module:
    first = First()
    return nn.Sequential(nn.Linear(6, 6), first, first, nn.ReLU())


CUBE = torch.randn(1, 2, 5, 5, 5, generator=torch.Generator().manual_seed(3))
ZOO: dict[str, tuple[Callable[[], nn.Module], Tensor, int, int]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), ROW, 1, 0),
    "vgg": (VGG, IMAGE, 4, 0),
    "resnet": (ResNet, IMAGE, 3, 2),
    "functional": (Functional, ROW, 5, 2),
    "by mode": (ByMode, ROW, 1, 1),
    "twice": (Twice, ROW, 0, 1),
    "twice alike": (TwiceAlike, ROW, 1, 0),
    "features": (Features, ROW, 1, 1),
    "loop": (Loop, ROW, 2, 0),
    "opaque": (Opaque, ROW, 1, 1),
    "opaque loop": (OpaqueLoop, ROW, 0, 2),
    "asserting": (Asserting, ROW, 1, 0),
    "arithmetic": (Arithmetic, ROW, 0, 2),
    "opaque, reaching inside": (OpaqueReaching, ROW, 0, 1),
    "opaque, sharing": (OpaqueSharing, ROW, 0, 1),
    "hook on the activation of a module": (hooked_twice_alike, ROW, 0, 1),
    "pre-activation": (PreActivation, IMAGE, 1, 1),
    "outer": (Outer, ROW, 10, 4),
    "shared in a Sequential": (shared_sequential, ROW, 0, 1),
    "shared, all fused": (shared_everywhere, ROW, 2, 0),
    "tied weights": (tied, ROW, 1, 0),
    "hook on the layer": (lambda: hooked("layer"), ROW, 0, 1),
    "hook on the activation": (lambda: hooked("act"), ROW, 0, 1),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, stride=2), nn.ReLU()), LINE, 1, 0),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3, dilation=2), nn.ReLU()), CUBE, 1, 0),
    "circular": (
        lambda: nn.Sequential(conv(3, 6, groups=3, padding_mode="circular"), nn.ReLU()),
        *(IMAGE, 1, 0),
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU()), IMAGE, 0, 1),
    "own forward": (lambda: nn.Sequential(OwnConv(3, 4, 3), nn.ReLU()), IMAGE, 0, 1),
    "pool between": (
        lambda: nn.Sequential(conv(3, 4), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5)),
        *(IMAGE, 0, 1),
    ),
    "dropout between": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.ReLU()),
        *(ROW, 0, 1),
    ),
    "identity between": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.ReLU()),
        *(ROW, 1, 0),
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(6, 6))), nn.ReLU()),
        *(ROW, 1, 0),
    ),
    "nested, activation inside": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6))),
        *(ROW, 1, 0),
    ),
    "activation first": (lambda: nn.Sequential(nn.Linear(6, 6), First(), First()), ROW, 4, 0),
    "block called twice": (block_twice, ROW, 1, 2),
    "layer and norm": (LayerNorms, ROW, 1, 0),
    "block that ends by mode": (lambda: nn.Sequential(EndsByMode(), nn.ReLU()), ROW, 0, 1),
    "sum beside a block": (TakesTwo, ROW, 1, 1),
    "hook on a block": (watched_block, ROW, 0, 1),
    "asserting shapes": (AssertsShapes, ROW, 1, 0),
    "two activations": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.ReLU()), ROW, 1, 1),
    "norm in front": (
        lambda: nn.Sequential(PerLocationNorm(), conv(4, 4), nn.ReLU()),
        *(IMAGE, 1, 0),
    ),
}


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


def stack(depth: int, width: int = 6) -> nn.Sequential:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 2))


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
    assert convert(Opaque(), spec=SPEC).depth is None


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


def test_report() -> None:
    net = nn.Sequential(stack(2), nn.MaxPool1d(2), nn.ReLU())
    report = convert(net, spec=SPEC, dry_run=True)
    text = str(report)
    assert "would change: 2 fused, 1 shaped, 3 initialised" in text
    assert "not fused: its input comes from MaxPool1d" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert ActSpec.from_dict(data["spec"]) == SPEC
    assert data["counts"]["fused"] == 2
    assert [row["path"] for row in data["changes"]] == ["0.0", "0.1", "0.2", "0.3", "2"]
    assert data["dry_run"] is True


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.calls = 0


class NoGrad(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.layer(x)
        return F.relu(x)


class Autocast(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.layer(x)
        return F.relu(x)


class Checkpointed(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False))


class GradSetter(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        x = self.layer(x)
        torch.set_grad_enabled(True)
        return F.relu(x)


class Logging(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x)
        return F.relu(self.layer(x))


class Buffering(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x[0]
        return F.relu(self.layer(x))


class Counting(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.layer(x))


class Caching(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.cache = self.layer(x)
        return F.relu(self.cache)


class LayerDrop(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else F.relu(self.layer(x))


class TensorDrop(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x)) if torch.rand(1).item() < 2 else x


class Noise(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x) + torch.ones(6))


class Typed(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            x = x[0]
        return F.relu(self.layer(x))


class Matched(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        match x:
            case list():
                x = x[0]
        return F.relu(self.layer(x))


class Optional(Stateful):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = F.relu(self.layer(x))
        return x if mask is None else x * mask


class Variadic(Stateful):
    def forward(self, *xs: Tensor) -> Tensor:
        return F.relu(self.layer(xs[0]))


class Branching(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x)) if x.sum() > 0 else x


def helper(x: Tensor) -> Tensor:
    return F.relu(x) if x.sum() > 0 else x


class Helped(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        return helper(self.layer(x))


class ByAttribute(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.act = F.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x)) if x.sum() > 0 else x


UNTRACEABLE = {
    NoGrad: "no_grad",
    Autocast: "autocast",
    Checkpointed: "saved_tensors_hooks",
    GradSetter: "switches gradients off",
    Counting: "changes its attribute calls",
    Caching: "changes its attribute cache",
    Logging: "changes its attribute log",
    Buffering: "changes its attribute last",
    LayerDrop: "random numbers",
    TensorDrop: "random numbers",
    Noise: "do not depend on its input",
    Typed: "isinstance",
    Matched: "isinstance",
    Optional: "optional argument, mask",
    Variadic: r"takes \*xs",
    Branching: "control flow",
    Helped: "control flow",
    ByAttribute: "control flow",
}


# What takes other ways with other inputs; the rest computes the same thing every time.
UNREADABLE = (LayerDrop, TensorDrop, Branching, Helped, ByAttribute)


@pytest.mark.parametrize("cls", UNTRACEABLE)
def test_refuses_to_rewrite_what_it_cannot_trace(cls: type[Stateful]) -> None:
    net = nn.Sequential(cls(), nn.Linear(6, 6), nn.ReLU())
    attributes = {k: copy.copy(v) for k, v in vars(net[0]).items()}
    state = random.getstate(), torch.get_rng_state()
    with pytest.raises(ValueError, match=UNTRACEABLE[cls]) as caught:
        convert(net, spec=SPEC, init=None)
    assert "'0'" in str(caught.value)
    assert "relu" in str(caught.value)
    assert vars(net[0]) == attributes, "tracing leaves nothing behind"
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert type(net[1]) is nn.Linear
    report = convert(net, spec=SPEC, init=None, on_untraceable="report")
    assert "may call activations that stay" in report.skipped[0].note
    assert type(net[0]) is cls
    assert type(net[1]) is ShapedLinear
    net = nn.Sequential(cls(), nn.ReLU())
    if cls in UNREADABLE:
        with pytest.raises(ValueError, match="cannot read the model's wiring: '0'"):
            convert(net, on_untraceable="report")
    else:
        assert convert(net, on_untraceable="report", clamp=True).depth == 2


class Selecting(nn.Module):
    """Asks for types, but not in its forward; torch's own functions do."""

    def __init__(self) -> None:
        super().__init__()
        assert isinstance(self, nn.Module)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(torch.where(x > 0, x, 1.0)))


def test_functions_of_torch_may_ask_for_types() -> None:
    net, x = Selecting().double(), torch.randn(3, 6, dtype=torch.float64)
    want = reference.linear_act(x.where(x > 0, 1.0), net.layer.weight, net.layer.bias, SPEC)
    assert convert(net, spec=SPEC, init=None).counts["fused"] == 1
    assert torch.allclose(net(x), want, rtol=1e-12, atol=1e-12)


def test_notes_activations_of_activations() -> None:
    block = [nn.Linear(6, 6), nn.ReLU(), nn.Dropout(), nn.ReLU()]
    notes = convert(nn.Sequential(*block), clamp=True).notes
    assert "'3'" in notes[-1]
    assert "q drifts" in notes[-1]
    mixed = nn.Sequential(*block[:3], nn.Linear(6, 6), nn.ReLU())
    assert not any("drifts" in note for note in convert(mixed, clamp=True, dry_run=True).notes)


def test_layer_scales_are_named_where_sums_are_off() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(6, 6), nn.Parameter(1e-3 * torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * F.relu(self.layer(x))

    net = nn.Sequential(nn.Linear(6, 6), Scaled())
    reweight_shortcuts(net, 0.8)
    with pytest.raises(ValueError, match=r"its present value, 0.001, was read: .* set it to 1"):
        convert(net, clamp=True)
    nn.init.ones_(net[1].scale)
    assert convert(net, clamp=True).depth == 1


class AddsActivations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 512), nn.Linear(512, 512)
        self.add = NormalizedSum.shortcut(0.6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.add(x, F.relu(self.second(x)))


def test_notes_sums_of_activations() -> None:
    net = nn.Sequential(AddsActivations(), nn.Linear(512, 512))
    (note,) = convert(net, clamp=True, generator=torch.Generator().manual_seed(0)).notes
    assert note.startswith("the sum '0.add' adds activations' outputs, whose means (0.318 of")
    growth = float(note.partition("grows there, ")[2].partition(" times")[0])
    with torch.no_grad():
        measured = net[0](torch.randn(256, 512)).square().mean().item()
    assert growth == pytest.approx(1 + 2 * 0.48 / torch.pi, rel=1e-2)
    assert measured == pytest.approx(growth, rel=0.1)
    net = nn.Sequential(AddsActivations(), nn.Linear(512, 512))
    assert not convert(net, method="DKS", activation="tanh").notes


def test_untraceable_without_functional_calls_is_fine() -> None:
    report = convert(Opaque(), spec=SPEC)
    assert "not traced" in report.skipped[0].note
    assert "may call" not in report.skipped[0].note


def test_transformer_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match="TransformerEncoderLayer"):
        convert(layer, spec=SPEC)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.relu = nn.Linear(6, 6), nn.ReLU(inplace=True)


class Discarded(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        F.relu_(x)
        return x


class ShortcutActivated(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + self.layer(self.relu(x))


class ThroughView(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.relu(x.view(-1)).sum() + x


class ThroughChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.branch = nn.Sequential(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + self.branch(x)


@pytest.mark.parametrize("cls", [Discarded, ShortcutActivated, ThroughView, ThroughChild])
def test_refuses_in_place_activation_of_a_tensor_used_again(cls: type[nn.Module]) -> None:
    if cls is ThroughChild:
        net: nn.Module = cls()
        # x + f(x): the sum's left operand is read after the branch has run
    else:
        net = nn.Sequential(cls())
    with pytest.raises(ValueError, match="used again"):
        convert(net, spec=SPEC)


class NormAndAct(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var))


def test_refuses_to_strip_what_does_more_than_normalise() -> None:
    net = nn.Sequential(nn.Linear(6, 6), NormAndAct(6), nn.ReLU())
    with pytest.raises(ValueError, match="'1' is a NormAndAct, a BatchNorm whose own forward"):
        convert(net, spec=SPEC, strip_batchnorm=True)
    wiring = theory.trace_wiring(net, strip_batchnorm=True)
    assert wiring.depth == 2
    assert "'1:batch_norm' cannot be read" in wiring.problems[0]


def test_strips_batchnorm_that_activates() -> None:
    net = nn.Sequential(conv(3, 6), NormAct(6), NormActBlock(6), nn.Conv2d(6, 6, 1), NormAct(6))
    report = check(net, IMAGE)
    assert (report.counts["stripped"], report.counts["fused"], report.counts["shaped"]) == (5, 3, 1)
    wiring = theory.trace_wiring(net, strip_batchnorm=True)
    assert wiring.depth == 4
    assert next(node.path for node in wiring.nodes if node.op == "nonlinear") == "1.act"


@torch.fx.wrap
def sometimes(x: Tensor, training: bool) -> Tensor:
    """What a trace does not look into."""
    return 2 * x if training else x


class AddsToItsActivation(nn.Module):
    """A residual block that ends with its activation, to which the shortcut is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Sequential(conv(6, 6), nn.ReLU(inplace=True)))
        self.drop = nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = sometimes(self.drop(self.block(x)), self.training)
        y += x
        return y.mul_(0.5)


class ScaledAct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), 0.5, self.training, inplace=True).mul_(1.5)


def test_what_changes_an_activation_in_place_works_out_of_place() -> None:
    blocks = nn.Sequential(AddsToItsActivation(), conv(6, 6), ScaledAct(), AddsToItsActivation())
    head = nn.Sequential(conv(6, 6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5, inplace=True))
    drop = nn.Dropout2d(0.5, inplace=True)  # what it changes, backward does not need
    net = nn.Sequential(conv(3, 6), drop, *blocks, *head, nn.Linear(384, 3))
    report = check(net, IMAGE)
    assert "add_ out of place, as what it changed is needed" in str(report)
    out_of_place = [c.path for c in report.changes if c.now.endswith("out of place")]
    assert out_of_place == ["2.drop", "5.drop", "9"]
    convert(net, spec=ActSpec("swish"))
    assert net[2].drop.inplace  # whose φ′ comes from its input
    assert type(net[2]) is AddsToItsActivation


class SeesTheChange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x)
        y.view(-1).mul_(2)
        return y


def test_refuses_changes_in_place_of_activations_that_are_seen() -> None:
    with pytest.raises(ValueError, match=r"changes in place \(mul_\) a tensor that is used again"):
        convert(nn.Sequential(nn.Linear(6, 6), SeesTheChange()), spec=SPEC)


def test_strips_batchnorm_that_activates_with_what_others_use() -> None:
    act, other = nn.ReLU(inplace=True), nn.SiLU(inplace=True)
    net = nn.Sequential(conv(3, 6), NormAct(6, act), nn.AvgPool2d(2), act)
    net += nn.Sequential(conv(6, 6), NormAct(6, other))
    report = check(net, IMAGE)
    assert (report.counts["fused"], report.counts["shaped"]) == (0, 1)
    # What the norm's copy would have kept apart.
    net = nn.Sequential(conv(3, 6), nn.ReLU(), NormAct(6, other), NormAct(6, nn.Identity()))
    report = check(nn.Sequential(net, nn.Hardtanh(inplace=True)), IMAGE)
    assert [c.path for c in report.changes if c.now.endswith("out of place")] == ["0.2.act", "1"]
    first = nn.Sequential(conv(3, 6), nn.ReLU())
    check(nn.Sequential(first, NormAct(6, nn.SiLU(inplace=True))), IMAGE)


def test_normalisations_that_do_more_are_not_said_to_be_nothing() -> None:
    norm = nn.GroupNorm(2, 6)
    norm.act = nn.ReLU()
    with pytest.raises(ValueError, match="Replace it by its act"):
        convert(nn.Sequential(conv(3, 6), norm), spec=SPEC)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, 6, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_standardised_weights_are_refused_for_what_they_are() -> None:
    with pytest.raises(ValueError, match=r"'0' \(Standardised\) standardises its weights"):
        convert(nn.Sequential(Standardised(3, 6, 3), nn.ReLU()), spec=SPEC)


def test_gates_are_not_proposed_as_activations() -> None:
    with pytest.raises(ValueError, match=r"nn.Sigmoid: pass replace=\[nn.SiLU\]"):
        convert(nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Sigmoid()), spec=SPEC)


class OwnGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


def test_functions_are_proposed_as_activations() -> None:
    with pytest.raises(ValueError, match=r"there are nn.GELU: pass replace=\[nn.GELU\]"):
        convert(nn.Sequential(nn.Linear(6, 6), OwnGelu()), spec=SPEC)


class InPlaceAfterNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        y += 1
        return F.relu(self.fc(y)) + x


def test_strips_where_the_norm_made_the_copy() -> None:
    report = check(InPlaceAfterNorm(), ROW)
    assert "add_ out of place" in str(report)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.acts = [self.act]

    def forward(self, x: Tensor) -> Tensor:
        return self.acts[0](x)


class NormFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, 2))


def converted() -> nn.Module:
    net = stack(2)
    convert(net, spec=SPEC)
    return net


def rewritten() -> nn.Module:
    net = Functional()
    convert(net, spec=SPEC)
    return net


def compiled_in_place() -> nn.Module:
    net = stack(2)
    net.compile()
    return net


def act_and(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *modules, nn.ReLU())


class NeverCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "no module": (lambda: torch.zeros(3), "must be an nn.Module"),
    "bare activation": (nn.ReLU, "ShapedActivation"),
    "no activation": (lambda: nn.Linear(2, 2), "found no activation"),
    "twice": (converted, "converted once"),
    "twice, rewritten": (rewritten, "converted once"),
    "data parallel": (lambda: nn.DataParallel(stack(2)), r"\.module"),
    "compiled": (lambda: torch.compile(stack(2)), r"\._orig_mod"),
    "compiled inside": (lambda: nn.Sequential(torch.compile(stack(2))), r"'0'.*\._orig_mod"),
    "compiled in place": (compiled_in_place, "compiled already"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3), nn.ReLU()), "run the model once"),
    "meta": (lambda: stack(2).to("meta"), "to_empty"),
    "quantised": (
        lambda: act_and(torch.ao.nn.quantized.FloatFunctional()),
        "quantised",
    ),
    "batchnorm": (lambda: act_and(nn.BatchNorm1d(6)), "strip_batchnorm=True"),
    "syncbatchnorm": (lambda: act_and(nn.SyncBatchNorm(6)), "strip_batchnorm=True"),
    "instancenorm": (lambda: act_and(nn.InstanceNorm1d(6)), "nn.Identity"),
    "groupnorm": (lambda: act_and(nn.GroupNorm(2, 6)), "nn.Identity"),
    "group_norm": (NormFunction, "F.group_norm"),
    "other activations": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6), nn.Tanh()),
        r"pass replace=\[nn.SiLU, nn.Tanh\]",
    ),
    "never called": (NeverCalled, "no activation lies between"),
    "held in a list": (Held, "plain list, .acts"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_refuses(name: str) -> None:
    make, message = REFUSALS[name]
    net = make()
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        convert(net, spec=SPEC)
    assert str(caught.value).startswith("convert: ")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "BN"}, "known: TAT, DKS, EOC"),
        ({"spec": "tanh"}, "must be an ActSpec"),
        ({"spec": SPEC, "depth": 3}, "spec is ready"),
        ({"method": "EOC", "activation": "relu", "depth": 3}, "EOC knows no depth"),
        ({"sigma_b": 0.1}, "belongs to EOC"),
        ({"depth": 3}, "clamp=True"),
        ({"on_untraceable": "ignore"}, "known: 'error', 'report'"),
        ({"spec": SPEC, "backend": "cuda"}, "unknown backend"),
        ({"spec": SPEC, "init": "he"}, "unknown method 'he'"),
        ({"spec": SPEC, "replace": ("ReLU",)}, "nn.Module classes"),
        ({"spec": SPEC, "filter_fn": lambda name, module: False}, "relu .*filter_fn.$"),
        ({"spec": SPEC, "filter_fn": "relu"}, "filter_fn must be callable or None, got 'relu'"),
        ({"spec": SPEC, "generator": 3}, "generator must be a torch.Generator or None, got 3"),
        ({"spec": SPEC, "replace": nn.ReLU}, "must be a sequence of classes, got .*ReLU"),
    ],
)
def test_refuses_arguments(kwargs: dict[str, Any], message: str) -> None:
    net = stack(3)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        convert(net, **kwargs)
    assert count(net, nn.ReLU) == 3
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_refuses_activations_with_parameters() -> None:
    with pytest.raises(ValueError, match="parameters would be lost"):
        convert(nn.Sequential(nn.Linear(2, 2), nn.PReLU()), spec=SPEC, replace=(nn.PReLU,))


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


def test_modules_made() -> None:
    net = nn.Sequential(conv(3, 4), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU())
    convert(net, spec=SPEC)
    assert [type(m) for m in net] == [ShapedConv2d, nn.Identity, nn.MaxPool2d, ShapedActivation]


class Mixed(nn.Module):
    """Functional activations, one that two layers share, and one that is not fused."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        y = self.two(x)
        return self.act(self.three(F.relu(y))) + y  # type: ignore[no-any-return]


def test_a_place_stands_where_each_fused_activation_stood() -> None:
    net = Mixed()
    convert(net, spec=shaped("tanh"), init=None)
    kinds = {name: type(m) for name, m in net.named_children()}
    assert kinds["one"] is kinds["three"] is ShapedLinear
    assert kinds["two"] is nn.Linear
    assert {name for name, m in net.named_children() if is_place(m)} == {"act", "fused_0"}
    assert kinds["shaped_0"] is ShapedActivation
    calls: list[str] = []
    for name, m in net.named_children():
        m.register_forward_hook(lambda *_, name=name: calls.append(name))
    net(torch.zeros(3, 6))
    assert calls == ["one", "fused_0", "two", "shaped_0", "three", "act"]


class Unnormalised(nn.Module):
    """A sum of weights 1 and 1, and a product of two values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.two(F.relu(self.one(x)))
        return y * torch.sigmoid(y)[:, :1]


@pytest.mark.parametrize("given", [{"depth": 20}, {"spec": SPEC}, {"method": "EOC"}])
def test_what_a_wiring_would_have_refused_is_said_when_none_is_read(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot read the model's wiring"):
        convert(nn.Sequential(Unnormalised(), nn.Linear(6, 6)))
    activation = {"activation": "relu"} if "method" in given else {}
    report = convert(nn.Sequential(Unnormalised(), nn.Linear(6, 6)), **given, **activation)
    notes = [note for note in report.notes if "the constants do not know of this" in note]
    assert any("'0:add' is a sum" in note for note in notes)
    assert any("'0:mul' cannot be read" in note for note in notes)
    assert not any("pass depth=" in note for note in notes)


class DeadEnds(nn.Module):
    """Computes what nobody takes, of a layer's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        _ = y[0], y.shape[0], torch.tanh(y), self.two(y)
        parts = torch.split(F.relu(y), 3, 1)
        _ = parts[0]
        return x + self.two(torch.cat((parts[0], parts[1]), 1))


def test_what_nobody_takes_hides_nothing() -> None:
    net = nn.Sequential(DeadEnds())
    report = convert(net, spec=SPEC, init=None)
    assert report.counts["fused"] == 1
    assert reweight_shortcuts(nn.Sequential(DeadEnds()), 0.8).counts["reweighted"] == 1


class Record(OrderedDict[str, Tensor]):
    """A mapping that takes numbers too, as those of some libraries do."""

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@dataclass
class Pair:
    first: Tensor
    second: Tensor


class Named(NamedTuple):
    first: Tensor
    second: Tensor


RECORDS: dict[str, tuple[Callable[..., Any], Callable[[Any], Tensor]]] = {
    "mapping by number": (lambda x: Record(first=x, second=x), lambda r: r[0]),
    "mapping by name": (lambda x: Record(first=x, second=x), lambda r: r["second"]),
    "ordered mapping": (lambda x: OrderedDict(first=x), lambda r: r["first"]),
    "dict": (lambda x: {"first": x}, lambda r: r["first"]),
    "dataclass": (lambda x: Pair(x, x), lambda r: r.second),
    "named tuple": (lambda x: Named(x, x), lambda r: r.second),
    "named tuple by number": (lambda x: Named(x, x), lambda r: r[0]),
    "list": (lambda x: [x, x], lambda r: r[-1]),
}


class Packing(nn.Module):
    def __init__(self, pack: Callable[..., Any], functional: bool) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), F.relu if functional else nn.ReLU()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.act(self.layer(x)))


class Unpacking(nn.Module):
    def __init__(self, name: str, functional: bool) -> None:
        super().__init__()
        pack, self.part = RECORDS[name]
        self.inner, self.head = Packing(pack, functional), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.inner(x)))


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("name", RECORDS)
def test_outputs_that_hold_tensors_by_name(name: str, functional: bool) -> None:
    net = Unpacking(name, functional)
    wanted = type(net.inner(ROW))
    report = convert(net, clamp=True)
    assert report.depth == 1
    assert report.counts["initialised"] == 2
    assert type(net.inner(ROW)) is wanted
    assert net(ROW).shape == ROW.shape


def test_an_item_that_is_not_there_is_no_bare_error() -> None:
    class Wrong(Unpacking):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)["third"])

    with pytest.raises(ValueError, match=r"cannot read .*third"):
        convert(Wrong("mapping by name", functional=False))


class Collecting(nn.ModuleDict):
    """Asks what its children return, as wrappers that collect features do."""

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for child in self.values():
            x = child(x)
            if isinstance(x, (tuple, list)):
                x = x[0]
            found.append(x)
        return found


def test_a_wrapper_that_asks_what_its_children_return_is_followed() -> None:
    parts = {"one": stack(2), "two": Functional(), "three": nn.Sequential(nn.Linear(6, 6))}
    net = Collecting(parts)
    report = convert(net, spec=SPEC)
    assert report.counts["fused"] >= 2
    assert not any("not traced" in change.note for change in report.changes)


def test_positions_that_strided_layers_do_not_read_are_named() -> None:
    def make() -> nn.Sequential:
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(8, 8, 1, 2), nn.Flatten(), nn.LazyLinear(4))

    image = torch.randn(2, 3, 32, 32, requires_grad=True)
    for init, named in (("suo", True), ("delta_orthogonal", True), ("suo_full", False)):
        net = make()
        net(image)
        notes = " ".join(convert(net, spec=SPEC, init=init).notes)
        assert ("'0', '2' read one position" in notes) is named
        if named:
            (grad,) = torch.autograd.grad(net(image).square().sum(), image)
            seen = int((grad.abs().amax((0, 1)) > 0).sum())
            assert seen * 64 == 32 * 32
            assert "1/64 of the input's reach the output" in notes
            assert "suo_full" in notes


@pytest.mark.parametrize("asked", ["requires_grad", "is_leaf", "retains_grad"])
def test_branches_on_gradients_are_refused(asked: str) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            return 2 * y if getattr(y, asked) is True else y

    with pytest.raises(ValueError, match=f"it asks what the {asked} of a value is"):
        convert(nn.Sequential(Asks(), nn.Linear(4, 4)), depth=20)
