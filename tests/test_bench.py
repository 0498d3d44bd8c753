"""The benchmarks: what they record, refuse, keep and conclude. No test here depends on a time."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch.utils._python_dispatch import TorchDispatchMode

from fusedshape import machine, native, timing
from fusedshape.bench import cases, compare, providers, records, runner, suites
from fusedshape.bench.cases import CASES, Case, Setting
from fusedshape.bench.providers import Problem
from fusedshape.bench.runner import run_suite
from fusedshape.cli import main
from fusedshape.models import vanilla_resnet, vanilla_vgg16
from fusedshape.ops import ChainLayer, conv_act, conv_chain
from fusedshape.timing import Candidate

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of the smoke suite, made by the command."""
    out = tmp_path_factory.mktemp("bench") / "smoke.json"
    assert main(["bench", "--suite", "smoke", "--out", str(out)]) == 0
    return out


def problem(*, wrong: bool = False, then: Callable[[], Any] = lambda: None) -> Problem:
    """Three providers of x + 1; `then` runs when the library's own is at work."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def own(_: object = None) -> torch.Tensor:
        then()
        return x + (1.1 if wrong else 1.0)

    def stock(_: object = None) -> torch.Tensor:
        return x + 1.0

    return Problem(
        {
            "bare": Candidate(stock),
            "fused": Candidate(own, check=lambda: {"y": own()}, claims=True),
            "eager": Candidate(stock, check=lambda: {"y": stock()}, yardstick=True),
        },
        lambda: {"y": x.double() + 1.0},
    )


def install(monkeypatch: pytest.MonkeyPatch, **builds: Callable[[], Problem]) -> None:
    """Make the suite "smoke" one of these cases."""
    made = tuple(
        Case(f"pointwise/{name}", ("smoke",), lambda setting, build=build: build())
        for name, build in builds.items()
    )
    monkeypatch.setattr(suites, "CASES", made)


def raising(error: BaseException) -> Callable[[], Problem]:
    def fail() -> None:
        raise error

    return lambda: problem(then=fail)


# The record of the smoke suite.


def test_every_smoke_case_is_right(smoke: Path) -> None:
    record = records.load(smoke)
    assert record["finished"]
    assert [row["case"] for row in record["rows"]] == [
        case.name for case in suites.SUITES["smoke"].cases()
    ]
    for row in record["rows"]:
        states = {name: c["status"] for name, c in row["candidates"].items() if name != "dks"}
        assert set(states.values()) == {"ok"}, row
        own = row["candidates"]["fused"]
        if "samples_ms" in own:
            assert own["ms"][0] <= own["ms"][1] <= own["ms"][2]
            assert len(own["samples_ms"]) >= 3
    layers = [row for row in record["rows"] if row["case"].startswith(("conv_act", "linear_act"))]
    assert layers
    for row in layers:
        assert {"fused/bare", "eager/fused", "folded/fused", "inplace/fused"} <= set(row["ratios"])
        assert row["candidates"]["fused"]["error"].keys() == {"y", "dx", "dweight", "dbias"}
        assert row["candidates"]["fused"]["of_copy"] > 0
        # What the choice of an engine is worth.
        assert "fused aten/fused" in row["ratios"]
    assert {fit["series"] for fit in record["fits"]} == {"solve TAT leaky_relu", "solve TAT tanh"}


def test_record_says_where_it_comes_from(smoke: Path) -> None:
    record = records.load(smoke)
    assert record["machine"]["torch"] == torch.__version__
    assert record["seed"] == 0
    assert record["device"] == "cpu"
    assert set(record["ceilings"]) == {
        "copy GB/s",
        "matmul float32 TFLOP/s",
    }


def test_show_compare_plot(smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "show", str(smoke)]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown.splitlines()[1]
    assert "eager" in shown
    assert main(["bench", "compare", str(smoke), str(smoke)]) == 0
    shown = capsys.readouterr().out
    assert "faster" not in shown.replace("under 1 is faster", "")
    assert "slower" not in shown
    assert main(["bench", "plot", str(smoke), "--out", str(tmp_path)]) == 0
    names = {"speedup.png", "roofline.png", "memory.png", "accuracy.png", "scaling.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


# The file.


def test_round_trip(smoke: Path, tmp_path: Path) -> None:
    record = records.load(smoke)
    records.save(tmp_path / "again.json", record)
    assert records.load(tmp_path / "again.json") == record
    assert os.listdir(tmp_path) == ["again.json"]


def broken(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        record = json.loads(text)
        change(record)
        return json.dumps(record)

    return apply


BROKEN = {
    "cut off": (lambda text: text[: len(text) // 2], "not JSON"),
    "not a record": (lambda text: '{"rows": []}', "not a record of fusedshape bench"),
    "a list": (lambda text: "[]", "not a record of fusedshape bench"),
    "old": (broken(lambda r: r.update(schema=0)), "run its suite again"),
    "newer": (broken(lambda r: r.update(schema=99)), "install the fusedshape that wrote it"),
    "no rows": (broken(lambda r: r.pop("rows")), "lacks ['rows']"),
    "unknown field": (broken(lambda r: r.update(speed=2)), "unknown ['speed']"),
    "text for a number": (broken(lambda r: r.update(seed="0")), "record.seed is '0'"),
    "a boolean for a number": (broken(lambda r: r.update(seed=True)), "record.seed is True"),
    "a state": (broken(lambda r: r["rows"][0].update(status="fine")), "rows[0].status is 'fine'"),
    "two percentiles": (
        broken(lambda r: r["rows"][0]["candidates"]["fused"]["ms"].pop()),
        "has 2 entries, expected 3",
    ),
    "a row twice": (broken(lambda r: r["rows"].append(r["rows"][0])), "there twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(
    smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, message = BROKEN[name]
    path = tmp_path / "broken.json"
    path.write_text(change(smoke.read_text()))
    with pytest.raises(records.RecordError) as caught:
        records.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert main(["bench", "show", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_claims_of_the_unchecked_are_refused(smoke: Path, tmp_path: Path) -> None:
    record = records.load(smoke)
    row = next(row for row in record["rows"] if "eager/fused" in row["ratios"])
    row["candidates"]["fused"]["status"] = "wrong"
    with pytest.raises(records.RecordError, match="'fused' is wrong, yet has a time"):
        records.save(tmp_path / "record.json", record)
    for key in ("ms", "samples_ms"):
        del row["candidates"]["fused"][key]
    with pytest.raises(records.RecordError, match="of a candidate that is not ok"):
        records.save(tmp_path / "record.json", record)
    assert not list(tmp_path.iterdir())


def test_committed_records_load() -> None:
    found = [
        path
        for path in (ROOT / "bench/results").glob("*.json")
        if json.loads(path.read_text()).get("kind") == records.KIND
    ]
    assert found
    for path in found:
        assert records.load(path)["rows"]


# What a run refuses and survives.


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

    def build() -> Problem:
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
    def build() -> Problem:
        good = problem()
        return replace(good, truth=lambda: {"y": torch.full((64,), 100.0, dtype=torch.float64)})

    install(monkeypatch, row=build)
    (row,) = run_suite("smoke")["rows"]
    assert row["candidates"]["eager"]["status"] == "wrong"
    assert row["ratios"] == {"fused/bare": row["ratios"].get("fused/bare")}


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Problem:
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
    def build() -> Problem:
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
    def build() -> Problem:
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

    def build() -> Problem:
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


@pytest.mark.parametrize("limit", ["nan", "0", "-5"])
def test_a_limit_is_a_time(capsys: pytest.CaptureFixture[str], tmp_path: Path, limit: str) -> None:
    out = tmp_path / "record.json"
    assert main(["bench", "--suite", "smoke", "--limit", limit, "--out", str(out)]) == 1
    assert f"above 0 seconds, got {limit}" in capsys.readouterr().err
    assert not out.exists()


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

    def other() -> Problem:
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

    def build(name: str) -> Callable[[], Problem]:
        def make() -> Problem:
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

    def build(name: str) -> Callable[[], Problem]:
        def make() -> Problem:
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
    out.write_text(json.dumps({**record, "commit": "another"}))
    capsys.readouterr()
    assert main([*argv, "--resume"]) == 1
    assert "different: commit" in capsys.readouterr().err
    machine = {**record["machine"], "threads": 99, "cpu": "abacus"}
    out.write_text(json.dumps({**record, "machine": machine}))
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


@pytest.mark.parametrize("place", ["folder", "file/record.json"])
def test_nowhere_to_write_is_found_out_first(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    install(monkeypatch, one=raising(AssertionError("ran")))
    monkeypatch.setattr(runner, "ceilings", None)
    out = tmp_path / place
    assert main(["bench", "--suite", "smoke", "--out", str(out)]) == 1
    assert str(tmp_path / place.split("/")[0]) in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seeds_have_a_range(capsys: pytest.CaptureFixture[str], seed: str) -> None:
    assert main(["bench", "--suite", "smoke", "--seed", seed]) == 1
    assert f"got {seed}" in capsys.readouterr().err


def test_a_line_for_each_case_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, one=problem, two=problem)
    assert main(["bench", "--suite", "smoke", "--out", str(tmp_path / "r.json")]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert [line.split("] ")[1] for line in lines[:2]] == ["pointwise/one", "pointwise/two"]
    assert lines[0].startswith("[1/2, ")
    assert "\x1b" not in out + err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_suite_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--suite", "gpu-quick"])
    assert caught.value.code == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ("show",),
        ("compare", "one.json"),
        ("compare", "1.json", "2.json", "3.json"),
        ("run", "a.json"),
        ("--suite", "all"),
        ("race",),
        ("--resume",),
        ("--limit", "soon"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *argv])
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("show", "missing.json"), "missing.json"),
        (("--suite", "smoke", "--case", "nothing*"), "fusedshape bench list"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str) -> None:
    assert main(["bench", *argv]) == 1
    assert message in capsys.readouterr().err


def test_unknown_suite() -> None:
    with pytest.raises(ValueError, match="known: smoke, cpu, solver"):
        run_suite("fast")


# The list of cases.


def test_names_are_unique_and_every_suite_has_cases(capsys: pytest.CaptureFixture[str]) -> None:
    for name, suite in suites.SUITES.items():
        own = [case.name for case in suite.cases()]
        assert len(own) == len(set(own)) > 8
        assert main(["bench", "list", "--suite", name]) == 0
        assert capsys.readouterr().out.splitlines() == own
    groups = {case.group for case in CASES if {"cpu", "solver", "scaling"} & set(case.suites)}
    assert groups == {
        *("pointwise", "conv_act", "linear_act", "chain", "net"),
        *("constants", "overhead", "import", "scaling", "diagnose"),
    }
    json.dumps([case.parameters for case in CASES])


def test_wrong_providers_are_found() -> None:
    """The check of a layer sees a wrong value and a wrong gradient of each leaf."""
    case = next(
        case for case in CASES if case.name.startswith("conv_act") and case.suites[0] == "smoke"
    )
    made = case.build(Setting(CPU))
    assert made.truth is not None
    truth = made.truth()
    for name, candidate in made.candidates.items():
        if name == "bare":
            assert candidate.check is None
            continue
        assert candidate.check is not None
        found = candidate.check()
        assert max(runner.errors(found, truth).values()) < 1e-5
        for key in truth:
            spoiled = {**found, key: found[key] * 1.01}
            results: dict[str, Any] = {"fused": {"status": "ok"}, "eager": {"status": "ok"}}
            trial = {
                "fused": Candidate(lambda _: None, check=lambda s=spoiled: s, claims=True),
                "eager": made.candidates["eager"],
            }
            runner.check(made, trial, results)
            assert results["fused"]["status"] == "wrong"
            assert results["fused"]["why"].startswith(key)


def test_networks_are_measured_as_one_node_too() -> None:
    case = next(case for case in CASES if case.group == "net" and "smoke" in case.suites)
    made = case.build(Setting(CPU))
    results: dict[str, Any] = {name: {"status": "ok"} for name in made.candidates}
    runner.check(made, made.candidates, results)
    assert {name for name, result in results.items() if result["status"] == "ok"} == {
        *("fused", "fused chain", "eager", "folded", "inplace")
    }
    chained, fused = (made.candidates[name] for name in ("fused chain", "fused"))
    assert chained.claims
    nodes = [
        timing.saved_bytes(c.graph, made.leaves) for c in (chained, fused) if c.graph is not None
    ]
    assert nodes[0] == nodes[1] > 0

    def count(candidate: Candidate) -> int:
        """Nodes of the graph."""
        assert candidate.graph is not None
        seen: set[Any] = set()
        left: list[Any] = [candidate.graph().grad_fn]  # type: ignore[attr-defined]
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                left += [before for before, _ in node.next_functions]
        return len([node for node in seen if "AccumulateGrad" not in node.name()])

    assert count(chained) < count(fused) / 2


def test_a_gradient_that_a_network_lacks_is_found() -> None:
    """That of one bias, which is little of the whole gradient."""
    net = partial(vanilla_resnet, 50, num_classes=10, width=8)
    how = {"seed": 0, "device": CPU, "dtype": torch.float32, "channels_last": True}
    made = providers.network(net, (2, 3, 32, 32), (), **how)
    spoiled = made.candidates["fused chain"]
    model = spoiled.check.__self__.model  # type: ignore[union-attr]
    name, bias = next((n, p) for n, p in model.named_parameters() if n.endswith("bias"))
    results: dict[str, Any] = {"fused chain": {"status": "ok"}, "eager": {"status": "ok"}}
    trial = {"fused chain": spoiled, "eager": made.candidates["eager"]}
    runner.check(made, trial, results)
    assert results["fused chain"]["status"] == "ok"
    bias.register_hook(torch.zeros_like)
    runner.check(made, trial, results)
    assert results["fused chain"]["status"] == "wrong"
    assert results["fused chain"]["why"].startswith(f"d{name} ")


def test_the_gpu_suite_has_every_layer() -> None:
    """Of ResNet-50 and VGG-16, at two batches, in each mode, beside both modes of torch.compile."""
    found = {
        (tuple(p["shape"]), p["batch"], p["mode"])
        for p in (case.parameters for case in suites.SUITES["gpu"].cases("conv_act/leaky_relu/*"))
        if p["dtype"] == "bfloat16"
    }
    modes = ("forward", "backward", "step")
    wanted = itertools.product((*cases.RESNET50, *cases.VGG16), (32, 256), modes)
    assert found.issuperset(wanted)
    convolutions = {
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
        for m in vanilla_vgg16().modules()
        if isinstance(m, torch.nn.Conv2d)
    }
    assert {shape[:4] for shape in cases.VGG16} == convolutions
    assert suites.SUITES["gpu"].compiled == tuple(providers.COMPILED)


def test_other_tensors_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="wanted"):
        runner.errors({"y": torch.zeros(2)}, {"y": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="wanted"):
        runner.errors({}, {"y": torch.zeros(3)})


def test_what_is_saved() -> None:
    """One activation a layer for ours, in either form; two for eager, whose γ is a product."""
    depth, shape = 5, (2, 8, 6)
    how = {"seed": 0, "device": CPU, "dtype": torch.float32, "channels_last": True}
    made = providers.chain(cases.spec_of("leaky_relu"), depth, shape, "step", (), **how)
    one = 4 * 2 * 8 * 6 * 6
    saved = {
        name: timing.saved_bytes(c.graph, made.leaves)
        for name, c in made.candidates.items()
        if c.graph is not None
    }
    assert saved["fused"] == saved["fused chain"] == saved["inplace"] == depth * one
    # The input of each leaky_relu, and what the next convolution reads: but for the last, γ·φ.
    assert saved["eager"] == (2 * depth - 1) * one


def test_saved_counts_storages_once() -> None:
    x = torch.randn(10, requires_grad=True)
    y = x.exp()
    assert timing.saved_bytes(lambda: (y * y, y[:5] * y[:5]), [x]) == 40
    assert timing.saved_bytes(lambda: x * x, [x]) == 0


# Timing, by a clock that keeps a list.


class Script:
    """A clock that returns what it is told, and remembers who was asked."""

    least = 0.0

    def __init__(self) -> None:
        self.asked: list[str] = []

    def seconds(self, candidate: Candidate, repeats: int) -> float:
        self.asked.append(candidate.run(candidate.prepare()))
        return float(len(self.asked))


def test_candidates_take_turns() -> None:
    clock = Script()
    named = {name: Candidate(lambda _, name=name: name) for name in "abc"}
    times = timing.interleaved(named, clock, budget=0.0, least=40, most=40)
    asked = clock.asked[6:]
    assert asked[::2] == asked[1::2], "a call before each that is timed"
    asked = asked[::2]
    rounds = ["".join(asked[i : i + 3]) for i in range(0, len(asked), 3)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(set(rounds)) == 6, "everybody comes after everybody"
    assert all(len(samples) == 40 for samples in times.values())
    assert all(second % 2 == 0 for samples in times.values() for second in samples)


def test_dear_candidates_are_asked_once() -> None:
    clock = Script()
    named = {"a": Candidate(lambda _: "a"), "dear": Candidate(lambda _: "dear", most=1)}
    times = timing.interleaved(named, clock, budget=0.0, least=5, most=5)
    assert clock.asked.count("dear") == len(times["dear"]) == 1
    assert len(times["a"]) == 5


def test_host_clock_leaves_preparation_out_and_repeats() -> None:
    prepared = []
    candidate = Candidate(
        lambda state: state.append(1), lambda: prepared.append([]) or prepared[-1]
    )
    assert timing.HostClock().seconds(candidate, 7) > 0
    assert prepared == [[1]] * 7
    own = Candidate(lambda _: 0.25, self_timed=True)
    assert timing.HostClock().seconds(own, 7) == 0.25


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_percentiles_lie_between(values: list[float]) -> None:
    low, middle, high = timing.percentiles(values)
    slack = 1e-9 * max(values)
    assert min(values) - slack <= low <= middle <= high <= max(values) + slack
    assert middle == pytest.approx(float(torch.tensor(values, dtype=torch.float64).quantile(0.5)))


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


def test_a_cpus_ceiling_is_the_better_of_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch hands a 1×1 convolution to oneDNN from 16 images on, whatever the threads."""
    shapes = []
    convolve = torch.conv2d

    def spy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.append((x.shape, weight.shape))
        y = convolve(x, weight)
        assert y.numel() == 64 * 64
        assert torch.equal(y, torch.full_like(y, 64.0))
        return y

    monkeypatch.setattr(torch, "conv2d", spy)
    found = timing.ceilings(CPU, [torch.float32], copied=1 << 10, product=64)
    assert set(found) == {"copy GB/s", "matmul float32 TFLOP/s"}
    assert {x[0] for x, _ in shapes} == {16}


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


