"""Across modules: a test file bears its module's name and is short; each module has its tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.places import ROOT

PACKAGE, TESTS = ROOT / "fusedshape", ROOT / "tests"
LONGEST = 800
FILES = sorted(path for path in TESTS.rglob("*.py") if "theory/vectors" not in path.as_posix())
NAMED = [path for path in FILES if path.name.startswith("test_")]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")

#: Modules and packages whose tests have no file of their own: where they are instead.
ELSEWHERE = {
    "__main__.py": "test_cli.py",
    "bench/cases.py": "bench/test_suites.py",
    "bench/constants.py": "bench/test_suites.py",
    "bench/plot.py": "bench/test_command.py",
    "bench/text.py": "bench/test_command.py",
    "columns.py": "bench/test_command.py",
    "guard.py": "diagnose/test_kept.py",
    "interrupts.py": "train/test_checkpoint.py",
    "kernels": "kernels",
    "loading.py": "train/test_train.py",
    "nodes.py": "test_faithful.py",
    "proxies.py": "test_faithful.py",
    "ops/engines/cudnn/calls.py": "ops/engines/cudnn/test_engine.py",
    "ops/engines/cudnn/formulas.py": "ops/engines/cudnn/test_graph.py",
    "ops/engines/cudnn/plans.py": "ops/engines/cudnn/test_engine.py",
    "ops/engines/cudnn/terms.py": "ops/engines/cudnn/test_graph.py",
    "reference.py": "test_activations.py",
    "sums.py": "test_shortcuts.py",
    "spec.py": "test_activations.py",
    "theory/command.py": "test_cli.py",
    "tracing": "test_rewriting.py",
    "tuning/calls.py": "tuning/test_chooser.py",
    "tuning/kernels.py": "kernels",
    "tuning/text.py": "tuning/test_command.py",
}


def modules_of(test: Path) -> Iterator[Path]:
    """What a test file may be named after, most specific first.

    test_conv_strided.py is about conv_strided.py, or about strides in conv.py;
    tests/ops/test_ops.py is about the package ops as a whole.
    """
    folder = PACKAGE / test.parent.relative_to(TESTS)
    words = test.stem.removeprefix("test_").split("_")
    for n in range(len(words), 0, -1):
        name = "_".join(words[:n])
        if name == folder.name and folder != PACKAGE:
            yield folder
        yield from (folder / f"{name}.py", folder / name)


def module_of(test: Path) -> Path | None:
    return next((path for path in modules_of(test) if path.exists()), None)


HELD = {module_of(test) for test in NAMED}


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("test", NAMED, ids=relative)
def test_a_file_names_its_module_or_says_what_it_holds_across_modules(test: Path) -> None:
    across = first_line(test).startswith("Across modules: ")
    assert across or module_of(test), (
        f"{relative(test)}: name it test_<module>.py or test_<module>_<aspect>.py, in the folder "
        'that mirrors the package, or begin its docstring with "Across modules: "'
    )


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_file_is_too_long_to_read(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= LONGEST, f"{relative(path)}: {lines} lines; divide it by module or aspect"


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_each_module_has_tests(module: Path) -> None:
    """They are in a file of its name, in that of its package, or where `ELSEWHERE` says."""
    if not HELD & {module, module.parent}:
        names = [path.relative_to(PACKAGE).as_posix() for path in (module, module.parent)]
        assert ELSEWHERE.keys() & names, (
            f"{names[0]}: make tests/{Path(names[0]).parent / f'test_{module.name}'}, or say in "
            "ELSEWHERE which tests hold it"
        )


@pytest.mark.parametrize("name", ELSEWHERE)
def test_elsewhere_names_what_is_there(name: str) -> None:
    assert (PACKAGE / name).exists()
    assert (TESTS / ELSEWHERE[name]).exists()
