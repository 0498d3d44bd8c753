"""All that will be done to a model, made before anything is: `Plan`; its `apply` does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fusedshape.convert.calls import FUNCTIONAL, Calls
from fusedshape.convert.in_place import writers
from fusedshape.convert.initial import Starts, initialise, starts_for
from fusedshape.convert.positions import unread_positions
from fusedshape.convert.reading import Reading
from fusedshape.convert.replacing import like, swap
from fusedshape.convert.report import Change, Done, Report, left_alone
from fusedshape.nn import (
    SHAPED,
    ShapedActivation,
    ShapedChain,
    chain_rows,
    place,
    why_not_chained,
)
from fusedshape.rewriting import source, subclass
from fusedshape.tracing import write_out_of_place
from fusedshape.undo import UndoLog

# Containers with the names of the children that run in one row.
Runs = Mapping[nn.Module, list[list[str]]]
_COUNTED = ("fused", "shaped", "rewritten", "stripped", "chained")


@dataclass(frozen=True)
class Rewrite:
    """Another class for a module, whose forward calls new children in place of functions."""

    cls: type[nn.Module]
    children: Mapping[str, nn.Module]


@dataclass(frozen=True)
class Step:
    """What is done to one module.

    Attributes:
        row: what the report says of it.
        counts: what it adds to the report's counts.
        swap: what takes the module's place.
        rewrite: what the module becomes.
    """

    row: Change
    counts: Mapping[str, int]
    swap: nn.Module | None = None
    rewrite: Rewrite | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """All that will be done to a model.

    Attributes:
        reading: of the model.
        swaps: new modules in the place of old ones.
        rewrites: new classes of modules that stay.
        freed: modules that will not work in place any more.
        chains: containers that become a `ShapedChain`.
        starts: how its layers start.
        report: what is said of all that.
    """

    reading: Reading
    swaps: Mapping[nn.Module, nn.Module]
    rewrites: Mapping[nn.Module, Rewrite]
    freed: frozenset[nn.Module]
    chains: tuple[nn.Module, ...]
    starts: Starts
    report: Report

    def apply(self, log: UndoLog) -> None:
        """Change the model, whose modules the log has saved already."""
        request = self.reading.request
        initialise(self.starts.layers, self.reading.constants, request.generator, log)
        swap((*self.reading.calls.names, *self.swaps.values()), self.swaps)
        for owner, rewrite in self.rewrites.items():
            for name, child in rewrite.children.items():
                owner.add_module(name, child)
            owner.__class__ = rewrite.cls
        for module in self.freed:
            module.inplace = False  # type: ignore[assignment]
        longest = None if request.chain is True else request.chain
        for container in self.chains:
            container.__class__ = ShapedChain
            container.max_length = longest  # type: ignore[assignment]


def plan_for(reading: Reading, before: Sequence[Done] = ()) -> Plan:
    """Plan all that is to be done to a model that was read; its traced graphs are rewritten.

    Args:
        reading: of the model.
        before: what earlier stages did to it, for the report.

    Raises:
        ValueError: something that cannot be done; the message names the module.
    """
    calls, request = reading.calls, reading.request
    freed: set[nn.Module] = set()
    freeing: dict[nn.Module, list[fx.Node]] = {}
    sites = calls.sites if reading.constants.spec.saves_output else ()
    for node, owner in writers(calls, [(site.owner, site.node) for site in sites]).items():
        called = calls.called(owner, node)
        if called is None:
            freeing.setdefault(owner, []).append(node)
        else:
            freed.add(called)
    steps = _Steps(reading, frozenset(freed), freeing).all()
    swaps = {old: step.swap for old, step in steps.items() if step.swap is not None}
    runs = _runs(calls, swaps) if request.chain else {}
    alone = _why_not_chained(reading, swaps, runs) if request.chain else {}
    starts = starts_for(reading)
    calls.check_held("convert", swaps)
    rows = [replace(s.row, note=alone.get(s.row.path, s.row.note)) for s in steps.values()]
    rows += [_row_of_chain(calls.names[owner], found) for owner, found in runs.items()]
    rows += starts.rows
    return Plan(
        reading=reading,
        swaps=swaps,
        rewrites={m: step.rewrite for m, step in steps.items() if step.rewrite is not None},
        freed=frozenset(freed),
        chains=tuple(runs),
        starts=starts,
        report=_report(reading, starts, before, rows, _counts(steps.values(), runs)),
    )


def _counts(steps: Iterable[Step], runs: Runs) -> Counter[str]:
    """What the report counts of the steps and the chains."""
    counts = Counter(dict.fromkeys(_COUNTED, 0))
    for step in steps:
        counts.update(step.counts)
    counts["chained"] = sum(len(run) for found in runs.values() for run in found)
    return counts


def _report(
    reading: Reading,
    starts: Starts,
    before: Sequence[Done],
    rows: list[Change],
    counts: Counter[str],
) -> Report:
    calls, constants, request = reading.calls, reading.constants, reading.request
    rows = [*(row for done in before for row in done.rows), *rows]
    for done in before:
        counts.update(done.counts)
    order = {name: i for i, name in enumerate(calls.names.values())}
    rows.sort(key=lambda row: order[row.path])
    counts["initialised"] = len(starts.layers)
    counts["skipped"] = sum(row.now == row.was for row in rows)
    earlier = [note for done in before for note in done.notes]
    named = [(calls.names[start.layer], start.layer, start.method) for start in starts.layers]
    unread = unread_positions(reading.wired, named)
    return Report(
        recipe=constants.recipe,
        spec=constants.spec,
        depth=constants.depth,
        init=request.init,
        dry_run=request.dry_run,
        changes=tuple(rows),
        notes=(*constants.notes, *reading.notes, *starts.notes, *earlier, *unread),
        counts=dict(counts),
    )


@dataclass(frozen=True)
class _Steps:
    """What is done to each module, and why nothing is.

    Attributes:
        reading: of the model.
        freed: modules that will not work in place any more.
        freeing: functions and methods to rewrite out of place, by the module that calls them.
    """

    reading: Reading
    freed: frozenset[nn.Module]
    freeing: Mapping[nn.Module, list[fx.Node]]

    def all(self) -> dict[nn.Module, Step]:
        """The steps by module, in the model's order."""
        found: dict[nn.Module, Step] = {}
        for module in self.reading.calls.names:
            step = self._changed(module) or self._left(module)
            if step is not None:
                found[module] = step
        return found

    def _changed(self, module: nn.Module) -> Step | None:
        """What is done to a module; None if nothing is."""
        fusion, calls = self.reading.fusion, self.reading.calls
        if module in fusion.layers:
            fused = SHAPED[type(module)].from_plain(
                module, self.reading.constants.spec, self.reading.request.backend
            )
            return self._swapped(module, fused, "", "fused")
        if module in fusion.merged:
            return self._swapped(module, like(module, place()), "fused into the layer before")
        if module in calls.acts:
            whys = dict.fromkeys(match.why for match in fusion.of_module(module) if match.why)
            why = "; ".join(whys) or "no call of it was traced"
            new = like(module, self._activation())
            return self._swapped(module, new, f"not fused: {why}", "shaped")
        if module in fusion.rewritten or module in self.freeing:
            return self._rewritten(module)
        if module in self.freed:
            kind = type(module).__name__
            note = "inplace=False, as what it changed is needed"
            return Step(Change(calls.names[module], kind, f"{kind} out of place", note), {})
        return None

    def _left(self, module: nn.Module) -> Step | None:
        """What is said of a module to which nothing is done; None if nothing is."""
        calls = self.reading.calls
        if module in calls.opaque:
            note = f"not traced: {calls.opaque[module]}"
            if calls.wanted.may_be_called_by(module):
                note += " and may call activations that stay as they are"
        elif module not in calls.graphs and calls.wanted.may_be_called_by(module):
            note = "torch's own forward may call activations, which stay as they are"
        elif module in calls.left:
            note = calls.left[module]
        elif calls.wanted.kept.get(module):
            note = "left alone by filter_fn"
        elif type(module) in FUNCTIONAL:
            note = "not among the classes to replace"
        else:
            return None
        return Step(left_alone(calls.names[module], module, note), {})

    def _activation(self) -> ShapedActivation:
        return ShapedActivation(self.reading.constants.spec, self.reading.request.backend)

    def _swapped(self, old: nn.Module, new: nn.Module, note: str, count: str = "") -> Step:
        kinds = type(old).__name__, type(new).__name__
        row = Change(self.reading.calls.names[old], *kinds, note)
        return Step(row, {count: 1} if count else {}, swap=new)

    def _rewritten(self, owner: nn.Module) -> Step:
        """Write an owner's forward with modules in place of functional calls."""
        calls = self.reading.calls
        children: dict[str, nn.Module] = {}
        whys: list[str] = []
        for graph in calls.graphs[owner]:
            for node in (n for n in self.freeing.get(owner, ()) if n.graph is graph):
                whys.append(f"{node.name} out of place, as what it changed is needed")
                write_out_of_place(node)
            whys += self._placed(owner, graph, children)
        base: Any = type(owner)
        cls = subclass(base, tuple(source(graph) for graph in calls.graphs[owner]))
        shaped = sum(isinstance(child, ShapedActivation) for child in children.values())
        note = "; ".join(["forward rewritten", *dict.fromkeys(whys)])
        row = Change(calls.names[owner], base.__name__, cls.__name__, note)
        return Step(row, {"rewritten": 1, "shaped": shaped}, rewrite=Rewrite(cls, children))

    def _placed(
        self, owner: nn.Module, graph: fx.Graph, children: dict[str, nn.Module]
    ) -> Iterator[str]:
        """Put calls of new children into a graph, and say why some are not fused.

        The names start anew in every graph, so that all graphs of a module share its children.
        """
        fusion = self.reading.fusion
        free = {word: _free(owner, word) for word in ("shaped", "fused")}
        sites = [(s, match) for s, match in fusion.matches.items() if s.node.graph is graph]
        for site, match in sites:
            if site.module is not None and (match.why or site.module in fusion.merged):
                continue
            name = next(free["shaped" if match.why else "fused"])
            if name not in children:
                new = self._activation() if match.why else place()
                children[name] = new.train(owner.training)
                if match.why:
                    yield f".{name} not fused: {match.why}"
            with graph.inserting_before(site.node):
                call = graph.call_module(name, (site.input,))
            site.node.replace_all_uses_with(call)
            graph.erase_node(site.node)


