"""Which sums of a model are skip connections, and what becomes of them: `Skips`."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, fx, nn

from fusedshape import rewriting
from fusedshape.convert.calls import read_calls
from fusedshape.convert.report import Change
from fusedshape.faithful import inputs_for, unfaithful
from fusedshape.nn import NormalizedSum
from fusedshape.nodes import is_foreign, is_query, operation
from fusedshape.torch_ops import NONLINEAR, PRODUCTS, QUOTIENTS, SUMS, function_of, name_of, writes
from fusedshape.tracing import memory_roots, reachable_code, take_over, tensor_args
from fusedshape.validate import real

ShortcutWeight = float | Mapping[str, float]

_SCALINGS = PRODUCTS | QUOTIENTS
# Nonlinear functions of this library.
_OURS = {"shaped_act", "bias_act", "conv_act", "linear_act", "conv_chain"}
_WITH_SKIPS_INSIDE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


_POST_ACTIVATION = (
    "an activation follows the sum at once: where x is an activation's output itself, q drifts "
    "from 1; put the activation first in its branch"
)


class Weights:
    """The weight for each module's skips."""

    def __init__(self, given: ShortcutWeight) -> None:
        self.table = dict(given) if isinstance(given, Mapping) else {"*": given}
        self.is_table = isinstance(given, Mapping)
        self.used: set[str] = set()
        for key, w in self.table.items():
            where = f"[{key!r}]" if self.is_table else ""
            if isinstance(w, Tensor):  # the error says how to pass a fixed number
                real("reweight_shortcuts", f"shortcut_weight{where}", w)
            if isinstance(w, (bool, str)) or not hasattr(w, "__float__"):
                raise TypeError(f"reweight_shortcuts: shortcut_weight{where}={w!r} is no number")
            if not 0 <= real("reweight_shortcuts", f"shortcut_weight{where}", w) <= 1:
                raise ValueError(f"reweight_shortcuts: shortcut_weight{where}={w} is outside 0 … 1")

    def of(self, path: str) -> float | None:
        """The weight for a qualified name; None if no entry matches."""
        fits = [path] if path in self.table else [p for p in self.table if fnmatchcase(path, p)]
        self.used.update(fits)
        return float(self.table[fits[0]]) if fits else None

    def unmatched(self) -> list[str]:
        """Entries that matched no skip."""
        return [key for key in self.table if key not in self.used] if self.is_table else []


@dataclass(eq=False)
class _Sum:
    """A sum of two values in one graph; for a skip, also the fork and the shortcut."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    fork: fx.Node | None = None
    shortcut: int = 0
    why: str = ""  # why the sum is left alone

    @property
    def text(self) -> str:
        """The sum, written with the graph's names."""
        return f"{self.operands[0].name} + {self.operands[1].name}"

    @property
    def in_order(self) -> tuple[fx.Node, fx.Node]:
        """The shortcut, then the branch."""
        return self.operands[self.shortcut], self.operands[1 - self.shortcut]


