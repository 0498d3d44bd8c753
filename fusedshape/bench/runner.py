"""Runs a suite: checks every candidate against float64, times it, and writes the record."""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedshape.bench import records
from fusedshape.bench.cases import Case, Setting
from fusedshape.bench.providers import Task
from fusedshape.bench.records import Record, Row
from fusedshape.bench.suites import SUITES, Suite
from fusedshape.files import remove_leftovers
from fusedshape.interrupts import terminable
from fusedshape.timing import (
    Candidate,
    Clock,
    GraphClock,
    ceilings,
    clock_for,
    interleaved,
    paired_ratios,
    peak_bytes,
    percentiles,
    saved_bytes,
)

#: The error of a candidate may be this many times that of eager PyTorch in the same dtype. One unit
#: in the last place is always allowed.
SLACK = 4.0
#: Beyond this relative error eager PyTorch itself is taken to be wrong.
GROSS = 0.5
#: Share of a suite's time for checks before the first timing. Cases that do not fit into it are
#: checked when they are timed.
CHECKS_FIRST = 0.3
#: Seeds are smaller than this.
SEEDS = 2**32
#: The largest fitted exponent that still counts as linear growth.
LINEAR = 1.15


class NoDeviceError(ValueError):
    """The suite needs a device that this machine does not have."""


class DeviceLostError(RuntimeError):
    """The GPU cannot be used by this process any more, as after an illegal memory access."""


class OccupiedError(RuntimeError):
    """Another process writes to the file of the record."""


