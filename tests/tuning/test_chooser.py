"""Tuning's modes: which layers are measured, when, and which are known from the cache."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fusedshape import conv_act, linear_act, tuning
from fusedshape.nn import ShapedLinear
from fusedshape.ops import choice
from fusedshape.ops.problem import Problem
from fusedshape.tuning import chooser, measuring
from tests.support.rivals import CPU, LEAKY, PROBLEM, RECORD, Rival, layer


def test_modes(rival: Rival, measured: list[str]) -> None:
    x, weight = layer()

    def step() -> list[Tensor]:
        rival.calls.clear()
        y = conv_act(x, weight, None, LEAKY, padding=1)
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]

    with tuning.mode("off"):
        want = step()
        assert choice.only_aten("auto", x)
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
    monkeypatch.setattr(choice, "_chooser", None)
    chooser._set("full")
    monkeypatch.setattr(choice, "problem_of", None)
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
    code = "from fusedshape.ops import choice; print(choice._chooser is None)"
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
