"""Finds, builds and loads csrc: the CPU kernels on torch's stable C++ ABI.

Importing compiles nothing: `load` loads the library that `build` made, or remembers why it cannot.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from fusedshape.activations import ACTIVATIONS
from fusedshape.files import distrust, read_bytes, remove_leftovers, replacing, user_cache

logger = logging.getLogger("fusedshape.native")

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",  # neither of the two changes a result; both are needed to vectorise
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
)
# The rows' names make the enumeration of ids, so that the two can never differ.
_DEFINITIONS = (f"-DFS_ACTIVATIONS={','.join(ACTIVATIONS)}",)
_DIGEST_SIZE = hashlib.sha256().digest_size
#: Larger files, in bytes, are no library of ours and are not read.
_LIMIT = 256 << 20

_loaded = False
_reason = "fusedshape.native.load() has not been called"


def _sources() -> Path:
    package = Path(__file__).resolve().parent
    beside, inside = package.parent / "csrc", package / "csrc"
    return inside if inside.is_dir() else beside


@functools.cache
def _cpu_info() -> dict[str, str]:
    """The fields of the first CPU in /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def cpu_vendor() -> str:
    """The CPU's maker as it names itself, "AuthenticAMD" or "GenuineIntel"; "" if unknown.

    Example:
        >>> isinstance(cpu_vendor(), str)
        True
    """
    return _cpu_info().get("vendor_id", "")


def cpu_name() -> str:
    """The CPU's name, or its architecture where it has none.

    Example:
        >>> cpu_name() != ""
        True
    """
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> str:
    flags = _cpu_info().get("flags") or _cpu_info().get("Features")
    return " ".join(sorted(flags.split())) if flags else platform.processor()


@functools.cache
def _file_name() -> str:
    key = hashlib.sha256()
    for path in sorted((_sources() / "cpu").iterdir()):
        if path.suffix in (".h", ".cpp"):
            key.update(path.name.encode() + path.read_bytes())
    torch_version = ".".join(torch.__version__.split(".")[:2])
    for part in (*_FLAGS, *_DEFINITIONS, torch_version, platform.machine(), _cpu_flags()):
        key.update(part.encode() + b"\0")
    return f"cpu-{key.hexdigest()[:16]}.so"


def _directories() -> tuple[Path, Path]:
    package = Path(__file__).resolve().parent / "_native"
    cache = user_cache()
    # A user may have no home, as in some containers.
    return package, package if cache is None else cache / "fusedshape"


def _distrust(path: Path) -> str | None:
    """Why others may have written a library or its folder; None if they cannot have.

    Folders above the package are not checked: whoever can write there can change this file, too.
    """
    package, _ = _directories()
    inside = package == path or package in path.parents
    return distrust(path, below=package.parent if inside else None)


def library_path() -> Path:
    """Where the library for these sources, this torch and this CPU is, or would be built.

    The name carries a hash of all three, so that a library that is stale, or was built for another
    CPU, is never found. The directory is ``fusedshape/_native`` where that can be written, else
    ``fusedshape`` in the user's cache directory (``$XDG_CACHE_HOME`` or ``~/.cache``). A library
    that users other than this one and root may have written is passed over.

    Returns:
        The path; the file need not exist.

    Raises:
        FileNotFoundError: the installation has no csrc directory.

    Example:
        >>> library_path().suffix
        '.so'
    """
    name = _file_name()
    package, cache = _directories()
    for directory in (package, cache):
        if os.path.isfile(directory / name) and _distrust(directory / name) is None:
            return directory / name
    writable = os.access(package if package.is_dir() else package.parent, os.W_OK)
    return (package if writable and _distrust(package) is None else cache) / name


def _refused() -> str | None:
    """Why an existing library is not loaded; None if there is none, or it can be trusted."""
    for directory in _directories():
        path = directory / _file_name()
        reason = _distrust(path) if os.path.isfile(path) else None
        if reason is not None:
            return f"{reason}; what others may have written is not loaded, run `fusedshape build`"
    return None


