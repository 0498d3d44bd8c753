"""The nodes of a wiring as they are found: `Nodes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fusedshape.spec import ActSpec, from_torch
from fusedshape.theory.network import Node, Op
from fusedshape.theory.trace.signals import BY_HAND, Cell, Signal, channels_of

# A factor on the input of these is a factor on their output; a norm removes it.
_LINEAR = ("affine", "pool", "reshape", "dropout", "norm")


class Nodes:
    """The nodes found so far, and what is noted of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.nodes: list[Node] = []
        self.notes: dict[str, None] = {}
        self.softmax: set[int] = set()
        self.origins: list[int] = []  # for each node, the first node with the same weights
        self.weights: dict[Any, int] = {}
        self.gates: dict[str, float] = {}  # the gates' mean squares, by where they multiply
        self.averages: list[str] = []  # where attention averages over locations

    def append(self, node: Node) -> int:
        """Add a node and return its index."""
        self.nodes.append(node)
        self.origins.append(len(self.origins))
        return len(self.nodes) - 1

    def emit(
        self,
        op: Op,
        taken: Sequence[Signal],
        path: str,
        *,
        weights: tuple[float, ...] = (),
        spec: ActSpec | None = None,
        note: str = "",
        channels: int | None = None,
        axes: frozenset[int] = frozenset(),
    ) -> Signal:
        """Add a node and return its value."""
        factor = 1.0
        inputs: tuple[int, ...]
        if op in _LINEAR:
            i, factor = self.bare(taken[0])
            inputs = (i,)
        else:
            inputs = tuple(self.index(signal) for signal in taken)
        i = self.append(Node(op, inputs, weights, path, spec, note))
        terms = {i: 1.0 if op == "norm" else factor}
        return Signal(Cell(terms, taken[0].cell.path if taken else ""), channels, axes)

    def like(self, op: Op, signal: Signal, path: str, **kwargs: Any) -> Signal:
        """Add a node whose output has its input's channels."""
        return self.emit(op, [signal], path, channels=signal.channels, axes=signal.axes, **kwargs)

    def unknown(self, taken: Sequence[Signal], path: str, note: str) -> Signal:
        """Add a node that cannot be read."""
        return self.emit("unknown", taken, path or type(self.model).__name__, note=note)

    def bare(self, signal: Signal) -> tuple[int, float]:
        """The node that a signal is a multiple of, and the factor."""
        if len(signal.cell.terms) != 1:
            self.index(signal)
        ((i, factor),) = signal.cell.terms.items()
        return i, factor

    def index(self, signal: Signal) -> int:
        """The node that holds a signal's value; a sum is added for it if there is none."""
        cell = signal.cell
        if list(cell.terms.values()) != [1.0]:
            inputs, weights = tuple(cell.terms), tuple(cell.terms.values())
            node = Node("sum", inputs, weights, cell.path)
            why = self._dependent(inputs)
            if why:
                node = replace(node, op="unknown", weights=(), note=why)
            cell.terms = {self.append(node): 1.0}
        return next(iter(cell.terms))

    def _dependent(self, inputs: tuple[int, ...]) -> str:
        """Why the terms of a sum are not independent of one another; "" if they are.

        Weights of its own make a term independent of the others, so only the nodes after the last
        affine node of each term are compared. Terms are visited from the latest to the earliest: no
        term leads to a node later than itself, which keeps the search short.
        """
        owner: dict[int, int] = {}
        earliest = 0
        for term in sorted(inputs, reverse=True):
            stack, own = [term], set()
            while stack:
                i = stack.pop()
                if i in own or i < earliest:
                    continue
                own.add(i)
                if owner.setdefault(self.origins[i], term) != term:
                    return (
                        "it adds up values that are not independent: more than one comes from "
                        f"{self.nodes[i].path!r} without weights of its own in between; {BY_HAND}"
                    )
                if self.nodes[i].op != "affine":
                    stack += self.nodes[i].inputs
            earliest = min(owner)
        return ""

    def _affine(self, x: Signal, weight: Any, path: str, layer: Any) -> Signal:
        channels, axes = channels_of(layer)
        y = self.emit("affine", [x], path, channels=channels, axes=axes)
        if weight is not None:
            self.origins[-1] = self.weights.setdefault(weight, self.origins[-1])
        return y

    def _activate(self, name: str, options: dict[str, Any], x: Signal, path: str) -> Signal:
        spec = from_torch(name, options)
        y = self.like("nonlinear", x, path, spec=spec, note="" if spec else name)
        if name == "prelu":
            self.notes[f"{path!r} learns its negative slope; its present value was read"] = None
        return y

    def _softmax(self, x: Signal, path: str) -> Signal:
        y = self.unknown([x], path, f"softmax couples the channels; {BY_HAND}")
        self.softmax.add(self.index(y))
        return y

    def _in_place(self, old: Signal, new: Signal) -> Signal:
        old.cell.terms, old.cell.path = new.cell.terms, new.cell.path
        return replace(new, cell=old.cell)

    def gated(self, x: Signal, mean_square: float, path: str) -> Signal:
        """A value that a gate has multiplied: read as the value, which a note says."""
        self.gates[path] = mean_square
        return self.like("reshape", x, path, note="a gate")

    def attended(self, values: Signal, path: str) -> Signal:
        """What attention makes of its values: their means over locations, which a note says."""
        self.averages.append(path)
        return self.like("pool", values, path, note="attention")

    def note_products(self) -> None:
        """Say where q falls in a way that the wiring leaves out."""
        if self.gates:
            path, smallest = min(self.gates.items(), key=lambda gate: gate[1])
            self.notes[
                f"{_and_more(path, len(self.gates))} multiplied by gates: q falls to "
                f"{smallest:.3g} of what it was, which the constants leave out"
            ] = None
        if self.averages:
            self.notes[
                f"{_and_more(self.averages[0], len(self.averages))} averaged by attention: q falls "
                "as at an average pool, which the constants leave out"
            ] = None


def _and_more(path: str, count: int) -> str:
    """The subject of a note on some values."""
    more = f" and {count - 1} more" if count > 1 else ""
    return f"the value(s) at {path!r}{more} are"
