"""diagnose: healthy nets agree with the theory, and the model stays as it was."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedshape
from fusedshape import (
    PerLocationNorm,
    theory,
)
from fusedshape.diagnose import diagnose
from fusedshape.models.vanilla import vanilla_convnet
from tests.support.nets import assert_finds, converted, initialised, mlp


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("depth", "kwargs"),
    [
        (50, {"method": "TAT", "activation": "leaky_relu"}),
        (100, {"method": "TAT", "activation": "leaky_relu"}),
        (100, {"method": "TAT", "activation": "tanh"}),
        (50, {"method": "DKS", "activation": "softplus"}),
        (100, {"method": "DKS", "activation": "leaky_relu"}),
        (50, {"method": "TAT", "activation": "gelu", "init": "gaussian"}),
    ],
)
def test_healthy_mlps_agree(depth: int, kwargs: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    found = diagnose(converted(mlp(depth), **kwargs), torch.randn(32, 32))
    assert found.agrees, found.verdict
    assert found.verdict.endswith("agree")
    assert sum(row.op == "nonlinear" for row in found.layers) == depth
    assert not found.notes


@pytest.mark.parametrize("seed", range(2))
def test_healthy_convnet_on_images_with_empty_pixels(seed: int) -> None:
    torch.manual_seed(seed)
    net = converted(vanilla_convnet(50, 64))
    net = nn.Sequential(PerLocationNorm(), net)
    images = torch.randn(16, 1, 8, 8) * (torch.rand(16, 1, 8, 8) < 0.4)
    found = diagnose(net, images)
    assert found.agrees, found.verdict
    (norm,) = (row for row in found.layers if row.op == "norm")
    assert norm.path == "0"
    assert norm.q_measured == pytest.approx(1)


def test_healthy_edge_of_chaos() -> None:
    found = diagnose(converted(mlp(20), method="EOC", activation="tanh"), torch.randn(32, 32))
    assert found.agrees, found.verdict
    assert found.sigma_w == pytest.approx(theory.eoc("tanh").sigma_w, rel=0.05)
    assert "own scale" in found.notes[0]


def test_every_number_follows_from_theory_or_data() -> None:
    spec = theory.solve("TAT", "leaky_relu", depth=40)
    x = torch.randn(64, 256)
    found = diagnose(converted(mlp(40, 256, 256)), x)
    first, *rest = found.layers
    assert (first.path, first.op, first.channels) == ("input", "input", 256)
    assert first.q_measured == pytest.approx(x.square().mean().item(), rel=1e-5)
    pairs = F.cosine_similarity(x[:32], x[32:], dim=1)
    assert first.c_measured == pytest.approx(pairs.mean().item(), abs=1e-5)
    assert first.q_quantiles[2] == pytest.approx(x.square().mean(1).median().item(), rel=0.02)
    c, q = pairs.double(), x.square().mean().item()
    for row in rest[:-1]:
        if row.op == "nonlinear":
            c = torch.tensor([theory.c_map(spec, v) for v in c.tolist()])
        assert row.q == pytest.approx(q, rel=1e-5)
        assert row.c == pytest.approx(c.mean().item(), abs=1e-5)
        assert row.sensitivity == pytest.approx(1.0, rel=1e-3)
    assert rest[-2].sensitivity_measured == pytest.approx(1.0, abs=0.9)
    assert rest[-2].c_measured == pytest.approx(rest[-2].c, abs=5 * rest[-2].c_spread)


def test_sensitivity_of_a_net_that_amplifies() -> None:
    spec = theory.solve("DKS", "tanh", depth=2, zeta=4.0)
    net = nn.Sequential(
        *(m for _ in range(4) for m in (nn.Linear(512, 512), fusedshape.ShapedActivation(spec)))
    )
    found = diagnose(initialised(net), torch.randn(32, 512))
    last = found.layers[-1]
    assert last.slope == pytest.approx(2.0, rel=0.01)
    assert last.sensitivity == pytest.approx(16.0, rel=0.05)
    assert last.sensitivity_measured == pytest.approx(last.sensitivity, rel=0.4)


def test_a_net_without_activation() -> None:
    found = diagnose(
        initialised(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))), torch.randn(8, 64)
    )
    assert found.agrees
    assert "no nonlinear layer" in found.notes[0]


def test_backends_and_chains_give_the_same_numbers() -> None:
    spec = theory.solve("TAT", "tanh", depth=10)
    layers = [fusedshape.ShapedConv2d(16, 16, 3, padding=1, spec=spec) for _ in range(4)]
    plain = [
        m
        for layer in layers
        for m in (nn.Conv2d(16, 16, 3, padding=1), fusedshape.ShapedActivation(spec, "reference"))
    ]
    chain = initialised(fusedshape.ShapedChain(*layers))
    plain_net = nn.Sequential(*plain)
    for layer, twin in zip(layers, plain_net[::2], strict=True):
        twin.load_state_dict(layer.state_dict())
    x = torch.randn(8, 16, 6, 6)
    one, two = diagnose(chain, x), diagnose(plain_net, x)
    assert one.agrees
    assert two.agrees
    assert [r.op for r in one.layers] == [r.op for r in two.layers]
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.q == pytest.approx(b.q, rel=1e-3)
        assert a.q_measured == pytest.approx(b.q_measured, rel=1e-3)
        assert a.slope == pytest.approx(b.slope, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_measured_in_float32_or_better(dtype: torch.dtype) -> None:
    net = converted(mlp(20, 64))
    x = torch.randn(32, 32)
    want = diagnose(net, x)
    got = diagnose(net.to(dtype), x)
    assert got.agrees, got.verdict
    # A hundred in every input: squares beyond float16's 65504, if they were added up in it.
    assert diagnose(net, 100 * x).layers[-1].q_measured < math.inf
    for a, b in zip(want.layers, got.layers, strict=True):
        assert b.q_measured == pytest.approx(a.q_measured, rel=0.1)


class Nosy(nn.Module):
    """A model whose forward changes everything that a forward can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = x
        self.count += 1
        self.count = self.count + 1
        random.random()
        np.random.rand()
        x = F.dropout(self.norm(self.layer(x)), 0.5, self.training)
        if self.fails:
            raise RuntimeError("on purpose")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_numbers_stay_as_they_were(fails: bool) -> None:
    net = nn.Sequential(Nosy(), nn.ReLU())
    net[0].fails = fails
    net[1].eval()
    calls = []
    handle = net[0].register_forward_hook(lambda *args: calls.append(1))
    net[0].layer.weight.grad = torch.ones(8, 8)
    buffer = net[0].count
    before = copy.deepcopy(net.state_dict())
    attributes = [set(vars(m)) for m in net.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    if fails:
        with pytest.raises(ValueError, match="on purpose"):
            diagnose(net, torch.ones(4, 8))
    else:
        assert diagnose(net, torch.randn(4, 8, generator=torch.Generator())).cause == "BatchNorm"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert net[0].count is buffer
    assert net[0].calls == 0
    assert [set(vars(m)) for m in net.modules()] == attributes
    assert net[0].training
    assert not net[1].training
    assert torch.equal(net[0].layer.weight.grad, torch.ones(8, 8))
    assert list(net[0]._forward_hooks) == [handle.id]
    assert fails or calls, "the user's own hooks run"
    everywhere = nn.modules.module
    assert not everywhere._global_forward_hooks
    assert not everywhere._global_forward_pre_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("model", "data", "error", "words"),
    [
        ("net", torch.zeros(4, 8), TypeError, "must be an nn.Module, got str"),
        (nn.Linear(8, 8), torch.zeros(4, 7), ValueError, r"fails on data of shape \(4, 7\)"),
        (nn.Linear(8, 8), torch.zeros(1, 8), ValueError, "at least 2 inputs"),
        (nn.Linear(8, 8), torch.zeros(()), ValueError, "at least 2 inputs"),
        (nn.Linear(8, 8), [], ValueError, "hold no batch"),
        (nn.Linear(8, 8), 3, TypeError, "got int"),
        (nn.Linear(8, 8), {"x": torch.zeros(4, 8)}, TypeError, "got dict"),
        (nn.Linear(8, 8), ["x"], TypeError, "batch 0 must be a tensor"),
        (nn.LazyLinear(8), torch.zeros(4, 8), ValueError, "without memory"),
        (nn.Linear(8, 8, device="meta"), torch.zeros(4, 8), ValueError, "without memory"),
    ],
)
def test_errors(model: Any, data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        diagnose(model, data)


def test_errors_of_options() -> None:
    with pytest.raises(ValueError, match="batches must be a positive int, got 0"):
        diagnose(nn.Linear(8, 8), torch.zeros(4, 8), batches=0)
    with pytest.raises(ValueError, match="sigma_w=nan"):
        diagnose(nn.Linear(8, 8), torch.zeros(4, 8), sigma_w=math.nan)


def test_given_sigmas_are_what_the_weights_should_be() -> None:
    net = initialised(mlp(10, 64, 64), gain=1.0)
    found = diagnose(net, torch.randn(32, 64), sigma_w=2**0.5, sigma_b=0.0)
    assert_finds(found, "weight scale", "0")
    assert found.sigma_w == pytest.approx(2**0.5)
