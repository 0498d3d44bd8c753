"""All who read a graph or a tape take the table's word for an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fusedshape
from fusedshape import ActSpec, ShapedConv1d
from fusedshape.diagnose.operation import Operation
from fusedshape.diagnose.tape import Tape
from fusedshape.theory import trace_wiring


class Between(nn.Module):
    """A function between two linear layers, or on what the first gives."""

    def __init__(self, function: Callable[..., Any], last: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4) if last else nn.Identity()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.last(self.function(self.first(x)))


def ops(model: nn.Module) -> list[str]:
    return [node.op for node in trace_wiring(model).nodes]


def written_through(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def function(y: Tensor) -> Tensor:
        other = view(y)
        y.relu_()
        return other

    return function


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.swapdims(0, 1),
        lambda y: y.moveaxis(0, 1),
        lambda y: torch.tensor_split(y, 2, 1)[0],
        lambda y: y.unfold(1, 2, 2),
        lambda y: F.dropout1d(y, 0.0),
        lambda y: +y,
    ],
    ids=["swapdims", "moveaxis", "tensor_split", "unfold", "dropout1d", "pos"],
)
def test_convert_sees_work_in_place_through_every_view(view: Callable[[Tensor], Tensor]) -> None:
    model = Between(written_through(view), last=False)
    with pytest.raises(ValueError, match="used again"):
        fusedshape.convert(model, eta=0.2)


def test_a_cast_by_type_is_no_question() -> None:
    assert ops(Between(lambda y: y.type(torch.float32))) == ["input", "affine", "affine"]


def cloned(y: Tensor) -> Tensor:
    z = y.clone()
    z.relu_()
    return y


def test_a_clone_has_the_same_numbers_in_memory_of_its_own() -> None:
    assert ops(Between(lambda y: y.clone().relu())) == ["input", "affine", "nonlinear", "affine"]
    wiring = trace_wiring(Between(cloned, last=False))
    assert [wiring.nodes[i].op for i in wiring.outputs] == ["affine"]
    joined = trace_wiring(Between(lambda y: torch.cat([y.clone(), y.relu()], 1), last=False))
    assert joined.nodes[-1].weights == (4.0, 4.0)


@pytest.mark.parametrize(("stride", "size", "op"), [(2, 4, "reshape"), (1, 3, "unknown")])
def test_blocks_that_overlap_are_no_rearrangement(stride: int, size: int, op: str) -> None:
    function = lambda y: F.fold(y, (size, size), 2, stride=stride)  # noqa: E731
    assert ops(Between(function, last=False))[-1] == op
    assert ops(nn.Sequential(nn.Linear(4, 4), nn.Fold(size, 2, stride=stride)))[-1] == op
    assert taped(torch.randn(2, 4, 4), function) == op


@pytest.mark.parametrize("name", ["amin", "min"])
def test_the_smallest_value_is_a_pool_as_the_largest_is(name: str) -> None:
    smallest = lambda y: getattr(y.unflatten(1, (4, 1)), name)(2)  # noqa: E731
    largest = lambda y: y.unflatten(1, (4, 1)).amax(2)  # noqa: E731
    assert ops(Between(smallest, last=False)) == ops(Between(largest, last=False))


class FullyShardedDataParallel(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        raise RuntimeError("no process group")


def test_trace_reads_through_every_wrapper_that_convert_refuses() -> None:
    model = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert [node.path for node in trace_wiring(model).nodes][1:] == ["module.0", "module.1"]
    with pytest.raises(ValueError, match=r"its \.module"):
        fusedshape.convert(model)


SPEC = ActSpec("tanh", 0.7, 0.1, -0.2, 1.9)


class Moved(nn.Module):
    """A function between two convolutions, the first of them fused."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = ShapedConv1d(3, 4, 3, spec=SPEC)
        self.last = nn.Conv1d(4, 2, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def arithmetic(model: fx.GraphModule) -> int:
    return sum(node.target in (torch.add, torch.mul) for node in model.graph.nodes)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda y: y.swapaxes(1, 2).mT, 0),
        (lambda y: y.unflatten(2, (2, -1)).flatten(2), 0),
        (lambda y: y.flip(2), 0),
        (lambda y: y.roll(1, 2), 0),
        (lambda y: y.narrow(2, 0, 6), 0),
        (lambda y: y[:, :, 1:], 0),
        (lambda y: y.repeat(1, 1, 2), 0),
        (lambda y: F.interpolate(y, scale_factor=2.0), 0),
        (lambda y: F.pad(y, (1, 1), mode="reflect"), 0),
        (lambda y: F.pad(y, (1, 1)), 1),  # zeros would not be zeros once the shift is taken away
        (lambda y: F.pad(y, (1, 1), value=0.5), 2),
        (lambda y: F.adaptive_max_pool1d(y, 4), 0),
    ],
)
def test_fold_carries_constants_through_what_only_moves(
    function: Callable[[Tensor], Tensor], left: int
) -> None:
    torch.manual_seed(0)
    model = Moved(function).eval()
    x = torch.randn(2, 3, 10)
    folded = fusedshape.fold(model, example=x)
    assert torch.allclose(folded(x), model(x), atol=1e-5)
    assert arithmetic(folded) == left


def taped(x: Tensor, function: Callable[[Tensor], Tensor]) -> str:
    """The step that a function of a linear layer's value makes on a tape."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.layer(x))

    tape = Tape(Net(), len(x), lambda t, dim: t.mean())
    with torch.no_grad():
        tape.run(x)
    return tape.steps[-1].op


def test_arguments_are_read_by_name_whether_they_are_given_by_it_or_not() -> None:
    x = torch.randn(8, 4)
    assert taped(x, lambda y: torch.div(y, 2)) == "sum"
    assert taped(x, lambda y: torch.div(y, 2, rounding_mode="floor")) == "nonlinear"
    w, b = torch.eye(4), torch.zeros(4)
    assert taped(x, lambda y: torch.addmm(b, y, w)) == "affine"
    assert taped(x, lambda y: torch.addmm(b, y, w, alpha=0.5)) == "unknown"
    assert taped(x, lambda y: torch.cat([y, y], dim=1)) == "concat"
    assert taped(x, lambda y: torch.cat([y, y], 1)) == "concat"


def test_an_operation_names_its_arguments_and_their_defaults() -> None:
    x, w = torch.randn(1, 1, 4), torch.randn(1, 1, 3)
    func = torch.ops.aten.convolution.default
    args = (x, w, None, [1], [0], [1], False, [0], 1)
    op = Operation.of(func, args, {}, lambda t: t is x)
    assert list(op.given) == [a.name for a in func._schema.arguments]
    assert op["weight"] is w
    assert op["groups"] == 1
    assert op.x is x
    pool = Operation.of(torch.ops.aten.avg_pool2d.default, (x, [2, 2]), {}, lambda t: True)
    assert pool["ceil_mode"] is False
    assert pool.get("dilation", 1) == 1