def test_providers_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    names = {"fused", "fused aten", "fused triton", "reference"}
    assert set(providers.asked(conv_act, gpu)) == names
    assert set(providers.asked(conv_act, CPU)) == {"fused", "fused aten", "reference"}


def test_no_gradient_where_rounding_decides() -> None:
    z = torch.tensor([0.0, 1e-7, -1e-7, 1e-3, -1.0, 1.0])
    spec = cases.spec_of("leaky_relu")
    assert providers._undecided(z, spec).tolist() == [True] * 3 + [False] * 3
    assert not providers._undecided(z, cases.spec_of("tanh")).any()


# Comparisons.


@given(st.integers(1, 60))
def test_intervals_miss_as_seldom_as_they_say(n: int) -> None:
    found = compare.interval([float(i) for i in range(n)])
    k = 0 if found is None else int(found[0]) + 1
    if found is not None:
        assert found[1] == n - k
        assert 2 * binom.cdf(k - 1, n, 0.5) <= compare.RISK
    if 2 * (k + 1) <= n:
        assert 2 * binom.cdf(k, n, 0.5) > compare.RISK


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


@given(
    factor=st.floats(0.3, 3.0),
    drift=st.floats(0.1, 10.0),
    noise=st.floats(0.0, 0.3),
    runs=st.integers(1, 5),
    seed=st.integers(0, 2**20),
)
def test_verdicts(factor: float, drift: float, noise: float, runs: int, seed: int) -> None:
    """`factor` on the candidate, `drift` on all runs after, `noise` on every sample."""
    rng = random.Random(seed)
    template = records.new("smoke", CPU, 0)

    def run(own: float, all_of_it: float) -> dict[str, Any]:
        def draw(scale: float) -> list[float]:
            return [scale * all_of_it * math.exp(noise * rng.uniform(-1, 1)) for _ in range(15)]

        return synthetic(template, {"eager": draw(1.0), "fused": draw(own)})

    before, after = ([run(*how) for _ in range(runs)] for how in ((1.0, 1.0), (factor, drift)))
    (change,) = compare.compare(before, after)
    (back,) = compare.compare(after, before)
    assert (change.candidate, change.control) == ("fused", "eager")
    assert change.low <= change.ratio <= change.high
    # Ratios of two samples are off by exp(2 · noise) at most, ratios of two such by its square.
    worst = math.exp(4 * noise) * (1 + 1e-9)
    assert factor / worst <= change.ratio <= factor * worst
    few = "" if runs > 3 else "perhaps "
    opposite = {f"{few}faster": f"{few}slower", f"{few}slower": f"{few}faster"}
    same = ("cannot tell", f"{few}same")
    assert back.verdict in (opposite.get(change.verdict, change.verdict), *same)
    if change.verdict.endswith("faster"):
        assert factor < worst
    if change.verdict.endswith("slower"):
        assert factor > 1 / worst
    if noise * 4 < abs(math.log(factor)) - 0.05 and noise < 0.01:
        assert change.verdict == few + ("faster" if factor < 1 else "slower")


