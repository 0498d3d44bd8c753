"""What cuDNN is asked to compute in one call: operands, operations, and results, as a value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from fusedshape.ops.engines.cudnn.formulas import FORMULAS
from fusedshape.ops.engines.cudnn.terms import Node, Recorder, Term
from fusedshape.ops.layer import share
from fusedshape.spec import KernelArgs

#: What one call computes; "fprop_act" ends with φ̂, "dgrad_act" with φ̂′ of the layer before.
Kind = Literal["fprop", "fprop_act", "dgrad", "dgrad_act", "wgrad"]


class Operation(NamedTuple):
    """One call of cuDNN for one layer: what a plan is made for. All of it can be written as JSON.

    Attributes:
        kind: what is computed.
        dtype: of tensors, "float16", "bfloat16" or "float32", whose products are rounded to tf32;
            biases, sums and everything in between are in float32.
        image: shape of the layer's input.
        weight: shape of its weight.
        stride: one number for each spatial dimension, and so are the next two.
        padding: of zeros on both sides.
        dilation: distance of taps.
        activation: name of φ; None where there is none.
        residual: whether a residual joins before the activation.
        sums: whether the sum over all but the channels is computed too, with atomic additions.
    """

    kind: Kind
    dtype: str
    image: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    activation: str | None = None
    residual: bool = False
    sums: bool = False

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of the layer's output."""
        sizes = zip(
            self.image[2:], self.weight[2:], self.stride, self.padding, self.dilation, strict=True
        )
        spatial = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return (self.image[0], self.weight[0], *spatial)


