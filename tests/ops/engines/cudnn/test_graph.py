"""Graphs as cuDNN is given them compute what the reference does, node by node, without a device."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape import ACTIVATIONS, reference
from fusedshape.ops.engines.cudnn.formulas import FORMULAS
from fusedshape.ops.engines.cudnn.graph import Operation, draw, graph_of, values
from fusedshape.ops.layer import joined_spec
from fusedshape.spec import ActSpec
from tests.support import fake_cudnn
from tests.support.operands import draw as normal
from tests.support.specs import SPECS, shaped
from tests.support.tolerance import assert_as_good_as

STRIDED = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
POINT = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
#: Where kernels go wrong: both zeros, the smallest, large, largest and no numbers.
HARD = [
    *(s * n for s in (1, -1) for n in (0.0, 1e-40, 1e-8, 1e-3, 0.5, 1.0, 3.0, 20.0, 88.0, 104.0)),
    *(s * n for s in (1, -1) for n in (1e4, 1e10, 1e19, 1e30, 3e38, math.inf)),
    math.nan,
]
#: The arctangent is a polynomial, which is right to 2e-8.
EXACT = dict.fromkeys(ACTIVATIONS, 1e-12) | {"atan": 2.1e-8}
READABLE = [spec for spec in SPECS if spec.readable]


def operation(kind: str, activation: str | None = None, **how: Any) -> Operation:
    fields: dict[str, Any] = {"image": (2, 4, 6, 5), "weight": (6, 4, 3, 2), **STRIDED, **how}
    return Operation(kind=kind, dtype="float32", activation=activation, **fields)


def computed(
    op: Operation, feeds: dict[str, Tensor], spec: ActSpec, weight: float, dtype: torch.dtype
) -> list[Tensor]:
    """The results of an operation, drawn into a graph and computed from what was recorded."""
    graph = graph_of(op)
    drawn = fake_cudnn.pygraph(handle=None)
    draw(graph, drawn, fake_cudnn)
    drawn.validate()
    given = [feeds[operand.name] for operand in graph.tensors]
    numbers = [torch.tensor(v, dtype=dtype) for v in values(graph, spec.kernel_args, weight)]
    assert [tuple(t.shape) for t in given] == [operand.shape for operand in graph.tensors]
    found = fake_cudnn.evaluate(drawn, dict(enumerate((*given, *numbers), 1)), dtype)
    assert [tuple(t.shape) for t in found.values()] == [r.shape for r in graph.results]
    return [found[uid] for uid in sorted(found)]


def close(got: Tensor, want: Tensor, activation: str) -> None:
    scale = want[want.isfinite()].abs().amax().item()
    torch.testing.assert_close(
        got, want, rtol=EXACT[activation], atol=EXACT[activation] * scale, equal_nan=True
    )


def geometry(op: Operation, groups: int = 1) -> tuple[Any, ...]:
    return op.stride, op.padding, op.dilation, groups


def test_every_activation_has_a_formula() -> None:
    assert list(FORMULAS) == list(ACTIVATIONS)
    for name, row in ACTIVATIONS.items():
        assert (FORMULAS[name].d1_from_output is None) == (row.saves == "input"), name


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_forward(spec: ActSpec, residual: bool) -> None:
    op = operation("fprop_act", spec.activation, residual=residual)
    x, w, b = normal(*op.image), normal(*op.weight, seed=1), normal(op.weight[0], seed=2)
    r = normal(*op.output, seed=3)
    weight = 0.6 if residual else 0.0
    feeds = {"image": x, "weight": w, "bias": b.reshape(1, -1, 1, 1), "residual": r}
    own = joined_spec(spec, weight)
    (got,) = computed(op, feeds, own, weight, torch.float64)
    joining = (r, weight) if residual else ()
    close(got, reference.conv_act(x, w, b, spec, *geometry(op), *joining), spec.activation)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.6])
@pytest.mark.parametrize("spec", READABLE, ids=lambda s: s.activation)
def test_dgrad(spec: ActSpec, weight: float, sums: bool) -> None:
    """Through an activation that a residual of this weight has joined."""
    own = joined_spec(spec, weight)
    op = operation("dgrad_act", spec.activation, sums=sums)
    dz, w = normal(*op.output), normal(*op.weight, seed=1)
    saved = reference.shaped_act(normal(*op.image, seed=2), own)
    got = computed(op, {"loss": dz, "weight": w, "saved": saved}, own, 0.0, torch.float64)
    x = normal(*op.image).requires_grad_()
    z = F.conv2d(x, w, None, *geometry(op))
    (dx,) = torch.autograd.grad(z, x, dz)
    want = reference.act_grad(dx, saved, None, own, 1)
    close(got[0], want, spec.activation)
    assert len(got) == 1 + sums
    if sums:
        close(got[1].flatten(), reference.channel_sum(want, 1), spec.activation)


@pytest.mark.parametrize("groups", [1, 2])
def test_products(groups: int) -> None:
    how = {"weight": (6, 4 // groups, 3, 2)}
    op = operation("fprop", **how)
    x, w = (normal(*shape).requires_grad_() for shape in (op.image, op.weight))
    z = F.conv2d(x, w, None, *geometry(op, groups))
    dz = normal(*op.output, seed=2)
    want = dict(zip(("dgrad", "wgrad"), torch.autograd.grad(z, (x, w), dz), strict=True))
    feeds = {"image": x.detach(), "weight": w.detach(), "loss": dz}
    for kind, expected in {"fprop": z.detach(), **want}.items():
        (got,) = computed(operation(kind, **how), feeds, SPECS[0], 0.0, torch.float64)
        close(got, expected, "relu")


def column(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1, 1, 1)


def one(kind: str, activation: str, count: int, **how: Any) -> Operation:
    return operation(kind, activation, image=(count, 1, 1, 1), weight=(1, 1, 1, 1), **POINT, **how)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_forward_of_hard_numbers_in_float32(spec: ActSpec) -> None:
    """Finite where the reference is, and close; NaN and ±inf where it has them."""
    for own in (ActSpec(spec.activation, negative_slope=spec.negative_slope), spec):
        op = one("fprop_act", own.activation, len(HARD))
        feeds = {
            "image": column(HARD),
            "weight": torch.ones(1, 1, 1, 1),
            "bias": torch.zeros(1, 1, 1, 1),
        }
        (got,) = computed(op, feeds, own, 0.0, torch.float32)
        same_everywhere(got, reference.shaped_act(feeds["image"], own))


@pytest.mark.parametrize("spec", READABLE, ids=lambda s: s.activation)
def test_dgrad_of_hard_numbers_in_float32(spec: ActSpec) -> None:
    for own in (ActSpec(spec.activation, negative_slope=spec.negative_slope), spec):
        pairs = list(itertools.product(HARD, HARD))
        op = one("dgrad_act", own.activation, len(pairs))
        dz, saved = (column([pair[i] for pair in pairs]) for i in (0, 1))
        feeds = {"loss": dz, "weight": torch.ones(1, 1, 1, 1), "saved": saved}
        (got,) = computed(op, feeds, own, 0.0, torch.float32)
        same_everywhere(got, reference.act_grad(dz, saved, None, own, 1))


def same_everywhere(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    infinite = want.isinf()
    assert torch.equal(got[infinite], want[infinite])
    finite = want.isfinite()
    # A few units in the last place of the number, or of 1, about which formulas may cancel.
    error = (got[finite].double() - want[finite].double()).abs()
    assert (error <= 2e-6 * want[finite].double().abs().clamp(min=1)).all(), error.max()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_float32_is_as_good_as_the_reference(spec: ActSpec) -> None:
    """On a grid of what networks have; the steps are those cuDNN would take, each rounded."""
    numbers = torch.linspace(-12, 12, 4001).reshape(-1, 1, 1, 1)
    op = one("fprop_act", spec.activation, len(numbers))
    feeds = {"image": numbers, "weight": torch.ones(1, 1, 1, 1), "bias": torch.zeros(1, 1, 1, 1)}
    (got,) = computed(op, feeds, spec, 0.0, torch.float32)
    truth = reference.shaped_act(numbers.double(), spec)
    assert_as_good_as(got, reference.shaped_act(numbers, spec), truth)
    if not spec.readable:
        return
    saved = truth.float()
    feeds = {"loss": torch.ones_like(numbers), "weight": feeds["weight"], "saved": saved}
    (got,) = computed(
        one("dgrad_act", spec.activation, len(numbers)), feeds, spec, 0.0, torch.float32
    )
    ones = torch.ones_like(numbers)
    plain = reference.act_grad(ones, saved, None, spec, 1)
    truth = reference.act_grad(ones.double(), saved.double(), None, spec, 1)
    assert_as_good_as(got, plain, truth)


def test_constants_are_no_part_of_a_graph() -> None:
    op = operation("fprop_act", "leaky_relu")
    graph = graph_of(op)
    assert set(graph.numbers) == {"slope", "alpha", "beta", "delta", "gamma", "0.0"}
    one, other = (values(graph, spec.kernel_args, 0.0) for spec in (SPECS[1], shaped("leaky_relu")))
    assert one == other
    assert values(graph, ActSpec("leaky_relu", 3.0).kernel_args, 0.0) != one


def test_it_is_drawn_with_channels_innermost_and_the_types_of_the_operation() -> None:
    op = operation("dgrad_act", "relu", sums=True)._replace(dtype="bfloat16")
    drawn = fake_cudnn.pygraph(handle=None)
    draw(graph_of(op), drawn, fake_cudnn)
    found = {t.name: (t.type.name, t.stride) for t in drawn.inputs if not t.by_value}
    assert found["saved"] == ("BFLOAT16", [120, 1, 20, 4])
    assert found["loss"][0] == found["weight"][0] == "BFLOAT16"
    dx, sums = (t for t in drawn.steps if t.output)
    assert (dx.type.name, sums.type.name, sums.dim) == ("BFLOAT16", "FLOAT", [1, 4, 1, 1])
    masks = [t for t in drawn.steps if t.made_by[0].startswith("cmp_")]
    assert masks
    assert {t.type.name for t in masks} == {"BOOLEAN"}
