"""Across modules: the package runs with torch's oldest release, and from trees not installed."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

import fusedshape
from fusedshape import machine
from fusedshape.validate import find_device
from tests.support.places import ROOT

#: In torch's headers, and younger than the oldest torch that is allowed.
YOUNGER = {"STABLE_TORCH_ERROR_CODE_CHECK": (2, 12)}


def oldest_torch() -> tuple[int, ...]:
    (found,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return tuple(map(int, found.split(".")))


def test_csrc_asks_for_no_younger_torch() -> None:
    sources = [path.read_text() for path in (ROOT / "csrc/cpu").iterdir()]
    code = re.sub(r"//.*", "", "\n".join(sources))
    major, minor = oldest_torch()
    assert f"((0ULL + {major}) << 56) | ((0ULL + {minor}) << 48)" in code
    for name, since in YOUNGER.items():
        assert name not in code or since <= oldest_torch(), name


def test_extras_that_messages_name_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = project[project.index("[project.optional-dependencies]") :]
    sources = [path.read_text() for path in (ROOT / "fusedshape").rglob("*.py")]
    named = set(re.findall(r"fusedshape\[(\w+)\]", "\n".join(sources)))
    assert {"plot", "data"} <= named
    for name in named:
        assert re.search(rf"^{name} = \[", extras, re.MULTILINE), name


def test_the_version_has_one_source() -> None:
    """The package's `__version__`, from which the build takes the project's."""
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert '[tool.hatch.version]\npath = "fusedshape/__init__.py"\n' in project
    holders = [
        path.name
        for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.cff"), *ROOT.rglob("fusedshape/*.py"))
        if fusedshape.__version__ in path.read_text()
    ]
    assert holders == ["__init__.py"]


def test_a_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without package indices the source tree must be enough."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert machine.version() == "source"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"the one of {name}")
    assert machine.version() == "the one of fusedshape"


def test_the_commit_of_a_tree_without_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_git", lambda *arguments: None)
    monkeypatch.delenv("FUSEDSHAPE_COMMIT", raising=False)
    found = machine.provenance()
    assert found["commit"] is None
    assert machine.headline(found).endswith(f"fusedshape {machine.version()}")
    monkeypatch.setenv("FUSEDSHAPE_COMMIT", "abc1234")
    found = machine.provenance()
    assert (found["commit"], found["dirty"]) == ("abc1234", None)
    assert machine.headline(found).endswith("commit abc1234")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    old = tmp_path / "result.json"
    machine.write_json(old, {"a": 1})

    def fail() -> None:
        with machine.replacing(old) as file:
            file.write_text("{")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert '"a": 1' in old.read_text()
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", tmp_path / "nowhere" / "a.json"):
        with pytest.raises(OSError, match=re.escape(str(place))):
            machine.write_json(place, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "result.json"]


@pytest.mark.parametrize("name", ["cuda:99", "cuda:x", "abacus", "meta", "cuda:-1", ""])
def test_devices(name: str) -> None:
    if not name:
        assert find_device(name) == find_device()
        return
    with pytest.raises(ValueError, match=f"device '{name}'"):
        find_device(name)
