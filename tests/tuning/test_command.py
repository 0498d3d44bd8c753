"""fusedshape tune: what it measures, keeps and says."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedshape import native, tuning
from fusedshape.cli import main
from fusedshape.nn import ShapedConv2d
from fusedshape.ops import choice
from fusedshape.ops.layer import Layer
from fusedshape.ops.problem import Direction, Problem
from fusedshape.tuning import cache, chooser, command, measuring
from tests.support.rivals import CPU, LEAKY, PROBLEM, RECORD, Rival, steady


def tune(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = main(["tune", *argv])
    except SystemExit as leave:
        code = int(leave.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.usefixtures("mine")
def test_tune_without_another_engine(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    argv = "tune_mine:net", "--input", "2,2,6,6", "--device", "cpu"
    code, out, err = tune(capsys, *argv)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[-2] == "aten is the only candidate, nothing to measure"
    assert lines[-1].startswith("left out: native: ")
    assert lines[-1].endswith("[0 fprop, 0 wgrad, 1 fprop and 5 more]")
    assert sum("aten (only candidate)" in line for line in lines) == 8
    assert not own_cache.exists()
    code, out, _ = tune(capsys, *argv, "--json", "--dtype", "bf16", "--autocast")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [row["record"] for row in rows] == [None] * 8
    assert {row["problem"]["dtype"] for row in rows} == {"bfloat16"}


@pytest.mark.usefixtures("mine")
def test_tune_measures_and_keeps(
    capsys: pytest.CaptureFixture[str], rival: Rival, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = "tune_mine:net", "--input", "2,2,6,6", "--device", "cpu"
    monkeypatch.setattr(command, "measure", None)
    code, out, err = tune(capsys, *argv, "--dry-run")
    assert (code, err) == (0, "")
    assert out.count("aten (not measured)") == 8
    monkeypatch.setattr(command, "measure", fresh_clocks(0.5))
    code, out, err = tune(capsys, *argv)
    assert (code, err) == (0, "")
    assert out.count("2.00×") == 9
    assert "8 of 8 cases have a faster engine" in out
    assert "8.000 ms → 4.000 ms (2.00×)" in out
    # Layers 1 and 2 are alike: fprop and wgrad of the first, and all three of them.
    assert tuning.status()["tuning_entries"] == 5
    monkeypatch.setattr(command, "measure", None)
    code, out, _ = tune(capsys, *argv, "--json", "--dry-run", "--force")
    rows = json.loads(out)["rows"]
    assert [row["measured"] for row in rows] == [False] * 8
    assert {row["record"]["engine"] for row in rows} == {"triton"}
    monkeypatch.setattr(command, "measure", fresh_clocks(0.99))
    code, out, _ = tune(capsys, *argv, "--force")
    assert "0 of 8 cases have a faster engine" in out
    assert out.count("1.00×") == 9
    rival.factor = 2.0
    code, out, _ = tune(capsys, *argv, "--force")
    assert code == 0
    assert out.count("WRONG NUMBERS, not used: triton: result 0: off by ") == 2
    assert "[1 fprop, 2 fprop]" in out


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("place", ["a file", "no room"])
def test_what_cannot_be_kept_is_an_error(
    capsys: pytest.CaptureFixture[str],
    rival: Rival,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: str,
) -> None:
    if place == "a file":
        (tmp_path / "cache").write_text("in the way")
    else:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache.os, "replace", full)
    monkeypatch.setattr(command, "measure", fresh_clocks(0.5))
    code, out, err = tune(capsys, "tune_mine:net", "--input", "2,2,6,6", "--device", "cpu")
    assert code == 1
    assert "8 of 8 cases have a faster engine" in out
    assert "kept in" not in out
    assert f"could be kept in {tmp_path / 'cache'}" in err


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("how", "ended"),
    [(signal.SIGINT, (130, "interrupted")), (signal.SIGTERM, (143, "terminated"))],
)
def test_an_interrupt_shows_what_was_measured(
    capsys: pytest.CaptureFixture[str],
    rival: Rival,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
    ended: tuple[int, str],
) -> None:
    measure, left = fresh_clocks(0.5), iter(range(3))

    def interrupted(*args: Any) -> measuring.Result:
        if next(left, None) is None:
            signal.raise_signal(how)
        return measure(*args)

    monkeypatch.setattr(command, "measure", interrupted)
    code, out, err = tune(capsys, "tune_mine:net", "--input", "2,2,6,6", "--device", "cpu")
    assert (code, err) == (ended[0], f"fusedshape: {ended[1]}\n")
    assert "3 of 3 cases have a faster engine" in out
    assert tuning.status()["tuning_entries"] == 3


@pytest.mark.skipif(not native.available(), reason="csrc is not built")
def test_the_table_says_who_computes_a_layer_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names unmeasured layers too, and records that only torch.compile looks up."""
    asked: list[str] = []
    choose = choice.choose_engine

    def spy(*args: Any) -> str:
        asked.append(choose(*args))
        return asked[-1]

    monkeypatch.setattr(choice, "choose_engine", spy)
    monkeypatch.setattr(command, "measure", fresh_clocks(0.5))
    layer = ShapedConv2d(64, 64, 1, spec=LEAKY).to(memory_format=torch.channels_last)
    for batch, dry, measured in (
        (8, "native (not measured)", "native"),
        (2, "aten (not measured)", "native (torch.compile only)"),
    ):
        x = torch.randn(batch, 64, 8, 8).to(memory_format=torch.channels_last)
        found = tuning.fused_layers(nn.Sequential(layer), x)
        (row, _) = command.tune(found, CPU, dry_run=True, progress=False)
        assert command._figures(row)[0] == dry
        asked.clear()
        choice.forget_choices()
        layer(x).sum().backward()
        assert (asked or ["aten"])[0] == dry.split()[0]
        rows = list(command.tune(found, CPU, progress=False))
        assert command._figures(rows[0])[0] == measured
        assert ("so small that" in command.text(rows)) == (batch == 2)


