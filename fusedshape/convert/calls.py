"""Which module calls what in a model, and which calls are activations to replace: `Calls`."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from fusedshape import rewriting
from fusedshape.tracing import (
    UntraceableError,
    is_plain,
    is_query,
    memory_roots,
    reachable_code,
    reached_by,
    tensor_args,
    trace,
)

# The name under which torch, torch.nn.functional and Tensor know what a module computes.
FUNCTIONAL = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Softplus: "softplus",
    nn.Softsign: "softsign",
    nn.Hardtanh: "hardtanh",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
}
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
        sites: all known calls of activations to be replaced.
    """

    def __init__(
        self,
        model: nn.Module,
        replace: tuple[type[nn.Module], ...],
        filter_fn: Callable[[str, nn.Module], bool] | None,
    ) -> None:
        self.model = model
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
            if not has_forward or is_plain(module) or module in self.acts:
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
                    raise ValueError(
                        f"convert: {self.describe(owner)} calls F.{node.name}; normalisation "
                        "undoes what shaped activations set up, build the model without"
                    )
        self._check_in_place()
        if not self.sites and not self.acts:
            kinds = dict.fromkeys(map(type, self.names))
            known = (k for k in kinds if FUNCTIONAL.get(k, "") not in ("", *self.words))
            others = ", ".join(f"nn.{kind.__name__}" for kind in known)
            raise ValueError(
                "convert: found no activation to replace; looked for "
                f"{self._forms()} (see the arguments replace and filter_fn)"
                + (f"; there are {others}: pass replace=[{others}]" if others else "")
            )

    def check_stripped(self, stripped: frozenset[nn.Module]) -> None:
        """Raise where a normalisation's output is changed in place, and would be its input then."""
        for norm in stripped:
            for owner, node in self.calls.get(norm, []):
                source = node.all_input_nodes[0]
                fresh = isinstance(self.called(owner, source), (nn.Linear, _ConvNd))
                for user in node.users:
                    name = str(getattr(user.target, "__name__", user.target))
                    called = self.called(owner, user)
                    changes = name.endswith("_") or bool(getattr(called, "inplace", False))
                    if called in self.acts or self.is_functional(user) or not changes:
                        continue
                    if not fresh or len(source.users) > 1:
                        raise ValueError(
                            f"convert: {self.describe(owner)} changes the output of "
                            f"{self.describe(norm)} in place ({user.name}), which without the "
                            "BatchNorm is its input; write it out of place"
                        )

    def describe(self, module: nn.Module) -> str:
        """A module's name and class, for messages."""
        name = self.names[module]
        return f"{name!r} ({type(module).__name__})" if name else f"{type(module).__name__}"

    def _forms(self) -> str:
        return ", ".join(sorted(w for w in self.words if not w.endswith("_"))) or "modules only"

    def _check_in_place(self) -> None:
        """Raise if an in-place activation changes a tensor that is used again afterwards.

        A shaped activation makes a new tensor, so the later use would see the old values.
        """
        overwrites: dict[fx.Node, str] = {
            site.node: f"{self.describe(site.owner)} activates in place ({site.node.name})"
            for site in self.sites
            if site.in_place
        }
        # Parents after their children: a child that overwrites its input makes its call in place.
        for owner in sorted(self.graphs, key=lambda m: -self._height(m)):
            for graph in self.graphs[owner]:
                roots = memory_roots(graph, owner, fresh=overwrites)
                order = {node: i for i, node in enumerate(graph.nodes)}
                for node in graph.nodes:
                    if node not in overwrites:
                        continue
                    hit = {roots[a] for a in tensor_args(node)}
                    for other, root in roots.items():
                        later = [
                            u
                            for u in other.users
                            if order[u] > order[node] and not is_query(u) and other is not node
                        ]
                        if root in hit and later:
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


def _is_one_of(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(module, c) and type(module).forward is c.forward for c in classes)


def _contains(functions: set[Any], value: Any) -> bool:
    return callable(value) and getattr(value, "__hash__", None) is not None and value in functions
