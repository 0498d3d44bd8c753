"""All that will be done to a model, made before anything is: `Plan`; its `apply` does it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Generator, fx, nn
from torch.nn.utils import parametrize

from fusedshape.convert.calls import FUNCTIONAL, Calls
from fusedshape.convert.constants import Constants
from fusedshape.convert.fusion import HOOKS, Fusion
from fusedshape.convert.report import Change, Report
from fusedshape.init import Method, check_init, init_module_
from fusedshape.kinds import features, kind_of
from fusedshape.nn import (
    SHAPED,
    ShapedActivation,
    ShapedChain,
    chain_rows,
    place,
    why_not_chained,
)
from fusedshape.ops.dispatch import Backend
from fusedshape.rewriting import source, subclass
from fusedshape.tracing import write_out_of_place
from fusedshape.undo import UndoLog, generator_of, overlapping, why_not_written

_HOOK_FLAGS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


@dataclass
class _Rewrite:
    cls: type[nn.Module]
    children: dict[str, nn.Module]


class Plan:
    """All that will be done to a model, made before anything is."""

    def __init__(
        self,
        calls: Calls,
        fusion: Fusion,
        constants: Constants,
        init: Method | None,
        backend: Backend,
        chain: bool | int,
    ) -> None:
        self.calls = calls
        self.fusion = fusion
        self.constants = constants
        self.init = init
        self.backend = backend
        self.swaps: dict[nn.Module, nn.Module] = {}
        self.rewrites: dict[nn.Module, _Rewrite] = {}
        self.rows: list[Change] = []
        self.notes = list(constants.notes)
        self.layers: list[tuple[nn.Module, Method]] = []
        self.writers = calls.writers(saved=constants.spec.saves_output)
        self.freed = {m for n, o in self.writers.items() if (m := calls.called(o, n)) is not None}
        self.freeing: dict[nn.Module, list[fx.Node]] = {}
        for node, owner in self.writers.items():
            if node.op != "call_module":
                self.freeing.setdefault(owner, []).append(node)
        names = "fused", "shaped", "rewritten", "stripped", "chained"
        self.counts = Counter(dict.fromkeys(names, 0))
        for module in calls.names:
            self._plan_module(module)
        self.chain = chain
        self.chains: list[nn.Sequential] = []
        if chain:
            self._plan_chains()
        self._plan_init()
        calls.check_held("convert", self.swaps)
        order = {name: i for i, name in enumerate(calls.names.values())}
        self.rows.sort(key=lambda row: order[row.path])

    def _plan_module(self, module: nn.Module) -> None:
        fusion, calls, spec = self.fusion, self.calls, self.constants.spec
        if module in fusion.layers:
            self._swap(module, SHAPED[type(module)].from_plain(module, spec, self.backend))
            self.counts["fused"] += 1
        elif module in fusion.merged:
            self._swap(module, _like(module, place()), "fused into the layer before")
        elif module in calls.acts:
            whys = dict.fromkeys(s.why for s in fusion.of_module.get(module, []) if s.why)
            why = "; ".join(whys) or "no call of it was traced"
            self._swap(module, _like(module, self._activation()), f"not fused: {why}")
            self.counts["shaped"] += 1
        elif module in calls.stripped:
            row = {name: module.get_submodule(name) for name in calls.stripped[module]}
            rest = nn.Sequential(OrderedDict(row)) if row else nn.Identity()
            self._swap(module, _like(module, rest), "BatchNorm stripped")
            self.counts["stripped"] += 1
        elif module in fusion.rewritten or module in self.freeing:
            self._rewrite(module)
        elif module in self.freed:
            kind = type(module).__name__
            note = "inplace=False, as what it changed is needed"
            self.rows.append(Change(calls.names[module], kind, f"{kind} out of place", note))
        elif module in calls.opaque:
            left = " and may call activations that stay as they are"
            note = f"not traced: {calls.opaque[module]}"
            self._skip(module, note + (left if calls.may_call(module) else ""))
        elif module not in calls.graphs and calls.may_call(module):
            self._skip(module, "torch's own forward may call activations, which stay as they are")
        elif calls.kept.get(module):
            self._skip(module, "left alone by filter_fn")
        elif type(module) in FUNCTIONAL:
            self._skip(module, "not among the classes to replace")

    def _activation(self) -> ShapedActivation:
        return ShapedActivation(self.constants.spec, self.backend)

    def _swap(self, old: nn.Module, new: nn.Module, note: str = "") -> None:
        self.swaps[old] = new
        names = type(old).__name__, type(new).__name__
        self.rows.append(Change(self.calls.names[old], *names, note))

    def _skip(self, module: nn.Module, note: str) -> None:
        kind = type(module).__name__
        self.rows.append(Change(self.calls.names[module], kind, kind, note))

    def _rewrite(self, owner: nn.Module) -> None:
        """Write an owner's forward with modules in place of functional calls."""
        children: dict[str, nn.Module] = {}
        whys: list[str] = []
        for graph in self.calls.graphs[owner]:
            free = {word: _free(owner, word) for word in ("shaped", "fused")}
            for node in [n for n in self.freeing.get(owner, ()) if n.graph is graph]:
                whys.append(f"{node.name} out of place, as what it changed is needed")
                write_out_of_place(node)
            for site in self.calls.by_graph.get(graph, ()):
                node = site.node
                if site.module is not None and (site.why or site.module in self.fusion.merged):
                    continue
                name = next(free["shaped" if site.why else "fused"])
                if name not in children:
                    new = self._activation() if site.why else place()
                    children[name] = new.train(owner.training)
                    whys += [f".{name} not fused: {site.why}"] if site.why else []
                with graph.inserting_before(node):
                    call = graph.call_module(name, (site.input,))
                node.replace_all_uses_with(call)
                graph.erase_node(node)
        sources = tuple(source(graph) for graph in self.calls.graphs[owner])
        base: Any = type(owner)
        cls = subclass(base, sources)
        self.rewrites[owner] = _Rewrite(cls, children)
        self.counts["rewritten"] += 1
        self.counts["shaped"] += sum(isinstance(m, ShapedActivation) for m in children.values())
        kinds = type(owner).__name__, cls.__name__
        note = "; ".join(["forward rewritten", *dict.fromkeys(whys)])
        self.rows.append(Change(self.calls.names[owner], *kinds, note))

    def _plan_chains(self) -> None:
        """Find the containers with layers in a row, and say why the other fused layers are not."""
        whys = {old: "" for old, new in self.swaps.items() if old in self.fusion.layers}
        for owner in self.calls.names:
            children = {
                name: self.swaps.get(child, child)
                for name, child in owner._modules.items()
                if child is not None
            }
            if type(owner) is not nn.Sequential:
                for child in owner._modules.values():
                    if child in whys:
                        why = f"it stands in {self.calls.describe(owner)}, no nn.Sequential"
                        whys[child] = whys[child] or why
                continue
            rows = [row for row in chain_rows(children) if len(row) > 1]
            chained = {name for row in rows for name in row}
            for name, child in owner._modules.items():
                if child in whys and name not in chained:
                    alone = "no layer of its kind next to it"
                    whys[child] = why_not_chained(children[name]) or alone
            if rows:
                self.chains.append(owner)
                self.counts["chained"] += len(chained)
                parts = (f"{row[0]} … {row[-1]} ({len(row)} layers)" for row in rows)
                note = "in a row: " + ", ".join(parts)
                path = self.calls.names[owner]
                self.rows.append(Change(path, "Sequential", "ShapedChain", note))
        notes = {self.calls.names[old]: why for old, why in whys.items() if why}
        for i, row in enumerate(self.rows):
            if row.path in notes:
                self.rows[i] = replace(row, note=f"not chained: {notes[row.path]}")

    def _plan_init(self) -> None:
        no_bias = 0
        others: Counter[str] = Counter()
        for module in self.calls.names:
            if kind_of(module) is None:
                continue
            no_bias += module.bias is None
            if self.init is None:
                continue
            if parametrize.is_parametrized(module) or module._parameters.get("weight") is None:
                self._skip(module, "not initialised: its weight is computed from other tensors")
                continue
            method, why = _suited(module, self.init)
            others[why] += 1
            self.layers.append((module, method))
        self._check_init()
        self.counts["initialised"] = len(self.layers)
        self.counts["skipped"] = sum(row.now == row.was for row in self.rows)
        self.notes += [
            f"{count} layer(s) {why.format(init=self.init)}" for why, count in others.items() if why
        ]
        if self.counts["stripped"]:
            self.notes.append(
                f"{self.counts['stripped']} BatchNorm layer(s) were stripped: their keys are "
                f"gone from the state_dict, and {no_bias} layer(s) have no bias (make them with "
                "bias=True to have one)"
            )

    def _check_init(self) -> None:
        """Raise where a layer could not be initialised, naming it."""
        for module, method in self.layers:
            where = f"convert: cannot initialise {self.calls.describe(module)}"
            try:
                check_init(module, method, self.constants.gain, self.constants.bias_std)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{where}: {error}") from None
            for name, parameter in module._parameters.items():
                why = "" if parameter is None else why_not_written(parameter)
                if why:
                    raise ValueError(
                        f"{where}: its {name} cannot be written, {why}; pass init=None, or give "
                        "it memory of its own"
                    )
        drawn = {p for module, _ in self.layers for p in module.parameters(recurse=False)}
        model = self.calls.model
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for (name, one), (other_name, other) in overlapping(tensors):
            if one in drawn or other in drawn:
                raise ValueError(
                    f"convert: cannot initialise {name!r} and {other_name!r}, which share memory "
                    "but are not one parameter; make them one nn.Parameter, or pass init=None"
                )

    def apply(self, log: UndoLog, generator: Generator | None) -> None:
        """Change the model, whose modules the log has saved already."""
        for module, _ in self.layers:
            for name, parameter in module.named_parameters(recurse=False):
                log.tensor(parameter, f"the {name} of {self.calls.describe(module)}")
                log.generator(generator or generator_of(parameter.device))
        for module, method in self.layers:
            gain, bias_std = self.constants.gain, self.constants.bias_std
            init_module_(module, method, gain, bias_std, generator)
        for parent in (*self.calls.names, *self.swaps.values()):
            for name, child in parent._modules.items():
                if child in self.swaps:
                    parent._modules[name] = self.swaps[child]
        for owner, rewrite in self.rewrites.items():
            for name, child in rewrite.children.items():
                owner.add_module(name, child)
            owner.__class__ = rewrite.cls
        for module in self.freed:
            module.inplace = False  # type: ignore[assignment]
        for container in self.chains:
            container.__class__ = ShapedChain
            container.max_length = None if self.chain is True else self.chain  # type: ignore[assignment]

    def report(self, dry_run: bool) -> Report:
        """Say what was planned."""
        return Report(
            recipe=self.constants.recipe,
            spec=self.constants.spec,
            depth=self.constants.depth,
            init=self.init,
            dry_run=dry_run,
            changes=tuple(self.rows),
            notes=tuple(self.notes),
            counts=dict(self.counts),
        )


