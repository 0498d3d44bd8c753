"""convert's report: what was done, and what the constants do not know of."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import ActSpec
from fusedshape.convert import convert
from fusedshape.nn import (
    NormalizedSum,
)
from fusedshape.shortcuts import reweight_shortcuts
from tests.support.convertible import SPEC, stack


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


class Unnormalised(nn.Module):
    """A sum of weights 1 and 1, and a product of two values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.two(F.relu(self.one(x)))
        return y * y.sum(1, keepdim=True)


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
