"""The engine before pretended GPUs, with a cuDNN that is computed; test_engine.py runs it."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pretend_gpu
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import fake_cudnn

sys.modules["cudnn"] = fake_cudnn

from fusedshape import (  # noqa: E402
    ActSpec,
    ShapedConv2d,
    conv_act,
    conv_chain,
    explain,
    reference,
    tuning,
)
from fusedshape.ops import ChainLayer, choice, engines  # noqa: E402
from fusedshape.ops.engines.cudnn import building, calls, library  # noqa: E402
from fusedshape.ops.engines.cudnn.building import NoPlanError  # noqa: E402
from fusedshape.ops.problem import problem_of  # noqa: E402
from fusedshape.tuning import command  # noqa: E402
from tests.kernels.pretended_compile import ops_of  # noqa: E402
from tests.support.layers import layer_of  # noqa: E402
from tests.support.rivals import Script  # noqa: E402
from tests.support.specs import SPECS, shaped  # noqa: E402

ENGINE = engines.ENGINES["cudnn"]
STATE = fake_cudnn.STATE
H100, A100 = 0, 1
LEAKY = shaped("leaky_relu")
GAIN = ActSpec("leaky_relu", negative_slope=0.3, output_scale=1.3)  # readable in half precision


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plans, and a mode in which they may be made."""
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path))
    fake_cudnn.reset()
    ENGINE.plans.forget()
    library.forget()
    calls._tell.cache_clear()
    monkeypatch.setattr(building, "build_all", _one_by_one)
    with tuning.mode("full"):
        yield


def _one_by_one(operations: Any, device: str) -> Iterator[Any]:
    yield from ((o, building._attempt(o, device)) for o in operations)


def capture(call: Any) -> Any:
    """A graph of what `call` launches, and its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def leaves(
    *shapes: tuple[int, ...], device: int = H100, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Leaves on a GPU, those of more than one dimension with channels innermost."""
    found = []
    for seed, shape in enumerate(shapes):
        t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        t = t.movedim(1, -1).contiguous().movedim(-1, 1) if len(shape) > 1 else t
        found.append(t.to(f"cuda:{device}").requires_grad_())
    return found


def step(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    grad = grad.movedim(1, -1).contiguous().movedim(-1, 1).to(y.dtype).to(y.device)
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, inputs, grad))]


def close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        scale = w.abs().amax().item() or 1.0
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance * scale)