class Operand(NamedTuple):
    """A tensor that a call reads or writes.

    Attributes:
        name: how nodes refer to it.
        shape: (N, C, *spatial), or (K, C, *kernel).
        dtype: as torch calls it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


class Graph(NamedTuple):
    """A convolution and the pointwise operations after it.

    Attributes:
        operation: what it is for.
        tensors: what it reads, in the order in which a call gives them.
        numbers: what it reads beside them, in order: names of `CONSTANTS`, or literal numbers.
        convolution: the first node, a convolution.
        nodes: the pointwise operations, in order.
        results: what it writes, in order; a reduction writes the second.
    """

    operation: Operation
    tensors: tuple[Operand, ...]
    numbers: tuple[str, ...]
    convolution: Node
    nodes: tuple[Node, ...]
    results: tuple[Operand, ...]


#: The constants that a call gives, computed from those of the activation and the residual's weight.
#: They are no part of a plan.
CONSTANTS: dict[str, Callable[[KernelArgs, float], float]] = {
    "slope": lambda args, w: args[1],
    "alpha": lambda args, w: args[2],
    "beta": lambda args, w: args[3],
    "delta": lambda args, w: args[4],
    "gamma": lambda args, w: args[5],
    "alpha*gamma": lambda args, w: args[2] * args[5],
    "1/gamma": lambda args, w: 1 / args[5],
    "share": lambda args, w: share(w),
}

_CONVOLUTIONS: dict[str, tuple[str, tuple[str, str]]] = {
    "fprop": ("conv_fprop", ("image", "weight")),
    "dgrad": ("conv_dgrad", ("loss", "weight")),
    "wgrad": ("conv_wgrad", ("image", "loss")),
}


def graph_of(operation: Operation) -> Graph:
    """Write an operation as a graph.

    Example:
        >>> operation = Operation(
        ...     "fprop_act", "float16", (1, 8, 4, 4), (8, 8, 1, 1), (1, 1), (0, 0), (1, 1), "relu"
        ... )
        >>> graph = graph_of(operation)
        >>> [node.op for node in graph.nodes]
        ['add', 'mul', 'add', 'cmp_le', 'binary_select', 'add', 'mul']
        >>> [tensor.name for tensor in graph.tensors]
        ['image', 'weight', 'bias']
    """
    direction = operation.kind.partition("_")[0]
    op, inputs = _CONVOLUTIONS[direction]
    dtype = operation.dtype
    shapes = {"image": operation.image, "weight": operation.weight, "loss": operation.output}
    target = {"fprop": "loss", "dgrad": "image", "wgrad": "weight"}[direction]
    tensors = [Operand(name, shapes[name], dtype) for name in inputs]
    recorder = Recorder()
    product = Term(recorder, "product")
    result = product
    if operation.kind == "fprop_act":
        result = _forward(operation, product, tensors)
    elif operation.kind == "dgrad_act":
        tensors.append(Operand("saved", operation.image, dtype))
        result = _backward(operation, product)
    results = [Operand(result.name, shapes[target], dtype)]
    if operation.sums:
        channels = operation.image[1]
        results.append(Operand("sums", (1, channels, *[1] * len(operation.stride)), "float32"))
    used = dict.fromkeys(name for node in recorder.nodes for name in node.inputs)
    numbers = tuple(name for name in used if name in CONSTANTS or name in recorder.numbers)
    first = Node(op, inputs, "product")
    return Graph(operation, tuple(tensors), numbers, first, tuple(recorder.nodes), tuple(results))


def _forward(operation: Operation, z: Term, tensors: list[Operand]) -> Term:
    """φ̂ of a product; adds what it reads to `tensors`."""
    recorder = z.recorder
    channels = operation.weight[0]
    tensors.append(Operand("bias", (1, channels, *[1] * len(operation.stride)), "float32"))
    z = z + Term(recorder, "bias")
    if operation.residual:
        tensors.append(Operand("residual", operation.output, operation.dtype))
        z = z + Term(recorder, "residual") * Term(recorder, "share")
    u = z * Term(recorder, "alpha") + Term(recorder, "beta")
    assert operation.activation is not None
    v = FORMULAS[operation.activation].value(u, Term(recorder, "slope"))
    return (v + Term(recorder, "delta")) * Term(recorder, "gamma")


def _backward(operation: Operation, dx: Term) -> Term:
    """A gradient times φ̂′ of the layer before, read off its output."""
    recorder = dx.recorder
    assert operation.activation is not None
    rule = FORMULAS[operation.activation].d1_from_output
    assert rule is not None
    v = Term(recorder, "saved") * Term(recorder, "1/gamma") - Term(recorder, "delta")
    slope = rule(v, Term(recorder, "slope"))
    return (slope * Term(recorder, "alpha*gamma")) * dx


def values(graph: Graph, constants: KernelArgs, residual_weight: float) -> list[float]:
    """The numbers that a call gives, in order."""
    return [
        CONSTANTS[name](constants, residual_weight) if name in CONSTANTS else float(name)
        for name in graph.numbers
    ]


#: What cuDNN calls the operands of its operations.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "add": ("a", "b"),
    "sub": ("a", "b"),
    "mul": ("a", "b"),
    "div": ("a", "b"),
    "min": ("input0", "input1"),
    "max": ("input0", "input1"),
    "cmp_le": ("input", "comparison"),
    "cmp_gt": ("input", "comparison"),
    "binary_select": ("input0", "input1", "mask"),
    "conv_fprop": ("image", "weight"),
    "conv_dgrad": ("loss", "filter"),
    "conv_wgrad": ("image", "loss"),
}
_TYPES = {"float16": "HALF", "bfloat16": "BFLOAT16", "float32": "FLOAT"}


def draw(graph: Graph, into: Any, cudnn: Any) -> None:
    """Write a graph into an empty `cudnn.pygraph`.

    Tensors, numbers and results have the uids 1, 2, … in this order.

    Args:
        graph: the graph.
        into: the pygraph.
        cudnn: the module.
    """
    known: dict[str, Any] = {}
    types = {name: getattr(cudnn.data_type, theirs) for name, theirs in _TYPES.items()}
    for uid, (name, shape, dtype) in enumerate(graph.tensors, 1):
        how = {"name": name, "uid": uid, "data_type": types[dtype]}
        known[name] = into.tensor(dim=list(shape), stride=_innermost(shape), **how)
    ones = [1] * len(graph.operation.image)
    for uid, name in enumerate(graph.numbers, 1 + len(graph.tensors)):
        how = {"name": name, "uid": uid, "data_type": types["float32"], "is_pass_by_value": True}
        known[name] = into.tensor(dim=ones, stride=ones, **how)
    for node in (graph.convolution, *graph.nodes):
        names = _ARGUMENTS.get(node.op, ("input",))
        operands = dict(zip(names, (known[name] for name in node.inputs), strict=True))
        made = getattr(into, node.op)(**operands, **_attributes(graph, node))
        if node.op.startswith("cmp_"):
            made.set_data_type(cudnn.data_type.BOOLEAN)
        if node is graph.convolution and graph.operation.kind[:5] != "fprop":
            # Inputs of several sizes give the same output, so cuDNN must be told which.
            shape = graph.operation.weight if node.op == "conv_wgrad" else graph.operation.image
            made.set_dim(list(shape)).set_stride(_innermost(shape))
        known[node.output] = made
    first = len(graph.tensors) + len(graph.numbers) + 1
    for uid, (name, shape, dtype) in enumerate(graph.results, first):
        if name not in known:
            known[name] = into.reduction(
                input=known[graph.results[0].name], mode=cudnn.reduction_mode.ADD
            )
        known[name].set_dim(list(shape)).set_stride(_innermost(shape))
        known[name].set_output(True).set_data_type(types[dtype]).set_uid(uid)


def _attributes(graph: Graph, node: Node) -> dict[str, Any]:
    if node is not graph.convolution:
        return {}
    operation = graph.operation
    return {
        "padding": list(operation.padding),
        "stride": list(operation.stride),
        "dilation": list(operation.dilation),
    }


def _innermost(shape: tuple[int, ...]) -> list[int]:
    """Strides of a dense tensor with its channels innermost."""
    _, channels, *spatial = shape
    strides = [channels * math.prod(spatial[i + 1 :]) for i in range(len(spatial))]
    return [channels * math.prod(spatial), 1, *strides]