def build(verbose: bool = False, force: bool = False) -> Path:
    """Compile csrc for this machine's CPU.

    Takes some 20 seconds, needs a C++17 compiler (``$CXX``, else g++) and torch's headers. Safe to
    run from several processes at once. A library that is already loaded stays in use until Python
    is restarted.

    Args:
        verbose: print the compiler's command and its output.
        force: compile even if the library is there already.

    Returns:
        Path of the library, for `load` to find.

    Raises:
        RuntimeError: there is no compiler, or it failed; its output is part of the message.
        FileNotFoundError: the installation has no csrc directory.
        OSError: the library cannot be written.
        PermissionError: others may write where it would be.

    Example:
        >>> build().is_file()  # doctest: +SKIP
        True
    """
    path = library_path()
    if not force and _problem(path) is None and _distrust(path) is None:
        return path
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    reason = _distrust(path.parent)
    if reason is not None:
        raise PermissionError(f"{reason}; nothing is built where others may write")
    remove_leftovers(path.parent)
    with replacing(path) as temporary:
        _run(_command(temporary), verbose)
        content = temporary.read_bytes()
        temporary.write_bytes(content + hashlib.sha256(content).digest())
        temporary.chmod(0o755)
    return path


def _command(library: Path) -> list[str]:
    torch_root = Path(torch.__file__).parent
    return [
        *shlex.split(os.environ.get("CXX") or "g++"),
        *_FLAGS,
        *_DEFINITIONS,
        *(f"cpu/{source.name}" for source in sorted((_sources() / "cpu").glob("*.cpp"))),
        f"-I{torch_root / 'include'}",
        f"-L{torch_root / 'lib'}",
        "-ltorch_cpu",
        "-o",
        str(library),
    ]


def _run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(shlex.join(command), flush=True)
    try:
        code, said = _finished(command)
    except OSError as error:
        raise RuntimeError(
            f"cannot run the C++ compiler {command[0]!r} ({error.strerror}); install "
            "one (Debian and Ubuntu: apt install g++; conda: gxx_linux-64) or set CXX to yours"
        ) from None
    if verbose and said:
        print(said, flush=True)
    if code:
        raise RuntimeError(
            f"the C++ compiler failed (exit status {code}); another can be "
            f"named by CXX\n{shlex.join(command)}\n{said}"
        )


def _finished(command: list[str]) -> tuple[int, str]:
    """Run the compiler; return its exit status and output. If interrupted, end it cleanly."""
    with subprocess.Popen(
        command,
        cwd=_sources(),
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=os.name == "posix",
    ) as process:
        try:
            said = process.communicate()[0]
        except BaseException:
            # g++ starts several programs, each of which must remove its temporary files.
            with suppress(ProcessLookupError):
                if os.name == "posix":
                    os.killpg(process.pid, signal.SIGTERM)
                else:
                    process.terminate()
            raise
    return process.returncode, said


def _problem(path: Path) -> str | None:
    """Why the library at `path` cannot be loaded; None if it probably can.

    The digest at its end is checked before dlopen, which crashes on some damaged files.
    """
    try:
        content = read_bytes(path, _LIMIT)
    except (OSError, ValueError) as error:
        reason = _missing() if isinstance(error, FileNotFoundError) else str(error)
        return f"{reason}; run `fusedshape build` or fusedshape.native.build()"
    if hashlib.sha256(content[:-_DIGEST_SIZE]).digest() != content[-_DIGEST_SIZE:]:
        return f"{path} is damaged; run `fusedshape build` or fusedshape.native.build()"
    return None


def _missing() -> str:
    """Why there is no library of the name that is looked for."""
    for directory in _directories():
        for other in directory.glob("cpu-*.so"):
            return (
                f"{other} is out of date: it was built from other sources, or for another torch or "
                "CPU"
            )
    return "not built yet"


def load() -> None:
    """Load the library that `build` left, if there is one. Never compiles, never raises.

    Call it again after `build`. What it found is told by `available` and `why_not`.

    Example:
        >>> load()
        >>> available() == (why_not() == "")
        True
    """
    global _loaded, _reason
    if _loaded:
        return
    try:
        path = library_path()
        problem = _problem(path)
        refused = None if problem is None and _distrust(path) is None else _refused()
        if refused is not None:
            problem = refused
            logger.warning("CPU tensors are computed without csrc: %s", refused)
        if problem is None:
            torch.ops.load_library(path)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    _loaded, _reason = problem is None, problem or ""


def available() -> bool:
    """Whether the CPU kernels are loaded."""
    return _loaded


def why_not() -> str:
    """Why the CPU kernels are not loaded; empty if they are."""
    return _reason
