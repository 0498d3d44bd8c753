"""tap: what it notes is what the unfused model's hooks see, and what makes the gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fusedshape.convert import convert
from fusedshape.kinds import FusedLayer, kind_of
from fusedshape.nn import ShapedChain, ShapedConv2d, ShapedLinear
from fusedshape.tap import Tapped, tap
from fusedshape.unfuse import unfuse
from tests.support.convertible import ZOO, run
from tests.support.specs import shaped

SPEC = shaped("tanh")


def row(seed: int = 0, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 6, generator=generator, dtype=torch.float64, **kwargs)


def net(container: Any = nn.Sequential) -> Any:
    layers = [ShapedLinear(6, 6, spec=SPEC, dtype=torch.float64) for _ in range(4)]
    return container(*layers, nn.Linear(6, 2, dtype=torch.float64))


def weight_grad(layer: Any, call: Tapped) -> Tensor:
    """The gradient of a layer's weight, by torch's own rule for a product."""
    kind = kind_of(layer)
    assert kind is not None
    with torch.enable_grad():
        weight = layer.weight.detach().clone().requires_grad_()
        x = call.input
        if kind.dimensions == 0:
            z = F.linear(x, weight)
        else:
            plain = copy.deepcopy(layer)
            plain = plain.to_plain() if isinstance(plain, FusedLayer) else plain
            plain.bias = None
            del plain.weight
            plain.weight = weight
            z = plain(x)
    (grad,) = torch.autograd.grad(z, weight, call.grad)
    return grad


def calls_of(model: nn.Module, x: Tensor) -> tuple[dict[str, list[Tapped]], list[Tensor]]:
    with tap(model) as found:
        _, grads = run(model, x)
    return dict(found), grads


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_makes_the_gradients_of_all_weights(name: str) -> None:
    """Each layer's input and gradient give autograd's weight gradients, whatever was converted."""
    make, x, *_ = ZOO[name]
    torch.manual_seed(0)
    model = make().double()
    convert(model, spec=SPEC, init=None, strip_batchnorm=True)
    x = x.double()
    _, want = run(model, x)
    found, grads = calls_of(model, x)
    for got, wanted in zip(grads, want, strict=True):
        close(got, wanted)
    by_parameter = dict(zip([p for p in model.parameters() if p.requires_grad], grads, strict=True))
    sums: dict[Tensor, Tensor] = {}
    for path, calls in found.items():
        layer: Any = model.get_submodule(path)
        for call in calls:
            sums[layer.weight] = sums.get(layer.weight, 0) + weight_grad(layer, call)
    assert bool(sums) == (name != "own forward")  # which no tap knows
    for weight, total in sums.items():
        close(total, by_parameter[weight])
    unfuse(model)
    again, _ = calls_of(model, x)
    assert again.keys() == found.keys()
    for path, calls in found.items():
        assert len(calls) == len(again[path])
        for ours, theirs in zip(calls, again[path], strict=True):
            close(ours.input, theirs.input)
            close(ours.grad, theirs.grad)


@pytest.mark.parametrize("kwargs", [{}, {"padding": "same", "padding_mode": "circular"}])
@pytest.mark.parametrize("shape", [(2, 4, 7, 7), (4, 7, 7)])
def test_convolutions(kwargs: Any, shape: tuple[int, ...]) -> None:
    options = {"spec": SPEC, "dtype": torch.float64, **kwargs}
    model = nn.Sequential(
        ShapedConv2d(4, 6, 3, **options), ShapedConv2d(6, 4, 3, groups=2, **options)
    )
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, grads = calls_of(model, x)
    for name in ("0", "1"):
        (call,) = found[name]
        close(weight_grad(model[int(name)], call), grads[2 * int(name)])
        close(
            call.grad.sum([d for d in range(call.grad.ndim) if d != call.grad.ndim - 3]),
            grads[2 * int(name) + 1],
        )


def test_a_chain_runs_layer_by_layer() -> None:
    chain = net(ShapedChain)
    twin = copy.deepcopy(chain)
    unfuse(twin)
    found, grads = calls_of(chain, row())
    again, want = calls_of(twin, row())
    assert list(found) == list(again) == ["0", "1", "2", "3", "4"]
    for name, calls in found.items():
        for ours, theirs in zip(calls, again[name], strict=True):
            close(ours.input, theirs.input)
            close(ours.grad, theirs.grad)
    for got, wanted in zip(grads, want, strict=True):
        close(got, wanted)
    assert not any("forward" in vars(m) for m in chain.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    model = net()
    want, _ = calls_of(model, row())
    x = row(requires_grad=True)
    with tap(model) as found:
        y = checkpoint(model, x, use_reentrant=reentrant)
        torch.manual_seed(0)
        (y.sin() * torch.arange(1, y.numel() + 1).view_as(y)).sum().backward()
    for name, calls in want.items():
        assert len(found[name]) == len(calls) == 1
        close(found[name][0].input, calls[0].input)
        close(found[name][0].grad, calls[0].grad)


def test_autocast() -> None:
    model = net().float()
    twin = copy.deepcopy(model)
    unfuse(twin)
    factors = []
    for part in (model, twin):
        with tap(part) as found, torch.autocast("cpu", torch.bfloat16):
            part(row().float()).float().square().sum().backward()
        factors.append({name: calls[0] for name, calls in found.items()})
    for name, ours in factors[0].items():
        theirs = factors[1][name]
        assert (ours.input.dtype, ours.grad.dtype) == (theirs.input.dtype, theirs.grad.dtype)
        # Five layers of a few roundings each, 2⁻⁸ of the largest number.
        for a, b in ((ours.input, theirs.input), (ours.grad, theirs.grad)):
            assert (a - b).abs().max() <= 2**-4 * b.abs().max()


def test_layers_are_chosen_by_name_or_as_modules() -> None:
    model = net()
    for wanted in (["1", "4"], [model[1], model[4]], (model[4], "1")):
        with tap(model, wanted) as found:
            model(row()).sum().backward()
        assert sorted(found) == ["1", "4"]
        assert all(len(calls) == 1 for calls in found.values())
    with tap(model, "2") as found:
        with torch.no_grad():
            model(row())
        assert found["2"] == []
        model(row()).sum().backward()
        found["2"].clear()
        (model(row()) + model(row(1))).sum().backward()
    assert len(found["2"]) == 2


def test_threads_do_not_see_each_others_taps() -> None:
    mine, other = net(), net()

    def elsewhere() -> int:
        other(row()).sum().backward()
        mine(row(1)).sum().backward()  # the same model, by a thread that did not ask
        with tap(other) as found:
            other(row()).sum().backward()
        return sum(map(len, found.values()))

    with tap(mine) as found, ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere).result() == 5
        mine(row()).sum().backward()
    assert [len(calls) for calls in found.values()] == [1] * 5
    assert torch.equal(found["0"][0].input, row())


def test_all_is_as_before_afterwards() -> None:
    model = net()
    want = model(row())
    with pytest.raises(ZeroDivisionError), tap(model):
        _ = 1 / 0
    assert not any("forward" in vars(m) for m in model.modules())
    with tap(model):
        pass
    assert torch.equal(model(row()), want)


def test_what_follows_may_work_in_place() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)).double()
    found, grads = calls_of(model, row())
    for path in ("0", "2"):
        (call,) = found[path]
        close(call.grad.T @ call.input, grads[int(path)])


def test_parametrised_layers_and_keyword_arguments() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = parametrizations.weight_norm(ShapedLinear(6, 6, spec=SPEC))
            self.two = nn.ConvTranspose1d(1, 1, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x=x)[:, None], output_size=[13])  # type: ignore[no-any-return]

    model = Named().double()
    with tap(model) as found:
        model(row()).sum().backward()
    assert found["one"][0].grad.shape == (5, 6)
    assert found["two"][0].grad.shape == (5, 1, 13)


class Relu(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def compiled() -> nn.Module:
    model = net()
    model[0].compile()
    return model  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "unknown": (net, ["0.weigth", "9"], "no module '0.weigth'"),
    "close": (lambda: nn.Sequential(net()), ["0.00"], "did you mean '0.0'"),
    "foreign": (net, [nn.Linear(1, 1)], "no module a Linear"),
    "no layer": (lambda: nn.Sequential(nn.ReLU()), ["0"], "'0' is a ReLU, no linear"),
    "own forward": (lambda: nn.Sequential(Relu(6, 6)), ["0"], "'0' is a Relu with a forward of"),
    "compiled": (compiled, None, r"'0' is compiled \(ShapedLinear\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name: str) -> None:
    make, layers, message = REFUSED[name]
    with pytest.raises(ValueError, match=message), tap(make(), layers):
        pass


def test_refuses_calls_and_taps_it_cannot_serve() -> None:
    model = net()
    with pytest.raises(TypeError, match="must be an nn"), tap(3):  # type: ignore[arg-type]
        pass
    with tap(model, "0"):
        with pytest.raises(ValueError, match=r"'0'.*leave the tap that is open"), tap(model):
            pass
        with pytest.raises(RuntimeError, match=r"torch\.func transform"):
            torch.func.grad(lambda x: model(x).sum())(row())
        with tap(model, "1") as found:
            model(row()).sum().backward()
        assert len(found["1"]) == 1
    with tap(nn.Sequential(Relu(6, 6), nn.Linear(6, 6))) as found:
        assert list(found) == ["1"], "what has a forward of its own is left out unless it is named"
