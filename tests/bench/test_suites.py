"""The suites: their cases are right, named once, and cover the networks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from fusedshape.bench import cases, providers, records, suites
from fusedshape.bench.cases import CASES
from fusedshape.bench.runner import run_suite
from fusedshape.cli import main
from fusedshape.models import vanilla_vgg16


def test_every_smoke_case_is_right(smoke: Path) -> None:
    record = records.load(smoke)
    assert record["finished"]
    assert [row["case"] for row in record["rows"]] == [
        case.name for case in suites.SUITES["smoke"].cases()
    ]
    for row in record["rows"]:
        states = {name: c["status"] for name, c in row["candidates"].items() if name != "dks"}
        assert set(states.values()) == {"ok"}, row
        own = row["candidates"]["fused"]
        if "samples_ms" in own:
            assert own["ms"][0] <= own["ms"][1] <= own["ms"][2]
            assert len(own["samples_ms"]) >= 3
    layers = [row for row in record["rows"] if row["case"].startswith(("conv_act", "linear_act"))]
    assert layers
    for row in layers:
        assert {"fused/bare", "eager/fused", "folded/fused", "inplace/fused"} <= set(row["ratios"])
        assert row["candidates"]["fused"]["error"].keys() == {"y", "dx", "dweight", "dbias"}
        assert row["candidates"]["fused"]["of_copy"] > 0
        # What the choice of an engine is worth.
        assert "fused aten/fused" in row["ratios"]
    assert {fit["series"] for fit in record["fits"]} == {"solve TAT leaky_relu", "solve TAT tanh"}


def test_unknown_suite() -> None:
    with pytest.raises(ValueError, match="known: smoke, cpu, solver"):
        run_suite("fast")


def test_names_are_unique_and_every_suite_has_cases(capsys: pytest.CaptureFixture[str]) -> None:
    for name, suite in suites.SUITES.items():
        own = [case.name for case in suite.cases()]
        assert len(own) == len(set(own)) > 8
        assert main(["bench", "list", "--suite", name]) == 0
        assert capsys.readouterr().out.splitlines() == own
    groups = {case.group for case in CASES if {"cpu", "solver", "scaling"} & set(case.suites)}
    assert groups == {
        *("pointwise", "conv_act", "linear_act", "chain", "net"),
        *("constants", "overhead", "import", "scaling", "diagnose"),
    }
    json.dumps([case.parameters for case in CASES])


def test_the_gpu_suite_has_every_layer() -> None:
    """Layers of ResNet-50 and VGG-16 at two batches, in each mode, with both modes of compile."""
    found = {
        (tuple(p["shape"]), p["batch"], p["mode"])
        for p in (case.parameters for case in suites.SUITES["gpu"].cases("conv_act/leaky_relu/*"))
        if p["dtype"] == "bfloat16"
    }
    modes = ("forward", "backward", "step")
    wanted = itertools.product((*cases.RESNET50, *cases.VGG16), (32, 256), modes)
    assert found.issuperset(wanted)
    convolutions = {
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
        for m in vanilla_vgg16().modules()
        if isinstance(m, torch.nn.Conv2d)
    }
    assert {shape[:4] for shape in cases.VGG16} == convolutions
    assert suites.SUITES["gpu"].compiled == tuple(providers.COMPILED)
