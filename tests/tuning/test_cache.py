"""Tuning's cache on disk: what is put is got, and damage is said once and mended."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedshape import tuning
from fusedshape.native import library_path
from fusedshape.ops import choice
from fusedshape.tuning import cache, chooser
from fusedshape.tuning.cache import Cache, Record
from tests.support.rivals import CPU, PROBLEM, RECORD

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT, lambda inner: st.lists(inner, max_size=3)
)
KEYS = st.dictionaries(TEXT, JSON, max_size=4)
TIMES = st.floats(1e-9, 1e3)
RECORDS = st.builds(
    Record,
    st.sampled_from(["aten", "triton", "cutlass"]),
    st.none() | st.dictionaries(TEXT, JSON, max_size=3),
    st.integers(1, 1 << 20),
    TIMES,
    TIMES,
)


@given(entries=st.lists(st.tuples(KEYS, RECORDS), min_size=1, max_size=4), data=st.data())
@settings(max_examples=50, deadline=None)
def test_what_is_put_is_got(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[dict[str, Any], Record]],
    data: st.DataObject,
) -> None:
    root = tmp_path_factory.mktemp("cache")
    mine, other = Cache(root, {"device": "a"}), Cache(root, {"device": "a"})
    last = {}
    for key, record in entries:
        data.draw(st.sampled_from([mine, other])).put(key, record)
        last[json.dumps(key, sort_keys=True)] = record
    for one in (mine, other, Cache(root, {"device": "a"})):
        assert {text: one.get(json.loads(text)) for text in last} == last
        assert one.count() == len(last)
        assert one.get({"never": "put"}) is None
    assert not list(root.rglob("*.tmp"))


def damages() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """Ways in which a file of the cache may be damaged."""

    def replaced(name: str, value: Any) -> Callable[[bytes], bytes]:
        return lambda content: json.dumps(json.loads(content) | {name: value}).encode()

    def altered(name: str, value: Any) -> Callable[[bytes], bytes]:
        def change(content: bytes) -> bytes:
            data = json.loads(content)
            data["record"][name] = value
            return json.dumps(data).encode()

        return change

    bad = st.sampled_from([None, -1, 0, "1", [], float("nan"), float("inf"), True])
    return st.one_of(
        # The last two bytes are "}\n"; without either it is no JSON object.
        st.floats(0, 1).map(lambda part: lambda c: c[: int(part * (len(c) - 2))]),
        st.binary(max_size=50).map(lambda garbage: lambda c: garbage),
        st.just(replaced("format", cache.FORMAT + 1)),
        st.just(replaced("environment", {"device": "another"})),
        st.just(replaced("key", {"another": "problem"})),
        st.just(replaced("key", 3)),
        st.just(replaced("record", None)),
        st.tuples(st.sampled_from(["base_seconds", "seconds", "size", "engine"]), bad).map(
            lambda pair: altered(pair[0], 1 if pair == ("engine", "1") else pair[1])
        ),
    )


@given(damage=damages())
@settings(max_examples=80, deadline=None)
def test_damage_is_said_once_and_mended(
    tmp_path_factory: pytest.TempPathFactory, damage: Callable[[bytes], bytes]
) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: lines.append(entry.getMessage())  # type: ignore[method-assign]
    own = Cache(tmp_path_factory.mktemp("cache"), {"device": "a"})
    key = {"direction": "fprop"}
    own.put(key, RECORD)
    path = own.path(key)
    path.write_bytes(damage(path.read_bytes()))
    cache.logger.addHandler(handler)
    try:
        assert own.get(key) is None
        assert own.get(key) is None
        assert own.count() == 0
    finally:
        cache.logger.removeHandler(handler)
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert "\n" not in lines[0]
    own.put(key, RECORD)
    assert own.get(key) == RECORD


def test_many_damaged_files_are_one_line(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    own = Cache(tmp_path, {"device": "a"})
    for n in range(5):
        own.put({"n": n}, RECORD)
        own.path({"n": n}).write_text("{")
    assert [own.get({"n": n}) for n in range(5)] == [None] * 5
    assert len(log.records) == 1
    assert str(own.path({"n": 0})) in log.messages[0]


def test_other_devices_and_versions(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    here = cache.environment(CPU)
    Cache(tmp_path, here).put({"k": 1}, RECORD)
    assert not log.records
    for name in here:
        other = Cache(tmp_path, here | {name: "another"})
        assert other.count() == 0
        assert [other.get({"k": k}) for k in (1, 1, 2)] == [None] * 3
    assert len(log.records) == len(here)
    assert all("other devices or versions" in entry.getMessage() for entry in log.records)
    # A directory that was renamed by hand deceives nobody.
    shutil.copytree(Cache(tmp_path, here).folder, other.folder)
    assert Cache(tmp_path, other.environment).get({"k": 1}) is None
    assert "of another device or version" in log.messages[-1]


def test_the_kernels_sources_count(tmp_path: Path) -> None:
    package = tmp_path / "fusedshape"
    for name in ("kernels", "ops"):
        shutil.copytree(Path(choice.__file__).parents[1] / name, package / name)
    cache.kernel_hash.cache_clear()
    before = cache.kernel_hash(package)
    assert before == cache.environment(CPU)["kernels"]
    for name in ("kernels/conv.py", "kernels/phi.py", "ops/engines/aten.py"):
        text = (package / name).read_text()
        (package / name).write_text(text + "\n# another\n")
        cache.kernel_hash.cache_clear()
        assert cache.kernel_hash(package) != before
        (package / name).write_text(text)
    cache.kernel_hash.cache_clear()
    assert cache.kernel_hash(package) == before


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_cache: Path) -> None:
    assert tuning.cache_directory() == own_cache
    monkeypatch.delenv("FUSEDSHAPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_directory() == tmp_path / "fusedshape" / "tuning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_directory() == Path.home() / ".cache" / "fusedshape" / "tuning"


def test_a_place_where_nobody_may_look(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, log: pytest.LogCaptureFixture
) -> None:
    """After su, $HOME may still name the home directory of another user."""
    chooser.keep("fprop", PROBLEM, CPU, RECORD)
    chooser.forget()

    def denying(call: Callable[..., Any]) -> Callable[..., Any]:
        def denied(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path).startswith(str(own_cache)):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **kwargs)

        return denied

    for name in ("stat", "read_text", "is_dir", "glob"):
        monkeypatch.setattr(Path, name, denying(getattr(Path, name)))
    monkeypatch.setattr(os, "stat", denying(os.stat))
    assert tuning.status()["tuning_entries"] == 0
    assert tuning.choose("fprop", PROBLEM) is None
    assert not chooser._anything()
    assert len([m for m in log.messages if "Permission denied" in m]) == 1


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FUSEDSHAPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(RuntimeError):
        Path.home()
    assert tuning.cache_directory() == Path(tempfile.gettempdir()) / "fusedshape" / "tuning"
    assert library_path().parent.name == "_native"
    assert tuning.choose("fprop", PROBLEM) is None


def test_nowhere_to_write(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    own = Cache(tmp_path / "file", {"device": "a"})
    own.put({"k": 1}, RECORD)
    own.put({"k": 2}, RECORD)
    assert own.get({"k": 1}) is None
    assert len([m for m in log.messages if "cannot be kept" in m]) == 1


WRITER = """
import sys
from pathlib import Path
from fusedshape.tuning.cache import Cache, Record
root, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cache = Cache(root, {"device": "a"})
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    for i in range(first, last):
        cache.put({"n": i}, Record("aten", {"filler": ["x" * 5000]}, i + 1, 1.0, 1.0))
        assert cache.get({"n": i}) is not None
"""


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), *span], **pipes)
        for span in (("0", "60"), ("30", "90"))
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    found = Cache(tmp_path, {"device": "a"})
    assert [found.get({"n": i}).size for i in range(90)] == list(range(1, 91))
    assert found.count() == 90
    assert not list(tmp_path.rglob("*.tmp"))
