"""convert's reading of forwards: what it cannot trace, what changes in place, what holds values."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import ActSpec, reference
from fusedshape.convert import convert
from fusedshape.nn import (
    ShapedLinear,
)
from tests.support.convertible import IMAGE, ROW, SPEC, Functional, Opaque, check, conv, stack


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


@torch.fx.wrap
def sometimes(x: Tensor, training: bool) -> Tensor:
    """A function that a trace does not enter."""
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
