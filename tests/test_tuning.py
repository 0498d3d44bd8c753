"""Tuning: the cache on disk, modes, the rule of the contest, a model's problems, the command."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fusedshape import ACTIVATIONS, ActSpec, conv_act, convert, linear_act, native, tuning
from fusedshape.cli import main
from fusedshape.kernels.roofline import Problem as KernelProblem
from fusedshape.kernels.tuned import asked, tunable
from fusedshape.models import vanilla_convnet
from fusedshape.nn import ShapedChain, ShapedConv2d, ShapedLinear
from fusedshape.ops import engine
from fusedshape.ops.engine import Problem
from fusedshape.timing import Candidate
from fusedshape.tuning import cache, chooser, command, contest, layers, measuring, problems
from fusedshape.tuning.cache import Cache, Record

CPU = torch.device("cpu")
LEAKY = ActSpec("leaky_relu", negative_slope=0.3, output_scale=1.3)
PROBLEM = Problem(
    *("cpu", None, torch.float32, (3, 4, 6, 6), (8, 4, 3, 3), True),
    *((1, 1), (1, 1), (1, 1), 1, "leaky_relu", True),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path / "cache"))
    with tuning.mode("cached"):
        yield tmp_path / "cache" / "tuning"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "fusedshape.tuning")
    return caplog


class Rival(type(engine.ATEN)):
    """An engine that stands in for Triton's: ATen's numbers, and a note of its calls."""

    name = "triton"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.factor = 1.0

    def note(self, direction: str) -> None:
        if not torch.compiler.is_compiling():
            self.calls.append(direction)

    def fprop_act(self, *args: Any) -> Tensor:
        self.note("fprop")
        return super().fprop_act(*args).mul_(self.factor)

    def dgrad(self, *args: Any) -> tuple[Tensor, Tensor | None]:
        self.note("dgrad")
        return super().dgrad(*args)

    def wgrad(self, *args: Any) -> Tensor:
        self.note("wgrad")
        return super().wgrad(*args)


@pytest.fixture
def rival(monkeypatch: pytest.MonkeyPatch) -> Rival:
    """A second engine for CPU tensors."""
    one = Rival()
    monkeypatch.setitem(engine._ENGINES, "triton", one)
    monkeypatch.setitem(engine._SERVED, "cpu", ("triton",))
    monkeypatch.setattr(engine, "why_not", lambda name, *_: None if name == "triton" else "not now")
    return one


class Script:
    """A clock that runs nothing: the first candidate it meets is the base, the others follow.

    Args:
        times: by the candidate's number, and by how many samples of it were taken before.
    """

    least = 0.0

    def __init__(self, times: Callable[[int, int], float]) -> None:
        self.times = times
        self.met: list[list[Any]] = []

    def seconds(self, candidate: Candidate, repeats: int) -> float:
        if not any(candidate is known for known, _ in self.met):
            self.met.append([candidate, 0])
        number = next(i for i, (known, _) in enumerate(self.met) if known is candidate)
        self.met[number][1] += 1
        return self.times(number, self.met[number][1] - 1)


def steady(*factors: float) -> Script:
    """Candidates that take these parts of the base's millisecond."""
    return Script(lambda i, n: (1.0, *factors)[i] * 1e-3)


# ------------------------------------------------------------------ cache

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
RECORD = Record("aten", None, 3, 2e-3, 1e-3)


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
    """What may become of a file."""

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
        shutil.copytree(Path(engine.__file__).parents[1] / name, package / name)
    cache.kernel_hash.cache_clear()
    before = cache.kernel_hash(package)
    assert before == cache.environment(CPU)["kernels"]
    for name in ("kernels/conv.py", "kernels/phi.py", "ops/engine.py"):
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
    """As a home directory of somebody else, which $HOME may still name after su."""
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
    assert native.library_path().parent.name == "_native"
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


# ------------------------------------------------------------------ keys


@given(st.integers(1, 1 << 40))
def test_bucket(n: int) -> None:
    bucket = problems.bucket(n)
    assert n <= bucket < 2 * n
    assert bucket & (bucket - 1) == 0


def resized(problem: Problem, *shape: int) -> Problem:
    return problem._replace(input=shape)


