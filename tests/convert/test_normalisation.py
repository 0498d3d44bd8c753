"""normalisation="strip" takes every kind of normalisation out, and the rest computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from fusedshape import TAT, convert, reference, theory
from tests.support.convertible import SPEC

X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Oracle(torch.overrides.TorchFunctionMode):
    """Runs a plain model as if its ReLUs were the reference's activation and its norms were not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in {
            "batch_norm",
            "group_norm",
            "instance_norm",
            "layer_norm",
            "local_response_norm",
        }:
            return args[0].clone()
        if name not in ("relu", "relu_"):
            return func(*args, **kwargs)
        y = reference.shaped_act(args[0], SPEC)
        return args[0].copy_(y) if name == "relu_" or kwargs.get("inplace") else y


def conv(bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, bias=bias)


class Permuting(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias)
        return y.permute(0, 3, 1, 2)


class ByHand(nn.Module):
    """LayerNorm over channels in arithmetic of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (v + 1e-5).rsqrt()
        return x * scale + (b - m * scale)


class GroupNormAct(nn.GroupNorm):
    """A norm with its activation inside, which works in place."""

    def __init__(self) -> None:
        super().__init__(2, 4)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))


class PreActivation(nn.Module):
    """Its norm's output is activated in place, and the norm's input is its shortcut."""

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.act, self.conv = norm, act, conv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.act(self.norm(x)))


class InPlaceFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.norm(x))
        return x + self.conv(y)


class Functional(nn.Module):
    """Calls norms as functions, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain, self.last = conv(), nn.Parameter(torch.ones(4)), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(self.conv(x), 2, self.gain)
        return self.last(F.relu(y, inplace=True)) + x


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(4),
    "sync": lambda: nn.SyncBatchNorm(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "local response": lambda: nn.LocalResponseNorm(3),
    "layer": lambda: nn.LayerNorm([4, 6, 6]),
    "permuting": lambda: Permuting(4),
    "by hand": ByHand,
    "frozen": Frozen,
}


def stripped(net: nn.Module, **kwargs: Any) -> Any:
    """Convert a copy that keeps its weights."""
    ours = copy.deepcopy(net).double()
    kwargs = {"normalisation": "strip", "spec": SPEC, "init": None, **kwargs}
    return ours, convert(ours, **kwargs)


def agree(ours: nn.Module, plain: nn.Module, x: Tensor = X) -> None:
    with Oracle():
        want = plain.double()(x.clone())
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x.clone()), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_norms_leave_and_layers_before_them_get_biases(name: str) -> None:
    net = nn.Sequential(conv(), NORMS[name](), nn.ReLU(inplace=True), conv())
    ours, report = stripped(net)
    plain = copy.deepcopy(net)
    plain[1] = nn.Identity()
    agree(ours, plain)
    assert report.counts["stripped"] == report.counts["fused"] == 1
    assert set(ours.state_dict()) == {"0.weight", "0.bias", "3.weight"}
    assert ours[0].bias.dtype == torch.float64
    assert ours[0].bias.requires_grad
    assert "new keys: '0.bias'" in str(report)
    if name not in ("layer", "permuting", "by hand"):  # those the constants know of
        with pytest.raises(ValueError, match=r"'1' is a .*normalisation='strip'"):
            stripped(net, normalisation=None)


def test_biases_only_where_they_are_wanted() -> None:
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.ReLU())
    net[0].weight.requires_grad_(False)
    ours, _ = stripped(net)
    assert not ours[0].bias.requires_grad
    assert ours[3].bias is None
    assert stripped(net, add_biases=False)[0][0].bias is None
    assert stripped(net, normalisation=None, strip_batchnorm=True)[0][0].bias is None
    ours, _ = stripped(net, normalisation=None, strip_batchnorm=True, add_biases=True)
    assert ours[0].bias is not None
    with pytest.raises(ValueError, match="pass normalisation='strip' with it"):
        stripped(net, normalisation=None, add_biases=True)


def test_biases_are_drawn_as_the_edge_of_chaos_wants() -> None:
    torch.manual_seed(0)
    wide = nn.Conv2d(4, 512, 1, bias=False)
    ours = nn.Sequential(wide, nn.BatchNorm2d(512), nn.Tanh(), nn.Conv2d(512, 1, 1))
    edge = theory.EOC("tanh", sigma_b=0.3)
    convert(ours, edge, normalisation="strip", replace="all")
    assert 0.27 < float(ours[0].bias.detach().std()) < 0.33