def process(
    rng: random.Random, template: dict[str, Any], factor: float, between: float
) -> dict[str, Any]:
    """A run whose process is off by a factor of its own, as real ones are, and its rounds less."""
    own = factor * math.exp(rng.gauss(0, between))
    eager = [math.exp(rng.gauss(0, 0.01)) for _ in range(30)]
    return synthetic(
        template, {"eager": eager, "fused": [own * e * math.exp(rng.gauss(0, 0.01)) for e in eager]}
    )


@pytest.mark.parametrize("between", [0.02, 0.2])
def test_the_same_code_is_not_called_another(between: float) -> None:
    """In 1000 comparisons of four runs with four of the same code."""
    rng = random.Random(0)
    template = records.new("smoke", CPU, 0)
    pool = [process(rng, template, 1.0, between) for _ in range(60)]
    wrong = 0
    for _ in range(1000):
        runs = rng.sample(pool, 8)
        (change,) = compare.compare(runs[:4], runs[4:])
        wrong += change.verdict in ("faster", "slower")
    # The bound is 2 / 70 of them; 4.5 standard deviations above.
    assert wrong <= 52
    (change,) = compare.compare(pool[:1], pool[1:2])
    assert change.verdict.startswith(("perhaps", "cannot tell"))


def test_a_long_table_warns_of_chance() -> None:
    template = records.new("smoke", CPU, 0)
    one = synthetic(template, {"fused": [2.0] * 10, "eager": [1.0] * 10})
    many = copy.deepcopy(one)
    many["rows"] = [{**one["rows"][0], "case": f"pointwise/{i}"} for i in range(70)]
    assert "of 70 comparisons, up to 2 would be" in compare.report([many] * 4, [many] * 4)
    assert "comparisons" not in compare.report([one] * 4, [one] * 4)
    assert "comparisons" not in compare.report([many] * 3, [many] * 3)


