"""Where values come from and go to in a model, through what hardly changes them: `Values`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from fusedshape.convert.calls import Calls
from fusedshape.nodes import is_query, operation
from fusedshape.torch_ops import base, function_of

#: A value: the module in whose forward a node stands, and the node.
Value = tuple[nn.Module, fx.Node]


@dataclass(frozen=True, eq=False)
class Values:
    """The values of a model, followed in and out of modules.

    Attributes:
        calls: the model's calls.
        passing: the operations, by `base`, through which a value is followed.
        known: for the graphs met so far, the nodes that depend on the input.
    """

    calls: Calls
    passing: frozenset[str]
    known: dict[fx.Graph, frozenset[fx.Node]] = field(default_factory=dict)

    def before(self, starts: Iterable[Value], ends: Callable[[Value], bool]) -> list[Value]:
        """All that some values are put together from, the values themselves included.

        Args:
            starts: the values.
            ends: whether a value is not followed further.
        """
        return _closure(starts, lambda value: [] if ends(value) else self._sources(*value))

    def after(self, starts: Iterable[Value], ends: Callable[[Value], bool]) -> list[Value]:
        """All that takes some values, or is put together from them, the values included.

        Args:
            starts: the values.
            ends: whether a value is not followed further.
        """
        return _closure(starts, lambda value: [] if ends(value) else self._takers(*value))

    def passes(self, owner: nn.Module, node: fx.Node) -> bool:
        """Whether a value is followed through a node; also where another factor is constant."""
        if node.op == "call_module":
            called = self.calls.called(owner, node)
            return type(called) is nn.Identity or base(function_of(called)) in self.passing
        return base(operation(node).rstrip("_")) in self.passing

    def depending(self, node: fx.Node) -> list[fx.Node]:
        """A node's arguments that depend on the input, but for sizes and the like."""
        if node.graph not in self.known:
            found: set[fx.Node] = set()
            for each in node.graph.nodes:
                own = each.op in ("placeholder", "call_module")
                if own or (not is_query(each) and any(a in found for a in each.all_input_nodes)):
                    found.add(each)
            self.known[node.graph] = frozenset(found)
        return [arg for arg in node.all_input_nodes if arg in self.known[node.graph]]

    def _sources(self, owner: nn.Module, node: fx.Node) -> Iterator[Value]:
        if node.op == "placeholder":
            place = list(node.graph.find_nodes(op="placeholder")).index(node)
            for caller, call in self.calls.calls.get(owner, []):
                given = [*call.args, *call.kwargs.values()][place : place + 1]
                yield from ((caller, value) for value in given if isinstance(value, fx.Node))
            return
        called = self.calls.called(owner, node)
        if called is not None and called in self.calls.graphs:
            for graph in self.calls.graphs[called]:
                (result,) = graph.find_nodes(op="output")
                yield from ((called, value) for value in result.all_input_nodes)
        elif self.passes(owner, node):
            yield from ((owner, value) for value in self.depending(node))

    def _takers(self, owner: nn.Module, node: fx.Node) -> Iterator[Value]:
        for user in node.users:
            called = self.calls.called(owner, user)
            if user.op == "output":
                yield from self.calls.calls.get(owner, [(owner, user)])
            elif called is not None and called in self.calls.graphs:
                place = user.all_input_nodes.index(node)
                for graph in self.calls.graphs[called]:
                    inputs = list(graph.find_nodes(op="placeholder"))[place : place + 1]
                    for value in inputs:
                        yield from self._takers(called, value)
            elif not is_query(user):
                yield owner, user


def _closure(starts: Iterable[Value], step: Callable[[Value], Iterable[Value]]) -> list[Value]:
    found = dict.fromkeys(starts)
    stack = list(found)
    while stack:
        for value in step(stack.pop()):
            if value not in found:
                found[value] = None
                stack.append(value)
    return list(found)
