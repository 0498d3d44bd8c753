"""Numbers that are fixed are taken from tensors only where nothing is lost by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusedshape
from fusedshape import ActSpec, NormalizedSum, PerLocationNorm, init, theory, validate
from fusedshape.models import rescaled_resnet
from fusedshape.theory import Node, Wiring

X = torch.zeros(2, 3, 5, 5)
W = torch.zeros(3, 3, 1, 1)
RELU = ActSpec("relu")


def summed(w: Any) -> Wiring:
    return Wiring((Node("input"), Node("nonlinear", (0,)), Node("sum", (0, 1), (w, 0.8))))


# Each takes a fixed number by the name before the colon; 0.6 is legal for all.
FIXED: dict[str, Callable[[Any], object]] = {
    **{
        f"{name}: ActSpec": lambda v, name=name: ActSpec("leaky_relu", **{name: v})
        for name in (
            "input_scale",
            "input_shift",
            "output_shift",
            "output_scale",
            "negative_slope",
        )
    },
    "eta: tat": lambda v: theory.tat("relu", depth=20, eta=v),
    "tau: tat": lambda v: theory.tat("tanh", depth=20, tau=v),
    "sigma_b: eoc": lambda v: theory.eoc("tanh", sigma_b=v),
    "negative_slope: eoc": lambda v: theory.eoc("leaky_relu", negative_slope=v),
    "q: q_map": lambda v: theory.q_map(RELU, v),
    "q: q_slope": lambda v: theory.q_slope(RELU, v),
    "c: c_map": lambda v: theory.c_map(RELU, v),
    "c: c_slope": lambda v: theory.c_slope(RELU, v),
    "c: c_curve": lambda v: theory.c_curve(RELU, v),
    "weights: Wiring": summed,
    "shortcut_weight: resnet": lambda v: theory.resnet(50, v),
    "weights: NormalizedSum": lambda v: NormalizedSum((v, 0.8)),
    "weight: NormalizedSum.shortcut": NormalizedSum.shortcut,
    "homog_scale: PerLocationNorm": lambda v: PerLocationNorm(homog_scale=v),
    "weight: rescaled_resnet": lambda v: rescaled_resnet(18, v, width=1),
    "sigma_w: diagnose": lambda v: fusedshape.diagnose(nn.Linear(3, 3), X[:, :, 0, 0], sigma_w=v),
    **{
        f"gain: {fill.__name__}": lambda v, fill=fill: fill(W.clone(), gain=v)
        for fill in (init.suo_, init.suo_full_, init.delta_orthogonal_, init.gaussian_)
    },
    "gain: init_module_": lambda v: init.init_module_(nn.Linear(2, 2), gain=v),
    "bias_std: init_module_": lambda v: init.init_module_(nn.Linear(2, 2), bias_std=v),
}
# 0.6 is not legal for these, or no tensor is.
OTHERS: dict[str, Callable[[Any], object]] = {
    "shortcut_weight: reweight_shortcuts": lambda v: fusedshape.reweight_shortcuts(
        nn.Sequential(nn.Linear(2, 2)), shortcut_weight=v
    ),
    "zeta: solve": lambda v: theory.solve("DKS", "tanh", depth=20, zeta=v),
    "q_slope: dks": lambda v: theory.dks("tanh", depth=20, q_slope=v),
    "zeta: dks": lambda v: theory.dks("tanh", depth=20, zeta=v),
    "residual_weight: conv_act": lambda v: fusedshape.conv_act(
        X, W, None, RELU, residual=X, residual_weight=v
    ),
    "residual_weight: linear_act": lambda v: fusedshape.linear_act(
        X, torch.zeros(5, 5), None, RELU, residual=X, residual_weight=v
    ),
}
TRAINED = {
    "Parameter": nn.Parameter(torch.tensor(0.6, dtype=torch.float64)),
    "frozen Parameter": nn.Parameter(torch.tensor(0.6), requires_grad=False),
    "vector Parameter": nn.Parameter(torch.tensor([0.6])),
    "leaf": torch.tensor(0.6, requires_grad=True),
    "result": torch.tensor(0.3, requires_grad=True) * 2,
}


@pytest.mark.parametrize("value", TRAINED)
@pytest.mark.parametrize("call", [*FIXED, *OTHERS])
def test_what_would_be_trained_is_refused(call: str, value: str) -> None:
    name = call.partition(":")[0]
    given = TRAINED[value]
    with pytest.raises(TypeError, match=f"{name}.* must be a fixed number.*not be trained"):
        {**FIXED, **OTHERS}[call](given)


@pytest.mark.parametrize("call", FIXED)
def test_a_tensor_without_a_gradient_is_its_number(call: str) -> None:
    exact, given = (FIXED[call](v) for v in (0.6, torch.tensor(0.6, dtype=torch.float64)))
    if isinstance(exact, (ActSpec, Wiring, float)):
        assert given == exact


def test_a_number_is_checked() -> None:
    assert validate.number("f", "x", 2) == 2.0
    for bad in (True, "1", b"1", None, [], {}, object(), 1j, X, torch.tensor(1j)):
        with pytest.raises(TypeError, match="f: x must be a number"):
            validate.number("f", "x", bad)
    for bad in (float("nan"), float("inf"), 2**2000):
        with pytest.raises(ValueError, match="f: x must be finite"):
            validate.number("f", "x", bad)
    with pytest.raises(ValueError, match="f: x must be finite and at least 0 and below 1, got 1"):
        validate.number("f", "x", 1, 0.0, below=1.0)
