"""fold: the same numbers from stock torch modules alone."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedshape import (
    ACTIVATIONS,
    ActSpec,
    NormalizedSum,
    PerLocationNorm,
    ShapedActivation,
    ShapedChain,
    ShapedConv1d,
    ShapedConv2d,
    ShapedConv3d,
    ShapedLinear,
    convert,
    fold,
    reweight_shortcuts,
)
from fusedshape.models import rescaled_resnet, vanilla_convnet, vanilla_mlp
from tests.support import zoo
from tests.support.operands import LEAKY
from tests.support.specs import shaped

SPEC = shaped("softplus")
TRELU = ActSpec("leaky_relu", negative_slope=0.3, output_scale=1.35)
FALLING = ActSpec("tanh", -0.7, 0.2, -0.35, -1.9)
MIRRORED = ActSpec("leaky_relu", -0.7, 0.0, -0.35, -1.9, 0.37)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> nn.Module:
    """Weights and biases that are not what they start with."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.double().parameters():
        fan = max(parameter[0].numel(), 1)
        parameter.data = torch.randn(parameter.shape, generator=generator).double() / fan**0.5
    return model.eval()


def assert_stock(folded: nn.Module) -> None:
    """Fail if a module or function of this library is left in the model."""
    assert isinstance(folded, fx.GraphModule)
    assert all(type(m).__module__.startswith("torch.") for m in folded.modules() if m is not folded)
    for node in folded.graph.nodes:
        if node.op == "call_function":
            home = str(getattr(node.target, "__module__", "")) or "torch"
            assert home.partition(".")[0] in ("torch", "_operator", "builtins"), node.format_node()
    assert b"fusedshape" not in pickle.dumps(folded)


