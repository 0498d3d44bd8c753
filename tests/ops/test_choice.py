"""Which engine computes a layer: the choice, its reasons, and what a chooser may do to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedshape import ShapedConv2d, ShapedLinear, native
from fusedshape.ops import apart, conv_act, linear_act
from fusedshape.ops.choice import (
    asked_engine,
    choose_engine,
    engines_for,
    install_chooser,
    only_aten,
    pinned_engine,
    rivals,
)
from fusedshape.ops.engines import ATEN, ENGINES
from fusedshape.ops.problem import DIRECTIONS, Direction, Problem, problem_of
from tests.support.backends import INTERPRET, NATIVE_SERVES
from tests.support.layers import layer_of
from tests.support.operands import LEAKY
from tests.support.specs import shaped

X, W = torch.ones(2, 3, 5, 4), torch.ones(6, 3, 3, 3)
GEOMETRY = ([1, 2], [1, 0], [1, 1], False, [0, 0], 1)
PROBLEM = problem_of(X, layer_of(W, LEAKY, GEOMETRY))


@pytest.fixture
def asked() -> Iterator[list[tuple[Direction, Problem]]]:
    """Install a chooser that notes what it is asked and names Triton."""
    questions: list[tuple[Direction, Problem]] = []

    def chooser(direction: Direction, problem: Problem) -> str:
        questions.append((direction, problem))
        return "triton"

    previous = install_chooser(chooser)
    yield questions
    assert install_chooser(previous) is chooser


def why_not(name: str, x: Tensor, weight: Tensor, groups: int) -> str | None:
    n = weight.ndim - 2
    geometry = ([1] * n, [0] * n, [1] * n, False, [0] * n, groups) if n else None
    return ENGINES[name].why_not(x, layer_of(weight, LEAKY, geometry))


def fits(name: str) -> str | None:
    return None


def fits_not(name: str) -> str | None:
    return "it is Tuesday"


def test_a_problem_says_all_and_is_hashable() -> None:
    assert (
        Problem(
            device="cpu",
            capability=None,
            dtype=torch.float32,
            input=(2, 3, 5, 4),
            weight=(6, 3, 3, 3),
            channels_last=False,
            stride=(1, 2),
            padding=(1, 0),
            dilation=(1, 1),
            groups=1,
            activation="leaky_relu",
            saves_output=True,
        )
        == PROBLEM
    )
    last = problem_of(X.to(memory_format=torch.channels_last), layer_of(W, LEAKY, GEOMETRY))
    assert last == PROBLEM._replace(channels_last=True)
    assert len({PROBLEM, last, problem_of(X, layer_of(W, LEAKY, GEOMETRY))}) == 2
    linear = problem_of(torch.ones(2, 3, 4), layer_of(torch.ones(5, 4), shaped("swish"), None))
    assert linear.channels_last
    assert (linear.stride, linear.groups, linear.saves_output) == ((), 1, False)
    strided = problem_of(torch.ones(2, 4, 3).mT, layer_of(torch.ones(5, 4), LEAKY, None))
    assert not strided.channels_last


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_choice(direction: Direction) -> None:
    assert choose_engine(direction, PROBLEM, "aten", fits) == "aten"
    assert choose_engine(direction, PROBLEM, "auto", fits) == "aten"
    assert choose_engine(direction, PROBLEM, "triton", fits) == "triton"
    with pytest.raises(ValueError, match="'triton' cannot run this layer: it is Tuesday"):
        choose_engine(direction, PROBLEM, "triton", fits_not)
    with pytest.raises(
        ValueError, match="unknown engine 'cublas'; known: auto, aten, triton, native, cudnn"
    ):
        choose_engine(direction, PROBLEM, "cublas", fits)


def test_a_chooser_decides_for_auto_alone(asked: list[tuple[Direction, Problem]]) -> None:
    assert choose_engine("dgrad", PROBLEM, "auto", fits) == "triton"
    assert asked == [("dgrad", PROBLEM)]
    assert choose_engine("dgrad", PROBLEM, "auto", fits_not) == "aten", "auto never raises"
    assert choose_engine("dgrad", PROBLEM, "aten", fits) == "aten"
    assert len(asked) == 2


@pytest.mark.parametrize("answer", [None, "aten", "cublas"])
def test_other_answers_mean_aten(answer: str | None) -> None:
    previous = install_chooser(lambda direction, problem: answer)
    try:
        assert choose_engine("wgrad", PROBLEM, "auto", fits) == "aten"
    finally:
        install_chooser(previous)


@pytest.mark.skipif(INTERPRET, reason="the interpreter serves CPU tensors")
def test_on_the_cpu_nobody_is_asked(asked: list[tuple[Direction, Problem]]) -> None:
    assert engines_for("auto", X, layer_of(W, LEAKY, GEOMETRY)) == (ATEN,) * 3
    weight = W.clone().requires_grad_()
    conv_act(X, weight, None, LEAKY).sum().backward()
    assert weight.grad is not None
    assert not asked


@pytest.mark.skipif(INTERPRET, reason="the interpreter serves CPU tensors")
@pytest.mark.parametrize(
    "call",
    [
        lambda e: conv_act(X, W, None, LEAKY, engine=e),
        lambda e: linear_act(X, torch.ones(2, 4), None, LEAKY, engine=e),
        lambda e: ShapedConv2d(3, 6, 3, spec=LEAKY, engine=e)(X),
        lambda e: ShapedLinear(4, 2, spec=LEAKY, engine=e)(X),
    ],
    ids=["conv_act", "linear_act", "ShapedConv2d", "ShapedLinear"],
)
def test_an_explicit_engine_never_falls_back(call: Callable[[str], Tensor]) -> None:
    assert call("aten").shape == call("auto").shape
    with pytest.raises(ValueError, match="cannot run this layer: backend 'triton' serves CUDA"):
        call("triton")
    with pytest.raises(ValueError, match=r"unknown engine 'cublas'|engine='cublas' is unknown"):
        call("cublas")


def test_engines_survive_copies_of_modules() -> None:
    plain = torch.nn.Conv2d(3, 6, 3)
    assert ShapedConv2d.from_plain(plain, LEAKY, engine="aten").engine == "aten"
    old = ShapedConv2d.from_plain(plain, LEAKY)
    del old.__dict__["engine"]  # as pickled before there were engines
    assert old.engine == "auto"
    assert old(X).shape == (2, 6, 3, 2)


#: On the CPU, float32 and channels_last, 1×1: what csrc's convolutions do best.
POINTWISE = Problem(
    "cpu", None, torch.float32, (8, 64, 14, 14), (64, 64, 1, 1), True, (1, 1), (0, 0), (1, 1), 1,
    "relu", True,
)  # fmt: skip
DENSE = {"weight": (256, 256, 3, 3), "input": (8, 256, 14, 14)}
LINEAR = {"weight": (64, 64), "input": (64, 64), "stride": (), "padding": (), "dilation": ()}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "native"),
        ({"device": "cuda", "capability": (9, 0)}, "aten"),
        ({"device": "meta"}, "aten"),
        ({"dtype": torch.float64}, "aten"),
        ({"dtype": torch.bfloat16}, "aten"),
        ({"channels_last": False}, "aten"),
        ({"stride": (2, 2)}, "native"),
        ({"weight": (32, 64, 1, 1)}, "native"),
        ({"weight": (16, 64, 1, 1)}, "aten"),
        ({"weight": (64, 16, 1, 1), "input": (8, 16, 14, 14)}, "aten"),
        ({"weight": (64, 64, 3, 3)}, "aten"),
        ({"weight": (64, 64, 3, 3), "stride": (2, 2)}, "native"),
        (DENSE, "native"),
        (DENSE | {"channels_last": False}, "aten"),
    ],
    ids=str,
)
def test_pinned_engine_of_convolutions(changes: dict[str, object], name: str) -> None:
    assert pinned_engine(POINTWISE._replace(**changes)) == name


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel", ""])
def test_pinned_engine_of_linear_layers(vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_vendor", lambda: vendor)
    here = "native" if vendor == "AuthenticAMD" else "aten"
    assert pinned_engine(POINTWISE._replace(**LINEAR)) == here
    assert pinned_engine(POINTWISE._replace(**LINEAR | {"input": (4, 16, 64)})) == here
    assert pinned_engine(POINTWISE._replace(**LINEAR | {"input": (1, 64)})) == "aten"
    assert pinned_engine(POINTWISE._replace(**LINEAR, dtype=torch.float64)) == "aten"


def test_the_pinned_engine_gives_way_to_what_hinders_it() -> None:
    assert choose_engine("fprop", POINTWISE, "auto", fits) == "native"
    assert choose_engine("fprop", POINTWISE, "auto", fits_not) == "aten"


@pytest.mark.parametrize("measured", ["aten", "triton", "cublas", None])
def test_measurements_come_before_the_pinned_engine(measured: str | None) -> None:
    previous = install_chooser(lambda direction, problem: measured)
    try:
        name = measured if measured in ("aten", "triton") else "native"
        assert choose_engine("fprop", POINTWISE, "auto", fits) == name
        no_triton = {"triton": "no CUDA"}.get
        name = "aten" if measured == "aten" else "native"
        assert choose_engine("fprop", POINTWISE, "auto", no_triton) == name
    finally:
        install_chooser(previous)


def test_who_names_a_backend_wants_its_pass() -> None:
    for backend in ("auto", "reference", "native", "triton"):
        for name in ("aten", "triton", "native", "cudnn"):
            assert asked_engine(name, backend) == name
    assert asked_engine("auto", "auto") == "auto"
    assert {asked_engine("auto", b) for b in ("reference", "native", "triton")} == {"aten"}


def test_rivals() -> None:
    names = {device: tuple(e.name for e in rivals(device)) for device in ("cuda", "cpu")}
    assert names["cuda"] == ("triton", "cudnn")
    assert names["cpu"] == (("triton",) if INTERPRET else ("native",))
    assert rivals("mps") == rivals("meta") == ()


def last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype).to(memory_format=torch.channels_last)


@NATIVE_SERVES
def test_only_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers are known to be aten's before their problem is made."""
    large, small = last(8, 64, 8, 8), last(8, 64, 8, 7)
    assert not only_aten("auto", large)
    assert only_aten("auto", small)
    assert only_aten("auto", large.double())
    assert only_aten("auto", large.bfloat16())
    assert only_aten("auto", large.to("meta"))
    assert only_aten("aten", large)
    for name in ("native", "triton", "cublas"):
        assert not only_aten(name, small), "which then has to be refused, or run"
    monkeypatch.setattr(native, "_loaded", False)
    assert only_aten("auto", large)
    assert "not to be had" in str(why_not("native", large, last(64, 64, 1, 1), 1))


