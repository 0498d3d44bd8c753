"""Files that another user may have written are not read: caches, libraries, and their folders."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fusedshape import ActSpec, conv_act, native, tuning
from fusedshape.cli import main
from fusedshape.files import distrust, trust, user_cache
from fusedshape.native import library_path
from fusedshape.ops import dispatch
from fusedshape.ops.problem import Problem
from fusedshape.tuning import chooser
from fusedshape.tuning.cache import Cache, Record

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
STRANGER = 12345
RECORD = Record("aten", None, 4, 1e-3, 1e-3)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "fusedshape")
    return caplog


def test_what_is_mine_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file", tmp_path / "not/there/yet", Path("/"), Path("/etc")):
        assert distrust(path) is None
    assert distrust(Path(os.path.realpath("/tmp"))) is None  # sticky
    assert distrust(Path("a/b")) == "a/b is no absolute path"


@pytest.mark.parametrize("where", ["", "a", "a/b", "a/b/file"])
def test_what_everybody_may_write_is_not(tmp_path: Path, where: str) -> None:
    target = tmp_path / "a/b/file"
    target.parent.mkdir(parents=True)
    target.write_text("")
    assert distrust(target) is None
    place = tmp_path / where
    place.chmod(place.stat().st_mode | stat.S_IWOTH)
    assert str(distrust(target)).startswith(f"{place} can be written by everybody")
    assert distrust(tmp_path / "a/b/new") is None if where == "a/b/file" else True
    if place.is_dir():
        place.chmod(0o1777)
        assert distrust(target) is None


def test_a_groups_members_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o770)
    monkeypatch.setattr(trust, "_is_private", lambda group: True)
    assert distrust(tmp_path) is None
    monkeypatch.setattr(trust, "_is_private", lambda group: False)
    assert "which has other members" in str(distrust(tmp_path))


@AS_ROOT
@pytest.mark.parametrize("where", ["", "a", "a/b", "a/b/file"])
def test_what_is_anothers_is_not(tmp_path: Path, where: str) -> None:
    target = tmp_path / "a/b/file"
    target.parent.mkdir(parents=True)
    target.write_text("")
    os.chown(tmp_path / where, STRANGER, -1)
    try:
        reason = str(distrust(target))
    finally:
        os.chown(tmp_path / where, 0, -1)
    assert reason == f"{tmp_path / where} belongs to user {STRANGER}, not to you (0) or root"


@AS_ROOT
def test_links_are_followed_step_by_step(tmp_path: Path) -> None:
    """A link is as good as its owner, all that it leads through, and what it leads to."""
    for name in ("here", "way", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "there/file").write_text("")
    (tmp_path / "way/link").symlink_to(tmp_path / "there")
    (tmp_path / "here/link").symlink_to("../way/link/file")
    link = tmp_path / "here/link"
    assert distrust(link) is None
    assert distrust(link, below=tmp_path / "here") is None
    for place in ("here/link", "way", "way/link", "there", "there/file"):
        os.chown(tmp_path / place, STRANGER, -1, follow_symlinks=False)
        for below in (None, tmp_path / "here"):
            assert f"{tmp_path / place} belongs to user {STRANGER}" in str(distrust(link, below))
        os.chown(tmp_path / place, 0, -1, follow_symlinks=False)
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be looked at" in str(distrust(tmp_path / "loop"))


def test_a_relative_place_for_caches_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/place")
    assert user_cache() == Path.home() / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "/absolute/place")
    assert user_cache() == Path("/absolute/place")


PROBLEM = Problem(
    "cpu", None, torch.float32, (3, 4, 6, 6), (4, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1, True,
    "relu", True,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path / "cache"))
    with tuning.mode("cached"):
        yield tmp_path / "cache"
    chooser.forget()


def open_to_all(path: Path) -> None:
    path.chmod(0o777)


def given_away(path: Path) -> None:
    os.chown(path, STRANGER, -1)


HARMS = [open_to_all, pytest.param(given_away, marks=AS_ROOT)]


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("part", ["cache", "cache/tuning", "folder", "file"])
def test_a_cache_of_others_is_not_used(
    place: Path,
    log: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    part: str,
) -> None:
    chooser.keep("fprop", PROBLEM, CPU, RECORD)
    chooser.forget()
    assert chooser.lookup("fprop", PROBLEM, CPU) == RECORD
    assert not log.messages
    folder = chooser.cache_of(CPU).folder
    (file,) = folder.iterdir()
    whole = part != "file"
    harmed = {"folder": folder, "file": file}.get(part, place.parent / part)
    harm(harmed)
    chooser.forget()
    assert [chooser.lookup("fprop", PROBLEM, CPU) for _ in range(3)] == [None] * 3
    assert tuning.choose("fprop", PROBLEM) is None
    warnings = [r.getMessage() for r in log.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert str(harmed) in warnings[0]
    assert main(["info", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tuning_entries"] == 0
    assert (f"no: {harmed}" in row["tuning_cache"]) == whole
    chooser.keep("fprop", PROBLEM, CPU, RECORD)
    chooser.forget()
    # A file alone is written anew, and then is ours.
    assert chooser.lookup("fprop", PROBLEM, CPU) == (None if whole else RECORD)


def test_a_relative_cache_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEDSHAPE_CACHE", "cache")
    chooser.forget()
    chooser.keep("fprop", PROBLEM, CPU, RECORD)
    assert chooser.lookup("fprop", PROBLEM, CPU) is None
    assert "cache/tuning" in log.messages[0]
    assert "no absolute path" in log.messages[0]
    assert not os.listdir(tmp_path)
    assert tuning.status()["tuning_cache"].startswith("no: ")
    chooser.forget()


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def test_a_forward_pass_survives_every_file(place: Path, log: pytest.LogCaptureFixture) -> None:
    """A damaged file of a measurement costs at most one line in the log."""
    x = torch.randn(4, 64, 16, 16).to(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3)

    def layer() -> torch.Tensor:
        return conv_act(x, w, None, ActSpec("relu"), padding=1)

    with tuning.mode("full"):
        expected = layer()
        (file,) = place.rglob("*.json")
        content = file.read_bytes()
        data = json.loads(content)

        def spoil(path: Path, change: bytes | Callable[[Path], object]) -> None:
            path.unlink()
            if isinstance(change, bytes):
                path.write_bytes(change)
            else:
                change(path)

        for change in (
            b"",
            b"[" * 100_000,
            b'{"format": 3, "format": 3}',
            content.replace(b'"size": ', b'"size": ' + b"9" * 5000),
            content.replace(b"e", b"\xe9", 1),
            content[:-20],
            json.dumps({**data, "record": {**data["record"], "seconds": 1.0}}).encode(),
            os.mkfifo,
            Path.mkdir,
            lambda path: path.symlink_to(path),
            lambda path: path.symlink_to("/dev/zero"),
            huge,
        ):
            spoil(file, change)
            chooser.forget()
            log.clear()
            assert torch.allclose(layer(), expected, atol=1e-3)
            lines = [r for r in log.records if r.levelno >= logging.WARNING]
            assert str(file) in lines[0].getMessage()
            assert len(lines) == (2 if change is Path.mkdir else 1)  # which nothing can replace
            if change is Path.mkdir:
                file.rmdir()
                file.write_bytes(content)
            assert json.loads(file.read_bytes())["record"]["size"] == 4


def test_a_killed_measurement_leaves_nothing_for_ever(place: Path) -> None:
    chooser.keep("fprop", PROBLEM, CPU, RECORD)
    folder = chooser.cache_of(CPU).folder
    other = place / "tuning/other"
    other.mkdir()
    from fusedshape.files import leftovers

    for where in (folder, other):
        name = f"x.fusedshape-{leftovers._machine_tag()}-{2**22 + 1}-5-0.tmp"
        (where / name).write_text("{")
    chooser.forget()
    chooser.keep("dgrad", PROBLEM, CPU, RECORD)
    assert not list(place.rglob("*.tmp"))
    assert chooser.cache_of(CPU).count() == 2


def test_a_flipped_bit_is_no_measurement(tmp_path: Path) -> None:
    own = Cache(tmp_path, {"device": "a"})
    own.put({"n": 1}, RECORD)
    path = own.path({"n": 1})
    good = path.read_bytes()
    for at in range(len(good)):
        damaged = bytearray(good)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        assert own.get({"n": 1}) in (None, RECORD)  # of blanks not every bit counts


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that has loaded nothing; a good library in `tmp_path/_native`."""
    if not native.available():
        pytest.skip(native.why_not())
    library = library_path()
    (tmp_path / "_native").mkdir()
    shutil.copy(library, tmp_path / "_native")
    monkeypatch.setattr(native, "_directories", lambda: (tmp_path / "_native", tmp_path / "cache"))
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setattr(native, "_reason", "")
    return tmp_path


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("part", ["_native", "file"])
def test_a_library_of_others_is_not_loaded(
    elsewhere: Path,
    log: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    part: str,
) -> None:
    path = library_path()
    harmed = path if part == "file" else elsewhere / "_native"
    harm(harmed)
    native.load()
    assert not native.available()
    assert native.why_not().startswith(str(harmed))
    assert "fusedshape build" in native.why_not()
    assert len([m for m in log.messages if str(harmed) in m]) == 1
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match=f"backend 'native' is not to be had: {harmed}"):
        dispatch.choose("native", x)
    assert dispatch.choose("auto", x).name == "reference"
    assert main(["info"]) == 0
    assert f"no: {harmed}" in capsys.readouterr().out
    # One's own in the cache is found, where that is.
    (elsewhere / "cache").mkdir()
    shutil.copyfile(path, elsewhere / "cache" / path.name)
    assert library_path() == elsewhere / "cache" / path.name
    native.load()
    assert native.available()


