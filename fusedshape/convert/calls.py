"""Which module calls what in a model, and which calls are activations to replace: `read_calls`."""

from __future__ import annotations

import ast
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedshape import rewriting
from fusedshape.activations import TORCH_NAMES
from fusedshape.nn import ShapedChain
from fusedshape.proxies import UntraceableError
from fusedshape.torch_ops import name_of, writes
from fusedshape.tracing import is_plain, reachable_code, reached_by, trace

# What torch, torch.nn.functional and Tensor call the function that a module computes.
FUNCTIONAL = {
    known.module: known.name for known in TORCH_NAMES if known.module is not None and known.fixed
}

Filter = Callable[[str, nn.Module], bool]


@dataclass(frozen=True, eq=False)
class Wanted:
    """Which activations are to be replaced.

    Attributes:
        classes: their classes.
        words: the names under which they are called as functions and methods.
        functions: those functions.
        filter_fn: the user's; False leaves a module's activations alone.
        names: qualified name of every module, for the filter.
        kept: what the filter has said so far: True for modules that are left alone.
    """

    classes: tuple[type[nn.Module], ...]
    words: frozenset[str]
    functions: frozenset[Any]
    filter_fn: Filter | None
    names: Mapping[nn.Module, str]
    kept: dict[nn.Module, bool] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        classes: tuple[type[nn.Module], ...],
        filter_fn: Filter | None,
        names: Mapping[nn.Module, str],
    ) -> Wanted:
        """The activations of some classes, with their functional and in-place forms."""
        plain = {FUNCTIONAL[kind] for kind in classes if kind in FUNCTIONAL}
        words = frozenset(plain | {word + "_" for word in plain})
        homes = (F, torch)
        functions = {getattr(h, word) for h in homes for word in words if hasattr(h, word)}
        return cls(classes, words, frozenset(functions), filter_fn, names)

    def keeps(self, module: nn.Module) -> bool:
        """Whether the user wants a module's activations left alone."""
        if module not in self.kept:
            wanted = self.filter_fn is None or self.filter_fn(self.names[module], module)
            self.kept[module] = not wanted
        return self.kept[module]

    def has(self, module: nn.Module) -> bool:
        """Whether a module is an activation to replace."""
        kinds = (c for c in self.classes if isinstance(module, c))
        return any(type(module).forward is c.forward for c in kinds) and not self.keeps(module)

    def has_function(self, node: fx.Node) -> bool:
        """Whether a node is an activation called as a function or method."""
        if node.op == "call_function":
            return node.target in self.functions
        return node.op == "call_method" and node.target in self.words

    def may_be_called_by(self, module: nn.Module) -> bool:
        """Whether a module that cannot be traced may call an activation as a function."""
        if not self.words:
            return False
        if getattr(module, "activation_relu_or_gelu", 0):
            return True  # the fast path of nn.TransformerEncoderLayer ignores its activation module
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

    @property
    def forms(self) -> str:
        """The functional forms, for messages."""
        plain = sorted(word for word in self.words if not word.endswith("_"))
        return ", ".join(plain) or "modules only"


@dataclass(frozen=True, eq=False)
class Site:
    """One call of an activation to be replaced, in one graph.

    Attributes:
        owner: the module in whose forward the call stands.
        node: the call.
        module: the activation module; None for a functional call.
    """

    owner: nn.Module
    node: fx.Node
    module: nn.Module | None

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
        return writes(name_of(self.node.target)) or bool(self.node.kwargs.get("inplace"))