@NATIVE_SERVES
def test_a_chooser_is_not_asked_for_small_inputs(asked: list[tuple[Direction, Problem]]) -> None:
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    w = last(64, 64, 1, 1)
    assert engines_for("auto", last(8, 64, 8, 7), layer_of(w, LEAKY, geometry)) == (ATEN,) * 3
    assert not asked
    found = engines_for("auto", last(8, 64, 8, 8), layer_of(w, LEAKY, geometry), chained=True)
    assert [direction for direction, _ in asked] == ["fprop", "dgrad_act", "wgrad"]
    assert [e.name for e in found] == ["native"] * 3, "Triton cannot, so what is pinned does"


@NATIVE_SERVES
@pytest.mark.parametrize("names", [*itertools.product(["aten", "native"], repeat=3)], ids="-".join)
def test_each_direction_by_its_own_engine(names: tuple[str, str, str]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 64, 8, 8), (32, 64, 3, 3), (32,)
    x, w, b = (torch.randn(shape, generator=generator) for shape in shapes)
    x, w = x.to(memory_format=torch.channels_last), w / 24
    by_direction = dict(zip(("fprop", "dgrad", "wgrad"), names, strict=True))

    def results(name: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = conv_act(*leaves, shaped("swish"), stride=2, padding=1, engine=name)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    want = results("aten")
    previous = install_chooser(lambda direction, problem: by_direction[direction])
    try:
        got = results("auto")
        geometry = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)
        found = engines_for("auto", x, layer_of(w, LEAKY, geometry))
    finally:
        install_chooser(previous)
    assert tuple(e.name for e in found) == names
    for g, t in zip(got, want, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-5 * t.abs().amax().item())


