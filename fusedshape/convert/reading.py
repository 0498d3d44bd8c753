"""Everything that is known of a model before a plan is made: `Reading`; nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fusedshape.convert.calls import Calls, read_calls
from fusedshape.convert.constants import Constants, constants_for
from fusedshape.convert.fusion import Fusing, Fusion, read_fusion
from fusedshape.convert.refusals import refuse_calls
from fusedshape.convert.request import Request
from fusedshape.faithful import inputs_for, unfaithful
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
    refuse_calls(calls, strict=request.on_untraceable == "error")
    notes = _compared(calls, request)
    fusion = read_fusion(calls, Fusing(calls, request.fuse))
    wired = trace_wiring(model)
    return Reading(request, calls, fusion, wired, constants_for(request, wired), notes)


def _compared(calls: Calls, request: Request) -> tuple[str, ...]:
    """Raise where a traced forward is not the model's own; a note if no input was found."""
    args = inputs_for(calls.model, request.example)
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
