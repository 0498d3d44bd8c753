"""The pages in docs/: every public name stands in the API pages, and nothing else does."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import fusedshape

DOCS = Path(__file__).parent.parent / "docs"
#: Public submodules that have an `__all__`. What `ops` has, `fusedshape` itself exports.
SUBMODULES = ("convert", "diagnose", "init", "models", "theory", "train", "tuning")
#: What public functions take or return, documented where it is defined.
VALUES = (
    "fusedshape.activations.Activation",
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
