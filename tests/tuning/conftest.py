"""A cache of each test's own, the log, and a rival engine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusedshape import tuning
from fusedshape.ops import engines
from fusedshape.ops.problem import Problem
from fusedshape.tuning import chooser, measuring
from fusedshape.tuning.cache import Record
from tests.support.rivals import FACTORY, Rival


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path / "cache"))
    with tuning.mode("cached"):
        yield tmp_path / "cache" / "tuning"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "fusedshape.tuning")
    return caplog


@pytest.fixture
def rival(monkeypatch: pytest.MonkeyPatch) -> Rival:
    """A second engine for CPU tensors."""
    one = Rival()
    monkeypatch.setitem(engines.ENGINES, "triton", one)
    monkeypatch.setitem(engines.RIVALS, "cpu", (one,))
    monkeypatch.setattr(engines.ENGINES["native"], "why_not", lambda *_: "not now")
    return one


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions that were measured; the rival wins all but wgrad."""
    log: list[str] = []

    def fake(direction: str, problem: Problem, device: torch.device) -> measuring.Result:
        log.append(direction)
        winner = "aten" if direction == "wgrad" else "triton"
        return measuring.Result(Record(winner, None, 3, 2.0, 1.0), {}, {})

    monkeypatch.setattr(chooser.measuring, "measure", fake)
    return log


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "tune_mine.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield
    sys.modules.pop("tune_mine", None)