def test_keys() -> None:
    key = problems.key_of("fprop", PROBLEM)
    assert key == problems.key_of("fprop", resized(PROBLEM, 4, 4, 6, 6))
    json.dumps(key, allow_nan=False)
    others = [
        problems.key_of("dgrad", PROBLEM),
        *(
            problems.key_of("fprop", PROBLEM._replace(**change))
            for change in (
                {"input": (5, 4, 6, 6)},
                {"input": (3, 4, 6, 7)},
                {"dtype": torch.float16},
                {"channels_last": False},
                {"padding": (0, 0)},
                {"activation": "tanh"},
                {"saves_output": False},
            )
        ),
    ]
    assert all(other != key for other in others)
    # cuDNN's switches, and tf32, are a GPU's.
    gpu = PROBLEM._replace(device="cuda", capability=(9, 0))
    keys = [problems.key_of("fprop", gpu)]
    for switched in ({"benchmark": True}, {"deterministic": True}, {"allow_tf32": False}):
        with torch.backends.cudnn.flags(**switched):
            keys.append(problems.key_of("fprop", gpu))
            assert problems.key_of("fprop", PROBLEM) == key
    assert all(keys.count(one) == 1 for one in keys)
    linear = PROBLEM._replace(weight=(8, 6), stride=(), padding=(), dilation=())
    assert problems.key_of("wgrad", resized(linear, 3, 5, 6)) == problems.key_of(
        "wgrad", resized(linear, 9, 6)
    )


def test_pins_cover_a_bucket() -> None:
    @tunable(lambda problem, gpu: ("small", "large"))
    def config_for(problem: KernelProblem, gpu: str) -> str:
        return "small"

    def args(batch: int, width: int = 8) -> tuple[KernelProblem, str]:
        return KernelProblem(batch, 4, 8, width, 4), "gpu"

    assert config_for(*args(6)) == "small"
    with config_for.trying(args(6), "large"):
        assert [config_for(*args(n)) for n in (6, 7)] == ["large", "small"]
    assert config_for(*args(6)) == "small"
    config_for.pin(args(6), 5, 8, "large")
    assert [config_for(*args(n)) for n in (4, 5, 8, 9)] == ["small", "large", "large", "small"]
    assert config_for(*args(6, width=9)) == "small"
    with asked() as log:
        config_for(*args(6))
    assert log == [(config_for, args(6))]
    config_for.unpin()
    assert config_for(*args(6)) == "small"


# ------------------------------------------------------------------ contest


def same(*tensors: Tensor) -> Callable[[], Sequence[Tensor]]:
    return lambda: [t.clone() for t in tensors]


ONES = torch.ones(8)


@given(
    ratios=st.lists(st.floats(0.5, 1.5), min_size=1, max_size=4),
    drift=st.lists(st.floats(0.2, 5.0), min_size=1, max_size=9),
)
@settings(deadline=None)
def test_only_a_clear_win_counts(ratios: list[float], drift: list[float]) -> None:
    # The machine changes its speed from round to round, but not within one.
    names = [f"c{i}" for i in range(len(ratios))]
    clock = Script(lambda i, n: (1.0, *ratios)[i] * drift[n % len(drift)])
    verdict = contest.contest(
        same(ONES), dict.fromkeys(names, same(ONES)), clock=clock, terms=1, budget=0.0
    )
    best = min(ratios)
    assume(abs(best - (1 - contest.MARGIN)) > 1e-9)
    if best < 1 - contest.MARGIN:
        assert verdict.winner is not None
        assert ratios[names.index(verdict.winner)] == pytest.approx(best)
        assert verdict.seconds == pytest.approx(best * verdict.base_seconds)
    else:
        assert verdict.winner is None
        assert verdict.seconds == verdict.base_seconds


def test_luck_does_not_count() -> None:
    race = {"a": same(ONES), "b": same(ONES)}
    # Among all three b seems fast, in two samples to warm up and five; then it is slow.
    clock = Script(lambda i, n: 1.0 if i != 2 else 0.5 if n < 7 else 1.1)
    verdict = contest.contest(same(ONES), race, clock=clock, terms=1, budget=0.0)
    assert verdict.winner is None
    assert verdict.base_seconds == 1.0


