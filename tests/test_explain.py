"""explain says what really computes, and leaves the model as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fusedshape import ShapedChain, ShapedConv2d, ShapedLinear, explain, native, tuning
from fusedshape.cli import main
from fusedshape.ops import choice
from fusedshape.tuning import chooser
from fusedshape.tuning.cache import Record
from tests.support.backends import INTERPRET
from tests.support.operands import LEAKY

LAST = torch.channels_last
NATIVE = pytest.mark.skipif(INTERPRET or not native.available(), reason="csrc is not built")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path / "cache"))
    tuning.mode("cached")


def net(**how: object) -> nn.Sequential:
    layers = ShapedConv2d(64, 64, 1, spec=LEAKY, **how), nn.BatchNorm2d(64)
    return nn.Sequential(*layers, ShapedConv2d(64, 64, 1, spec=LEAKY, **how)).to(memory_format=LAST)


def images(batch: int = 8) -> Tensor:
    return torch.randn(batch, 64, 8, 8).to(memory_format=LAST)


def computed(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The engine of each direction that is asked for when the model runs."""
    seen = []
    choose = choice.choose_engine

    def spy(direction: str, *rest: object) -> str:
        seen.append((direction, choose(direction, *rest)))
        return seen[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(choice, "choose_engine", spy)
        patch.setattr(choice, "_remembers", False)
        model(x).sum().backward()
    return seen


@NATIVE
@pytest.mark.parametrize("measured", [None, "aten", "native"])
def test_it_is_what_computes(measured: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), images().requires_grad_()
    if measured is not None:
        problem = tuning.fused_layers(model, x)[0].problem
        for direction in ("fprop", "dgrad", "wgrad"):
            record = Record(measured, None, 8, base_seconds=2e-5, seconds=1e-5)
            chooser.keep(direction, problem, torch.device("cpu"), record)
        chooser.forget()
    rows = explain(model, x).rows
    assert [(r.direction, r.engine) for r in rows] == computed(model, x, monkeypatch)
    engine = measured or "native"
    assert {r.engine for r in rows} == {engine}
    reasons = {r.reason for r in rows}
    assert (
        reasons
        == {
            None: {"pinned, not measured"},
            "aten": {"measured, 20.0 µs: nothing is faster"},
            "native": {"measured, 10.0 µs against 20.0 µs of aten"},
        }[measured]
    )
    for row in rows:
        assert set(row.others) == {"aten", "native", "triton", "cudnn"} - {engine}
        assert row.others["triton"].startswith("backend 'triton' serves CUDA tensors")


@NATIVE
def test_small_inputs_and_layouts() -> None:
    rows = explain(net(), images(2)).rows
    assert {(r.engine, r.reason) for r in rows} == {("aten", "not worth a choice")}
    assert "too few to be worth a choice" in rows[0].others["native"]
    rows = explain(net().to(memory_format=torch.contiguous_format), images().contiguous()).rows
    assert {r.engine for r in rows} == {"aten"}
    assert "is not channels_last" in rows[0].others["native"]


def test_an_engine_that_is_asked_for() -> None:
    rows = explain(net(engine="aten"), images()).rows
    assert {(r.engine, r.reason) for r in rows} == {("aten", "asked for")}
    assert {explain(net(backend="reference"), images()).rows[0].reason} == {"asked for"}
    with pytest.raises(ValueError, match="'0': engine 'triton' cannot run this layer: backend"):
        explain(net(engine="triton"), images())


def test_inputs_by_name_and_in_structures() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, batch: dict[str, Tensor], *, scale: Tensor) -> Tensor:
            return self.net(batch["x"]) * scale

    model, batch, scale = Scaled(), {"x": images()}, torch.ones(())
    expected = [(f"net.{row.layer}", row.engine) for row in explain(model.net, images()).rows]
    assert [(row.layer, row.engine) for row in explain(model, batch, scale=scale).rows] == expected
    assert len(tuning.fused_layers(model, batch, scale=scale)) == 2


@pytest.mark.parametrize("ask", [explain, tuning.fused_layers])
def test_a_lazy_model_is_refused_by_name(ask: Callable[..., object]) -> None:
    model = nn.Sequential(nn.LazyConv2d(64, 1), *net())
    with pytest.raises(
        ValueError, match=r"'0\.weight' is lazy, it has no shape yet; run the model"
    ):
        ask(model, images())
    assert isinstance(model[0], nn.LazyConv2d)


def test_chains_and_other_devices() -> None:
    chain = ShapedChain(*(ShapedLinear(8, 8, spec=LEAKY) for _ in range(3)))
    rows = explain(chain, torch.zeros(4, 8)).rows
    assert [r.direction for r in rows if "dgrad" in r.direction] == ["dgrad_act", "dgrad_act"]
    meta = explain(net().to("meta"), images().to("meta"))
    assert {(r.engine, r.reason) for r in meta.rows} == {("aten", "the only one that can")}
    assert "one on meta" in meta.rows[0].others["native"]


class Looks(nn.Module):
    """A model that looks at its numbers, so that it must really run."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > -1e9:
            self.calls.append(1)
        return self.body(x + torch.rand(()))


@pytest.mark.parametrize("make", [net, Looks])
def test_the_model_stays_as_it_was(make: type[nn.Module]) -> None:
    model, x = make(), images()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    draws = torch.get_rng_state()
    with tuning.mode("full"):
        explain(model, x)
    assert tuning.status()["tuning_entries"] == 0, "nothing was measured"
    assert torch.equal(torch.get_rng_state(), draws)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert getattr(model, "calls", []) == []


def test_it_is_a_table_and_data() -> None:
    found = explain(net(), images(2))
    table = str(found).splitlines()
    assert table[0].split() == ["layer", "direction", "input", "weight", "engine", "because"]
    assert len(table) > 1 + len(found.rows)
    assert any(line.startswith("not triton: ") and line.endswith("]") for line in table)
    data = json.loads(json.dumps(found.to_dict()))
    assert len(data["rows"]) == len(found.rows) == 5
    assert sorted(data["rows"][0]) == [
        *("direction", "engine", "layer", "others", "problem", "reason"),
    ]
    with pytest.raises(ValueError, match="no fused layers"):
        explain(nn.Linear(2, 2), torch.zeros(1, 2))


def test_info_prints_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "explained.py").write_text(
        "from fusedshape import ActSpec, ShapedConv2d\n"
        "def net():\n    return ShapedConv2d(3, 8, 3, spec=ActSpec('relu'))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["info", "--model", "explained:net", "--input", "2,3,8,8"]) == 0
    assert ".      fprop" in capsys.readouterr().out
    assert main(["info", "--model", "explained:net", "--input", "2,3,8,8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["engine"] == "aten"
    with pytest.raises(SystemExit, match="2"):
        main(["info", "--model", "explained:net"])
    assert "--model and --input belong together" in capsys.readouterr().err


def test_it_says_nothing_but_its_table_and_works_in_inference_mode(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = nn.Sequential(ShapedLinear(4, 4, spec=LEAKY), ShapedLinear(4, 4, spec=LEAKY))
    want = explain(model, torch.ones(2, 4))
    with torch.inference_mode():
        assert explain(model, torch.ones(2, 4)) == want
    assert [row.direction for row in want.rows] == ["fprop", "wgrad", "fprop", "dgrad", "wgrad"]
    assert not recwarn.list
