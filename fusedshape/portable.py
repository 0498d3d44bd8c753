"""CPU libraries for a wheel: compiled for levels of CPUs, and checked to load on older systems.

They need no compiler and no particular torch where they are installed: their only ties are torch's
stable C functions, and the C and C++ libraries of the systems that `PLATFORM` names.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from fusedshape import native

#: The wheel's platform: the one of torch's own wheels.
PLATFORM = "manylinux_2_28_x86_64"
# PEP 600 for that platform: the youngest version of each library that may be asked for.
_YOUNGEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
_NEEDED = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
# How the C functions of torch's stable ABI begin; C++'s names begin with _Z.
_STABLE = re.compile(r"(aoti_torch|torch)_\w+")


def build(folder: Path, verbose: bool = False) -> list[Path]:
    """Compile csrc for each level of `fusedshape.native.LEVELS`, and check the results.

    Args:
        folder: where the libraries go; made if need be.
        verbose: print the compiler's commands and their output.

    Returns:
        The libraries, under the names that `fusedshape.native.load` looks for.

    Raises:
        RuntimeError: there is no compiler, it failed, or a library asks for what is not everywhere.

    Example:
        >>> build(Path("build/libraries"))  # doctest: +SKIP
        [PosixPath('build/libraries/cpu-avx512-….so'), PosixPath('build/libraries/cpu-avx2-….so')]
    """
    folder.mkdir(parents=True, exist_ok=True)
    libraries = []
    for level, flags in native.LEVELS.items():
        library = folder / native.file_name(level)
        native.compile_library(library, flags, ("wheel/old_linux.cpp",), verbose=verbose)
        found = faults(library)
        if found:
            library.unlink()
            raise RuntimeError(f"{library.name} is not fit for a wheel: {'; '.join(found)}")
        libraries.append(library)
    return libraries


def faults(library: Path) -> list[str]:
    """What a library asks for that a system of `PLATFORM` with a torch may lack; none if it is fit.

    Raises:
        RuntimeError: readelf, a part of binutils, is not installed or cannot read the file.

    Example:
        >>> faults(Path("build/libraries/cpu-avx2-….so"))  # doctest: +SKIP
        []
    """
    dynamic = _readelf("--dynamic", library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    found = [f"it needs {name}" for name in sorted(needed - _NEEDED)]
    for line in _readelf("--dyn-syms", library).splitlines():
        fields = line.split()
        if len(fields) < 8 or fields[6] != "UND" or fields[4] == "WEAK":
            continue
        name, _, version = fields[7].partition("@")
        fault = _young(version.lstrip("@")) if version else _unstable(name)
        if fault:
            found.append(f"{name} {fault}")
    return found


def _young(version: str) -> str | None:
    family, _, number = version.partition("_")
    limit = _YOUNGEST.get(family)
    if limit is None:
        return f"is of {version}, which is no library of {PLATFORM}"
    if tuple(map(int, number.split("."))) > limit:
        return f"is of {version}; {PLATFORM} has {family}_{'.'.join(map(str, limit))}"
    return None


def _unstable(name: str) -> str | None:
    return None if _STABLE.fullmatch(name) else "is not on torch's stable ABI"


def _readelf(what: str, library: Path) -> str:
    command = ["readelf", "--wide", what, str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise RuntimeError(f"cannot run readelf ({error.strerror}); install binutils") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"readelf: {error.stderr.strip()}") from None
    return done.stdout
