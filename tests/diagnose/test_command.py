"""fusedshape diagnose: what it prints and returns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fusedshape.cli import main

MINE = """
import torch
from torch import nn
import fusedshape

def good():
    net = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(64, 64), nn.ReLU())])
    fusedshape.convert(net)
    return net

def bad():
    net = good()
    nn.init.constant_(net[4].bias, 3.0)
    return net

def batches():
    return [torch.randn(8, 64) for _ in range(2)]

wrong = torch.randn(8, 63)
"""


def test_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "diagnosed.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(["diagnose", *argv])
        return code, *capsys.readouterr()

    code, out, err = run("diagnosed:good", "--json", "d.json")
    assert (code, err) == (0, "")
    assert "theory and measurement agree" in out
    assert json.loads((tmp_path / "d.json").read_text())["inputs"] == 64
    code, out, _ = run("diagnosed:bad", "--data", "diagnosed:batches", "--all")
    assert code == 0
    assert "1. biases at '4'" in out
    code, out, err = run("diagnosed:good", "--data", "diagnosed:wrong")
    assert code == 1
    assert err.startswith("fusedshape: error: diagnose: the model fails on data of shape (8, 63)")
    assert run("diagnosed:good", "--input", "4,64")[0] == 0
    with pytest.raises(SystemExit):
        run("diagnosed:good", "--input", "4,x")
