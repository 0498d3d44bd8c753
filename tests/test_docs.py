"""Across modules: the pages' code, commands, links and tables, and the public names in the API."""

from __future__ import annotations

import importlib.util
import re
import shlex
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest

import fusedshape
from bench.tables import PAGES as TABLES
from bench.tables import written
from fusedshape.cli import commands as program
from fusedshape.cli import main
from tests.support.places import ROOT

DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted((*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "csrc/README.md"))
}
#: Public submodules that have an `__all__`. What `ops` has, `fusedshape` itself exports.
SUBMODULES = ("convert", "diagnose", "init", "models", "theory", "train", "tuning")
#: What public functions take or return, documented where it is defined.
VALUES = (
    "fusedshape.activations.Activation",
    "fusedshape.explain.Explanation",
    "fusedshape.explain.Row",
    "fusedshape.shortcuts.ShortcutReport",
    "fusedshape.tap.Tapped",
)


def public() -> set[str]:
    """The full name of everything the package exports; of two names for one thing the shorter."""
    found = {
        f"fusedshape.{name}": getattr(fusedshape, name)
        for name in fusedshape.__all__
        if not isinstance(getattr(fusedshape, name), ModuleType)
    }
    for module in SUBMODULES:
        loaded = importlib.import_module(f"fusedshape.{module}")
        for name in loaded.__all__:
            value = getattr(loaded, name)
            if not any(value is known for known in found.values()):
                found[f"fusedshape.{module}.{name}"] = value
    return set(found)


def documented() -> list[str]:
    pages = "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.rst")))
    return re.findall(
        r"^\.\. (?:autofunction|autoclass|autodata|autoexception|data):: (\S+)$",
        pages,
        re.MULTILINE,
    )


def test_api_pages_have_every_public_name_once() -> None:
    found = documented()
    assert len(found) == len(set(found))
    wanted = public() | set(VALUES)
    missing, unknown = wanted - set(found), set(found) - wanted
    assert not missing, (
        f"write an autofunction or autoclass of each into a page of docs/api: {missing}"
    )
    assert not unknown, f"these are not public; take them off the pages of docs/api: {unknown}"


def test_exported_submodules_are_documented() -> None:
    modules = {n for n in fusedshape.__all__ if isinstance(getattr(fusedshape, n), ModuleType)}
    assert modules <= set(SUBMODULES)
    for module in SUBMODULES:
        assert f"fusedshape.{module}." in "\n".join(documented()), module


def fenced(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def commands(page: str) -> set[str]:
    """What a reader may type: lines of shell blocks, and code in the text that looks like one."""
    blocks = [block.replace("\\\n", " ") for block in fenced(page, "sh")]
    lines = [line for block in blocks for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    programs = r"fusedshape|make|pip|(?:\w+=\S+ )?\.venv/bin/\w+|python -m"
    lines += re.findall(rf"`((?:{programs}) [^`…]+)`", prose)
    return {line.split("  #")[0].strip() for line in lines} - {""}


@pytest.mark.parametrize("name", sorted(PAGES.keys() - {"README.md"}))  # see test_readme.py
def test_python_of_the_pages_runs(name: str) -> None:
    blocks = fenced(PAGES[name], "python")
    if any("from dks" in block for block in blocks):
        pytest.importorskip("dks.pytorch.activation_transform")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dks's quadrature overflows on purpose
        exec(compile("\n".join(blocks), name, "exec"), {})


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_the_pages_exist(name: str) -> None:
    for command in sorted(commands(PAGES[name])):
        words = shlex.split(command, comments=True)
        while re.fullmatch(r"\w+=\S+", words[0]):
            words.pop(0)
        program, *arguments = words
        program = program.removeprefix(".venv/bin/")
        assert program in CHECKS, f"{name}: nobody checks {command!r}"
        CHECKS[program](arguments)


def understood(arguments: list[str]) -> None:
    """The command line's own parser reads them."""
    words = all(re.fullmatch("[a-z]+", argument) for argument in arguments)
    try:
        program().parse([MODEL if a == "pkg.module:factory" else a for a in arguments])
    except SystemExit as end:
        if not words or end.code == 0:
            raise
        with pytest.raises(SystemExit, match=r"^0$"):  # a command's name alone
            program().parse([*arguments, "--help"])


def makes(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in arguments:
        assert f"\n{target}:" in makefile, target


def python(arguments: list[str]) -> None:
    assert arguments[0] == "-m"
    assert importlib.util.find_spec(arguments[1]) is not None, arguments


def pytest_takes(arguments: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for option, value in zip([None, *arguments], arguments, strict=False):
        if option == "-m":
            assert f'"{value}: ' in project, value
        elif option != "-k" and not value.startswith("-"):
            assert (ROOT / value).exists(), value


def installs(arguments: list[str]) -> None:
    extras = re.findall(r"\[(\w+)\]", " ".join(arguments))
    project = (ROOT / "pyproject.toml").read_text()
    assert arguments[0] == "install"
    assert all(f"\n{extra} = [" in project for extra in extras)


def always(arguments: list[str]) -> None:
    """Programs that every machine is expected to have."""


MODEL = "fusedshape.models:vanilla_vgg16"
CHECKS: dict[str, Callable[[list[str]], None]] = {
    "fusedshape": understood,
    "make": makes,
    "python": python,
    "pytest": pytest_takes,
    "pip": installs,
    "ruff": always,
    "mypy": always,
    "cp": always,
    "cd": always,
}


def test_checks_of_commands_can_fail() -> None:
    with pytest.raises(SystemExit):
        understood(["bench", "--no-such-option"])
    for check, argument in ((makes, "nothing"), (pytest_takes, "tests/test_nothing.py")):
        with pytest.raises(AssertionError):
            check([argument])
    with pytest.raises(AssertionError):
        python(["-m", "fusedshape_nothing"])
    with pytest.raises(AssertionError):
        installs(["install", "fusedshape[nothing]"])


@pytest.mark.parametrize(
    "command",
    ["info", f"convert {MODEL}", f"constants --model {MODEL}", "bench list --suite gpu"],
)
def test_quick_commands_of_the_pages_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = command.replace(MODEL, "pkg.module:factory")
    assert any(wanted in page or command in page for page in PAGES.values())
    assert main(command.split()) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", PAGES)
def test_links_of_the_pages_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[name]):
        if not target.startswith("http"):
            assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_pages_are_those_of_the_records(name: str) -> None:
    assert written(PAGES[name], name) == PAGES[name], "run: python -m bench.tables"
