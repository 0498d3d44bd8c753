"""Who computes a layer: choice, refusal, and what a chooser may do to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import INTERPRET, shaped
from torch import Tensor

from fusedshape import ShapedConv2d, ShapedLinear
from fusedshape.ops import conv_act, engine, linear_act
from fusedshape.ops.engine import (
    DIRECTIONS,
    Direction,
    Problem,
    choose_engine,
    engines_for,
    install_chooser,
    problem_of,
)

LEAKY = shaped("leaky_relu")
X, W = torch.ones(2, 3, 5, 4), torch.ones(6, 3, 3, 3)
GEOMETRY = ([1, 2], [1, 0], [1, 1], False, [0, 0], 1)
PROBLEM = problem_of(X, W, LEAKY, GEOMETRY)


@pytest.fixture
def asked() -> Iterator[list[tuple[Direction, Problem]]]:
    """Install a chooser that notes what it is asked and names Triton."""
    questions: list[tuple[Direction, Problem]] = []

    def chooser(direction: Direction, problem: Problem) -> str:
        questions.append((direction, problem))
        return "triton"

    previous = install_chooser(chooser)
    yield questions
    assert install_chooser(previous) is chooser


def fits(name: str) -> str | None:
    return None


def fits_not(name: str) -> str | None:
    return "it is Tuesday"


def test_a_problem_says_all_and_is_hashable() -> None:
    assert (
        Problem(
            device="cpu",
            capability=None,
            dtype=torch.float32,
            input=(2, 3, 5, 4),
            weight=(6, 3, 3, 3),
            channels_last=False,
            stride=(1, 2),
            padding=(1, 0),
            dilation=(1, 1),
            groups=1,
            activation="leaky_relu",
            saves_output=True,
        )
        == PROBLEM
    )
    last = problem_of(X.to(memory_format=torch.channels_last), W, LEAKY, GEOMETRY)
    assert last == PROBLEM._replace(channels_last=True)
    assert len({PROBLEM, last, problem_of(X, W, LEAKY, GEOMETRY)}) == 2
    linear = problem_of(torch.ones(2, 3, 4), torch.ones(5, 4), shaped("swish"), None)
    assert linear.channels_last
    assert (linear.stride, linear.groups, linear.saves_output) == ((), 1, False)
    strided = problem_of(torch.ones(2, 4, 3).mT, torch.ones(5, 4), LEAKY, None)
    assert not strided.channels_last


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_choice(direction: Direction) -> None:
    assert choose_engine(direction, PROBLEM, "aten", fits) == "aten"
    assert choose_engine(direction, PROBLEM, "auto", fits) == "aten"
    assert choose_engine(direction, PROBLEM, "triton", fits) == "triton"
    with pytest.raises(ValueError, match="'triton' cannot run this layer: it is Tuesday"):
        choose_engine(direction, PROBLEM, "triton", fits_not)
    with pytest.raises(
        ValueError, match="unknown engine 'cudnn'; known: auto, aten, triton, native"
    ):
        choose_engine(direction, PROBLEM, "cudnn", fits)


def test_a_chooser_decides_for_auto_alone(asked: list[tuple[Direction, Problem]]) -> None:
    assert choose_engine("dgrad", PROBLEM, "auto", fits) == "triton"
    assert asked == [("dgrad", PROBLEM)]
    assert choose_engine("dgrad", PROBLEM, "auto", fits_not) == "aten", "auto never raises"
    assert choose_engine("dgrad", PROBLEM, "aten", fits) == "aten"
    assert len(asked) == 2


@pytest.mark.parametrize("answer", [None, "aten", "cudnn"])
def test_other_answers_mean_aten(answer: str | None) -> None:
    previous = install_chooser(lambda direction, problem: answer)
    try:
        assert choose_engine("wgrad", PROBLEM, "auto", fits) == "aten"
    finally:
        install_chooser(previous)


@pytest.mark.skipif(INTERPRET, reason="the interpreter serves CPU tensors")
def test_on_the_cpu_nobody_is_asked(asked: list[tuple[Direction, Problem]]) -> None:
    assert engines_for("auto", X, W, LEAKY, GEOMETRY) == (engine.ATEN,) * 3
    weight = W.clone().requires_grad_()
    conv_act(X, weight, None, LEAKY).sum().backward()
    assert weight.grad is not None
    assert not asked


@pytest.mark.skipif(INTERPRET, reason="the interpreter serves CPU tensors")
@pytest.mark.parametrize(
    "call",
    [
        lambda e: conv_act(X, W, None, LEAKY, engine=e),
        lambda e: linear_act(X, torch.ones(2, 4), None, LEAKY, engine=e),
        lambda e: ShapedConv2d(3, 6, 3, spec=LEAKY, engine=e)(X),
        lambda e: ShapedLinear(4, 2, spec=LEAKY, engine=e)(X),
    ],
    ids=["conv_act", "linear_act", "ShapedConv2d", "ShapedLinear"],
)
def test_an_explicit_engine_never_falls_back(call: Callable[[str], Tensor]) -> None:
    assert call("aten").shape == call("auto").shape
    with pytest.raises(ValueError, match="cannot run this layer: backend 'triton' serves CUDA"):
        call("triton")
    with pytest.raises(ValueError, match="unknown engine 'cublas'"):
        call("cublas")


def test_engines_survive_copies_of_modules() -> None:
    plain = torch.nn.Conv2d(3, 6, 3)
    assert ShapedConv2d.from_plain(plain, LEAKY, engine="aten").engine == "aten"
    old = ShapedConv2d.from_plain(plain, LEAKY)
    del old.__dict__["engine"]  # as pickled before there were engines
    assert old.engine == "auto"
    assert old(X).shape == (2, 6, 3, 2)
