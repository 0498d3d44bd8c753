"""Takes normalisation out of a model: `strip`, the first stage of convert.

What a norm's output was is then the output of what stands before the norm, so whatever wrote on
that output in place works out of place afterwards, unless nobody could see the difference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedshape.convert.attention import attention_in
from fusedshape.convert.calls import Calls, read_calls
from fusedshape.convert.in_place import writers
from fusedshape.convert.norms import Norm, is_norm_class, norm_of
from fusedshape.convert.replacing import like, swap
from fusedshape.convert.report import Change, Done
from fusedshape.convert.request import Request
from fusedshape.convert.values import Value, Values
from fusedshape.kinds import features, kind_of
from fusedshape.rewriting import source, subclass
from fusedshape.torch_ops import (
    CONCATS,
    DROPOUTS,
    SAME,
    VIEWS,
)
from fusedshape.tracing import write_out_of_place
from fusedshape.undo import UndoLog

# A bias before these is one behind them.
_PASSING = SAME | VIEWS | DROPOUTS | CONCATS


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
    norms = _norms(model, request)
    calls = read_calls(model, stripped={module: norm.row for module, norm in norms.items()})
    attends = attention_in(calls) if request.normalisation is not None else None
    kept: list[nn.Module] = []
    if attends is not None:
        kept = [module for module, norm in norms.items() if norm.location]
        norms = {module: norm for module, norm in norms.items() if not norm.location}
        calls = read_calls(model, stripped={module: norm.row for module, norm in norms.items()})
    done = _Stripping(model, request, norms, calls).done(log)
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
    for path, module in model.named_modules():
        if request.normalisation is None and not isinstance(module, _BatchNorm):
            continue
        norm = norm_of(module)
        if norm is not None:
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
    """

    model: nn.Module
    request: Request
    norms: Mapping[nn.Module, Norm]
    calls: Calls

    def done(self, log: UndoLog) -> Done:
        """Take the norms out, and say what was done."""
        swaps = {norm: _rest(norm, found.row) for norm, found in self.norms.items()}
        self.calls.check_held("convert", swaps)
        biased = self._biased() if self.request.adds_biases else []
        rows = [self._row(norm, new) for norm, new in swaps.items()]
        rows += self._work_out_of_place()
        swap(self.calls.names, swaps)
        for layer in biased:
            _add_bias(layer)
        return Done(tuple(rows), self._notes(biased), {"stripped": len(swaps)})

    def _row(self, norm: nn.Module, new: nn.Module) -> Change:
        kinds = type(norm).__name__, type(new).__name__
        return Change(self.calls.names[norm], *kinds, f"{_word(norm)} stripped")

    def _work_out_of_place(self) -> Iterator[Change]:
        """Free the norms' inputs of what wrote on their outputs; the rows of the report."""
        freeing: dict[nn.Module, list[fx.Node]] = {}
        freed = {module for module in self.calls.unknown if getattr(module, "inplace", False)}
        freed = freed if any(norm in self.calls.unknown for norm in self.norms) else set()
        for node, owner in writers(self.calls, self._outputs()).items():
            called = self.calls.called(owner, node)
            if called is None:
                freeing.setdefault(owner, []).append(node)
            else:
                freed.add(called)
        for module in freed:
            module.inplace = False  # type: ignore[assignment]
            kind, why = type(module).__name__, "inplace=False, as it would change a norm's input"
            yield Change(self.calls.names[module], kind, f"{kind} out of place", why)
        for owner, nodes in freeing.items():
            for node in nodes:
                write_out_of_place(node)
            yield self._rewritten(owner, f"{', '.join(n.name for n in nodes)} out of place")

    def _rewritten(self, owner: nn.Module, note: str) -> Change:
        was = type(owner)
        sources = tuple(source(graph) for graph in self.calls.graphs[owner])
        owner.__class__ = subclass(was, sources, "Stripped")
        name = type(owner).__name__
        return Change(self.calls.names[owner], was.__name__, name, f"forward rewritten; {note}")

    def _outputs(self) -> list[Value]:
        """What the norms return, but where the norm's input belongs to one layer alone."""
        found: list[Value] = []
        for norm in self.norms:
            own = self.calls.calls.get(norm, [])
            if not all(self._is_of_a_layer(*call) for call in own):
                found += self.calls.placeholders(norm) if norm in self.calls.graphs else own
        return found

    def _is_of_a_layer(self, owner: nn.Module, node: fx.Node) -> bool:
        """Whether a call takes a layer's output that nobody else takes."""
        before = node.all_input_nodes[0]
        return self._is_layer((owner, before)) and len(before.users) == 1

    def _biased(self) -> list[nn.Module]:
        """The layers without a bias whose outputs, perhaps cut or joined, are normalised."""
        own = (call for norm in self.norms for call in self.calls.calls.get(norm, []))
        starts = [(owner, node.all_input_nodes[0]) for owner, node in own]
        values = Values(self.calls, _PASSING).before(starts, self._is_layer)
        layers = {self.calls.called(*value) for value in values if self._is_layer(value)}
        return [m for m in self.calls.names if m in layers and m._parameters.get("bias", m) is None]

    def _is_layer(self, value: Value) -> bool:
        return kind_of(self.calls.called(*value)) is not None

    def _notes(self, biased: Sequence[nn.Module]) -> tuple[str, ...]:
        """What is lost with the norms, and what comes with the biases."""
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
