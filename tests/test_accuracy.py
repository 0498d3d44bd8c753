"""Across modules: in half precision, fused is never worse than torch's ops, measured by float64.

The error of a tensor is its difference from the float64 result of the same, already rounded inputs:
the root mean square of that, relative to the result's, and the largest. Where both sides round the
same exact number once, errors differ by what float32 leaves of a tie: `SLACK`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape import (
    ACTIVATIONS,
    ActSpec,
    NormalizedSum,
    PerLocationNorm,
    ShapedActivation,
    fold,
    reference,
)
from fusedshape.bench.providers import _undecided as undecided
from fusedshape.bench.providers import stock
from fusedshape.ops import conv_act, linear_act, shaped_act
from fusedshape.theory import Unreachable, solve
from tests.support.backends import BACKENDS

HALF = [torch.bfloat16, torch.float16]
DEPTHS = (10, 50, 300)
SCALES = (1.0, 5.0, 50.0)
SLACK = 1.001
F64 = torch.float64


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=F64)


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative root mean square, and the largest, where the truth can be told in got's dtype."""
    info = torch.finfo(got.dtype)  # one rounding of φ's argument moves `square` by two
    fits = truth.abs() < info.max * (1 - info.eps)
    error = (got.double() - truth)[fits].nan_to_num(nan=math.inf, posinf=math.inf)
    return error.norm().item() / (truth[fits].norm().item() or 1.0), error.abs().max().item()


@cache
def specs(name: str) -> tuple[ActSpec, ...]:
    """The specs that each method solves for, φ itself (EOC), and corner cases with δ ≠ 0."""
    slope = 0.25 if ACTIVATIONS[name].has_slope else 0.0
    found = [
        ActSpec(name, negative_slope=slope, origin="EOC"),
        ActSpec(name, 0.7, 0.2, -0.35, 1.9, slope, origin="corner"),
        ActSpec(name, -1.3, 0.4, 0.6, -2.2, -slope, origin="falling corner"),
    ]
    for method in ("TAT", "DKS"):
        for depth in DEPTHS:
            try:
                found.append(solve(method, name, depth=depth))
            except (Unreachable, ValueError):
                continue
    return tuple(found)