def test_a_tenth_slower_is_found() -> None:
    rng = random.Random(1)
    template = records.new("smoke", CPU, 0)
    found = 0
    for _ in range(50):
        before, after = ([process(rng, template, f, 0.01) for _ in range(4)] for f in (1.0, 1.1))
        (change,) = compare.compare(before, after)
        found += change.verdict == "slower"
        assert change.verdict in ("slower", "cannot tell")
    assert found >= 48


def test_no_verdict_without_control_or_on_another_machine() -> None:
    template = records.new("smoke", CPU, 0)
    fast, slow = [1.0] * 10, [2.0] * 10
    before = synthetic(template, {"fused": slow})
    after = synthetic(template, {"fused": fast})
    (change,) = compare.compare([before], [after])
    assert (change.ratio, change.control, change.verdict) == (0.5, "", "cannot tell")
    before = synthetic(template, {"fused": slow, "eager": fast})
    after = synthetic(template, {"fused": fast, "eager": fast})
    assert compare.compare([before], [after])[0].verdict == "perhaps faster"
    assert "four files of each" in compare.report([before], [after])
    assert compare.compare([before] * 4, [after] * 4)[0].verdict == "faster"
    assert "four files of each" not in compare.report([before] * 4, [after] * 4)
    other = {**before, "machine": {**before["machine"], "cpu": "another"}}
    assert compare.compare([other], [after])[0].verdict == "cannot tell"
    assert "different machines" in compare.report([other], [after])
    few = synthetic(template, {"fused": slow[:4], "eager": fast[:4]})
    assert compare.compare([few], [after])[0].verdict == "cannot tell"
    with pytest.raises(ValueError, match="run the same suite for all"):
        compare.compare([{**before, "device": "cuda"}], [after])
    with pytest.raises(ValueError, match="no case was timed in all"):
        compare.compare([{**before, "rows": []}], [after])