def assert_same(model: nn.Module, *inputs: Tensor, keep_delta: bool = False) -> fx.GraphModule:
    """Fold, and hold it to the model's numbers in float64."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold(model, keep_delta=keep_delta, example=inputs)
    want = model(*[x.clone() for x in inputs])
    got = folded(*[x.clone() for x in inputs])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())
    assert_stock(folded)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the model is left alone"
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not theirs & {p.data_ptr() for p in folded.parameters()}, "and shares nothing"
    return folded


def kinds(folded: nn.Module) -> list[str]:
    return [type(m).__name__ for m in folded.modules() if type(m) is not nn.Module][1:]


@pytest.mark.parametrize("keep_delta", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str, keep_delta: bool) -> None:
    """Fused into convolutions and linear layers, by itself after a layer, after a pool, at last."""
    spec = shaped(name)
    net = nn.Sequential(
        ShapedConv2d(2, 5, 3, padding=1, spec=spec),
        ShapedConv2d(5, 5, 3, padding=1, stride=2, bias=False, spec=spec),
        nn.Conv2d(5, 5, 3, padding=1),
        nn.AvgPool2d(2),
        ShapedActivation(spec),
        nn.Conv2d(5, 4, 2),
        nn.Flatten(),
        ShapedLinear(4, 4, spec=spec),
        nn.Linear(4, 3, bias=False),
        ShapedActivation(spec),
    )
    folded = assert_same(randomised(net), rand(2, 2, 8, 8), keep_delta=keep_delta)
    assert kinds(folded).count("ConstantPad2d") == (0 if keep_delta else 2)


def test_an_activation_without_a_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ShapedLinear(2, 2, spec=shaped("sin"))
    monkeypatch.setitem(ACTIVATIONS, "sin", replace(ACTIVATIONS["sin"], function=None))
    with pytest.raises(ValueError, match=r"fold: sin has neither .*fusedshape.activations.ACTIV"):
        fold(nn.Sequential(layer))


def test_a_trelu_net_is_a_leaky_relu_net() -> None:
    net = vanilla_convnet(20, width=4)
    convert(net, method="TAT")
    keys = list(net.state_dict())
    folded = assert_same(randomised(net), rand(2, 2, 8, 8))
    # γ moves into each layer before; nothing is left to multiply, add or pad
    assert kinds(folded).count("LeakyReLU") == kinds(folded).count("Conv2d") == 20
    assert {n.op for n in folded.graph.nodes} == {"placeholder", "call_module", "output"}
    assert list(folded.state_dict()) == keys
    first = net[0].spec.output_scale * net[0].weight
    torch.testing.assert_close(folded.get_submodule("0").weight, first, rtol=1e-15, atol=0)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("w", [0.0, 0.7])
@pytest.mark.parametrize("spec", [TRELU, LEAKY, SPEC], ids=["trelu", "leaky", "softplus"])
def test_rescaled_resnets(depth: int, w: float, spec: ActSpec) -> None:
    net = rescaled_resnet(depth, w, num_classes=5, width=2)
    convert(net, spec=spec)
    folded = assert_same(randomised(net), rand(2, 3, 32, 32))
    if spec is TRELU:
        functions = {n.target for n in folded.graph.nodes if n.op == "call_function"}
        assert functions == ({torch.add} if w else set()), "one torch.add with alpha for each sum"


@pytest.mark.parametrize("w", [None, 0.0, 0.7])
@pytest.mark.parametrize("spec", [TRELU, LEAKY, SPEC], ids=["trelu", "leaky", "softplus"])
def test_rewritten_forwards(w: float | None, spec: ActSpec) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        zoo.V1(4, 4),
        zoo.V1(4, 6, 2),
        zoo.V1(6, 6),
        nn.MaxPool2d(2),
    )
    if w is not None:
        reweight_shortcuts(net, w)
    convert(net, spec=spec)
    assert_same(randomised(net), rand(2, 2, 8, 8))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "same": (lambda: nn.Conv2d(4, 3, 3, padding="same"), (2, 4, 6, 6)),
    "same, even": (lambda: nn.Conv1d(4, 3, 4, padding="same", dilation=3), (2, 4, 16)),
    "valid": (lambda: nn.Conv2d(4, 3, 3, padding="valid"), (2, 4, 6, 6)),
    "uneven": (lambda: nn.Conv2d(4, 3, (3, 5), (2, 1), (0, 2), (2, 1)), (2, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, padding=2, groups=4, bias=False), (2, 4, 6)),
    "3d": (lambda: nn.Conv3d(4, 3, (1, 2, 3), padding=(0, 1, 2)), (1, 4, 3, 4, 5)),
    "unbatched": (lambda: nn.Conv2d(4, 3, 3, padding=1), (4, 6, 6)),
    "circular": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "reflect": (lambda: nn.Conv1d(4, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 6)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2),
        (2, 4, 5, 5),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 3, 2, 2), (2, 4, 5)),
    "linear": (lambda: nn.Linear(4, 3), (5, 2, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("keep_delta", [False, True])
@pytest.mark.parametrize("spec", [SPEC, FALLING, MIRRORED], ids=["softplus", "tanh", "leaky"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer(layer: str, spec: ActSpec, keep_delta: bool) -> None:
    """A layer absorbs γ and δ of the activation before it, and α and β of the one after it."""
    make, shape = LAYERS[layer]
    net = nn.Sequential(ShapedActivation(spec), make(), ShapedActivation(spec))
    assert_same(randomised(net), rand(*shape), keep_delta=keep_delta)


@pytest.mark.parametrize(
    "twin", [ShapedConv1d(4, 3, 3, spec=SPEC), ShapedConv3d(4, 3, 3, padding=1, spec=LEAKY)]
)
def test_a_single_module(twin: nn.Module) -> None:
    assert_same(randomised(twin), rand(2, 4, *[5] * (twin.weight.ndim - 2)))


BETWEEN: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "max pool": lambda: nn.MaxPool2d(2),
    "padded max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "average pool": lambda: nn.AvgPool2d(2),
    "padded average pool": lambda: nn.AvgPool2d(3, 2, 1),
    "average of what is there": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "ceil": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
    "divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(3),
    "adaptive max": lambda: nn.AdaptiveMaxPool2d((2, 3)),
    "dropout": lambda: nn.Dropout(0.5),
    "dropout in place": lambda: nn.Dropout2d(0.5, inplace=True),
    "reflection pad": lambda: nn.ReflectionPad2d(1),
    "zero pad": lambda: nn.ZeroPad2d(1),
    "upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "shuffle": lambda: nn.PixelShuffle(2),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "layer norm": lambda: nn.LayerNorm(8),
    "another activation": lambda: nn.GELU(),
}


@pytest.mark.parametrize("spec", [TRELU, LEAKY, SPEC, FALLING, MIRRORED])
@pytest.mark.parametrize("between", BETWEEN)
def test_what_stands_between(between: str, spec: ActSpec) -> None:
    """The module stands after an activation, before one, and between a layer and its activation."""
    middle = BETWEEN[between]()
    channels = 1 if isinstance(middle, nn.PixelShuffle) else 4
    net = nn.Sequential(
        ShapedConv2d(3, 4, 3, padding=1, spec=spec),
        middle,
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.Identity() if isinstance(middle, nn.LayerNorm) else copy.deepcopy(middle),
        ShapedActivation(spec),
    )
    assert_same(randomised(net), rand(2, 3, 8, 8))


@pytest.mark.parametrize("spec", [TRELU, SPEC])
def test_dropout_drops_the_same_in_training(spec: ActSpec) -> None:
    net = nn.Sequential(
        ShapedLinear(4, 64, spec=spec), nn.Dropout(0.5), nn.Linear(64, 3), ShapedActivation(spec)
    )
    folded = fold(randomised(net).train())
    x = rand(5, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        want = net(x)
        torch.manual_seed(0)
        got = folded(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(want, net.eval()(x))


class Functions(nn.Module):
    """Pools, reshapes and sums as functions and methods, and shapes asked for."""

    def __init__(self, spec: ActSpec) -> None:
        super().__init__()
        self.a = ShapedConv2d(3, 4, 3, padding=1, spec=spec)
        self.b = ShapedConv2d(4, 4, 3, padding=1, spec=spec)
        self.act = ShapedActivation(spec)
        self.head = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.max_pool2d(self.a(x), 3, 2, 1))
        x = F.dropout(F.avg_pool2d(x, 2), 0.5, self.training)
        y = F.adaptive_avg_pool2d(x, (2, 2)).view(x.size(0), -1)
        z = x.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2).reshape(y.shape)
        return self.act(self.head(y * self.scale + z - self.offset)).transpose(0, 1)


@pytest.mark.parametrize("spec", [TRELU, SPEC, FALLING])
def test_functions(spec: ActSpec) -> None:
    folded = assert_same(randomised(Functions(spec)), rand(2, 3, 8, 8))
    assert [name for name, _ in folded.named_buffers()] == ["offset"]


class Branches(nn.Module):
    """Sums with and without weights, concatenations alike and not, one activation used by many."""

    def __init__(self, spec: ActSpec, other: ActSpec) -> None:
        super().__init__()
        self.stem = ShapedLinear(4, 4, spec=spec)
        self.act = ShapedActivation(spec)
        self.other = ShapedActivation(other)
        for name in "abcdef":
            self.add_module(name, nn.Linear(4, 4))
        self.wide = nn.Linear(8, 4)
        self.sum = NormalizedSum((0.6, 0.0, -0.8))
        self.three = NormalizedSum((1 / 3, 2 / 3, 2 / 3))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.stem(x)
        y = self.sum(self.a(x), self.b(x), x)
        z = self.three(self.act(y), self.other(y), self.c(y))
        alike = self.wide(torch.cat([self.act(z), self.act(x)], 1))
        unlike = self.wide(torch.cat((self.act(z), self.other(x)), 1))
        u = self.act(z) + self.act(x)
        v = self.other(z) + self.act(x)
        twice = self.d(z)
        return self.e(u) + x, {"v": self.f(v), "w": alike + unlike, "twice": twice + twice}


@pytest.mark.parametrize("spec", [TRELU, LEAKY, SPEC])
@pytest.mark.parametrize("other", [TRELU, FALLING])
def test_branches(spec: ActSpec, other: ActSpec) -> None:
    net = randomised(Branches(spec, other))
    folded = fold(net)
    x = rand(3, 4)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)
    assert_stock(folded)


class Head(nn.Module):
    """Has optional arguments, and takes one tensor or several."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = ShapedLinear(8, 4, spec=SPEC), nn.Linear(4, 3)

    def forward(self, features: list[Tensor] | Tensor, plain: bool = False) -> Tensor:
        features = [features] if isinstance(features, Tensor) else features
        x = self.mix(torch.cat([*features], 1))
        return x if plain else self.last(x)


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = ShapedLinear(4, 4, spec=SPEC), Head()

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        a = self.first(x)
        features = [a]
        features.append(self.first(a))
        plain = self.head(torch.cat(features, 1), plain=True)
        return plain if twice else plain[:, :3] + self.head(features)


