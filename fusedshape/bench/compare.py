"""Two records of the same cases: what changed, and whether the spread allows to say so.

Machines drift between two runs, so times are not compared with times. In each run a candidate's
time is divided, round by round, by that of a control timed in the same round, and the two medians
of these ratios are compared, each with its confidence interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fusedshape.bench.records import Record, Row
from fusedshape.bench.text import columns, is_ours, source
from fusedshape.timing import paired_ratios

#: A change smaller than this is not called one.
MARGIN = 0.02
#: Chance that an interval misses its median.
RISK = 0.05
#: Candidates that no change of this library touches, the nearest to the work first.
CONTROLS = ("bare", "eager", "folded")


class Change(NamedTuple):
    """One candidate of one case in both records.

    Attributes:
        case: its name.
        candidate: its name.
        control: what its times were divided by; "" for none, and then there is no verdict.
        ratio: median in the second record over that in the first; under 1 is faster.
        low: the ratio's lower bound.
        high: its upper bound.
        verdict: "faster", "slower", "same" (within `MARGIN`), or "cannot tell".
    """

    case: str
    candidate: str
    control: str
    ratio: float
    low: float
    high: float
    verdict: str


def compare(before: Record, after: Record) -> list[Change]:
    """Changes of this library's candidates, over the cases that both records have.

    Args:
        before: a record.
        after: another, of the same cases on the same kind of machine.

    Raises:
        ValueError: no case is ok in both, or the two ran on different devices.
    """
    if before["device"] != after["device"]:
        raise ValueError(
            f"compare: one record is of device {before['device']!r}, the other of "
            f"{after['device']!r}; run the same suite for both"
        )
    comparable = _machine(before) == _machine(after)
    old = {row["case"]: row for row in before["rows"]}
    found = []
    for row in after["rows"]:
        if row["case"] in old:
            found += list(_changes(old[row["case"]], row, comparable))
    if not found:
        raise ValueError(
            "compare: no case was timed in both records; run the same suite twice, for example "
            "fusedshape bench --suite cpu --out A.json"
        )
    return found


def _changes(before: Row, after: Row, comparable: bool) -> Iterator[Change]:
    for name in after["candidates"]:
        found = _ratios(before, after, name)
        if not is_ours(name) or found is None:
            continue
        control, old, new = found
        bounds = interval(old), interval(new)
        low, high = 0.0, math.inf
        if bounds[0] is not None and bounds[1] is not None:
            low, high = bounds[1][0] / bounds[0][1], bounds[1][1] / bounds[0][0]
        ratio = statistics.median(new) / statistics.median(old)
        word = verdict(low, high) if control and comparable else "cannot tell"
        yield Change(after["case"], name, control, ratio, low, high, word)


def _ratios(before: Row, after: Row, name: str) -> tuple[str, list[float], list[float]] | None:
    """The control, and the ratios to it in each row; by CUDA graphs where all have been timed so.

    Without a control, "" and the times themselves; None where there are none.
    """
    for key in ("graph_samples_ms", "samples_ms"):
        times = [
            {n: c[key] for n, c in row["candidates"].items() if c.get(key)}
            for row in (before, after)
        ]
        if all(name in own for own in times):
            for control in CONTROLS:
                if all(control in own for own in times):
                    old, new = (paired_ratios(own[name], own[control]) for own in times)
                    return control, old, new
            return "", times[0][name], times[1][name]
    return None


def verdict(low: float, high: float) -> str:
    """What an interval of the ratio allows to say.

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

    The k-th smallest and k-th largest of n: they miss the median with chance 2·P(Bin(n, ½) < k).

    Args:
        samples: independent.

    Returns:
        Bounds that miss with a chance of `RISK` at most; None for fewer samples than that takes.

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


def report(before: Record, after: Record) -> str:
    """The changes as a table, with both machines over it."""
    changes = compare(before, after)
    lines = [
        f"before  {before['date']}  {source(before)}",
        f"after   {after['date']}  {source(after)}",
    ]
    if _machine(before) != _machine(after):
        lines.append("different machines: no verdicts")
    lines += [
        "",
        "time after ÷ before, each divided by its control in the same run; under 1 is faster",
    ]
    lines += columns(
        ["case", "candidate", "control", "ratio", "95 % interval", "verdict"],
        [[c.case, c.candidate, c.control, f"{c.ratio:.3f}", _span(c), c.verdict] for c in changes],
    )
    return "\n".join(lines)


def _span(change: Change) -> str:
    return "too few samples" if math.isinf(change.high) else f"{change.low:.3f} – {change.high:.3f}"


def _machine(record: Record) -> tuple[object, ...]:
    m = record["machine"]
    gpu = record["accelerator"].get("name")
    return m["cpu"], m["threads"], m["torch"], gpu, record["accelerator"].get("driver")
