"""diagnose's report: text, JSON and figure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from fusedshape.diagnose import diagnose
from tests.support.nets import converted, mlp


def test_forms(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = diagnose(converted(mlp(50)), torch.randn(32, 32))
    found.save(tmp_path / "d.json")
    data = json.loads((tmp_path / "d.json").read_text())
    assert data["agrees"] is True
    assert len(data["layers"]) == 102
    assert data["layers"][0]["slope"] is None
    assert data["layers"][2]["slope"] == pytest.approx(1.0)
    assert data["machine"]["torch"] == torch.__version__
    found.plot(tmp_path / "d.svg")
    text = (tmp_path / "d.svg").read_text()
    assert "<svg" in text
    # 51 layers with weights, every third of them named on the axis.
    labels = re.findall(r"<!-- (\d+): (\d+) -->", text)
    assert labels == [(str(k), str(2 * k - 2)) for k in range(1, 52, 3)]
    assert "<!-- layer with weights -->" in text
    assert found.table().count("\n") == 102
    lines = str(found).splitlines()
    assert len(lines) < 60
    assert "of 102 layers" in lines[-2]
    assert lines[0].split()[:3] == ["layer", "q", "measured"]


def test_figure_of_a_broken_net(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = converted(mlp(20))
    with torch.no_grad():
        net[6].weight.zero_()
    found = diagnose(net, torch.randn(32, 32))
    found.plot(tmp_path / "d.png", "title")
    assert (tmp_path / "d.png").stat().st_size > 10_000
