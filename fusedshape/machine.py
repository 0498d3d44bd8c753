"""What runs here, and result files that say what ran where."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fusedshape import native, tuning
from fusedshape.ops import dispatch


def machine() -> dict[str, Any]:
    """What runs here: versions, devices, and the backend each device gets.

    Example:
        >>> machine()["torch"] == torch.__version__
        True
    """
    triton = dispatch.why_not("triton", "cuda")
    return {
        "fusedshape": importlib.metadata.version("fusedshape"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": native.cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native": str(native.library_path()) if native.available() else f"no: {native.why_not()}",
        "triton": importlib.metadata.version("triton") if triton is None else str(triton),
        "cpu_tensors": dispatch.choose("auto", torch.empty(0)).name,
        "cuda_tensors": "reference" if triton else "triton",
        **tuning.status(),
    }


def provenance() -> dict[str, Any]:
    """Where a result came from: machine, date, command, and the commit of the source tree.

    `commit` and `dirty` are None outside a repository.

    Example:
        >>> sorted(provenance())
        ['command', 'commit', 'date', 'dirty', 'machine']
    """
    here = Path(__file__).resolve()
    commit = _git("rev-parse", "--short", "HEAD") if _git("ls-files", here.name) else None
    own = machine()
    del own["tuning_cache"]
    return {
        # Where the library lies is nobody's business but this machine's.
        "machine": own | {"native": Path(own["native"]).name if native.available() else "no"},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain")),
    }


def headline(source: Mapping[str, Any]) -> str:
    """One line over a table that says where its figures come from, given `provenance()`."""
    m = source["machine"]
    changes = " with changes" if source["dirty"] else ""
    return (
        f"{m['cpu']}, {m['threads']} thread(s), {', '.join(m['gpu']) or 'no GPU'}, "
        f"torch {m['torch']}, {m['cpu_tensors']} backend, commit {source['commit']}{changes}"
    )


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one piece: whoever reads sees the old file or the new one.

    Args:
        path: the file.
        data: JSON data; NaN and infinity are refused.

    Raises:
        ValueError: a number that JSON does not know.
    """
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _git(*args: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
