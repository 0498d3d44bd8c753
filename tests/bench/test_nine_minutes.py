"""Across modules: what `make gpu` runs, bench/gpu.py and bench/kernel_checks.py, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench import gpu, kernel_checks
from bench.gpu import Run, Step
from bench.kernel_checks import Book, Outcome

ROOT = Path(__file__).parents[2]


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def outcomes(out: Path) -> dict[str, str]:
    rows = json.loads((out / "steps.json").read_text())["steps"]
    return {row["step"]: row["outcome"] for row in rows}


def test_each_step_has_its_own_end(tmp_path: Path) -> None:
    slow = Step("slow", 0.04, [python("import time; time.sleep(600)")])
    todo = [
        Step("well", 1.0, [python("print('hello')")] * 2),
        Step("odd", 1.0, [python("raise SystemExit(1)")], fine=(0, 1)),
        Step("dies", 1.0, [python("raise SystemExit(3)"), python("")]),
        slow,
        Step("elsewhere", 1.0, [python("")], needs=["no_such_program"]),
        Step("late", 0.0, [python("")]),
    ]
    assert Run(tmp_path, 50.0, os.environ).all(todo) == 1
    assert outcomes(tmp_path) == {
        "well": "done",
        "odd": "done",
        "dies": "failed: exit code 3, done; see its log",
        "slow": "part done: stopped at its limit; see its log",
        "elsewhere": "left out: no_such_program is not installed",
        "late": "left out: no time for it",
    }
    assert (tmp_path / "well.log").read_text().split() == ["hello", "hello"]


def test_what_died_goes_on(tmp_path: Path) -> None:
    counts = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); n = p.stat().st_size\n"
    counts += "p.write_text(n * 'x' + 'x'); raise SystemExit(3 * (n < 2))"
    file = tmp_path / "count"
    file.touch()
    step = Step("count", 1.0, [[*python(counts), str(file)]], again=True)
    assert Run(tmp_path, 60.0, os.environ).all([step]) == 0
    assert file.read_text() == "xxx"


def test_all_steps_can_be_started(tmp_path: Path) -> None:
    todo = list(gpu.steps(tmp_path, 540.0))
    assert [step.name for step in todo] == [
        "info", "checks", "memcheck", "racecheck", "bench", "tests"
    ]  # fmt: skip
    for step in todo:
        modules = [command[command.index("-m") + 1] for command in step.commands]
        assert len(set(modules)) == 1
    assert sum(step.part for step in todo[:-1]) < 1.1
    names = {check.name for check in kernel_checks.checks()}
    assert {"3x3/wgrad/tf32/leaky_relu", "linear-odd/dgrad/fp16/leaky_relu"} <= names
    assert "pass/swish/fp32/contiguous" in names
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            gpu.main()


class Fake:
    """A check of a kernel that computes what it is given."""

    name, terms = "fake/tf32", 8

    def __init__(self, *results: float, refuses: str = "") -> None:
        self.results, self.refuses = results, refuses

    def configurations(self) -> Sequence[None]:
        return [None]

    def run(self, config: None) -> Outcome:
        if self.refuses:
            raise ValueError(self.refuses)
        got, again, truth = ([torch.full((4,), r)] for r in self.results)
        return Outcome(got, again, [t.double() for t in truth])


@pytest.mark.parametrize(
    ("check", "status", "why"),
    [
        (Fake(1.0, 1.0, 1.0001), "ok", None),
        (Fake(1.0, 1.0, 1.1), "wrong", "off by"),
        (Fake(float("nan"), 1.0, 1.0), "wrong", "off by nan"),
        (Fake(1.0, 1.0001, 1.0), "wrong", "two runs differ"),
        (Fake(refuses="groups"), "refused", "groups"),
        (Fake(1.0), "failed", "ValueError"),
    ],
)
def test_a_row_says_what_is_wrong(
    check: Fake, status: str, why: str | None, tmp_path: Path
) -> None:
    if status == "failed":
        check.run = lambda config: 1 / 0  # type: ignore[method-assign]
        why = "ZeroDivisionError"
    book = Book(tmp_path / "book.json")
    book.check(check, None)
    (row,) = json.loads((tmp_path / "book.json").read_text())["rows"].values()
    assert row["status"] == status
    assert why is None or why in row["why"]
    assert book.verdict() == int(status in ("wrong", "failed"))


def test_a_kernel_that_killed_its_process_is_named_and_not_tried_again(tmp_path: Path) -> None:
    class Deadly(Fake):
        def run(self, config: None) -> Outcome:
            raise KeyboardInterrupt

    path = tmp_path / "book.json"
    with pytest.raises(KeyboardInterrupt):
        Book(path).check(Deadly(), None)
    book = Book(path)
    book.check(Deadly(), None)
    assert book.rows["fake/tf32"] == {"status": "running"}
    assert book.verdict() == 1


def test_checks_compute_in_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.kernel_checks", str(tmp_path / "book.json")]
    command += ["--pattern", "pass/leaky_relu/fp16/*", "--share", "1/1"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    rows = json.loads((tmp_path / "book.json").read_text())["rows"]
    assert [row["status"] for row in rows.values()] == ["ok"] * 2
    assert 0 < max(row["error"] for row in rows.values()) < 2e-3
