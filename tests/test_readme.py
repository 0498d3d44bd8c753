"""Across modules: the README's code and commands run, and its pictures are those of the records."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fusedshape.bench import records
from fusedshape.bench.plot import plot
from fusedshape.files import read_json
from fusedshape.machine import headline
from fusedshape.train.demo import plot_sweep
from tests.support.places import RESULTS, ROOT

README = (ROOT / "README.md").read_text()


def test_examples_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    assert len(re.findall(r"^[^#\n]", blocks[0], re.MULTILINE)) <= 10  # comments aside
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "50 ActSpec" in capsys.readouterr().out
    # A small net that is written as torchvision's are, which need not be installed.
    like_theirs = runpy.run_path(str(ROOT / "examples/resnet.py"))["resnet18"]
    models = SimpleNamespace(resnet50=lambda: like_theirs(num_classes=10, width=32))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    capsys.readouterr()
    torch.manual_seed(0)
    exec(compile(blocks[1], "README.md", "exec"), {})
    assert blocks[1].rstrip().endswith(f"# {capsys.readouterr().out.strip()}")


def _description(path: Path) -> str:
    with Image.open(path) as picture:
        return picture.info["Description"]


@pytest.mark.parametrize("name", ["cpu", "scaling"])
def test_pictures_are_those_of_the_results(name: str, tmp_path: Path) -> None:
    record = RESULTS / f"{name}.json"
    drawn = plot(records.load(record), tmp_path)
    for path in drawn:
        committed = RESULTS / name / path.name
        assert _description(committed) == _description(path), f"run: fusedshape bench plot {record}"
    assert len(drawn) == len(list((RESULTS / name).iterdir()))


def test_the_picture_of_accuracy_by_depth_is_that_of_the_record(tmp_path: Path) -> None:
    data = read_json(RESULTS / "sweep.json")
    plot_sweep(data, tmp_path / "sweep.json")
    drawn = _description(tmp_path / "sweep.png")
    assert headline(data["headers"][-1]) in drawn
    assert _description(RESULTS / "sweep.png") == drawn, "run: python -m bench.tables"


def test_make_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    for command in commands:
        assert f"\n{command}:" in makefile
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_the_first_screen_goes_from_what_it_is_to_links() -> None:
    screen = README[: README.index("## ")]
    assert len(screen.splitlines()) <= 40
    parts = "# fusedshape\n", "*Shaping*", "```python", "![Test", "pip install", "(docs/guide.md)"
    places = [screen.index(part) for part in parts]
    assert places == sorted(places)
    assert "| --- " not in README, "tables belong to docs/"


def test_citation_is_of_the_form_that_tools_read() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "references"} <= set(citation)
    cited = {reference["url"] for reference in citation["references"]}
    assert cited == set(re.findall(r"https://arxiv\.org/abs/[\d.]+", README))
