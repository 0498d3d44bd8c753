"""A run of benchmarks: what it refuses, survives and goes on with. No test depends on a time."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedshape.bench import records, runner, suites
from fusedshape.bench.cases import Case
from fusedshape.bench.providers import Task
from fusedshape.bench.runner import run_suite
from fusedshape.cli import main
from fusedshape.files import with_checksum
from fusedshape.timing import Candidate
from tests.support.benchmarks import CPU, Script, install, problem, raising


def test_no_speed_up_of_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, wrong=lambda: problem(wrong=True), right=problem)
    out = tmp_path / "record.json"
    assert main(["bench", "--suite", "smoke", "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert "1 case(s) wrong or failed: pointwise/wrong" in shown.err
    assert "relative error" in shown.out
    wrong, right = records.load(out)["rows"]
    assert wrong["status"] == wrong["candidates"]["fused"]["status"] == "wrong"
    assert wrong["ratios"] == {}
    assert "ms" not in wrong["candidates"]["fused"]
    assert "ms" in wrong["candidates"]["eager"]
    assert right["status"] == "ok"
    assert set(right["ratios"]) == {"fused/bare", "eager/fused"}


@pytest.mark.parametrize("wrong", [False, True])
def test_an_engine_that_cannot_run(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    """It is said; only one that computes something else makes the row wrong."""

    def build() -> Task:
        made = problem()
        other = problem(wrong=True) if wrong else raising(ValueError("engine cannot run"))()
        named = {**made.candidates, "fused triton": other.candidates["fused"]}
        return replace(made, candidates=named)

    install(monkeypatch, row=build)
    (row,) = run_suite("smoke")["rows"]
    assert row["status"] == ("wrong" if wrong else "ok")
    assert row["candidates"]["fused triton"]["status"] == ("wrong" if wrong else "failed")
    assert set(row["ratios"]) == {"fused/bare", "eager/fused"}


def test_a_wrong_yardstick_is_no_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Task:
        good = problem()
        return replace(good, truth=lambda: {"y": torch.full((64,), 100.0, dtype=torch.float64)})

    install(monkeypatch, row=build)
    (row,) = run_suite("smoke")["rows"]
    assert row["candidates"]["eager"]["status"] == "wrong"
    assert row["ratios"] == {"fused/bare": row["ratios"].get("fused/bare")}


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Task:
        made = problem()
        nan = replace(
            made.candidates["fused"], check=lambda: {"y": torch.full((64,), float("nan"))}
        )
        return replace(made, candidates={**made.candidates, "fused": nan})

    install(monkeypatch, row=build)
    (row,) = run_suite("smoke")["rows"]
    assert row["status"] == "wrong"


@pytest.mark.parametrize("after", [0, 3], ids=["at the check", "while timed"])
def test_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    def build() -> Task:
        calls = iter(range(10**9))

        def fill() -> None:
            if next(calls) >= after:
                torch.empty(1 << 55, dtype=torch.int8)

        return problem(then=fill)

    install(monkeypatch, full=build, fine=problem)
    full, fine = run_suite("smoke")["rows"]
    assert full["status"] == full["candidates"]["fused"]["status"] == "out of memory"
    assert "memory" in full["why"]
    assert full["candidates"]["eager"]["ms"]
    assert full["ratios"] == {}
    assert fine["status"] == "ok"


def test_out_of_memory_of_a_gpu_and_while_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Task:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    install(monkeypatch, full=build, other=raising(ValueError("no such thing\nmore")))
    full, other = run_suite("smoke")["rows"]
    assert (full["status"], full["candidates"]) == ("out of memory", {})
    assert (other["status"], other["why"]) == ("failed", "ValueError: no such thing")


def test_interrupt_keeps_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, one=problem, two=raising(KeyboardInterrupt()), three=problem)
    out = tmp_path / "record.json"
    assert main(["bench", "--suite", "smoke", "--out", str(out)]) == 130
    record = records.load(out)
    assert [row["case"] for row in record["rows"]] == ["pointwise/one"]
    assert not record["finished"]
    assert "not finished" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["record.json"]


def test_termination_keeps_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def build() -> Task:
        return problem(then=lambda: signal.raise_signal(signal.SIGTERM))

    install(monkeypatch, one=problem, two=build)
    out = tmp_path / "record.json"
    assert main(["bench", "--suite", "smoke", "--out", str(out)]) == 143
    assert [row["case"] for row in records.load(out)["rows"]] == ["pointwise/one"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_old_file_is_no_result_of_an_interrupted_run(
    monkeypatch: pytest.MonkeyPatch, smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record.json"
    out.write_bytes(smoke.read_bytes())
    install(monkeypatch, one=raising(KeyboardInterrupt()))
    assert main(["bench", "--suite", "smoke", "--out", str(out)]) == 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("old", [False, True])
def test_two_runs_do_not_share_a_file(
    monkeypatch: pytest.MonkeyPatch,
    smoke: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: bool,
) -> None:
    """Whoever finds that the file is another's leaves it alone, and shows nothing of it."""
    out = tmp_path / "record.json"
    if old:
        out.write_text("{}")

    def other() -> Task:
        (tmp_path / "other.json").write_bytes(smoke.read_bytes())
        os.replace(tmp_path / "other.json", out)
        return problem()

    install(monkeypatch, one=problem, two=other, three=problem)
    assert main(["bench", "--suite", "smoke", "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{out} was written by somebody else" in shown.err
    assert "three" not in shown.err
    assert out.read_bytes() == smoke.read_bytes()
    # A file that was taken away is written anew.
    install(monkeypatch, one=problem, two=lambda: out.unlink() or problem())
    assert main(["bench", "--suite", "smoke", "--out", str(out)]) == 0
    assert len(records.load(out)["rows"]) == 2


def test_limit_skips_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, one=problem)
    (row,) = run_suite(replace(suites.SUITES["smoke"], limit=-1.0))["rows"]
    assert row["status"] == "skipped"
    assert "no time" in row["why"]


def test_checks_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def build(name: str) -> Callable[[], Task]:
        def make() -> Task:
            order.append(name)
            return problem()

        return make

    install(monkeypatch, a=build("a"), b=build("b"))
    suite = replace(suites.SUITES["smoke"], check_first=True)
    record = run_suite(suite)
    assert order == ["a", "b", "a", "b"]
    assert all("ms" in row["candidates"]["fused"] for row in record["rows"])


def test_checks_leave_time_for_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case takes a second of a clock of its own; checks first may take three of ten."""
    now, order = [0.0], []

    def build(name: str) -> Callable[[], Task]:
        def make() -> Task:
            order.append(name)
            now[0] += 1.0
            return problem()

        return make

    install(monkeypatch, **{name: build(name) for name in "abcdefghij"})
    monkeypatch.setattr(runner._Run, "elapsed", lambda self: now[0])
    suite = replace(suites.SUITES["smoke"], check_first=True, limit=10.0)
    rows = run_suite(suite)["rows"]
    # The fourth check would end after 3 seconds, the eighth timing after 10.
    assert "".join(order) == "abc" + "abcdefg"
    timed = [row["case"][-1] for row in rows if "ms" in row["candidates"].get("fused", {})]
    assert "".join(timed) == "abcdefg"
    assert [row["status"] for row in rows] == ["ok"] * 7 + ["skipped"] * 3
    assert "no time for it in 10 s" in rows[-1]["why"]


def test_an_interrupted_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record.json"
    argv = ["bench", "--suite", "smoke", "--out", str(out)]
    broken = raising(ValueError("never"))
    install(monkeypatch, one=problem, two=broken, three=raising(KeyboardInterrupt()))
    assert main(argv) == 130
    first = records.load(out)
    assert [row["status"] for row in first["rows"]] == ["ok", "failed"]
    # What is finished is not run again, what has failed neither.
    install(monkeypatch, one=broken, two=problem, three=problem)
    assert main([*argv, "--resume"]) == 1
    record = records.load(out)
    assert record["finished"]
    assert record["rows"][:2] == first["rows"]
    assert [row["status"] for row in record["rows"]] == ["ok", "failed", "ok"]
    out.write_text(json.dumps(with_checksum({**record, "commit": "another"})))
    capsys.readouterr()
    assert main([*argv, "--resume"]) == 1
    assert "different: commit" in capsys.readouterr().err
    machine = {**record["machine"], "threads": 99, "cpu": "abacus"}
    out.write_text(json.dumps(with_checksum({**record, "machine": machine})))
    assert main([*argv, "--resume"]) == 1
    assert "different: machine's cpu and threads)" in capsys.readouterr().err
    assert main(["bench", "--suite", "smoke", "--resume", "--out", str(tmp_path / "new.json")]) == 1
    assert len(records.load(tmp_path / "new.json")["rows"]) == 3


def test_what_was_only_checked_is_timed_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, one=problem, two=problem)
    suite = replace(suites.SUITES["smoke"], check_first=True)
    out = tmp_path / "record.json"
    visit = runner._Run.visit

    def interrupted(self: Any, case: Case, timed: bool) -> dict[str, Any]:
        if timed:
            raise KeyboardInterrupt
        return visit(self, case, timed)

    monkeypatch.setattr(runner._Run, "visit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, out=out)
    assert [row["status"] for row in records.load(out)["rows"]] == ["ok", "ok"]
    monkeypatch.setattr(runner._Run, "visit", visit)
    record = run_suite(suite, out=out, resume=True)
    assert all("ms" in row["candidates"]["fused"] for row in record["rows"])


def test_a_lost_device_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An illegal access leaves a process that fails in whatever it asks of the GPU."""
    install(monkeypatch, bad=raising(RuntimeError("CUDA error: illegal access")), good=problem)

    def lost(self: Any, case: Case) -> None:
        raise runner.DeviceLostError(f"the GPU stopped working in {case.name}")

    monkeypatch.setattr(runner._Run, "demand_device", lost)
    out = tmp_path / "record.json"
    argv = ["bench", "--suite", "smoke", "--out", str(out)]
    assert main(argv) == 1
    assert "stopped working in pointwise/bad" in capsys.readouterr().err
    monkeypatch.undo()
    install(monkeypatch, bad=raising(RuntimeError("CUDA error: illegal access")), good=problem)
    assert main([*argv, "--resume"]) == 1
    assert [row["status"] for row in records.load(out)["rows"]] == ["failed", "ok"]


def test_a_device_is_asked_whether_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    run = object.__new__(runner._Run)
    case = Case("pointwise/x", ("smoke",), lambda setting: problem())
    run.device = CPU
    run.demand_device(case)
    run.device = torch.device("cuda")

    def dead(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(runner.DeviceLostError, match=r"pointwise/x .*illegal memory access"):
        run.demand_device(case)


def test_other_tensors_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="wanted"):
        runner.errors({"y": torch.zeros(2)}, {"y": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="wanted"):
        runner.errors({}, {"y": torch.zeros(3)})


@given(st.floats(0.2, 3.0), st.floats(1e-3, 1e3))
def test_exponents_are_found(k: float, factor: float) -> None:
    points = [(float(n), factor * n**k) for n in (10, 100, 1000)]
    assert runner.exponent(points) == pytest.approx(k, abs=1e-9)


@pytest.mark.parametrize(("k", "holds"), [(1.0, True), (1.5, False), (0.2, True)])
def test_growth_is_judged(k: float, holds: bool) -> None:
    rows = [
        {
            "parameters": {"series": "s", "size": n, "metric": "saved_bytes"},
            "candidates": {"fused": {"status": "ok", "saved_bytes": int(1000 * n**k)}},
        }
        for n in (1000, 10, 100)
    ]
    (fit,) = runner.fits(rows)
    assert fit["sizes"] == [10, 100, 1000]
    assert fit["exponent"] == pytest.approx(k, abs=0.01)
    assert fit["holds"] is holds
    assert runner.fits(rows[:2]) == []


def test_a_graph_that_cannot_be_captured() -> None:
    """The row keeps its times, the others keep their graphs."""

    class Capture(Script):
        def seconds(self, candidate: Candidate, repeats: int) -> float:
            if candidate.yardstick:
                raise RuntimeError("operation not permitted when stream is capturing")
            return 0.5

    made = problem()
    names = list(made.candidates)
    row: dict[str, Any] = {"candidates": {n: {"status": "ok", "ms": [1, 1, 1]} for n in names}}
    runner.timings(row, made, Capture(), suites.SUITES["smoke"], "graph_")
    assert {name for name, c in row["candidates"].items() if "graph_ms" in c} == {"bare", "fused"}
    assert "capturing" in row["candidates"]["eager"]["graph_why"]
    assert all(c["status"] == "ok" for c in row["candidates"].values())
    assert set(row["graph_ratios"]) == {"fused/bare"}
