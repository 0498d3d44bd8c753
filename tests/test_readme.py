"""Across modules: the README's code and commands run, and its pictures are those of the records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from fusedshape.bench import records
from fusedshape.bench.plot import plot
from fusedshape.files import read_json
from fusedshape.machine import headline
from fusedshape.train.demo import plot_sweep
from tests.support.places import RESULTS, ROOT

README = (ROOT / "README.md").read_text()


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    assert len(re.findall(r"^[^#\n]", blocks[0], re.MULTILINE)) <= 10  # comments aside
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "50 ActSpec" in capsys.readouterr().out


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