SIZES: dict[str, tuple[Any, ...]] = {
    "3x3": ((2, 8, 6, 5), (16, 8, 3, 3), {"padding": 1}),
    "strided": ((2, 8, 7, 6), (16, 8, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "groups": ((2, 8, 6, 5), (16, 4, 3, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    "1d": ((2, 8, 9), (16, 8, 3), {"stride": 2, "padding": 1}),
    "3d": ((2, 8, 4, 3, 4), (16, 8, 2, 2, 2), {}),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_step(sizes: str, bias: bool) -> None:
    shape, weight, how = SIZES[sizes]
    tensors = leaves(shape, weight, (16,))
    for spec in (LEAKY, shaped("gelu")):
        used = tensors if bias else tensors[:2]
        args = (*tensors[:2], tensors[2] if bias else None, spec)
        got, want = (step(conv_act(*args, **how, engine=e), used) for e in ("cudnn", "aten"))
        close(got, want)
    kinds = {graph.steps[0].made_by[0] for graph, _, _ in STATE.executed}
    assert kinds == {"conv_fprop", "conv_dgrad", "conv_wgrad"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [GAIN, shaped("tanh")], ids=["output", "input"])
def test_half_precision(spec: ActSpec, dtype: torch.dtype) -> None:
    tensors = leaves((2, 8, 6, 5), (16, 8, 3, 3), (16,), dtype=dtype)
    got, want = (step(conv_act(*tensors, spec, engine=e), tensors) for e in ("cudnn", "aten"))
    close(got, want, 2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_a_chain_and_a_residual(spec: ActSpec) -> None:
    x, w, b, r = leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,), (2, 8, 6, 5))

    def run(engine: str) -> list[Tensor]:
        layers = [ChainLayer(w, b, spec, padding=1, engine=engine)] * 2
        joined = conv_act(x, w, b, spec, padding=1, engine=engine, residual=r, residual_weight=0.6)
        return [*step(conv_chain(x, layers), [x, w, b]), *step(joined, [x, w, b, r])]

    close(run("cudnn"), run("aten"), 3e-5)
    fused = [g for g, _, _ in STATE.executed if g.steps[0].made_by[0] == "conv_dgrad"]
    assert any(len(g.steps) > 1 for g in fused) == spec.readable


def test_sums_are_deterministic_unless_atomics_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, b = leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,))
    layers = [ChainLayer(w, b, LEAKY, padding=1, engine="cudnn")] * 2

    def reductions() -> int:
        STATE.executed.clear()
        got = step(conv_chain(x, layers), [x, w, b])
        close(got, want)
        made = [s.made_by[0] for g, _, _ in STATE.executed for s in g.steps]
        return made.count("reduction")

    aten = [layer._replace(engine="aten") for layer in layers]
    want = step(conv_chain(x, aten), [x, w, b])
    assert reductions() == 0
    monkeypatch.setenv(calls.ATOMICS, "1")
    assert reductions() == 1
    torch.use_deterministic_algorithms(True)
    try:
        assert reductions() == 0
    finally:
        torch.use_deterministic_algorithms(False)
    for graph in STATE.built:
        sums = any(s.made_by[0] == "reduction" for s in graph.steps)
        notes = [(what, note.name) for what, note in graph.notes]
        assert ("select", "TENSOR_CORE") in notes
        assert (("deselect", "NONDETERMINISTIC") in notes) != sums


def test_views_that_are_not_aligned() -> None:
    x, w, b = leaves((2, 8, 6, 5), (8, 8, 1, 1), (9,))
    got, want = (conv_act(x, w, b[1:], LEAKY, engine=e) for e in ("cudnn", "aten"))
    close([got.detach().cpu()], [want.detach().cpu()])


def plan_files(folder: Path) -> list[Path]:
    return sorted((folder / "plans").glob("*/*.json"))


def test_plans_are_made_once_and_kept(tmp_path: Path) -> None:
    tensors = leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,))

    def run(spec: ActSpec) -> Tensor:
        return conv_act(*tensors, spec, engine="cudnn").detach().cpu()

    first = run(LEAKY)
    other = ActSpec("leaky_relu", 2.0, -0.5, 0.1, 0.7, 0.9)  # constants are no part of a plan
    close([run(other)], [reference.conv_act(*(t.detach().cpu() for t in tensors), other,
                                            [1, 1], [0, 0], [1, 1], 1)])  # fmt: skip
    assert len(STATE.built) == len(plan_files(tmp_path)) == 1
    ENGINE.plans.forget()
    assert torch.equal(run(LEAKY), first)
    assert len(STATE.built) == 1
    assert len(STATE.loaded) == 2
    with torch.cuda.device(A100):
        (x, w, b) = leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,), device=A100)
    conv_act(x, w, b, LEAKY, engine="cudnn")  # the current device is another
    assert len(STATE.built) == 2
    assert len({path.parent for path in plan_files(tmp_path)}) == 2
    assert not list(tmp_path.rglob("*.tmp"))


DAMAGE = {
    "bits": lambda text: text[: len(text) // 2],
    "content": lambda text: text.replace("leaky_relu", "sigmoid", 1),
    "format": lambda text: text.replace('"format": 1', '"format": 0'),
    "nothing": lambda text: "",
}


@pytest.mark.parametrize("damage", [*DAMAGE, "plan"])
def test_a_plan_that_does_not_load_is_made_anew(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, b = leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,))
    want = conv_act(x, w, b, LEAKY, engine="cudnn").detach().cpu()
    (path,) = plan_files(tmp_path)
    if damage == "plan":
        load = fake_cudnn.pygraph.deserialize

        def once(self: Any, handle: Any, data: bytes) -> None:
            monkeypatch.setattr(fake_cudnn.pygraph, "deserialize", load)
            raise RuntimeError("CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH")

        monkeypatch.setattr(fake_cudnn.pygraph, "deserialize", once)
    else:
        path.write_text(DAMAGE[damage](path.read_text()))
    ENGINE.plans.forget()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fusedshape"):
        got = conv_act(x, w, b, LEAKY, engine="cudnn").detach().cpu()
    assert torch.equal(got, want)
    assert len(STATE.built) == 2
    (record,) = caplog.records
    assert "which is made anew" in record.message
    assert str(path) in record.message
    assert "\n" not in record.message


def test_a_folder_that_others_can_write_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x, w, b = leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,))
    conv_act(x, w, b, LEAKY, engine="cudnn")
    (path,) = plan_files(tmp_path)
    path.parent.chmod(0o777)
    ENGINE.plans.forget()
    with caplog.at_level(logging.WARNING, "fusedshape"):
        conv_act(x, w, b, LEAKY, engine="cudnn")
    assert len(STATE.built) == 2
    assert "chmod o-w" in caplog.text
    path.parent.chmod(0o700)


