"""Records as tables for a terminal, with the machine above them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fusedshape.bench.records import Record, Row
from fusedshape.columns import aligned
from fusedshape.machine import headline

#: The order of the columns of ratios.
OTHERS = (
    *("eager", "folded", "inplace", "compiled", "compiled max-autotune", "reference", "dks"),
    *("fused aten", "fused triton", "fused chain"),
)


def source(record: Record) -> str:
    """One line: machine, accelerator, commit and command."""
    gpu = record["accelerator"]
    more = f", driver {gpu['driver']}, cuDNN {gpu['cudnn']}" if gpu else ""
    return f"{headline(record)}{more}; {record['command']}"


def report(record: Record) -> str:
    """The whole record: header, ceilings, a table for each group, fits, and what went wrong."""
    return "\n".join(_report(record))


def _report(record: Record) -> Iterator[str]:
    state = "" if record["finished"] else ", not finished"
    yield f"suite {record['suite']}{state}, {record['date']}"
    yield source(record)
    if record["ceilings"]:
        yield "measured ceilings: " + ", ".join(
            f"{name} {value:.3g}" for name, value in record["ceilings"].items()
        )
    groups: dict[str, list[Row]] = {}
    for row in record["rows"]:
        groups.setdefault(row["case"].partition("/")[0], []).append(row)
    for group, rows in groups.items():
        yield from _group(group, rows)
    if record["fits"]:
        yield ""
        head = ["series", "candidate", "metric", "exponent", "at most", ""]
        body = [
            [
                fit["series"],
                fit["candidate"],
                fit["metric"],
                f"{fit['exponent']:.2f}",
                f"{fit['at_most']:.2f}",
                "" if fit["holds"] else "EXCEEDED",
            ]
            for fit in record["fits"]
        ]
        yield aligned([head, *body], left=1)
    bad = list(troubles(record))
    if bad:
        yield ""
        yield from bad


def _group(group: str, rows: Sequence[Row]) -> Iterator[str]:
    """Median milliseconds of ours, shares of the ceilings, memory, errors, and ratios to ours."""
    owns = list(dict.fromkeys(name for row in rows for name in row["candidates"] if is_ours(name)))
    others = [
        name for name in OTHERS if any(f"{name}/{own}" in r["ratios"] for r in rows for own in owns)
    ]
    head = ["case", "ours", "ms", "GB/s", "copy", "matmul", "saved MB", "error", "ours ÷ bare"]
    body = []
    for row in rows:
        for own in owns:
            result = row["candidates"].get(own)
            if result is None or result["status"] != "ok":
                continue
            body.append(
                [
                    row["case"].partition("/")[2],
                    own,
                    _number(_median(result.get("ms"))),
                    _number(result.get("GB/s")),
                    _percent(result.get("of_copy")),
                    _percent(result.get("of_matmul")),
                    _number(_mega(result.get("saved_bytes"))),
                    _error(result.get("error")),
                    ratio(row["ratios"].get(f"{own}/bare")),
                    *(ratio(row["ratios"].get(f"{other}/{own}")) for other in others),
                ]
            )
    if not body:
        return
    yield ""
    yield f"{group}: medians; ratios are other ÷ ours, over 1 is our gain (20th to 80th percentile)"
    kept = [i for i in range(len(head) + len(others)) if i < 3 or any(line[i] for line in body)]
    head += others
    yield aligned([[line[i] for i in kept] for line in (head, *body)], left=1)


def troubles(record: Record) -> Iterator[str]:
    """A line for each row and each candidate that is not ok."""
    skipped = [row for row in record["rows"] if row["status"] == "skipped"]
    if skipped:
        names = ", ".join(row["case"] for row in skipped[:3]) + (" …" if skipped[3:] else "")
        yield f"{len(skipped)} case(s) skipped, {skipped[0]['why']}: {names}"
    for row in record["rows"]:
        if row["status"] not in ("ok", "skipped"):
            yield f"{row['case']}: {row['status']}: {row.get('why', '')}"
        for name, result in row["candidates"].items():
            if result["status"] != "ok" and result.get("why") != row.get("why"):
                yield f"{row['case']}: {name}: {result['status']}: {result.get('why', '')}"


def is_ours(name: str) -> bool:
    """Whether a candidate runs this library, so that its speed-up is reported."""
    return name == "fused" or name.startswith("fused ")


def _median(percentiles: Any) -> float | None:
    return None if percentiles is None else percentiles[1]


def _mega(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _error(found: dict[str, float] | None) -> str:
    return f"{max(found.values()):.1e}" if found else ""


def ratio(percentiles: Sequence[Any] | None) -> str:
    """The median, with the 20th and 80th percentile if they are known."""
    if percentiles is None:
        return ""
    low, middle, high = percentiles
    return f"{middle:.2f}" if low is None else f"{middle:.2f} ({low:.2f}–{high:.2f})"
