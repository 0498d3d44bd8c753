"""Across modules: convert and reweight_shortcuts do all or nothing, wherever they are stopped."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import convert, fold, reweight_shortcuts, theory
from fusedshape.convert import plan, replacing
from tests.support.interrupting import interrupted_at, state
from tests.support.places import ROOT


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.one(x)))


def make() -> nn.Module:
    layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True))
    return nn.Sequential(layers, Block(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def converted(model: nn.Module) -> None:
    convert(model, depth=20, strip_batchnorm=True, chain=True)


# What writes to a model once its conversion has been planned.
WRITERS = {plan.Plan.apply.__code__, replacing.swap.__code__}
CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "convert": converted,
    "reweight": lambda model: reweight_shortcuts(model, 0.0, drop_unused=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_interrupt_anywhere_changes_nothing(name: str) -> None:
    model = make()
    before = state(model)
    draws = random.Random(0)
    step, stopped = 1, True
    while stopped:
        stopped = interrupted_at(
            step, lambda: CHANGES[name](model), lambda code: "fusedshape" in code.co_filename
        )
        if stopped:
            assert state(model) == before, step
        step += draws.randrange(1, 9000)
    assert step > 20_000
    assert state(model) != before


def test_an_interrupt_at_any_write_changes_nothing() -> None:
    model = make()
    before = state(model)
    for step in range(1, 1000):
        stopped = interrupted_at(step, lambda: converted(model), lambda code: code in WRITERS)
        if not stopped:
            break
        assert state(model) == before, step
    assert step > 30


def test_what_cannot_be_written_is_refused_before_anything_is_drawn() -> None:
    def expanded(layer: nn.Linear) -> None:
        layer.weight = nn.Parameter(torch.zeros(1, 1).expand(4, 4))

    def inference(layer: nn.Linear) -> None:
        with torch.inference_mode():
            layer.bias = nn.Parameter(torch.zeros(4))

    for spoil, why in ((expanded, "weight .*share one place"), (inference, "bias .*inference")):
        for dry_run in (True, False):
            model = make()
            spoil(model[1].two)
            before = state(model)
            with pytest.raises(ValueError, match=rf"'1\.two' \(Linear\): its {why}"):
                convert(model, depth=20, strip_batchnorm=True, dry_run=dry_run)
            assert state(model) == before


def test_memory_shared_by_two_parameters_is_refused() -> None:
    model = make()
    flat = torch.randn(20)
    model[2].weight = nn.Parameter(flat[:16].view(4, 4))
    model[1].one.weight = nn.Parameter(flat[4:].view(4, 4))
    before = state(model)
    with pytest.raises(ValueError, match=r"'2\.weight' and '1\.one\.weight', which share memory"):
        convert(model, depth=20, strip_batchnorm=True)
    assert state(model) == before
    model[1].one.weight = nn.Parameter(flat[4:].view(4, 4).clone())
    convert(model, depth=20, strip_batchnorm=True)


def test_neighbours_in_one_piece_of_memory_are_fine() -> None:
    model = make()
    flat = torch.randn(32)
    model[2].weight = nn.Parameter(flat[:16].view(4, 4))
    model[1].one.weight = nn.Parameter(flat[16:].view(4, 4))
    convert(model, depth=20, strip_batchnorm=True)


def test_a_dry_run_names_the_layer_that_could_not_be_initialised() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, 6))
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"initialise '2' \(ConvTranspose2d\): .*stride"):
            convert(net, depth=20, dry_run=dry_run)


LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "dry_run": lambda model: convert(model, depth=20, init=None, dry_run=True),
    "no init": lambda model: convert(model, depth=20, init=None),
    "reweight": lambda model: reweight_shortcuts(model, 0.9),
    "wiring": theory.trace_wiring,
    "fold": fold,
}


# Imports once; then each look has a process of its own, as a write would end it.
PARENT = """
import os, sys, traceback
import numpy, torch
from torch import nn
from tests.test_atomic import LOOKS, Block

for name, look in LOOKS.items():
    child = os.fork()
    if not child:
        code = 1
        try:
            file = numpy.memmap(sys.argv[1], numpy.float32, "r", shape=(4, 4))
            model = nn.Sequential(Block(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
            model[1].weight = nn.Parameter(torch.from_numpy(file))
            look(model)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep=": ", flush=True)
"""


@pytest.fixture(scope="module")
def looks_at_read_only_weights(
    tmp_path_factory: pytest.TempPathFactory,
) -> subprocess.CompletedProcess[str]:
    path = tmp_path_factory.mktemp("read only") / "weights"
    path.write_bytes(torch.randn(4, 4).numpy().tobytes())
    command = [sys.executable, "-W", "ignore", "-c", PARENT, str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("name", LOOKS)
def test_read_only_weights_are_not_written(
    name: str, looks_at_read_only_weights: subprocess.CompletedProcess[str]
) -> None:
    done = looks_at_read_only_weights
    assert f"{name}: 0" in done.stdout.splitlines(), done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in LOOKS if name not in ("no init", "reweight")])
def test_looking_at_a_model_leaves_backward_alone(name: str) -> None:
    model = nn.Sequential(Block(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    loss = model(torch.randn(3, 4)).sum()
    LOOKS[name](model)
    loss.backward()


def test_a_filter_that_draws_and_raises_leaves_the_generator_alone() -> None:
    def draws(_name: str, _module: nn.Module) -> bool:
        torch.rand(1)
        raise ZeroDivisionError

    changes: list[Callable[[nn.Module], Any]] = [
        lambda model: convert(model, depth=20, strip_batchnorm=True, filter_fn=draws),
        lambda model: reweight_shortcuts(model, 0.9, filter_fn=draws),
    ]
    for change in changes:
        model = make()
        before = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            change(model)
        assert torch.equal(torch.get_rng_state(), before)
