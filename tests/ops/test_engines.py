"""The table of engines: what one line in it is enough for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fusedshape import ShapedConv2d, ShapedLinear, conv_act, explain, linear_act, native, tuning
from fusedshape.ops import choice, dispatch, engines
from fusedshape.ops.engines.aten import Aten
from fusedshape.ops.engines.protocol import LayerEngine, through
from fusedshape.ops.layer import Before, Layer, share
from fusedshape.ops.problem import Problem
from fusedshape.tuning import command
from tests.support.operands import LEAKY
from tests.support.rivals import CPU, steady

X, W, B = torch.randn(8, 8), torch.randn(4, 8) / 3, torch.randn(4)


class Toy(LayerEngine):
    """Linear layers by einsum; all that an engine must say for itself, and no more."""

    name = "toy"
    devices = ("cpu",)
    pinned = True

    def __init__(self) -> None:
        self.calls: list[str] = []

    def why_not(self, x: Tensor, layer: Layer) -> str | None:
        return None if layer.geometry is None else "it is a convolution, toy has linear layers only"

    def prefers(self, problem: Problem) -> bool:
        return len(problem.weight) == 2

    def fprop(self, x: Tensor, layer: Layer, bias: Tensor | None = None) -> Tensor:
        self.calls.append("fprop")
        z = torch.einsum("...i,oi->...o", x, layer.weight)
        if bias is not None:
            z = z + bias
        if layer.shortcut is not None:
            z = z + share(layer.shortcut.weight) * layer.shortcut.residual
        return z

    def dgrad(
        self, dz: Tensor, x: Tensor, layer: Layer, before: Before | None
    ) -> tuple[Tensor, Tensor | None]:
        self.calls.append("dgrad")
        return through(torch.einsum("...o,oi->...i", dz, layer.weight), layer, before)

    def wgrad(self, dz: Tensor, x: Tensor, layer: Layer) -> Tensor:
        self.calls.append("wgrad")
        return torch.einsum("...o,...i->oi", dz, x)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Toy]:
    """A registered engine, taken out of the tables afterwards."""
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path))
    tables = engines.ENGINES, engines.RIVALS, engines.BACKENDS, engines.PASSES
    before = [dict(table) for table in tables]
    one = Toy()
    engines.register(one)
    with tuning.mode("cached"):
        yield one
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    choice.forget_choices()


def step(engine: str) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (X, W, B)]
    y = linear_act(*leaves, LEAKY, engine=engine)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def test_it_is_chosen(toy: Toy) -> None:
    want = step("aten")
    for engine in ("toy", "auto"):
        toy.calls.clear()
        for g, t in zip(step(engine), want, strict=True):
            torch.testing.assert_close(g, t)
        assert toy.calls == ["fprop", "dgrad", "wgrad"]
    assert ShapedLinear(8, 4, spec=LEAKY, engine="toy")(X).shape == (8, 4)
    assert "toy" in choice.engine_names()
    assert "toy" not in dispatch.backend_names()


def test_it_is_refused(toy: Toy) -> None:
    x, w = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1)
    with pytest.raises(ValueError, match="engine 'toy' cannot run this layer: it is a convolution"):
        conv_act(x, w, None, LEAKY, engine="toy")
    assert conv_act(x, w, None, LEAKY).shape == (1, 2, 3, 3)
    with pytest.raises(ValueError, match="engine 'toy' cannot run under torch"):
        torch.func.vmap(lambda x: linear_act(x, W, B, LEAKY, engine="toy"))(X)
    with pytest.raises(ValueError, match="there is an engine 'toy' already"):
        engines.register(Toy())


def test_it_is_tuned(toy: Toy) -> None:
    model = nn.Sequential(ShapedLinear(8, 4, spec=LEAKY))
    (call,) = tuning.fused_layers(model, X)
    result = tuning.measure("fprop", call.problem, CPU, steady(0.5))
    assert result.record is not None
    assert result.record.engine == "toy"
    conv = nn.Sequential(ShapedConv2d(2, 2, 1, spec=LEAKY))
    found = tuning.fused_layers(conv, torch.ones(1, 2, 3, 3))
    text = command.text(list(command.tune(found, CPU, dry_run=True, progress=False)))
    assert "left out: toy: engine 'toy' cannot run this layer: it is a convolution" in text


def test_it_is_explained(toy: Toy) -> None:
    model = nn.Sequential(
        ShapedLinear(8, 4, spec=LEAKY), ShapedLinear(4, 4, spec=LEAKY, engine="aten")
    )
    rows = explain(model, X).rows
    assert [(row.layer, row.direction, row.engine) for row in rows] == [
        *(("0", "fprop", "toy"), ("0", "wgrad", "toy")),
        *(("1", direction, "aten") for direction in ("fprop", "dgrad", "wgrad")),
    ]
    assert rows[0].reason == "pinned, not measured"
    assert rows[-1].others["toy"] == "the layer asks for aten"


@pytest.mark.parametrize("call", [lambda e: linear_act(X, W, B, LEAKY, engine=e), None])
def test_an_unknown_engine_is_an_error(call: object) -> None:
    """Also where plain PyTorch serves, and nobody would have looked for it."""
    run = call or torch.func.vmap(lambda x: linear_act(x, W, B, LEAKY, engine="cublas"))
    argument = "cublas" if call else X
    with pytest.raises(ValueError, match="unknown engine 'cublas'; known: auto, aten, triton"):
        run(argument)  # type: ignore[operator]


def test_the_tables_follow_from_the_engines() -> None:
    assert list(engines.ENGINES) == ["aten", "triton", "native", "cudnn"]
    for device, rivals in engines.RIVALS.items():
        assert all(device in engine.devices for engine in rivals)
    for engine in engines.ENGINES.values():
        assert engines.ENGINES[engine.name] is engine
        assert all(engine in engines.RIVALS[device] for device in engine.devices)
        assert engine.backend is None or engines.BACKENDS[engine.name] is engine.backend
    assert isinstance(engines.ATEN, Aten)
    assert engines.ATEN.plain


@pytest.mark.skipif(native.available(), reason="csrc is built")
def test_without_csrc_the_reference_serves() -> None:
    assert dispatch.choose("auto", X).name == "reference"
