"""Tuning's problems: their keys and buckets."""

from __future__ import annotations

import json

import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedshape.kernels.roofline import Convolution
from fusedshape.kernels.tuned import asked, tunable
from fusedshape.ops.problem import Problem
from fusedshape.tuning import problems
from tests.support.rivals import PROBLEM


@given(st.integers(1, 1 << 40))
def test_bucket(n: int) -> None:
    bucket = problems.bucket(n)
    assert n <= bucket < 2 * n
    assert bucket & (bucket - 1) == 0


def resized(problem: Problem, *shape: int) -> Problem:
    return problem._replace(input=shape)


def test_keys() -> None:
    key = problems.key_of("fprop", PROBLEM)
    assert key == problems.key_of("fprop", resized(PROBLEM, 4, 4, 6, 6))
    json.dumps(key, allow_nan=False)
    others = [
        problems.key_of("dgrad", PROBLEM),
        *(
            problems.key_of("fprop", PROBLEM._replace(**change))
            for change in (
                {"input": (5, 4, 6, 6)},
                {"input": (3, 4, 6, 7)},
                {"dtype": torch.float16},
                {"channels_last": False},
                {"padding": (0, 0)},
                {"activation": "tanh"},
                {"saves_output": False},
            )
        ),
    ]
    assert all(other != key for other in others)
    # cuDNN's switches, and tf32, are a GPU's.
    gpu = PROBLEM._replace(device="cuda", capability=(9, 0))
    keys = [problems.key_of("fprop", gpu)]
    for switched in ({"benchmark": True}, {"deterministic": True}, {"allow_tf32": False}):
        with torch.backends.cudnn.flags(**switched):
            keys.append(problems.key_of("fprop", gpu))
            assert problems.key_of("fprop", PROBLEM) == key
    assert all(keys.count(one) == 1 for one in keys)
    linear = PROBLEM._replace(weight=(8, 6), stride=(), padding=(), dilation=())
    assert problems.key_of("wgrad", resized(linear, 3, 5, 6)) == problems.key_of(
        "wgrad", resized(linear, 9, 6)
    )


def test_pins_cover_a_bucket() -> None:
    @tunable(lambda problem, gpu: ("small", "large"))
    def config_for(problem: Convolution, gpu: str) -> str:
        return "small"

    def args(batch: int, width: int = 8) -> tuple[Convolution, str]:
        return Convolution(batch, 4, 8, width, 4), "gpu"

    assert config_for(*args(6)) == "small"
    with config_for.trying(args(6), "large"):
        assert [config_for(*args(n)) for n in (6, 7)] == ["large", "small"]
    assert config_for(*args(6)) == "small"
    config_for.pin(args(6), 5, 8, "large")
    assert [config_for(*args(n)) for n in (4, 5, 8, 9)] == ["small", "large", "large", "small"]
    assert config_for(*args(6, width=9)) == "small"
    with asked() as log:
        config_for(*args(6))
    assert log == [(config_for, args(6))]
    config_for.unpin()
    assert config_for(*args(6)) == "small"
