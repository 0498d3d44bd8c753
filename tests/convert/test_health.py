"""convert ends with what diagnose says of the model, and leaves the model as it made it."""

from __future__ import annotations

import copy
import json
import pickle

import torch
from torch import Tensor, nn

from fusedshape import convert, diagnose
from fusedshape.convert import Report


def net(depth: int = 12) -> nn.Sequential:
    return nn.Sequential(
        *(m for _ in range(depth) for m in (nn.Linear(96, 96), nn.ReLU())), nn.Linear(96, 4)
    )


def test_the_report_says_what_diagnose_says() -> None:
    model, x = net(), torch.randn(32, 96)
    report = convert(model, example=x)
    assert str(report.health) == str(diagnose(model, [x]))
    assert str(report).endswith("health: theory and measurement agree")
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["health"] == {"verdict": "theory and measurement agree", "findings": []}


def test_an_escape_silences_nothing() -> None:
    model = net()
    model.insert(4, nn.Tanh())
    report = convert(model, example=torch.randn(32, 96), depth=12)
    assert report.health is not None
    assert "plain activation" in {finding.cause for finding in report.health.findings}
    kept = convert(net(), example=torch.randn(32, 96), filter_fn=lambda path, _: path != "3")
    assert kept.health is not None
    assert not kept.health.agrees


def test_the_check_changes_nothing() -> None:
    x = torch.randn(8, 96)
    models = [nn.Sequential(nn.Dropout(0.5), net()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    draws = []
    for model, check in zip(models, (True, False), strict=True):
        torch.manual_seed(1)
        report = convert(model, example=x, check=check)
        assert (report.health is not None) == check
        draws.append(torch.rand(3))
        assert all(p.grad is None for p in model.parameters())
    assert torch.equal(*draws)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
    assert [m.training for m in models[0].modules()] == [m.training for m in models[1].modules()]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.body(x + y)


def test_several_inputs() -> None:
    report = convert(Two(), example=(torch.randn(32, 96), torch.randn(32, 96)), shortcuts=0.8)
    assert report.health is not None
    assert report.health.inputs == 32


def test_why_it_was_not_checked() -> None:
    report = convert(net(), example=torch.randn(1, 96))
    assert report.health is None
    assert any("health was not checked: ValueError" in note for note in report.notes)


def test_only_an_example_is_run() -> None:
    assert convert(net()).health is None
    assert convert(net(), example=torch.randn(4, 96), dry_run=True).health is None


def test_old_pickles() -> None:
    report = convert(net())
    state = {k: v for k, v in vars(copy.copy(report)).items() if k not in ("recipe", "health")}
    old = Report.__new__(Report)
    vars(old).update(state)
    read = pickle.loads(pickle.dumps(old))
    assert read.health is None
    assert read.method == "given"
    assert str(read)
    assert read.to_dict()["recipe"] == report.spec.to_dict()
