"""Formulas as lists of cuDNN's pointwise operations: arithmetic on a `Term` records it."""

from __future__ import annotations

from typing import NamedTuple


class Node(NamedTuple):
    """One operation of a graph.

    Attributes:
        op: the name of cuDNN's operation, as the methods of `cudnn.pygraph` have it.
        inputs: names of its operands, in cuDNN's order.
        output: name of its result.
    """

    op: str
    inputs: tuple[str, ...]
    output: str


class Recorder:
    """The operations of one graph so far, and the numbers they use.

    Attributes:
        nodes: in the order in which they were recorded.
        numbers: literal numbers, by the name of the operand that holds each.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.numbers: dict[str, float] = {}

    def apply(self, op: str, *inputs: Term | float) -> Term:
        """Record one operation and return its result."""
        names = tuple(self.lift(value).name for value in inputs)
        node = Node(op, names, f"t{len(self.nodes)}")
        self.nodes.append(node)
        return Term(self, node.output)

    def lift(self, value: Term | float) -> Term:
        """A term; a number becomes an operand of its own."""
        if isinstance(value, Term):
            return value
        name = repr(float(value))
        self.numbers[name] = float(value)
        return Term(self, name)


class Term:
    """A value in a graph.

    Example:
        >>> recorder = Recorder()
        >>> u = Term(recorder, "u")
        >>> (1 - u * u).name
        't1'
        >>> recorder.nodes[1]
        Node(op='sub', inputs=('1.0', 't0'), output='t1')
    """

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder = recorder
        self.name = name

    def __add__(self, other: Term | float) -> Term:
        return self.recorder.apply("add", self, other)

    def __radd__(self, other: float) -> Term:
        return self.recorder.apply("add", other, self)

    def __sub__(self, other: Term | float) -> Term:
        return self.recorder.apply("sub", self, other)

    def __rsub__(self, other: float) -> Term:
        return self.recorder.apply("sub", other, self)

    def __mul__(self, other: Term | float) -> Term:
        return self.recorder.apply("mul", self, other)

    def __rmul__(self, other: float) -> Term:
        return self.recorder.apply("mul", other, self)

    def __truediv__(self, other: Term | float) -> Term:
        return self.recorder.apply("div", self, other)

    def __neg__(self) -> Term:
        return self.recorder.apply("neg", self)

    def __abs__(self) -> Term:
        return self.recorder.apply("abs", self)

    def __le__(self, other: Term | float) -> Term:
        return self.recorder.apply("cmp_le", self, other)

    def __gt__(self, other: Term | float) -> Term:
        return self.recorder.apply("cmp_gt", self, other)

    def exp(self) -> Term:
        """The exponential function."""
        return self.recorder.apply("exp", self)

    def log(self) -> Term:
        """The natural logarithm."""
        return self.recorder.apply("log", self)

    def sqrt(self) -> Term:
        """The square root."""
        return self.recorder.apply("sqrt", self)

    def tanh(self) -> Term:
        """The hyperbolic tangent."""
        return self.recorder.apply("tanh", self)

    def sigmoid(self) -> Term:
        """The logistic function."""
        return self.recorder.apply("sigmoid", self)

    def erf(self) -> Term:
        """The error function."""
        return self.recorder.apply("erf", self)

    def sin(self) -> Term:
        """The sine."""
        return self.recorder.apply("sin", self)

    def cos(self) -> Term:
        """The cosine."""
        return self.recorder.apply("cos", self)

    def at_most(self, other: float) -> Term:
        """The smaller one; either, if this is NaN."""
        return self.recorder.apply("min", self, other)

    def at_least(self, other: float) -> Term:
        """The larger one; either, if this is NaN."""
        return self.recorder.apply("max", self, other)


def where(condition: Term, yes: Term | float, no: Term | float) -> Term:
    """`yes` where the condition, a comparison, holds, else `no`: for NaN too, which is nothing."""
    return condition.recorder.apply("binary_select", yes, no, condition)