def git(folder: Path, *arguments: str) -> None:
    name = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True)


def test_what_cannot_be_compared_is_said() -> None:
    """Nobody should take what became wrong, or what is gone, for what did not change."""
    template = records.new("smoke", CPU, 0)
    good = synthetic(template, {"fused": [2.0] * 10, "eager": [1.0] * 10})
    more = copy.deepcopy(good)
    more["rows"].append({**copy.deepcopy(good["rows"][0]), "case": "pointwise/other"})
    bad = copy.deepcopy(more)
    bad["rows"][0]["candidates"]["fused"] = {"status": "wrong", "why": "dx is off"}
    assert list(compare.lost([more], [copy.deepcopy(more)])) == []
    shown = compare.report([more, more], [more, bad])
    assert "pointwise/synthetic: fused: wrong in 1 of 4 runs, the first of them after: dx" in shown
    (line,) = compare.lost([good], [more])
    assert line == "1 case(s) are not in all records: pointwise/other"
    bad["rows"].pop()
    with pytest.raises(ValueError, match=r"fused: wrong in 1 of 2 runs.*: dx is off"):
        compare.report([good], [bad])
    gone = copy.deepcopy(good)
    gone["rows"][0] |= {"status": "out of memory", "why": "full", "candidates": {}}
    assert list(compare.lost([good], [gone])) == [
        "pointwise/synthetic: fused: out of memory in 1 of 2 runs, the first of them after: full"
    ]


