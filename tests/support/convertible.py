"""Models that convert takes, one of each kind, and the check that conversion keeps the numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusedshape import ActSpec, reference
from fusedshape.convert import Report, convert
from fusedshape.kinds import FusedLayer, kind_of
from fusedshape.nn import (
    PerLocationNorm,
)
from tests.support.specs import shaped
from tests.support.zoo import AssertsShapes

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
    """A hook that changes nothing."""


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


def stack(depth: int, width: int = 6) -> nn.Sequential:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 2))
