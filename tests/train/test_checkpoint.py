"""A training run goes on from its checkpoint bit for bit, or says which file is wrong and why."""

from __future__ import annotations

import errno
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedshape import files
from fusedshape.cli import main
from fusedshape.files import ContentError
from fusedshape.train import TrainConfig, checkpoint, run
from fusedshape.train.loop import demand_one_process
from tests.support.training import BLOBS

TINY = TrainConfig(
    data=BLOBS, depth=4, width=4, epochs=2, batch_size=32, lr=3e-3, eta=0.5, threads=1
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a run of two epochs that was stopped behind its first."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patched:

        def stop(path: Path, result: dict[str, Any], *rest: Any) -> None:
            checkpoint.keep(path, result, *rest)
            raise KeyboardInterrupt

        patched.setattr("fusedshape.train.loop.keep", stop)
        with pytest.raises(KeyboardInterrupt):
            run(TINY, folder)
    return (folder / "checkpoint.pt").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of the same run, not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(TINY, folder)
    return weights(folder)


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(folder: Path, content: bytes, config: TrainConfig = TINY) -> str:
    """The message of a run that refuses this checkpoint and leaves it as it was."""
    path = folder / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(ContentError) as caught:
        run(config, folder)
    assert path.read_bytes() == content
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "remove that file to start anew" in message
    assert len(message) < 600
    assert "\n" not in message
    return message


def test_going_on_is_exact(tmp_path: Path, stopped: bytes, whole: dict[str, Tensor]) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(stopped)
    run(TINY, tmp_path)
    assert equal(weights(tmp_path), whole)


def flipped(content: bytes, at: int, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[at] ^= 1 << bit
    return bytes(damaged)


def test_every_flipped_bit_is_found(tmp_path: Path, stopped: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    rng = random.Random(0)
    ends = [*range(16), *range(len(stopped) - 200, len(stopped))]
    for at in [*ends, *rng.sample(range(len(stopped)), 300)]:
        path.write_bytes(flipped(stopped, at, rng.randrange(8)))
        with pytest.raises(ContentError, match=r"checkpoint\.pt is (damaged|no checkpoint)"):
            files.load_checkpoint(path, checkpoint.KIND, checkpoint.SCHEMA, 1 << 30)
    message = refused(tmp_path, flipped(stopped, len(stopped) // 2, 3))
    assert "is damaged: its checksum is not that of its content" in message


def resaved(folder: Path, content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A checkpoint changed by other hands and saved by torch alone."""
    path = folder / "other.pt"
    path.write_bytes(content)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path.read_bytes()


def test_without_a_digest_it_is_taken_with_a_word(
    tmp_path: Path, stopped: bytes, whole: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    def age(state: dict[str, Any]) -> None:
        del state["kind"], state["schema"]

    (tmp_path / "checkpoint.pt").write_bytes(resaved(tmp_path, stopped, age))
    run(TINY, tmp_path)
    assert equal(weights(tmp_path), whole)
    assert [m for m in caplog.messages if "no checksum" in m and str(tmp_path) in m]
    caplog.clear()
    run(TINY, tmp_path)  # which found the file that it wrote itself
    assert not caplog.messages


def test_without_a_digest_flipped_bits_do_no_harm(tmp_path: Path, stopped: bytes) -> None:
    """zip's own checksums cover what counts; what they do not cover is of no effect."""
    plain = resaved(tmp_path, stopped, lambda state: None)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(plain)
    good = files.load_checkpoint(path, checkpoint.KIND, checkpoint.SCHEMA, 1 << 30)
    rng = random.Random(1)
    found = 0
    for at in rng.sample(range(len(plain)), 300):
        path.write_bytes(flipped(plain, at, rng.randrange(8)))
        try:
            state = files.load_checkpoint(path, checkpoint.KIND, checkpoint.SCHEMA, 1 << 30)
        except ContentError as error:
            found += str(path) in str(error)
        else:
            assert text_of(state) == text_of(good)
            found += 1
    assert found == 300


def text_of(state: Any) -> str:
    """Data and every bit of its tensors, in a form to compare."""
    if isinstance(state, Tensor):
        return f"{state.dtype}{state.stride()}{state.tolist()}"
    if isinstance(state, dict):
        return f"{[(key, text_of(value)) for key, value in state.items()]}"
    if isinstance(state, (list, tuple)):
        return f"{type(state)}{[text_of(value) for value in state]}"
    return repr(state)


Change = Callable[[dict[str, Any]], object]


def first(state: dict[str, Any]) -> str:
    return next(key for key in state["model"] if key.endswith("weight"))


CHANGES: dict[str, tuple[Change, str]] = {
    **{
        f"no {key}": (lambda s, key=key: s.pop(key), f"lacks ['{key}']")
        for key in ("result", "model", "optimiser", "rng")
    },
    "a foreign key": (lambda s: s.update(x=1), "unknown ['x']"),
    "another kind": (lambda s: s.update(kind="a cake"), "but of 'a cake'"),
    "newer": (lambda s: s.update(schema=9), "a newer fusedshape (schema 9"),
    "a schema of text": (lambda s: s.update(schema="1"), "the schema '1'"),
    "a result of text": (lambda s: s.update(result="done"), "result is 'done'"),
    "a status": (lambda s: s["result"].update(status="fine"), "result.status is 'fine'"),
    "done too early": (lambda s: s["result"].update(status="done"), "yet it is 'done'"),
    "no epochs": (lambda s: s["result"].update(epochs=[]), "0 epochs of 2"),
    "epochs beyond": (lambda s: s["result"].update(epochs=s["result"]["epochs"] * 3), "3 epochs"),
    "NaN in a loss": (
        lambda s: s["result"]["epochs"][0].update(train_loss=float("nan")),
        "epochs[0].train_loss is nan",
    ),
    "an accuracy of 2": (
        lambda s: s["result"]["epochs"][0].update(test_accuracy=2.0),
        "what no epoch gives",
    ),
    "another config": (lambda s: s["result"]["config"].update(lr=1.0), "different: lr"),
    "a key of no config": (lambda s: s["result"]["config"].update(fold=1), "different: fold"),
    "a model of text": (lambda s: s.update(model="net"), "model is 'net', expected dict"),
    "a weight less": (lambda s: s["model"].pop(first(s)), "weight'] and has []"),
    "a weight more": (lambda s: s["model"].update(x=torch.ones(1)), "has ['x']"),
    "a weight of text": (lambda s: s["model"].update({first(s): "w"}), "expected a tensor"),
    "another shape": (lambda s: s["model"].update({first(s): torch.ones(2, 2)}), "shape (2, 2)"),
    "another dtype": (
        lambda s: s["model"].update({first(s): s["model"][first(s)].double()}),
        "torch.float64",
    ),
    "NaN in a weight": (
        lambda s: s["model"][first(s)].fill_(float("nan")),
        "weight'] holds NaN",
    ),
    "a wide view": (
        lambda s: s["model"].update({first(s): torch.ones(1).expand(1 << 40)}),
        "shape (1099511627776,)",
    ),
    "no state": (lambda s: s["optimiser"].pop("state"), "optimiser lacks ['state']"),
    "no groups": (lambda s: s["optimiser"].update(param_groups=[]), "has 0 entries"),
    "no parameters": (lambda s: s["optimiser"]["param_groups"][0].pop("params"), "lacks 'params'"),
    "other parameters": (
        lambda s: s["optimiser"]["param_groups"][0].update(params=[0]),
        "['params'] is [0]",
    ),
    "another decay": (
        lambda s: s["optimiser"]["param_groups"][0].update(weight_decay=1.0),
        "['weight_decay'] is 1.0",
    ),
    "a moment less": (
        lambda s: s["optimiser"]["state"][0].pop("exp_avg"),
        "optimiser.state[0] has ['exp_avg_sq', 'step']",
    ),
    "a moment of another shape": (
        lambda s: s["optimiser"]["state"][0].update(exp_avg=torch.ones(3)),
        "['exp_avg'] is torch.float32 of shape (3,)",
    ),
    "NaN in a moment": (
        lambda s: s["optimiser"]["state"][0]["exp_avg"].fill_(float("nan")),
        "['exp_avg'] holds NaN",
    ),
    "a moment of no parameter": (
        lambda s: s["optimiser"]["state"].update({99: {}}),
        "state[99] is of no parameter",
    ),
    "a generator of text": (lambda s: s.update(rng="seed"), "rng is 'seed'"),
    "a short generator": (lambda s: s.update(rng=s["rng"][:7].clone()), "rng is no state"),
    "a list": (lambda s: s.clear(), "lacks"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "plain"])
def test_foreign_contents_are_named(
    tmp_path: Path, stopped: bytes, name: str, signed: bool
) -> None:
    change, message = CHANGES[name]
    content = resaved(tmp_path, stopped, change)
    if signed:  # its digest is right: only what it says is wrong
        state = torch.load(tmp_path / "other.pt", weights_only=True)
        numbers = {"kind": state.pop("kind", ""), "schema": state.pop("schema", 0)}
        files.save_checkpoint(tmp_path / "other.pt", {**numbers, **state}, "", 0)
        content = (tmp_path / "other.pt").read_bytes()
        if name == "a list":
            message = "no checkpoint of fusedshape train"
    assert message in refused(tmp_path, content)


def test_foreign_files_are_named(tmp_path: Path, stopped: bytes) -> None:
    path = tmp_path / "other.pt"
    foreign: dict[str, bytes] = {"nothing": b"", "text": b"weights" * 99, "half": stopped[:-999]}
    for name, data in (("tensor", torch.ones(3)), ("list", [1]), ("keys", {1: 2})):
        torch.save(data, path)
        foreign[name] = path.read_bytes()
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    foreign["the old format"] = path.read_bytes()
    torch.save(Path("code"), path)
    foreign["an object"] = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"x")
    foreign["a zip"] = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/0", bytes(300 << 20))
    foreign["a bomb"] = path.read_bytes()
    assert len(foreign["a bomb"]) < 1 << 20
    foreign["overlapping"] = overlapping()
    for content in foreign.values():
        refused(tmp_path, content)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    path.replace(tmp_path / "checkpoint.pt")
    with pytest.raises(ContentError, match=r"checkpoint\.pt has 1,099,511,627,776 bytes"):
        run(TINY, tmp_path)


def overlapping() -> bytes:
    """A zip whose thousand entries are one."""
    name, data = b"a/data/0", bytes(1 << 16)
    common = struct.pack("<HHHHIIIHH", 20, 0, 0, 0, 0, len(data), len(data), len(name), 0)
    local = b"PK\x03\x04" + common + name + data
    entry = b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0)
    table = (entry + name) * 1000
    end = struct.pack("<HHHHIIH", 0, 0, 1000, 1000, len(table), len(local), 0)
    return local + table + b"PK\x05\x06" + end


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_a_checkpoint_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    with pytest.raises((OSError, ContentError), match=r"checkpoint\.pt"):
        run(TINY, tmp_path)


def test_a_diverged_run_stays_diverged(tmp_path: Path) -> None:
    config = replace(TINY, lr=1e30, schedule="constant", optimiser="sgd")
    first = run(config, tmp_path)
    assert first["status"] == "diverged"
    assert run(config, tmp_path) == first


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_optimisers_checkpoint_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimiser: str, momentum: float
) -> None:
    config = replace(TINY, optimiser=optimiser, momentum=momentum, weight_decay=0.01)
    run(config, tmp_path / "whole")

    def stop(path: Path, result: dict[str, Any], *rest: Any) -> None:
        checkpoint.keep(path, result, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fusedshape.train.loop.keep", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "parts")
    run(config, tmp_path / "parts")
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def fill_up(monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    """Let the disk refuse to sync a checkpoint behind the first few."""
    calls = iter(range(10**6))
    sync = os.fsync

    def fsync(handle: int) -> None:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_full_disk_is_told_and_the_last_checkpoint_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Tensor], code: int
) -> None:
    with monkeypatch.context() as patched:
        fill_up(patched, code, after=4)  # a file and its folder, of the checkpoint and the result
        with pytest.raises(OSError, match=r"bytes to write, .* bytes free") as caught:
            run(TINY, tmp_path)
    assert caught.value.errno == code
    assert caught.value.filename == str(tmp_path / "checkpoint.pt")
    assert os.strerror(code) in str(caught.value)
    assert "behind epoch 2: the checkpoint of epoch 1 is as it was" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "result.json"]
    run(TINY, tmp_path)
    assert equal(weights(tmp_path), whole)


SMALL = """
import resource, sys
sys.path.insert(0, {folder!r})
from fusedshape.cli import main
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(["train", "config.json", "--out", {out!r}]))
"""
DATA = """
import torch
from fusedshape.train import Data
def data():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 1, 4, 4, generator=g), torch.arange(64) % 4
    return Data(x, y, x, y, num_classes=4)
"""


def prepared(folder: Path, **values: Any) -> TrainConfig:
    (folder / "small_data.py").write_text(DATA)
    config = replace(TINY, data="small_data:data", **values)
    config.save(folder / "config.json")
    return config


def trained(folder: Path, out: Path, limit: int = 0) -> subprocess.CompletedProcess[str]:
    code = SMALL.format(folder=str(folder), out=str(out), limit=limit)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_a_limit_of_the_files_size(tmp_path: Path) -> None:
    prepared(tmp_path)
    done = trained(tmp_path, tmp_path / "out", limit=8192)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path / 'out' / 'checkpoint.pt'}: File too large (" in done.stderr
    assert "goes on with epoch 1" in done.stderr
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_full_file_system(tmp_path: Path) -> None:
    prepared(tmp_path)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    try:
        (small / "filler").write_bytes(bytes(40 << 10))
        done = trained(tmp_path, small)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert f"{small / 'checkpoint.pt'}: No space left on device (" in done.stderr
        assert "bytes free there" in done.stderr
        assert os.listdir(small) == ["filler"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_out_is_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY.save(tmp_path / "c.json")
    assert main(["train", str(tmp_path / "c.json"), "--out", "/dev/full"]) == 1
    assert capsys.readouterr().err == "fusedshape: error: /dev/full: File exists\n"


# Imports once; then each line of its input is a folder, for which a child of its own trains.
PARENT = """
import os, sys
sys.path.insert(0, {folder!r})
sys.modules["matplotlib"] = None  # a picture takes longer than the run
import torch._dynamo  # the optimiser wants it
from fusedshape.cli import main
from fusedshape.train import TrainConfig
from fusedshape.train.loop import build, load_data
config = TrainConfig.load("config.json")
build(config, load_data(config))
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os._exit(main(["train", "config.json", "--out", line.strip()]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_stopped_at_any_moment(tmp_path: Path) -> None:
    """The result equals, bit for bit, that of a run that was never stopped."""
    config = prepared(tmp_path, epochs=20)
    program = PARENT.format(folder=str(tmp_path))
    rng = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None

        def train(name: str, how: signal.Signals | None = None) -> int:
            """The exit code of a run, which is sent a signal some time after its next epoch."""
            assert parent.stdin is not None
            assert parent.stdout is not None
            before = len(epochs(tmp_path / name))
            print(name, file=parent.stdin, flush=True)
            child = int(parent.stdout.readline())
            if how is not None:
                until = time.monotonic() + 60
                while len(epochs(tmp_path / name)) <= before and time.monotonic() < until:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.05))
                os.kill(child, how)
            # What the command prints comes before.
            while not (line := parent.stdout.readline()).strip().lstrip("-").isdecimal():
                assert line
            return int(line)

        for how in [signal.SIGKILL] * 2 + [signal.SIGINT, signal.SIGTERM]:
            code = train("parts", how)
            assert code == (-how if how == signal.SIGKILL else 128 + how)
            assert "Traceback" not in (tmp_path / "stderr").read_text()
        assert train("parts") == 0
        assert train("whole") == 0
        parent.stdin.close()
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert len(epochs(tmp_path / "parts")) == config.epochs
    assert not list((tmp_path / "parts").glob("*.tmp"))


def epochs(folder: Path) -> list[Any]:
    try:
        return files.read_json(folder / "result.json")["epochs"]
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("text", ["abc", "", "-1", "0", "1.0", "1e9", "٣", " 1", "9" * 5000])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"])
def test_nonsense_of_torchruns_variables_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str
) -> None:
    monkeypatch.setenv(name, text)
    if text == "0" and name != "WORLD_SIZE":
        demand_one_process()
        return
    with pytest.raises(ValueError, match=f"^{name}=") as caught:
        run(TINY, tmp_path / "out")
    assert len(str(caught.value)) < 300
    assert not (tmp_path / "out").exists()


def test_one_process_of_torchrun_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, text)
    demand_one_process()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="torchrun has started 4"):
        demand_one_process()


def test_the_command_quotes_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TINY.save(tmp_path / "c.json")
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert main(["train", str(tmp_path / "c.json"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("fusedshape: error: WORLD_SIZE='abc' in the env")
