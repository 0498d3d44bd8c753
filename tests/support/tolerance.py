"""The one rule for tolerances: as good as plain PyTorch, measured by float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedshape import reference


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
