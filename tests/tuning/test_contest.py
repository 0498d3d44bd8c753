"""Tuning's contest: only a clear win with right numbers counts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedshape.tuning import contest
from tests.support.rivals import Script, same, steady

ONES = torch.ones(8)


@given(
    ratios=st.lists(st.floats(0.5, 1.5), min_size=1, max_size=4),
    drift=st.lists(st.floats(0.2, 5.0), min_size=1, max_size=9),
)
@settings(deadline=None)
def test_only_a_clear_win_counts(ratios: list[float], drift: list[float]) -> None:
    # The machine changes its speed from round to round, but not within one.
    names = [f"c{i}" for i in range(len(ratios))]
    clock = Script(lambda i, n: (1.0, *ratios)[i] * drift[n % len(drift)])
    verdict = contest.contest(
        same(ONES), dict.fromkeys(names, same(ONES)), clock=clock, terms=1, budget=0.0
    )
    best = min(ratios)
    assume(abs(best - (1 - contest.MARGIN)) > 1e-9)
    if best < 1 - contest.MARGIN:
        assert verdict.winner is not None
        assert ratios[names.index(verdict.winner)] == pytest.approx(best)
        assert verdict.seconds == pytest.approx(best * verdict.base_seconds)
    else:
        assert verdict.winner is None
        assert verdict.seconds == verdict.base_seconds


def test_luck_does_not_count() -> None:
    race = {"a": same(ONES), "b": same(ONES)}
    # Among all three b seems fast, in two samples to warm up and five; then it is slow.
    clock = Script(lambda i, n: 1.0 if i != 2 else 0.5 if n < 7 else 1.1)
    verdict = contest.contest(same(ONES), race, clock=clock, terms=1, budget=0.0)
    assert verdict.winner is None
    assert verdict.base_seconds == 1.0


def test_wrong_numbers_never_win() -> None:
    def broken() -> Sequence[Tensor]:
        raise RuntimeError("out of resource:\nshared memory")

    race = {"wrong": same(ONES * 1.01), "broken": broken, "nan": same(ONES / 0 * 0), "good": None}
    race["good"] = same(ONES)
    verdict = contest.contest(same(ONES), race, clock=steady(0.9), terms=1, budget=0.0)
    assert verdict.winner == "good"
    assert sorted(verdict.wrong) == ["nan", "wrong"]
    assert verdict.failed == {"broken": "RuntimeError: out of resource: shared memory"}
    none = contest.contest(same(ONES), {"broken": broken}, clock=steady(), terms=1, budget=0.0)
    assert none.winner is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("terms", [9, 576, 4608])
def test_tolerance(dtype: torch.dtype, terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    a = torch.randn(64, terms, generator=generator).to(dtype)
    b = torch.randn(terms, 64, generator=generator).to(dtype)
    truth = (a.float() @ b.float()).to(dtype)
    other = (a.double() @ b.double()).float()
    twice = (other.to(dtype).float() * 1.7).to(dtype)
    assert contest.difference_of([other.to(dtype)], [truth], terms, False) is None
    once = (truth.double() * 1.7).to(dtype)
    assert contest.difference_of([twice], [once], terms, False) is None
    # One product of all left out, everywhere; and all of them left out in one place.
    if dtype == torch.float32 or terms < 1000:
        short = (a[:, 1:].float() @ b[1:].float()).to(dtype)
        assert contest.difference_of([short], [truth], terms, False) is not None
    # Everywhere a little too far off; and in one place of a million by much.
    unit = torch.finfo(dtype).eps + 12 * 2.0**-24
    scale = 4 * unit * truth.float().square().mean().sqrt()
    signs = torch.randn(64, 64, generator=generator).sign()
    for factor, good in ((0.5, True), (2.0, False)):
        off = (truth.float() + factor * scale * signs).to(dtype)
        assert (contest.difference_of([off], [truth], 9, False) is None) == good
    many = torch.randn(1000, 1000, generator=generator).to(dtype)
    hole = many.clone()
    hole[500, 500] += 1
    assert contest.difference_of([hole], [many], terms, False) is not None
    assert contest.difference_of([truth[:1]], [truth], terms, False) is not None
    assert contest.difference_of([truth.double()], [truth], terms, False) is not None
    assert contest.difference_of([], [truth], terms, False) is not None


def test_tf32_is_let_pass_only_where_it_is_on() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator) for _ in range(2))

    def tf32(t: Tensor) -> Tensor:
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)

    rounded, exact = tf32(a) @ tf32(b), a @ b
    assert contest.difference_of([rounded], [exact], 64, True) is None
    assert contest.difference_of([rounded], [exact], 64, False) is not None
