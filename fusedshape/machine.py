"""What runs here, for `fusedshape info` and the header of every table and result."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from fusedshape import native
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
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native": str(native.library_path()) if native.available() else f"no: {native.why_not()}",
        "triton": importlib.metadata.version("triton") if triton is None else str(triton),
        "cpu_tensors": dispatch.choose("auto", torch.empty(0)).name,
        "cuda_tensors": "reference" if triton else "triton",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
