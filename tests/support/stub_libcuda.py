"""A libcuda without a device, with which cuDNN makes plans where there is no driver.

``python -m tests.support.stub_libcuda FOLDER`` compiles it; CONTRIBUTING.md says what for.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

#: What cuDNN links to. But for `ANSWERS`, all fail with CUDA_ERROR_NO_DEVICE.
NAMES = [
    "cuCtxGetCurrent",
    "cuCtxGetLimit",
    "cuCtxPopCurrent",
    "cuCtxPushCurrent",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuKernelGetAttribute",
    "cuKernelGetFunction",
    "cuKernelSetAttribute",
    "cuLaunchCooperativeKernel",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuLibraryGetKernel",
    "cuLibraryLoadData",
    "cuLibraryLoadFromFile",
    "cuLibraryUnload",
    "cuLinkAddData",
    "cuLinkComplete",
    "cuLinkCreate",
    "cuLinkDestroy",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxPotentialClusterSize",
    "cuStreamGetCtx",
    "cuTensorMapEncodeIm2col",
    "cuTensorMapEncodeTiled",
]
ANSWERS = {
    "cuDriverGetVersion": "int cuDriverGetVersion(int *v) { *v = 13000; return 0; }",
    "cuDeviceGetCount": "int cuDeviceGetCount(int *n) { *n = 0; return 0; }",
    **{
        name: f'int {name}(int r, const char **p) {{ *p = "no device"; return 0; }}'
        for name in ("cuGetErrorName", "cuGetErrorString")
    },
}


def compile_into(folder: Path) -> Path:
    """Write libcuda.so.1 into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    lines = [ANSWERS.get(name, f"int {name}(void) {{ return 100; }}") for name in NAMES]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "stub.c"
        source.write_text("\n".join(lines) + "\n")
        command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", library, source], check=True)
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)
    return library


if __name__ == "__main__":
    print(compile_into(Path(sys.argv[1])))
