"""Cases of known numbers, records of known times, and a clock that returns what it is told."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedshape.bench import records, suites
from fusedshape.bench.cases import Case
from fusedshape.bench.providers import Task
from fusedshape.timing import Candidate

CPU = torch.device("cpu")


def problem(*, wrong: bool = False, then: Callable[[], Any] = lambda: None) -> Task:
    """Three providers of x + 1; `then` runs when the library's own is at work."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def own(_: object = None) -> torch.Tensor:
        then()
        return x + (1.1 if wrong else 1.0)

    def stock(_: object = None) -> torch.Tensor:
        return x + 1.0

    return Task(
        {
            "bare": Candidate(stock),
            "fused": Candidate(own, check=lambda: {"y": own()}, claims=True),
            "eager": Candidate(stock, check=lambda: {"y": stock()}, yardstick=True),
        },
        lambda: {"y": x.double() + 1.0},
    )


def install(monkeypatch: pytest.MonkeyPatch, **builds: Callable[[], Task]) -> None:
    """Make the suite "smoke" one of these cases."""
    made = tuple(
        Case(f"pointwise/{name}", ("smoke",), lambda setting, build=build: build())
        for name, build in builds.items()
    )
    monkeypatch.setattr(suites, "CASES", made)


def raising(error: BaseException) -> Callable[[], Task]:
    def fail() -> None:
        raise error

    return lambda: problem(then=fail)


def broken(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        record = json.loads(text)
        change(record)
        return json.dumps(record)

    return apply


class Script:
    """A clock that returns what it is told, and remembers who was asked."""

    least = 0.0

    def __init__(self) -> None:
        self.asked: list[str] = []

    def seconds(self, candidate: Candidate, repeats: int) -> float:
        self.asked.append(candidate.run(candidate.prepare()))
        return float(len(self.asked))


def synthetic(template: dict[str, Any], samples: dict[str, list[float]]) -> dict[str, Any]:
    row = {
        "case": "pointwise/synthetic",
        "parameters": {},
        "status": "ok",
        "candidates": {
            name: {"status": "ok", "samples_ms": values} for name, values in samples.items()
        },
        "ratios": {},
    }
    record = {**template, "rows": [row]}
    records.check(record)
    return record


def git(folder: Path, *arguments: str) -> None:
    name = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True)
