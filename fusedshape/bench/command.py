"""`fusedshape bench`: run, show, list, compare, plot."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fusedshape.bench import compare, plot, records, revisions, text
from fusedshape.bench.runner import NoDeviceError, run_suite
from fusedshape.bench.suites import SUITES

#: Files that each action takes.
_FILES = {"run": 0, "list": 0, "show": 1, "compare": 2, "plot": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fusedshape bench`."""
    parser.add_argument(
        "action", nargs="?", choices=_FILES, default="run", metavar="action", help=", ".join(_FILES)
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help="records, for show, compare and plot; compare also takes two git revisions",
    )
    about = "; ".join(f"{suite.name}: {suite.about}" for suite in SUITES.values())
    parser.add_argument("--suite", choices=SUITES, default="cpu", help=f"default cpu. {about}")
    parser.add_argument(
        "--case", default="*", help="run or list only cases like this: 'conv_act/*'"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default 0)")
    parser.add_argument(
        "--out", type=Path, help="file of the record, or folder of the plots (default under runs/)"
    )
    parser.set_defaults(error=parser.error)


def main(args: argparse.Namespace) -> None:
    """Do what the arguments say.

    Raises:
        SystemExit: 2, wrong usage: files that the action does not take, or a GPU that is not there.
        ValueError: a record that cannot be read.
        RuntimeError: a case failed its check; the record is written all the same.
        KeyboardInterrupt: interrupted or terminated; finished rows are kept.
    """
    if len(args.files) != _FILES[args.action]:
        args.error(f"{args.action} takes {_FILES[args.action]} file(s), got {len(args.files)}")
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "run": _run,
        "list": _list,
        "show": lambda args: print(text.report(records.load(args.files[0]))),
        "compare": _compare,
        "plot": _plot,
    }
    actions[args.action](args)


def _run(args: argparse.Namespace) -> None:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    out = args.out or Path("runs") / f"bench-{args.suite}-{stamp}.json"
    before = out.stat().st_mtime_ns if out.exists() else None
    try:
        run_suite(args.suite, pattern=args.case, out=out, seed=args.seed, progress=True)
    except NoDeviceError as error:
        args.error(str(error))
    finally:
        # Also after Ctrl-C: what is finished is written, and shown.
        if out.exists() and out.stat().st_mtime_ns != before:
            record = records.load(out)
            print(text.report(record))
            print(f"written to {out}", file=sys.stderr)
    failed = [row["case"] for row in record["rows"] if row["status"] in ("wrong", "failed")]
    if failed:
        raise RuntimeError(f"{len(failed)} case(s) wrong or failed: {', '.join(failed)}")


def _compare(args: argparse.Namespace) -> None:
    if any(file.exists() for file in args.files):
        found = [records.load(file) for file in args.files]
    else:
        found = revisions.measure([str(file) for file in args.files], args.suite, args.case)
    print(compare.report(*found))


def _list(args: argparse.Namespace) -> None:
    for case in SUITES[args.suite].cases(args.case):
        print(case.name)


def _plot(args: argparse.Namespace) -> None:
    (file,) = args.files
    for path in plot.plot(records.load(file), args.out or file.with_suffix("")):
        print(path)
