"""How each layer of a converted model starts: the initialiser it takes, and the drawing itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Generator, fx, nn
from torch.nn.utils import parametrize

from fusedshape.convert.calls import Calls
from fusedshape.convert.constants import Constants
from fusedshape.convert.reading import Reading
from fusedshape.convert.report import Change, left_alone
from fusedshape.init import Method, check_init, init_module_
from fusedshape.kinds import FUNCTIONS, features, kind_of
from fusedshape.nodes import operation
from fusedshape.torch_ops import MATMULS, TURNS, base
from fusedshape.undo import (
    UndoLog,
    generator_of,
    overlapping,
    read_only_memory,
    why_not_written,
)


@dataclass(frozen=True)
class Start:
    """One layer, what messages call it, and the initialiser that it takes."""

    layer: nn.Module
    name: str
    method: Method


@dataclass(frozen=True)
class Starts:
    """How all layers start.

    Attributes:
        layers: those that are initialised.
        rows: those that are not, with the reason.
        notes: where other initialisers were taken than was asked for.
    """

    layers: tuple[Start, ...]
    rows: tuple[Change, ...]
    notes: tuple[str, ...]


def starts_for(reading: Reading) -> Starts:
    """Choose every layer's initialiser.

    Raises:
        ValueError: a layer that cannot be initialised; the message names it.
        TypeError: as above.
    """
    calls, init = reading.calls, reading.request.init
    layers: list[Start] = []
    rows: list[Change] = [] if init is None else list(_unknown_layers(calls))
    others: Counter[str] = Counter()
    for module in calls.names if init is not None else ():
        if kind_of(module) is None:
            continue
        if parametrize.is_parametrized(module) or module._parameters.get("weight") is None:
            note = "not initialised: its weight is computed from other tensors"
            rows.append(left_alone(calls.names[module], module, note))
            continue
        assert init is not None
        method, why = _suited(module, init)
        others[why] += 1
        layers.append(Start(module, calls.describe(module), method))
    read_only = read_only_memory()
    for start in layers:
        _check(start, reading.constants, read_only)
    _refuse_shared_memory(calls.model, [start.layer for start in layers])
    notes = (f"{n} layer(s) {why.format(init=init)}" for why, n in others.items() if why)
    return Starts(tuple(layers), tuple(rows), tuple(notes))


def _unknown_layers(calls: Calls) -> Iterator[Change]:
    """Rows of modules that multiply by a weight of their own and are no layers of a known kind."""
    for owner, graphs in calls.graphs.items():
        own = {
            (operation(node), str(arg.target)): None
            for graph in graphs
            for node in graph.nodes
            if operation(node) in FUNCTIONS.keys() | MATMULS
            for arg in _weights(node)
            if str(arg.target) in owner._parameters
        }
        if own and kind_of(owner) is None:
            calls_of = ", ".join(f"{function} of its {name}" for function, name in own)
            like = next((FUNCTIONS[f].plain.__name__ for f, _ in own if f in FUNCTIONS), "Linear")
            note = (
                f"not initialised: it computes {calls_of}; for a class that wraps one weight, "
                f"fusedshape.register_layer({type(owner).__name__}, nn.{like}) gives it a rule"
            )
            yield left_alone(calls.names[owner], owner, note)


def _weights(node: fx.Node) -> list[fx.Node]:
    """The parameters that a product takes, read as they are or transposed, as its weight."""
    args = [*node.args, *node.kwargs.values()]
    found = []
    for arg in args[:3]:
        while isinstance(arg, fx.Node) and base(operation(arg)) in TURNS:
            arg = arg.args[0]
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            found.append(arg)
    return found[:1]


def initialise(
    starts: Iterable[Start], constants: Constants, generator: Generator | None, log: UndoLog
) -> None:
    """Draw the layers' weights and biases, all of them saved before the first is drawn."""
    starts = tuple(starts)
    for start in starts:
        for name, parameter in start.layer.named_parameters(recurse=False):
            log.tensor(parameter, f"the {name} of {start.name}")
            log.generator(generator or generator_of(parameter.device))
    for start in starts:
        init_module_(start.layer, start.method, constants.gain, constants.bias_std, generator)


def _check(start: Start, constants: Constants, read_only: list[tuple[int, int]]) -> None:
    """Raise if a layer could not be initialised, naming it."""
    where = f"convert: cannot initialise {start.name}"
    try:
        check_init(start.layer, start.method, constants.gain, constants.bias_std)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None
    for name, parameter in start.layer._parameters.items():
        why = "" if parameter is None else why_not_written(parameter, read_only)
        if why:
            raise ValueError(
                f"{where}: its {name} cannot be written, {why}; pass init=None, or give it memory "
                "of its own"
            )


def _refuse_shared_memory(model: nn.Module, layers: list[nn.Module]) -> None:
    """Raise if what is drawn shares memory with another tensor of the model."""
    drawn = {p for layer in layers for p in layer.parameters(recurse=False)}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for (name, one), (other_name, other) in overlapping(tensors):
        if one in drawn or other in drawn:
            raise ValueError(
                f"convert: cannot initialise {name!r} and {other_name!r}, which share memory "
                "but are not one parameter; make them one nn.Parameter, or pass init=None"
            )


def _suited(module: Any, init: Method) -> tuple[Method, str]:
    """The initialiser that a layer takes, and why it is not the one that was asked for.

    delta_orthogonal keeps norms, suo the mean square q that the constants assume. Between layers of
    one width they are the same; where a layer has more outputs than inputs, or writes to some of
    its outputs only, suo is delta-orthogonal with the factor that q wants.
    """
    if init in ("suo", "delta_orthogonal") and _lacks_centre(module, init):
        return "suo_full", "with an even kernel took suo_full, not {init}"
    if init != "delta_orthogonal":
        return init, ""
    kind = kind_of(module)
    if kind is not None and max(kind.phases(module), default=1) > 1:
        if _reaches_unevenly(module):
            return init, (
                "are transposed, of a stride with which their kernel does not reach all outputs "
                "alike, so that q falls there; use a larger kernel, without dilation"
            )
        return "suo", (
            "that are transposed and strided took suo, which reaches all their outputs: with "
            "delta_orthogonal q would fall there"
        )
    inputs, outputs = features(module)  # of one group
    if inputs < outputs:
        return "suo", (
            "with more outputs than inputs took suo, which is delta_orthogonal times "
            "√(outputs/inputs): it keeps q, which falls where norms are kept"
        )
    return init, ""


def _reaches_unevenly(module: Any) -> bool:
    """Whether a transposed layer's kernel reaches some of its outputs less than others."""
    sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    return any(k < s or (s > 1 and d > 1) for k, s, d in sizes)


def _lacks_centre(module: Any, method: str) -> bool:
    """Whether a kernel has no centre tap, which the Delta form needs."""
    kind = kind_of(module)
    if kind is None or not kind.dimensions:
        return False
    pairs = zip(module.kernel_size, kind.phases(module), strict=True)
    return any(k % 2 == 0 and not (method == "suo" and s > 1) for k, s in pairs)