def results(f: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_gradient_are_never_worse_than_eager(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    for spec in specs(name):
        for scale in SCALES:
            x, grad = draw(1 << 14, scale=scale).to(dtype), draw(1 << 14, seed=1).to(dtype)
            truth = results(lambda x, s=spec: reference.shaped_act(x, s), grad.double(), x.double())
            fused = results(lambda x, s=spec: shaped_act(x, s, backend=backend), grad, x)
            eager = results(lambda x, s=spec: stock(x, s), grad, x)
            for part, *tensors in zip(("y", "dx"), fused, eager, truth, strict=True):
                own, others = errors(tensors[0], tensors[2]), errors(tensors[1], tensors[2])
                assert math.isfinite(own[1])
                assert own[0] <= SLACK * others[0], (spec, scale, part, own, others)
                assert own[1] <= SLACK * others[1], (spec, scale, part, own, others)


@pytest.mark.parametrize("weight", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layers_with_a_residual_are_never_worse_than_eager(
    name: str, dtype: torch.dtype, weight: float
) -> None:
    own = math.sqrt((1 - weight) * (1 + weight))
    for spec, scale in itertools.product(specs(name), SCALES):
        x, r = (draw(64, 32, 4, 4, scale=scale, seed=i).to(dtype) for i in (0, 1))
        w, b = (draw(32, 32, 1, 1, seed=2) / 32**0.5).to(dtype), draw(32, seed=3).to(dtype) / 8
        grad, tensors = draw(64, 32, 4, 4, seed=4).to(dtype), (x, w, b, r)
        # On which side of a kink a sum falls that rounding decides is chance, to either.
        z = own * F.conv2d(x.double(), w.double(), b.double()) + weight * r.double()
        grad[undecided(z.to(dtype), spec)] = 0

        def joined(
            act: Callable[[Tensor], Tensor], x: Tensor, w: Tensor, b: Tensor, r: Tensor
        ) -> Tensor:
            return act(own * F.conv2d(x, w, b) + weight * r)

        def layer(x: Tensor, w: Tensor, b: Tensor, r: Tensor, s: ActSpec = spec) -> Tensor:
            return conv_act(x, w, b, s, residual=r, residual_weight=weight, engine="aten")

        plain = partial(joined, partial(reference.shaped_act, spec=spec))
        truth = results(plain, grad.double(), *(t.double() for t in tensors))
        fused = results(layer, grad, *tensors)
        eager = results(partial(joined, partial(stock, spec=spec)), grad, *tensors)
        # Errors of the weight's gradient are torch's own, made in both products.
        for i, part in ((0, "y"), (1, "dx"), (4, "dresidual")):
            mine, others = errors(fused[i], truth[i]), errors(eager[i], truth[i])
            assert math.isfinite(mine[1])
            assert mine[0] <= SLACK * others[0], (spec, scale, part, mine, others)


# One rounding of an exact number y is off by at most this times |y|; float32 adds next to nothing.
UNIT = {dtype: SLACK * torch.finfo(dtype).eps / 2 for dtype in HALF}
WEIGHTS = (0.1, 0.5, 0.8, 0.9, 0.95)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("output_shift", [0.0, 0.5], ids=["saves y", "saves z"])
def test_the_weight_of_a_residual_is_the_one_asked_for(
    output_shift: float, kind: str, weight: float, dtype: torch.dtype
) -> None:
    spec = ActSpec("leaky_relu", negative_slope=1.0, output_shift=output_shift)  # the identity
    r, grad = draw(64, 16).to(dtype), draw(64, 16, seed=1).to(dtype)
    x, w = torch.zeros_like(r), torch.zeros(16, 16, dtype=dtype)

    def layer(r: Tensor) -> Tensor:
        how = {"residual_weight": weight, "engine": "aten"}
        if kind == "linear":
            return linear_act(x, w, None, spec, residual=r, **how)
        joined = r.reshape(4, 16, 4, 4)
        y = conv_act(x.reshape_as(joined), w[..., None, None], None, spec, residual=joined, **how)
        return y.reshape_as(r)

    y, dr = results(layer, grad, r)
    for got, want in ((y, weight * r.double() + output_shift), (dr, weight * grad.double())):
        assert ((got.double() - want).abs() <= UNIT[dtype] * want.abs() + 1e-7).all()
    with torch.no_grad():
        assert torch.equal(layer(r), y)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("weights", [(0.8, 0.6), (0.6, -0.8), (1 / 3, 2 / 3, 2 / 3)])
def test_the_weights_of_a_sum_are_those_asked_for(
    weights: tuple[float, ...], dtype: torch.dtype
) -> None:
    branches = [draw(1 << 12, seed=i).to(dtype) for i in range(len(weights))]
    grad = draw(1 << 12, seed=9).to(dtype)
    y, *grads = results(NormalizedSum(weights), grad, *branches)
    terms = [w * u.double() for w, u in zip(weights, branches, strict=True)]
    sums = list(itertools.accumulate(terms))
    # The first product is rounded, and so is every sum.
    bound = UNIT[dtype] * 1.01 * sum(s.abs() for s in sums) + 1e-7
    assert ((y.double() - sums[-1]).abs() <= bound).all()
    for w, got in zip(weights, grads, strict=True):
        want = w * grad.double()
        assert ((got.double() - want).abs() <= UNIT[dtype] * want.abs() + 1e-7).all()


class _Sum(torch.nn.Module):
    """Its weights and shift cannot move into a layer, so `fold` leaves them in the graph."""

    def __init__(self, weights: tuple[float, float], spec: ActSpec) -> None:
        super().__init__()
        self.sum = NormalizedSum(weights)
        self.act = ShapedActivation(spec)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.sum(x, x.flip(0)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_folding_keeps_numbers_that_are_added(dtype: torch.dtype) -> None:
    spec = ActSpec("leaky_relu", 1.0, 0.2, 0.3, 1.0, 1.0)  # the identity, and 0.5
    folded = fold(_Sum((0.8, 0.6), spec).to(dtype))
    x = draw(1 << 12).to(dtype)
    parts = [0.8 * x.double(), 0.6 * x.flip(0).double()]
    sums = [*parts, sum(parts), sum(parts) + 0.2, sum(parts) + 0.5]
    # Two products and a sum, to which β and δ are added, each rounded once.
    bound = UNIT[dtype] * 1.01 * sum(s.abs() for s in sums) + 1e-7
    assert ((folded(x).double() - sums[-1]).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0], ids=str)
@pytest.mark.parametrize("mode", ["one", "avg_q", "off"])
def test_per_location_norm_rounds_once(mode: str, scale: float, dtype: torch.dtype) -> None:
    module = PerLocationNorm(mode, 0.7)  # type: ignore[arg-type]
    x = draw(4, 3, 8, 8, scale=scale).to(dtype)
    want = module(x.double())
    assert ((module(x).double() - want).abs() <= UNIT[dtype] * want.abs() + 1e-7).all()
