"""replace="all" takes plain activations of every kind and no gates; what stays is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import convert
from fusedshape.nn import ShapedActivation, ShapedLinear
from tests.support.convertible import SPEC


class SqueezeExcite(nn.Module):
    """Gates what it is given by what it makes of its mean."""

    def __init__(self, act: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.reduce, self.act, self.expand = nn.Linear(6, 2), act(), nn.Linear(2, 6)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean(0, keepdim=True)))))


class Gated(nn.Module):
    """A gated linear unit with an activation that is not bounded."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 12), nn.GELU(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(self.act(a) * b)


class Functions(nn.Module):
    """Calls its activations and gates as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.a(x))
        return self.c(x * torch.sigmoid(self.b(x)) * F.relu6(x + 3) / 6)


def kinds(net: nn.Module) -> list[str]:
    return [type(m).__name__ for m in net.modules()]


def test_all_but_gates() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), SqueezeExcite(), nn.Linear(6, 6), nn.Sigmoid())
    report = convert(net, spec=SPEC, replace="all")
    assert isinstance(net[0], ShapedLinear)
    assert isinstance(net[2].reduce, ShapedLinear)
    assert report.counts["fused"] == 2
    assert {(c.path, c.note) for c in report.skipped} == {
        ("2.gate", "a gate: it scales another value"),
        ("4", "it shapes the network's output"),
    }


def test_activations_of_gated_linear_units_stay() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.GELU(), Gated())
    report = convert(net, spec=SPEC, replace="all")
    assert [c.path for c in report.skipped] == ["2.act"]
    assert report.counts["fused"] == 1


def test_functions_are_gates_like_modules() -> None:
    net = Functions()
    report = convert(net, spec=SPEC, replace="all")
    assert report.counts["fused"] == 1
    code = net.forward.__code__.co_names
    assert "sigmoid" in code
    assert "relu6" in code
    assert "hardswish" not in code


def test_parametric_activations_go_with_their_keys() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.PReLU(6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"'1' is a PReLU.*replace='all'"):
        convert(net, spec=SPEC, replace=(nn.PReLU,))
    report = convert(net, spec=SPEC, replace="all")
    assert "keys that are gone with their activations: '1.weight'" in str(report)
    assert "1.weight" not in net.state_dict()


def test_a_trunk_that_stays_is_named() -> None:
    side = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net = nn.Sequential(side, nn.SiLU(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6), nn.Sigmoid())
    report = convert(net, spec=SPEC)
    assert "stay as they are, which is most of them: 2 nn.SiLU ('1', '3')" in str(report)
    assert "replace='all'" in str(report)
    assert "nn.Sigmoid" not in "".join(report.notes)
    with pytest.raises(ValueError, match=r"nn.SiLU: pass replace=\[nn.SiLU\], or replace='all'"):
        convert(nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6)), spec=SPEC)


def test_alone_gates_are_nothing_to_replace() -> None:
    with pytest.raises(ValueError, match="found no activation to replace"):
        convert(nn.Sequential(nn.Linear(6, 6), nn.Sigmoid()), spec=SPEC, replace="all")


def test_an_activation_shared_with_a_gate_stays() -> None:
    net = SqueezeExcite(nn.Sigmoid)
    net.act = net.gate
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), net)
    convert(net, spec=SPEC, replace="all")
    assert type(net[2].gate) is nn.Sigmoid
    assert not any(isinstance(m, ShapedActivation) for m in net.modules())


class Biased(nn.Module):
    """Attention whose logits get a bounded bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        bias = 16 * torch.sigmoid(self.bias(x))
        return self.proj(F.relu(F.scaled_dot_product_attention(x, x, x) + bias.softmax(-1)))


def test_bounded_activations_that_enter_attention_stay() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Biased())
    convert(net, spec=SPEC, replace="all", example=torch.randn(2, 3, 6))
    assert "sigmoid" in net[2].forward.__code__.co_names