def test_wrong_numbers_never_win() -> None:
    def broken() -> Sequence[Tensor]:
        raise RuntimeError("out of resource:\nshared memory")

    race = {"wrong": same(ONES * 1.01), "broken": broken, "nan": same(ONES / 0 * 0), "good": None}
    race["good"] = same(ONES)
    verdict = contest.contest(same(ONES), race, clock=steady(0.9), terms=1, budget=0.0)
    assert verdict.winner == "good"
    assert sorted(verdict.wrong) == ["nan", "wrong"]
    assert verdict.failed == {"broken": "RuntimeError: out of resource: shared memory"}
    none = contest.contest(same(ONES), {"broken": broken}, clock=steady(), terms=1, budget=0.0)
    assert none.winner is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("terms", [9, 576, 4608])
def test_tolerance(dtype: torch.dtype, terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    a = torch.randn(64, terms, generator=generator).to(dtype)
    b = torch.randn(terms, 64, generator=generator).to(dtype)
    truth = (a.float() @ b.float()).to(dtype)
    other = (a.double() @ b.double()).float()
    twice = (other.to(dtype).float() * 1.7).to(dtype)
    assert contest.difference_of([other.to(dtype)], [truth], terms, False) is None
    once = (truth.double() * 1.7).to(dtype)
    assert contest.difference_of([twice], [once], terms, False) is None
    # One product of all left out, everywhere; and all of them left out in one place.
    if dtype == torch.float32 or terms < 1000:
        short = (a[:, 1:].float() @ b[1:].float()).to(dtype)
        assert contest.difference_of([short], [truth], terms, False) is not None
    # Everywhere a little too far off; and in one place of a million by much.
    unit = torch.finfo(dtype).eps + 12 * 2.0**-24
    scale = 4 * unit * truth.float().square().mean().sqrt()
    signs = torch.randn(64, 64, generator=generator).sign()
    for factor, good in ((0.5, True), (2.0, False)):
        off = (truth.float() + factor * scale * signs).to(dtype)
        assert (contest.difference_of([off], [truth], 9, False) is None) == good
    many = torch.randn(1000, 1000, generator=generator).to(dtype)
    hole = many.clone()
    hole[500, 500] += 1
    assert contest.difference_of([hole], [many], terms, False) is not None
    assert contest.difference_of([truth[:1]], [truth], terms, False) is not None
    assert contest.difference_of([truth.double()], [truth], terms, False) is not None
    assert contest.difference_of([], [truth], terms, False) is not None


def test_tf32_is_let_pass_only_where_it_is_on() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator) for _ in range(2))

    def tf32(t: Tensor) -> Tensor:
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)

    rounded, exact = tf32(a) @ tf32(b), a @ b
    assert contest.difference_of([rounded], [exact], 64, True) is None
    assert contest.difference_of([rounded], [exact], 64, False) is not None


# ------------------------------------------------------------------ measuring


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
def test_every_direction_can_be_measured(activation: str, linear: bool, rival: Rival) -> None:
    one = PROBLEM._replace(activation=activation)
    if linear:
        one = one._replace(weight=(8, 6), stride=(), padding=(), dilation=())
    state = torch.get_rng_state()
    found = []
    for saves_output in (True, False):
        problem = one._replace(saves_output=saves_output)
        try:
            spec = problems.spec_of(problem)
        except ValueError:
            continue
        found.append(saves_output)
        assert spec.saves_output == saves_output
        for direction in engine.DIRECTIONS:
            result = tuning.measure(direction, problem, CPU, steady(0.5))
            assert (result.record.engine, result.wrong, result.failed) == ("triton", {}, {})
            assert result.record.seconds == pytest.approx(result.record.base_seconds / 2)
    assert found
    assert torch.equal(torch.get_rng_state(), state)


def test_operands_are_the_problems() -> None:
    for change in ({}, {"channels_last": False}, {"dtype": torch.bfloat16}, {"stride": (2, 1)}):
        problem = PROBLEM._replace(**change)
        x, weight, _, spec, geometry, before, dz = problems.operands(problem, engine.ATEN, CPU)
        assert engine.problem_of(x, weight, spec, geometry) == problem
        assert before.saved.stride() == x.stride()
        assert torch.equal(x, problems.operands(problem, engine.ATEN, CPU).x)
        assert dz.shape == engine.ATEN.fprop(x, weight, geometry).shape