def test_every_call_is_folded_as_it_is_made() -> None:
    net = randomised(Headed())
    folded = fold(net)
    x = rand(5, 4)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)
    assert_stock(folded)


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = ShapedLinear(2, 2, spec=TRELU)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.layer(x)


def test_long_residual_networks() -> None:
    net = randomised(nn.Sequential(*(Adds() for _ in range(600))))
    x = rand(3, 2)
    torch.testing.assert_close(fold(net)(x), net(x), rtol=1e-9, atol=1e-9)


class Wild(nn.Module):
    """A random network: every step applies something to values made before."""

    def __init__(self, seed: int, steps: int = 14) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.parts = nn.ModuleList()
        self.plan: list[tuple[str, list[int], int]] = []
        specs = [TRELU, LEAKY, SPEC, FALLING, MIRRORED, shaped("bentid"), ActSpec("relu")]
        for i in range(steps):
            kind = rng.choice(["conv", "conv", "fused", "act", "act", "sum", "add", "cat", "pool"])
            spec = rng.choice(specs)
            picked = [rng.randint(max(0, i - 3), i) for _ in range(2)]
            part: nn.Module = nn.Identity()
            if kind == "conv":
                part = nn.Conv2d(4, 4, 3, padding=rng.choice([1, "same"]), bias=rng.random() < 0.5)
            elif kind == "fused":
                part = ShapedConv2d(4, 4, 3, padding=1, groups=rng.choice([1, 2]), spec=spec)
            elif kind == "act":
                part = ShapedActivation(spec)
            elif kind == "sum":
                part = NormalizedSum.shortcut(rng.choice([0.0, 0.3, 0.8]))
            elif kind == "cat":
                part = nn.Conv2d(8, 4, 1)
            elif kind == "pool":
                part = rng.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Dropout()])
            if kind in ("conv", "fused", "act") and rng.random() < 0.2 and self.plan:
                known = [j for k, _, j in self.plan if k == kind]
                j = rng.choice(known) if known else len(self.parts)
            else:
                j = len(self.parts)
            if j == len(self.parts):
                self.parts.append(part)
            self.plan.append((kind, picked, j))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, (a, b), j in self.plan:
            part = self.parts[j]
            if kind == "sum":
                values.append(part(values[a], values[b]))
            elif kind == "add":
                values.append(values[a] + values[b])
            elif kind == "cat":
                values.append(part(torch.cat([values[a], values[b]], 1)))
            else:
                values.append(part(values[a]))
        return torch.cat([values[-1], values[-2]], 1)


