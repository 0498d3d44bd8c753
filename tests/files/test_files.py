"""Files: what is read is taken or refused in one line with its path; what is written is whole."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedshape import ActSpec, files
from fusedshape.bench import records
from fusedshape.cli import main
from fusedshape.files import ContentError, leftovers
from fusedshape.train import TrainConfig, demo
from tests.support.places import RESULTS

POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes, owners and modes of POSIX")
AS_ROOT = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root gives files away"
)

#: Text that is no JSON of ours, and a part of the message.
BAD_TEXT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\t", "is empty"),
    "truncated": (b'{"depth": 3, "lr"', "not JSON"),
    "two documents": (b"{} {}", "not JSON"),
    "deep lists": (b"[" * 100_000, "nested deeper than 64"),
    "deep objects": (b'{"a":' * 100_000, "nested deeper than 64"),
    "deep and closed": (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
    "deep behind a string": (b'["\\\\\\"]]]]",' + b"[" * 64, "nested deeper than 64"),
    "NaN": (b'{"lr": NaN}', "lr=nan"),
    "infinity": (b'{"lr": -Infinity}', "lr=-inf"),
    "infinity in a list": (b"[Infinity]", "Infinity is no number"),
    "too large a float": (b'{"lr": 1e999}', "lr=inf"),
    "a key twice": (b'{"lr": 1, "lr": 2}', "'lr' is there twice"),
    "thousands of digits": (b'{"seed": ' + b"9" * 5000 + b"}", "out of range"),
    "10**309": (b'{"seed": 1' + b"0" * 309 + b"}", "out of range"),
    "UTF-16": ('{"lr": 1}'.encode("utf-16"), "UTF-16"),
    "UTF-32": ('{"lr": 1}'.encode("utf-32"), "UTF-32"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "Latin-1": (b'{"model": "caf\xe9"}', "not JSON in UTF-8 (byte 14)"),
    "zeros": (b"\0" * 40, "not JSON"),
    "a checkpoint": (b"PK\x03\x04\x00\x00", "not JSON"),
}


def special(kind: str, folder: Path) -> Path:
    """A path that is no regular file that can be read."""
    path = folder / f"{kind} file.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link loop":
        path.symlink_to(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to(folder / "nowhere")
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "below a file":
        path.write_text("{}")
        return path / "below.json"
    return path


SPECIAL = (
    "folder",
    "pipe",
    "link loop",
    "link to a device",
    "dangling link",
    "large",
    "below a file",
    "missing",
)
READERS: dict[str, Callable[[Path], object]] = {
    "files": files.read_json,
    "a configuration": TrainConfig.load,
    "a record": records.load,
    "a sweep": demo._read_sweep,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_json_names_its_file(tmp_path: Path, name: str, reader: str) -> None:
    content, message = BAD_TEXT[name]
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (its message is looked at below)
        READERS[reader](path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert path.read_bytes() == content


@POSIX
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_names_itself(tmp_path: Path, kind: str, reader: str) -> None:
    path = special(kind, tmp_path)
    if kind in SPECIAL[-2:] and reader == "a sweep":
        assert demo._read_sweep(path) == {"headers": [], "rows": []}
        return
    begin = time.monotonic()
    with pytest.raises((ValueError, OSError)) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("name", BAD_TEXT)
@pytest.mark.parametrize("kind", [ActSpec, TrainConfig])
def test_bad_text_is_no_spec(kind: type[Any], name: str) -> None:
    content, _ = BAD_TEXT[name]
    for text in (content, content.decode("latin-1")):
        with pytest.raises(ValueError, match=kind.__name__):
            kind.from_json(text)


@pytest.mark.parametrize("text", ["null", "3", "[]", '"relu"', "{}", '{"a": 1}'])
@pytest.mark.parametrize("kind", [ActSpec, TrainConfig])
def test_json_of_something_else(kind: type[Any], text: str) -> None:
    with pytest.raises(ValueError, match=kind.__name__):
        kind.from_json(text)


@POSIX
@pytest.mark.parametrize(
    "argv", [("bench", "show"), ("bench", "plot"), ("bench", "compare"), ("train",)], ids=" ".join
)
def test_the_command_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    paths = [special(kind, tmp_path) for kind in SPECIAL[:-2]]
    for name, (content, _) in BAD_TEXT.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_bytes(content)
    for path in paths:
        out = ["--out", str(tmp_path / "out")]
        rest = {"compare": [str(path)], "show": []}.get(argv[-1], out)
        assert main([*argv, str(path), *rest]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        assert str(path) in shown.err


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**1023) + 1, 2**1023 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=40,
)


@given(data=JSON)
@settings(deadline=None)
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    files.write_json(path, data)
    assert files.read_json(path) == data
    assert os.listdir(path.parent) == ["a.json"]
    assert files.parse_json(json.dumps(data, ensure_ascii=False), "text") == data


@given(text=st.text('[]{}"\\,:a1 ', max_size=300))
@settings(deadline=None, max_examples=300)
def test_counting_brackets_hides_nothing(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ContentError):
            files.parse_json(text, "text")
    else:
        assert files.parse_json(text, "text") == expected


@pytest.mark.parametrize("depth", [64, 65])
def test_brackets_in_strings_are_not_counted(depth: int) -> None:
    text = "[" * (depth - 1) + '{"a\\"[[": "[{\\\\"}' + "]" * (depth - 1)
    if depth > 64:
        with pytest.raises(ContentError, match="deeper than 64"):
            files.parse_json(text, "text")
    else:
        assert files.parse_json(text, "text") == json.loads(text)


def test_time_grows_with_the_size_only() -> None:
    begin = time.process_time()
    for text in (
        '"' + '\\"' * 2_000_000,
        "[" + "[]," * 500_000,
        "{" + '"a":1,' * 200_000 + '"b":1}',
    ):
        with pytest.raises(ContentError):
            files.parse_json(text, "text")
    assert time.process_time() - begin < 20


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["machine"].pop("cpu"),
        lambda r: r["machine"].update(gpu="none"),
        lambda r: r.update(accelerator={"name": "a GPU"}),
        lambda r: r["rows"][0]["candidates"]["fused"].update(samples_ms=[]),
        lambda r: r["rows"][0]["candidates"]["fused"].update(ms=[0.0, 0.0, 0.0]),
        lambda r: next(x for x in r["rows"] if x["case"][:9] == "pointwise").update(
            case="pointwise"
        ),
    ],
)
def test_records_that_lack_what_a_table_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], object]
) -> None:
    record = json.loads((RESULTS / "cpu.json").read_text())
    change(record)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(files.with_checksum(record)))
    codes = []
    for argv in (["show"], ["compare", str(path)], ["plot", "--out", str(tmp_path / "plots")]):
        codes.append(main(["bench", *argv, str(path)]))
        shown = capsys.readouterr()
        assert codes[-1] == 0 or (codes[-1] == 1 and str(path) in shown.err)
        assert "Traceback" not in shown.err
    assert codes[-1] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.pop("arm"),
        lambda row: row.update(arm="GELU"),
        lambda row: row.update(lr=1.0),
        lambda row: row.update(header=7),
        lambda row: row.update(final_accuracy="high"),
        lambda row: row["config"].update(depth=-1),
        lambda row: row["config"].pop("depth"),
        lambda row: row["epochs"][0].pop("seconds"),
        lambda row: row.update(epochs=[]),
    ],
)
def test_a_sweep_is_gone_on_with_or_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    written = json.loads((RESULTS / "sweep.json").read_text())
    good = files.without_checksum(written, "sweep.json")
    path = tmp_path / "sweep.json"
    files.write_json(path, written)
    assert demo._read_sweep(path) == good
    # One that an older version wrote, without a checksum.
    files.write_json(path, good)
    assert demo._read_sweep(path) == good
    change(good["rows"][3])
    path.write_text(json.dumps(files.with_checksum(good)))
    with pytest.raises(ValueError, match=r"sweep\.json is no sweep's file .*another name"):
        demo._read_sweep(path)


@POSIX
def test_writing_replaces_no_device() -> None:
    for path in (Path("/dev/full"), Path("/dev/null")):
        before = os.stat(path)
        with pytest.raises(OSError, match=str(path)):
            files.write_json(path, {})
        assert os.path.samestat(os.stat(path), before)


@POSIX
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_failed_write_says_why_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    for call in ("fsync", "replace", "open"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(OSError, match="bytes free") as caught:
                files.write_json(path, {"a": 2})
        error = caught.value
        assert (error.errno, error.filename) == (code, str(path))
        assert os.strerror(code) in str(error)
        assert "12 bytes to write" in str(error)
        assert files.read_json(path) == {"a": 1}
        assert os.listdir(tmp_path) == ["a.json"]


def test_numbers_that_json_does_not_know_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"a": math.nan})
    assert not os.listdir(tmp_path)


WRITER = """
import sys
from pathlib import Path
from fusedshape import files
path = Path(sys.argv[1])
print("ready", flush=True)
n = 0
while True:
    n += 1
    files.write_json(path, {"n": n, "filler": ["x"] * 20000})
