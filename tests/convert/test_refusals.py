"""Models of unusual form: converted in full, or refused by name with a way out that works."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fusedshape
from fusedshape import TAT, convert, kinds, theory
from fusedshape.nn import ShapedLinear
from tests.support.convertible import SPEC, Truth, stack

ROW = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 6), nn.Linear(4, 6), nn.Linear(12, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(torch.cat([F.relu(self.a(x)), F.relu(self.b(y))], 1))


class Outputs(NamedTuple):
    """What `Structured` returns."""

    logits: Tensor
    hidden: list[Tensor]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = stack(2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Outputs:
        hidden = self.body(x)
        return Outputs(self.head(F.relu(hidden)), [hidden])


class ReturnsDict(Structured):
    def forward(self, x: Tensor) -> Any:
        hidden = F.relu(self.body(x))
        return OrderedDict(out=self.head(hidden), aux={"hidden": hidden})


class TwoParents(nn.Module):
    """One block stands under two parents."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU())
        self.left, self.right = nn.Sequential(block), nn.Sequential(block, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x))


def test_several_inputs() -> None:
    net = TwoInputs()
    x = torch.randn(3, 6), torch.randn(3, 4)
    report = convert(net, spec=SPEC, example=x)
    assert report.counts["fused"] == 2
    assert net(*x).shape == (3, 2)


@pytest.mark.parametrize("make", [Structured, ReturnsDict])
def test_structures_come_back(make: Callable[[], nn.Module]) -> None:
    net = make()
    kind = type(net(ROW))
    report = convert(net, spec=SPEC)
    assert (report.counts["fused"], report.counts["shaped"]) in ((2, 1), (3, 0))
    assert type(net(ROW)) is kind


def test_a_block_under_two_parents_is_one_block() -> None:
    net = TwoParents()
    ours = copy.deepcopy(net)
    report = convert(ours, spec=SPEC, init=None, normalisation="strip")
    assert report.counts["stripped"] == report.counts["fused"] == 1
    assert ours.left[0] is ours.right[0]
    assert isinstance(ours.left[0][0], ShapedLinear)
    assert ours.left[0][0].bias is not None
    with Truth(SPEC):
        want = net(ROW)
    torch.testing.assert_close(ours(ROW), want)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_are_refused_until_they_ran() -> None:
    net = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU())
    with pytest.raises(ValueError, match=r"'0' is a lazy LazyLinear.*run the model once first"):
        convert(net, spec=SPEC, normalisation="strip")
    net(ROW)
    assert convert(net, spec=SPEC, normalisation="strip").counts["fused"] == 1


def test_meta_models_are_refused_until_they_have_memory() -> None:
    net = stack(2).to("meta")
    with pytest.raises(ValueError, match=r"on the meta device; call model\.to_empty"):
        convert(net, spec=SPEC)
    net.to_empty(device="cpu")
    assert convert(net, spec=SPEC).counts["fused"] == 2
    assert net(ROW).isfinite().all()


def test_wrapped_and_compiled_models_are_converted_inside() -> None:
    inner = stack(2)
    for outer, name in ((nn.DataParallel(inner), "module"), (torch.compile(inner), "_orig_mod")):
        with pytest.raises(ValueError, match=f"the module inside, its .{name}"):
            convert(outer, spec=SPEC)
    assert convert(nn.DataParallel(inner).module, spec=SPEC).counts["fused"] == 2


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripts_are_refused_and_what_they_were_made_of_is_not() -> None:
    inner = stack(2)
    script = torch.jit.trace(copy.deepcopy(inner), ROW)
    with pytest.raises(ValueError, match=r"a ScriptModule; convert the module it was made of"):
        convert(script, spec=SPEC)
    with pytest.raises(ValueError, match=r"'1' is a ScriptModule"):
        convert(nn.Sequential(nn.Linear(6, 6), script, nn.ReLU()), spec=SPEC)
    assert convert(inner, spec=SPEC).counts["fused"] == 2


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantised_layers_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(6, 6), torch.ao.nn.quantized.FloatFunctional(), nn.ReLU())
    with pytest.raises(ValueError, match=r"'1' is quantised.*convert the float model"):
        convert(net, spec=SPEC)


def test_pruned_layers_keep_their_masks_and_are_named() -> None:
    net = stack(2)
    prune.l1_unstructured(net[0], "weight", 0.5)
    report = convert(net, spec=SPEC)
    assert ("0", "not initialised: its weight is computed from other tensors") in {
        (c.path, c.note) for c in report.skipped
    }
    net(ROW)
    assert (net[0].weight == 0).sum() == 18
    bare = stack(2)
    prune.l1_unstructured(bare[0], "weight", 0.5)
    prune.remove(bare[0], "weight")
    assert convert(bare, spec=SPEC).counts["fused"] == 2


class Dense(nn.Module):
    """Wraps a weight of its own, as libraries for graphs do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width, width)), None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def test_layers_of_ones_own_are_named_and_initialised_once_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(kinds, "_REGISTERED", known)
    net = nn.Sequential(Dense(6), nn.ReLU(), Dense(6))
    report = convert(copy.deepcopy(net), spec=SPEC)
    assert "linear of its weight" in report.skipped[0].note
    assert "register_layer(Dense, nn.Linear)" in report.skipped[0].note
    fusedshape.register_layer(Dense, nn.Linear)
    wired = theory.trace_wiring(net)
    assert [node.op for node in wired.nodes] == ["input", "affine", "nonlinear", "affine"]
    report = convert(net, spec=SPEC)
    assert report.counts["initialised"] == 2
    torch.testing.assert_close(net[0].weight @ net[0].weight.T, torch.eye(6), atol=1e-5, rtol=0)
    assert "Dense has no fused form" in str(report)
    fusedshape.fold(net)


def test_registering_refuses_what_is_no_layer() -> None:
    with pytest.raises(TypeError, match=r"cls must be a class of nn\.Modules, got 3"):
        fusedshape.register_layer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"like=.*ReLU.*known: nn.Linear, nn.Conv1d"):
        fusedshape.register_layer(Dense, nn.ReLU)
    with pytest.raises(ValueError, match="Linear is a layer already"):
        fusedshape.register_layer(nn.Linear)


def test_a_head_of_one_by_one_convolutions_is_a_head() -> None:
    blocks = [m for _ in range(20) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    pool = nn.AdaptiveAvgPool2d(1)
    conv = nn.Sequential(*copy.deepcopy(blocks), pool, nn.Conv2d(4, 5, 1), nn.Flatten())
    line = nn.Sequential(*copy.deepcopy(blocks), pool, nn.Flatten(), nn.Linear(4, 5))
    reports = [
        convert(net, TAT(), generator=torch.Generator().manual_seed(0)) for net in (conv, line)
    ]
    assert reports[0].spec == reports[1].spec
    assert reports[0].counts == reports[1].counts
    assert torch.equal(conv[-2].weight.flatten(1), line[-1].weight)