def test_two_revisions_are_measured_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a repository with a library that logs who runs, and writes a record."""
    log, repository = tmp_path / "log", tmp_path / "repository"
    package = repository / "fusedshape"
    (package / "bench").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "bench/command.py").touch()
    record = records.new("smoke", CPU, 0)
    git(repository, "init")
    for version, ms in (("one", 2.0), ("two", 1.0)):
        made = synthetic(record, {"fused": [ms] * 4, "eager": [1.0] * 4})
        (package / "record.json").write_text(json.dumps(made))
        (package / "__main__.py").write_text(
            "import os, pathlib, signal, sys, time\n"
            f"open({str(log)!r}, 'a').write(f'{version} {{sys.argv[1]}}\\n')\n"
            "here = pathlib.Path(__file__).parent\n"
            "if 'nothing' in sys.argv:\n"
            "    sys.exit('no case matches')\n"
            "if 'stop' in sys.argv:\n"
            "    os.kill(os.getppid(), signal.SIGTERM)\n"
            "    time.sleep(60)\n"
            "assert os.environ['FUSEDSHAPE_TUNING'] == 'off'\n"
            "if sys.argv[1] == 'bench':\n"
            "    pathlib.Path(sys.argv[-1]).write_bytes((here / 'record.json').read_bytes())\n"
        )
        git(repository, "add", "-A")
        git(repository, "commit", "-m", version)
        git(repository, "tag", version)
    monkeypatch.chdir(repository)
    assert main(["bench", "compare", "one", "two", "--suite", "smoke"]) == 0
    shown = capsys.readouterr()
    assert "faster" in shown.out.split("under 1 is faster")[1]
    assert [line.split()[0] for line in shown.err.splitlines()] == [f"[{i}/8]" for i in range(1, 9)]
    built = ["one build", "two build"]
    ran = [f"{name} bench" for name in ("one", "two", "two", "one") * 2]
    assert log.read_text().splitlines() == built + ran
    done = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    assert main(["bench", "compare", "one", "three"]) == 1
    assert "three" in capsys.readouterr().err
    (package / "__init__.py").write_text("x = 1")
    assert main(["bench", "compare", "one", "two", "--case", "nothing"]) == 1
    shown = capsys.readouterr().err
    assert "one: no case matches" in shown
    assert "changes that are not committed belong to no revision" in shown
    assert main(["bench", "compare", "one", "two", "--case", "stop"]) == 143
    done = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    git(repository, "rm", "fusedshape/bench/command.py")
    git(repository, "commit", "-m", "old")
    assert main(["bench", "compare", "one", "HEAD"]) == 1
    assert "has no fusedshape bench" in capsys.readouterr().err


def test_graphs_are_compared_with_graphs() -> None:
    template = records.new("smoke", CPU, 0)
    before = synthetic(template, {"fused": [2.0] * 10, "eager": [1.0] * 10})
    after = synthetic(template, {"fused": [2.0] * 10, "eager": [1.0] * 10})
    after["rows"][0]["candidates"]["fused"]["graph_samples_ms"] = [0.1] * 10
    assert compare.compare([before], [after])[0].verdict == "perhaps same"
    for record in (before, after):
        for result in record["rows"][0]["candidates"].values():
            result["graph_samples_ms"] = [1.0] * 10
    after["rows"][0]["candidates"]["fused"]["graph_samples_ms"] = [0.5] * 10
    assert compare.compare([before], [after])[0].ratio == 0.5


def test_files_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = records.new("smoke", CPU, 0)
    paths = []
    for i, ms in enumerate([2.0] * 4 + [1.0] * 4):
        paths.append(tmp_path / f"run {i}.json")
        records.save(paths[-1], synthetic(template, {"fused": [ms] * 9, "eager": [1.0] * 9}))
    # Options stand wherever they like.
    assert main(["bench", "compare", "--suite", "smoke", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "before  4 run(s)" in shown
    assert shown.splitlines()[-1].endswith(" faster")


# Where a record comes from.


def test_what_lies_beside_the_library_does_not_make_it_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an interrupted record, in the repository's root, could not be gone on with."""
    package = tmp_path / "fusedshape"
    for folder in (package, tmp_path / "csrc"):
        folder.mkdir()
        (folder / "file").touch()
    (package / "machine.py").touch()
    git(tmp_path, "init")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "all")
    monkeypatch.setattr(machine, "__file__", str(package / "machine.py"))
    assert machine.provenance()["dirty"] is False
    (tmp_path / "record.json").touch()
    assert machine.provenance()["dirty"] is False
    for place in (package / "new.py", tmp_path / "csrc/file"):
        place.write_text("changed")
        assert machine.provenance()["dirty"] is True
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "-m", "more")
        assert machine.provenance()["dirty"] is False


