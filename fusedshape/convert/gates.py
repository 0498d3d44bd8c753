"""Which activations are plain, and which are gates or shape the network's output: `plain_only`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from fusedshape.convert.calls import Calls, Site
from fusedshape.convert.values import Value, Values
from fusedshape.nodes import is_foreign, operation
from fusedshape.torch_ops import (
    ACTIVATION_MODULES,
    ARITHMETIC,
    ATTENTION,
    COPIES,
    DROPOUTS,
    MATMULS,
    POOLS,
    PRODUCTS,
    QUOTIENTS,
    RESIZES,
    SAME,
    SOFTMAXES,
    VIEWS,
    base,
    function_of,
)

# Activations whose values lie in an interval, and so can say how much of another value is kept.
_BOUNDED = frozenset({"sigmoid", "hardsigmoid", "tanh", "hardtanh", "relu6", "softsign"})
# Those that map a network's output to what it stands for: a probability, a positive number.
_OUTPUTS = (_BOUNDED - {"relu6"}) | {"softplus", "logsigmoid"}
_PASSING = VIEWS | SAME | COPIES | DROPOUTS | POOLS | RESIZES | ARITHMETIC
_MULTIPLIES = PRODUCTS | QUOTIENTS | MATMULS | {"bmm", "baddbmm"}


@dataclass(frozen=True, eq=False)
class _Uses:
    """What becomes of each activation's output.

    Attributes:
        calls: the model's calls, with a site for every activation.
        values: how its values are followed.
    """

    calls: Calls
    values: Values

    @property
    def by_node(self) -> Mapping[fx.Node, Site]:
        """The activations' calls by their nodes."""
        return {site.node: site for site in self.calls.sites}

    def gates(self) -> dict[Site, str]:
        """The activations that are not plain, and why."""
        whys: dict[Site, str] = {}
        sites, by_node = self.calls.sites, self.by_node
        ends = {site: self._ends(site, by_node) for site in sites}
        for site in sites:
            why = self._why(site, ends[site], by_node)
            if why:
                whys[site] = why
        while True:  # an activation that only feeds gates is a part of them
            more = {
                site: "a part of a gate"
                for site in sites
                if site not in whys
                and ends[site]
                and all(by_node.get(node) in whys for _, node in ends[site])
            }
            if not more:
                return whys
            whys |= more

    def _ends(self, site: Site, by_node: Mapping[fx.Node, Site]) -> list[Value]:
        """The nodes at which an activation's output stops being itself."""
        start = site.owner, site.node

        def stops(value: Value) -> bool:
            return value != start and not self._passes(*value)

        return [value for value in self.values.after([start], stops) if stops(value)]

    def _passes(self, owner: nn.Module, node: fx.Node) -> bool:
        if self._multiplies(node):
            return False
        return self.values.passes(owner, node)

    def _multiplies(self, node: fx.Node) -> bool:
        """Whether a node is a product of values that all depend on the input."""
        known = base(operation(node).rstrip("_")) in _MULTIPLIES
        return known and len(self.values.depending(node)) > 1

    def _why(self, site: Site, ends: list[Value], by_node: Mapping[fx.Node, Site]) -> str:
        """Why an activation is not plain; "" if it is."""
        name = _name(site)
        own = {site.node}
        for owner, node in ends:
            if not self._multiplies(node):
                continue
            behind = {
                arg: self.values.before([(owner, arg)], lambda v: not self._goes_back(v))
                for arg in self.values.depending(node)
            }
            others = [
                value
                for values in behind.values()
                if not any(found[1] in own for found in values)
                for value in values
            ]
            if name in _BOUNDED:
                return "a gate: it scales another value"
            if others and not any(self._is_bounded(value, by_node) for value in others):
                return "a gate: its output is multiplied by another value"
        if name in _BOUNDED and any(_attends(node) for _, node in ends):
            return "a part of attention"
        outputs = all(node.op == "output" for _, node in ends)
        if ends and outputs and name in _OUTPUTS:
            return "it shapes the network's output"
        return ""

    def _goes_back(self, value: Value) -> bool:
        owner, node = value
        if node.op == "placeholder":
            return True
        called = self.calls.called(owner, node)
        return (called is not None and called in self.calls.graphs) or self._passes(owner, node)

    def _is_bounded(self, value: Value, by_node: Mapping[fx.Node, Site]) -> bool:
        owner, node = value
        called = self.calls.called(owner, node)
        if node in by_node:
            return _name(by_node[node]) in _BOUNDED
        name = operation(node) if called is None else function_of(called)
        return name in SOFTMAXES


def _attends(node: fx.Node) -> bool:
    """Whether a node is attention, or a function that tracing does not enter."""
    return is_foreign(node) or base(operation(node)) in ATTENTION | SOFTMAXES


def plain_only(calls: Calls) -> Calls:
    """The calls of a model without its gates among the activations to replace.

    A bounded activation in a product of two values that depend on the input is a gate, as in
    squeeze-and-excitation; so is any other in a product whose second factor is not bounded, as in
    gated linear units. Softmax is no activation. Bounded activations and softplus at the end of the
    network are what its output stands for, and are no plain ones either.

    Args:
        calls: the model's calls; every activation is to be replaced.
    """
    gates = _Uses(calls, Values(calls, _PASSING)).gates()
    modules = {s.module: why for s, why in gates.items() if s.module is not None}
    kept = [site for site in calls.sites if site not in gates and site.module not in modules]
    bounded = frozenset(name for word in _BOUNDED for name in (word, word + "_"))
    sure = frozenset(f for f in calls.wanted.functions if f.__name__ not in bounded)
    wanted = replace(calls.wanted, words=calls.wanted.words - bounded, functions=sure)
    acts = frozenset(calls.acts - modules.keys())
    return replace(calls, wanted=wanted, acts=acts, sites=tuple(kept), left=modules)


def left_out(calls: Calls) -> dict[str, list[str]]:
    """The plain activations that are not among those to replace, where they are, by kind.

    Those that a filter keeps are not among them.
    """
    every = calls.of_classes(tuple(ACTIVATION_MODULES))
    gates = _Uses(every, Values(every, _PASSING)).gates()
    taken = {site.node for site in calls.sites}
    found: dict[str, dict[str, None]] = {}
    for site in every.sites:
        holder = site.module or site.owner
        if site in gates or site.node in taken or calls.wanted.kept.get(holder):
            continue
        name = _name(site)
        kind = f"F.{name}" if site.module is None else f"nn.{type(site.module).__name__}"
        found.setdefault(kind, {})[calls.names[holder]] = None
    return {kind: list(paths) for kind, paths in found.items()}


def _name(site: Site) -> str:
    """The name of the function that an activation computes."""
    return function_of(site.module) if site.module is not None else operation(site.node).rstrip("_")
