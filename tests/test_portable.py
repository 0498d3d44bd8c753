"""Libraries of a wheel: what they ask for, which one is loaded, what the archives contain."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedshape import native, portable
from tests.support.places import ROOT

COMPILER = (os.environ.get("CXX") or "g++").split()[0]
pytestmark = [
    pytest.mark.skipif(
        shutil.which(COMPILER) is None or shutil.which("readelf") is None,
        reason=f"needs {COMPILER} and readelf",
    ),
    pytest.mark.skipif(
        not portable.PLATFORM.endswith(os.uname().machine), reason=f"needs {portable.PLATFORM}"
    ),
]
#: As torch names them to its environment variable.
AVX2, NONE = "avx2", "default"


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return portable.build(tmp_path_factory.mktemp("libraries"))


@pytest.fixture
def installed(libraries: list[Path], tmp_path: Path) -> Path:
    """A folder with the package as a wheel installs it."""
    left_out = shutil.ignore_patterns("_native", "__pycache__")
    shutil.copytree(ROOT / "fusedshape", tmp_path / "fusedshape", ignore=left_out)
    shutil.copytree(ROOT / "csrc", tmp_path / "fusedshape/csrc")
    (tmp_path / "fusedshape/_native").mkdir()
    for library in libraries:
        shutil.copy(library, tmp_path / "fusedshape/_native")
    return tmp_path


def run(installed: Path, program: str, capability: str | None = None) -> str:
    """Run Python where there is no compiler, and nothing was ever built."""
    environment = {
        "PATH": str(installed / "no programs"),
        "PYTHONPATH": str(installed),
        "XDG_CACHE_HOME": str(installed / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def info(installed: Path, capability: str | None = None) -> dict[str, Any]:
    program = "import sys; from fusedshape.cli import main; sys.exit(main(['info', '--json']))"
    return json.loads(run(installed, program, capability))


def library_of(installed: Path, level: str) -> Path:
    return installed / "fusedshape/_native" / native.file_name(level)


COMPUTES = """
import torch, fusedshape
from fusedshape import ActSpec, ops, native, reference
from fusedshape.native import library_path
assert native.available(), native.why_not()
spec = ActSpec("tanh")
x = torch.randn(2, 32, 9, 9).to(memory_format=torch.channels_last)
w, b = torch.randn(32, 32, 3, 3) / 17, torch.randn(32)
y = ops.conv_act(x, w, b, spec, padding=1, engine="native")
want = reference.bias_act(torch.nn.functional.conv2d(x, w, padding=1), b, spec)
torch.testing.assert_close(y, want)
try:
    torch.ops.fusedshape.native_bias_act(x.long(), None, 0, 0, 0.0, 1.0, 0.0, 0.0, 1.0)
except RuntimeError as error:
    assert "dtype Long" in str(error), error
else:
    raise AssertionError("an error in C++ must reach Python")
print(library_path())
"""


@pytest.mark.slow
def test_a_wheel_computes_without_a_compiler(installed: Path) -> None:
    """With the best library that the CPU can run; with the other if torch is told to."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        pytest.skip(f"the CPU has {capability}")
    best = "AVX512" if capability.startswith("AVX512") else "AVX2"
    assert run(installed, COMPUTES).strip() == str(library_of(installed, best))
    assert run(installed, COMPUTES, AVX2).strip() == str(library_of(installed, "AVX2"))
    assert info(installed)["native"] == str(library_of(installed, best))


def test_a_cpu_without_avx2_takes_the_plain_path(installed: Path) -> None:
    found = info(installed, NONE)
    assert found["native"].startswith("no: this CPU has no AVX2, which the libraries in ")
    assert "fusedshape build" in found["native"]
    assert "\n" not in found["native"]
    assert found["cpu_tensors"] == "reference"


def elf_of_another_machine(content: bytes) -> bytes:
    """The same library, as if for AArch64, with a digest that is right."""
    changed = bytearray(content[:-32])
    changed[18:20] = (183).to_bytes(2, "little")  # e_machine
    return bytes(changed) + hashlib.sha256(changed).digest()


