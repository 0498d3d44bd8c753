"""convert refuses a model or arguments that it cannot serve in full, and then changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape.convert import convert
from tests.support.convertible import SPEC, Functional, stack


def count(model: nn.Module, cls: type) -> int:
    return sum(type(m) is cls for m in model.modules())


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.acts = [self.act]

    def forward(self, x: Tensor) -> Tensor:
        return self.acts[0](x)


class NormFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, 2))


def converted() -> nn.Module:
    net = stack(2)
    convert(net, spec=SPEC)
    return net


def rewritten() -> nn.Module:
    net = Functional()
    convert(net, spec=SPEC)
    return net


def compiled_in_place() -> nn.Module:
    net = stack(2)
    net.compile()
    return net


def act_and(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *modules, nn.ReLU())


class NeverCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "no module": (lambda: torch.zeros(3), "must be an nn.Module"),
    "bare activation": (nn.ReLU, "ShapedActivation"),
    "no activation": (lambda: nn.Linear(2, 2), "found no activation"),
    "twice": (converted, "converted once"),
    "twice, rewritten": (rewritten, "converted once"),
    "data parallel": (lambda: nn.DataParallel(stack(2)), r"\.module"),
    "compiled": (lambda: torch.compile(stack(2)), r"\._orig_mod"),
    "compiled inside": (lambda: nn.Sequential(torch.compile(stack(2))), r"'0'.*\._orig_mod"),
    "compiled in place": (compiled_in_place, "compiled already"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3), nn.ReLU()), "run the model once"),
    "meta": (lambda: stack(2).to("meta"), "to_empty"),
    "quantised": (
        lambda: act_and(torch.ao.nn.quantized.FloatFunctional()),
        "quantised",
    ),
    "batchnorm": (lambda: act_and(nn.BatchNorm1d(6)), "strip_batchnorm=True"),
    "syncbatchnorm": (lambda: act_and(nn.SyncBatchNorm(6)), "strip_batchnorm=True"),
    "instancenorm": (lambda: act_and(nn.InstanceNorm1d(6)), "nn.Identity"),
    "groupnorm": (lambda: act_and(nn.GroupNorm(2, 6)), "nn.Identity"),
    "group_norm": (NormFunction, "F.group_norm"),
    "other activations": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6), nn.Tanh()),
        r"pass replace=\[nn.SiLU, nn.Tanh\]",
    ),
    "never called": (NeverCalled, "no activation lies between"),
    "held in a list": (Held, "plain list, .acts"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_refuses(name: str) -> None:
    make, message = REFUSALS[name]
    net = make()
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        convert(net, spec=SPEC)
    assert str(caught.value).startswith("convert: ")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "BN"}, "known: TAT, DKS, EOC"),
        ({"spec": "tanh"}, "must be an ActSpec"),
        ({"spec": SPEC, "depth": 3}, "spec is ready"),
        ({"method": "EOC", "activation": "relu", "depth": 3}, "EOC knows no depth"),
        ({"sigma_b": 0.1}, "belongs to EOC"),
        ({"depth": 3, "eta": 0.9}, "clamp=True"),
        ({"on_untraceable": "ignore"}, "known: 'error', 'report'"),
        ({"spec": SPEC, "backend": "cuda"}, "unknown backend"),
        ({"spec": SPEC, "init": "he"}, "unknown method 'he'"),
        ({"spec": SPEC, "replace": ("ReLU",)}, "nn.Module classes"),
        ({"spec": SPEC, "filter_fn": lambda name, module: False}, "relu .*filter_fn.$"),
        ({"spec": SPEC, "filter_fn": "relu"}, "filter_fn must be callable or None, got 'relu'"),
        ({"spec": SPEC, "generator": 3}, "generator must be a torch.Generator or None, got 3"),
        ({"spec": SPEC, "replace": nn.ReLU}, "must be a sequence of classes, got .*ReLU"),
    ],
)
def test_refuses_arguments(kwargs: dict[str, Any], message: str) -> None:
    net = stack(3)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        convert(net, **kwargs)
    assert count(net, nn.ReLU) == 3
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_refuses_activations_with_parameters() -> None:
    with pytest.raises(ValueError, match="parameters would be lost"):
        convert(nn.Sequential(nn.Linear(2, 2), nn.PReLU()), spec=SPEC, replace=(nn.PReLU,))
