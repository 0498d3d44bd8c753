"""What changes a tensor in place now, and must not once its activations are ours."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from fusedshape.convert.calls import Calls
from fusedshape.convert.values import Value
from fusedshape.nodes import is_query
from fusedshape.torch_ops import name_of, writes
from fusedshape.tracing import memory_roots, tensor_args


def writers(calls: Calls, kept: Sequence[Value]) -> dict[fx.Node, nn.Module]:
    """Nodes to rewrite out of place, mapped to the module in whose forward each stands.

    They change a value that must stay what it is: an activation's output, which backward may need,
    or a normalisation's, which will be the output of what stands before it.

    Args:
        calls: the model's calls.
        kept: the values that must stay.

    Raises:
        ValueError: the difference would be seen, as the tensor is used again afterwards.
    """
    found = _found_writers(calls, kept)
    # A module that no longer writes in place does not in its other calls either.
    modules = {calls.called(owner, node) for node, owner in found.items()}
    found |= {n: o for module in modules if module is not None for o, n in calls.calls[module]}
    refuse_overwrites(
        calls,
        {
            node: f"{calls.describe(owner)} changes in place ({node.name})"
            for node, owner in found.items()
            if owner not in calls.stripped  # there, it is the normalisation's own output
        },
    )
    return found


def _found_writers(calls: Calls, kept: Sequence[Value]) -> dict[fx.Node, nn.Module]:
    """Follow the values that must stay, in and out of modules, to what writes on their memory."""
    own = {site.node for site in calls.sites}
    memory = _Memory(calls, own)
    stack = list(kept)
    seen = {node for _, node in stack}
    found: dict[fx.Node, nn.Module] = {}
    while stack:
        owner, start = stack.pop()
        for node, user in memory.uses(owner, start):
            carried = _carried(calls, owner, user)
            if carried is not None:
                stack += [value for value in carried if value[1] not in seen]
                seen.update(inside for _, inside in carried)
            elif user not in own and tensor_args(user)[0] is node and _writes(owner, user):
                found[user] = owner
    return found


def refuse_overwrites(calls: Calls, overwrites: dict[fx.Node, str]) -> None:
    """Raise if what works in place changes a tensor that is used again afterwards.

    It will make a new tensor, so the later use would see the old values.

    Args:
        calls: the model's calls.
        overwrites: the nodes that work in place, with what messages call them.

    Raises:
        ValueError: one does.
    """
    overwrites = dict(overwrites)
    # Children before parents: a call of a child that overwrites its input overwrites it, too.
    for owner in sorted(calls.graphs, key=lambda module: -_height(calls, module)):
        for graph in calls.graphs[owner]:
            roots = memory_roots(graph, owner, fresh=overwrites)
            groups = _groups(roots)
            order = {node: i for i, node in enumerate(graph.nodes)}
            for node in (node for node in graph.nodes if node in overwrites):
                hit = {roots[arg] for arg in tensor_args(node)}
                sharing = [other for root in hit for other in groups[root] if other is not node]
                later = _used_after(order[node], sharing, order)
                if later is not None:
                    raise ValueError(
                        f"convert: {overwrites[node]} a tensor that is used again afterwards (by "
                        f"{later.name}), which would now see other values; make it "
                        "inplace=False, and assign the result"
                    )
                if any(root.op == "placeholder" for root in hit):
                    for _, call in calls.calls.get(owner, []):
                        overwrites[call] = overwrites[node]


@dataclass(frozen=True)
class _Memory:
    """Which nodes of a graph may share memory; activations make tensors of their own."""

    calls: Calls
    fresh: Collection[fx.Node]
    known: dict[fx.Graph, dict[fx.Node, list[fx.Node]]] = field(default_factory=dict)

    def uses(self, owner: nn.Module, root: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The nodes whose values may lie in the memory of a root's, each with a user of it."""
        if root.graph not in self.known:
            self.known[root.graph] = _groups(memory_roots(root.graph, owner, fresh=self.fresh))
        sharing = self.known[root.graph].get(root, [])
        return [(node, user) for node in sharing for user in node.users]


def _carried(calls: Calls, owner: nn.Module, user: fx.Node) -> list[Value] | None:
    """What a value is called where a node takes it out of, or into, a module; else None."""
    if user.op == "output":
        return calls.calls.get(owner, [])
    called = calls.called(owner, user)
    return calls.placeholders(called) if called is not None and called in calls.graphs else None


def _writes(owner: nn.Module, node: fx.Node) -> bool:
    """Whether a node changes its input in place."""
    module = owner.get_submodule(str(node.target)) if node.op == "call_module" else None
    flagged = node.kwargs.get("inplace") or getattr(module, "inplace", False)
    return writes(name_of(node.target)) or bool(flagged)


def _used_after(place: int, values: list[fx.Node], order: dict[fx.Node, int]) -> fx.Node | None:
    """The first node after a place that uses one of some values, not only its shape."""
    for value in values:
        for user in value.users:
            if order[user] > place and not is_query(user):
                return user
    return None


def _groups(roots: dict[fx.Node, fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that may share memory, by their root."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node, root in roots.items():
        groups.setdefault(root, []).append(node)
    return groups


def _height(calls: Calls, module: nn.Module) -> int:
    return calls.names[module].count(".") + bool(calls.names[module])