@NATIVE_SERVES
@pytest.mark.parametrize(
    ("x", "weight", "groups", "reason"),
    [
        (last(2, 32, 4, 4), last(16, 16, 1, 1), 2, "groups=2"),
        (last(2, 32, 4, 4, dtype=torch.float64), last(16, 32, 1, 1), 1, "got torch.float64"),
        (last(2, 24, 4, 4), last(16, 24, 1, 1), 1, "24 channels or features"),
        (last(2, 32, 4, 4), last(8, 32, 1, 1), 1, "8 channels or features"),
        (torch.ones(2, 32, 4, 4), last(16, 32, 1, 1), 1, "strides (512, 16, 4, 1)"),
        (torch.ones(2, 32, 4, 4, device="meta"), last(16, 32, 1, 1), 1, "one on meta"),
    ],
    ids=["groups", "dtype", "input channels", "output channels", "layout", "device"],
)
def test_why_native_cannot(x: Tensor, weight: Tensor, groups: int, reason: str) -> None:
    found = why_not("native", x, weight, groups)
    assert found is not None
    assert reason in found
    assert why_not("native", last(2, 32, 4, 4), last(16, 32, 1, 1), 1) is None
    assert why_not("native", torch.ones(2, 3, 32), torch.ones(16, 32), 1) is None


