"""Comparison of records of the same cases: what changed, and whether the spread allows a verdict.

The speed of a machine drifts between runs, so times of different runs are not compared directly.
Within a run, each round's time of a candidate is divided by the time of a control in the same
round; the medians of these ratios are then compared between runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fusedshape.bench.records import Record, Row
from fusedshape.bench.text import is_ours, source
from fusedshape.columns import aligned
from fusedshape.timing import paired_ratios

#: Relative changes smaller than this count as none.
MARGIN = 0.02
#: Chance of a wrong verdict where nothing has changed, and of an interval missing its median.
RISK = 0.05
#: Candidates that do not run this library, the most similar work first.
CONTROLS = ("bare", "eager", "folded")


class Change(NamedTuple):
    """What became of one candidate of one case.

    Attributes:
        case: name of the case.
        candidate: name of the candidate.
        control: the candidate that its times were divided by; "" if there was none, and then
            there is no verdict.
        ratio: median of the runs after, divided by the median of the runs before; below 1 is
            faster.
        low: the least ratio between a run after and a run before. With one run each it comes from
            the spread of the rounds.
        high: the largest such ratio.
        verdict: "faster", "slower" or "same" (within `MARGIN`), preceded by "perhaps" if there are
            too few runs; or "cannot tell".
    """

    case: str
    candidate: str
    control: str
    ratio: float
    low: float
    high: float
    verdict: str


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """Changes of this library's candidates, over the cases that all records have.

    Two processes that run the same code differ by more than the rounds of one process, because
    memory addresses and the load of the machine differ. A verdict therefore needs several runs of
    each side, and all runs of one side must beat all runs of the other. If nothing has changed,
    this happens to n and m runs with a chance of 2 / binomial(n + m, n), whatever the
    distribution; with four runs each it is 0.03. If there are too few runs to stay below `RISK`,
    the verdict says "perhaps".

    Args:
        before: runs of one thing.
        after: runs of another, of the same cases on the same kind of machine.

    Raises:
        ValueError: no case was timed in all, or they ran on different devices.
    """
    records = [*before, *after]
    devices = sorted({record["device"] for record in records})
    if len(devices) > 1:
        raise ValueError(
            f"compare: records of the devices {' and '.join(devices)}; run the same suite for all"
        )
    comparable = len({_machine(record) for record in records}) == 1
    rows = [{row["case"]: row for row in record["rows"]} for record in records]
    found = []
    for case in rows[-1]:
        same = [own[case] for own in rows if case in own]
        if len(same) == len(records):
            found += list(_changes(same, len(before), comparable))
    if not found:
        why = "; ".join(lost(before, after))
        way = "run the same suite for each, for example fusedshape bench --suite cpu --out A.json"
        raise ValueError(f"compare: no case was timed in all records ({why}); {way}")
    return found


def lost(before: Sequence[Record], after: Sequence[Record]) -> Iterator[str]:
    """What was timed in some records only, and why, so that nobody takes it for unchanged.

    Args:
        before: runs of one thing.
        after: runs of another.

    Yields:
        A line for each candidate of ours, and one for all cases that some records lack.
    """
    runs = [
        (word, {row["case"]: row for row in record["rows"]})
        for word, records in (("before", before), ("after", after))
        for record in records
    ]
    candidates = dict.fromkeys(
        (case, name)
        for _, rows in runs
        for case, row in rows.items()
        for name in (row["candidates"] or ["fused"])
        if is_ours(name)
    )
    absent: dict[str, None] = {}
    for case, name in candidates:
        missing = []
        for word, rows in runs:
            if case not in rows:
                absent[case] = None
                continue
            row = rows[case]
            absence = {"status": "not there"} if row["candidates"] else row
            result = row["candidates"].get(name, absence)
            if "samples_ms" not in result:
                missing.append((word, result["status"], result.get("why", "")))
        known = [word for word, rows in runs if case in rows]
        if 0 < len(missing) < len(known):
            word, status, why = missing[0]
            times = f"{len(missing)} of {len(known)} runs, the first of them {word}"
            yield f"{case}: {name}: {status} in {times}" + (f": {why}" if why else "")
    if absent:
        more = ", …" if len(absent) > 3 else ""
        yield f"{len(absent)} case(s) are not in all records: {', '.join([*absent][:3])}{more}"


def _changes(rows: Sequence[Row], first: int, comparable: bool) -> Iterator[Change]:
    """Changes of one case; the first `first` rows are those from before."""
    for name in rows[-1]["candidates"]:
        found = _ratios(rows, name) if is_ours(name) else None
        if found is None:
            continue
        control, runs = found
        medians = [statistics.median(run) for run in runs]
        old, new = medians[:first], medians[first:]
        low, high = min(new) / max(old), max(new) / min(old)
        enough = RISK * math.comb(len(rows), first) >= 2
        if len(rows) == 2:
            low, high = _within(*runs)
        ratio = statistics.median(new) / statistics.median(old)
        word = verdict(low, high) if control and comparable else "cannot tell"
        if not enough and word != "cannot tell":
            word = f"perhaps {word}"
        yield Change(rows[-1]["case"], name, control, ratio, low, high, word)


def _within(old: Sequence[float], new: Sequence[float]) -> tuple[float, float]:
    """Bounds of the ratio for one run of each side, from the spread of their rounds."""
    bounds = interval(old), interval(new)
    if bounds[0] is None or bounds[1] is None:
        return 0.0, math.inf
    return bounds[1][0] / bounds[0][1], bounds[1][1] / bounds[0][0]


def _ratios(rows: Sequence[Row], name: str) -> tuple[str, list[list[float]]] | None:
    """The control, and the ratios to it in each row.

    Times of CUDA graphs are taken where all rows have them. Without a control this returns "" and
    the times themselves, and None where a row has no times.
    """
    for key in ("graph_samples_ms", "samples_ms"):
        times = [{n: c[key] for n, c in row["candidates"].items() if c.get(key)} for row in rows]
        if all(name in own for own in times):
            for control in CONTROLS:
                if all(control in own for own in times):
                    return control, [paired_ratios(own[name], own[control]) for own in times]
            return "", [own[name] for own in times]
    return None


def verdict(low: float, high: float) -> str:
    """The verdict that an interval of the ratio allows.

    Example:
        >>> verdict(0.9, 0.95), verdict(0.99, 1.01), verdict(0.9, 1.1)
        ('faster', 'same', 'cannot tell')
    """
    if high < 1 - MARGIN:
        return "faster"
    if low > 1 + MARGIN:
        return "slower"
    if low >= 1 - MARGIN and high <= 1 + MARGIN:
        return "same"
    return "cannot tell"


def interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """Confidence interval of the median from order statistics, whatever the distribution.

    The interval between the k-th smallest and the k-th largest of n samples misses the median with
    a chance of 2·P(Bin(n, ½) < k).

    Args:
        samples: independent samples.

    Returns:
        Bounds that miss the median with a chance of at most `RISK`; None if there are too few
        samples for that.

    Example:
        >>> interval([1.0, 2.0, 3.0, 4.0, 5.0]), interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        (None, (1.0, 6.0))
    """
    n, ordered = len(samples), sorted(samples)
    k, below = 0, 1
    while k < n // 2 and 2 * below <= RISK * 2**n:
        k += 1
        below += math.comb(n, k)
    return None if k == 0 else (ordered[k - 1], ordered[n - k])


def report(before: Sequence[Record], after: Sequence[Record]) -> str:
    """The changes as a table, with the machines of both sides above it."""
    changes = compare(before, after)
    lines = []
    for word, runs in (("before", before), ("after", after)):
        lines.append(f"{word:<6}  {len(runs)} run(s), {runs[0]['date']}  {source(runs[0])}")
    if len({_machine(record) for record in (*before, *after)}) > 1:
        lines.append("different machines: no verdicts")
    chance = 2 / math.comb(len(before) + len(after), len(before))
    if chance <= RISK and len(changes) * chance >= 1:
        lines.append(
            f"of {len(changes)} comparisons, up to {len(changes) * chance:.0f} would be called "
            "faster or slower if nothing had changed"
        )
    if any(change.verdict.startswith("perhaps") for change in changes):
        lines.append(
            "perhaps: too few runs to know how far runs of the same code lie apart; four files of "
            "each, or two revisions, can say"
        )
    lines += [
        "",
        "time after ÷ before, each divided by its control in the same run; under 1 is faster",
    ]
    head = ["case", "candidate", "control", "ratio", "range", "verdict"]
    body = (
        [c.case, c.candidate, c.control, f"{c.ratio:.3f}", _span(c), c.verdict] for c in changes
    )
    lines.append(aligned([head, *body], left=1))
    left_out = list(lost(before, after))
    if left_out:
        lines += ["", "not compared:", *left_out]
    return "\n".join(lines)


def _span(change: Change) -> str:
    return "too few samples" if math.isinf(change.high) else f"{change.low:.3f} – {change.high:.3f}"


def _machine(record: Record) -> tuple[object, ...]:
    m = record["machine"]
    gpu = record["accelerator"].get("name")
    return m["cpu"], m["threads"], m["torch"], gpu, record["accelerator"].get("driver")
