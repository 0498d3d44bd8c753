"""Tuning's measurements: each direction can be measured, and wrong numbers put an engine out."""

from __future__ import annotations

import pytest
import torch

from fusedshape import ACTIVATIONS, tuning
from fusedshape.ops.engines import ATEN
from fusedshape.ops.problem import DIRECTIONS, problem_of
from fusedshape.tuning import problems
from tests.support.rivals import CPU, PROBLEM, Rival, steady


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
def test_every_direction_can_be_measured(activation: str, linear: bool, rival: Rival) -> None:
    one = PROBLEM._replace(activation=activation)
    if linear:
        one = one._replace(weight=(8, 6), stride=(), padding=(), dilation=())
    state = torch.get_rng_state()
    found = []
    for saves_output in (True, False):
        problem = one._replace(saves_output=saves_output)
        try:
            spec = problems.spec_of(problem)
        except ValueError:
            continue
        found.append(saves_output)
        assert spec.saves_output == saves_output
        for direction in DIRECTIONS:
            result = tuning.measure(direction, problem, CPU, steady(0.5))
            assert (result.record.engine, result.wrong, result.failed) == ("triton", {}, {})
            assert result.record.seconds == pytest.approx(result.record.base_seconds / 2)
    assert found
    assert torch.equal(torch.get_rng_state(), state)


def test_operands_are_the_problems() -> None:
    for change in ({}, {"channels_last": False}, {"dtype": torch.bfloat16}, {"stride": (2, 1)}):
        problem = PROBLEM._replace(**change)
        x, own, before, dz = problems.operands(problem, ATEN, CPU)
        assert problem_of(x, own) == problem
        assert before.saved.stride() == x.stride()
        assert torch.equal(x, problems.operands(problem, ATEN, CPU).x)
        assert dz.shape == ATEN.fprop(x, own).shape


def test_a_rival_that_computes_wrongly(rival: Rival, log: pytest.LogCaptureFixture) -> None:
    rival.factor = 1.5
    result = tuning.measure("fprop", PROBLEM, CPU, steady(0.1))
    assert result.record.engine == "aten"
    assert list(result.wrong) == ["triton"]
    assert len([m for m in log.messages if "is not used" in m]) == 1


def test_float32_on_a_cpu_is_held_to_float32(rival: Rival) -> None:
    """This holds although torch lets convolutions on GPUs round to tf32 by default."""
    with torch.backends.cudnn.flags(allow_tf32=True):
        rival.factor = 1.0005
        assert list(tuning.measure("fprop", PROBLEM, CPU, steady(0.1)).wrong) == ["triton"]


def test_nobody_but_path_i() -> None:
    result = tuning.measure("fprop", PROBLEM, CPU)
    assert result.record is None
    assert "8 channels or features" in result.failed["native"]