@pytest.mark.parametrize("seed", range(60))
def test_random_networks(seed: int) -> None:
    assert_same(randomised(Wild(seed)), rand(2, 4, 5, 5), keep_delta=seed % 3 == 0)


@pytest.mark.parametrize("spec", [TRELU, SPEC])
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: zoo.ResNet(18, 1), 32),
        (lambda: zoo.ResNet(50, 2, 0.6), 32),
        (zoo.VGG16, 32),
        (zoo.ConvNeXt, 16),
        (zoo.Mixer, 16),
    ],
)
def test_well_known_models(make: Callable[[], nn.Module], size: int, spec: ActSpec) -> None:
    net = make()
    convert(net, spec=spec, replace=(nn.ReLU, nn.GELU))
    assert_same(randomised(net), rand(2, 3, size, size))


def test_shapes_beside_values() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = ShapedActivation(SPEC)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.size(0) + x.shape[1]
            return (self.act(x) + x.size(0)) * rows

    assert_same(Sizes(), rand(3, 4))


def test_a_layer_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.layer = ShapedLinear(4, 4, spec=SPEC)
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.layer(self.layer(self.first(x)))))

    folded = assert_same(randomised(Twice()), rand(3, 4))
    # behind another layer it is another one; behind itself it is one, however often
    assert [k for k in folded.state_dict() if k.endswith("bias")] == [
        "first.bias",
        "layer.bias",
        "layer_1.bias",
        "last.bias",
    ]


class InPlace(nn.Module):
    def __init__(self, spec: ActSpec) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.act = ShapedActivation(spec)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.add_(self.act(x))
        y.mul_(2.0)
        z = self.act(self.b(F.relu(y, inplace=True)))
        z += y
        return torch.relu_(z) + self.act(y)


@pytest.mark.parametrize("spec", [TRELU, SPEC])
def test_in_place(spec: ActSpec) -> None:
    assert_same(randomised(InPlace(spec)), rand(3, 4))


