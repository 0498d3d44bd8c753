"""`fusedshape bench`: run, show, list, compare, plot."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fusedshape.bench import compare, plot, records, revisions, text
from fusedshape.bench.runner import NoDeviceError, OccupiedError, run_suite
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
        help="records, for show, plot and compare; compare takes two, or as many of before as of "
        "after, or two git revisions",
    )
    about = "; ".join(f"{suite.name}: {suite.about}" for suite in SUITES.values())
    parser.add_argument("--suite", choices=SUITES, default="cpu", help=f"default cpu. {about}")
    parser.add_argument(
        "--case", default="*", help="run or list only cases like this: 'conv_act/*'"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default 0)")
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="of the run, instead of the suite's own"
    )
    parser.add_argument(
        "--resume", action="store_true", help="run what the record at --out does not have yet"
    )
    parser.add_argument(
        "--out", type=Path, help="file of the record, or folder of the plots (default under runs/)"
    )
    parser.set_defaults(error=parser.error)


def main(args: argparse.Namespace) -> None:
    """Do what the arguments say.

    Raises:
        SystemExit: 2, wrong usage: files that the action does not take, or a GPU that is not there.
        ValueError: a record that cannot be read, or not be gone on with.
        RuntimeError: a case failed its check, or the GPU; the record is written all the same.
        KeyboardInterrupt: interrupted or terminated; finished rows are kept.
    """
    count, wanted = len(args.files), _FILES[args.action]
    if count != wanted and (args.action != "compare" or count < 2 or count % 2):
        more = ", or as many of before as of after" if args.action == "compare" else ""
        args.error(f"{args.action} takes {wanted} file(s){more}, got {count}")
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "run": _run,
        "list": _list,
        "show": _show,
        "compare": _compare,
        "plot": _plot,
    }
    actions[args.action](args)


def _run(args: argparse.Namespace) -> None:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    out = args.out or Path("runs") / f"bench-{args.suite}-{stamp}.json"
    if args.resume and args.out is None:
        args.error("--resume needs --out, the record to go on with")
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
        args.error(str(error))
    except OccupiedError:
        own = False
        raise
    finally:
        # Also after Ctrl-C: what is finished is written, and shown.
        if own and out.exists() and out.stat().st_mtime_ns != before:
            record = records.load(out)
            print(text.report(record))
            print(f"written to {out}", file=sys.stderr)
    failed = [row["case"] for row in record["rows"] if row["status"] in ("wrong", "failed")]
    if failed:
        raise RuntimeError(f"{len(failed)} case(s) wrong or failed: {', '.join(failed)}")


@contextmanager
def _told_of(files: Sequence[Path]) -> Iterator[None]:
    """Names the files whose rows lack what a table or a plot of their group needs."""
    try:
        yield
    except (LookupError, ArithmeticError) as error:
        names = ", ".join(map(str, files))
        what = f"{type(error).__name__}: {error}"
        raise records.RecordError(
            f"{names}: rows lack what a row of their kind has ({what}); run the suite again"
        ) from error


def _show(args: argparse.Namespace) -> None:
    with _told_of(args.files):
        print(text.report(records.load(args.files[0])))


def _compare(args: argparse.Namespace) -> None:
    half = len(args.files) // 2
    if len(args.files) == 2 and not any(map(os.path.lexists, args.files)):
        names = list(map(str, args.files))
        before, after = revisions.measure(names, args.suite, args.case, _say)
    else:
        found = [records.load(file) for file in args.files]
        before, after = found[:half], found[half:]
    with _told_of(args.files):
        print(compare.report(before, after))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _list(args: argparse.Namespace) -> None:
    for case in SUITES[args.suite].cases(args.case):
        print(case.name)


def _plot(args: argparse.Namespace) -> None:
    (file,) = args.files
    with _told_of(args.files):
        for path in plot.plot(records.load(file), args.out or file.with_suffix("")):
            print(path)