def test_without_a_plan_it_is_refused_but_for_full_mode(tmp_path: Path) -> None:
    tensors = leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,))
    with tuning.mode("cached"):
        with pytest.raises(ValueError, match="there is no plan for this layer and batch yet"):
            conv_act(*tensors, LEAKY, engine="cudnn")
        assert not STATE.built
        row, *_ = explain(ShapedConv2d(8, 8, 3, spec=LEAKY).to("cuda").to(
            memory_format=torch.channels_last), tensors[0]).rows  # fmt: skip
        assert "there is no plan" in row.others["cudnn"]
    conv_act(*tensors, LEAKY, engine="cudnn")
    with tuning.mode("cached"):
        conv_act(*tensors, LEAKY, engine="cudnn")
        y = conv_act(*tensors, LEAKY, engine="cudnn")
        with pytest.raises(NoPlanError, match="no plan for its dgrad yet; `fusedshape tune`"):
            y.sum().backward()
        smaller = tensors[0].detach()[:1]
        with pytest.raises(ValueError, match="layer and batch yet"):
            conv_act(smaller, *tensors[1:], LEAKY, engine="cudnn")


def test_capture_needs_the_plan_beforehand() -> None:
    x, w = (t.detach() for t in leaves((2, 8, 6, 5), (8, 8, 3, 3)))

    def call() -> Tensor:
        return conv_act(x, w, None, LEAKY, engine="cudnn")

    with pytest.raises(NoPlanError, match="run the layer once before the capture"):
        capture(call)
    pretend_gpu._Graph.capturing = None
    want = call().cpu()
    executed = len(STATE.executed)
    graph, out = capture(call)
    assert len(STATE.executed) == executed + 1
    stream = STATE.executed[-1][2]
    assert stream != 0, "on the stream that is captured"
    assert torch.equal(out.cpu(), want)
    assert graph is not None


@pytest.mark.parametrize("kind", ["conv_fprop", "conv_dgrad", "conv_wgrad"])
def test_a_plan_that_fails(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """An error where the engine was named; else aten computes, and one line says so."""
    tensors = leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,))
    want = step(conv_act(*tensors, LEAKY, padding=1, engine="aten"), tensors)

    def run(engine: str) -> list[Tensor]:
        return step(conv_act(*tensors, LEAKY, padding=1, engine=engine), tensors)

    close(run("cudnn"), want)
    broken = "CUDNN_STATUS_EXECUTION_FAILED\nsomewhere"
    STATE.broken = lambda graph: graph.steps[0].made_by[0] == kind and broken
    previous = choice.install_chooser(lambda direction, problem: "cudnn")
    try:
        with caplog.at_level(logging.WARNING, "fusedshape"):
            close(run("auto"), want)
            close(run("auto"), want)
        with pytest.raises(ValueError, match=r"cannot run this layer: its plan failed"):
            run("cudnn")
        ENGINE.plans.forget()
        with pytest.raises(NoPlanError, match="CUDNN_STATUS_EXECUTION_FAILED somewhere"):
            run("cudnn")
    finally:
        choice.install_chooser(previous)
    lines = [r.message for r in caplog.records if "cudnn" in r.message]
    assert len(lines) == 1
    assert lines[0].endswith("aten computes it")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("spec", [LEAKY, shaped("swish")], ids=["output", "input"])
def test_aten_in_its_place_in_a_chain(spec: ActSpec, residual: bool) -> None:
    x, w, b, r = leaves((2, 8, 6, 5), (8, 4, 3, 3), (8,), (2, 8, 6, 5))
    joining = {"residual": r, "residual_weight": 0.6} if residual else {}

    def run(engine: str) -> list[Tensor]:
        layers = [ChainLayer(w, b, spec, padding=1, groups=2, engine=engine)] * 3
        y = conv_act(x, w, b, spec, padding=1, groups=2, engine=engine, **joining)
        return [*step(conv_chain(x, layers), [x, w, b]), *step(y, [x, w, b])]

    want = run("aten")
    STATE.refused = lambda graph: "there is none"
    previous = choice.install_chooser(lambda direction, problem: "cudnn")
    try:
        close(run("auto"), want)
    finally:
        choice.install_chooser(previous)
    assert not STATE.executed


def test_out_of_memory_is_not_the_plans_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,))
    want = conv_act(x, w, b, LEAKY, engine="cudnn").detach().cpu()
    monkeypatch.setattr(pretend_gpu, "MEMORY", 1 << 12)
    with pytest.raises(torch.OutOfMemoryError):
        conv_act(x, w, b, LEAKY, engine="cudnn")
    monkeypatch.undo()
    assert torch.equal(conv_act(x, w, b, LEAKY, engine="cudnn").detach().cpu(), want)


def test_auto_never_takes_it_unmeasured() -> None:
    x, w, b = leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,))
    conv_act(x, w, b, LEAKY, engine="cudnn")
    STATE.executed.clear()
    with tuning.mode("cached"):
        conv_act(x, w, b, LEAKY).sum().backward()
    with tuning.mode("off"):
        conv_act(x, w, b, LEAKY).sum().backward()
    assert not STATE.executed


