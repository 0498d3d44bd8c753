"""`fusedshape tune`: measure a model's fused layers, and say what was chosen and what it gains."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from fusedshape.columns import aligned
from fusedshape.loading import make_model
from fusedshape.ops.choice import pinned_engine, rivals
from fusedshape.ops.problem import Direction, Problem
from fusedshape.shell import Commands, add_model, shape
from fusedshape.timing import Clock, clock_for
from fusedshape.tuning import chooser
from fusedshape.tuning.cache import Record, cache_directory
from fusedshape.tuning.layers import Layer, fused_layers
from fusedshape.tuning.measuring import Result, able, measure
from fusedshape.tuning.problems import is_passed_over, settings
from fusedshape.tuning.text import places, shapes
from fusedshape.validate import find_device

_T = TypeVar("_T")
_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


def declare(commands: Commands) -> None:
    """Declare `fusedshape tune`."""
    about = "measure which engine computes each fused layer of a model fastest, and keep it"
    parser = commands.add("tune", _run, about)
    add_model(parser, "tune")
    parser.add_argument(
        "--input", required=True, type=shape, metavar="N,C,H,W", help="shape of the model's input"
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="fp32",
        metavar="DTYPE",
        help=f"dtype of model and input: {', '.join(_DTYPES)} (default fp32)",
    )
    parser.add_argument(
        "--autocast",
        action="store_true",
        help="leave the model in fp32 and run it under autocast to --dtype",
    )
    parser.add_argument(
        "--device",
        help="device to measure: cpu, cuda, cuda:1, … (default cuda where there is one, else cpu)",
    )
    parser.add_argument(
        "--no-channels-last", action="store_true", help="leave model and input contiguous"
    )
    parser.add_argument(
        "--benchmark", action="store_true", help="measure with cudnn.benchmark = True"
    )
    parser.add_argument(
        "--force", action="store_true", help="measure also what the cache has already"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="measure nothing, show what is chosen now"
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


class Row(NamedTuple):
    """One direction of one call of a layer.

    Attributes:
        layer: the module's name.
        direction: as in `fusedshape.tuning.measuring.measure`.
        problem: the layer and its input.
        record: what was found; None if "aten" is the only candidate.
        result: result of the measurement; None if the cache had it. Without a record it says which
            engines cannot run.
    """

    layer: str
    direction: Direction
    problem: Problem
    record: Record | None
    result: Result | None


def _run(args: argparse.Namespace) -> None:
    model, device = make_model(args.model), find_device(args.device)
    dtype = _DTYPES[args.dtype]
    if args.autocast and args.dtype not in ("fp16", "bf16"):
        raise ValueError(f"--autocast is to fp16 or bf16, got --dtype {args.dtype}; name one")
    own = torch.float32 if args.autocast else dtype
    model = model.to(device, own)
    x = torch.zeros(args.input, dtype=own, device=device)
    if not args.no_channels_last and x.ndim in (4, 5):
        memory = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        model.to(memory_format=memory)  # type: ignore[call-overload]
        x = x.to(memory_format=memory)
    with torch.autocast(device.type, dtype, enabled=args.autocast):
        layers = fused_layers(model, x)
    rows: list[Row] = []
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or args.benchmark
    try:
        rows.extend(tune(layers, device, force=args.force, dry_run=args.dry_run))
    finally:
        # What was measured is kept and shown after Ctrl-C, too.
        kept = chooser.cache_of(device).writable
        if rows:
            print(json.dumps(_as_json(rows), indent=1) if args.json else text(rows, kept))
        torch.backends.cudnn.benchmark = before
    if not kept:
        reason = chooser.cache_of(device).refused()
        raise RuntimeError(
            f"not all of it could be kept in {cache_directory()}"
            + (f", for {reason}; " if reason else "; make room there, or ")
            + "name another place in FUSEDSHAPE_CACHE"
        )


def tune(
    layers: Sequence[Layer],
    device: torch.device,
    *,
    force: bool = False,
    dry_run: bool = False,
    clock: Clock | None = None,
    progress: bool = True,
) -> Iterator[Row]:
    """Measure what the cache lacks, and store it there.

    Args:
        layers: as `fused_layers` finds them.
        device: device of the layers.
        force: measure also what the cache has.
        dry_run: measure nothing.
        clock: clock of the device; None makes one.
        progress: whether to show a progress bar if stderr is a terminal.

    Yields:
        A row for each direction of each layer, in order.
    """
    if force and not dry_run:
        chooser.forget()
    found: dict[tuple[Direction, Problem], tuple[Record | None, Result | None]] = {}
    todo = [(layer, direction) for layer in layers for direction in layer.directions]
    if not dry_run:
        _prepare(todo, device, force, progress)
    for layer, direction in _bar(todo, len(todo), "measuring", progress):
        problem = layer.problem
        if (direction, problem) not in found:
            record = result = None
            if dry_run or not force:
                record = chooser.lookup(direction, problem, device)
            if record is None and dry_run:
                result = Result(None, {}, able(problem, device)[1])
            elif record is None:
                clock = clock or clock_for(device)
                result = measure(direction, problem, device, clock)
                record = result.record
                if record is not None:
                    chooser.keep(direction, problem, device, record)
            found[direction, problem] = record, result
        yield Row(layer.path, direction, problem, *found[direction, problem])


def _prepare(
    todo: Sequence[tuple[Layer, Direction]], device: torch.device, force: bool, progress: bool
) -> None:
    """Let the engines compile what they lack for all that will be measured."""
    cases = dict.fromkeys((direction, layer.problem) for layer, direction in todo)
    missing = [case for case in cases if force or chooser.lookup(*case, device) is None]
    for engine in rivals(device.type):
        show = functools.partial(_bar, title=f"preparing {engine.name}", progress=progress)
        engine.prepare(missing, device, show)


def _bar(cases: Iterable[_T], count: int, title: str, progress: bool) -> Iterable[_T]:
    if not progress or not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return cases
    from tqdm import tqdm

    return tqdm(cases, total=count, desc=title, unit="case", leave=False)


def text(rows: Sequence[Row], kept: bool = True) -> str:
    """A table of what was chosen, what it gains, and what was left out.

    Args:
        rows: as `tune` yields them.
        kept: whether all of it is in the cache.
    """
    lines = [("layer", "direction", "input", "weight", "chosen", "aten", "chosen", "gain")]
    for row in rows:
        lines.append((row.layer or ".", row.direction, *shapes(row.problem), *_figures(row)))
    return "\n".join([aligned(lines, left=len(lines[0]) - 3), "", *_summary(rows, kept)])


def _figures(row: Row) -> tuple[str, str, str, str]:
    record = row.record
    if record is None:
        failed = {} if row.result is None else row.result.failed
        if len(failed) == len(rivals(row.problem.device)):
            return "aten (only candidate)", "", "", ""
        pinned = "aten" if is_passed_over(row.problem) else pinned_engine(row.problem)
        return f"{'aten' if pinned in failed else pinned} (not measured)", "", "", ""
    name = record.engine
    if record.kernel is not None:
        name += " " + ",".join(f"{k}={int(v)}" for k, v in record.kernel["config"].items())
    if name != "aten" and is_passed_over(row.problem):
        name += " (torch.compile only)"
    if row.result is None:
        name += " (cached)"
    base, own = (f"{1e6 * s:.1f} µs" for s in (record.base_seconds, record.seconds))
    return name, base, own, f"{record.base_seconds / record.seconds:.2f}×"


def _summary(rows: Sequence[Row], kept: bool) -> list[str]:
    records = [row.record for row in rows if row.record is not None]
    lines = []
    if records:
        base, own = (sum(getattr(r, n) for r in records) for n in ("base_seconds", "seconds"))
        won = sum(r.engine != "aten" for r in records)
        lines += [
            f"{won} of {len(rows)} cases have a faster engine than aten. Those measured, of one "
            f"training step: {1e3 * base:.3f} ms → {1e3 * own:.3f} ms ({base / own:.2f}×).",
            *([f"kept in {cache_directory()}"] if kept else []),
        ]
        small = {row.layer or "." for row in rows if row.record and is_passed_over(row.problem)}
        if small:
            lines.append(
                f"{len(small)} layer(s) get an input so small that nothing is looked up for it but "
                "under torch.compile: aten computes them"
            )
        if chooser.current_mode() == "off":
            lines.append("tuning is off (FUSEDSHAPE_TUNING): none of it is used")
    elif all(_figures(row)[0] == "aten (only candidate)" for row in rows):
        lines.append("aten is the only candidate, nothing to measure")
    left_out: dict[str, list[str]] = {}
    for row in rows:
        if row.result is not None:
            where = f"{row.layer or '.'} {row.direction}"
            for name, reason in row.result.wrong.items():
                left_out.setdefault(f"WRONG NUMBERS, not used: {name}: {reason}", []).append(where)
            for name, reason in row.result.failed.items():
                left_out.setdefault(f"left out: {name}: {reason}", []).append(where)
    for line, cases in left_out.items():
        lines.append(f"{line} {places(cases)}")
    return lines


def _as_json(rows: Sequence[Row]) -> dict[str, Any]:
    def one(row: Row) -> dict[str, Any]:
        problem = row.problem._asdict() | {"dtype": str(row.problem.dtype).removeprefix("torch.")}
        result = row.result
        return {
            "layer": row.layer,
            "direction": row.direction,
            "problem": problem | settings(row.problem)._asdict(),
            "record": None if row.record is None else row.record.__dict__,
            "measured": result is not None and result.record is not None,
            "wrong": {} if result is None else result.wrong,
            "failed": {} if result is None else result.failed,
        }

    return {"cache": str(cache_directory()), "rows": [one(row) for row in rows]}