def with_digest(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


HARMS = {
    "empty": (lambda content: b"", "is damaged"),
    "truncated": (lambda content: content[: len(content) // 2], "is damaged"),
    "a flipped bit": (lambda content: content[:5000] + b"?" + content[5001:], "is damaged"),
    "no library": (lambda content: with_digest(b"no library"), "cannot be loaded"),
    "another machine's": (elf_of_another_machine, "cannot be loaded"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_cannot_be_loaded_is_said(installed: Path, harm: str) -> None:
    """And the plain path computes."""
    change, said = HARMS[harm]
    for level in native.LEVELS:
        path = library_of(installed, level)
        path.write_bytes(change(path.read_bytes()))
    found = info(installed, AVX2)
    assert found["native"].startswith(f"no: {library_of(installed, 'AVX2')} {said}")
    assert "fusedshape build" in found["native"]
    assert found["cpu_tensors"] == "reference"


def test_other_sources_make_the_wheels_libraries_stale(installed: Path) -> None:
    with (installed / "fusedshape/csrc/cpu/phi.h").open("a") as file:
        file.write("// changed\n")
    assert "is out of date" in info(installed)["native"]


def compiled(folder: Path, code: str, *flags: str) -> Path:
    source, library = folder / "some.cpp", folder / "some.so"
    source.write_text(code)
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", library, *flags], check=True)
    return library


FAULTS = {
    "namespace c10 { void warn(int); } void f() { c10::warn(1); }": (
        "_ZN3c104warnEi is not on torch's stable ABI"
    ),
    'extern "C" void PyErr_Clear(); void f() { PyErr_Clear(); }': (
        "PyErr_Clear is not on torch's stable ABI"
    ),
    "#include <sys/single_threaded.h>\nint f() { return __libc_single_threaded; }": (
        "__libc_single_threaded is of GLIBC_2.32; manylinux_2_28_x86_64 has GLIBC_2.28"
    ),
}


@pytest.mark.parametrize("code", FAULTS)
def test_what_a_wheel_may_not_ask_for(tmp_path: Path, code: str) -> None:
    assert portable.faults(compiled(tmp_path, code)) == [FAULTS[code]]


def test_libraries_that_may_not_be_there(tmp_path: Path) -> None:
    compiled(tmp_path, "void g() {}").rename(tmp_path / "libother.so")
    flags = (f"-L{tmp_path}", "-lother", "-Wl,--no-as-needed")
    library = compiled(tmp_path, "void g(); void f() { g(); }", *flags)
    assert "it needs libother.so" in portable.faults(library)


def test_a_library_that_asks_for_too_much_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_library(library: Path, *args: object, **kwargs: object) -> None:
        compiled(tmp_path, next(iter(FAULTS))).rename(library)

    monkeypatch.setattr(native, "compile_library", compile_library)
    with pytest.raises(RuntimeError, match=r"not fit for a wheel: _ZN3c10.* stable ABI"):
        portable.build(tmp_path / "libraries")
    assert not list((tmp_path / "libraries").iterdir())


def test_what_is_no_library_cannot_be_judged(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="readelf: "):
        portable.faults(tmp_path / "missing.so")


# Archives. The build backend runs in this process, and compiles nothing.


def files_below(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and not {"__pycache__", "_native"} & set(parts):
            yield "/".join(parts)


PACKAGE = set(files_below(ROOT / "fusedshape"))
CSRC = set(files_below(ROOT / "csrc"))
BESIDE = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("hatchling.build", reason="needs hatchling, an extra of dev")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FUSEDSHAPE_LIBRARIES", raising=False)
    return found


def test_contents_of_the_source_distribution(backend: Any, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / backend.build_sdist(str(tmp_path))) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers()}
    assert found == {
        *PACKAGE,
        *CSRC,
        *BESIDE,
        "hatch_build.py",
        "PKG-INFO",
        ".gitignore",
    }


def names_in(wheel: Path) -> set[str]:
    """The files of the package; the tag, too, in the name of the one that holds it."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        tags = re.findall(r"^Tag: (.+)$", archive.read(about).decode(), re.MULTILINE)
    assert [wheel.stem.split("-", 2)[2]] == tags
    return {name for name in names if ".dist-info/" not in name}


IN_WHEEL = {*PACKAGE, *(f"fusedshape/{name}" for name in CSRC)}


def test_contents_of_a_wheel_without_libraries(backend: Any, tmp_path: Path) -> None:
    wheel = tmp_path / backend.build_wheel(str(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert names_in(wheel) == IN_WHEEL


def test_contents_of_a_wheel_with_libraries(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> list[Path]:
        made = [tmp_path / native.file_name(level) for level in native.LEVELS]
        for path in made:
            path.write_bytes(b"compiled")
        return made

    monkeypatch.setattr(portable, "build", build)
    monkeypatch.setenv("FUSEDSHAPE_LIBRARIES", "1")
    wheel = tmp_path / backend.build_wheel(str(tmp_path))
    assert wheel.name.endswith(f"-py3-none-{portable.PLATFORM}.whl")
    libraries = {f"fusedshape/_native/{native.file_name(level)}" for level in native.LEVELS}
    assert names_in(wheel) == IN_WHEEL | libraries


def test_an_editable_install_has_no_libraries(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("editables")
    monkeypatch.setenv("FUSEDSHAPE_LIBRARIES", "1")
    monkeypatch.setattr(portable, "build", lambda folder: pytest.fail("compiled"))
    wheel = tmp_path / backend.build_editable(str(tmp_path))
    assert not any("_native" in name for name in names_in(wheel))
