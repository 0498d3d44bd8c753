"""Two git revisions, measured in turns, each in a worktree and in processes of its own."""

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

#: Runs of each revision, in the order A B B A A B …; as many as a verdict of `compare` takes.
RUNS = 4


def measure(
    revisions: Sequence[str],
    suite: str,
    pattern: str,
    say: Callable[[str], None] = lambda line: None,
) -> list[list[Record]]:
    """The records of a suite run at each revision, in turns.

    What tuning has found, which may be there for one of them only, does not count.

    Args:
        revisions: names that git knows, of the repository in the current folder.
        suite: name of a suite that all revisions have.
        pattern: shell pattern of the cases' names.
        say: told what is being done.

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
    """Run a command of a tree's library; the last line that it said."""
    # The path comes before whatever version is installed.
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
            # It must not outlive its tree.
            process.kill()
            process.wait()
            raise
    # 1: a case was wrong or failed, which its row says.
    if process.returncode not in (0, 1):
        raise RuntimeError(f"fusedshape {' '.join(arguments)} in {tree}: {said}")
    return (said.splitlines() or [""])[-1]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
