"""How tensors are cut up for the Triton kernels: every element once, no index too large."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fusedshape.kernels.pointwise import PROGRAMS, SUM_COLUMNS, TILE_BYTES, make_plan

sizes = st.integers(1, 5000)
itemsizes = st.sampled_from([2, 4, 8])


@given(outer=sizes, channels=sizes, inner=sizes, itemsize=itemsizes, sums=st.booleans())
def test_tiles_cover_the_matrix(
    outer: int, channels: int, inner: int, itemsize: int, sums: bool
) -> None:
    numel = outer * channels * inner
    assume(numel < 2**34)
    plan = make_plan(numel, channels, inner, itemsize, sums)
    assert plan.rows * plan.cols == numel
    assert plan.cols == (numel if channels == 1 else channels if inner == 1 else inner)
    assert plan.by_column == (inner == 1 and channels > 1)
    for tile in (plan.tile_rows, plan.tile_cols):
        assert tile & (tile - 1) == 0
    assert plan.tile_rows * plan.tile_cols * itemsize <= TILE_BYTES
    assert plan.cols % plan.vector == 0
    assert plan.vector * itemsize <= 16
    rows = plan.tile_rows * (plan.steps if plan.by_column else 1)
    cols = plan.tile_cols * (1 if plan.by_column else plan.steps)
    down, across = -(-plan.rows // rows), -(-plan.cols // cols)
    assert plan.programs == down * across < 2**31
    assert plan.parts == (down if plan.by_column else across * plan.rows // channels)
    if not sums:
        assert plan.steps == 1
    if not plan.wide:
        assert numel < 2**31
        assert plan.rows + rows < 2**31
        assert plan.cols + cols < 2**31


@pytest.mark.parametrize(
    ("numel", "wide"), [(2**31 - 2**22 - 1, False), (2**31 - 1, True), (2**31, True)]
)
def test_wide_from_2_to_the_31(numel: int, wide: bool) -> None:
    for sums in (False, True):
        plan = make_plan(numel, 1, 1, 2, sums)
        assert plan.wide == wide
        assert wide or plan.programs * plan.steps * plan.tile_cols < 2**31


@pytest.mark.parametrize("pixels", [49, 64 * 49, 64 * 56 * 56, 256 * 112 * 112])
@pytest.mark.parametrize("channels", [64, 128, 512, 2048])
def test_sums_cost_little(channels: int, pixels: int) -> None:
    """Few programs too many, and partial sums that are small beside the tensors."""
    numel = channels * pixels
    plan = make_plan(numel, channels, 1, 2, True)
    assert plan.programs <= PROGRAMS + -(-channels // SUM_COLUMNS)
    assert plan.parts * channels * 4 <= 0.1 * (6 * numel) + 4 * channels
