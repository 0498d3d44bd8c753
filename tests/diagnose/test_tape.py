"""diagnose's tape follows any forward: functions, views, batches of all forms."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import (
    NormalizedSum,
)
from fusedshape.diagnose import diagnose
from tests.support.nets import converted, initialised, mlp


def test_functional_activations_in_place_views_and_repeated_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.act = nn.ReLU(inplace=True)
            self.scale = nn.Parameter(torch.tensor(2**0.5))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            for _ in range(3):  # one layer, called three times
                x = self.act(self.layer(x)) * self.scale
            if x.mean() > 0:  # data-dependent
                x = F.leaky_relu_(self.layer(x), 0.5) * (2 / 1.25) ** 0.5
            return {"y": x, "other": None}

    found = diagnose(initialised(Net()), torch.randn(32, 64))
    assert found.agrees, found.verdict
    names = [row.name for row in found.layers]
    assert names == ["input", *["linear", "relu"] * 3, "linear", "leaky_relu"]
    assert [row.path for row in found.layers[1:3]] == ["layer", ":mul"]
    assert found.layers[-1].q == pytest.approx(found.layers[0].q_measured, rel=1e-4)
    assert found.layers[-1].slope == pytest.approx(1.0)


def test_concat_pool_flatten_and_norm() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(4, 64, 3, padding=1)
            self.grow = nn.Conv2d(64, 32, 3, padding=1, padding_mode="circular")
            self.norm = nn.LayerNorm(96)
            self.mix = nn.Linear(96, 64)
            self.head = nn.Linear(64 * 9, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = torch.cat([x, self.grow(F.relu(x) * 2**0.5)], 1)
            x = self.mix(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            return self.head(F.max_pool2d(x, 2).flatten(1))

    found = diagnose(initialised(Net(), method="suo_full"), torch.randn(16, 4, 6, 6))
    assert found.agrees, found.verdict
    ops = [(row.op, row.channels) for row in found.layers]
    assert ops == [
        ("input", 4),
        ("affine", 64),
        ("nonlinear", 64),
        ("affine", 32),
        ("concat", 96),
        ("norm", 96),
        ("affine", 64),
        ("pool", 64),
        ("affine", 5),
    ]
    assert found.layers[5].q_measured == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "view",
    [
        lambda h: h[:, 1:3],
        lambda h: h[:, -1],
        lambda h: h.flatten(0, 1),
        lambda h: h.chunk(2, 1)[0],
        lambda h: h.transpose(1, 2).transpose(1, 2),
    ],
)
def test_views_of_what_was_changed_in_place_are_followed(view: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(view(F.relu_(self.a(x))))

    found = diagnose(initialised(Net(), gain=2**0.5), torch.randn(32, 4, 64))
    assert found.agrees, found.verdict
    assert not [note for note in found.notes if "in place" in note]
    assert not [layer for layer in found.layers if layer.op == "unknown"]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_are_looked_at_from_outside(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
            self.cells = kind(64, 64, batch_first=True)
            self.after = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.cells(self.before(x))[0][:, -1])

    net, x = converted(Net(), depth=20), torch.randn(32, 5, 16)
    found = diagnose(net, x)
    # Gates keep no q = 1, but they are no reason to doubt the layers' scale.
    assert (found.sigma_w, found.agrees) == (1.0, True), found.verdict
    (row,) = [layer for layer in found.layers if layer.op == "unknown"]
    with torch.no_grad():
        assert isinstance(net, Net)
        h = net.cells(net.before(x))[0]
    assert (row.path, row.name, row.channels) == ("cells", kind.__name__, 64)
    assert row.q_measured == pytest.approx(h.square().mean().item(), rel=1e-5)


def test_what_no_map_is_known_for_is_measured_and_named() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    found = diagnose(nn.Sequential(layer, nn.Linear(32, 8)), torch.randn(8, 5, 32))
    assert any("is known here" in note for note in found.notes)
    assert found.layers[-1].path == "1"
    assert math.isfinite(found.layers[-1].q_measured)

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x).sigmoid()

    found = diagnose(initialised(Gate()), torch.randn(16, 32))
    assert found.layers[-1].op == "unknown"
    assert "different layers" in found.notes[0]
    assert found.layers[-1].q == pytest.approx(found.layers[-1].q_measured, rel=0.2)


def test_a_normalised_sum_of_three_branches_is_one_sum() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
            self.add = NormalizedSum((0.5, -0.5, 0.5**0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.add(*(layer(x) for layer in self.layers))

    found = diagnose(initialised(Three()), torch.randn(32, 64))
    assert found.agrees, found.verdict
    assert [row.op for row in found.layers] == ["input", *["affine"] * 3, "sum"]
    assert found.layers[-1].path == "add"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_compiled_and_scripted_models() -> None:
    x = torch.randn(32, 64)
    net = converted(mlp(16, 64, 64))
    want = diagnose(net, x)
    plain = initialised(nn.Sequential(nn.Linear(64, 64), nn.SELU(), nn.Linear(64, 64)))
    scripted = diagnose(torch.jit.trace(plain, x), x)
    assert scripted.agrees
    assert [row.op for row in scripted.layers] == ["input", "affine", "nonlinear", "affine"]
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    found = diagnose(compiled, x)
    assert [row.q_measured for row in found.layers] == [row.q_measured for row in want.layers]
    assert found.layers[1].path == "_orig_mod.0"


def test_batches_stream_and_add_up() -> None:
    net = converted(mlp(20))
    x = torch.randn(96, 32)
    pulled = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for part in x.chunk(6):
            pulled.append(len(part))
            yield part, torch.zeros(len(part))

    found = diagnose(net, loader(), batches=3)
    assert pulled[:3] == [16, 16, 16]
    assert found.inputs == 48
    assert found.layers[0].q_measured == pytest.approx(x[:48].square().mean().item(), rel=1e-5)
    assert found.agrees


def test_a_batch_that_goes_another_way_is_left_out() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x.tanh() if x.mean() > 100 else self.layer(x)

    x = torch.randn(8, 32)
    net = initialised(Fork())
    found = diagnose(net, [x, x + 1e5 * net.layer.weight.sum(0).detach(), x])
    assert found.inputs == 16
    assert "batch 1 takes another way" in found.notes[0]


def test_keyword_batches() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.add = nn.Linear(64, 64), NormalizedSum((0.6, 0.8))
            self.other = nn.Linear(64, 64)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.add(self.layer(a), self.other(b))

    found = diagnose(initialised(Two()), [{"a": torch.randn(16, 64), "b": torch.randn(16, 64)}])
    assert found.agrees
    assert [r.op for r in found.layers] == ["input", "input", "affine", "affine", "sum"]


def test_activations_are_not_kept() -> None:
    class Witness(nn.Module):
        seen: list[Any] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            gc.collect()
            alive = sum(ref() is not None for ref in self.seen)
            assert alive <= 2, f"{alive} of {len(self.seen)} activations are still in memory"
            self.seen.append(weakref.ref(x))
            return x

    layers = [m for _ in range(6) for m in (nn.Linear(64, 64), nn.Tanh(), Witness())]
    diagnose(initialised(nn.Sequential(*layers)), torch.randn(32, 64), batches=1)
    assert len(Witness.seen) == 12  # the inputs, and a few of them changed a little
