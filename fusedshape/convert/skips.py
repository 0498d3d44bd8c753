"""Which sums of a model are skip connections, and what becomes of them: `Skips`."""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, fx, nn

from fusedshape import rewriting
from fusedshape.convert.calls import Calls, read_calls
from fusedshape.convert.report import Change, Done
from fusedshape.convert.request import Escape, Request, ShortcutWeight
from fusedshape.faithful import adds_tensors, calls, inputs_for, unfaithful
from fusedshape.nn import NormalizedSum
from fusedshape.nodes import is_query, operation
from fusedshape.sums import CONSTANT, DOUBLED, Sum, between, operands_of, sums, without_number
from fusedshape.torch_ops import NONLINEAR, SUMS, function_of, name_of, writes
from fusedshape.tracing import memory_roots, reachable_code, tensor_args
from fusedshape.validate import real

# Nonlinear functions of this library.
_OURS = {"shaped_act", "bias_act", "conv_act", "linear_act", "conv_chain"}
_WITH_SKIPS_INSIDE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

_POST_ACTIVATION = (
    "an activation follows the sum at once: where x is an activation's output itself, q drifts "
    "from 1; put the activation first in its branch"
)
_PARALLEL = "linear branches side by side, no skip"
_UNTOLD = "nobody can tell the shortcut from the branch; all count alike"
_MERGED = "no skip; its operands count alike"


@dataclass(frozen=True)
class Asked:
    """What is asked of the sums of a model.

    Attributes:
        who: the function that was called, for messages.
        weights: the weight of the shortcut in each module's skips.
        wanted: whether the sums of a module, given with its name, are to be changed.
        on_ambiguous: what to do where nobody can tell the shortcut from the branch.
        on_untraceable: what to do about a module that cannot be traced and may hold a sum.
        every_sum: whether sums that are no skips are normalised too, each operand alike, and
            numbers that weigh a branch already are dropped.
    """

    who: str
    weights: Weights
    wanted: Callable[[str, nn.Module], bool]
    on_ambiguous: Escape = "error"
    on_untraceable: Escape = "error"
    every_sum: bool = False


@dataclass(frozen=True)
class Weights:
    """The weight for each module's skips.

    Attributes:
        who: the function that was given it, for messages.
        name: the argument, for messages.
        given: what was given.
        used: the entries that some module took.
    """

    who: str
    name: str
    given: ShortcutWeight
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for key, w in self.table.items():
            where = self.name + (f"[{key!r}]" if isinstance(self.given, Mapping) else "")
            if isinstance(w, Tensor):  # the error says how to pass a fixed number
                real(self.who, where, w)
            if isinstance(w, (bool, str)) or not hasattr(w, "__float__"):
                raise TypeError(f"{self.who}: {where}={w!r} is no number")
            if not 0 <= real(self.who, where, w) <= 1:
                raise ValueError(f"{self.who}: {where}={w} is outside 0 … 1")

    @property
    def table(self) -> Mapping[str, float]:
        """The weights by qualified name or pattern."""
        return self.given if isinstance(self.given, Mapping) else {"*": self.given}

    def of(self, path: str) -> float | None:
        """The weight for a qualified name; None if no entry matches."""
        fits = [path] if path in self.table else [p for p in self.table if fnmatchcase(path, p)]
        self.used.update(fits)
        return float(self.table[fits[0]]) if fits else None

    def check_matched(self, holders: Collection[str]) -> None:
        """Raise if an entry matched no skip.

        Args:
            holders: names of the modules with a skip.

        Raises:
            ValueError: there is such an entry.
        """
        unmatched = [key for key in self.table if key not in self.used]
        if unmatched and isinstance(self.given, Mapping):
            raise ValueError(
                f"{self.who}: {unmatched} fit no module with a skip connection; those there are: "
                f"{sorted(holders)}"
            )