def test_linear_layers_that_have_nothing_to_sum_or_gaps() -> None:
    weight = torch.ones(16, 0)
    for run in (linear_act, torch.compile(linear_act, fullgraph=True, backend="aot_eager")):
        assert run(torch.ones(2, 0), weight, None, LEAKY).shape == (2, 16)
    with pytest.raises(ValueError, match="0 channels or features"):
        linear_act(torch.ones(2, 0), weight, None, LEAKY, engine="native")
    for x in (torch.ones(16, 4).T, torch.ones(2, 16, 4).mT):
        with pytest.raises(ValueError, match=r"pass x\.contiguous\(\)"):
            linear_act(x, torch.ones(16, 16), None, LEAKY, engine="native")


@NATIVE_SERVES
def test_apart() -> None:
    x, weight, bias = torch.randn(64, 512), torch.randn(64, 512), torch.randn(64)
    ran: list[str] = []
    with Recorder(ran):
        want = linear_act(x, weight, bias, LEAKY, engine="native")
        assert ran == ["native_conv_act"]
        ran.clear()
        with apart.apart():
            with apart.apart():
                pass
            got = linear_act(x, weight, bias, LEAKY, engine="native")
        assert ran == ["native_conv", "native_bias_act_"]
    with pytest.raises(ZeroDivisionError), apart.apart():
        _ = 1 / 0
    assert not apart._apart
    torch.testing.assert_close(got, want)


def test_apart_holds_for_its_thread_alone() -> None:
    with apart.apart(), ThreadPoolExecutor(1) as pool:
        assert apart.is_apart()
        assert not pool.submit(apart.is_apart).result()
    assert not apart.is_apart()


class Recorder(TorchDispatchMode):
    """Notes which of this library's ops run."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "fusedshape":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@NATIVE_SERVES
def test_choices_are_remembered_while_they_hold() -> None:
    x, weight = torch.ones(128, 512), torch.ones(64, 512)
    asked: list[str] = []

    def chooser(direction: Direction, problem: Problem) -> str:
        asked.append(direction)
        return "aten"

    previous = install_chooser(chooser)
    try:
        for _ in range(2):
            assert engines_for("auto", x, layer_of(weight, LEAKY, None)).fprop.name == "aten"
        assert len(asked) == 3
        engines_for("auto", x[:70], layer_of(weight, LEAKY, None))
        assert len(asked) == 6
        assert engines_for("native", x, layer_of(weight, LEAKY, None)).fprop.name == "native"
        install_chooser(chooser, steady=False)
        for _ in range(2):
            engines_for("auto", x, layer_of(weight, LEAKY, None))
        assert len(asked) == 12
    finally:
        install_chooser(previous)
