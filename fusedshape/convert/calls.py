"""Which module calls what in a model, and which calls are activations to replace: `Calls`."""

from __future__ import annotations

import ast
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedshape import rewriting
from fusedshape.activations import TORCH_NAMES
from fusedshape.kinds import kind_of
from fusedshape.nn import ShapedChain
from fusedshape.nodes import is_query
from fusedshape.proxies import UntraceableError
from fusedshape.tracing import (
    is_plain,
    memory_roots,
    reachable_code,
    reached_by,
    tensor_args,
    trace,
)

# What torch, torch.nn.functional and Tensor call the function that a module computes.
FUNCTIONAL = {
    known.module: known.name for known in TORCH_NAMES if known.module is not None and known.fixed
}
# By name, because importing torch._dynamo takes seconds.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
_GATES = (nn.Sigmoid, nn.Hardsigmoid)
_NORM_FUNCTIONS = (F.batch_norm, F.instance_norm, F.group_norm)


@dataclass(eq=False)
class Site:
    """One call of an activation to be replaced, in one graph."""

    owner: nn.Module
    node: fx.Node
    module: nn.Module | None  # None for a functional call
    layer: nn.Module | None = None  # the layer whose output it takes, seen through identities
    why: str = ""  # why it is not fused

    @property
    def input(self) -> fx.Node:
        """What the activation is applied to."""
        found = self.node.args[0] if self.node.args else self.node.kwargs["input"]
        assert isinstance(found, fx.Node)
        return found

    @property
    def in_place(self) -> bool:
        """Whether the call overwrites its input."""
        if self.module is not None:
            return bool(getattr(self.module, "inplace", False))
        name = str(getattr(self.node.target, "__name__", self.node.target))
        return name.endswith("_") or bool(self.node.kwargs.get("inplace"))


