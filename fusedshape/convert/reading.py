"""Everything that is known of a model before a plan is made: `Reading`; nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fusedshape.convert.calls import Calls, read_calls
from fusedshape.convert.constants import Constants, constants_for
from fusedshape.convert.fusion import Fusing, Fusion, read_fusion
from fusedshape.convert.gates import left_out, plain_only
from fusedshape.convert.refusals import refuse_calls
from fusedshape.convert.request import Request
from fusedshape.faithful import inputs_for, runs, unfaithful
from fusedshape.theory import Wiring, trace_wiring


@dataclass(frozen=True)
class Reading:
    """What was read of a model, and what is to go into it.

    Attributes:
        request: what was asked for.
        calls: which module calls what.
        fusion: which activation joins which layer.
        wired: the network as the theory sees it.
        constants: what the recipe comes to in that network.
        notes: what the user should know of the reading.
    """

    request: Request
    calls: Calls
    fusion: Fusion
    wired: Wiring
    constants: Constants
    notes: tuple[str, ...]


def read(model: nn.Module, request: Request) -> Reading:
    """Read a model, and solve the recipe for it.

    Raises:
        ValueError: a model that cannot be converted, or a recipe that cannot be met in it.
    """
    calls = read_calls(model, request.classes, request.filter_fn)
    calls = plain_only(calls) if request.replaces_all else calls
    refuse_calls(calls, strict=request.on_untraceable == "error")
    args = inputs_for(model, request.example)
    notes = (*_compared(calls, args), *_other_activations(calls))
    fusion = read_fusion(calls, Fusing(calls, request.fuse))
    wired = trace_wiring(model, args if args is not None and runs(model, args) else None)
    return Reading(request, calls, fusion, wired, constants_for(request, wired), notes)


def _compared(calls: Calls, args: tuple[Any, ...] | None) -> tuple[str, ...]:
    """Raise where a traced forward is not the model's own; a note if no input was found."""
    if args is None:
        return (
            "no input was found on which to compare the traced forwards with the model's own; "
            "pass example=",
        )
    found = unfaithful(calls.model, calls.graphs, args)
    if found is not None:
        module, difference = found
        raise ValueError(
            f"convert: {calls.describe(module)} cannot be followed: traced, its forward gives "
            f"{difference}. It takes a decision that a trace does not see, for instance by the "
            "type of a value in a helper; make that a decision of the constructor"
        )
    return ()


def _other_activations(calls: Calls) -> tuple[str, ...]:
    """A note on the plain activations that stay, and on those that are replaced with parameters."""
    notes = []
    left = left_out(calls)
    if left:
        number = sum(map(len, left.values()))
        kinds = "; ".join(f"{len(p)} {kind} ({_few(p)})" for kind, p in left.items())
        most = ", which is most of them" if number > len(calls.sites) else ""
        notes.append(
            f"plain activations of other kinds stay as they are{most}: {kinds}; pass replace='all' "
            "to replace them too"
        )
    lost = [
        f"{calls.names[act]}.{name}" for act in calls.acts for name, _ in act.named_parameters()
    ]
    if lost:
        notes.append(f"keys that are gone with their activations: {', '.join(map(repr, lost))}")
    return tuple(notes)


def _few(paths: list[str]) -> str:
    """Some names, the first few."""
    shown = ", ".join(repr(path) for path in paths[:3])
    return shown + (", …" if len(paths) > 3 else "")