@AS_ROOT
def test_building_takes_the_place_of_anothers(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = library_path().read_bytes()[: -native._DIGEST_SIZE]

    def compiler(command: list[str], verbose: bool) -> None:
        Path(command[-1]).write_bytes(made)

    monkeypatch.setattr(native, "_run", compiler)
    path = library_path()
    given_away(path)
    assert native.build() == path
    assert path.stat().st_uid == 0
    given_away(elsewhere / "_native")
    path = native.build()
    assert path.parent == elsewhere / "cache"
    given_away(elsewhere / "cache")
    with pytest.raises(PermissionError, match="nothing is built where others may write"):
        native.build()


def test_a_stopped_build_leaves_nothing(tmp_path: Path) -> None:
    """SIGINT and SIGTERM clear up at once; after SIGKILL the next build does."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho x > "$2"\nsleep 60\n'
    )
    compiler.chmod(0o755)
    program = (
        "import sys, pathlib; from fusedshape import native; from fusedshape.cli import main\n"
        f"native._directories = lambda: (pathlib.Path({str(tmp_path)!r}) / '_native',) * 2\n"
        "sys.exit(main(['build']))"
    )
    environment = {**os.environ, "CXX": str(compiler)}
    folder = tmp_path / "_native"
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE
        ) as process:
            until = time.monotonic() + 120
            while not any(path.stat().st_size for path in folder.glob("*.tmp")):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.01)
            process.send_signal(how)
            error = process.communicate()[1]
        assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how)
        assert b"Traceback" not in error
        if how != signal.SIGKILL:
            assert not list(folder.iterdir())
    assert len(list(folder.iterdir())) == 1
    from fusedshape.files import remove_leftovers

    assert len(remove_leftovers(folder)) == 1