class Skips:
    """Everything that will be done to a model, decided before anything is changed."""

    def __init__(
        self, model: nn.Module, weights: Weights, filter_fn: Callable[[str, nn.Module], bool]
    ) -> None:
        self.calls = read_calls(model)
        self._compare()
        self.weights = weights
        self.wanted = filter_fn
        self.depths: dict[nn.Module, int] = {}
        self.changes: list[Change] = []
        self.counts: Counter[str] = Counter()
        self.holders: set[str] = set()  # names of the modules with a skip
        self.children: dict[nn.Module, dict[str, NormalizedSum]] = {}
        called = self._called()
        for module, path in self.calls.names.items():
            if isinstance(module, _WITH_SKIPS_INSIDE):
                self._leave(path, "x + f(x)", "torch's own forward; write the block out")
            elif module in self.calls.opaque:
                self._refuse_opaque(module, path)
            elif module in self.calls.graphs:
                self._plan_module(module, path)
        after = self._called()
        self.unused = [m for m in self.calls.names if m in called and m not in after]

    def _compare(self) -> None:
        """Raise if a traced forward computes something else than the model, on an input if any."""
        args = inputs_for(self.calls.model)
        found = None if args is None else unfaithful(self.calls.model, self.calls.graphs, args)
        if found is not None:
            module, difference = found
            raise ValueError(
                f"reweight_shortcuts: {self.calls.describe(module)} cannot be followed: traced, "
                f"its forward gives {difference}. It takes a decision that a trace does not see, "
                "for instance by the type of a value in a helper; make that a decision of the "
                "constructor"
            )

    def _called(self) -> set[nn.Module]:
        """Modules that some forward calls or may call."""
        found = set(self.calls.unknown)
        for owner, graphs in self.calls.graphs.items():
            for node in (node for graph in graphs for node in graph.nodes):
                if node.op == "call_module" and hasattr(owner, str(node.target).partition(".")[0]):
                    found.add(owner.get_submodule(str(node.target)))
        return found

    def _leave(self, path: str, what: str, why: str) -> None:
        self.changes.append(Change(path, what, what, why))
        self.counts["left"] += 1

    def _refuse_opaque(self, module: nn.Module, path: str) -> None:
        if _may_add(module) and self.wanted(path, module):
            raise ValueError(
                f"reweight_shortcuts: {self.calls.describe(module)} may hold a skip connection, "
                f"but its forward cannot be traced: {self.calls.opaque[module]}. Use "
                "fusedshape.nn.NormalizedSum there, and leave the module out by filter_fn"
            )

    def _plan_module(self, module: nn.Module, path: str) -> None:
        for graph in self.calls.graphs[module]:
            chosen: list[tuple[_Sum, float]] = []
            for found in _sums(graph):
                w = None if found.why else self.weights.of(path)
                if not found.why:
                    self.holders.add(path)
                if not found.why and not self.wanted(path, module):
                    found.why = "left alone by filter_fn"
                elif not found.why and w is None:
                    found.why = "no entry of shortcut_weight fits"
                if found.why or w is None:
                    self._leave(path, found.text, found.why)
                else:
                    self._choose(module, found)
                    self._check_in_place(module, found)
                    chosen.append((found, w))
            # After the loop, because one sum may be the fork of the next.
            names = (name for k in range(10**6) if not hasattr(module, name := f"skip_{k}"))
            for found, w in chosen:
                self._reweight(module, path, found, w, names)

    def _reweight(
        self, module: nn.Module, path: str, found: _Sum, w: float, names: Iterator[str]
    ) -> None:
        children = self.children.setdefault(module, {})
        shortcut = self._past_identities(module, found.in_order[0])
        fork = found.fork if shortcut is found.fork else None
        active = fork is not None and (
            fork.op == "placeholder" or self._is_activation(module, fork)
        )
        found.operands = _operands(found.node) or found.operands
        shortcut, branch = found.in_order
        note = ""
        if w == 0:
            now = branch.name
            found.node.replace_all_uses_with(branch)
            _erase(module, found.node)
            self.counts["removed"] += 1
        else:
            name = next(names)
            children[name] = NormalizedSum.shortcut(w)
            now = f"{w:.6g}·{shortcut} + {children[name].weights[1]:.6g}·{branch}"
            with found.node.graph.inserting_before(found.node):
                new = found.node.graph.call_module(name, (shortcut, branch))
            found.node.replace_all_uses_with(new)
            found.node.graph.erase_node(found.node)
            self.counts["reweighted"] += 1
            if active and any(self._is_activation(module, user) for user in new.users):
                note = _POST_ACTIVATION
        self.changes.append(Change(path, found.text, now, note))

    def _is_activation(self, owner: nn.Module, node: fx.Node) -> bool:
        if node.op == "call_module" and node.target not in self.children[owner]:
            return _is_nonlinear(owner.get_submodule(str(node.target)))
        return self._own_depth(owner, node) > 0

    def _choose(self, owner: nn.Module, found: _Sum) -> None:
        """Tell the shortcut from the branch."""
        depths = [self._depth(owner, found.fork, operand) for operand in found.operands]
        keys = [
            (depth, self._past_identities(owner, operand) is not found.fork)
            for depth, operand in zip(depths, found.operands, strict=True)
        ]
        if keys[0] == keys[1]:
            raise ValueError(
                f"reweight_shortcuts: {self.calls.describe(owner)} adds {found.text}, each "
                f"{depths[0]} nonlinear layer(s) behind {found.fork}: which is the shortcut? "
                "Write the sum as fusedshape.nn.NormalizedSum.shortcut(w), or leave the module "
                "out by filter_fn"
            )
        found.shortcut = keys.index(min(keys))

    def _past_identities(self, owner: nn.Module, node: fx.Node) -> fx.Node:
        """The node that a value comes from, before any nn.Identity."""
        while type(self.calls.called(owner, node)) is nn.Identity:
            (node,) = node.all_input_nodes
        return node

    def _depth(self, owner: nn.Module, fork: fx.Node | None, end: fx.Node) -> int:
        """The most nonlinear layers on any path from a fork (None: any input) to a node."""
        depths: dict[fx.Node, int] = {}
        node: Any = next(iter(end.graph.nodes)) if fork is None else fork
        while end not in depths:
            before = [depths[a] for a in node.all_input_nodes if a in depths]
            if node is fork or (fork is None and node.op == "placeholder"):
                depths[node] = 0
            elif before or node is end:
                depths[node] = max(before, default=0) + self._own_depth(owner, node)
            node = node.next
        return depths[end]

    def _own_depth(self, owner: nn.Module, node: fx.Node) -> int:
        if node.op != "call_module":
            return int(operation(node).removesuffix("_") in NONLINEAR | _OURS)
        name = str(node.target)
        if name in self.children.get(owner, {}):
            return 0
        module = owner.get_submodule(name)
        if module not in self.depths:
            if module in self.calls.graphs:
                ends = [next(iter(reversed(g.nodes))) for g in self.calls.graphs[module]]
                self.depths[module] = max(self._depth(module, None, end) for end in ends)
            else:
                self.depths[module] = sum(map(_is_nonlinear, module.modules()))
        return self.depths[module]

    def _check_in_place(self, module: nn.Module, found: _Sum) -> None:
        """Raise if a sum changes a tensor in place that is used again under another name."""
        if not writes(name_of(found.node.target)):
            return
        stack: list[tuple[nn.Module, fx.Node, list[fx.Node]]] = [
            (module, found.node, [found.operands[0]])
        ]
        seen: set[tuple[nn.Module, fx.Node]] = set()
        while stack:
            owner, node, changed = stack.pop()
            roots = memory_roots(node.graph, owner, fresh=(node,))
            order = {n: i for i, n in enumerate(node.graph.nodes)}
            hit = {roots[a] for a in changed}
            for other, root in roots.items():
                later = [u for u in other.users if order[u] > order[node] and not is_query(u)]
                if root in hit and other is not node and later:
                    raise ValueError(
                        f"reweight_shortcuts: {self.calls.describe(module)} adds in place to a "
                        f"tensor that {self.calls.describe(owner)} uses again afterwards (in "
                        f"{later[0].name}); write x = x + f(x)"
                    )
            if any(root.op == "placeholder" for root in hit) and owner in self.calls.calls:
                for caller, call in self.calls.calls[owner]:
                    if (caller, call) not in seen:
                        seen.add((caller, call))
                        stack.append((caller, call, tensor_args(call)))

    def apply(self, drop_unused: bool) -> None:
        """Change the model."""
        for module, children in self.children.items():
            sources = tuple(rewriting.source(graph) for graph in self.calls.graphs[module])
            for name, child in children.items():
                module.add_module(name, child.train(module.training))
            module.__class__ = rewriting.subclass(type(module), sources, "Reweighted")
        if drop_unused:
            gone = set(self.unused)
            for module in self.calls.names:
                for name in [n for n, child in module._modules.items() if child in gone]:
                    delattr(module, name)