def test_who_cannot_run_is_told(rival: Rival, monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(x: Tensor, layer: Layer) -> str | None:
        groups = layer.geometry.groups
        return None if groups == 1 else f"groups={groups}"

    monkeypatch.setattr(rival, "why_not", why_not)
    model = nn.Sequential(*(ShapedConv2d(4, 4, 1, groups=n, spec=LEAKY) for n in (1, 2, 4, 2)))
    found = tuning.fused_layers(model, torch.zeros(1, 4, 3, 3))
    lines = command.text(list(command.tune(found, CPU, dry_run=True))).splitlines()
    for i, groups in enumerate((1, 2, 4, 2)):
        own = [line for line in lines if line.startswith(f"{i} ")]
        assert all(("not measured" if groups == 1 else "only candidate") in line for line in own)
    assert [line.partition(": ")[2] for line in lines if line.startswith("left out")] == [
        "triton: engine 'triton' cannot run this layer: groups=2 "
        "[1 fprop, 1 dgrad, 1 wgrad and 3 more]",
        "triton: engine 'triton' cannot run this layer: groups=4 [2 fprop, 2 dgrad, 2 wgrad]",
    ]


def fresh_clocks(factor: float) -> Callable[..., measuring.Result]:
    def run(
        direction: Direction, problem: Problem, device: torch.device, _: object
    ) -> measuring.Result:
        return tuning.measure(direction, problem, device, steady(factor))

    return run


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("tune_mine:net",), 2, "--input"),
        (("tune_mine:net", "--input", "2,x"), 2, "positive integers"),
        (("tune_mine:net", "--input", "2,0,6,6"), 2, "positive integers"),
        (("tune_mine:net", "--input", "2,2,6,6", "--dtype", "int8"), 2, "--dtype"),
        (("tune_mine:plain", "--input", "2,4"), 1, "no fused layers"),
        (("tune_mine:net", "--input", "2,3,6,6"), 1, "input channels"),
        (("tune_mine:nothing", "--input", "2"), 1, "has no 'nothing'"),
        (("builtins:dict", "--input", "2"), 1, "not an nn.Module"),
        (("tune_mine:net", "--input", "2,2,6,6", "--device", "cuda:99"), 1, "CUDA device"),
        (("tune_mine:net", "--input", "2,2,6,6", "--device", "abacus"), 1, "abacus"),
        (("tune_mine:net", "--input", "2,2,6,6", "--device", "meta"), 1, "known: cpu, cuda"),
        (("tune_mine:net", "--input", "2,2,6,6", "--autocast"), 1, "got --dtype fp32"),
        (("tune_mine:fails", "--input", "2"), 1, "tune_mine:fails raised KeyError"),
    ],
)
def test_tune_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], code: int, message: str
) -> None:
    got, out, err = tune(capsys, *argv)
    assert (got, out) == (code, "")
    assert message in err


def test_info_tells(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    chooser.keep("fprop", PROBLEM, CPU, RECORD)
    assert main(["info", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tuning"] == "cached"
    assert row["tuning_cache"] == str(own_cache)
    assert row["tuning_entries"] == (0 if torch.cuda.is_available() else 1)