def twice_as_fast() -> Script:
    """A clock for one challenger at a time, which takes half of the base's time."""
    return Script(lambda i, n: (1.0, 0.5)[i % 2] * 1e-3)


def net() -> nn.Sequential:
    layers = [ShapedConv2d(8, 8, 3, padding=1, spec=GAIN) for _ in range(2)]
    return nn.Sequential(*layers).to("cuda").to(memory_format=torch.channels_last)


def test_tune_makes_plans_first_and_auto_takes_what_won(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (x,) = leaves((4, 8, 6, 5))
    model = net()
    with tuning.mode("cached"):
        layers = tuning.fused_layers(model, x)
    counts: list[int] = []
    monkeypatch.setattr(command, "_bar", lambda cases, count, title, progress: (
        counts.append(count) if "cudnn" in title else None, cases)[1])  # fmt: skip
    monkeypatch.setattr(engines.ENGINES["triton"], "refuses", lambda x, layer: "not here")
    with tuning.mode("cached"):
        rows = list(command.tune(layers, x.device, clock=twice_as_fast(), progress=False))
        assert counts == [3], "plans of a forward, a dgrad and a wgrad"
        assert len(plan_files(tmp_path)) == 3
        assert {row.record.engine for row in rows} == {"cudnn"}
        with tuning.mode("off"):
            want = [model(x).detach().cpu()]
        STATE.executed.clear()
        y = model(x)
        close([y.detach().cpu()], want)
        y.sum().backward()
        assert len(STATE.executed) == 6
        assert {row.engine for row in explain(model, x).rows} == {"cudnn"}
        assert counts == [3]
        list(command.tune(layers, x.device, clock=twice_as_fast(), progress=False))
        assert counts == [3], "what is measured lacks nothing"


def test_what_has_no_plan_is_left_out_of_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    (x,) = leaves((4, 8, 6, 5))
    STATE.refused = lambda graph: "strided" if graph.steps[0].made_by[0] == "conv_dgrad" else None
    monkeypatch.setattr(engines.ENGINES["triton"], "refuses", lambda x, layer: "not here")
    with tuning.mode("cached"):
        layers = tuning.fused_layers(net(), x)
        rows = list(command.tune(layers, x.device, clock=twice_as_fast(), progress=False))
    text = command.text(rows)
    assert "cuDNN has no tensor-core plan for it" in text
    assert "strided" in text


def test_layers_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (t.detach() for t in leaves((2, 8, 6, 5), (8, 8, 3, 3)))
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)

    def why(x: Tensor, w: Tensor, how: Any = geometry) -> str:
        return ENGINE.why_not(x, layer_of(w, LEAKY, how)) or ""

    assert why(x, w) == ""
    assert "is not channels_last" in why(x.contiguous(), w)
    assert "got torch.float64" in why(x.double(), w.double())
    assert "linear layer" in why(x[:, :, 0, 0].contiguous(), w[:, :, 0, 0].contiguous(), None)
    assert "has no numbers" in why(x[:0], w)
    assert "serves CUDA tensors, got one on cpu" in why(x.cpu(), w.cpu())
    problem = problem_of(x, layer_of(w, LEAKY, geometry))
    old = problem._replace(capability=(7, 5))
    module = sys.modules[type(ENGINE).__module__]
    assert "compute capability 7.5, cuDNN's fused convolutions need 8.0" in module._why_never(old)
    monkeypatch.setattr(module, "_tf32", lambda: False)
    assert "round float32 to tf32" in why(x, w)
    assert why(x.bfloat16(), w.bfloat16()) == ""


def test_a_handle_and_a_plan_for_each_thread() -> None:
    x, w, b = (t.detach() for t in leaves((2, 8, 6, 5), (8, 8, 3, 3), (8,)))
    STATE.seconds = 0.2
    results: list[Tensor] = []

    def run() -> None:
        results.append(conv_act(x, w, b, LEAKY, engine="cudnn").cpu())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(STATE.built) == 1, "one thread makes it, the others wait"
    assert len(results) == 4
    assert all(torch.equal(r, results[0]) for r in results)


def test_compiled() -> None:
    """Traced whole, on torch's fakes, without a plan: what is compiled asks for it when it runs."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, w = (torch.empty(2, 8, 6, 5, device="cuda").to(memory_format=torch.channels_last)
                for _ in range(2))  # fmt: skip
        inputs = [x.requires_grad_(), w[..., :3, :3].clone().requires_grad_()]
        forward, backward = ops_of(lambda x, w: conv_act(x, w, None, GAIN, engine="cudnn"), *inputs)
    assert forward == {"cudnn_conv_act": 1}
    assert {name for name in backward if "cudnn" in name} == {
        "cudnn_conv_dgrad",
        "cudnn_conv_wgrad",
    }
    assert not STATE.built
