"""Measures git revisions in turns, each in its own worktree and its own processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fusedshape.bench import records
from fusedshape.bench.records import Record
from fusedshape.interrupts import terminable

#: Runs of each revision, in the order A B B A A B …; a verdict of `compare` needs that many.
RUNS = 4


def measure(
    revisions: Sequence[str],
    suite: str,
    pattern: str,
    say: Callable[[str], None] = lambda line: None,
) -> list[list[Record]]:
    """Run a suite at each revision, in turns, and return the records of each.

    Tuning is off, because its results may be there for one revision only.

    Args:
        revisions: names of revisions of the repository in the current folder.
        suite: name of a suite that all revisions have.
        pattern: shell pattern of the names of cases.
        say: called with a line for each run.

    Raises:
        ValueError: git knows no such revision, or it has no `fusedshape bench`.
        RuntimeError: a run failed.
        KeyboardInterrupt: interrupted or terminated; no worktree is left behind.
    """
    if _git("status", "--porcelain", "--untracked-files=no"):
        say("changes that are not committed belong to no revision, and are not measured")
    commits = [_git("rev-parse", "--verify", f"{name}^{{commit}}") for name in revisions]
    runs: list[list[Record]] = [[] for _ in commits]
    with (
        terminable(),
        tempfile.TemporaryDirectory() as folder,
        _worktrees(commits, Path(folder)) as trees,
    ):
        for i in range(RUNS):
            order = range(len(trees)) if i % 2 == 0 else reversed(range(len(trees)))
            for number in order:
                say(f"[{sum(map(len, runs)) + 1}/{RUNS * len(runs)}] {revisions[number]}")
                out = Path(folder) / f"{number}-{i}.json"
                command = ["bench", "--suite", suite, "--case", pattern, "--out", str(out)]
                said = _fusedshape(trees[number], *command)
                if not out.exists():
                    raise RuntimeError(f"{revisions[number]}: {said}")
                runs[number].append(records.load(out))
    return runs


@contextmanager
def _worktrees(commits: Sequence[str], folder: Path) -> Iterator[list[Path]]:
    trees = [folder / f"tree-{i}" for i in range(len(commits))]
    try:
        for tree, commit in zip(trees, commits, strict=True):
            _git("worktree", "add", "--detach", str(tree), commit)
            if not (tree / "fusedshape/bench/command.py").exists():
                raise ValueError(
                    f"revision {commit[:9]} has no fusedshape bench; name one that has, or "
                    "measure it by other means"
                )
            _fusedshape(tree, "build", "--optional")
        yield trees
    finally:
        for tree in trees:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], capture_output=True)


def _fusedshape(tree: Path, *arguments: str) -> str:
    """Run the command of a worktree's library and return the last line of its stderr."""
    # PYTHONPATH goes before a version that is installed.
    environment = {**os.environ, "PYTHONPATH": str(tree), "FUSEDSHAPE_TUNING": "off"}
    with subprocess.Popen(
        [sys.executable, "-m", "fusedshape", *arguments],
        cwd=tree,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = process.communicate()[1].strip()
        except BaseException:
            # The process must end before its worktree is removed.
            process.kill()
            process.wait()
            raise
    # Exit code 1 says that a case was wrong or failed; its row says why.
    if process.returncode not in (0, 1):
        raise RuntimeError(f"fusedshape {' '.join(arguments)} in {tree}: {said}")
    return (said.splitlines() or [""])[-1]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
