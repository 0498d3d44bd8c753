"""Takes normalisation out of a model: `strip`, the first stage of convert.

What a norm's output was is then the output of what stands before the norm, so whatever wrote on
that output in place works out of place afterwards, unless nobody could see the difference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedshape.convert.attention import attention_in
from fusedshape.convert.calls import Calls, read_calls
from fusedshape.convert.in_place import writers
from fusedshape.convert.norms import (
    FUNCTIONS,
    Norm,
    is_location_function,
    is_norm_class,
    is_norm_function,
    layers_before,
    norms_in,
)
from fusedshape.convert.replacing import like, swap
from fusedshape.convert.report import Change, Done
from fusedshape.convert.request import Request
from fusedshape.convert.values import Value, Values
from fusedshape.convert.weights import detach_norms, plain_layer, standardised
from fusedshape.faithful import inputs_for, unfaithful
from fusedshape.kinds import features, kind_of
from fusedshape.nodes import is_query, operation
from fusedshape.rewriting import source, subclass
from fusedshape.torch_ops import (
    ARITHMETIC,
    CONCATS,
    COPIES,
    DROPOUTS,
    SAME,
    VIEWS,
    base,
    writes,
)
from fusedshape.tracing import write_out_of_place
from fusedshape.undo import UndoLog

# A bias before these is one behind them.
_PASSING = SAME | VIEWS | DROPOUTS | CONCATS
# What norms of weights are computed with.
_PURE = SAME | VIEWS | COPIES | ARITHMETIC | FUNCTIONS
_PURE |= {"mean", "std", "var", "var_mean", "std_mean", "norm", "sqrt", "rsqrt", "pow"}


def strip(model: nn.Module, request: Request, log: UndoLog) -> Done:
    """Take out the norms that a request names, and give biases to layers that lose theirs.

    Args:
        model: the model, whose modules the log has saved already.
        request: what was asked for.
        log: where whatever else is changed is saved.

    Raises:
        ValueError: a norm that cannot be taken out; the message names it.
    """
    if not request.strips:
        return Done()
    detached = tuple(detach_norms(model, log)) if request.normalisation is not None else ()
    norms = _norms(model, request)
    calls = read_calls(model, stripped={module: norm.row for module, norm in norms.items()})
    attends = attention_in(calls) if request.normalisation is not None else None
    kept: list[nn.Module] = []
    if attends is not None:
        kept = [module for module, norm in norms.items() if norm.location]
        norms = {module: norm for module, norm in norms.items() if not norm.location}
        calls = read_calls(model, stripped={module: norm.row for module, norm in norms.items()})
    done = _Stripping(model, request, norms, calls, attends is not None).done()
    counts = {"stripped": done.counts["stripped"] + len(detached)}
    done = replace(done, rows=(*detached, *done.rows), counts=counts)
    if not kept:
        return done
    assert attends is not None
    kinds = " / ".join(sorted({type(norm).__name__ for norm in kept}))
    note = (
        f"{len(kept)} {kinds} layer(s) stay: {calls.describe(attends)} is attention, whose logits "
        "need inputs of a known size, and the constants know of norms of single locations; replace "
        "them by nn.Identity() first to be without"
    )
    return replace(done, notes=(*done.notes, note))


def _norms(model: nn.Module, request: Request) -> dict[nn.Module, Norm]:
    """The norms to take out, by module."""
    found: dict[nn.Module, Norm] = {}
    for path, module, norm in norms_in(model):
        if request.normalisation is None and not isinstance(module, _BatchNorm):
            continue
        # The model itself stays, even if all that it does is to normalise and activate.
        if norm is not None and (module is not model or is_norm_class(module)):
            found[module] = norm
        elif is_norm_class(module):
            raise ValueError(
                f"convert: {path!r} is a {type(module).__name__}, a {_word(module)} whose own "
                "forward does more than call children on what it has normalised; replace it by "
                "what it does besides normalising"
            )
    return found


@dataclass(frozen=True)
class _Stripping:
    """What is taken out of a model, and what changes with it.

    Attributes:
        model: the model.
        request: what was asked for.
        norms: the modules that normalise.
        calls: the model's calls, as they will be without those.
        attends: whether it computes attention, so that norms of single locations stay.
    """

    model: nn.Module
    request: Request
    norms: Mapping[nn.Module, Norm]
    calls: Calls
    attends: bool

    def done(self) -> Done:
        """Take the norms out, and say what was done."""
        if self.model in self.norms:
            raise ValueError(
                f"convert: the model is itself a {type(self.model).__name__} and cannot be taken "
                "out of itself; convert a model that holds it"
            )
        every = self.request.normalisation is not None
        functions = self._functions() if every else {}
        products = self._standardised() if every else {}
        touched = {*functions.values(), *(owner for owner, *_ in products.values())}
        changed = [owner for owner in self.calls.names if owner in touched]
        self._compare(changed)
        biased = self._biased(functions) if self.request.adds_biases else []
        rewritten, freed = self._out_of_place(functions)
        for node, owner in functions.items():
            rewritten.setdefault(owner, []).append(f"F.{operation(node)} stripped")
            _take_out(node)
        for node, (owner, weight, parameter) in products.items():
            node.replace_input_with(weight, parameter)
            rewritten.setdefault(owner, []).append("weight standardisation stripped")
        swaps = {norm: _rest(norm, found.row) for norm, found in self.norms.items()}
        rows = [self._row(norm, new) for norm, new in swaps.items()]
        gone = [key for owner in changed for key in self._drop_unused(owner)]
        for owner, whys in rewritten.items():
            new = plain_layer(owner, self.calls.graphs[owner]) if owner in changed else None
            note = "; ".join(dict.fromkeys(whys))
            if new is not None:
                swaps[owner] = like(owner, new)
                kinds = type(owner).__name__, type(new).__name__
                rows.append(Change(self.calls.names[owner], *kinds, note))
            else:
                rows.append(self._rewritten(owner, note))
        self.calls.check_held("convert", swaps)
        swap(self.calls.names, swaps)
        for layer in biased:
            _add_bias(swaps.get(layer, layer))
        count = len(self.norms) + len(functions) + len(products)
        for module in freed:
            module.inplace = False  # type: ignore[assignment]
        rows += [self._freed(module) for module in self.calls.names if module in freed]
        return Done(tuple(rows), self._notes(biased, gone), {"stripped": count})

    def _functions(self) -> dict[fx.Node, nn.Module]:
        """The norms that forwards call as functions, with the module in whose forward each is."""
        values = Values(self.calls, frozenset())
        return {
            node: owner
            for owner, node in self.calls.nodes()
            if is_norm_function(node)
            and not (self.attends and is_location_function(node))
            and values.depending(node)
        }

    def _standardised(self) -> dict[fx.Node, tuple[nn.Module, fx.Node, fx.Node]]:
        """The products with a normalised weight: the owner, that weight, and the parameter."""
        return {
            node: (owner, *weights)
            for owner, graphs in self.calls.graphs.items()
            for graph in graphs
            for node, weights in standardised(owner, graph).items()
        }

    def _compare(self, owners: Collection[nn.Module]) -> None:
        """Raise where a forward that is to be written anew is not what was traced."""
        graphs = {owner: self.calls.graphs[owner] for owner in owners}
        args = inputs_for(self.model, self.request.example) if graphs else None
        found = None if args is None else unfaithful(self.model, graphs, args)
        if found is not None:
            module, difference = found
            raise ValueError(
                f"convert: the norm in {self.calls.describe(module)} cannot be taken out: traced, "
                f"its forward gives {difference}; take it out by hand"
            )

    def _drop_unused(self, owner: nn.Module) -> list[str]:
        """Drop what only norms read of a module, parameters and buffers; their keys."""
        graphs = self.calls.graphs[owner]
        before = {str(n.target) for g in graphs for n in g.find_nodes(op="get_attr")}
        for graph in graphs:
            for node in reversed(list(graph.nodes)):
                if not node.users and _only_reads(node):
                    graph.erase_node(node)
        after = {str(n.target) for g in graphs for n in g.find_nodes(op="get_attr")}
        gone = []
        for name in sorted(before - after):
            own = name in owner._parameters or name in owner._buffers
            if own and owner not in self.calls.unknown:
                owner._parameters.pop(name, None)
                owner._buffers.pop(name, None)
                gone.append(f"{self.calls.names[owner]}.{name}".removeprefix("."))
        return gone

    def _row(self, norm: nn.Module, new: nn.Module) -> Change:
        kinds = type(norm).__name__, type(new).__name__
        return Change(self.calls.names[norm], *kinds, f"{_word(norm)} stripped")

    def _out_of_place(
        self, functions: Mapping[fx.Node, nn.Module]
    ) -> tuple[dict[nn.Module, list[str]], set[nn.Module]]:
        """What must not write on the norms' outputs: functions, by owner, and modules.

        The functions are written anew at once.
        """
        whys: dict[nn.Module, list[str]] = {}
        freed = {module for module in self.calls.unknown if getattr(module, "inplace", False)}
        freed = freed if any(norm in self.calls.unknown for norm in self.norms) else set()
        for node, owner in writers(self.calls, self._outputs(functions)).items():
            called = self.calls.called(owner, node)
            if called is None:
                write_out_of_place(node)
                whys.setdefault(owner, []).append(f"{node.name} out of place")
            else:
                freed.add(called)
        return whys, freed

    def _freed(self, module: nn.Module) -> Change:
        kind, why = type(module).__name__, "inplace=False, as it would change a norm's input"
        return Change(self.calls.names[module], kind, f"{kind} out of place", why)

    def _rewritten(self, owner: nn.Module, note: str) -> Change:
        was = type(owner)
        sources = tuple(source(graph) for graph in self.calls.graphs[owner])
        owner.__class__ = subclass(was, sources, "Stripped")
        name = type(owner).__name__
        return Change(self.calls.names[owner], was.__name__, name, f"forward rewritten; {note}")

    def _outputs(self, functions: Mapping[fx.Node, nn.Module]) -> list[Value]:
        """What the norms return, but where the norm's input belongs to one layer alone."""
        own = [(owner, node) for node, owner in functions.items()]
        found = [value for value in own if not self._is_of_a_layer(*value)]
        for norm in self.norms:
            own = self.calls.calls.get(norm, [])
            if not all(self._is_of_a_layer(*call) for call in own):
                found += self.calls.placeholders(norm) if norm in self.calls.graphs else own
        return found

    def _is_of_a_layer(self, owner: nn.Module, node: fx.Node) -> bool:
        """Whether a call takes a layer's output that nobody else takes."""
        before = node.all_input_nodes[0]
        return self._is_layer((owner, before)) and len(before.users) == 1

    def _biased(self, functions: Mapping[fx.Node, nn.Module]) -> list[nn.Module]:
        """The layers without a bias whose outputs, perhaps cut or joined, are normalised."""
        own = [call for norm in self.norms for call in self.calls.calls.get(norm, [])]
        own += [(owner, node) for node, owner in functions.items()]
        starts = [(owner, node.all_input_nodes[0]) for owner, node in own]
        values = Values(self.calls, _PASSING).before(starts, self._is_layer)
        layers = {self.calls.called(*value) for value in values if self._is_layer(value)}
        unseen = [m for m in self.norms if m in self.calls.unknown or m not in self.calls.calls]
        layers |= layers_before(self.model, unseen, self.request.example)
        return [m for m in self.calls.names if m in layers and m._parameters.get("bias", m) is None]

    def _is_layer(self, value: Value) -> bool:
        return kind_of(self.calls.called(*value)) is not None

    def _notes(self, biased: Sequence[nn.Module], gone: Sequence[str]) -> tuple[str, ...]:
        """What is lost with the norms, and what comes with the biases."""
        keys = ", ".join(map(repr, gone))
        more = (f"keys that are gone with norms inside forwards: {keys}",) if gone else ()
        return (*self._notes_on_norms(biased), *more)

    def _notes_on_norms(self, biased: Sequence[nn.Module]) -> tuple[str, ...]:
        if not self.norms:
            return ()
        none = sum(
            kind_of(module) is not None and module._parameters.get("bias", module) is None
            for module in self.calls.names
        )
        kinds = " / ".join(sorted({_word(norm) for norm in self.norms}))
        lost = (
            f"{len(self.norms)} {kinds} layer(s) were stripped: their keys are gone from the "
            "state_dict"
        )
        without = f", and {none} layer(s) have no bias (make them with bias=True to have one)"
        if not biased:
            return (lost + (without if none else ""),)
        keys = ", ".join(repr(f"{self.calls.names[layer]}.bias") for layer in biased)
        return (
            lost,
            f"{len(biased)} layer(s) that lost their norm have a bias now, new keys: {keys}",
        )


def _take_out(node: fx.Node) -> None:
    """Let a norm's input take its place in a graph."""
    before = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(before, fx.Node)
    node.replace_all_uses_with(before)
    node.graph.erase_node(node)


def _only_reads(node: fx.Node) -> bool:
    """Whether a node computes without side effects what nobody uses."""
    if node.op == "get_attr":
        return True
    name = operation(node)
    return bool(name) and not writes(name) and (base(name) in _PURE or is_query(node))


def _word(norm: nn.Module) -> str:
    """What messages call a norm."""
    return "BatchNorm" if isinstance(norm, _BatchNorm) else type(norm).__name__


def _rest(norm: nn.Module, row: tuple[str, ...]) -> nn.Module:
    """What remains of a norm's module once it normalises no more."""
    children = {name: norm.get_submodule(name) for name in row}
    return like(norm, nn.Sequential(OrderedDict(children)) if children else nn.Identity())


def _add_bias(layer: nn.Module) -> None:
    """Give a layer a bias of zeros, where its weight is, and trained if that is."""
    weight: Any = layer.weight
    zeros = torch.zeros(features(layer)[1], dtype=weight.dtype, device=weight.device)
    layer.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))
