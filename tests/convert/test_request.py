"""What convert is asked for: one recipe, in either form, and what cannot be asked together."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fusedshape import DKS, EOC, TAT, ActSpec, convert


def mlp() -> nn.Sequential:
    layers = [layer for _ in range(20) for layer in (nn.Linear(4, 4), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(4, 2))


def test_a_report_says_its_recipe() -> None:
    report = convert(mlp(), TAT("tanh"), dry_run=True)
    assert (report.recipe, report.method) == (TAT("tanh"), "TAT")
    assert report.to_dict()["recipe"] == TAT("tanh").to_dict()
    ready = convert(mlp(), report.spec, dry_run=True)
    assert ready == convert(mlp(), spec=report.spec, dry_run=True)
    assert (ready.recipe, ready.method, ready.spec) == (report.spec, "given", report.spec)


@pytest.mark.parametrize(
    ("recipe", "keywords", "message"),
    [
        (None, {"zeta": 1.5}, "convert: TAT of leaky_relu aims at eta, not at zeta=1.5, which bel"),
        (None, {"method": "DKS", "eta": 0.9}, "DKS of leaky_relu aims at zeta, not at eta=0.9"),
        (None, {"method": "EOC", "clamp": True}, "EOC of leaky_relu .* not at clamp=True"),
        (None, {"activation": "tanh", "eta": 0.9}, "TAT of tanh aims at tau, not at eta=0.9"),
        (TAT(), {"eta": 0.9}, r"TAT\('leaky_relu', eta=0.9\) is a whole recipe; give it eta when"),
        (TAT(), {"activation": "tanh"}, "is a whole recipe; give it activation"),
        (TAT(), {"spec": ActSpec("tanh")}, "and spec are both given"),
        (ActSpec("tanh"), {"method": "DKS", "zeta": 2}, "spec is ready; drop method, zeta"),
        (ActSpec("tanh"), {"depth": 3}, "spec is ready; drop depth"),
        (EOC("tanh"), {"depth": 3}, "EOC knows no depth"),
        ("TAT", {}, "recipe must be a TAT, DKS, EOC or ActSpec, got 'TAT'"),
    ],
)
def test_convert_takes_one_recipe(recipe: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        convert(mlp(), recipe, **keywords)


def test_a_recipe_carries_what_has_no_keyword() -> None:
    report = convert(mlp(), DKS("tanh", q_slope=0.97), dry_run=True)
    assert report.recipe == DKS("tanh", zeta=1.5, q_slope=0.97)
    assert report.spec != convert(mlp(), DKS("tanh"), dry_run=True).spec
    edge = convert(mlp(), EOC("leaky_relu", negative_slope=0.5), dry_run=True)
    assert edge.spec.negative_slope == 0.5
