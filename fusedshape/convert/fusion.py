"""Which activation joins which layer: `read_fusion`, by rules that its caller gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx, nn

from fusedshape.convert.calls import Calls, Site
from fusedshape.kinds import kind_of
from fusedshape.nn import SHAPED

#: Hooks that see a module's output, or its gradient.
OUTPUT_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Match:
    """The layer before an activation's call, if any.

    Attributes:
        layer: the layer whose output the activation takes, seen through identities.
        why: why the two are not fused; "" if they are.
    """

    layer: nn.Module | None
    why: str = ""


Matches = Mapping[Site, Match]


class Rules(Protocol):
    """What decides whether a layer and its activations may be fused."""

    def why_never(self, layer: nn.Module, sites: Sequence[Site], matches: Matches) -> str:
        """Why a layer takes in no activation, here those of `sites`; "" if it may."""

    def why_kept(self, site: Site, merged: bool) -> str:
        """Why a call of an activation cannot be dropped; "" if it can.

        Args:
            site: the call.
            merged: whether all calls of its module are fused.
        """


@dataclass(frozen=True, eq=False)
class Fusion:
    """Which activation joins which layer.

    Attributes:
        matches: the layer before each activation's call, and why it is not fused.
        layers: the layers to fuse.
        merged: activation modules all of whose calls are fused, so that nothing is left to do.
        rewritten: modules whose forward must be written anew.
    """

    matches: Matches
    layers: frozenset[nn.Module]
    merged: frozenset[nn.Module]
    rewritten: frozenset[nn.Module]

    def of_module(self, module: nn.Module) -> list[Match]:
        """The matches of all calls of an activation module."""
        return [match for site, match in self.matches.items() if site.module is module]


def read_fusion(calls: Calls, rules: Rules) -> Fusion:
    """Find the layer before each activation, and decide by rules which of them are fused."""
    paths = Paths(calls, {site.node: site for site in calls.sites})
    matches = {site: paths.layer_before(site) for site in calls.sites}
    layers = dict.fromkeys(match.layer for match in matches.values() if match.layer is not None)
    takers = {layer: paths.takers(layer) for layer in layers}
    whys = {layer: _why_never(layer, takers[layer], rules, matches) for layer in layers}
    while True:
        live = frozenset(layer for layer, why in whys.items() if not why)
        merged = _merged(calls, matches, live)
        # A layer stays plain if a call of its activation cannot be dropped. Then other calls of the
        # same activation may have to stay, so repeat until nothing changes.
        stuck = {layer: _why_kept(takers[layer], rules, merged) for layer in live}
        if not any(stuck.values()):
            break
        whys |= stuck
    for site, match in matches.items():
        if match.layer is not None:
            matches[site] = Match(match.layer, whys[match.layer])
    return Fusion(matches, live, merged, _rewritten(matches, merged))


def _rewritten(matches: Matches, merged: frozenset[nn.Module]) -> frozenset[nn.Module]:
    """The modules that call a function to replace, or an activation that other places keep."""
    return frozenset(
        site.owner
        for site, match in matches.items()
        if site.module is None or (not match.why and site.module not in merged)
    )


def _why_never(
    layer: nn.Module, takers: Sequence[Site | None], rules: Rules, matches: Matches
) -> str:
    """Why a layer takes in none of the activations that take its output; "" if it may."""
    sites = [site for site in takers if site is not None]
    other = "another call or use of the layer wants its plain output" if None in takers else ""
    return rules.why_never(layer, sites, matches) or other


def _why_kept(takers: Sequence[Site | None], rules: Rules, merged: frozenset[nn.Module]) -> str:
    """Why one of a layer's activations cannot be dropped; "" if all can."""
    sites = (site for site in takers if site is not None)
    reasons = (rules.why_kept(site, site.module in merged) for site in sites)
    return next(filter(None, reasons), "")


@dataclass(frozen=True)
class Fusing:
    """The rules of convert: layers with a fused form, where nothing else sees the difference.

    Attributes:
        calls: the model's calls.
        fuse: whether to fuse at all.
    """

    calls: Calls
    fuse: bool

    def why_never(self, layer: nn.Module, sites: Sequence[Site], matches: Matches) -> str:
        """Why a layer takes in no activation; "" if it may."""
        kind = type(layer)
        if not self.fuse:
            return "fuse=False"
        if kind not in SHAPED:
            return f"{kind.__name__} has no fused form"
        if hooked(layer):
            return "the layer has hooks, which would see the activated output"
        if "forward" in vars(layer) or layer._parameters.get("weight") is None:
            return "the layer's forward or weight is not the plain one"
        if layer in self.calls.unknown:
            return "a module that cannot be traced may use the layer's plain output"
        return ""

    def why_kept(self, site: Site, merged: bool) -> str:
        """Why a call of an activation cannot be dropped; "" if it can."""
        if site.module is None or merged:
            return ""
        if hooked(site.module):
            return "the activation has hooks"
        if _is_sequential(site.owner):
            return "the activation is shared with other places"
        return ""


