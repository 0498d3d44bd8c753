"""A second engine for CPU tensors, and clocks that say who wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedshape import ActSpec
from fusedshape.ops.engines import ATEN
from fusedshape.ops.problem import Problem
from fusedshape.timing import Candidate
from fusedshape.tuning.cache import Record

CPU = torch.device("cpu")
LEAKY = ActSpec("leaky_relu", negative_slope=0.3, output_scale=1.3)
PROBLEM = Problem(
    *("cpu", None, torch.float32, (3, 4, 6, 6), (8, 4, 3, 3), True),
    *((1, 1), (1, 1), (1, 1), 1, "leaky_relu", True),
)


class Rival(type(ATEN)):
    """An engine that stands in for Triton's: ATen's numbers, and a note of its calls."""

    name = "triton"
    plain = False

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.factor = 1.0

    def note(self, direction: str) -> None:
        if not torch.compiler.is_compiling():
            self.calls.append(direction)

    def fprop_act(self, *args: Any) -> Tensor:
        self.note("fprop")
        return super().fprop_act(*args).mul_(self.factor)

    def dgrad(self, *args: Any) -> tuple[Tensor, Tensor | None]:
        self.note("dgrad")
        return super().dgrad(*args)

    def wgrad(self, *args: Any) -> Tensor:
        self.note("wgrad")
        return super().wgrad(*args)


class Script:
    """A clock that runs nothing: the first candidate it meets is the base, the others follow.

    Args:
        times: by the candidate's number, and by how many samples of it were taken before.
    """

    least = 0.0

    def __init__(self, times: Callable[[int, int], float]) -> None:
        self.times = times
        self.met: list[list[Any]] = []

    def seconds(self, candidate: Candidate, repeats: int) -> float:
        if not any(candidate is known for known, _ in self.met):
            self.met.append([candidate, 0])
        number = next(i for i, (known, _) in enumerate(self.met) if known is candidate)
        self.met[number][1] += 1
        return self.times(number, self.met[number][1] - 1)


def steady(*factors: float) -> Script:
    """Candidates that take these parts of the base's millisecond."""
    return Script(lambda i, n: (1.0, *factors)[i] * 1e-3)


RECORD = Record("aten", None, 3, 2e-3, 1e-3)


def same(*tensors: Tensor) -> Callable[[], Sequence[Tensor]]:
    return lambda: [t.clone() for t in tensors]


def layer() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    return x, (torch.randn(8, 4, 3, 3) / 6).requires_grad_()


FACTORY = """
from torch import nn
from fusedshape import ActSpec
from fusedshape.nn import ShapedConv2d
def net():
    spec = ActSpec("leaky_relu", negative_slope=0.3)
    return nn.Sequential(
        *(ShapedConv2d(i, 4, 3, padding=1, spec=spec) for i in (2, 4, 4)), nn.Flatten()
    )
def plain():
    return nn.Linear(4, 4)
def fails():
    raise KeyError("width")
"""
