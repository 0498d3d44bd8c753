"""Comparisons of records: verdicts err as seldom as they say, and refuse what is no comparison."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from fusedshape.bench import compare, records
from fusedshape.cli import main
from tests.support.benchmarks import CPU, synthetic


@given(st.integers(1, 60))
def test_intervals_miss_as_seldom_as_they_say(n: int) -> None:
    found = compare.interval([float(i) for i in range(n)])
    k = 0 if found is None else int(found[0]) + 1
    if found is not None:
        assert found[1] == n - k
        assert 2 * binom.cdf(k - 1, n, 0.5) <= compare.RISK
    if 2 * (k + 1) <= n:
        assert 2 * binom.cdf(k, n, 0.5) > compare.RISK


@given(
    factor=st.floats(0.3, 3.0),
    drift=st.floats(0.1, 10.0),
    noise=st.floats(0.0, 0.3),
    runs=st.integers(1, 5),
    seed=st.integers(0, 2**20),
)
def test_verdicts(factor: float, drift: float, noise: float, runs: int, seed: int) -> None:
    """`factor` on the candidate, `drift` on all runs after, `noise` on every sample."""
    rng = random.Random(seed)
    template = records.new("smoke", CPU, 0)

    def run(own: float, all_of_it: float) -> dict[str, Any]:
        def draw(scale: float) -> list[float]:
            return [scale * all_of_it * math.exp(noise * rng.uniform(-1, 1)) for _ in range(15)]

        return synthetic(template, {"eager": draw(1.0), "fused": draw(own)})

    before, after = ([run(*how) for _ in range(runs)] for how in ((1.0, 1.0), (factor, drift)))
    (change,) = compare.compare(before, after)
    (back,) = compare.compare(after, before)
    assert (change.candidate, change.control) == ("fused", "eager")
    assert change.low <= change.ratio <= change.high
    # Ratios of two samples are off by exp(2 · noise) at most, ratios of two such by its square.
    worst = math.exp(4 * noise) * (1 + 1e-9)
    assert factor / worst <= change.ratio <= factor * worst
    few = "" if runs > 3 else "perhaps "
    opposite = {f"{few}faster": f"{few}slower", f"{few}slower": f"{few}faster"}
    same = ("cannot tell", f"{few}same")
    assert back.verdict in (opposite.get(change.verdict, change.verdict), *same)
    if change.verdict.endswith("faster"):
        assert factor < worst
    if change.verdict.endswith("slower"):
        assert factor > 1 / worst
    if noise * 4 < abs(math.log(factor)) - 0.05 and noise < 0.01:
        assert change.verdict == few + ("faster" if factor < 1 else "slower")


def process(
    rng: random.Random, template: dict[str, Any], factor: float, between: float
) -> dict[str, Any]:
    """A run whose process is off by a factor of its own, as real ones are, and its rounds less."""
    own = factor * math.exp(rng.gauss(0, between))
    eager = [math.exp(rng.gauss(0, 0.01)) for _ in range(30)]
    return synthetic(
        template, {"eager": eager, "fused": [own * e * math.exp(rng.gauss(0, 0.01)) for e in eager]}
    )


@pytest.mark.parametrize("between", [0.02, 0.2])
def test_the_same_code_is_not_called_another(between: float) -> None:
    """1000 comparisons of four runs with four of the same code give few wrong verdicts."""
    rng = random.Random(0)
    template = records.new("smoke", CPU, 0)
    pool = [process(rng, template, 1.0, between) for _ in range(60)]
    wrong = 0
    for _ in range(1000):
        runs = rng.sample(pool, 8)
        (change,) = compare.compare(runs[:4], runs[4:])
        wrong += change.verdict in ("faster", "slower")
    # The bound is 2 / 70 of them; 4.5 standard deviations above.
    assert wrong <= 52
    (change,) = compare.compare(pool[:1], pool[1:2])
    assert change.verdict.startswith(("perhaps", "cannot tell"))


def test_a_long_table_warns_of_chance() -> None:
    template = records.new("smoke", CPU, 0)
    one = synthetic(template, {"fused": [2.0] * 10, "eager": [1.0] * 10})
    many = copy.deepcopy(one)
    many["rows"] = [{**one["rows"][0], "case": f"pointwise/{i}"} for i in range(70)]
    assert "of 70 comparisons, up to 2 would be" in compare.report([many] * 4, [many] * 4)
    assert "comparisons" not in compare.report([one] * 4, [one] * 4)
    assert "comparisons" not in compare.report([many] * 3, [many] * 3)


def test_a_tenth_slower_is_found() -> None:
    rng = random.Random(1)
    template = records.new("smoke", CPU, 0)
    found = 0
    for _ in range(50):
        before, after = ([process(rng, template, f, 0.01) for _ in range(4)] for f in (1.0, 1.1))
        (change,) = compare.compare(before, after)
        found += change.verdict == "slower"
        assert change.verdict in ("slower", "cannot tell")
    assert found >= 48


def test_no_verdict_without_control_or_on_another_machine() -> None:
    template = records.new("smoke", CPU, 0)
    fast, slow = [1.0] * 10, [2.0] * 10
    before = synthetic(template, {"fused": slow})
    after = synthetic(template, {"fused": fast})
    (change,) = compare.compare([before], [after])
    assert (change.ratio, change.control, change.verdict) == (0.5, "", "cannot tell")
    before = synthetic(template, {"fused": slow, "eager": fast})
    after = synthetic(template, {"fused": fast, "eager": fast})
    assert compare.compare([before], [after])[0].verdict == "perhaps faster"
    assert "four files of each" in compare.report([before], [after])
    assert compare.compare([before] * 4, [after] * 4)[0].verdict == "faster"
    assert "four files of each" not in compare.report([before] * 4, [after] * 4)
    other = {**before, "machine": {**before["machine"], "cpu": "another"}}
    assert compare.compare([other], [after])[0].verdict == "cannot tell"
    assert "different machines" in compare.report([other], [after])
    few = synthetic(template, {"fused": slow[:4], "eager": fast[:4]})
    assert compare.compare([few], [after])[0].verdict == "cannot tell"
    with pytest.raises(ValueError, match="run the same suite for all"):
        compare.compare([{**before, "device": "cuda"}], [after])
    with pytest.raises(ValueError, match="no case was timed in all"):
        compare.compare([{**before, "rows": []}], [after])


def test_what_cannot_be_compared_is_said() -> None:
    """Nobody should take what became wrong, or what is gone, for what did not change."""
    template = records.new("smoke", CPU, 0)
    good = synthetic(template, {"fused": [2.0] * 10, "eager": [1.0] * 10})
    more = copy.deepcopy(good)
    more["rows"].append({**copy.deepcopy(good["rows"][0]), "case": "pointwise/other"})
    bad = copy.deepcopy(more)
    bad["rows"][0]["candidates"]["fused"] = {"status": "wrong", "why": "dx is off"}
    assert list(compare.lost([more], [copy.deepcopy(more)])) == []
    shown = compare.report([more, more], [more, bad])
    assert "pointwise/synthetic: fused: wrong in 1 of 4 runs, the first of them after: dx" in shown
    (line,) = compare.lost([good], [more])
    assert line == "1 case(s) are not in all records: pointwise/other"
    bad["rows"].pop()
    with pytest.raises(ValueError, match=r"fused: wrong in 1 of 2 runs.*: dx is off"):
        compare.report([good], [bad])
    gone = copy.deepcopy(good)
    gone["rows"][0] |= {"status": "out of memory", "why": "full", "candidates": {}}
    assert list(compare.lost([good], [gone])) == [
        "pointwise/synthetic: fused: out of memory in 1 of 2 runs, the first of them after: full"
    ]


def test_graphs_are_compared_with_graphs() -> None:
    template = records.new("smoke", CPU, 0)
    before = synthetic(template, {"fused": [2.0] * 10, "eager": [1.0] * 10})
    after = synthetic(template, {"fused": [2.0] * 10, "eager": [1.0] * 10})
    after["rows"][0]["candidates"]["fused"]["graph_samples_ms"] = [0.1] * 10
    assert compare.compare([before], [after])[0].verdict == "perhaps same"
    for record in (before, after):
        for result in record["rows"][0]["candidates"].values():
            result["graph_samples_ms"] = [1.0] * 10
    after["rows"][0]["candidates"]["fused"]["graph_samples_ms"] = [0.5] * 10
    assert compare.compare([before], [after])[0].ratio == 0.5


def test_files_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = records.new("smoke", CPU, 0)
    paths = []
    for i, ms in enumerate([2.0] * 4 + [1.0] * 4):
        paths.append(tmp_path / f"run {i}.json")
        records.save(paths[-1], synthetic(template, {"fused": [ms] * 9, "eager": [1.0] * 9}))
    # Options stand wherever they like.
    assert main(["bench", "compare", "--suite", "smoke", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "before  4 run(s)" in shown
    assert shown.splitlines()[-1].endswith(" faster")
