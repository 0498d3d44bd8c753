"""Training: configuration, data, the loop, resuming, the demo and the sweep."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedshape.files import without_checksum
from fusedshape.loading import load_object, make
from fusedshape.machine import write_json
from fusedshape.nn import PerLocationNorm, ShapedConv2d
from fusedshape.train import Data, TrainConfig, demo, loop, plot, run
from fusedshape.train.loop import build, evaluate, fit, learning_rate
from tests.support.training import BLOBS, blobs


def exploding(in_channels: int, num_classes: int) -> nn.Module:
    """Two layers, and a loss that turns NaN."""

    class Poison(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.where(x.sum() == x.sum(), math.nan, 1.0)

    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 16, num_classes), Poison())


def with_dropout(in_channels: int, num_classes: int) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(in_channels * 16, 8), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(8, num_classes))


def no_module(in_channels: int, num_classes: int) -> int:
    return in_channels


HERE = __name__
TINY = TrainConfig(
    data=BLOBS, depth=6, width=8, epochs=4, batch_size=16, lr=3e-3, eta=0.5, threads=1
)


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path / "checkpoint.pt", weights_only=True)["model"]


def test_config_survives_its_file(tmp_path: Path) -> None:
    config = TrainConfig(
        model="a.b:c", data="d:e", lr=0.1 + 0.2, eta=0.8, threads=3, amp="bfloat16"
    )
    config.save(tmp_path / "c.json")
    assert TrainConfig.load(tmp_path / "c.json") == config
    assert TrainConfig.from_json('{"depth": 3, "lr": 1}').lr == 1.0


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"depth": 3, "learning_rate": 1}, ValueError, r"unknown field\(s\) \['learning_rate'\]"),
        ({"depth": 0}, ValueError, "depth=0 must be finite and in 1"),
        ({"depth": 2.0}, TypeError, "depth must be a whole number, got 2.0"),
        ({"depth": True}, TypeError, "depth must be a whole number, got True"),
        ({"depth": 3, "lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"depth": 3, "lr": 0}, ValueError, "lr=0"),
        ({"depth": 3, "lr": math.nan}, ValueError, "lr=nan"),
        ({"depth": 3, "epochs": 0}, ValueError, "epochs=0"),
        ({"depth": 3, "batch_size": -1}, ValueError, "batch_size=-1"),
        ({"depth": 3, "seed": -1}, ValueError, "seed=-1"),
        ({"depth": 3, "momentum": 1}, ValueError, "momentum=1"),
        ({"depth": 3, "label_smoothing": 1}, ValueError, "label_smoothing=1"),
        ({"depth": 3, "eta": 1.5}, ValueError, r"eta must be in \(0, 1\), got 1.5"),
        ({"depth": 3, "method": "tat"}, ValueError, "method='tat'; known: 'TAT', 'DKS', 'EOC'"),
        ({"depth": 3, "method": ["TAT"]}, ValueError, "method="),
        ({"depth": 3, "init": "xavier"}, ValueError, "init='xavier'; known: 'suo'"),
        ({"depth": 3, "optimiser": "adamw"}, ValueError, "optimiser='adamw'"),
        ({"depth": 3, "schedule": "step"}, ValueError, "schedule='step'"),
        ({"depth": 3, "amp": "float16"}, ValueError, "amp='float16'; known: 'bfloat16', null"),
        ({"depth": 3, "pln": 1}, TypeError, "pln must be true or false"),
        ({"depth": 3, "activation": 1}, TypeError, "activation must be a string"),
        ({"depth": 3, "model": "resnet"}, ValueError, "model='resnet'; known: 'convnet', 'mlp'"),
        ({"depth": 3, "model": "a b:c"}, ValueError, "model='a b:c'"),
        ({"depth": 3, "data": "mnist"}, ValueError, "data='mnist'; known: 'digits'"),
        ({"depth": 3, "method": "EOC", "gain": 2}, ValueError, "EOC decides the scale.*gain=2"),
        ({"depth": 3, "zeta": 1.2}, ValueError, "TAT of leaky_relu aims at eta, not at zeta"),
        ({"depth": 3, "method": "DKS", "eta": 0.8}, ValueError, "DKS .* at zeta, not at eta"),
        ({"depth": 3, "method": None, "tau": 1}, ValueError, "null aims at nothing, not at tau"),
        ({}, ValueError, "model 'convnet' needs a depth"),
        ([], ValueError, "expected a JSON object"),
    ],
)
def test_config_refuses(tmp_path: Path, values: object, error: type[Exception], match: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(values))
    with pytest.raises(error, match=match):
        TrainConfig.load(path)
    with pytest.raises(error, match=str(path)):
        TrainConfig.load(path)


def test_config_refuses_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match=r"c\.json"):
        TrainConfig.load(tmp_path / "c.json")
    with pytest.raises(OSError, match="nowhere"):
        TrainConfig.load(tmp_path / "nowhere.json")


def fails() -> Data:
    raise KeyError("pixels")


def test_a_users_error_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"fails raised KeyError: 'pixels' \(.*test_train.py"):
        fit(replace(TINY, data=f"{HERE}:fails"))
    with pytest.raises(TypeError, match="no function or class"):
        make("math:pi")


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "meta"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}'"):
        fit(replace(TINY, device=device))


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each process would train the same model and write to the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun has started 2"):
        run(TINY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    config = replace(TINY, epochs=1)
    run(config, tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for damaged in (b"", b"garbage", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt .*remove that file to start anew"):
            run(config, tmp_path)
        assert path.read_bytes() == damaged
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="remove that file"):
        run(config, tmp_path)


def test_an_interrupted_epoch_goes_on_from_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(TINY, tmp_path / "whole")
    train = loop._train_epoch

    def interrupted(config: TrainConfig, epoch: int, *rest: Any) -> float:
        loss = train(config, epoch, *rest)
        if epoch == 2:
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(loop, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(TINY, tmp_path / "parts")
    monkeypatch.setattr(loop, "_train_epoch", train)
    assert len(json.loads((tmp_path / "parts/result.json").read_text())["epochs"]) == 2
    parts = run(TINY, tmp_path / "parts")
    assert [e["train_loss"] for e in parts["epochs"]] == [e["train_loss"] for e in whole["epochs"]]
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_load_object() -> None:
    assert load_object("os.path:join")
    with pytest.raises(ValueError, match="'math' has no 'pie'"):
        load_object("math:pie")
    with pytest.raises(ValueError, match=r"form pkg\.module:name"):
        load_object("math.pi")


def test_digits_are_standardised_stratified_and_always_the_same() -> None:
    pytest.importorskip("sklearn")
    data = loop.digits()
    assert data.train_x.shape == (1437, 1, 8, 8)
    assert data.test_x.shape == (360, 1, 8, 8)
    assert data.train_x.dtype == torch.float32
    # In float32 a mean of 92,000 numbers of unit variance is off by less than 1e-5.
    assert abs(data.train_x.mean().item()) < 1e-5
    assert data.train_x.std().item() == pytest.approx(1, abs=1e-5)
    share = data.test_y.bincount() / data.train_y.bincount()
    assert (share - 360 / 1437).abs().max() < 0.01
    seen = {bytes(x.numpy().tobytes()) for x in data.train_x}
    assert not any(bytes(x.numpy().tobytes()) in seen for x in data.test_x)
    assert torch.equal(data.train_x, loop.digits().train_x)


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'fusedshape\[data\]'"):
        loop.digits()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train_y": torch.zeros(3, dtype=torch.int64)}, "one label per example"),
        ({"test_x": torch.zeros(0, 1, 4, 4)}, "at least one example"),
        ({"test_y": torch.full((32,), 4)}, "int64 in 0 … 3"),
        ({"train_x": torch.zeros(64, 1, 4, 4, dtype=torch.int64)}, "needs floating"),
        ({"test_x": torch.zeros(32, 1, 5, 5)}, "shape"),
    ],
)
def test_data_refuses(change: dict[str, Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(blobs(), **change)


def test_build_converts_initialises_and_normalises() -> None:
    model = build(TINY, blobs())
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[0], PerLocationNorm)
    convs = [m for m in model.modules() if isinstance(m, ShapedConv2d)]
    assert len(convs) == 6
    centre = convs[3].weight[:, :, 1, 1]
    torch.testing.assert_close(centre @ centre.T, torch.eye(8), atol=1e-6, rtol=0)
    other = build(replace(TINY, seed=1), blobs())
    again = build(TINY, blobs())
    pairs = zip(model.parameters(), other.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, c) for a, _, c in pairs)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))


def test_build_without_method_keeps_relu_and_applies_the_gain() -> None:
    config = replace(TINY, method=None, eta=None, gain=math.sqrt(2))
    model = build(config, blobs())
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 6
    conv = [m for m in model.modules() if isinstance(m, nn.Conv2d)][3]
    centre = conv.weight[:, :, 1, 1]
    torch.testing.assert_close(centre @ centre.T, 2 * torch.eye(8), atol=1e-6, rtol=0)


def test_build_eoc_draws_biases() -> None:
    config = replace(TINY, method="EOC", activation="tanh", eta=None, sigma_b=0.2, width=64)
    model = build(config, blobs())
    biases = torch.cat([m.bias for m in model.modules() if isinstance(m, ShapedConv2d)])
    # 384 draws: relative standard error of the standard deviation √(1/768).
    assert biases.std().item() == pytest.approx(0.2, rel=5 / math.sqrt(768))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"model": "mlp", "lr": 1e-2},
        {"optimiser": "sgd", "lr": 0.05, "schedule": "constant"},
        {"method": "DKS", "activation": "softplus", "eta": None},
        {"amp": "bfloat16", "channels_last": False, "label_smoothing": 0.1},
    ],
    ids=["tat", "mlp", "sgd", "dks", "amp"],
)
def test_loss_falls(change: dict[str, Any]) -> None:
    result = fit(replace(TINY, epochs=8, **change))
    losses = [epoch["train_loss"] for epoch in result["epochs"]]
    assert result["status"] == "done"
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    assert result["final_accuracy"] == result["epochs"][-1]["test_accuracy"]
    assert result["best_accuracy"] >= result["final_accuracy"]


@pytest.mark.parametrize("model", ["convnet", f"{HERE}:with_dropout"])
def test_resuming_gives_bitwise_the_same_weights(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, model=model)
    if model != "convnet":
        config = replace(config, method=None, depth=None, eta=None)
    whole = run(config, tmp_path / "whole")

    real = loop.evaluate
    calls = 0

    def interrupted(*args: Any) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "parts")
    kept = json.loads((tmp_path / "parts/result.json").read_text())
    assert kept["status"] == "running"
    assert len(kept["epochs"]) == 2
    monkeypatch.setattr(loop, "evaluate", real)
    parts = run(config, tmp_path / "parts")
    for a, b in zip(
        weights(tmp_path / "whole").values(), weights(tmp_path / "parts").values(), strict=True
    ):
        assert torch.equal(a, b)
    for a, b in zip(whole["epochs"], parts["epochs"], strict=True):
        assert a["train_loss"] == b["train_loss"]
        assert a["test_accuracy"] == b["test_accuracy"]
    # A finished run is not trained again.
    monkeypatch.setattr(loop, "evaluate", None)
    assert run(config, tmp_path / "parts")["epochs"] == parts["epochs"]


def test_training_leaves_global_state_alone() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    fit(replace(TINY, epochs=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_another_configuration_is_refused_its_folder(tmp_path: Path) -> None:
    run(replace(TINY, epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"another configuration \(different: lr, seed\)"):
        run(replace(TINY, epochs=1, lr=1.0, seed=2), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    config = replace(TINY, model=f"{HERE}:exploding", method=None, depth=None, eta=None)
    result = run(config, tmp_path)
    assert result["status"] == "diverged"
    assert len(result["epochs"]) == 1
    assert result["epochs"][0]["train_loss"] is None
    assert result["best_accuracy"] is None
    text = (tmp_path / "result.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == result


def test_a_factory_must_return_a_module() -> None:
    with pytest.raises(TypeError, match="no_module returned int"):
        build(replace(TINY, model=f"{HERE}:no_module", depth=None), blobs())
    with pytest.raises(TypeError, match=r"returned .*, not a Data"):
        loop.load_data(replace(TINY, data="os:getcwd"))


def test_evaluate_counts_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EVAL_BATCH", 7)
    data = blobs()
    logits = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits[x[:, 0, 0, 0].long()]

    x = torch.arange(32.0).view(32, 1, 1, 1)
    loss, accuracy = evaluate(Table(), x, data.test_y, TINY)
    expected = nn.functional.cross_entropy(logits.double(), data.test_y).item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert accuracy == (logits.argmax(1) == data.test_y).float().mean().item()


def test_one_cycle() -> None:
    config = replace(TINY, lr=2.0)
    rates = [learning_rate(config, step, 101) for step in range(101)]
    assert rates[0] == pytest.approx(2 / 25)
    assert rates[30] == max(rates) == pytest.approx(2)
    assert rates[-1] == pytest.approx(2 / 250_000)
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert [learning_rate(config, 0, 1), learning_rate(replace(config, schedule="constant"), 5, 9)]
    assert learning_rate(replace(config, schedule="constant"), 5, 9) == 2


def test_write_json_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "digits", blobs)


def read_back(path: Path) -> dict[str, Any]:
    return without_checksum(json.loads(path.read_text()), str(path))


def test_demo_writes_table_json_and_plot(tiny_data: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines: list[str] = []
    out = demo.run_demo(
        tmp_path, demo.Demo(depth=16, width=4, epochs=4, threads=1), progress=lines.append
    )
    assert read_back(tmp_path / "demo.json") == out
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert [(row["arm"], len(row["epochs"])) for row in out["rows"]] == [
        ("TAT leaky_relu", 4),
        ("ReLU orthogonal", 1),
    ]
    assert any(torch.__version__ in line for line in lines)
    for row in out["rows"]:
        assert any(f"{row['final_accuracy']:.1%}" in line for line in lines)
    assert {"machine", "command", "commit", "dirty", "date"} <= set(out["header"])


def test_an_interrupted_sweep_goes_on(
    tiny_data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweep.json"
    plan = demo.Sweep(
        depths=(16,),
        arms=("TAT leaky_relu", "ReLU He"),
        learning_rates=(1e-4, 1e-2),
        seeds=(0, 1),
        epochs=4,
        width=4,
    )
    options: dict[str, Any] = {"jobs": 1, "progress": lambda line: None}
    real, trained = demo.fit, []

    def counted(config: TrainConfig) -> Any:
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(config)
        return real(config)

    monkeypatch.setattr(demo, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        demo.run_sweep(path, plan, **options)
    assert len(json.loads(path.read_text())["rows"]) == 5
    monkeypatch.setattr(demo, "fit", lambda config: trained.append(config) or real(config))
    data = demo.run_sweep(path, plan, **options)
    assert read_back(path) == data
    assert len(trained) == len(set(trained)) == len(data["rows"]) == 2 * 2 + 2 * 2 + 2
    assert [row["header"] for row in data["rows"]] == [0] * 5 + [1] * 5
    full = [row for row in data["rows"] if row["purpose"] == "full"]
    assert {len(row["epochs"]) for row in full} == {4}
    assert {len(row["epochs"]) for row in data["rows"] if row["purpose"] == "rate"} == {1}
    for arm in plan.arms:
        first = [row for row in full if row["arm"] == arm and row["seed"] == 0]
        (second,) = [row for row in full if row["arm"] == arm and row["seed"] == 1]
        best = min(first, key=lambda row: row["final_train_loss"])
        assert len(first) == 2
        assert second["lr"] == best["lr"]
        assert demo.final_runs(data)[16][arm] == [best, second]
    assert {p.name for p in tmp_path.iterdir()} == {"sweep.json", "sweep.png", "sweep-16.png"}
    assert all(arm in demo.summary(data) for arm in plan.arms)
    demo.run_sweep(path, plan, **options)
    assert len(trained) == 10


@pytest.mark.slow
def test_sweep_in_processes(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    data = demo.run_sweep(
        tmp_path / "sweep.json",
        demo.Sweep(
            depths=(2,),
            arms=("ReLU He",),
            learning_rates=(1e-3, 1e-2),
            seeds=(0,),
            epochs=1,
            width=2,
        ),
        jobs=2,
        progress=lambda line: None,
    )
    assert [row["purpose"] for row in data["rows"]] == ["rate", "rate", "full", "full"]


def test_sweep_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown arms \['GELU'\]"):
        demo.Sweep(arms=("GELU",))
    with pytest.raises(ValueError, match="at least one"):
        demo.Sweep(seeds=())
    (tmp_path / "s.json").write_text("[]")
    with pytest.raises(ValueError, match="no sweep's file"):
        demo.run_sweep(tmp_path / "s.json")


def test_best_rates_put_diverged_runs_last() -> None:
    rows = [
        {"lr": 0.1, "final_train_loss": None},
        {"lr": 0.01, "final_train_loss": 0.5},
        {"lr": 0.001, "final_train_loss": 0.7},
    ]
    assert demo.best_rates(rows) == [0.01, 0.001, 0.1]
    assert demo.best_rates([rows[0], {"lr": 0.01, "final_train_loss": None}]) == [0.01, 0.1]


def test_labels_of_lines_that_end_together_stand_apart() -> None:
    for ends in ([0.991, 0.985, 0.866, 0.853, 0.101, 0.1], [0.5], [], [0.0] * 6, [1.0] * 6):
        heights = plot.labels_apart(ends, 0.06)
        gaps = [a - b for a, b in itertools.pairwise(heights)]
        assert len(heights) == len(ends)
        assert all(gap > 0.0599 for gap in gaps)
        assert all(0 <= height <= 1 for height in heights)
    assert plot.labels_apart([0.9, 0.5], 0.06) == [0.9, 0.5]


def test_plots_without_matplotlib_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fusedshape\[plot\]'"):
        demo.plot_curves({}, tmp_path / "a.png")
    assert run(replace(TINY, epochs=1), tmp_path)["status"] == "done"
