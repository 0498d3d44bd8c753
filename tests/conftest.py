"""Shared by all tests: specs, backends, and the one rule for tolerances."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fusedshape import ACTIVATIONS, ActSpec, native, reference

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# For the processes of test_pretend_gpu.py alone, not even to be imported elsewhere.
collect_ignore_glob = [] if "pretend_gpu" in sys.modules else ["kernels/pretend*.py"]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tests begin with one thread, whatever number others leave behind."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


BACKENDS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not native.available(), reason=f"native: {native.why_not()}"),
    ),
    pytest.param(
        "triton", marks=pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
    ),
]


def shaped(name: str) -> ActSpec:
    """A spec of the kind the solvers give: all five constants at work."""
    slope = 0.37 if ACTIVATIONS[name].has_slope else 0.0
    return ActSpec(name, 0.7, 0.2, -0.35, 1.9, slope)


SPECS = [shaped(name) for name in ACTIVATIONS]


def assert_as_good_as(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Hold the error of `got` to at most twice that of `plain`, and a few units in the last place.

    Args:
        got: result under test.
        plain: the reference's result: float32 inside (float64 for float64), rounded once.
        truth: float64 result.
    """
    assert got.dtype == plain.dtype
    assert got.shape == truth.shape
    if not truth.numel():
        return
    inner = torch.finfo(reference.opmath_dtype(got.dtype)).eps
    error, allowed = ((t.double() - truth).abs().amax().item() for t in (got, plain))
    allowed = 2 * allowed + 4 * inner * truth.abs().amax().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
