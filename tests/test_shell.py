"""Subcommands, types of options, and messages in the words of the shell."""

from __future__ import annotations

import argparse

import pytest

from fusedshape.shell import Commands, as_field, message, respell, shape

NAMES = {"depth": "--depth", "clamp": "--clamp", "sigma_b": "--sigma-b", "fuse": "--no-fuse"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pass clamp=True", "pass --clamp"),
        ("not fused: fuse=False", "not fused: --no-fuse"),
        ("depth=5 is out of reach", "--depth 5 is out of reach"),
        ("got depth=None.", "got --depth none."),
        ("depth='a b', then", "--depth a b, then"),
        ("pass depth= by hand", "pass --depth by hand"),
        ("pass depth <= 0.9", "pass --depth <= 0.9"),
        ("depth must be at least 1", "--depth must be at least 1"),
        ("drop sigma_b, or sigma_b^2", "drop --sigma-b, or --sigma-b^2"),
        ("called as sigma_b(x, r)", "called as f(x, r)"),
        # What is no argument stays.
        ("a network of depth 5", "a network of depth 5"),
        ("wiring.depth=5 and my_depth=5", "wiring.depth=5 and my_depth=5"),
        ("--depth 5", "--depth 5"),
    ],
)
def test_arguments_become_options(text: str, said: str) -> None:
    assert respell(text, NAMES) == said
    assert respell(said, NAMES) == said


def test_arguments_become_fields() -> None:
    names = {name: name for name in ("clamp", "eta", "method", "batch_size")}
    text = "eta=0.9: pass clamp=True, method='TAT' or method=None, not batch_size"
    said = '"eta": 0.9: pass "clamp": true, "method": "TAT" or "method": null, not "batch_size"'
    assert respell(text, names, as_field) == said


def test_a_command_has_a_spelling_of_its_own() -> None:
    args = argparse.Namespace(depth=3, keep=None, spelling={"filter_fn": "--keep"})
    assert message("depth=3: see filter_fn", args) == "--depth 3: see --keep"


def test_shapes() -> None:
    assert shape("32, 3,8") == (32, 3, 8)
    for text in ("", "3,", "3,x", "3,0", "3,-1", "2.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="positive integers"):
            shape(text)


def test_what_no_subcommand_means(capsys: pytest.CaptureFixture[str]) -> None:
    root = Commands(argparse.ArgumentParser(prog="tool"))
    group = root.group("bench", "measure", usual="run")
    run = group.add("run", print, "run a suite")
    run.add_argument("files", nargs="*")
    run.add_argument("--suite")
    group.add("list", print, "list cases")
    for argv in (["a.json", "--suite", "cpu"], ["--suite", "cpu", "a.json"]):
        assert root.parse(["bench", *argv]) == root.parse(["bench", "run", *argv])
    assert root.parse(["bench"]).files == []
    assert root.parse(["bench", "list"]).parser.prog == "tool bench list"
    with pytest.raises(SystemExit) as caught:
        root.parse(["bench", "lost"])
    assert caught.value.code == 2
    assert "invalid choice: 'lost'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        root.parse(["bench", "--help"])
    assert caught.value.code == 0
    assert "without a command, 'run' is meant" in capsys.readouterr().out
    assert len(list(root.parsers())) == 4