def _runs(calls: Calls, swaps: Mapping[nn.Module, nn.Module]) -> Runs:
    """The containers that hold fused layers in a row, with the names of those in each row."""
    found: dict[nn.Module, list[list[str]]] = {}
    for owner in calls.names:
        if type(owner) is nn.Sequential:
            runs = [run for run in chain_rows(_after(owner, swaps)) if len(run) > 1]
            found |= {owner: runs} if runs else {}
    return found


def _why_not_chained(
    reading: Reading, swaps: Mapping[nn.Module, nn.Module], runs: Runs
) -> dict[str, str]:
    """Why fused layers are in no row, by their path."""
    calls = reading.calls
    whys = dict.fromkeys(reading.fusion.layers, "")
    for owner in calls.names:
        own = [(name, child) for name, child in owner._modules.items() if child in whys]
        chained = {name for run in runs.get(owner, ()) for name in run}
        for name, child in own:
            assert child is not None
            if type(owner) is not nn.Sequential:
                why = f"it stands in {calls.describe(owner)}, no nn.Sequential"
                whys[child] = whys[child] or why
            elif name not in chained:
                why = why_not_chained(swaps[child])
                whys[child] = why or "no layer of its kind next to it"
    return {calls.names[layer]: f"not chained: {why}" for layer, why in whys.items() if why}


def _after(owner: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> dict[str, nn.Module | None]:
    """A module's children once they have been swapped."""
    children = owner._modules.items()
    return {name: None if child is None else swaps.get(child, child) for name, child in children}


def _row_of_chain(path: str, runs: list[list[str]]) -> Change:
    note = ", ".join(f"{run[0]} … {run[-1]} ({len(run)} layers)" for run in runs)
    return Change(path, "Sequential", "ShapedChain", f"in a row: {note}")


def _free(owner: nn.Module, word: str) -> Iterator[str]:
    """Names for new children of a module."""
    names = (f"{word}_{i}" for i in range(10**6))
    return (name for name in names if not hasattr(owner, name))
