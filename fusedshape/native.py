"""Finds, builds and loads csrc: the CPU kernels on torch's stable C++ ABI.

Importing compiles nothing: `load` loads the library that `build` made for this CPU, else one that
came with the wheel (`portable` makes those), or remembers why it cannot.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import signal
import subprocess
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fusedshape.activations import ACTIVATIONS
from fusedshape.files import distrust, read_bytes, remove_leftovers, replacing, user_cache

logger = logging.getLogger("fusedshape.native")

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",  # neither of the two changes a result; both are needed to vectorise
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
)
_THIS_CPU = ("-march=native",)
#: What the libraries of a wheel are compiled for, best first: torch's name of it, and the flags
#: with which torch compiles its own kernels of that name, so that they run wherever torch's do.
LEVELS: dict[str, tuple[str, ...]] = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
# The rows' names make the enumeration of ids, so that the two can never differ.
_DEFINITIONS = (f"-DFS_ACTIVATIONS={','.join(ACTIVATIONS)}",)
_HOST_FLAGS = ("-std=c++20", "-O2", "-fvisibility=hidden", "-fPIC", "-shared")
_DIGEST_SIZE = hashlib.sha256().digest_size
#: Larger files, in bytes, are no library of ours and are not read.
_LIMIT = 256 << 20

_loaded: Path | None = None
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


def file_name(level: str) -> str:
    """What a wheel calls the library of these sources for a level of `LEVELS`.

    Example:
        >>> file_name("AVX2").startswith("cpu-avx2-")
        True
    """
    return f"cpu-{level.lower()}-{_hash(*LEVELS[level])}.so"


@functools.cache
def _file_name() -> str:
    return f"cpu-{_hash(*_THIS_CPU, _cpu_flags())}.so"


def _hash(*built_for: str) -> str:
    """Of all that makes a library; torch's version does not, because of the stable ABI."""
    key = hashlib.sha256()
    for path in sorted((_sources() / "cpu").iterdir()):
        if path.suffix in (".h", ".cpp"):
            key.update(path.name.encode() + path.read_bytes())
    for part in (*_FLAGS, *_DEFINITIONS, platform.machine(), *built_for):
        key.update(part.encode() + b"\0")
    return key.hexdigest()[:16]


def _levels() -> list[str]:
    """The levels of `LEVELS` that this CPU has, best first, as torch found out by cpuid.

    ``$ATEN_CPU_CAPABILITY`` lowers it, as for torch's own kernels.
    """
    found = torch.backends.cpu.get_cpu_capability()
    names = list(LEVELS)
    return next((names[i:] for i, name in enumerate(names) if found.startswith(name)), [])


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
    """Where the library for these sources and this CPU is, or would be built.

    The name carries a hash of both, so that a library that is stale, or was built for another CPU,
    is never found. The directory is ``fusedshape/_native`` where that can be written, else
    ``fusedshape`` in the user's cache directory (``$XDG_CACHE_HOME`` or ``~/.cache``). If nothing
    has been built, it is the best for this CPU of those that came with the wheel. A library that
    users other than this one and root may have written is passed over.

    Returns:
        The path; the file need not exist. Once a library is loaded, its path.

    Raises:
        FileNotFoundError: the installation has no csrc directory.

    Example:
        >>> library_path().suffix
        '.so'
    """
    if _loaded:
        return _loaded
    for path in _candidates():
        if os.path.isfile(path) and _distrust(path) is None:
            return path
    return _built_path()


def _candidates() -> list[Path]:
    """Where `load` looks, in this order."""
    package, cache = _directories()
    built = [directory / _file_name() for directory in (package, cache)]
    return built + [package / file_name(level) for level in _levels()]


def _built_path() -> Path:
    """Where `build` puts the library of this CPU, or has put it."""
    name = _file_name()
    package, cache = _directories()
    for directory in (package, cache):
        if os.path.isfile(directory / name) and _distrust(directory / name) is None:
            return directory / name
    writable = os.access(package if package.is_dir() else package.parent, os.W_OK)
    return (package if writable and _distrust(package) is None else cache) / name


