"""Tuning's layers of a model are those that run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedshape import ActSpec, convert, tuning
from fusedshape.models import vanilla_convnet
from fusedshape.nn import ShapedChain, ShapedConv2d, ShapedLinear
from fusedshape.ops import choice, engines
from fusedshape.ops.problem import Problem
from fusedshape.tuning import layers
from tests.support.rivals import LEAKY


def observed(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The problems that engines are asked for when the model runs."""
    seen: list[Any] = []

    def note(direction: str, problem: Problem) -> None:
        seen.append((direction, problem))

    monkeypatch.setitem(engines.RIVALS, "cpu", (engines.ENGINES["triton"],))
    monkeypatch.setattr(choice, "_chooser", note)
    monkeypatch.setattr(choice, "_remembers", False)
    model(x).sum().backward()
    monkeypatch.undo()
    return seen


def asked_for(found: Sequence[layers.Layer]) -> list[Any]:
    """The same in that form: an engine is asked for dgrad also where nobody needs it."""
    everything = []
    for one in found:
        dgrad = "dgrad_act" if "dgrad_act" in one.directions else "dgrad"
        everything += [(direction, one.problem) for direction in ("fprop", dgrad, "wgrad")]
    return everything


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_problems_of_a_converted_model(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vanilla_convnet(6, width=4, in_channels=2, pool_after=3)
    convert(model, method="TAT", activation="leaky_relu", clamp=True)
    x = torch.randn(3, 2, 8, 8)
    if last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    found = tuning.fused_layers(model, x)
    assert len(found) == 6
    assert found[0].directions == ("fprop", "wgrad")
    assert all(len(one.directions) == 3 for one in found[1:])
    assert asked_for(found) == observed(model, x, monkeypatch)
    for one in found:
        assert isinstance(model.get_submodule(one.path), ShapedConv2d)


@pytest.mark.parametrize("max_length", [None, 1, 2, 3])
def test_problems_of_chains_and_odd_layers(
    max_length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def conv(i: int, o: int, k: int, **kwargs: Any) -> ShapedConv2d:
        return ShapedConv2d(i, o, k, spec=LEAKY, **kwargs)

    model = nn.Sequential(
        ShapedChain(
            conv(2, 4, 3, padding=1, stride=2),
            conv(4, 4, 3, padding="same", dilation=2),
            conv(4, 4, 2, padding="same"),
            conv(4, 4, 3, padding=1, padding_mode="circular"),
            *(conv(4, 4, 1) for _ in range(4)),
            conv(4, 4, 3, groups=2),
            max_length=max_length,
        ),
        nn.Flatten(),
        ShapedLinear(16, 3, spec=ActSpec("tanh", output_shift=0.5)),
    )
    for p in model[2].parameters():
        p.requires_grad_(False)
    x = torch.randn(2, 2, 8, 8)
    state = torch.get_rng_state()
    found = tuning.fused_layers(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert asked_for(found) == observed(model, x, monkeypatch)
    assert found[-1].directions == ("fprop", "dgrad")
    with torch.autocast("cpu", torch.bfloat16):
        found = tuning.fused_layers(model, x)
        assert {one.problem.dtype for one in found} == {torch.bfloat16}
        assert asked_for(found) == observed(model, x, monkeypatch)
    assert not any(m._forward_pre_hooks for m in model.modules())


class Looks(nn.Module):
    """A model whose way depends on its numbers, and which calls a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ShapedLinear(4, 4, spec=LEAKY)
        self.other = ShapedLinear(4, 4, spec=LEAKY)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x=self.layer(x)) if x.sum() == 0 else self.other(x)


def test_models_that_need_numbers_and_models_without_layers() -> None:
    found = tuning.fused_layers(Looks(), torch.zeros(2, 4))
    assert [(one.path, one.directions) for one in found] == [
        ("layer", ("fprop", "wgrad")),
        ("layer", ("fprop", "dgrad", "wgrad")),
    ]
    with pytest.raises(ValueError, match=r"no fused layers; fusedshape\.convert"):
        tuning.fused_layers(nn.Linear(4, 4), torch.zeros(2, 4))
    idle = Looks()
    idle.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="none of the model's 2 fused layers is called"):
        tuning.fused_layers(idle, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"x's last dimension must be 4"):
        tuning.fused_layers(Looks(), torch.zeros(2, 5))
