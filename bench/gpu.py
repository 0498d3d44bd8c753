"""Nine minutes on an NVIDIA GPU: kernels are held against float64, then layers and nets are timed.

python -m bench.gpu [--out runs/gpu] [--minutes 9] [--kernels ARCHIVE]
python -m bench.gpu --prepare ARCHIVE

`make gpu` runs the first. Every step is a process of its own, because an illegal access ends a
process's use of its GPU, and has a limit of its own. All that is found is in the folder `--out` as
soon as it is found; started again, the program goes on where it was.

Kernels are compiled when they are first used, which takes most of the time on a bare machine. The
second form compiles those of the checks before a GPU that is not there, for the machine with the
GPU to unpack. Both need the same Triton, Python and source.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusedshape.columns import aligned
from fusedshape.files import write_json
from fusedshape.machine import provenance

ROOT = Path(__file__).resolve().parent.parent
#: Where compiled kernels lie: Triton's cache holds absolute paths, so it must lie there again.
CACHE = Path("/tmp/fusedshape-kernels")
#: Processes that compile and check side by side.
SHARES = min(8, os.cpu_count() or 1)
#: What `Popen` cannot return, for a command that was stopped at its limit.
_TIMED_OUT = 1000
#: How often a command that has failed is started again.
_AGAIN = 5
_PYTHON = sys.executable


@dataclass(frozen=True)
class Step:
    """One step of the program.

    Attributes:
        name: of its log.
        part: of the program's time that it may take, if the steps before took all of theirs.
        commands: run side by side.
        again: whether a command that failed is started again: it goes on behind what failed.
        needs: programs or modules without which the step is left out.
        fine: the exit codes of a command that has done its work.
    """

    name: str
    part: float
    commands: Sequence[Sequence[str]]
    again: bool = False
    needs: Sequence[str] = ()
    fine: Sequence[int] = (0,)


def steps(out: Path, seconds: float) -> Iterator[Step]:
    """All steps, in their order."""
    module = [_PYTHON, "-m"]
    yield Step("info", 0.03, [[*module, "fusedshape", "info"]])
    checks = [*module, "bench.kernel_checks"]
    yield Step("checks", 0.35, _shared(checks, out / "checks", 0.3 * seconds), again=True)
    tiny = {"memcheck": "linear-odd/*/bf16/leaky_relu", "racecheck": "1x1/fprop/bf16/leaky_relu"}
    for tool, pattern in tiny.items():
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        which = [str(out / f"{tool}.json"), "--pattern", pattern]
        which += ["--seconds", f"{0.05 * seconds:.0f}"]
        yield Step(tool, 0.08, [[*sanitizer, *checks, *which]], needs=["compute-sanitizer"])
    suite = [*module, "fusedshape", "bench", "run", "--suite", "gpu-quick", "--resume"]
    suite += ["--out", str(out / "bench.json"), "--limit", f"{0.45 * seconds:.0f}"]
    yield Step("bench", 0.5, [suite], again=True)
    tests = [*module, "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    parallel = ["-n", str(SHARES)] if _has("xdist") else []
    yield Step("tests", 1.0, [[*tests, *parallel]], needs=["pytest"])


@dataclass
class Run:
    """The program: its steps, what is left of its time, and its file.

    Attributes:
        out: folder of all that is found.
        seconds: for everything.
        environment: of the commands.
        rows: what became of each step.
    """

    out: Path
    seconds: float
    environment: Mapping[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def all(self, todo: Sequence[Step]) -> int:
        """Run the steps; 1 if one has failed."""
        self.out.mkdir(parents=True, exist_ok=True)
        for step in todo:
            missing = [need for need in step.needs if not (shutil.which(need) or _has(need))]
            if missing:
                self._write(step, f"left out: {', '.join(missing)} is not installed", 0.0)
                continue
            left = self.seconds - (time.monotonic() - self.start)
            limit = min(left, step.part * self.seconds)
            if limit < 1:
                self._write(step, "left out: no time for it", 0.0)
                continue
            print(f"{step.name}: up to {limit:.0f} s, log {self.out / step.name}.log", flush=True)
            began = time.monotonic()
            said = self._run(step, began + limit)
            self._write(step, said, time.monotonic() - began)
        print(aligned([("step", "seconds", "outcome"), *map(_columns, self.rows)]))
        return int(any(row["outcome"].startswith("failed") for row in self.rows))

    def _run(self, step: Step, end: float) -> str:
        """Run a step's commands until they end, or until `end`; say how it went."""
        with (self.out / f"{step.name}.log").open("a") as log:
            running = [self._started(command, log) for command in step.commands]
            codes = [_wait(process, end) for process in running]
            for i, command in enumerate(step.commands):
                tries = _AGAIN if step.again else 0
                done = (*step.fine, _TIMED_OUT)
                while codes[i] not in done and tries and time.monotonic() < end:
                    codes[i], tries = _wait(self._started(command, log), end), tries - 1
        words = {**dict.fromkeys(step.fine, "done"), _TIMED_OUT: "stopped at its limit"}
        if all(code in step.fine for code in codes):
            return "done"
        ends = dict.fromkeys(words.get(code, f"exit code {code}") for code in codes)
        said = "part done" if all(code in words for code in codes) else "failed"
        return f"{said}: {', '.join(ends)}; see its log"

    def _started(self, command: Sequence[str], log: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT
        )

    def _write(self, step: Step, outcome: str, seconds: float) -> None:
        self.rows.append({"step": step.name, "outcome": outcome, "seconds": round(seconds, 1)})
        print(f"{step.name}: {outcome}", flush=True)
        write_json(self.out / "steps.json", {**provenance(), "steps": self.rows})


