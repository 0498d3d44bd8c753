"""fusedshape bench: what it prints, writes and refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fusedshape.bench import runner
from fusedshape.cli import main
from tests.support.benchmarks import install, problem, raising


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


@pytest.mark.parametrize("limit", ["nan", "0", "-5"])
def test_a_limit_is_a_time(capsys: pytest.CaptureFixture[str], tmp_path: Path, limit: str) -> None:
    out = tmp_path / "record.json"
    assert main(["bench", "--suite", "smoke", "--limit", limit, "--out", str(out)]) == 1
    assert f"above 0 seconds, got {limit}" in capsys.readouterr().err
    assert not out.exists()


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
