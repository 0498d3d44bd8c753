"""`fusedshape bench`: run, list, show, compare, plot."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fusedshape.bench import compare, plot, records, revisions, text
from fusedshape.bench.runner import NoDeviceError, OccupiedError, run_suite
from fusedshape.bench.suites import SUITES
from fusedshape.shell import Commands


def declare(commands: Commands) -> None:
    """Declare `fusedshape bench run|list|show|compare|plot`."""
    about = "measure speed, memory and accuracy; show, compare and plot what was measured"
    bench = commands.group("bench", about, usual="run")

    parser = bench.add("run", _run, "run a suite and write its record")
    _add_cases(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of all random numbers (default 0)"
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="begin no case that would end later than this (default: the suite's own limit)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what the record at --out has, and run what it lacks",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file of the record (default under runs/, named by suite and time)",
    )

    _add_cases(bench.add("list", _list, "list the cases of a suite"))

    parser = bench.add("show", _show, "show a record as tables")
    parser.add_argument("record", type=Path, metavar="FILE", help="record to show")

    about = "say what changed between records, or between two git revisions"
    parser = bench.add("compare", _compare, about)
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="RECORD",
        help="records of before, then as many of after; or two git revisions, which are then "
        "measured in turns",
    )
    _add_cases(parser, " of git revisions")

    parser = bench.add("plot", _plot, "draw the plots of a record")
    parser.add_argument("record", type=Path, metavar="FILE", help="record to plot")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of the plots (default: the record's name without its suffix)",
    )


def _add_cases(parser: argparse.ArgumentParser, whose: str = "") -> None:
    suites = "; ".join(f"{suite.name}: {suite.about}" for suite in SUITES.values())
    parser.add_argument(
        "--suite",
        choices=SUITES,
        default="cpu",
        metavar="NAME",
        help=f"suite of cases{whose} (default cpu). {suites}",
    )
    parser.add_argument(
        "--case",
        default="*",
        metavar="PATTERN",
        help=f"take only the cases{whose} whose names match this: 'conv_act/*' (default all)",
    )


def _run(args: argparse.Namespace) -> None:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    out = args.out or Path("runs") / f"bench-{args.suite}-{stamp}.json"
    if args.resume and args.out is None:
        args.parser.error("--resume needs --out, the record to go on with")
    before = out.stat().st_mtime_ns if out.exists() else None
    own = True
    try:
        run_suite(
            args.suite,
            pattern=args.case,
            out=out,
            seed=args.seed,
            limit=args.limit,
            resume=args.resume,
            progress=True,
        )
    except NoDeviceError as error:
        args.parser.error(str(error))
    except OccupiedError:
        own = False
        raise
    finally:
        # Finished rows are shown after Ctrl-C, too.
        if own and out.exists() and out.stat().st_mtime_ns != before:
            record = records.load(out)
            print(text.report(record))
            print(f"written to {out}", file=sys.stderr)
    failed = [row["case"] for row in record["rows"] if row["status"] in ("wrong", "failed")]
    if failed:
        raise RuntimeError(f"{len(failed)} case(s) wrong or failed: {', '.join(failed)}")


@contextmanager
def _naming(files: Sequence[Path]) -> Iterator[None]:
    """Turn an error of a table or a plot into one that names the files."""
    try:
        yield
    except (LookupError, ArithmeticError) as error:
        names = ", ".join(map(str, files))
        what = f"{type(error).__name__}: {error}"
        raise records.RecordError(
            f"{names}: rows lack what a row of their kind has ({what}); run the suite again"
        ) from error


def _show(args: argparse.Namespace) -> None:
    with _naming([args.record]):
        print(text.report(records.load(args.record)))


def _compare(args: argparse.Namespace) -> None:
    half, odd = divmod(len(args.files), 2)
    if odd:
        args.parser.error(f"compare takes as many of before as of after, got {len(args.files)}")
    if len(args.files) == 2 and not any(map(os.path.lexists, args.files)):
        names = list(map(str, args.files))
        before, after = revisions.measure(names, args.suite, args.case, _say)
    else:
        found = [records.load(file) for file in args.files]
        before, after = found[:half], found[half:]
    with _naming(args.files):
        print(compare.report(before, after))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _list(args: argparse.Namespace) -> None:
    for case in SUITES[args.suite].cases(args.case):
        print(case.name)


def _plot(args: argparse.Namespace) -> None:
    with _naming([args.record]):
        for path in plot.plot(records.load(args.record), args.out or args.record.with_suffix("")):
            print(path)
