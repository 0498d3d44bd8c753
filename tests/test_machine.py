"""Where a result comes from: the tree it was made of, and the command that makes it again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fusedshape import machine
from tests.support.benchmarks import git


def test_what_lies_beside_the_library_does_not_make_it_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an interrupted record in the repository's root could not be resumed."""
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
