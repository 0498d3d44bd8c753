"""trace_wiring: gates and attention, and forwards that only an example can read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedshape.theory import trace_wiring


class Squeeze(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.pool, self.down, self.up = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(4, 2, 1),
            nn.Conv2d(2, 4, 1),
        )
        self.act, self.gate = nn.ReLU(), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(self.act(self.down(self.pool(x)))))


@pytest.mark.parametrize(
    ("gate", "low", "high"), [(nn.Sigmoid(), 0.293, 0.294), (nn.Hardsigmoid(), 0.277, 0.278)]
)
def test_gates_are_passed_and_noted(gate: nn.Module, low: float, high: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Squeeze(gate), nn.Conv2d(4, 4, 3), nn.ReLU())
    wiring = trace_wiring(net)
    assert wiring.depth == 2
    assert not wiring.problems
    (note,) = wiring.notes
    assert "'2:mul' are multiplied by gates" in note
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert low < gate(z).square().mean().item() < high or math.isclose(
        gate(z).square().mean().item(), low, abs_tol=2e-3
    )
    assert f"{float(note.split('falls to ')[1].split()[0]):.2f}" == f"{low:.2f}"


class Heads(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(8, 24), nn.Linear(8, 8), fused

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * 0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_an_average_and_noted(fused: bool) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Heads(fused), nn.ReLU())
    wiring = trace_wiring(net, torch.randn(2, 5, 8))
    assert not wiring.problems
    assert wiring.depth == 2
    assert any("averaged by attention" in note for note in wiring.notes)


class Asks(nn.Module):
    """One layer and its activation, behind a decision that symbols cannot take."""

    def __init__(self, way: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()])
        self.way = way

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


@dataclass
class Record:
    out: Tensor
    sizes: tuple[int, ...]


@fx.wrap
def through(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def by_length(m: Any, x: Tensor) -> Tensor:
    parts = [x]
    for layer in m.layers:
        parts.append(layer(parts[-1]))
    return parts[-1] if len(x) > 1 else x


def by_size(m: Any, x: Tensor) -> Tensor:
    side = int(math.sqrt(x.shape[1]))
    return through(m.layers, x if side * side == x.shape[1] else x.relu())


def by_dict(m: Any, x: Tensor) -> Tensor:
    found = {f"p{i}": layer(x) for i, layer in enumerate(m.layers[:1])}
    assert len(found) == 1
    assert "p0" in found
    return {**found, "rest": through(m.layers[1:], next(iter(found.values())))}["rest"]


def by_record(m: Any, x: Tensor) -> Any:
    made = Record(through(m.layers, x), tuple(x.shape))
    return made.out.expand(*made.sizes) if isinstance(made, Record) and x.ndim == 2 else None


def by_type(m: Any, x: Tensor) -> Tensor:
    return through(m.layers, torch.cat([x] if isinstance(x, Tensor) else x))


WAYS = [by_length, by_size, by_dict, by_record, by_type]


@pytest.mark.parametrize("way", WAYS)
def test_decisions_by_shapes_and_structures_are_read_on_an_example(way: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Asks(way))
    wiring = trace_wiring(net, torch.randn(4, 4))
    assert not wiring.problems
    assert wiring.depth == 3
    assert trace_wiring(net).depth == 3, "an input that fits is found"


def test_a_decision_by_numbers_is_read_on_no_example() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        return through(m.layers, x) if x.sum().item() > 0 else x

    assert "cannot be followed" in trace_wiring(Asks(way), torch.ones(4, 4)).problems[0]


class Pyramid(nn.Module):
    """Gives a record of features, as backbones do."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Record:
        y = self.act(self.low(x)) if mask is None else x
        return Record(self.act(self.high(y)), tuple(y.shape))


class Neck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Pyramid(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.backbone(x)
        return {"out": self.head(found.out.view(found.sizes)).relu()}


def test_records_go_from_module_to_module() -> None:
    wiring = trace_wiring(Neck(), torch.randn(3, 4))
    assert not wiring.problems
    assert wiring.depth == 3


def test_tokens_that_are_learnt_are_left_out() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
            return self.layer(x).relu()

    wiring = trace_wiring(Tokens(), torch.randn(2, 3, 4))
    assert not wiring.problems
    assert any("joins tokens" in note for note in wiring.notes)


def test_sizes_of_constants_that_were_joined_are_not_those_of_signals() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            table = torch.cat([torch.ones(1), torch.ones(1), torch.ones(x.shape[1] - 2)])
            return torch.cat([self.a(x), self.b(x) * table], -1)

    (join,) = (n for n in trace_wiring(Table(), torch.ones(2, 4)).nodes if n.op == "concat")
    assert join.weights == (4.0, 4.0)
