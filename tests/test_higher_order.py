"""Across modules: derivatives of derivatives are those of torch's own layers, zeros included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedshape as fs
from fusedshape import ActSpec, native, ops
from fusedshape.activations import ACTIVATIONS
from fusedshape.ops import ChainLayer

Function = Callable[..., Tensor]
SLOPE = 0.3


def spec_of(name: str, shift: float = 0.1) -> ActSpec:
    return ActSpec(name, 1.1, 0.2, shift, 1.3, SLOPE if name == "leaky_relu" else 0.0)


def stock(u: Tensor, spec: ActSpec) -> Tensor:
    u = spec.input_scale * u + spec.input_shift
    function = spec.row.function
    assert function is not None
    # In place torch saves the output of a leaky_relu, as this library does.
    v = F.leaky_relu_(u, SLOPE) if spec.row.has_slope else function(u, SLOPE)
    return spec.output_scale * (v + spec.output_shift)


def ladder(f: Function, leaves: Sequence[Tensor], orders: int) -> list[list[Tensor | None]]:
    """Gradients of Σ y, of the squares of those, and so on."""
    target = f(*leaves).sum()
    found = []
    for _ in range(orders):
        grads = torch.autograd.grad(target, leaves, create_graph=True, allow_unused=True)
        found.append(list(grads))
        target = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
        if not target.requires_grad:
            break
    return found


def cases(spec: ActSpec) -> dict[str, tuple[Function, Function, list[Tensor]]]:
    """Each op, the stock composition, and what both are given."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    image, maps, again = normal(2, 3, 4, 4), 0.4 * normal(3, 3, 3, 3), 0.4 * normal(3, 3, 3, 3)
    rows, matrix, bias, other = normal(4, 3), normal(3, 3), normal(3), normal(3)

    def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, padding=1)

    def chain(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
        layers = [ChainLayer(w, b, spec, padding=1), ChainLayer(v, c, spec, padding=1)]
        return ops.conv_chain(x, layers)

    how = {"padding": 1, "residual_weight": 0.6}
    return {
        "shaped_act": (lambda x: ops.shaped_act(x, spec), lambda x: stock(x, spec), [rows]),
        "bias_act": (
            lambda x, b: ops.bias_act(x, b, spec),
            lambda x, b: stock(x + b[:, None, None], spec),
            [image, bias],
        ),
        "conv_act": (
            lambda x, w, b: ops.conv_act(x, w, b, spec, padding=1),
            lambda x, w, b: stock(conv(x, w, b), spec),
            [image, maps, bias],
        ),
        "linear_act": (
            lambda x, w, b: ops.linear_act(x, w, b, spec),
            lambda x, w, b: stock(F.linear(x, w, b), spec),
            [rows, matrix, bias],
        ),
        "conv residual": (
            lambda x, w, b, r: ops.conv_act(x, w, b, spec, residual=r, **how),
            lambda x, w, b, r: stock(0.8 * conv(x, w, b) + 0.6 * r, spec),
            [image, maps, bias, normal(2, 3, 4, 4)],
        ),
        "linear residual": (
            lambda x, w, b, r: ops.linear_act(x, w, b, spec, residual=r, residual_weight=0.6),
            lambda x, w, b, r: stock(0.8 * F.linear(x, w, b) + 0.6 * r, spec),
            [rows, matrix, bias, normal(4, 3)],
        ),
        "conv_chain": (
            chain,
            lambda x, w, b, v, c: stock(conv(stock(conv(x, w, b), spec), v, c), spec),
            [image, maps, bias, again, other],
        ),
    }


@pytest.mark.parametrize("shift", [0.0, 0.1])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_order_has_the_gradients_of_the_stock_composition(name: str, shift: float) -> None:
    spec = spec_of(name, shift)
    for op, (fused, plain, tensors) in cases(spec).items():
        leaves = [t.clone().requires_grad_() for t in tensors]
        got, want = ladder(fused, leaves, 3), ladder(plain, leaves, 3)
        missing = [[[g is None for g in order] for order in all_] for all_ in (got, want)]
        assert missing[0] == missing[1], op
        for order, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            for g, w in zip(ours, theirs, strict=True):
                if g is not None and w is not None:
                    # F.softplus leaves exp(−20) out beyond its threshold.
                    allowed = (1e-9 if name != "softplus" else 1e-7) * (1 + w.abs().max())
                    assert (g - w).abs().max() <= allowed, (op, order)


@pytest.mark.parametrize("engine", ["aten", "native"])
@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_a_gradient_penalty_reaches_every_bias(name: str, engine: str) -> None:
    if engine == "native" and not native.available():
        pytest.skip(native.why_not())
    spec = ActSpec(name, negative_slope=SLOPE if name == "leaky_relu" else 0.0)
    x = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    weights = [(torch.randn(16, 16, 3, 3) / 12).requires_grad_() for _ in range(2)]
    biases = [torch.randn(16, requires_grad=True) for _ in range(2)]

    def layered(x: Tensor) -> Tensor:
        for w, b in zip(weights, biases, strict=True):
            x = ops.conv_act(x, w, b, spec, engine=engine)
        return x

    def chained(x: Tensor) -> Tensor:
        rows = zip(weights, biases, strict=True)
        return ops.conv_chain(x, [ChainLayer(w, b, spec, engine=engine) for w, b in rows])

    for f in (layered, chained):
        (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        found = torch.autograd.grad(slope.square().sum(), [*weights, *biases], allow_unused=False)
        assert all(g.count_nonzero() > 0 for g in found[:2])
        assert all(g.count_nonzero() == 0 for g in found[2:])


def test_a_converted_critic_has_the_gradients_of_the_plain_one() -> None:
    def critic() -> nn.Sequential:
        torch.manual_seed(0)
        slopes = [nn.LeakyReLU(0.2), nn.LeakyReLU(0.2)]
        return nn.Sequential(
            nn.Linear(4, 8), slopes[0], nn.Linear(8, 8), slopes[1], nn.Linear(8, 1)
        )

    def penalty(net: nn.Module) -> dict[str, Tensor | None]:
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        ((g.norm(dim=1) - 1) ** 2).mean().backward()
        return {name: p.grad for name, p in net.named_parameters()}

    x = torch.randn(4, 4, requires_grad=True)
    plain, fused = critic(), critic()
    spec = ActSpec("leaky_relu", negative_slope=0.2)
    fs.convert(fused, spec=spec, replace=[nn.LeakyReLU], init=None)
    want, got = penalty(plain), penalty(fused)
    assert any(isinstance(m, fs.ShapedLinear) for m in fused)
    assert [k for k, g in got.items() if g is None] == [k for k, g in want.items() if g is None]
    for k, g in want.items():
        assert g is None or torch.allclose(got[k], g, rtol=1e-5, atol=1e-7), k
