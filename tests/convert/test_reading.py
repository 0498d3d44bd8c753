"""What convert knows of a model travels in frozen values."""

from __future__ import annotations

import importlib
from dataclasses import is_dataclass
from pathlib import Path

from fusedshape.convert import plan
from fusedshape.convert.calls import Calls
from fusedshape.convert.fusion import Fusion
from fusedshape.convert.plan import Plan
from fusedshape.convert.reading import Reading

FILES = sorted(Path(plan.__file__).parent.glob("[!_]*.py"))
VALUES = {
    value
    for path in FILES
    for value in vars(importlib.import_module(f"fusedshape.convert.{path.stem}")).values()
    if isinstance(value, type) and value.__module__ == f"fusedshape.convert.{path.stem}"
}


def test_all_classes_are_frozen_values() -> None:
    assert {Calls, Fusion, Reading, Plan} <= VALUES
    protocols = {value for value in VALUES if getattr(value, "_is_protocol", False)}
    for value in VALUES - protocols:
        assert is_dataclass(value), value
        assert value.__dataclass_params__.frozen, value  # type: ignore[attr-defined]