def _is_nonlinear(module: nn.Module) -> bool:
    return function_of(module) in NONLINEAR


def _may_add(module: nn.Module) -> bool:
    """Whether a forward that cannot be traced may contain a sum."""
    kind: Any = type(module)
    trees = reachable_code(kind)
    return trees is None or any(
        (isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Add))
        or (isinstance(node, ast.Attribute) and node.attr.removesuffix("_") in SUMS)
        for _, _, tree in trees
        for node in ast.walk(tree)
    )


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a node that adds two values, None for other nodes."""
    if is_foreign(node) or operation(node).removesuffix("_") not in SUMS:
        return None
    a = node.args[0] if node.args else node.kwargs.get("input")
    b = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _sums(graph: fx.Graph) -> list[_Sum]:
    """All sums of two values in a graph; `why` is set for those that are no skips."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    found = [_Sum(node, ab) for node in graph.nodes if (ab := _operands(node)) is not None]
    for one in found:
        if writes(name_of(one.node.target)):
            # Later users of the changed tensor take the sum's result: it is what they would see.
            take_over(one.operands[0], one.node, order)
    found = [_Sum(one.node, ab) for one in found if (ab := _operands(one.node)) is not None]
    dominators = _Dominators(graph)
    # Leave out sums of numbers and constants.
    found = [one for one in found if any(a in dominators.above for a in one.operands)]
    by_node = {one.node: one for one in found}
    for one in found:
        _judge(one, dominators)
    for one in found:
        for operand in one.operands:
            inner = by_node.get(operand)
            if inner is not None and operand is not one.fork and inner.fork is one.fork:
                for part in (inner, one):
                    part.why = part.why or "a sum of more than two branches"
    return found