def run_suite(
    suite: str | Suite,
    *,
    pattern: str = "*",
    out: Path | None = None,
    seed: int = 0,
    limit: float | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Record:
    """Run the cases of a suite and return their record.

    For each case, values and gradients of every provider are checked against float64, the memory
    that autograd saves is counted, and providers are timed in turns. A provider that fails its
    check or runs out of memory is not timed, and no ratio names it. SIGINT and SIGTERM stop the run
    between two rows.

    Args:
        suite: a `Suite`, or the name of one: smoke, cpu, solver, scaling, gpu-quick or gpu.
        pattern: shell pattern of the names of cases.
        out: file of the record, which is written whole after every row.
        seed: seed of all random numbers, 0 … 2³² − 1.
        limit: limit in seconds in place of the suite's; no case begins that would probably end
            later.
        resume: keep the rows that an earlier run of the same code left in `out`, and run the rest.
        progress: show a progress bar, or a line for each case if stderr is no terminal.

    Returns:
        The record, as `records.load` reads it.

    Raises:
        ValueError: an unknown suite, a pattern that matches no case, a seed out of range, a limit
            that is not positive, or a record in `out` that another run made.
        OSError: `out` cannot be written; this is checked before the first case.
        NoDeviceError: the suite needs a GPU, and there is none.
        DeviceLostError: a case broke the GPU's context; `resume` skips that case.
        OccupiedError: another process writes to `out`; its file is left as it is.
        KeyboardInterrupt: interrupted or terminated; the finished rows are in `out`.
    """
    if isinstance(suite, str):
        if suite not in SUITES:
            raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
        suite = SUITES[suite]
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise NoDeviceError(
            f"suite {suite.name!r} needs an NVIDIA GPU, and torch {torch.__version__} sees none "
            "here; run --suite cpu, or install torch for CUDA on a machine with a GPU"
        )
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed must be in 0 … {SEEDS - 1}, got {seed}")
    if limit is not None:
        if not limit > 0:
            raise ValueError(f"limit must be above 0 seconds, got {limit:g}; or leave it out")
        suite = replace(suite, limit=limit)
    cases = suite.cases(pattern)
    record = records.new(suite.name, torch.device(suite.device), seed)
    if resume:
        if out is None:
            raise ValueError("resume needs out, the file of the record to go on with")
        record = _resumed(record, out)
    with terminable():
        return _Run(suite, cases, record, out, progress).finish()


class _Run:
    """A run in progress, with its record."""

    def __init__(
        self, suite: Suite, cases: Sequence[Case], record: Record, out: Path | None, progress: bool
    ) -> None:
        self.suite = suite
        self.cases = cases
        self.record = record
        self.out = out
        self.left = _stamp(out)
        self.progress = progress
        self.device = torch.device(suite.device)
        self.setting = Setting(self.device, record["seed"], suite.compiled)
        self.clock = clock_for(self.device)
        self.graphs = GraphClock(self.device) if self.device.type == "cuda" else None
        self.start = time.monotonic()
        #: Seconds of each visit so far, by group and by whether it was timed.
        self.costs: dict[tuple[str, bool], list[float]] = {}

    def finish(self) -> Record:
        """Run the cases that the record lacks, as far as time allows."""
        if self.out is not None:
            records.demand_writable(self.out)
            remove_leftovers(self.out.parent)
        # Only dtypes of cases with products: on a CPU, products of some dtypes are very slow.
        products = ("conv_act", "linear_act", "chain", "net")
        dtypes = {c.parameters["dtype"] for c in self.cases if c.group in products}
        self.record["ceilings"] = self.record["ceilings"] or ceilings(
            self.device, [getattr(torch, name) for name in sorted(dtypes)]
        )
        rows: dict[str, Row] = {row["case"]: row for row in self.record["rows"]}
        cases = [case for case in self.cases if not _is_done(case, rows.get(case.name))]
        visits = [(case, case.timed) for case in cases]
        if self.suite.check_first:
            visits = [(case, False) for case in cases] + visits
        for i, (case, timed) in enumerate(_bar(visits, self.progress)):
            checking = self.suite.check_first and i < len(cases)
            if self.is_late(case, timed, checking):
                if not checking:
                    row = rows.setdefault(case.name, _row(case, "skipped"))
                    row.setdefault("why", f"no time for it in {self.suite.limit:.0f} s")
            else:
                self.say(f"[{i + 1}/{len(visits)}, {self.elapsed():.0f} s] {case.name}")
                rows[case.name] = self.visit(case, timed)
            self.record["rows"] = list(rows.values())
            self.save()
            self.demand_device(case)
        self.record["fits"] = fits(self.record["rows"])
        self.record["finished"] = True
        self.save()
        return self.record

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def is_late(self, case: Case, timed: bool, checking: bool) -> bool:
        """Whether a visit would probably end too late, judging by earlier ones of its group."""
        seen = self.costs.get((case.group, timed), [0.0])
        end = self.elapsed() + statistics.fmean(seen)
        return end > self.suite.limit * (CHECKS_FIRST if checking else 1.0)

    def say(self, line: str) -> None:
        if self.progress and not _has_bar():
            print(line, file=sys.stderr, flush=True)

    def demand_device(self, case: Case) -> None:
        """Raise if the GPU is lost, because every later case would fail."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise DeviceLostError(
                f"the GPU stopped working in {case.name} ({_first_line(error)}); the same command "
                "with --resume goes on behind it"
            ) from None

    def save(self) -> None:
        if self.out is None:
            return
        if _stamp(self.out) not in (None, self.left):
            raise OccupiedError(
                f"{self.out} was written by somebody else in the meantime, and is left as it is; "
                "give each run an --out of its own"
            )
        records.save(self.out, self.record)
        self.left = _stamp(self.out)

    def visit(self, case: Case, timed: bool) -> Row:
        """The row of one case, which also says what went wrong."""
        row = _row(case, "ok")
        begin = self.elapsed()
        if self.suite.compiled:
            torch._dynamo.reset()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                problem = case.build(self.setting)
                measure(row, problem, self, timed)
        except Exception as error:
            row["status"], row["why"] = _state_of(error), _first_line(error)
        finally:
            problem = None  # type: ignore[assignment]
            if self.graphs is not None:
                with suppress(RuntimeError):  # the device is lost, and the row says so
                    self.graphs.clear()
                    gc.collect()
                    torch.cuda.empty_cache()
        self.costs.setdefault((case.group, timed), []).append(self.elapsed() - begin)
        return row


def measure(row: Row, problem: Task, run: Any, timed: bool) -> None:
    """Fill a row with errors, memory and, if `timed`, times.

    Args:
        row: an empty row.
        problem: what to run.
        run: the `_Run`, whose suite, clocks, device and ceilings are used.
        timed: whether to time; if not, compiled candidates are left for the timed visit.
    """
    candidates = {name: c for name, c in problem.candidates.items() if timed or not c.compiled}
    results: dict[str, dict[str, Any]] = {name: {"status": "ok"} for name in candidates}
    row["candidates"] = results
    if problem.bytes:
        row["bytes"] = problem.bytes
    if problem.flops:
        row["flops"] = problem.flops
    check(problem, candidates, results)
    for name in _good(results):
        with _noting(results[name]):
            candidate = candidates[name]
            if candidate.graph is not None:
                results[name]["saved_bytes"] = saved_bytes(candidate.graph, problem.leaves)
            peak = peak_bytes(candidate, run.device)
            if peak is not None:
                results[name]["peak_bytes"] = peak
    if timed:
        timings(row, problem, run.clock, run.suite, "")
        if run.graphs is not None and problem.leaves:
            timings(row, problem, run.graphs, run.suite, "graph_")
        _rates(row, problem, run.record["ceilings"])
    # An engine that was named may be unable to run a layer, but it must not be wrong.
    claimed = [
        results[name]
        for name, c in candidates.items()
        if c.claims and (name == "fused" or results[name]["status"] == "wrong")
    ]
    bad = next((c for c in claimed if c["status"] != "ok"), None)
    if bad is not None:
        row["status"], row["why"] = bad["status"], bad["why"]


def check(
    problem: Task, candidates: Mapping[str, Candidate], results: Mapping[str, dict[str, Any]]
) -> None:
    """Compare every candidate with float64, eager first; note errors and wrong candidates."""
    if problem.truth is None:
        return
    truth = problem.truth()
    least = max(problem.tolerance, torch.finfo(problem.dtype).eps)
    allowed: dict[str, float] = {}
    for name in sorted(candidates, key=lambda name: not candidates[name].yardstick):
        candidate, result = candidates[name], results[name]
        if candidate.check is None:
            continue
        with _noting(result):
            error = errors(candidate.check(), truth)
            result["error"] = {k: e for k, e in error.items() if math.isfinite(e)}
            if candidate.yardstick:
                limits = dict.fromkeys(error, GROSS)
                allowed = {key: max(SLACK * e, least) for key, e in error.items()}
            else:
                limits = allowed or dict.fromkeys(error, least)
            for key, e in error.items():
                if not e <= limits[key]:
                    result["status"] = "wrong"
                    result["why"] = (
                        f"{key} has a relative error of {e:.2g} against float64, "
                        f"{limits[key]:.2g} is allowed"
                    )
                    break


def errors(got: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative root-mean-square error of each tensor.

    Raises:
        RuntimeError: names or shapes of the tensors differ from those of the truth.

    Example:
        >>> errors({"y": torch.tensor([3.0, 4.0])}, {"y": torch.tensor([3.0, 5.0])})["y"] < 0.2
        True
    """
    if set(got) != set(truth):
        raise RuntimeError(f"computed {sorted(got)}, wanted {sorted(truth)}")
    found = {}
    for key, want in truth.items():
        if got[key].shape != want.shape:
            raise RuntimeError(
                f"{key} has shape {tuple(got[key].shape)}, wanted {tuple(want.shape)}"
            )
        difference = (got[key].double() - want.double()).square().mean().sqrt().item()
        scale = want.double().square().mean().sqrt().item()
        found[key] = difference / scale if scale else difference
    return found


def timings(row: Row, problem: Task, clock: Clock, suite: Suite, prefix: str) -> None:
    """Time all good candidates in turns; if one fails, the others start again without it."""
    results = row["candidates"]
    dropped: set[str] = set()
    while True:
        names = [name for name in _good(results) if name not in dropped]
        if not names:
            return
        watch = _Watch(clock)
        try:
            times = interleaved(
                {name: problem.candidates[name] for name in names},
                watch,
                budget=suite.budget,
                least=suite.least,
                most=suite.most,
            )
            break
        except Exception as error:
            culprit = next(name for name in names if problem.candidates[name] is watch.at)
            if prefix:
                # A candidate that cannot be captured as a graph is right and was timed without one.
                results[culprit][f"{prefix}why"] = _first_line(error)
                dropped.add(culprit)
            else:
                results[culprit] |= {"status": _state_of(error), "why": _first_line(error)}
            if isinstance(clock, GraphClock):
                clock.clear()
    for name, samples in times.items():
        ms = [float(f"{1e3 * s:.5g}") for s in samples]
        results[name][f"{prefix}samples_ms"] = ms
        results[name][f"{prefix}ms"] = percentiles(ms)
    row[f"{prefix}ratios"] = ratios(problem.candidates, times)


def ratios(
    candidates: Mapping[str, Candidate], times: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Percentiles of paired ratios: other/own for every candidate of ours, and own/bare.

    For "fused", engines that are named count as others: fused aten/fused says what the choice of
    the engine gains.
    """
    found = {}
    for own in (name for name in times if candidates[name].claims):
        for other in (name for name in times if name != own):
            if candidates[other].claims and own != "fused":
                continue
            pair = (own, other) if other == "bare" else (other, own)
            found["/".join(pair)] = percentiles(paired_ratios(*(times[name] for name in pair)))
    return found


def fits(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """How each series grows: the exponent k of size^k, fitted to its three largest sizes.

    At small sizes, costs that do not grow hide those that do.
    """
    series: dict[str, list[Row]] = {}
    for row in rows:
        if "series" in row["parameters"]:
            series.setdefault(row["parameters"]["series"], []).append(row)
    found = []
    for name, members in series.items():
        metric = members[0]["parameters"]["metric"]
        points: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(members, key=lambda row: row["parameters"]["size"]):
            for candidate, result in row["candidates"].items():
                value = result.get(metric)
                if value:
                    y = value[1] if isinstance(value, list) else value
                    points.setdefault(candidate, []).append((row["parameters"]["size"], y))
        for candidate, pairs in points.items():
            if len(pairs) < 3:
                continue
            k = exponent(pairs[-3:])
            sizes, values = (list(map(float, side)) for side in zip(*pairs, strict=True))
            found.append(
                {
                    "series": name,
                    "candidate": candidate,
                    "metric": metric,
                    "exponent": k,
                    "sizes": sizes,
                    "values": values,
                    "at_most": LINEAR,
                    "holds": k <= LINEAR,
                }
            )
    return found


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log y by log x.

    Example:
        >>> round(exponent([(10, 3.0), (100, 300.0), (1000, 30000.0)]), 9)
        2.0
    """
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return statistics.linear_regression(xs, ys).slope


class _Watch:
    """A clock that remembers which candidate it times."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.least = clock.least
        self.at: Candidate | None = None

    def seconds(self, candidate: Candidate, repeats: int) -> float:
        self.at = candidate
        return self.clock.seconds(candidate, repeats)


def _row(case: Case, status: str) -> Row:
    return {
        "case": case.name,
        "parameters": dict(case.parameters),
        "status": status,
        "candidates": {},
        "ratios": {},
    }


def _good(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [name for name, result in results.items() if result["status"] == "ok"]


def _rates(row: Row, problem: Task, ceiling: Mapping[str, float]) -> None:
    """GB/s and TFLOP/s of each candidate, and their share of the measured ceilings."""
    matmul = ceiling.get(f"matmul {str(problem.dtype)[6:]} TFLOP/s")
    for result in row["candidates"].values():
        ms = result.get("graph_ms", result.get("ms"))
        if ms is None:
            continue
        if problem.bytes:
            result["GB/s"] = problem.bytes / ms[1] / 1e6
            result["of_copy"] = result["GB/s"] / ceiling["copy GB/s"]
        if problem.flops:
            result["TFLOP/s"] = problem.flops / ms[1] / 1e9
            if matmul:
                result["of_matmul"] = result["TFLOP/s"] / matmul


@contextmanager
def _noting(result: dict[str, Any]) -> Iterator[None]:
    """Turn an error in the body into the state of the candidate."""
    try:
        yield
    except Exception as error:
        result |= {"status": _state_of(error), "why": _first_line(error)}
        gc.collect()


def _state_of(error: Exception) -> str:
    text = str(error)
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in text
    return "out of memory" if full or "can't allocate memory" in text else "failed"


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _resumed(new: Record, out: Path) -> Record:
    """The record to continue: that of the file, if the same code wrote it on this machine."""
    if not out.exists():
        return new
    old = records.load(out)
    same = ("suite", "device", "seed", "commit", "dirty", "machine", "accelerator")
    other = [_difference(key, old[key], new[key]) for key in same if old[key] != new[key]]
    if other:
        raise ValueError(
            f"{out} was made by another run (different: {', '.join(other)}); choose another --out, "
            "or leave --resume out to write it anew"
        )
    return {**old, "finished": False}


def _difference(key: str, old: Any, new: Any) -> str:
    """Name a key of the record, and what differs below it."""
    if not isinstance(new, dict):
        return key
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return f"{key}'s {' and '.join(names)}"


def _stamp(path: Path | None) -> tuple[int, int] | None:
    """A value that changes whenever the file is written; None if there is no file."""
    try:
        found = None if path is None else path.stat()
    except OSError:
        return None
    return found and (found.st_ino, found.st_mtime_ns)


def _is_done(case: Case, row: Row | None) -> bool:
    """Whether an earlier run has finished a case, or has failed in it."""
    if row is None or row["status"] == "skipped":
        return False
    timed = any("ms" in candidate for candidate in row["candidates"].values())
    return timed or not case.timed or row["status"] != "ok"


def _has_bar() -> bool:
    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None


def _bar(visits: Sequence[Any], wanted: bool) -> Iterable[Any]:
    """The visits, with a progress bar on a terminal."""
    if not (wanted and _has_bar()):
        return visits
    from tqdm import tqdm

    return tqdm(visits, unit="case", dynamic_ncols=True)
