"""The README: its example runs, its commands exist, its figures are those of the stored results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from fusedshape.bench import records
from fusedshape.bench.plot import plot
from fusedshape.cli import commands, main
from fusedshape.files import read_json
from fusedshape.machine import headline
from fusedshape.train.demo import plot_sweep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench/results"


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    assert len(blocks[0].strip().splitlines()) <= 10
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "50 ActSpec" in capsys.readouterr().out


def test_tables_are_those_of_the_results() -> None:
    from bench.tables import written

    assert written(README) == README, "run: python -m bench.tables"


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


def test_constants_command(capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(r"`fusedshape (constants [^`]*)`", README)
    assert len(lines) == 2
    for line in lines:
        model = "fusedshape.models:vanilla_vgg16"
        assert main(line.replace("pkg.module:factory", model).split()) == 0
        assert "input_scale" in capsys.readouterr().out


def test_other_commands_are_understood() -> None:
    lines = set(re.findall(r"`(?:\.venv/bin/)?fusedshape ([a-z][^`]*)`", README))
    block = README[README.index("## Reproduce") :]
    lines |= set(re.findall(r"^\.venv/bin/fusedshape (.*)$", block, re.MULTILINE))
    assert len(lines) > 8
    for line in lines:
        arguments = commands().parse(line.split())
        assert arguments.parser.prog.split()[1] == line.split()[0]


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