def test_a_tensor_that_became_another_is_not_changed_in_place() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum = NormalizedSum((1.0, 0.0))  # a copy, which the folded net does without
            self.clip = nn.ReLU6(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.sum(x, x)
            return self.clip(y) + x

    assert_same(Alias(), rand(3, 4))


class Viewed(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        rows = y.view(-1)
        y.add_(self.act(x))
        return rows


class Choosy(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got int"):
        fold(3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"add_ changes a tensor in place that output sees through a view of it"
    ):
        fold(Viewed(SPEC))
    with pytest.raises(ValueError, match=r"'0' \(Choosy\) cannot be traced: .*one by one"):
        fold(nn.Sequential(Choosy(SPEC)))
    hooked = nn.Sequential(ShapedLinear(2, 2, spec=SPEC))
    hooked[0].register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match=r"'0' \(ShapedLinear\) has forward hooks.*remove"):
        fold(hooked)
    layer = nn.TransformerEncoderLayer(4, 2)
    layer.activation = ShapedActivation(SPEC)
    with pytest.raises(ValueError, match=r"'0' \(TransformerEncoderLayer\) calls 'activation'"):
        fold(nn.Sequential(layer))


@pytest.mark.parametrize("mode", ["one", "avg_q", "off"])
def test_per_location_norm(mode: str) -> None:
    pln = PerLocationNorm(mode, 0.7)  # type: ignore[arg-type]
    width = 3 + (mode != "off")
    net = nn.Sequential(pln, ShapedConv2d(width, 4, 3, padding=1, spec=SPEC), nn.Conv2d(4, 2, 3))
    assert_same(randomised(net), rand(2, 3, 6, 6))
    assert_same(pln.double(), rand(2, 3, 6, 6))


def test_chains() -> None:
    layers = [ShapedConv2d(3 if not i else 4, 4, 3, padding=1, spec=SPEC) for i in range(3)]
    chain = ShapedChain(*layers, nn.Flatten(), ShapedLinear(64, 2, spec=LEAKY))
    folded = assert_same(randomised(chain), rand(2, 3, 4, 4))
    assert list(folded.state_dict()) == list(chain.state_dict())
    assert_same(nn.Sequential(nn.Identity(), chain), rand(2, 3, 4, 4))


def test_dtypes_modes_and_requires_grad_are_kept() -> None:
    net = nn.Sequential(
        ShapedLinear(4, 4, spec=LEAKY), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)
    )
    net[1].eval()
    net[3].requires_grad_(False)
    folded = fold(net.bfloat16())
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    assert folded.training
    assert not folded.get_submodule("1").training
    assert {k: p.requires_grad for k, p in folded.named_parameters()} == {
        k: p.requires_grad for k, p in net.named_parameters()
    }
    assert not fold(net.eval()).training


def test_parametrized_weights_are_what_they_compute() -> None:
    net = nn.Sequential(ShapedLinear(4, 4, spec=SPEC), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(net[1])
    folded = assert_same(randomised(net), rand(3, 4))
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def small() -> nn.Module:
    net = nn.Sequential(PerLocationNorm(), rescaled_resnet(18, 0.7, 5, in_channels=4, width=4))
    convert(net, method="DKS", activation="softplus", depth=17)
    return net.eval()


def test_pickles_copies_and_compiles() -> None:
    x = rand(2, 3, 32, 32).float()
    folded = fold(small(), example=x)
    want = folded(x)
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x), want)
    assert torch.equal(copy.deepcopy(folded)(x), want)
    run = torch.compile(folded, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x), want)


def test_torch_export() -> None:
    net = small()
    x = rand(2, 3, 32, 32).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own making
        program = torch.export.export(fold(net), (x,))
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["all activations", "residual"])
def test_onnx(which: str) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    net = small()
    if which != "residual":
        layers = [ShapedConv2d(4, 4, 3, padding=1, spec=shaped(name)) for name in ACTIVATIONS]
        net = nn.Sequential(nn.Conv2d(3, 4, 1), *layers, nn.Flatten(), nn.Linear(64, 5)).eval()
    x = rand(2, 3, 4, 4).float() if which != "residual" else rand(2, 3, 32, 32).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's and onnxscript's own making
        program = torch.onnx.export(fold(net), (x,), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = net(x)
    scale = want.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=2e-4 * scale)


