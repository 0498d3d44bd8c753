"""The machine and the software on it, for `fusedshape info` and the header of every result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fusedshape import native, tuning
from fusedshape.files import replacing as replacing
from fusedshape.files import write_json as write_json
from fusedshape.ops import dispatch
from fusedshape.ops.engines.cudnn import library


def version() -> str:
    """The installed version, or "source" if the source tree runs without being installed.

    Example:
        >>> version() != ""
        True
    """
    try:
        return importlib.metadata.version("fusedshape")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def machine() -> dict[str, Any]:
    """Versions, devices, and the backend that is chosen for each device.

    Example:
        >>> machine()["torch"] == torch.__version__
        True
    """
    triton = dispatch.unavailable("triton", "cuda")
    cudnn = library.why_not()
    return {
        "fusedshape": version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": native.cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native": str(native.library_path()) if native.available() else f"no: {native.why_not()}",
        "host": native.host_path().name if native.host() else f"no: {native.why_no_host()}",
        "triton": importlib.metadata.version("triton") if triton is None else str(triton),
        "cudnn": f"no: {cudnn}" if cudnn else f"{library.version()}; not run on a device yet",
        "cpu_tensors": dispatch.choose("auto", torch.empty(0)).name,
        "cuda_tensors": "reference" if triton else "triton",
        **tuning.status(),
    }


def provenance() -> dict[str, Any]:
    """Where a result came from: machine, date, command, and the commit of the source tree.

    `dirty` says whether the library differs from its commit. Both are None outside a repository;
    for a source tree that was copied without its repository, ``$FUSEDSHAPE_COMMIT`` may tell the
    commit.

    Example:
        >>> sorted(provenance())
        ['command', 'commit', 'date', 'dirty', 'machine']
    """
    here = Path(__file__).resolve()
    commit = _git("rev-parse", "--short", "HEAD") if _git("ls-files", here.name) else None
    own = machine()
    del own["tuning_cache"]
    return {
        # Only the file's name: its folder would tell about the user's machine.
        "machine": own | {"native": Path(own["native"]).name if native.available() else "no"},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "commit": commit or os.environ.get("FUSEDSHAPE_COMMIT"),
        # Only of the library: a record that lies in the repository does not make it dirty.
        "dirty": None if commit is None else bool(_git("status", "--porcelain", ".", ":/csrc")),
    }


def _program() -> list[str]:
    """The program that was called, as one would type it."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return ["python", "-m", called.parent.name]
    return [called.name]


def headline(source: Mapping[str, Any]) -> str:
    """One line above a table that says where its figures come from, given `provenance()`."""
    m = source["machine"]
    code = f"commit {source['commit']}" if source["commit"] else f"fusedshape {m['fusedshape']}"
    changes = " with changes" if source["dirty"] else ""
    return (
        f"{m['cpu']}, {m['threads']} thread(s), {', '.join(m['gpu']) or 'no GPU'}, "
        f"torch {m['torch']}, {m['cpu_tensors']} backend, {code}{changes}"
    )


def _git(*args: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
