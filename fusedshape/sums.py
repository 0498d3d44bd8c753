"""Sums of values in a traced graph, and which of them are skip connections: `sums`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from fusedshape.nodes import is_foreign, is_query, operation
from fusedshape.torch_ops import PRODUCTS, QUOTIENTS, SUMS, name_of, writes
from fusedshape.tracing import take_over

#: Why a sum is no skip.
CONSTANT = "no skip: an operand does not depend on the input"
DOUBLED = "no skip: both operands are the same"
_MANY = "a sum of more than two branches"
_NUMBER = "an operand carries a number as its weight already"
_SCALINGS = PRODUCTS | QUOTIENTS


@dataclass(eq=False)
class Sum:
    """A sum of values in one graph.

    Attributes:
        node: the outermost addition.
        places: where its operands stand: an addition and the number of its operand.
        operands: those operands as they were found.
        fork: the last value that all operands come from; None if there is none.
        why: why it is no skip.
    """

    node: fx.Node
    places: list[tuple[fx.Node, int]]
    operands: list[fx.Node]
    fork: fx.Node | None = None
    why: str = ""

    @classmethod
    def of(cls, node: fx.Node) -> Sum | None:
        """The sum that a node is; None for other nodes."""
        found = operands_of(node)
        return None if found is None else cls(node, [(node, 0), (node, 1)], list(found))

    @property
    def text(self) -> str:
        """The sum, written with the graph's names."""
        return " + ".join(operand.name for operand in self.operands)

    @property
    def additions(self) -> list[fx.Node]:
        """Its additions, the outermost first."""
        return list(dict.fromkeys([self.node, *(node for node, _ in self.places)]))

    def now(self) -> list[fx.Node]:
        """Its operands as they are after other sums were changed."""
        found = [(operands_of(node), i) for node, i in self.places]
        return [
            old if pair is None else pair[i]
            for (pair, i), old in zip(found, self.operands, strict=True)
        ]


def operands_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a node that adds two values, None for other nodes."""
    if is_foreign(node) or operation(node).removesuffix("_") not in SUMS:
        return None
    a = node.args[0] if node.args else node.kwargs.get("input")
    b = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def sums(graph: fx.Graph, every: bool) -> list[Sum]:
    """All sums in a graph; `why` is set for those that are no skips.

    Args:
        graph: of one forward; sums in place take over the later uses of what they changed.
        every: whether sums of more than two branches are put together.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    found = [one for node in graph.nodes if (one := Sum.of(node)) is not None]
    for one in found:
        if writes(name_of(one.node.target)):
            # Later users of the changed tensor take the sum's result: it is what they would see.
            take_over(one.operands[0], one.node, order)
    found = [one for node in order if (one := Sum.of(node)) is not None]
    dominators = _Dominators(graph)
    # Leave out sums of numbers and constants.
    found = [one for one in found if any(a in dominators.above for a in one.operands)]
    for one in found:
        _judge(one, dominators)
    return _joined(found, dominators) if every else _parted(found)


def _parts(found: list[Sum]) -> Iterator[tuple[Sum, Sum]]:
    """Sums of more than two branches: an outer sum with each inner one."""
    by_node = {one.node: one for one in found}
    for one in found:
        for operand in one.operands:
            inner = by_node.get(operand)
            if inner is not None and operand is not one.fork and inner.fork is one.fork:
                yield one, inner


def _parted(found: list[Sum]) -> list[Sum]:
    """Sums of two values; those of more branches are no skips."""
    for one, inner in _parts(found):
        for part in (inner, one):
            part.why = part.why or _MANY
    return found


def _joined(found: list[Sum], dominators: _Dominators) -> list[Sum]:
    """Sums with all their branches."""
    inside: set[Sum] = set()
    for one, inner in list(_parts(found)):  # inner sums come first in a graph
        if len(inner.node.users) > 1 or inner.why in (CONSTANT, DOUBLED):
            continue
        i = one.operands.index(inner.node)
        one.operands[i : i + 1] = inner.operands
        one.places[i : i + 1] = inner.places
        inside.add(inner)
        _judge(one, dominators)
    return [one for one in found if one not in inside]


def _judge(found: Sum, dominators: _Dominators) -> None:
    """Find the fork, or the reason why a sum is no skip."""
    operands = found.operands
    found.why = ""
    if not all(a in dominators.above for a in operands):
        found.why = CONSTANT
        return
    fork: fx.Node | None = operands[0]
    for operand in operands[1:]:
        fork = dominators.common(fork, operand)
    found.fork = fork
    weighed = any(n.kwargs.get("alpha", 1) != 1 or len(n.args) > 2 for n in found.additions)
    if found.fork is None:
        found.why = "no skip: its operands come from different inputs"
    elif len(set(operands)) < len(operands):
        found.why = DOUBLED
    elif weighed or any(map(_scaled, operands)):
        found.why = _NUMBER
    else:
        inside = between(found.fork, operands)
        for node in inside:
            users = [u for u in node.users if u not in inside and u not in found.additions]
            if any(not is_query(u) for u in users):
                found.why = f"no skip: {node.name}, inside a branch, is used outside it too"


def _scaled(node: fx.Node) -> bool:
    scales = operation(node).removesuffix("_") in _SCALINGS and not is_foreign(node)
    return scales and any(isinstance(a, (int, float)) for a in node.args)


def without_number(node: fx.Node) -> fx.Node:
    """What a node multiplies by a number, if nothing else takes the product."""
    inverse = operation(node).removesuffix("_") in QUOTIENTS and node.args[0:1] != tuple(
        node.all_input_nodes
    )
    if not _scaled(node) or inverse or writes(name_of(node.target)) or len(node.users) > 1:
        return node
    (value,) = node.all_input_nodes
    return value


def between(fork: fx.Node | None, ends: Sequence[fx.Node], constants: bool = False) -> set[fx.Node]:
    """The nodes inside the branches between a fork and a sum, with or without parameters."""
    ending = ("placeholder",) if constants else ("get_attr", "placeholder")
    stack, found = list(ends), set()
    while stack:
        node = stack.pop()
        if node is not fork and node not in found and node.op not in ending:
            found.add(node)
            stack += [] if is_query(node) else node.all_input_nodes
    return found


class _Dominators:
    """The immediate dominator of each value: the last one before it that all input data passes.

    Attributes:
        above: the dominator of each node that depends on the input's data; None for the input.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.above: dict[fx.Node, fx.Node | None] = {}
        self.height: dict[fx.Node | None, int] = {None: 0}
        for node in graph.nodes:
            data = [a for a in node.all_input_nodes if a in self.above]
            if node.op == "placeholder" or (data and not is_query(node)):
                above = functools.reduce(self.common, data) if data else None
                self.above[node] = above
                self.height[node] = self.height[above] + 1

    def common(self, a: fx.Node | None, b: fx.Node | None) -> fx.Node | None:
        """The last value that all data of both a and b passes; it may be a or b."""
        while a is not b:
            if self.height[a] < self.height[b]:
                a, b = b, a
            assert a is not None
            a = self.above[a]
        return a
