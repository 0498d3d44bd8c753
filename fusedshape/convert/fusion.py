"""Which activation joins which layer: `Fusion`."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fusedshape.convert.calls import Calls, Site
from fusedshape.kinds import kind_of
from fusedshape.nn import SHAPED

#: Those that see a module's output, or its gradient.
OUTPUT_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fusion:
    """Which activation joins which layer.

    Attributes:
        layers: the layers to fuse.
        merged: activation modules all of whose calls are fused, so that nothing is left to do.
        rewritten: modules whose forward must be written anew.
    """

    def __init__(self, calls: Calls, fuse: bool) -> None:
        self.calls = calls
        self.merged: set[nn.Module] = set()
        self.of_module: dict[nn.Module | None, list[Site]] = {}
        by_node = {site.node: site for site in calls.sites}
        of_layer: dict[nn.Module, list[Site]] = {}
        rejected: dict[nn.Module, str] = {}
        for site in calls.sites:
            self.of_module.setdefault(site.module, []).append(site)
            site.layer, site.why = self._layer_before(site)
            if site.layer is not None and not fuse:
                rejected[site.layer] = "fuse=False"
        for layer in {site.layer for site in calls.sites if site.layer is not None}:
            reason = rejected.get(layer, "")
            of_layer[layer] = []
            for call in calls.calls[layer]:
                for user, value in self._users(*call):
                    if user in by_node and by_node[user].input is value:
                        of_layer[layer].append(by_node[user])
                    else:
                        reason = reason or "another call or use of the layer wants its plain output"
            reason = self.why_never(layer, of_layer[layer]) or reason
            if reason:
                rejected.setdefault(layer, reason)
        live = set(of_layer) - set(rejected)
        while True:
            self.merged = {m for m in calls.acts if self._all_fused(m, live)}
            stuck = {
                layer: why
                for layer in live
                for why in [next(filter(None, map(self.why_kept, of_layer[layer])), "")]
                if why
            }
            if not stuck:
                break
            rejected |= stuck
            live -= set(stuck)
        self.layers = live
        for site in calls.sites:
            if site.layer is not None and site.layer not in live:
                site.why = rejected[site.layer]
        self.rewritten = {
            site.owner
            for site in calls.sites
            if site.module is None or (not site.why and site.module not in self.merged)
        }

    def _passes(self, owner: nn.Module, node: fx.Node) -> bool:
        """Whether a node is, or will be, an identity that nobody watches."""
        called = self.calls.called(owner, node)
        if called is None or called in self.calls.acts or hooked(called):
            return False
        return type(called) is nn.Identity or self.calls.stripped.get(called) == ()

    def _open(self, module: nn.Module | None) -> fx.Graph | None:
        """The graph of a module into which a tensor can be followed, as nobody watches."""
        graphs = self.calls.graphs.get(module, ()) if module is not None else ()
        known = module is not None and module not in self.calls.unknown and not hooked(module)
        return graphs[0] if known and len(graphs) == 1 else None

    def _only_call(self, module: nn.Module | None) -> tuple[nn.Module, fx.Node] | None:
        """The one call of a module that takes one tensor, if a tensor can be followed into it."""
        graph = self._open(module)
        if module is None or graph is None or len(graph.find_nodes(op="placeholder")) != 1:
            return None
        calls = self.calls.calls.get(module, [])
        whole = len(calls) == 1 and len(calls[0][1].all_input_nodes) == len(calls[0][1].args) == 1
        return calls[0] if whole else None

    def _layer_before(self, site: Site) -> tuple[nn.Module | None, str]:
        owner, node = site.owner, site.input
        while True:
            called = self.calls.called(owner, node)
            inside = self._open(called)
            outside = self._only_call(owner) if node.op == "placeholder" else None
            if self._passes(owner, node):
                node = node.all_input_nodes[0]
            elif outside is not None:
                owner, node = outside[0], outside[1].all_input_nodes[0]
            elif called is not None and inside and isinstance(_result(inside), fx.Node):
                owner, node = called, _result(inside)
            else:
                break
        if kind_of(called):
            return called, ""
        if node.op == "placeholder":
            return None, "its input comes from outside the module that calls it"
        what = type(called).__name__ if called is not None else node.name
        return None, f"its input comes from {what}"

    def _users(self, owner: nn.Module, node: fx.Node) -> list[tuple[fx.Node | None, fx.Node]]:
        """Who takes a value, past identities and in or out of modules, and as which node.

        None stands for more than one, or for somebody who is not known.
        """
        while len(node.users) == 1:
            (user,) = node.users
            called = self.calls.called(owner, user)
            if self._passes(owner, user):
                node = user
            elif self._only_call(called) == (owner, user):
                assert called is not None
                owner, node = called, self.calls.graphs[called][0].find_nodes(op="placeholder")[0]
            elif user.op == "output" and self._open(owner) and _result(user.graph) is node:
                calls = self.calls.calls.get(owner, [])
                return [found for call in calls for found in self._users(*call)] or [(None, node)]
            else:
                return [(user, node)]
        return [(None, node)]

    def why_never(self, layer: nn.Module, sites: list[Site]) -> str:
        """Why a layer takes in no activation, here those of `sites`; "" if it may."""
        kind = type(layer)
        if kind not in SHAPED:
            return f"{kind.__name__} has no fused form"
        if hooked(layer):
            return "the layer has hooks, which would see the activated output"
        if "forward" in vars(layer) or layer._parameters.get("weight") is None:
            return "the layer's forward or weight is not the plain one"
        if layer in self.calls.unknown:
            return "a module that cannot be traced may use the layer's plain output"
        return ""

    def _all_fused(self, module: nn.Module, live: set[nn.Module]) -> bool:
        sites = self.of_module.get(module, [])
        known = module not in self.calls.unknown and not hooked(module)
        return bool(sites) and known and all(site.layer in live for site in sites)

    def why_kept(self, site: Site) -> str:
        """Why a call of an activation cannot be dropped; "" if it can."""
        if site.module is None or site.module in self.merged:
            return ""
        if hooked(site.module):
            return "the activation has hooks"
        if _is_sequential(site.owner) or site.owner in self.calls.stripped:
            return "the activation is shared with other places"
        return ""


def _result(graph: fx.Graph) -> Any:
    """What a forward returns."""
    return next(iter(reversed(graph.nodes))).args[0]


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches a module's calls."""
    return any(getattr(module, name) for name in HOOKS)


def _is_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward
