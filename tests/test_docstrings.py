"""Across modules: "Attributes:" and "Args:" in docstrings of classes name what the class has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusedshape

PACKAGE = Path(fusedshape.__file__).parent
#: The bases of a class that stand in the same file.
BASES: dict[ast.ClassDef, list[ast.ClassDef]] = {}


def section(cls: ast.ClassDef, title: str) -> list[str] | None:
    """The names that a section of the docstring describes; None if it has no such section."""
    lines = (ast.get_docstring(cls) or "").splitlines()
    if f"{title}:" not in lines:
        return None
    names: list[str] = []
    for line in lines[lines.index(f"{title}:") + 1 :]:
        if line and not line.startswith(" "):
            break
        entry = re.match(r" {4}([*\w]+(?:, [*\w]+)*):(?: |$)", line)
        if entry:
            names += [name.lstrip("*") for name in entry[1].split(", ")]
    return names


def is_value(cls: ast.ClassDef) -> bool:
    """Whether the class body lists the fields: a dataclass or a NamedTuple."""
    marks = [ast.unparse(node) for node in (*cls.decorator_list, *cls.bases)]
    return any(re.match(r"(dataclasses\.)?dataclass\b|NamedTuple$", mark) for mark in marks)


def fields(cls: ast.ClassDef) -> list[str]:
    """The public fields of a value class that a caller may give, in order, inherited ones first."""
    found = [name for base in BASES.get(cls, ()) for name in fields(base)]
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            constant = "ClassVar" in ast.unparse(node.annotation)
            derived = node.value is not None and "init=False" in ast.unparse(node.value)
            if not (constant or derived or node.target.id.startswith("_")):
                found.append(node.target.id)
    return found


def attributes(cls: ast.ClassDef) -> set[str]:
    """Everything that instances have: class attributes, properties and what methods assign."""
    found = set()
    for node in cls.body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    if isinstance(inner.value, ast.Name) and inner.value.id == "self":
                        found.add(inner.attr)
                elif isinstance(inner, ast.Call) and ast.unparse(inner.func) in (
                    "self.register_buffer",
                    "self.register_parameter",
                ):
                    found.add(ast.literal_eval(inner.args[0]))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def parameters(cls: ast.ClassDef) -> list[str] | None:
    """Parameters of the class's own constructor; None if it inherits one."""
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__new__"):
            a = node.args
            row = (*a.posonlyargs, *a.args[1:], a.vararg, *a.kwonlyargs, a.kwarg)
            return [arg.arg for arg in row if arg is not None]
    return None


def faults(cls: ast.ClassDef) -> Iterator[str]:
    """What the docstring of a class says of attributes and arguments that is not so."""
    described, arguments = section(cls, "Attributes"), section(cls, "Args")
    if is_value(cls):
        named = (arguments or []) + (described or [])
        if named != fields(cls):
            yield f"describes {named}, has the fields {fields(cls)}"
        return
    missing = sorted(set(described or []) - attributes(cls))
    if missing:
        yield f"describes attributes {missing} that no method sets"
    takes = parameters(cls)
    if arguments is not None and takes is not None and arguments != takes:
        yield f"describes arguments {arguments}, takes {takes}"


def classes() -> dict[str, ast.ClassDef]:
    """Every class of the package that has either section, by file and name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        own = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)]
        for node in own:
            names = [ast.unparse(base) for base in node.bases]
            BASES[node] = [other for other in own if other.name in names]
            if section(node, "Attributes") is not None or section(node, "Args") is not None:
                found[f"{path.relative_to(PACKAGE)}:{node.name}"] = node
    return found


CLASSES = classes()


def test_the_package_describes_attributes() -> None:
    assert len(CLASSES) > 40


@pytest.mark.parametrize("name", CLASSES)
def test_sections_name_what_the_class_has(name: str) -> None:
    assert list(faults(CLASSES[name])) == []


VALUE = '''
@dataclass(frozen=True)
class Tile:
    """A tile.

    Attributes:
        rows: how many
            rows: a continuation line is no entry.
        {name}: columns.

    Example:
        >>> Tile(1, 2)
    """

    rows: int
    cols: int
    _cache: int = 0
    done: bool = field(init=False)
    LIMIT: ClassVar[int] = 3
'''
PLAIN = '''
class Log:
    """A log.

    Args:
        {argument}: where to.

    Attributes:
        lines, {attribute}: what was written, and how often.
    """

    lines: list[str]

    def __init__(self, path: str) -> None:
        self.count = 0
'''


def first_class(source: str) -> ast.ClassDef:
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.ClassDef)
    return node


def test_true_sections_are_accepted() -> None:
    assert not list(faults(first_class(VALUE.format(name="cols"))))
    assert not list(faults(first_class(PLAIN.format(argument="path", attribute="count"))))


def test_wrong_sections_are_found() -> None:
    assert list(faults(first_class(VALUE.format(name="columns"))))
    assert list(faults(first_class(VALUE.replace("        {name}: columns.\n", ""))))
    assert list(faults(first_class(PLAIN.format(argument="file", attribute="count"))))
    assert list(faults(first_class(PLAIN.format(argument="path", attribute="number"))))
