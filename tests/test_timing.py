"""Timing, by a clock that keeps a list: turns, percentiles, saved memory, ceilings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedshape import timing
from fusedshape.timing import Candidate
from tests.support.benchmarks import CPU, Script


def test_saved_counts_storages_once() -> None:
    x = torch.randn(10, requires_grad=True)
    y = x.exp()
    assert timing.saved_bytes(lambda: (y * y, y[:5] * y[:5]), [x]) == 40
    assert timing.saved_bytes(lambda: x * x, [x]) == 0


def test_candidates_take_turns() -> None:
    clock = Script()
    named = {name: Candidate(lambda _, name=name: name) for name in "abc"}
    times = timing.interleaved(named, clock, budget=0.0, least=40, most=40)
    asked = clock.asked[6:]
    assert asked[::2] == asked[1::2], "a call before each that is timed"
    asked = asked[::2]
    rounds = ["".join(asked[i : i + 3]) for i in range(0, len(asked), 3)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(set(rounds)) == 6, "everybody comes after everybody"
    assert all(len(samples) == 40 for samples in times.values())
    assert all(second % 2 == 0 for samples in times.values() for second in samples)


def test_dear_candidates_are_asked_once() -> None:
    clock = Script()
    named = {"a": Candidate(lambda _: "a"), "dear": Candidate(lambda _: "dear", most=1)}
    times = timing.interleaved(named, clock, budget=0.0, least=5, most=5)
    assert clock.asked.count("dear") == len(times["dear"]) == 1
    assert len(times["a"]) == 5


def test_host_clock_leaves_preparation_out_and_repeats() -> None:
    prepared = []
    candidate = Candidate(
        lambda state: state.append(1), lambda: prepared.append([]) or prepared[-1]
    )
    assert timing.HostClock().seconds(candidate, 7) > 0
    assert prepared == [[1]] * 7
    own = Candidate(lambda _: 0.25, self_timed=True)
    assert timing.HostClock().seconds(own, 7) == 0.25


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_percentiles_lie_between(values: list[float]) -> None:
    low, middle, high = timing.percentiles(values)
    slack = 1e-9 * max(values)
    assert min(values) - slack <= low <= middle <= high <= max(values) + slack
    assert middle == pytest.approx(float(torch.tensor(values, dtype=torch.float64).quantile(0.5)))


def test_a_cpus_ceiling_is_the_better_of_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch hands a 1×1 convolution to oneDNN from 16 images on, whatever the threads."""
    shapes = []
    convolve = torch.conv2d

    def spy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.append((x.shape, weight.shape))
        y = convolve(x, weight)
        assert y.numel() == 64 * 64
        assert torch.equal(y, torch.full_like(y, 64.0))
        return y

    monkeypatch.setattr(torch, "conv2d", spy)
    found = timing.ceilings(CPU, [torch.float32], copied=1 << 10, product=64)
    assert set(found) == {"copy GB/s", "matmul float32 TFLOP/s"}
    assert {x[0] for x, _ in shapes} == {16}
