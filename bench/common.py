"""What every benchmark shares: interleaved timing, the machine's header, atomic results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedshape.machine import headline, provenance, write_json

ROOT = Path(__file__).resolve().parent.parent


def interleaved(
    candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round, the order turning so that none has an edge.

    Machines drift; only times of the same round are compared with one another.
    """
    names = list(candidates)
    for name in names * warmup:
        candidates[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], of: str, to: str) -> float:
    """Median over rounds of time(of) / time(to)."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def print_header() -> None:
    """One line that says where the figures below come from."""
    print(headline(provenance()))


def write(path: Path | None, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a result file whole or not at all; None writes nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**provenance(), **more, "rows": rows})
