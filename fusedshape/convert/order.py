"""Moves activations from before a skip connection's fork into its branch: `preactivate`.

A block of the first kind ("v1") activates its sum, so that the shortcut of the next one carries an
activation's output. Its mean is not 0, so neither is that of the next sum, and q drifts. A block of
the second kind ("v2", He et al. 2016, arXiv 1603.05027) activates at the start of its branch, and
its sums add Gaussians, as the theory assumes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fusedshape.convert.calls import Calls, Site, read_calls
from fusedshape.convert.fusion import Paths, hooked
from fusedshape.convert.report import Change, Done
from fusedshape.convert.request import Request
from fusedshape.nn import NormalizedSum
from fusedshape.nodes import operation
from fusedshape.rewriting import source, subclass
from fusedshape.torch_ops import EXTREMES, base, function_of
from fusedshape.tracing import write_out_of_place


def preactivate(model: nn.Module, request: Request) -> Done:
    """Let shortcuts carry what an activation takes, where they carry what it gives.

    The activation moves to the start of the branch, past max-pools and across modules, if nothing
    but the block takes its output.

    Args:
        model: the model, whose modules an undo log has saved already.
        request: what was asked for.
    """
    if request.shortcuts is None:
        return Done()
    calls = read_calls(model, tuple(request.classes), request.filter_fn)
    moving = _Moving(calls, Paths(calls, {site.node: site for site in calls.sites}))
    for owner, graphs in calls.graphs.items():
        for graph in graphs:
            for node in list(graph.nodes):
                if isinstance(calls.called(owner, node), NormalizedSum):
                    moving.free(owner, node)
    moving.apply()
    note = (
        f"{len(moving.rows)} activation(s) before a skip connection act at the start of its branch "
        "now, so that its shortcut carries what they took and the sum adds Gaussians"
    )
    return Done(tuple(moving.rows), (note,) * bool(moving.rows), {})


@dataclass(frozen=True, eq=False)
class _Moving:
    """What is moved in a model.

    Attributes:
        calls: the model's calls; the graphs are rewritten.
        paths: where values come from.
        rows: of the report.
        children: new children of modules, in the order in which they were found.
        changed: modules whose graphs were rewritten.
        dropped: children of an nn.Sequential that do nothing any more.
    """

    calls: Calls
    paths: Paths
    rows: list[Change] = field(default_factory=list)
    children: dict[nn.Module, dict[str, nn.Module]] = field(default_factory=dict)
    changed: dict[nn.Module, None] = field(default_factory=dict)
    dropped: list[tuple[nn.Module, str]] = field(default_factory=list)

    def free(self, owner: nn.Module, total: fx.Node) -> None:
        """Free the operands of a sum from the activation before the fork."""
        for entry in dict.fromkeys(total.all_input_nodes):
            found = self._origin(owner, entry)
            if found is None:
                continue
            site, alone = found
            where = f"{entry.name} of {self.calls.describe(owner)}"
            if site.node is entry:
                self._carry_input(owner, site, total)
            elif alone and len(entry.users) > 1:
                self._move(owner, site, entry)
            else:
                continue
            name = type(site.module).__name__ if site.module is not None else operation(site.node)
            at = self.calls.names[site.owner] or "(model)"
            row = Change(self.calls.names[owner], f"{name} of {at} before {where}", "in its branch")
            self.rows.append(row)

    def _origin(self, owner: nn.Module, node: fx.Node) -> tuple[Site, bool] | None:
        """The activation whose output a value is, and whether nothing else takes it on the way."""
        by_node, alone, first = self.paths.by_node, True, node
        while node not in by_node:
            step = self.paths.before(owner, node) or self._before_pool(owner, node)
            if step is None:
                return None
            called = self.calls.called(owner, node)
            once = called is None or len(self.calls.calls[called]) == 1
            owner, node = step
            alone = alone and once and len(node.users) == 1
            if len(node.users) == 0:  # an activation that was moved
                return None
        site = by_node[node]
        plain = site.module is None or not (hooked(site.module) or list(site.module.parameters()))
        return (site, alone) if plain and (node is first or alone) else None

    def _before_pool(self, owner: nn.Module, node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
        """What a max-pool takes; None for other nodes."""
        called = self.calls.called(owner, node)
        name = operation(node) if called is None else function_of(called)
        pools = base(name) in EXTREMES and "pool" in name and len(node.all_input_nodes) == 1
        return (owner, node.all_input_nodes[0]) if pools else None

    def _carry_input(self, owner: nn.Module, site: Site, total: fx.Node) -> None:
        """Let a sum take what an activation in the same forward takes."""
        total.replace_input_with(site.node, site.input)
        if site.in_place:
            with site.node.graph.inserting_before(site.node):
                new = self._copied(owner, site, site.input)
            site.node.replace_all_uses_with(new)
            site.node.graph.erase_node(site.node)
        self.changed[owner] = None

    def _move(self, owner: nn.Module, site: Site, entry: fx.Node) -> None:
        """Let an activation act on a value that forks, for all who take it but sums."""
        if type(site.owner).forward is nn.Sequential.forward:
            self.dropped.append((site.owner, str(site.node.target)))
        else:
            self.changed[site.owner] = None
        with entry.graph.inserting_after(entry):
            new = self._copied(owner, site, entry)
        for user in list(entry.users):
            if user is not new and not isinstance(self._called(owner, user), NormalizedSum):
                user.replace_input_with(entry, new)
        site.node.replace_all_uses_with(site.input)
        site.node.graph.erase_node(site.node)
        self.changed[owner] = None

    def _called(self, owner: nn.Module, node: fx.Node) -> nn.Module | None:
        new = node.op == "call_module" and node.target in self.children.get(owner, {})
        return None if new else self.calls.called(owner, node)

    def _copied(self, owner: nn.Module, site: Site, value: fx.Node) -> fx.Node:
        """A call of a site's activation on another value, out of place."""
        graph = value.graph
        if site.module is None:
            new = graph.node_copy(site.node, lambda _: value)
            if site.in_place:
                write_out_of_place(new)
            return new
        module: Any = copy.deepcopy(site.module)
        if hasattr(module, "inplace"):
            module.inplace = False
        name = next(self._free_names(owner))
        self.children.setdefault(owner, {})[name] = module
        return graph.call_module(name, (value,))

    def _free_names(self, owner: nn.Module) -> Iterator[str]:
        own = self.children.get(owner, {})
        names = (f"act_{i}" for i in range(10**6))
        return (name for name in names if name not in own and not hasattr(owner, name))

    def apply(self) -> None:
        """Change the model."""
        for owner, name in self.dropped:
            owner._modules[name] = nn.Identity().train(owner.training)
        for owner in self.changed:
            for name, child in self.children.get(owner, {}).items():
                owner.add_module(name, child.train(owner.training))
            cls: Any = type(owner)
            owner.__class__ = subclass(
                cls, tuple(source(graph) for graph in self.calls.graphs[owner]), "Preactivated"
            )
