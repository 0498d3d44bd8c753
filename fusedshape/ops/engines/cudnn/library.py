"""cuDNN as Python sees it: whether it is there, and handles for devices and threads."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import threading
from typing import Any

import torch

from fusedshape.compiling import constant_for_dynamo

#: Whether the package nvidia-cudnn-frontend seems to be installed; nothing is imported to tell.
INSTALLED = importlib.util.find_spec("cudnn") is not None
#: The oldest cuDNN that made plans of our graphs for a described device; 9.19 did not.
LEAST = 92400
#: The oldest compute capability whose tensor cores compute all three dtypes.
CAPABILITY = (8, 0)

_local = threading.local()


@functools.cache
def module() -> Any:
    """The module `cudnn`.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    return importlib.import_module("cudnn")


@constant_for_dynamo
def why_not() -> str | None:
    """Why cuDNN's graphs cannot be had here; None if they can. The first call imports cudnn."""
    return _why_not()


@functools.cache
def _why_not() -> str | None:
    if importlib.util.find_spec("cudnn") is None:
        return "it needs the package nvidia-cudnn-frontend; pip install 'fusedshape[cudnn]'"
    try:
        found = int(module().backend_version())
    # What a broken installation raises is not known.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"cuDNN cannot be loaded ({type(error).__name__}: {reason}); reinstall it"
    if found < LEAST:
        return (
            f"cuDNN {_shown(found)} is too old; it needs {_shown(LEAST)} or newer "
            "(nvidia-cudnn-cu12 or nvidia-cudnn-cu13)"
        )
    return None


def version() -> str:
    """The versions of cuDNN and of its frontend.

    Raises:
        ImportError: cudnn cannot be loaded.
    """
    cudnn = module()
    return f"cuDNN {_shown(int(cudnn.backend_version()))}, frontend {cudnn.__version__}"


def _shown(version: int) -> str:
    """A version as people write it.

    Example:
        >>> _shown(92801)
        '9.28.1'
    """
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def forget() -> None:
    """Look for cuDNN again when asked."""
    module.cache_clear()
    _why_not.cache_clear()
    _environment.cache_clear()
    device_properties.cache_clear()
    _local.__dict__.clear()


def handle(device: int) -> Any:
    """This thread's handle for a device, which is the current one."""
    handles = _local.__dict__.setdefault("handles", {})
    found = handles.get(device)
    if found is None:
        found = handles[device] = module().create_handle()
    return found


@functools.cache
def device_properties(device: int) -> str:
    """What cuDNN needs to know of a device to make plans for it anywhere."""
    return str(module().create_device_properties(device).serialize())


def environment(device: int) -> dict[str, Any]:
    """What a plan depends on beside its operation: device and versions. JSON data."""
    return json.loads(_environment(device))


@functools.cache
def _environment(device: int) -> str:
    cudnn, properties = module(), torch.cuda.get_device_properties(device)
    found = {
        "cudnn": int(cudnn.backend_version()),
        "frontend": str(cudnn.__version__),
        "device": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,  # parts of a GPU bear its name
    }
    return json.dumps(found)