def build(verbose: bool = False, force: bool = False) -> Path:
    """Compile csrc for this machine's CPU; `load` prefers the result to a library of the wheel.

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
    path = _built_path()
    if not force and _problem(path) is None and _distrust(path) is None:
        return path
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    reason = _distrust(path.parent)
    if reason is not None:
        raise PermissionError(f"{reason}; nothing is built where others may write")
    remove_leftovers(path.parent)
    with replacing(path) as temporary:
        compile_library(temporary, _THIS_CPU, verbose=verbose)
    return path


def compile_library(
    library: Path, flags: Sequence[str], more: Sequence[str] = (), verbose: bool = False
) -> None:
    """Compile csrc/cpu into a library that ends with its own digest.

    Args:
        library: the file to write.
        flags: what to compile for.
        more: sources beside those of csrc/cpu, relative to csrc.
        verbose: as in `build`.

    Raises:
        RuntimeError: as in `build`.
    """
    _run(_command(library, flags, more), verbose)
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())
    library.chmod(0o755)


def _command(library: Path, flags: Sequence[str], more: Sequence[str]) -> list[str]:
    torch_root = Path(torch.__file__).parent
    return [
        *shlex.split(os.environ.get("CXX") or "g++"),
        *_FLAGS,
        *flags,
        *_DEFINITIONS,
        *(f"cpu/{source.name}" for source in sorted((_sources() / "cpu").glob("*.cpp"))),
        *more,
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
        return str(error)
    if hashlib.sha256(content[:-_DIGEST_SIZE]).digest() != content[-_DIGEST_SIZE:]:
        return f"{path} is damaged"
    return None


def _missing() -> str:
    """Why there is no library of any name that is looked for."""
    package, cache = _directories()
    if any((package / file_name(level)).is_file() for level in LEVELS):
        return f"this CPU has no AVX2, which the libraries in {package} need"
    for directory in (package, cache):
        for other in directory.glob("cpu-*.so"):
            return f"{other} is out of date: it was built from other sources, or for another CPU"
    return "not built yet"


def load() -> None:
    """Load the library that `build` left, or else one of the wheel's. Never compiles, never raises.

    A library that cannot be loaded, or that others may have written, is passed over with a line in
    the log. Call it again after `build`. What it found is told by `available` and `why_not`.

    Example:
        >>> load()
        >>> available() == (why_not() == "")
        True
    """
    global _loaded, _reason
    if _loaded:
        return
    try:
        found = [path for path in _candidates() if os.path.isfile(path)]
        refusals = []
        for path in found:
            refusal = _refusal(path)
            if refusal is None:
                _loaded, _reason = path, ""
                return
            logger.warning("the CPU library %s", refusal)
            refusals.append(refusal)
        problem = refusals[0] if refusals else _missing()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    _reason = f"{problem}; run `fusedshape build` or fusedshape.native.build()"


def _refusal(path: Path) -> str | None:
    """Load a library, or say why not."""
    reason = _distrust(path)
    if reason is not None:
        return f"{reason}; what others may have written is not loaded"
    reason = _problem(path)
    if reason is not None:
        return reason
    try:
        torch.ops.load_library(path)
    except OSError as error:  # of another architecture, for one
        return f"{path} cannot be loaded: {error}"
    return None


def available() -> bool:
    """Whether the CPU kernels are loaded."""
    return bool(_loaded)


def why_not() -> str:
    """Why the CPU kernels are not loaded; empty if they are."""
    return _reason


def host_path() -> Path:
    """Where the extension of csrc/host for this torch and this Python is, or would be built.

    It makes nodes of autograd, which torch's stable ABI has no way to, so its name carries both
    versions beside a hash of its sources. It lies where `library_path` says.

    Example:
        >>> host_path().suffix
        '.so'
    """
    package, cache = _directories()
    name = _host_name()
    for directory in (package, cache):
        if os.path.isfile(directory / name) and _distrust(directory / name) is None:
            return directory / name
    writable = os.access(package if package.is_dir() else package.parent, os.W_OK)
    return (package if writable and _distrust(package) is None else cache) / name


@functools.cache
def _host_name() -> str:
    key = hashlib.sha256()
    for path in sorted((_sources() / "host").iterdir()):
        key.update(path.name.encode() + path.read_bytes())
    for part in (*_HOST_FLAGS, torch.__version__, platform.machine()):
        key.update(part.encode() + b"\0")
    return f"host-{key.hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"


def build_host(verbose: bool = False, force: bool = False) -> Path:
    """Compile csrc/host, without which layers are called through Python.

    Takes some 20 seconds, and needs a C++20 compiler and the headers of torch and of Python.

    Args:
        verbose: as in `build`.
        force: as in `build`.

    Returns:
        Path of the extension; a process that has called a layer goes on without it.

    Raises:
        RuntimeError: as `build`, and so are the next three.
        FileNotFoundError: the installation has no csrc directory.
        OSError: the extension cannot be written.
        PermissionError: others may write where it would be.

    Example:
        >>> build_host().is_file()  # doctest: +SKIP
        True
    """
    path = host_path()
    if not force and _problem(path) is None and _distrust(path) is None:
        return path
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    reason = _distrust(path.parent)
    if reason is not None:
        raise PermissionError(f"{reason}; nothing is built where others may write")
    root = Path(torch.__file__).parent
    with replacing(path) as temporary:
        command = [
            *shlex.split(os.environ.get("CXX") or "g++"),
            *_HOST_FLAGS,
            "host/module.cpp",
            f"-I{root / 'include'}",
            f"-I{sysconfig.get_paths()['include']}",
            f"-L{root / 'lib'}",
            *("-ltorch_python", "-ltorch_cpu", "-lc10"),
            *("-o", str(temporary)),
        ]
        _run(command, verbose)
        content = temporary.read_bytes()
        temporary.write_bytes(content + hashlib.sha256(content).digest())
        temporary.chmod(0o755)
    return path


def host() -> Any:
    """The extension of csrc/host, loaded by the first call; None where there is none."""
    return _host()[0]


def why_no_host() -> str:
    """Why layers are called through Python; empty if they are not."""
    return _host()[1]


@functools.cache
def _host() -> tuple[Any, str]:
    if not _loaded:
        return None, _reason
    try:
        path = host_path()
        if not path.is_file():
            return None, "not built yet; run `fusedshape build` or fusedshape.native.build_host()"
        reason = _distrust(path) or _problem(path)
        if reason is not None:
            return None, f"{reason}; run `fusedshape build --force`"
        spec = importlib.util.spec_from_file_location("fusedshape_host", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def forget_plans() -> None:
    """Let the extension check and plan each call anew."""
    if _host.cache_info().currsize and host() is not None:
        host().forget()