"""


@POSIX
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """The file is whole, and what is left beside it goes at the next start, not before."""
    path = tmp_path / "a.json"
    rng = random.Random(0)
    left = 0
    for kills in itertools.count(1):
        writer = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(writer, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            until = time.monotonic() + rng.uniform(0.1, 0.3)
            while time.monotonic() < until or not path.exists():
                assert files.remove_leftovers(tmp_path) == []  # nothing of a live process
            process.kill()
        assert set(files.read_json(path)) == {"n", "filler"}
        left += len(files.remove_leftovers(tmp_path))
        assert os.listdir(tmp_path) == ["a.json"]
        if kills > 1 and left:  # a kill between two writes leaves nothing
            break
        assert kills < 20


def leave(folder: Path, writer: str, age: float = 0) -> Path:
    path = folder / f"a.json.fusedshape-{writer}-{age:.0f}.tmp"
    path.write_text("{")
    os.utime(path, (time.time() - age,) * 2)
    return path


@POSIX
def test_sweeping_takes_what_is_dead_or_old(tmp_path: Path) -> None:
    here, there = leftovers._machine_tag(), "0" * 8
    me, start = os.getpid(), leftovers._start_of(os.getpid()) or 0
    stay = [
        leave(tmp_path, f"{here}-{me}-{start}", age=1e6),
        leave(tmp_path, f"{there}-1-1", age=3600),
        tmp_path / "a.json",
        tmp_path / "somebody's.tmp",
    ]
    for path in stay[2:]:
        path.write_text("{}")
    stay.append(tmp_path / f"a.fusedshape-{here}-1-1-1.tmp")
    stay[-1].mkdir()
    gone = [
        leave(tmp_path, f"{there}-1-1", age=1e6),
        leave(tmp_path, f"{here}-{2**22 + 1}-5"),  # beyond the largest process id
    ]
    if start:  # a process of that number lives, but began at another time
        gone.append(leave(tmp_path, f"{here}-{me}-{start + 1}"))
    assert set(files.remove_leftovers(tmp_path)) == set(gone)
    assert sorted(tmp_path.iterdir()) == sorted(stay)


@AS_ROOT
def test_sweeping_leaves_another_users(tmp_path: Path) -> None:
    path = leave(tmp_path, f"{leftovers._machine_tag()}-{2**22 + 1}-5", age=1e6)
    os.chown(path, 12345, -1)
    assert files.remove_leftovers(tmp_path) == []
    os.chown(path, 0, -1)
    assert files.remove_leftovers(tmp_path) == [path]


def test_sweeping_nowhere() -> None:
    assert files.remove_leftovers(Path("/no/such/folder")) == []


def test_a_checkpoint_is_a_file_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    state = {"weight": torch.arange(6.0), "name": "a", "numbers": [1, 2.5, None]}
    files.save_checkpoint(path, state, "a test", 3)
    for found in (
        files.load_checkpoint(path, "a test", 3, 1 << 20),
        torch.load(path, weights_only=True),
        torch.load(path, weights_only=True, mmap=True),
    ):
        assert torch.equal(found["weight"], state["weight"])
        assert found["numbers"] == state["numbers"]
    with pytest.raises(ContentError, match=r"c\.pt is no checkpoint of others, but of 'a test'"):
        files.load_checkpoint(path, "others", 3, 1 << 20)
    with pytest.raises(ContentError, match=r"c\.pt was written by a newer fusedshape \(schema 3"):
        files.load_checkpoint(path, "a test", 2, 1 << 20)
    with pytest.raises(ContentError, match=r"c\.pt has .* bytes; at most 1,000"):
        files.load_checkpoint(path, "a test", 3, 1000)


@POSIX
def test_figures_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    files.save_figure(figure, tmp_path / "a")
    files.save_figure(figure, tmp_path / "b.svg")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "b.svg").read_text()
    assert "<svg" in before

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left .*b\.svg"):
        files.save_figure(figure, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.svg"]
