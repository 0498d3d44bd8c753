"""Across modules: tuning of interpreted Triton kernels: choices found, kept, and then launched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedshape import ActSpec, conv_act, linear_act, tuning
from fusedshape.kernels.tuned import asked
from fusedshape.ops.choice import engines_for
from fusedshape.ops.engines import ATEN
from fusedshape.ops.problem import DIRECTIONS, Direction, Problem
from fusedshape.timing import Candidate
from fusedshape.tuning import chooser
from tests.support.backends import TRITON

pytestmark = [
    # NumPy's, where the interpreter meets infinities, or turns arrays of one element into numbers.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    TRITON,
]

CPU = torch.device("cpu")
LEAKY = ActSpec("leaky_relu", negative_slope=0.5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path))
    with tuning.mode("cached"):
        yield


class Favour:
    """A clock that runs nothing and finds one of the challengers fastest."""

    least = 0.0

    def __init__(self, number: int) -> None:
        self.number = number
        self.met: list[Candidate] = []

    def seconds(self, candidate: Candidate, repeats: int) -> float:
        if not any(candidate is known for known in self.met):
            self.met.append(candidate)
        return 0.5 if candidate is self.met[min(self.number, len(self.met) - 1)] else 1.0


def problem(weight: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Problem:
    sizes = ((1,), (len(weight) // 4,), (1,)) if len(weight) > 2 else ((), (), ())
    stride, _, dilation = (size * (len(weight) - 2) for size in sizes)
    padding = tuple(k // 2 for k in weight[2:])
    shape = (3, weight[1], 5, 4) if len(weight) > 2 else (3, 7, weight[1])
    return Problem(
        *("cpu", None, dtype, shape, weight, True, stride, padding, dilation),
        *(1, "leaky_relu", True),
    )


KINDS = {"conv": (8, 16, 3, 3), "1x1": (8, 16, 1, 1), "linear": (8, 16)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_choices_are_found_kept_and_taken(kind: str, direction: Direction) -> None:
    one = problem(KINDS[kind])
    result = tuning.measure(direction, one, CPU, Favour(2))
    assert (result.wrong, result.failed) == ({}, {})
    assert result.record.engine == "triton"
    assert result.record.kernel["kernel"] == ("conv" if kind == "conv" else "gemm")
    chooser.keep(direction, one, CPU, result.record)

    chooser.forget()  # as in another process
    assert tuning.choose(direction, one) == "triton"
    for size, taken in ((3, True), (4, True), (2, False), (5, False)):
        own = one._replace(input=(size, *one.input[1:]))
        if kind == "linear" and size == 4:  # 28 rows are of the bucket of 21 rows, 35 are not
            own = one._replace(input=(28, 16))
        tensors = tuning.problems.operands(own, ATEN, CPU)
        runs = engines_for("triton", tensors.x, tensors.layer).fprop
        with asked() as log:
            tensors.call(runs, direction)
        ((tunable, args),) = log
        config = tunable(*args)
        assert config in tunable.candidates(*args)
        assert (tunable.pinned(*args) is not None) == taken
        if taken:
            assert dataclasses.asdict(config) == result.record.kernel["config"]


def test_layers_take_the_cache_and_their_numbers_stay() -> None:
    x = torch.randn(3, 16, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    weight = (torch.randn(8, 16, 3, 3) / 12).requires_grad_()
    bias = torch.randn(8).requires_grad_()

    def step() -> list[Tensor]:
        y = conv_act(x, weight, bias, LEAKY, padding=1)
        z = linear_act(y.movedim(1, -1), torch.eye(8), None, LEAKY)
        return [z, *torch.autograd.grad(z.square().sum(), (x, weight, bias))]

    conv = problem(KINDS["conv"], torch.float32)
    linear = problem((8, 8), torch.float32)._replace(input=(3, 5, 4, 8))
    with asked() as log:
        want = step()
    assert log == []
    for direction in ("fprop", "dgrad", "wgrad"):
        for one in (conv, linear):
            record = tuning.measure(direction, one, CPU, Favour(1)).record
            assert record.engine == "triton"
            chooser.keep(direction, one, CPU, record)
    chooser.forget()
    with asked() as log:
        got = step()
    assert {tunable.name for tunable, _ in log} == {"conv", "gemm"}
    assert all(tunable.pinned(*args) is not None for tunable, args in log)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_a_pinned_configuration_stays_for_other_activations() -> None:
    one = problem(KINDS["conv"])
    first = tuning.measure("fprop", one, CPU, Favour(3)).record
    tanh = one._replace(activation="tanh", saves_output=False)
    other: Any = tuning.measure("fprop", tanh, CPU, Favour(1)).record
    assert other.kernel["config"] == first.kernel["config"]