@dataclass(frozen=True)
class _Choice:
    """What is to become of a sum.

    Attributes:
        weights: of its operands.
        order: the operands' numbers, in the order in which they are written.
        note: what is said of it.
    """

    weights: tuple[float, ...]
    order: tuple[int, ...]
    note: str = ""

    @classmethod
    def alike(cls, count: int, note: str) -> _Choice:
        """The same weight for all operands."""
        return cls((1 / math.sqrt(count),) * count, tuple(range(count)), note)

    @classmethod
    def skip(cls, count: int, shortcut: int, w: float) -> _Choice:
        """w for the shortcut, and the rest in equal parts for the branches."""
        rest = math.sqrt((1 - w) * (1 + w) / (count - 1))
        others = [i for i in range(count) if i != shortcut]
        return cls((w, *[rest] * (count - 1)), (shortcut, *others))


def reweight(model: nn.Module, request: Request) -> Done:
    """Make the sums of a model normalised ones, as a request wants it.

    Args:
        model: the model, whose modules an undo log has saved already.
        request: what was asked for.

    Raises:
        ValueError: a sum that cannot be told or changed; the message names the module.
    """
    if request.shortcuts is None:
        return Done()
    weights = Weights("convert", "shortcuts", request.shortcuts)
    escapes = request.on_ambiguous, request.on_untraceable
    skips = Skips.of(
        model, Asked("convert", weights, _every, *escapes, every_sum=True), request.example
    )
    weights.check_matched(skips.holders)
    notes = []
    if not skips.changes:
        notes.append("shortcuts: no sum x + f(x) was found")
    if skips.unused:
        names = ", ".join(map(repr, skips.names_of_unused))
        notes.append(f"no longer called, as only skips that are gone called them: {names}")
    skips.apply(drop_unused=False)
    counts = {"reweighted": skips.counts["reweighted"], "removed": skips.counts["removed"]}
    return Done(tuple(skips.changes), tuple(notes), counts)


def _every(path: str, module: nn.Module) -> bool:
    return True


