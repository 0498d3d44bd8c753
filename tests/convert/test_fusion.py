"""convert's surgery: which activations join which layers, and which normalisations may go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import theory
from fusedshape.convert import convert
from fusedshape.nn import (
    ShapedActivation,
    ShapedConv2d,
    ShapedLinear,
    is_place,
)
from fusedshape.shortcuts import reweight_shortcuts
from tests.support.convertible import IMAGE, SPEC, check, conv
from tests.support.specs import shaped
from tests.support.zoo import NormAct, NormActBlock


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