def test_a_failure_takes_the_biases_back() -> None:
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    keys, kinds = list(net.state_dict()), [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match="unknown backend"):
        convert(net, spec=SPEC, normalisation="strip", backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clamp=True"):
        convert(net, TAT(eta=0.9), normalisation="strip")
    convert(net, spec=SPEC, normalisation="strip", dry_run=True)
    assert list(net.state_dict()) == keys
    assert [type(m) for m in net.modules()] == kinds


@pytest.mark.parametrize(
    "make",
    [
        lambda: PreActivation(nn.GroupNorm(2, 4), nn.ReLU(inplace=True)),
        lambda: PreActivation(GroupNormAct(), nn.Identity()),
        InPlaceFunction,
        Functional,
    ],
)
def test_in_place_activations_leave_the_norms_input_alone(make: Callable[[], nn.Module]) -> None:
    net = nn.Sequential(conv(), make(), make())
    ours, report = stripped(net)
    agree(ours, net)
    assert report.counts["stripped"] == 2


def test_functional_norms_take_their_parameters_along() -> None:
    ours, report = stripped(Functional())
    assert set(ours.state_dict()) == {"conv.weight", "conv.bias", "last.weight"}
    assert "'gain'" in str(report)


class Standardised(nn.Conv2d):
    """Weight standardisation, as public models write it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * 0.5).view(-1)
        w = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        w = w.reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedByHand(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True) + 1e-6)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), w, self.bias, self.stride)


def test_standardised_weights_become_plain() -> None:
    net = nn.Sequential(Standardised(4, 4, 3, padding=1), nn.ReLU(), StandardisedByHand(4, 4, 3))
    ours, report = stripped(net)
    assert report.counts["stripped"] == 2
    assert report.counts["fused"] == 1
    assert set(ours.state_dict()) == {f"{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    plain = nn.Sequential(conv(True), nn.ReLU(), conv(True)).double()
    plain.load_state_dict(ours.state_dict())
    agree(ours, plain)
    with pytest.raises(ValueError, match=r"'0'.*normalisation='strip'"):
        stripped(net, normalisation=None)


@pytest.mark.parametrize(
    "attach",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
        spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_norms_attached_to_weights_leave_their_values(attach: Callable[..., nn.Module]) -> None:
    net = nn.Sequential(attach(conv(True)), nn.ReLU()).double().eval()
    want = reference.shaped_act(net[0](X), SPEC)
    keys = set(net.state_dict())
    convert(net, spec=SPEC, init=None, normalisation="strip", dry_run=True)
    assert set(net.state_dict()) == keys
    report = convert(net, spec=SPEC, init=None, normalisation="strip")
    torch.testing.assert_close(net(X), want)
    assert set(net.state_dict()) == {"0.weight", "0.bias"}
    assert report.counts["stripped"] == report.counts["fused"] == 1


def test_other_parametrisations_are_refused_by_name() -> None:
    layer = parametrizations.weight_norm(conv(True))
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    with pytest.raises(ValueError, match=r"'0'.*remove_parametrizations first"):
        convert(nn.Sequential(layer, nn.ReLU()), spec=SPEC, normalisation="strip")


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(4), nn.MultiheadAttention(4, 1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.mlp((x + self.attn(y, y, y, need_weights=False)[0]).mean(1))


def test_layer_norms_stay_beside_attention_and_the_report_says_so() -> None:
    net = Attending()
    report = convert(net, spec=SPEC, normalisation="strip", example=torch.randn(2, 3, 4))
    assert type(net.norm) is nn.LayerNorm
    assert "1 LayerNorm layer(s) stay: 'attn' (MultiheadAttention) is attention" in str(report)
    assert report.counts["stripped"] == 1


class Opaque(nn.Module):
    """Branches on its input's shape, so that no trace can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.other = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.shape[0] else x + 1
        return self.other(self.act(self.norm(self.conv(x)))) + self.act(self.norm(x))


def test_norms_in_forwards_that_cannot_be_traced() -> None:
    net = nn.Sequential(conv(), Opaque())
    ours, report = stripped(net, example=X)
    agree(ours, net)
    assert report.counts["stripped"] == 1
    assert {key for key in ours.state_dict() if "bias" in key} == {"0.bias", "1.conv.bias"}
    assert not ours[1].conv.bias.any()