def test_mlp_in_float32_is_as_good() -> None:
    """Both differ from float64 by rounding; folding multiplies that by γ at most."""
    net = vanilla_mlp(20, width=32, in_features=8, num_classes=4)
    report = convert(net, method="DKS", activation="softplus")
    x = rand(64, 8)
    truth = copy.deepcopy(net).double()(x)
    scale = truth.square().mean().sqrt()
    plain, folded = (
        ((m(x.float()).double() - truth).square().mean().sqrt() / scale).item()
        for m in (net, fold(net))
    )
    assert plain < 1e-5
    assert folded < 10 * report.spec.output_scale * 1e-6


def test_a_forward_that_reads_a_weight_reads_the_old_one() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            spec = ActSpec("tanh", 0.7, 0.1, -0.2, 1.9)
            self.one = ShapedLinear(4, 4, spec=spec, dtype=torch.float64)
            self.two = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) * self.one.weight.sum() + self.two.bias

    net = Reads()
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fold(net)(x), net(x), rtol=1e-12, atol=1e-12)


def test_folding_leaves_weights_that_are_written_when_read() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 4))
    before = copy.deepcopy(net.state_dict())
    fold(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_branch_on_the_dtype_is_refused() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.r(self.a(x))
            return 2 * y if y.dtype is torch.float32 else y

    with pytest.raises(ValueError, match="it asks what the dtype of a value is"):
        fold(nn.Sequential(Choosy(), nn.Linear(4, 4)))


class Asking(nn.Module):
    """Asks for the type, the length and the shape of its input, and takes an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = ShapedLinear(4, 4, spec=SPEC), nn.Linear(4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor, scale: float | None = None) -> dict[str, Tensor]:
        if not isinstance(x, Tensor) or len(x) < 1:
            raise ValueError("needs a batch")
        if x.shape[-1] != 4:
            raise ValueError("needs 4 features")
        y = self.two(self.one(torch.cat([self.token.expand(len(x), -1, -1), x], 1)))
        return {"out": y if scale is None else scale * y, "mean": y.mean(1)}


class Choosing(nn.Module):
    """Takes the parts of another module's dictionary, and a tensor that it makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Asking(), ShapedLinear(4, 2, spec=SPEC)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.inner(x, scale=2.0)
        ramp = torch.linspace(0, 1, 4, dtype=x.dtype)
        return self.last(found["out"] + ramp), found["mean"]


@pytest.mark.parametrize("make", [Asking, Choosing])
def test_a_forward_that_asks_is_read_on_the_example(make: Callable[[], nn.Module]) -> None:
    net = nn.Sequential(randomised(make())).train()
    x = rand(2, 3, 4)
    with pytest.raises(ValueError, match=r"cannot be traced.*Pass example="):
        fold(net)
    folded = fold(net, example=x)
    assert {module.training for module in (*net.modules(), *folded.modules())} == {True}
    torch.testing.assert_close(folded(x), net.eval()(x), rtol=1e-12, atol=1e-12)
    assert_stock(folded)


def test_optional_arguments_of_the_example_are_taken() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = ShapedLinear(4, 4, spec=SPEC), nn.Linear(4, 4)

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            y = self.two(self.one(x))
            return y if other is None else y + other

    net = randomised(Scaled())
    x, other = rand(2, 4), rand(2, 4)
    both = fold(net, example=(x, other))
    torch.testing.assert_close(both(x, other), net(x, other), rtol=1e-12, atol=1e-12)
    alone = fold(net, example=x)
    torch.testing.assert_close(alone(x), net(x), rtol=1e-12, atol=1e-12)


def test_numbers_in_tensors_steer_nothing() -> None:
    class Steered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"cannot be traced.*Read as it runs on the example"):
        fold(nn.Sequential(ShapedLinear(4, 4, spec=SPEC), Steered()), example=torch.ones(2, 4))


def test_what_was_not_compared_is_said() -> None:
    net = nn.Sequential(PerLocationNorm(), ShapedConv2d(4, 2, 1, spec=SPEC))
    with pytest.warns(UserWarning, match="no input was found; pass example="):
        fold(net)

    class OnlyFloat32(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.eye(4)

    only = nn.Sequential(ShapedLinear(4, 4, spec=SPEC), OnlyFloat32())
    with pytest.warns(UserWarning, match="not compared with the model: in float64 it raises"):
        fold(only, example=torch.ones(2, 4))