@dataclass(frozen=True, eq=False)
class Skips:
    """Everything that will be done to the sums of a model, decided before anything is changed.

    Attributes:
        asked: what is to be done.
        calls: the model's calls; the graphs are rewritten.
        changes: a row for each sum.
        counts: "reweighted", "removed", "left".
        holders: names of the modules with a skip.
        children: the new children of each module.
        unused: modules that only removed skips called.
        depths: nonlinear layers of modules, as far as they were counted.
        recorded: the arguments of one call of each module that cannot be traced, if an input was
            found.
    """

    asked: Asked
    calls: Calls
    changes: list[Change] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    holders: set[str] = field(default_factory=set)
    children: dict[nn.Module, dict[str, NormalizedSum]] = field(default_factory=dict)
    unused: list[nn.Module] = field(default_factory=list)
    depths: dict[nn.Module, int] = field(default_factory=dict)
    recorded: dict[nn.Module, tuple[Any, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, asked: Asked, example: Any = None) -> Skips:
        """Decide what is to be done to a model.

        Raises:
            ValueError: a sum that cannot be told or changed; the message names the module.
        """
        skips = cls(asked, read_calls(model))
        skips._compare(example)
        skips._decide()
        return skips

    def _decide(self) -> None:
        called = self._called()
        for module, path in self.calls.names.items():
            if isinstance(module, _WITH_SKIPS_INSIDE):
                self._leave(path, "x + f(x)", "torch's own forward; write the block out")
            elif module in self.calls.opaque:
                self._refuse_opaque(module, path)
            elif module in self.calls.graphs:
                self._plan_module(module, path)
        after = self._called()
        self.unused.extend(m for m in self.calls.names if m in called and m not in after)

    def _compare(self, example: Any) -> None:
        """Raise if a traced forward computes something else than the model, on an input if any."""
        args = inputs_for(self.calls.model, example)
        if args is not None:
            self.recorded.update(calls(self.calls.model, self.calls.opaque, args))
        found = None if args is None else unfaithful(self.calls.model, self.calls.graphs, args)
        if found is not None:
            module, difference = found
            raise ValueError(
                f"{self.asked.who}: {self.calls.describe(module)} cannot be followed: traced, "
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
        if not (_may_add(module) and self.asked.wanted(path, module)):
            return
        call = self.recorded.get(module)
        if call is not None and not adds_tensors(module, call):
            return  # what it adds are sizes
        why = self.calls.opaque[module]
        if self.asked.on_untraceable == "report":
            self._leave(
                path, "x + f(x)", f"it may hold a skip connection, but is not traced: {why}"
            )
            return
        way = "on_untraceable='report'" if self.asked.every_sum else "filter_fn"
        raise ValueError(
            f"{self.asked.who}: {self.calls.describe(module)} may hold a skip connection, "
            f"but its forward cannot be traced: {why}. Use "
            f"fusedshape.nn.NormalizedSum there, and leave the module out by {way}"
        )

    def _plan_module(self, module: nn.Module, path: str) -> None:
        for graph in self.calls.graphs[module]:
            chosen: list[tuple[Sum, _Choice]] = []
            for found in sums(graph, self.asked.every_sum):
                choice = self._choice(module, path, found)
                if isinstance(choice, str):
                    self._leave(path, found.text, choice)
                else:
                    self._check_in_place(module, found)
                    chosen.append((found, choice))
            # After the loop, because one sum may be the fork of the next.
            names = (name for k in range(10**6) if not hasattr(module, name := f"skip_{k}"))
            for found, choice in chosen:
                self._reweight(module, path, found, choice, names)

    def _choice(self, owner: nn.Module, path: str, found: Sum) -> _Choice | str:
        """What is to become of a sum, or why it is left alone."""
        if found.why and (not self.asked.every_sum or found.why in (CONSTANT, DOUBLED)):
            return found.why
        if not found.why:
            self.holders.add(path)
        if not self.asked.wanted(path, owner):
            return "left alone by filter_fn"
        w = self.asked.weights.of(path)
        if w is None:
            return "no entry of shortcut_weight fits"
        count = len(found.operands)
        sources = [self._past_identities(owner, without_number(a)) for a in found.operands]
        if found.why and found.fork not in sources:
            return _Choice.alike(count, _MERGED)
        return self._told(owner, found, w)

    def _told(self, owner: nn.Module, found: Sum, w: float) -> _Choice:
        """Tell the shortcut from the branches: fewer nonlinear layers, then fewer parameters."""
        depths = [self._depth(owner, found.fork, operand) for operand in found.operands]
        sizes = [self._size(owner, found.fork, operand) for operand in found.operands]
        if not any(depths) and (all(sizes) or len(depths) > 2):
            return _Choice.alike(len(depths), _PARALLEL)
        keys = [
            (depth, size, self._past_identities(owner, operand) is not found.fork)
            for depth, size, operand in zip(depths, sizes, found.operands, strict=True)
        ]
        if keys.count(min(keys)) == 1:
            return _Choice.skip(len(keys), keys.index(min(keys)), w)
        if self.asked.on_ambiguous == "error":
            raise ValueError(
                f"{self.asked.who}: {self.calls.describe(owner)} adds {found.text}, each "
                f"{depths[0]} nonlinear layer(s) and {sizes[0]} parameter(s) behind {found.fork}: "
                "which is the shortcut? Write the sum as fusedshape.nn.NormalizedSum.shortcut(w), "
                "pass on_ambiguous='report' to weigh all alike"
                + ("" if self.asked.every_sum else ", or leave the module out by filter_fn")
            )
        return _Choice.alike(len(keys), _UNTOLD)

    def _reweight(
        self, module: nn.Module, path: str, found: Sum, choice: _Choice, names: Iterator[str]
    ) -> None:
        children = self.children.setdefault(module, {})
        operands = found.now()
        if self.asked.every_sum:
            operands = [without_number(operand) for operand in operands]
        terms = [
            (w, operands[i]) for w, i in zip(choice.weights, choice.order, strict=True) if w != 0
        ]
        shortcut = self._past_identities(module, operands[choice.order[0]])
        fork = found.fork if shortcut is found.fork else None
        active = fork is not None and (
            fork.op == "placeholder" or self._is_activation(module, fork)
        )
        note = choice.note
        if len(terms) == 1 and choice.weights[0] == 0:
            ((_, new),) = terms
            now = new.name
            self.counts["removed"] += 1
        else:
            name = next(names)
            children[name] = NormalizedSum(choice.weights)
            now = " + ".join(f"{w:.6g}·{operand}" for w, operand in terms)
            with found.node.graph.inserting_before(found.node):
                new = found.node.graph.call_module(name, tuple(operands[i] for i in choice.order))
            self.counts["reweighted"] += 1
        found.node.replace_all_uses_with(new)
        _erase(found.additions, functools.partial(self._called_by, module))
        if active and len(terms) > 1 and any(self._is_activation(module, u) for u in new.users):
            note = _POST_ACTIVATION
        self.changes.append(Change(path, found.text, now, note))

    def _is_activation(self, owner: nn.Module, node: fx.Node) -> bool:
        if node.op == "call_module" and node.target not in self.children[owner]:
            return _is_nonlinear(owner.get_submodule(str(node.target)))
        return self._own_depth(owner, node) > 0

    def _size(self, owner: nn.Module, fork: fx.Node | None, end: fx.Node) -> int:
        """The number of parameters between a fork and a node."""
        held: dict[int, Tensor] = {}
        for node in between(fork, [end], constants=True):
            called = self._called_by(owner, node)
            if called is not None:
                held |= {id(p): p for p in called.parameters()}
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(owner)
                held |= {id(value): value} if isinstance(value, nn.Parameter) else {}
        return sum(p.numel() for p in held.values() if not nn.parameter.is_lazy(p))

    def _called_by(self, owner: nn.Module, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, unless it is a sum that was put in here."""
        new = node.op == "call_module" and node.target in self.children.get(owner, {})
        return None if new else self.calls.called(owner, node)

    def _past_identities(self, owner: nn.Module, node: fx.Node) -> fx.Node:
        """The node that a value comes from, before any nn.Identity."""
        while type(self._called_by(owner, node)) is nn.Identity:
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

    def _check_in_place(self, module: nn.Module, found: Sum) -> None:
        """Raise if a sum changes a tensor in place that is used again under another name."""
        stack: list[tuple[nn.Module, fx.Node, list[fx.Node]]] = [
            (module, node, [first])
            for node in found.additions
            if writes(name_of(node.target))
            for first in (operands_of(node) or ())[:1]
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
                        f"{self.asked.who}: {self.calls.describe(module)} adds in place to a "
                        f"tensor that {self.calls.describe(owner)} uses again afterwards (in "
                        f"{later[0].name}); write x = x + f(x)"
                    )
            if any(root.op == "placeholder" for root in hit) and owner in self.calls.calls:
                for caller, call in self.calls.calls[owner]:
                    if (caller, call) not in seen:
                        seen.add((caller, call))
                        stack.append((caller, call, tensor_args(call)))

    @property
    def names_of_unused(self) -> tuple[str, ...]:
        """Qualified names of modules that only removed skips called, in the model's order."""
        return tuple(self.calls.names[module] for module in self.unused)

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


def _erase(additions: list[fx.Node], called_by: Callable[[fx.Node], nn.Module | None]) -> None:
    """Erase a sum without users, and the nodes that were computed for it alone."""
    stack = [a for node in additions for a in node.all_input_nodes if a not in additions]
    while additions:
        additions = [node for node in additions if node.users or node.graph.erase_node(node)]
    gone: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in gone:
            continue
        called = called_by(node)
        in_place = node.op == "call_method" and writes(name_of(node.target))
        in_place = in_place or bool(node.kwargs.get("inplace") or getattr(called, "inplace", False))
        if not node.users and node.op != "placeholder" and not in_place:
            stack += node.all_input_nodes
            node.graph.erase_node(node)
            gone.add(node)