def test_a_rival_that_computes_wrongly(rival: Rival, log: pytest.LogCaptureFixture) -> None:
    rival.factor = 1.5
    result = tuning.measure("fprop", PROBLEM, CPU, steady(0.1))
    assert result.record.engine == "aten"
    assert list(result.wrong) == ["triton"]
    assert len([m for m in log.messages if "is not used" in m]) == 1


def test_float32_on_a_cpu_is_held_to_float32(rival: Rival) -> None:
    """Also where a GPU's convolutions might round to tf32, as torch lets them by default."""
    with torch.backends.cudnn.flags(allow_tf32=True):
        rival.factor = 1.0005
        assert list(tuning.measure("fprop", PROBLEM, CPU, steady(0.1)).wrong) == ["triton"]


def test_nobody_but_path_i() -> None:
    result = tuning.measure("fprop", PROBLEM, CPU)
    assert result.record is None
    assert "8 channels or features" in result.failed["native"]


# ------------------------------------------------------------------ modes


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured; the rival wins but in wgrad."""
    log: list[str] = []

    def fake(direction: str, problem: Problem, device: torch.device) -> measuring.Result:
        log.append(direction)
        winner = "aten" if direction == "wgrad" else "triton"
        return measuring.Result(Record(winner, None, 3, 2.0, 1.0), {}, {})

    monkeypatch.setattr(chooser.measuring, "measure", fake)
    return log


def layer() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    return x, (torch.randn(8, 4, 3, 3) / 6).requires_grad_()


def test_modes(rival: Rival, measured: list[str]) -> None:
    x, weight = layer()

    def step() -> list[Tensor]:
        rival.calls.clear()
        y = conv_act(x, weight, None, LEAKY, padding=1)
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]

    with tuning.mode("off"):
        want = step()
        assert engine.only_aten("auto", x)
    step()
    assert (measured, rival.calls) == ([], [])
    with tuning.mode("full"):
        got = step()
        assert (measured, rival.calls) == (["fprop", "dgrad", "wgrad"], ["fprop", "dgrad"])
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        step()
        assert len(measured) == 3
    assert tuning.current_mode() == "cached"
    assert tuning.status()["tuning_entries"] == 3
    # From the cache, for another size of the bucket too, as a fresh process would.
    chooser.forget()
    x, _ = layer()
    x = x[:2].detach().repeat(2, 1, 1, 1).to(memory_format=torch.channels_last).requires_grad_()
    step()
    assert (len(measured), rival.calls) == (3, ["fprop", "dgrad"])
    with tuning.mode("off"):
        step()
        assert rival.calls == []
    tuning.mode("off")
    assert tuning.current_mode() == "off"
    with pytest.raises(ValueError, match="unknown tuning mode 'fast'; known: off, cached, full"):
        tuning.mode("fast")
    assert tuning.current_mode() == "off"
    tuning.mode("cached")


def test_known_answers_are_a_look_into_a_dictionary(
    rival: Rival, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tuning.mode("full"):
        assert tuning.choose("fprop", PROBLEM) == "triton"
        for name in ("_learn", "lookup", "cache_of", "current_mode"):
            monkeypatch.setattr(chooser, name, None)
        assert tuning.choose("fprop", Problem(*PROBLEM)) == "triton"
        monkeypatch.undo()


def test_cpu_tensors_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_chooser", None)
    chooser._set("full")
    monkeypatch.setattr(engine, "problem_of", None)
    conv_act(*layer(), None, LEAKY)


def test_mode_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    for value, mode, lines in (("full", "full", 0), ("", "cached", 0), ("fast", "cached", 1)):
        log.clear()
        monkeypatch.setenv("FUSEDSHAPE_TUNING", value)
        monkeypatch.setattr(chooser, "_mode", None)
        assert [tuning.current_mode() for _ in range(2)] == [mode, mode]
        assert len(log.records) == lines
    code = "from fusedshape.ops import engine; print(engine._chooser is None)"
    environment = os.environ | {"FUSEDSHAPE_TUNING": "off"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


def test_failures_do_not_reach_the_model(
    rival: Rival, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(*args: object) -> measuring.Result:
        raise torch.OutOfMemoryError("tried to allocate\n20 GiB")

    monkeypatch.setattr(chooser.measuring, "measure", out_of_memory)
    with tuning.mode("full"):
        for _ in range(2):
            conv_act(*layer(), None, LEAKY).sum().backward()
        assert conv_act(layer()[0][:0], layer()[1], None, LEAKY).shape[0] == 0
    assert len(log.records) == 3
    assert all("could not be measured" in m and "\n" not in m for m in log.messages)


def test_records_of_kernels_that_are_no_more(rival: Rival, log: pytest.LogCaptureFixture) -> None:
    bad = [
        {"kernel": "fft"},
        {"kernel": "conv"},
        {"kernel": "conv", "before": [], "problem": {"batch": "x"}, "config": {}},
    ]
    for kernel in bad:
        chooser.forget()
        chooser.keep("fprop", PROBLEM, CPU, dataclasses.replace(RECORD, kernel=kernel))
        assert [tuning.choose("fprop", PROBLEM) for _ in range(2)] == [None, None]
    assert len([m for m in log.messages if "cannot be used" in m]) == len(bad)


def test_nothing_is_measured_while_compiling(rival: Rival, measured: list[str]) -> None:
    weight = layer()[1]

    def f(x: Tensor) -> Tensor:
        return conv_act(x, weight, None, LEAKY, padding=1)

    def compiled(**options: Any) -> Callable[[Tensor], Tensor]:
        torch._dynamo.reset()
        return torch.compile(f, backend="aot_eager", fullgraph=True, **options)

    x, _ = layer()
    tuning.cache_directory().mkdir(parents=True)
    with tuning.mode("full"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled()(x).sum().backward()
        assert (measured, rival.calls) == ([], [])
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
            f(fake.from_tensor(x.detach()))
        assert measured == []
        want = f(x)  # now it may be measured, and then the compiler knows
        assert len(measured) == 3
        rival.factor = 2.0
        torch.testing.assert_close(compiled()(x), 2 * want)
        assert len(measured) == 3


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="see chooser._while_compiling")
def test_the_batch_may_be_symbolic(rival: Rival, measured: list[str]) -> None:
    weight = torch.randn(8, 6)
    counter = CompileCounter()
    torch._dynamo.reset()
    f = torch.compile(lambda x: linear_act(x, weight, None, LEAKY), backend=counter, fullgraph=True)
    with tuning.mode("full"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rows in (5, 8):
            linear_act(torch.randn(rows, 6), weight, None, LEAKY)
        for rows in (5, 6, 7, 8, 9, 12, 16):
            f(torch.randn(rows, 6))
    # 5; then a symbol within 5..8; then one within 9..16.
    assert counter.frame_count == 3


def test_an_export_takes_no_guards(rival: Rival, measured: list[str]) -> None:
    model = nn.Sequential(ShapedLinear(6, 8, spec=LEAKY)).eval()
    x = torch.randn(5, 6)
    with tuning.mode("full"), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        want = model(x)
        assert measured
        rival.factor = 2.0
        rows = torch.export.Dim("rows", min=2, max=64)
        for strict in (False, True):
            exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},), strict=strict)
            torch.testing.assert_close(exported.module()(x), want)
            exported.module()(torch.randn(40, 6))
            still = torch.export.export(model, (x,), strict=strict)
            torch.testing.assert_close(still.module()(x), 2 * want)


# ------------------------------------------------------------------ a model's layers


def observed(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine asks for when the model really runs."""
    seen: list[Any] = []

    def note(direction: str, problem: Problem) -> None:
        seen.append((direction, problem))

    monkeypatch.setitem(engine._SERVED, "cpu", ("triton",))
    monkeypatch.setattr(engine, "_chooser", note)
    monkeypatch.setattr(engine, "_remembers", False)
    model(x).sum().backward()
    monkeypatch.undo()
    return seen


