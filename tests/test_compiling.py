"""constant_for_dynamo: what torch.compile calls while it traces."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import fusedshape
from fusedshape.compiling import constant_for_dynamo

calls: list[int] = []


@constant_for_dynamo
def noted(number: int) -> float:
    """A function that Dynamo could not trace as a whole: it keeps a note of its calls."""
    calls.append(number)
    return float(f"{number}.5")


def test_it_is_called_once_while_tracing() -> None:
    def twice(x: Tensor) -> Tensor:
        return x * noted(2)

    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    calls.clear()
    for _ in range(3):
        assert compiled(torch.ones(2)).tolist() == [2.5, 2.5]
    assert calls == [2]


def test_the_mark_is_set_in_one_place() -> None:
    package = Path(fusedshape.__file__).parent
    marking = [path.name for path in package.rglob("*.py") if "_dynamo_marked" in path.read_text()]
    assert marking == ["compiling.py"]