def _free(owner: nn.Module, word: str) -> Iterator[str]:
    """Names for new children of a module."""
    names = (f"{word}_{i}" for i in range(10**6))
    return (name for name in names if not hasattr(owner, name))


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give a replacement the mode and the hooks of what it replaces."""
    new.training = old.training
    for name in (*HOOKS, *_HOOK_FLAGS):
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    return new


def _suited(module: Any, init: Method) -> tuple[Method, str]:
    """The initialiser that a layer takes, and why another than was asked for.

    delta_orthogonal keeps norms, suo the mean square q that the constants assume. Between layers of
    one width they are the same; where a layer has more outputs than inputs, or writes to some of
    its outputs only, suo is delta-orthogonal with the factor that q wants.
    """
    if init in ("suo", "delta_orthogonal") and _lacks_centre(module, init):
        return "suo_full", "with an even kernel took suo_full, not {init}"
    if init != "delta_orthogonal":
        return init, ""
    kind = kind_of(module)
    if kind is not None and kind.transposed and max(module.stride) > 1:
        sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        if any(k < s or (s > 1 and d > 1) for k, s, d in sizes):
            return init, (
                "are transposed, of a stride with which their kernel does not reach all outputs "
                "alike, so that q falls there; use a larger kernel, without dilation"
            )
        return "suo", (
            "that are transposed and strided took suo, which reaches all their outputs: with "
            "delta_orthogonal q would fall there"
        )
    if _widens(module):
        return "suo", (
            "with more outputs than inputs took suo, which is delta_orthogonal times "
            "√(outputs/inputs): it keeps q, which falls where norms are kept"
        )
    return init, ""


def _widens(module: nn.Module) -> bool:
    """Whether a group has more outputs than inputs."""
    inputs, outputs = features(module)
    return inputs < outputs


def _lacks_centre(module: Any, method: str) -> bool:
    kind = kind_of(module)
    if kind is None or not kind.dimensions:
        return False
    spread = kind.transposed and method == "suo"
    pairs = zip(module.kernel_size, module.stride, strict=True)
    return any(k % 2 == 0 and not (spread and s > 1) for k, s in pairs)