def main() -> int:
    """Run the program; 1 if a step has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="folder for what is found"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument(
        "--kernels", type=Path, metavar="ARCHIVE", help="use these compiled kernels"
    )
    parser.add_argument("--prepare", type=Path, metavar="ARCHIVE", help="compile kernels into it")
    args = parser.parse_args()
    out, seconds = args.out.resolve(), 60 * args.minutes
    if args.prepare is not None:
        return prepare(args.prepare, out, seconds)
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU here")
    if args.kernels is not None:
        unpack(args.kernels)
    own = {"TRITON_CACHE_DIR": str(CACHE)} if CACHE.is_dir() else {}
    return Run(out, seconds, {**os.environ, **own}).all(list(steps(out, seconds)))


def prepare(archive: Path, out: Path, seconds: float) -> int:
    """Compile the kernels of the checks before a pretended GPU, and pack them."""
    pretend = [_PYTHON, "tests/kernels/pretend_gpu.py", "-m", "bench.kernel_checks"]
    commands = _shared(pretend, out / "prepare", seconds)
    CACHE.mkdir(mode=0o700, exist_ok=True)
    environment = {"TRITON_CACHE_DIR": str(CACHE), "TRITON_STORE_BINARY_ONLY": "1"}
    # Nothing is computed, so that every check fails once its kernel has been compiled.
    step = Step("prepare", 1.0, commands, fine=(0, 1))
    code = Run(out, seconds + 60, {**os.environ, **environment}).all([step])
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(CACHE, arcname=CACHE.name)
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB, unpacks to {CACHE}")
    return code


def unpack(archive: Path) -> None:
    """Put prepared kernels where Triton will look for them."""
    with tarfile.open(archive) as packed:
        packed.extractall(CACHE.parent, filter="data")


def _shared(checks: Sequence[str], stem: Path, seconds: float) -> list[list[str]]:
    """Commands for `bench.kernel_checks` that share its work, each with a file of its own."""
    limit = ["--seconds", f"{seconds:.0f}"]
    return [
        [*checks, f"{stem}-{i}.json", "--share", f"{i}/{SHARES}", *limit]
        for i in range(1, SHARES + 1)
    ]


def _wait(process: subprocess.Popen[bytes], end: float) -> int:
    """The exit code of a process, which is killed at `end`."""
    try:
        return process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return _TIMED_OUT


def _has(module: str) -> bool:
    return module.isidentifier() and importlib.util.find_spec(module) is not None


def _columns(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["step"], f"{row['seconds']:.1f}", row["outcome"]


if __name__ == "__main__":
    sys.exit(main())