def _judge(found: _Sum, dominators: _Dominators) -> None:
    """Find the fork, or the reason why a sum is no skip."""
    a, b = found.operands
    if a not in dominators.above or b not in dominators.above:
        found.why = "no skip: an operand does not depend on the input"
        return
    found.fork = dominators.common(a, b)
    if found.fork is None:
        found.why = "no skip: its operands come from different inputs"
    elif a is b:
        found.why = "no skip: both operands are the same"
    elif (
        found.node.kwargs.get("alpha", 1) != 1
        or len(found.node.args) > 2
        or any(map(_scaled, (a, b)))
    ):
        found.why = "an operand carries a number as its weight already"
    else:
        inside = _between(found.fork, found.operands)
        for node in inside:
            users = [u for u in node.users if u not in inside and u is not found.node]
            if any(not is_query(u) for u in users):
                found.why = f"no skip: {node.name}, inside a branch, is used outside it too"


def _scaled(node: fx.Node) -> bool:
    scales = operation(node).removesuffix("_") in _SCALINGS and not is_foreign(node)
    return scales and any(isinstance(a, (int, float)) for a in node.args)


def _between(fork: fx.Node, ends: tuple[fx.Node, fx.Node]) -> set[fx.Node]:
    """The nodes inside the two branches between a fork and a sum."""
    stack, found = list(ends), set()
    while stack:
        node = stack.pop()
        if node is not fork and node not in found and node.op not in ("get_attr", "placeholder"):
            found.add(node)
            stack += [] if is_query(node) else node.all_input_nodes
    return found


class _Dominators:
    """The immediate dominator of each value: the last one before it that all input data passes.

    Attributes:
        above: the dominator of each node that depends on the input's data; None for the input.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.above: dict[fx.Node, fx.Node | None] = {}
        self.height: dict[fx.Node | None, int] = {None: 0}
        for node in graph.nodes:
            data = [a for a in node.all_input_nodes if a in self.above]
            if node.op == "placeholder" or (data and not is_query(node)):
                above = functools.reduce(self.common, data) if data else None
                self.above[node] = above
                self.height[node] = self.height[above] + 1

    def common(self, a: fx.Node | None, b: fx.Node | None) -> fx.Node | None:
        """The last value that all data of both a and b passes; it may be a or b."""
        while a is not b:
            if self.height[a] < self.height[b]:
                a, b = b, a
            assert a is not None
            a = self.above[a]
        return a


def _erase(owner: nn.Module, node: fx.Node) -> None:
    """Erase a sum without users, and the nodes that were computed for it alone."""
    stack = list(node.all_input_nodes)
    node.graph.erase_node(node)
    while stack:
        node = stack.pop()
        called = owner.get_submodule(str(node.target)) if node.op == "call_module" else None
        in_place = node.op == "call_method" and writes(name_of(node.target))
        in_place = in_place or bool(node.kwargs.get("inplace") or getattr(called, "inplace", False))
        if not node.users and node.op != "placeholder" and not in_place:
            stack += node.all_input_nodes
            node.graph.erase_node(node)