def hooked(module: nn.Module) -> bool:
    """Whether hooks watch a module's calls."""
    return any(getattr(module, name) for name in HOOKS)


def _merged(calls: Calls, matches: Matches, live: frozenset[nn.Module]) -> frozenset[nn.Module]:
    """The activation modules all of whose calls are known, and take live layers' outputs."""
    of_module: dict[nn.Module | None, list[Match]] = {}
    for site, match in matches.items():
        of_module.setdefault(site.module, []).append(match)
    return frozenset(
        module
        for module in calls.acts
        if module in of_module
        and module not in calls.unknown
        and not hooked(module)
        and all(match.layer in live for match in of_module[module])
    )


@dataclass(frozen=True)
class Paths:
    """Where values come from and go to, past identities and in and out of modules.

    Attributes:
        calls: the model's calls.
        by_node: the activations' calls by their nodes.
    """

    calls: Calls
    by_node: Mapping[fx.Node, Site]

    def layer_before(self, site: Site) -> Match:
        """The layer whose output an activation's call takes, or why there is none."""
        owner, node = site.owner, site.input
        while (before := self.before(owner, node)) is not None:
            owner, node = before
        called = self.calls.called(owner, node)
        if kind_of(called):
            return Match(called)
        if node.op == "placeholder":
            return Match(None, "its input comes from outside the module that calls it")
        what = type(called).__name__ if called is not None else node.name
        return Match(None, f"its input comes from {what}")

    def takers(self, layer: nn.Module) -> list[Site | None]:
        """The activations' calls that take a layer's output; None for whatever else takes it."""
        found: list[Site | None] = []
        for call in self.calls.calls[layer]:
            for user, value in self._users(*call):
                site = None if user is None else self.by_node.get(user)
                found.append(site if site is not None and site.input is value else None)
        return found

    def before(self, owner: nn.Module, node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
        """Where the same value stood a step earlier; None if it is made here."""
        if self._passes(owner, node):
            return owner, node.all_input_nodes[0]
        if node.op == "placeholder":
            outside = self._only_call(owner)
            return None if outside is None else (outside[0], outside[1].all_input_nodes[0])
        called = self.calls.called(owner, node)
        inside = self._open(called)
        if called is not None and inside is not None and isinstance(_result(inside), fx.Node):
            return called, _result(inside)
        return None

    def _users(self, owner: nn.Module, node: fx.Node) -> list[tuple[fx.Node | None, fx.Node]]:
        """The nodes that take a value, each with the node that it knows the value as.

        None stands for more than one, or for one that is not known.
        """
        while len(node.users) == 1:
            (user,) = node.users
            called = self.calls.called(owner, user)
            if self._passes(owner, user):
                node = user
            elif called is not None and self._only_call(called) == (owner, user):
                owner, node = self.calls.placeholders(called)[0]
            elif user.op == "output" and self._open(owner) and _result(user.graph) is node:
                calls = self.calls.calls.get(owner, [])
                return [found for call in calls for found in self._users(*call)] or [(None, node)]
            else:
                return [(user, node)]
        return [(None, node)]

    def _passes(self, owner: nn.Module, node: fx.Node) -> bool:
        """Whether a node is, or will be, an identity without hooks."""
        called = self.calls.called(owner, node)
        if called is None or called in self.calls.acts or hooked(called):
            return False
        return type(called) is nn.Identity

    def _open(self, module: nn.Module | None) -> fx.Graph | None:
        """The graph of a module into which a tensor can be followed: one graph, without hooks."""
        graphs = self.calls.graphs.get(module, ()) if module is not None else ()
        known = module is not None and module not in self.calls.unknown and not hooked(module)
        return graphs[0] if known and len(graphs) == 1 else None

    def _only_call(self, module: nn.Module) -> tuple[nn.Module, fx.Node] | None:
        """The one call of a module that takes one tensor, if a tensor can be followed into it."""
        graph = self._open(module)
        if graph is None or len(graph.find_nodes(op="placeholder")) != 1:
            return None
        calls = self.calls.calls.get(module, [])
        whole = len(calls) == 1 and len(calls[0][1].all_input_nodes) == len(calls[0][1].args) == 1
        return calls[0] if whole else None


def _result(graph: fx.Graph) -> Any:
    """What a forward returns."""
    return next(iter(reversed(graph.nodes))).args[0]


def _is_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward
