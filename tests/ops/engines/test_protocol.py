"""Each method of every engine computes what the protocol says it does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape import reference
from fusedshape.ops import dispatch
from fusedshape.ops.checks import Geometry
from fusedshape.ops.engines import ENGINES
from fusedshape.ops.layer import Before, Layer, Shortcut, channel_dim, joined_spec, share
from tests.support.operands import LEAKY

STRIDED = Geometry([2, 2], [1, 1], [1, 1], False, [0, 0], 1)
# float32 sums of up to 16 * 9 products of normal numbers, against float64.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def operands(geometry: Geometry | None) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias of a layer that the engine for CPUs takes, too."""
    if geometry is None:
        return torch.randn(12, 16), torch.randn(32, 16) / 4, torch.randn(32)
    x = torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last)
    weight = torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last) / 12
    return x, weight, torch.randn(32)


def product(x: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
    """The product in float64, which the engines are held against."""
    if geometry is None:
        return F.linear(x.double(), weight.double())
    return torch.convolution(x.double(), weight.double(), None, *geometry)


@pytest.mark.parametrize("geometry", [None, STRIDED], ids=["linear", "strided"])
@pytest.mark.parametrize("name", ENGINES)
def test_each_method(name: str, geometry: Geometry | None) -> None:
    engine = ENGINES[name]
    x, weight, bias = operands(geometry)
    layer = Layer(weight, bias, LEAKY, geometry, dispatch.choose("auto", x))
    why = engine.why_not(x, layer)
    if why is not None:
        pytest.skip(why)
    x64, weight64 = (t.double().requires_grad_() for t in (x, weight))
    z64 = product(x64, weight64, geometry)
    column = bias.double().reshape(-1, *[1] * (x.ndim - 2))
    residual = torch.randn_like(engine.fprop(x, layer))
    joined = layer._replace(shortcut=Shortcut(residual, 0.6))
    added = z64 + share(0.6) * residual.double()

    def same(got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got.double(), want.detach(), **CLOSE)

    same(engine.fprop(x, layer), z64)
    same(engine.fprop(x, layer, bias), z64 + column)
    same(engine.fprop(x, joined, bias), added + column)
    same(engine.fprop_act(x, layer), reference.shaped_act(z64 + column, LEAKY))
    same(engine.fprop_act(x, joined), reference.shaped_act(added + column, joined_spec(LEAKY, 0.6)))

    dz = torch.randn_like(residual)
    dx, dweight = torch.autograd.grad(z64, (x64, weight64), dz.double())
    same(engine.dgrad(dz, x, layer, None)[0], dx)
    same(engine.wgrad(dz, x, layer), dweight)
    for got, want in zip(engine.both(dz, x, layer, None), (dx, None, dweight), strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            same(got, want)

    # On through the activation before: its output is x.
    before = Before(x, None, LEAKY, layer.kernels, True)
    got, sums = engine.dgrad(dz, x, layer, before)
    dim = channel_dim(x, geometry)
    want = reference.act_grad(dx, x.double(), None, LEAKY, dim)
    same(got, want)
    assert sums is not None
    same(sums, reference.channel_sum(want, dim))
