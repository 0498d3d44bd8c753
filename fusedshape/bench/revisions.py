"""Two git revisions, measured in turns, each in a worktree and in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fusedshape.bench import records
from fusedshape.bench.records import Record

#: Runs of each revision, in the order A B B A A B ….
RUNS = 3


def measure(revisions: Sequence[str], suite: str, pattern: str) -> list[Record]:
    """Run a suite at each revision, in turns, and put the runs of each into one record.

    Args:
        revisions: names that git knows, of the repository in the current folder.
        suite: name of a suite that all revisions have.
        pattern: shell pattern of the cases' names.

    Raises:
        ValueError: git knows no such revision, or it has no `fusedshape bench`.
        RuntimeError: a run failed.
    """
    commits = [_git("rev-parse", "--verify", f"{name}^{{commit}}") for name in revisions]
    runs: list[list[Record]] = [[] for _ in commits]
    with tempfile.TemporaryDirectory() as folder, _worktrees(commits, Path(folder)) as trees:
        for i in range(RUNS):
            order = range(len(trees)) if i % 2 == 0 else reversed(range(len(trees)))
            for number in order:
                out = Path(folder) / f"{number}-{i}.json"
                command = ["bench", "--suite", suite, "--case", pattern, "--out", str(out)]
                _fusedshape(trees[number], *command)
                runs[number].append(records.load(out))
    return [merge(own) for own in runs]


def merge(runs: Sequence[Record]) -> Record:
    """One record with the samples of several runs of the same code, round after round.

    A case stays where it is ok in every run. Rounds of one run stay rounds: the samples of all
    candidates are put together in the same order.
    """
    rows = []
    for row in runs[0]["rows"]:
        same = [next((r for r in run["rows"] if r["case"] == row["case"]), None) for run in runs]
        others = [r for r in same if r is not None and r["status"] == "ok"]
        if len(others) < len(runs):
            continue
        candidates = {}
        for name in row["candidates"]:
            found = [r["candidates"].get(name, {}) for r in others]
            if all("samples_ms" in c for c in found):
                # As many of each candidate, or rounds would be paired with others.
                least = [min(_counts(r)) for r in others]
                samples = [
                    ms for c, n in zip(found, least, strict=True) for ms in c["samples_ms"][:n]
                ]
                candidates[name] = {"status": "ok", "samples_ms": samples}
        rows.append({**row, "candidates": candidates, "ratios": {}})
    return {**runs[0], "rows": rows, "fits": []}


def _counts(row: records.Row) -> list[int]:
    counts = [len(c["samples_ms"]) for c in row["candidates"].values() if "samples_ms" in c]
    return [n for n in counts if n > 1] or [1]


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


def _fusedshape(tree: Path, *arguments: str) -> None:
    # The path comes before whatever version is installed.
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-m", "fusedshape", *arguments],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    # 1: a case was wrong or failed, which its row says.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"fusedshape {' '.join(arguments)} in {tree}: {done.stderr.strip()}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