def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for called, typed in (
        ("/somewhere/bin/fusedshape", "fusedshape"),
        ("/somewhere/fusedshape/__main__.py", "python -m fusedshape"),
    ):
        monkeypatch.setattr(sys, "argv", [called, "bench", "--case", "conv_act/*", "--out", "a b"])
        command = machine.provenance()["command"]
        assert command == f"{typed} bench --case 'conv_act/*' --out 'a b'"


# The page.


class Passes(TorchDispatchMode):
    """Counts how often tensors of the activations' size are read and written, as on a GPU.

    There a convolution adds its bias in a pass of its own, and makes each of its gradients by
    itself. Every other operator reads its arguments once, and writes its result once.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.count += 2 if args[2] is None else 4
        elif name == "convolution_backward":
            dgrad, wgrad, bias = args[-1]
            self.count += 2 * dgrad + 2 * wgrad + bias
        elif not func.is_view and name not in ("detach", "empty_like"):
            written = [
                given
                for given, declared in zip(args, func._schema.arguments, strict=False)
                if declared.alias_info is not None and declared.alias_info.is_write
            ]
            results = [out] if isinstance(out, torch.Tensor) else [*(out or ())]
            fresh = [t for t in results if not any(t is given for given in written)]
            for t in (*args, *written, *fresh):
                self.count += isinstance(t, torch.Tensor) and t.numel() == self.size
        return out


#: First words of a line of the page's table, and the provider that it is about.
FORMS = {
    "eager:": "eager",
    "folded:": "inplace",
    "`conv_act` with torch's": "fused aten",
    "`conv_act` with convolutions of ours": "fused native",
    "`conv_chain`": "fused chain native",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_pages_passes_are_those_of_the_operators(form: str) -> None:
    """Of a layer more, for what the first and the last one cost besides."""
    if "native" in FORMS[form] and not native.available():
        pytest.skip("csrc is not built")
    page = (ROOT / "docs/performance.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {form}"))
    stated = [int(cell) for cell in line.split("|")[2:6]]
    spec, shape = replace(cases.spec_of("leaky_relu"), input_scale=1.0), (2, 16, 6)
    size, found = 2 * 16 * 36, []
    for depth in (3, 4):
        x = torch.randn(shape[0], shape[1], 6, 6).to(memory_format=torch.channels_last)
        x.requires_grad_()
        weights = [torch.randn(16, 16, 3, 3, requires_grad=True) for _ in range(depth)]
        biases = [torch.randn(16, requires_grad=True) for _ in range(depth)]
        layers = list(zip(weights, biases, strict=True))

        def run(x: torch.Tensor, layers: Any = layers) -> torch.Tensor:
            provider = FORMS[form]
            if "chain" in provider:
                made = [ChainLayer(w, b, spec, padding=1, engine="native") for w, b in layers]
                return conv_chain(x, made)
            for w, b in layers:
                if provider.startswith("fused"):
                    x = conv_act(x, w, b, spec, padding=1, engine=provider.split()[1])
                else:
                    z = F.conv2d(x, w, b, padding=1)
                    inplace = provider == "inplace"
                    x = F.leaky_relu(z, spec.negative_slope, inplace=inplace)
                    x = x if inplace else spec.output_scale * x
            return x

        with Passes(size) as forward:
            y = run(x)
        with Passes(size) as backward:
            torch.autograd.grad(y, [x, *weights, *biases], torch.ones_like(y))
        saved = timing.saved_bytes(lambda: run(x), [x, *weights, *biases])  # noqa: B023
        found.append((forward.count, backward.count, saved // (4 * size)))
    ahead, back, kept = (more - few for few, more in zip(*found, strict=True))
    assert [ahead, back, ahead + back, kept] == stated


def test_performance_page_is_that_of_the_records() -> None:
    from bench.tables import written

    page = (ROOT / "docs/performance.md").read_text()
    assert written(page, "docs/performance.md") == page, "run: python -m bench.tables"


def test_performance_page_names_commands_that_exist() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    for line in page.splitlines():
        words = line.split("#")[0].split()
        if words[:2] == ["fusedshape", "bench"] and "--suite" in words:
            assert words[words.index("--suite") + 1] in suites.SUITES