class Calls:
    """What calls what in a model, as far as tracing can tell.

    Attributes:
        names: qualified name of every module, the first where there are several.
        acts: the activation modules to replace.
        graphs: graphs of every module that has a forward of its own and can be traced.
        opaque: the others, with the reason.
        unknown: modules that an opaque one may call in ways not known.
        calls: all known calls of each module, (owner, node).
        stripped: the normalisations to take out, and what is called in a row in each one's place.
        sites: all known calls of activations to be replaced.
    """

    def __init__(
        self,
        model: nn.Module,
        replace: tuple[type[nn.Module], ...],
        filter_fn: Callable[[str, nn.Module], bool] | None,
        stripped: Mapping[nn.Module, tuple[str, ...]] | None = None,
    ) -> None:
        self.model = model
        self.stripped = stripped or {}
        self.names: dict[nn.Module, str] = {m: n for n, m in model.named_modules()}
        self.filter_fn = filter_fn or (lambda name, module: True)
        self.kept: dict[nn.Module, bool] = {}
        self.words = {FUNCTIONAL[cls] for cls in replace if cls in FUNCTIONAL}
        self.words |= {word + "_" for word in self.words}
        self.functions: set[Any] = {
            getattr(home, word) for home in (F, torch) for word in self.words if hasattr(home, word)
        }
        self.acts = {m for m in self.names if _is_one_of(m, replace) and not self.keeps(m)}
        self.graphs: dict[nn.Module, tuple[fx.Graph, ...]] = {}
        self.opaque: dict[nn.Module, str] = {}
        self.unknown: set[nn.Module] = set()
        self.calls: dict[nn.Module, list[tuple[nn.Module, fx.Node]]] = {}
        self.sites: list[Site] = []
        for module in self.names:
            has_forward = type(module).forward is not nn.Module.forward
            if type(module) is ShapedChain and "forward" not in vars(module):
                self.graphs[module] = (_row(tuple(module._modules)),)
                continue
            if not has_forward or is_plain(module) or module in self.acts:
                continue
            if module in self.stripped:
                self.graphs[module] = (_row(self.stripped[module]),)
                continue
            reason = rewriting.why_not(module)
            try:
                self.graphs[module] = trace(module)
            except UntraceableError as error:
                reason = str(error)
            if reason:
                self.graphs.pop(module, None)
                self.opaque[module] = reason
                self.unknown |= reached_by(module)
        for owner, graphs in self.graphs.items():
            for node in (node for graph in graphs for node in graph.nodes):
                called = self.called(owner, node)
                if called is not None:
                    self.calls.setdefault(called, []).append((owner, node))
                if called in self.acts or self._calls_function(owner, node):
                    self.sites.append(Site(owner, node, called))
        self.by_graph: dict[fx.Graph, list[Site]] = {}
        for site in self.sites:
            self.by_graph.setdefault(site.node.graph, []).append(site)

    def called(self, owner: nn.Module, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        if node.op != "call_module":
            return None
        return owner.get_submodule(str(node.target))

    def _calls_function(self, owner: nn.Module, node: fx.Node) -> bool:
        return self.is_functional(node) and not self.keeps(owner)

    def is_functional(self, node: fx.Node) -> bool:
        """Whether a node is an activation called as a function or method."""
        if node.op == "call_function":
            return node.target in self.functions
        return node.op == "call_method" and node.target in self.words

    def keeps(self, module: nn.Module) -> bool:
        """Whether the user wants a module's activations left alone."""
        if module not in self.kept:
            self.kept[module] = not self.filter_fn(self.names[module], module)
        return self.kept[module]

    def may_call(self, module: nn.Module) -> bool:
        """Whether a module that cannot be traced may call an activation as a function."""
        if not self.words:
            return False
        if getattr(module, "activation_relu_or_gelu", 0):
            return True  # nn.TransformerEncoderLayer's fast path, whatever its activation module
        if any(_contains(self.functions, value) for value in vars(module).values()):
            return True
        if is_plain(module):
            return False
        kind: Any = type(module)
        trees = reachable_code(kind)
        return trees is None or any(
            self._names_function(node, own, functions)
            for own, functions, tree in trees
            for node in ast.walk(tree)
        )

    def _names_function(self, node: ast.AST, own: str, scope: dict[str, Any]) -> bool:
        if isinstance(node, ast.Attribute):
            on_self = isinstance(node.value, ast.Name) and node.value.id == own
            return node.attr in self.words and not on_self
        return isinstance(node, ast.Name) and _contains(self.functions, scope.get(node.id))

    def check(self, strict: bool) -> None:
        """Raise where the graphs show something that cannot be converted.

        Args:
            strict: whether an opaque module that may call an activation is an error.
        """
        for module in self.names:
            reason = self.opaque.get(module, "its forward is torch's own")
            may_call = strict and module not in self.graphs and self.may_call(module)
            if may_call and not self.keeps(module):
                raise ValueError(
                    f"convert: {self.describe(module)} may call {self._forms()} in its forward, "
                    f"which cannot be traced: {reason}. Use an nn module for the activation "
                    "there, or pass on_untraceable='report' to leave that call as it is"
                )
        for owner, graphs in self.graphs.items():
            for node in (node for graph in graphs for node in graph.nodes):
                if node.target in _NORM_FUNCTIONS:
                    data = any(arg.op == "placeholder" for arg in _ancestors(node))
                    raise ValueError(
                        f"convert: {self.describe(owner)} calls F.{node.target.__name__}; "
                        "normalisation undoes what shaped activations set up, build the model "
                        "without"
                        if data
                        else f"convert: {self.describe(owner)} standardises its weights "
                        f"(F.{node.target.__name__}), so that it loses its inputs' mean, which "
                        "shaped activations keep; make it a plain layer"
                    )
        self._check_in_place(
            {
                site.node: f"{self.describe(site.owner)} activates in place ({site.node.name})"
                for site in self.sites
                if site.in_place and site.owner not in self.stripped  # there, the norm's output
            }
        )
        if not self.sites and not self.acts:
            nodes = [n for graphs in self.graphs.values() for g in graphs for n in g.nodes]
            calls = [n.target for n in nodes if n.op in ("call_function", "call_method")]
            names = {str(getattr(target, "__name__", target)).rstrip("_") for target in calls}
            present = {type(module) for module in self.names}
            known = [k for k, word in FUNCTIONAL.items() if k in present or word in names]
            known.sort(key=lambda kind: kind in _GATES)
            others = {k: f"nn.{k.__name__}" for k in known if FUNCTIONAL[k] not in self.words}
            # What is between 0 and 1 is a gate where there are other activations.
            hidden = [name for kind, name in others.items() if kind not in _GATES]
            wanted = ", ".join(hidden or others.values())
            raise ValueError(
                "convert: found no activation to replace; looked for "
                f"{self._forms()} (see the arguments replace and filter_fn)"
                + (f"; there are {', '.join(others.values())}" if others else "")
                + (f": pass replace=[{wanted}]" if others else "")
            )

    def _writes(self, owner: nn.Module, node: fx.Node) -> bool:
        """Whether a node changes its input in place."""
        name = str(getattr(node.target, "__name__", node.target))
        flagged = node.kwargs.get("inplace") or getattr(self.called(owner, node), "inplace", False)
        return (name.endswith("_") and not name.endswith("__")) or bool(flagged)

    def writers(self, saved: bool) -> dict[fx.Node, nn.Module]:
        """What must no longer change its input in place, and in whose forward it stands.

        What took a normalisation's output would change the input of that. Raises where the
        difference would be seen.

        Args:
            saved: whether activations need their outputs for backward.
        """
        own = {site.node for site in self.sites}
        stack = [(site.owner, site.node) for site in self.sites if saved]
        for norm in self.stripped:
            calls = self.calls.get(norm, [])
            if not all(self._is_of_a_layer(*call) for call in calls):
                rows = self.graphs.get(norm, ())
                stack += [(norm, i) for row in rows for i in row.find_nodes(op="placeholder")]
                stack += () if rows else calls
        seen = {node for _, node in stack}
        groups: dict[fx.Graph, dict[fx.Node, list[fx.Node]]] = {}
        found: dict[fx.Node, nn.Module] = {}
        while stack:
            owner, start = stack.pop()
            if start.graph not in groups:
                groups[start.graph] = _groups(memory_roots(start.graph, owner, fresh=own))
            more: list[tuple[nn.Module, fx.Node]] = []
            for node in groups[start.graph].get(start, []):
                for user in node.users:
                    called = self.called(owner, user)
                    if user.op == "output":
                        more += self.calls.get(owner, [])
                    elif called is not None and called in self.graphs:
                        for graph in self.graphs[called]:
                            more += [(called, i) for i in graph.find_nodes(op="placeholder")]
                    elif user not in own and tensor_args(user)[0] is node:
                        found |= {user: owner} if self._writes(owner, user) else {}
            stack += [(o, n) for o, n in more if n not in seen]
            seen.update(n for _, n in more)
        modules = {self.called(owner, node) for node, owner in found.items()} - {None}
        found |= {n: o for module in modules if module is not None for o, n in self.calls[module]}
        self._check_in_place(
            {
                node: f"{self.describe(owner)} changes in place ({node.name})"
                for node, owner in found.items()
                if owner not in self.stripped  # there, the norm's output
            }
        )
        return found

    def _is_of_a_layer(self, owner: nn.Module, node: fx.Node) -> bool:
        """Whether a call takes a layer's output that nobody else takes."""
        source = node.all_input_nodes[0]
        return kind_of(self.called(owner, source)) is not None and len(source.users) == 1

    def check_held(self, verb: str, gone: Container[nn.Module]) -> None:
        """Raise where replacing modules would leave an old one in use.

        Raises:
            ValueError: a module keeps one of `gone` in a plain list, tuple or dict.
        """
        for module in self.names:
            for name, value in vars(module).items():
                if name == "_modules" or not isinstance(value, (list, tuple, dict)):
                    continue
                held = value.values() if isinstance(value, dict) else value
                if any(isinstance(item, nn.Module) and item in gone for item in held):
                    raise ValueError(
                        f"{verb}: {self.describe(module)} keeps modules in a plain "
                        f"{type(value).__name__}, .{name}, which would go on holding the old "
                        "ones; make it an nn.ModuleList or nn.ModuleDict"
                    )

    def describe(self, module: nn.Module) -> str:
        """A module's name and class, for messages."""
        name = self.names[module]
        return f"{name!r} ({type(module).__name__})" if name else f"{type(module).__name__}"

    def _forms(self) -> str:
        return ", ".join(sorted(w for w in self.words if not w.endswith("_"))) or "modules only"

    def _check_in_place(self, overwrites: dict[fx.Node, str]) -> None:
        """Raise if what worked in place changes a tensor that is used again afterwards.

        It will make a new tensor, so the later use would see the old values.
        """
        # Parents after their children: a child that overwrites its input makes its call in place.
        for owner in sorted(self.graphs, key=lambda m: -self._height(m)):
            for graph in self.graphs[owner]:
                roots = memory_roots(graph, owner, fresh=overwrites)
                groups = _groups(roots)
                order = {node: i for i, node in enumerate(graph.nodes)}
                for node in graph.nodes:
                    if node not in overwrites:
                        continue
                    hit = {roots[a] for a in tensor_args(node)}
                    for other in (other for root in hit for other in groups[root]):
                        later = [
                            u
                            for u in other.users
                            if order[u] > order[node] and not is_query(u) and other is not node
                        ]
                        if later:
                            raise ValueError(
                                f"convert: {overwrites[node]} a tensor that is used again "
                                f"afterwards (by {later[0].name}), which would now see other "
                                "values; make it inplace=False, and assign the result"
                            )
                    if any(root.op == "placeholder" for root in hit):
                        for _, call in self.calls.get(owner, []):
                            overwrites[call] = overwrites[node]

    def _height(self, module: nn.Module) -> int:
        return self.names[module].count(".") + bool(self.names[module])


def _groups(roots: dict[fx.Node, fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that may share memory, by their root."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node, root in roots.items():
        groups.setdefault(root, []).append(node)
    return groups


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node is computed from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        new = [arg for arg in stack.pop().all_input_nodes if arg not in found]
        found.update(new)
        stack += new
    return found


def refuse_wrapped(verb: str, path: str, module: nn.Module) -> None:
    """Raise if a module wraps, or was made of, the one that is to be changed.

    Raises:
        ValueError: it does; the message says what to do first.
    """
    where = f"{path!r} is" if path else "the model is"
    kind = type(module).__name__
    if kind in _WRAPPERS:
        raise ValueError(
            f"{verb}: {where} a {kind}; {verb} the module inside, its .{_WRAPPERS[kind]}, "
            "before wrapping it"
        )
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise ValueError(f"{verb}: {where} compiled already; {verb} first, then compile")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{verb}: {where} a ScriptModule; {verb} the module it was made of")


def _row(names: tuple[str, ...]) -> fx.Graph:
    """A forward that calls children one after the other."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for name in names:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def _is_one_of(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(module, c) and type(module).forward is c.forward for c in classes)


def _contains(functions: set[Any], value: Any) -> bool:
    return callable(value) and getattr(value, "__hash__", None) is not None and value in functions