@dataclass(frozen=True, eq=False)
class Calls:
    """What calls what in a model, as far as tracing can tell.

    Attributes:
        model: the model.
        names: qualified name of every module, the first where there are several.
        wanted: which activations are to be replaced.
        stripped: the normalisations to take out, and what is called in a row in each one's place.
        acts: the activation modules to replace.
        graphs: graphs of every module that has a forward of its own and can be traced.
        opaque: the others, with the reason.
        unknown: modules that an opaque one may call in ways not known.
        calls: all known calls of each module, (owner, node).
        sites: all known calls of activations to be replaced.
        left: activation modules of those classes that are not to be replaced, and why.
    """

    model: nn.Module
    names: Mapping[nn.Module, str]
    wanted: Wanted
    stripped: Mapping[nn.Module, tuple[str, ...]]
    acts: frozenset[nn.Module]
    graphs: Mapping[nn.Module, tuple[fx.Graph, ...]]
    opaque: Mapping[nn.Module, str]
    unknown: frozenset[nn.Module]
    calls: Mapping[nn.Module, list[tuple[nn.Module, fx.Node]]]
    sites: tuple[Site, ...]
    left: Mapping[nn.Module, str] = field(default_factory=dict)

    def of_classes(self, classes: tuple[type[nn.Module], ...]) -> Calls:
        """The same calls, if the activations of other classes were to be replaced."""
        wanted = Wanted.of(classes, None, self.names)
        acts = frozenset(module for module in self.names if wanted.has(module))
        sites = _sites(self.graphs, acts, wanted)
        return replace(self, wanted=wanted, acts=acts, sites=sites)

    def called(self, owner: nn.Module, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return _called(owner, node)

    def nodes(self) -> Iterator[tuple[nn.Module, fx.Node]]:
        """Every node of every graph, with the module in whose forward it stands."""
        return _nodes(self.graphs)

    def placeholders(self, module: nn.Module) -> list[tuple[nn.Module, fx.Node]]:
        """A module with the nodes that stand for its inputs, in all its graphs."""
        graphs = self.graphs.get(module, ())
        return [(module, node) for g in graphs for node in g.find_nodes(op="placeholder")]

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


def read_calls(
    model: nn.Module,
    classes: tuple[type[nn.Module], ...] = (),
    filter_fn: Filter | None = None,
    stripped: Mapping[nn.Module, tuple[str, ...]] | None = None,
) -> Calls:
    """Trace every forward of a model, and find the calls of activations in them.

    Args:
        model: the model; it is not changed.
        classes: the classes of activations to replace, with their functional forms.
        filter_fn: the user's; called with each such activation and its name, and for functional
            calls with the module that makes them.
        stripped: the normalisations to take out, and which children each calls in a row afterwards.
    """
    stripped = stripped or {}
    names = {module: name for name, module in model.named_modules()}
    wanted = Wanted.of(classes, filter_fn, names)
    acts = frozenset(module for module in names if wanted.has(module))
    traced = {module: _traced(module, stripped) for module in names if module not in acts}
    graphs = {module: found for module, found in traced.items() if isinstance(found, tuple)}
    opaque = {module: found for module, found in traced.items() if isinstance(found, str)}
    calls: dict[nn.Module, list[tuple[nn.Module, fx.Node]]] = {}
    for owner, node in _nodes(graphs):
        called = _called(owner, node)
        if called is not None:
            calls.setdefault(called, []).append((owner, node))
    sites = _sites(graphs, acts, wanted)
    unknown = frozenset(reached for module in opaque for reached in reached_by(module))
    return Calls(model, names, wanted, stripped, acts, graphs, opaque, unknown, calls, sites)


def _traced(
    module: nn.Module, stripped: Mapping[nn.Module, tuple[str, ...]]
) -> tuple[fx.Graph, ...] | str | None:
    """A module's forward as graphs, or why it has none; None for a forward of torch's own."""
    if type(module) is ShapedChain and "forward" not in vars(module):
        return (_row(tuple(module._modules)),)
    if type(module).forward is nn.Module.forward or is_plain(module):
        return None
    if module in stripped:
        return (_row(stripped[module]),)
    reason = rewriting.why_not(module)
    try:
        graphs = trace(module)
    except UntraceableError as error:
        return str(error)
    return reason or graphs


def _sites(
    graphs: Mapping[nn.Module, tuple[fx.Graph, ...]], acts: frozenset[nn.Module], wanted: Wanted
) -> tuple[Site, ...]:
    """All calls of activations to be replaced."""
    found: list[Site] = []
    for owner, node in _nodes(graphs):
        called = _called(owner, node)
        if called in acts or (wanted.has_function(node) and not wanted.keeps(owner)):
            found.append(Site(owner, node, called))
    return tuple(found)


def _nodes(
    graphs: Mapping[nn.Module, tuple[fx.Graph, ...]],
) -> Iterator[tuple[nn.Module, fx.Node]]:
    return ((owner, node) for owner, own in graphs.items() for g in own for node in g.nodes)


def _called(owner: nn.Module, node: fx.Node) -> nn.Module | None:
    return owner.get_submodule(str(node.target)) if node.op == "call_module" else None


def _row(names: tuple[str, ...]) -> fx.Graph:
    """A forward that calls children one after the other."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for name in names:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def _contains(functions: frozenset[Any], value: Any) -> bool:
    return callable(value) and getattr(value, "__hash__", None) is not None and value in functions