def asked_for(found: Sequence[layers.Layer]) -> list[Any]:
    """The same in that form: an engine is asked for dgrad also where nobody needs it."""
    everything = []
    for one in found:
        dgrad = "dgrad_act" if "dgrad_act" in one.directions else "dgrad"
        everything += [(direction, one.problem) for direction in ("fprop", dgrad, "wgrad")]
    return everything


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_problems_of_a_converted_model(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vanilla_convnet(6, width=4, in_channels=2, pool_after=3)
    convert(model, method="TAT", activation="leaky_relu", clamp=True)
    x = torch.randn(3, 2, 8, 8)
    if last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    found = tuning.fused_layers(model, x)
    assert len(found) == 6
    assert found[0].directions == ("fprop", "wgrad")
    assert all(len(one.directions) == 3 for one in found[1:])
    assert asked_for(found) == observed(model, x, monkeypatch)
    for one in found:
        assert isinstance(model.get_submodule(one.path), ShapedConv2d)


@pytest.mark.parametrize("max_length", [None, 1, 2, 3])
def test_problems_of_chains_and_odd_layers(
    max_length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def conv(i: int, o: int, k: int, **kwargs: Any) -> ShapedConv2d:
        return ShapedConv2d(i, o, k, spec=LEAKY, **kwargs)

    model = nn.Sequential(
        ShapedChain(
            conv(2, 4, 3, padding=1, stride=2),
            conv(4, 4, 3, padding="same", dilation=2),
            conv(4, 4, 2, padding="same"),
            conv(4, 4, 3, padding=1, padding_mode="circular"),
            *(conv(4, 4, 1) for _ in range(4)),
            conv(4, 4, 3, groups=2),
            max_length=max_length,
        ),
        nn.Flatten(),
        ShapedLinear(16, 3, spec=ActSpec("tanh", output_shift=0.5)),
    )
    for p in model[2].parameters():
        p.requires_grad_(False)
    x = torch.randn(2, 2, 8, 8)
    state = torch.get_rng_state()
    found = tuning.fused_layers(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert asked_for(found) == observed(model, x, monkeypatch)
    assert found[-1].directions == ("fprop", "dgrad")
    with torch.autocast("cpu", torch.bfloat16):
        found = tuning.fused_layers(model, x)
        assert {one.problem.dtype for one in found} == {torch.bfloat16}
        assert asked_for(found) == observed(model, x, monkeypatch)
    assert not any(m._forward_pre_hooks for m in model.modules())


class Looks(nn.Module):
    """A model whose way depends on its numbers, and which calls a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ShapedLinear(4, 4, spec=LEAKY)
        self.other = ShapedLinear(4, 4, spec=LEAKY)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x=self.layer(x)) if x.sum() == 0 else self.other(x)


def test_models_that_need_numbers_and_models_without_layers() -> None:
    found = tuning.fused_layers(Looks(), torch.zeros(2, 4))
    assert [(one.path, one.directions) for one in found] == [
        ("layer", ("fprop", "wgrad")),
        ("layer", ("fprop", "dgrad", "wgrad")),
    ]
    with pytest.raises(ValueError, match=r"no fused layers; fusedshape\.convert"):
        tuning.fused_layers(nn.Linear(4, 4), torch.zeros(2, 4))
    idle = Looks()
    idle.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="none of the model's 2 fused layers is called"):
        tuning.fused_layers(idle, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"x's last dimension must be 4"):
        tuning.fused_layers(Looks(), torch.zeros(2, 5))


# ------------------------------------------------------------------ the command

FACTORY = """
from torch import nn
from fusedshape import ActSpec
from fusedshape.nn import ShapedConv2d
def net():
    spec = ActSpec("leaky_relu", negative_slope=0.3)
    return nn.Sequential(
        *(ShapedConv2d(i, 4, 3, padding=1, spec=spec) for i in (2, 4, 4)), nn.Flatten()
    )
def plain():
    return nn.Linear(4, 4)
def fails():
    raise KeyError("width")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "tune_mine.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield
    sys.modules.pop("tune_mine", None)


def tune(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = main(["tune", *argv])
    except SystemExit as leave:
        code = int(leave.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.usefixtures("mine")
def test_tune_without_another_engine(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    argv = "tune_mine:net", "--input", "2,2,6,6", "--device", "cpu"
    code, out, err = tune(capsys, *argv)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[-2] == "aten is the only candidate, nothing to measure"
    assert lines[-1].startswith("left out: native: ")
    assert lines[-1].endswith("[0 fprop, 0 wgrad, 1 fprop and 5 more]")
    assert sum("aten (only candidate)" in line for line in lines) == 8
    assert not own_cache.exists()
    code, out, _ = tune(capsys, *argv, "--json", "--dtype", "bf16", "--autocast")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [row["record"] for row in rows] == [None] * 8
    assert {row["problem"]["dtype"] for row in rows} == {"bfloat16"}


@pytest.mark.usefixtures("mine")
def test_tune_measures_and_keeps(
    capsys: pytest.CaptureFixture[str], rival: Rival, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = "tune_mine:net", "--input", "2,2,6,6", "--device", "cpu"
    monkeypatch.setattr(command, "measure", None)
    code, out, err = tune(capsys, *argv, "--dry-run")
    assert (code, err) == (0, "")
    assert out.count("aten (not measured)") == 8
    monkeypatch.setattr(command, "measure", fresh_clocks(0.5))
    code, out, err = tune(capsys, *argv)
    assert (code, err) == (0, "")
    assert out.count("2.00×") == 9
    assert "8 of 8 cases have a faster engine" in out
    assert "8.000 ms → 4.000 ms (2.00×)" in out
    # Layers 1 and 2 are alike: fprop and wgrad of the first, and all three of them.
    assert tuning.status()["tuning_entries"] == 5
    monkeypatch.setattr(command, "measure", None)
    code, out, _ = tune(capsys, *argv, "--json", "--dry-run", "--force")
    rows = json.loads(out)["rows"]
    assert [row["measured"] for row in rows] == [False] * 8
    assert {row["record"]["engine"] for row in rows} == {"triton"}
    monkeypatch.setattr(command, "measure", fresh_clocks(0.99))
    code, out, _ = tune(capsys, *argv, "--force")
    assert "0 of 8 cases have a faster engine" in out
    assert out.count("1.00×") == 9
    rival.factor = 2.0
    code, out, _ = tune(capsys, *argv, "--force")
    assert code == 0
    assert out.count("WRONG NUMBERS, not used: triton: result 0: off by ") == 2
    assert "[1 fprop, 2 fprop]" in out


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("place", ["a file", "no room"])
def test_what_cannot_be_kept_is_an_error(
    capsys: pytest.CaptureFixture[str],
    rival: Rival,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: str,
) -> None:
    if place == "a file":
        (tmp_path / "cache").write_text("in the way")
    else:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache.os, "replace", full)
    monkeypatch.setattr(command, "measure", fresh_clocks(0.5))
    code, out, err = tune(capsys, "tune_mine:net", "--input", "2,2,6,6", "--device", "cpu")
    assert code == 1
    assert "8 of 8 cases have a faster engine" in out
    assert "kept in" not in out
    assert f"could be kept in {tmp_path / 'cache'}" in err


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("how", "ended"),
    [(signal.SIGINT, (130, "interrupted")), (signal.SIGTERM, (143, "terminated"))],
)
def test_an_interrupt_shows_what_was_measured(
    capsys: pytest.CaptureFixture[str],
    rival: Rival,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
    ended: tuple[int, str],
) -> None:
    measure, left = fresh_clocks(0.5), iter(range(3))

    def interrupted(*args: Any) -> measuring.Result:
        if next(left, None) is None:
            signal.raise_signal(how)
        return measure(*args)

    monkeypatch.setattr(command, "measure", interrupted)
    code, out, err = tune(capsys, "tune_mine:net", "--input", "2,2,6,6", "--device", "cpu")
    assert (code, err) == (ended[0], f"fusedshape: {ended[1]}\n")
    assert "3 of 3 cases have a faster engine" in out
    assert tuning.status()["tuning_entries"] == 3


@pytest.mark.skipif(not native.available(), reason="csrc is not built")
def test_the_table_says_who_computes_a_layer_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing has been measured, and where nobody looks at what has."""
    asked: list[str] = []
    choose = engine.choose_engine

    def spy(*args: Any) -> str:
        asked.append(choose(*args))
        return asked[-1]

    monkeypatch.setattr(engine, "choose_engine", spy)
    monkeypatch.setattr(command, "measure", fresh_clocks(0.5))
    layer = ShapedConv2d(64, 64, 1, spec=LEAKY).to(memory_format=torch.channels_last)
    for batch, dry, measured in (
        (8, "native (not measured)", "native"),
        (2, "aten (not measured)", "native (torch.compile only)"),
    ):
        x = torch.randn(batch, 64, 8, 8).to(memory_format=torch.channels_last)
        found = tuning.fused_layers(nn.Sequential(layer), x)
        (row, _) = command.tune(found, CPU, dry_run=True, progress=False)
        assert command._figures(row)[0] == dry
        asked.clear()
        engine.forget_choices()
        layer(x).sum().backward()
        assert (asked or ["aten"])[0] == dry.split()[0]
        rows = list(command.tune(found, CPU, progress=False))
        assert command._figures(rows[0])[0] == measured
        assert ("so small that" in command.text(rows)) == (batch == 2)


def test_who_cannot_run_is_told(rival: Rival, monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(name: str, x: Tensor, weight: Tensor, groups: int) -> str | None:
        return None if groups == 1 else f"groups={groups}"

    monkeypatch.setattr(engine, "why_not", why_not)
    model = nn.Sequential(*(ShapedConv2d(4, 4, 1, groups=n, spec=LEAKY) for n in (1, 2, 4, 2)))
    found = tuning.fused_layers(model, torch.zeros(1, 4, 3, 3))
    lines = command.text(list(command.tune(found, CPU, dry_run=True))).splitlines()
    for i, groups in enumerate((1, 2, 4, 2)):
        own = [line for line in lines if line.startswith(f"{i} ")]
        assert all(("not measured" if groups == 1 else "only candidate") in line for line in own)
    assert [line.partition(": ")[2] for line in lines if line.startswith("left out")] == [
        "triton: engine 'triton' cannot run this layer: groups=2 "
        "[1 fprop, 1 dgrad, 1 wgrad and 3 more]",
        "triton: engine 'triton' cannot run this layer: groups=4 [2 fprop, 2 dgrad, 2 wgrad]",
    ]


def fresh_clocks(factor: float) -> Callable[..., measuring.Result]:
    def run(
        direction: engine.Direction, problem: Problem, device: torch.device, _: object
    ) -> measuring.Result:
        return tuning.measure(direction, problem, device, steady(factor))

    return run


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("tune_mine:net",), 2, "--input"),
        (("tune_mine:net", "--input", "2,x"), 2, "positive integers"),
        (("tune_mine:net", "--input", "2,0,6,6"), 2, "positive integers"),
        (("tune_mine:net", "--input", "2,2,6,6", "--dtype", "int8"), 2, "--dtype"),
        (("tune_mine:plain", "--input", "2,4"), 1, "no fused layers"),
        (("tune_mine:net", "--input", "2,3,6,6"), 1, "input channels"),
        (("tune_mine:nothing", "--input", "2"), 1, "has no 'nothing'"),
        (("builtins:dict", "--input", "2"), 1, "not an nn.Module"),
        (("tune_mine:net", "--input", "2,2,6,6", "--device", "cuda:99"), 1, "CUDA device"),
        (("tune_mine:net", "--input", "2,2,6,6", "--device", "abacus"), 1, "abacus"),
        (("tune_mine:net", "--input", "2,2,6,6", "--device", "meta"), 1, "known: cpu, cuda"),
        (("tune_mine:net", "--input", "2,2,6,6", "--autocast"), 1, "got --dtype fp32"),
        (("tune_mine:fails", "--input", "2"), 1, "tune_mine:fails raised KeyError"),
    ],
)
def test_tune_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], code: int, message: str
) -> None:
    got, out, err = tune(capsys, *argv)
    assert (got, out) == (code, "")
    assert message in err


def test_info_tells(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    chooser.keep("fprop", PROBLEM, CPU, RECORD)
    assert main(["info", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tuning"] == "cached"
    assert row["tuning_cache"] == str(own_cache)
    assert row["tuning_entries"] == (0 if torch.cuda.is_available() else 1)
