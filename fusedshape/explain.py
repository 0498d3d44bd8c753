"""explain: which engine computes each fused layer in each direction, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fusedshape.columns import aligned
from fusedshape.diagnose.kept import kept
from fusedshape.ops.choice import first_able, only_aten, pinned_engine, rivals
from fusedshape.ops.engines import ENGINES
from fusedshape.ops.layer import Layer
from fusedshape.ops.problem import Direction, Problem, problem_of
from fusedshape.tuning import chooser
from fusedshape.tuning.cache import Record
from fusedshape.tuning.calls import Call, Inputs, check_ready, each_call
from fusedshape.tuning.text import places, shapes


@dataclass(frozen=True)
class Row:
    """One direction of one call of a fused layer.

    Attributes:
        layer: the module's name in the model.
        direction: "fprop", "dgrad", "dgrad_act" (a chain's dgrad, which goes on through the
            activation of the layer before) or "wgrad".
        problem: the layer and its input.
        engine: the name of the engine that computes it.
        reason: why that one does.
        others: why each of the other engines does not, by name.
    """

    layer: str
    direction: Direction
    problem: Problem
    engine: str
    reason: str
    others: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        problem = self.problem._asdict() | {"dtype": str(self.problem.dtype).split(".")[-1]}
        return {
            "layer": self.layer,
            "direction": self.direction,
            "problem": problem,
            "engine": self.engine,
            "reason": self.reason,
            "others": dict(self.others),
        }


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str` writes it as a table.

    Attributes:
        rows: one for each direction of each call of a fused layer, in the order of the calls.
    """

    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {"rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        """The table of engines, and below it why the others do not compute what."""
        lines = [("layer", "direction", "input", "weight", "engine", "because")]
        left: dict[str, list[str]] = {}
        for row in self.rows:
            name = row.layer or "."
            lines.append((name, row.direction, *shapes(row.problem), row.engine, row.reason))
            for other, reason in row.others.items():
                left.setdefault(f"not {other}: {reason}", []).append(f"{name} {row.direction}")
        return "\n".join([aligned(lines), "", *(f"{k} {places(v)}" for k, v in left.items())])


def explain(model: nn.Module, *inputs: Any, **named: Any) -> Explanation:
    r"""Tell which engine computes each fused layer in each direction, and why the others do not.

    The answer holds for a training step of this process, with its tuning mode and what has been
    measured so far; nothing is measured. torch.compile looks measurements up for small inputs too,
    and so may choose otherwise for those. The model runs once, on shapes without numbers where it
    can, and is afterwards what it was.

    Args:
        model: with ShapedConv1d/2d/3d or ShapedLinear in it, as `fusedshape.convert` makes them, on
            any device.
        inputs: what the model is called with; their layout counts.
        named: the same by name.

    Returns:
        A row for each direction of each call of a fused layer: "fprop", "dgrad" where the input
        wants a gradient ("dgrad_act" inside a chain), "wgrad" where the weight does.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: there is no fused layer in the model, none is called, a parameter is lazy, or a
            layer insists on an engine that cannot compute it.

    Example:
        >>> import torch
        >>> from fusedshape import ActSpec, ShapedLinear
        >>> model = nn.Sequential(ShapedLinear(8, 4, spec=ActSpec("tanh"), engine="aten"))
        >>> row, _ = explain(model, torch.zeros(2, 8)).rows
        >>> row.layer, row.direction, row.engine, row.reason
        ('0', 'fprop', 'aten', 'asked for')
        >>> sorted(row.others)
        ['cudnn', 'native', 'triton']
    """
    check_ready("explain", model)
    with kept(model):
        found = each_call(model, Inputs(inputs, named), _rows)
    return Explanation(tuple(row for rows in found for row in rows))


def _rows(call: Call) -> list[Row]:
    path, x, layer, asked, directions = call
    problem = problem_of(x, layer)
    reasons = {name: engine.why_not(x, layer) for name, engine in ENGINES.items()}
    if asked != "auto":
        found = dict.fromkeys(directions, _asked(path, asked, reasons))
    elif only_aten(asked, x):
        found = dict.fromkeys(directions, _not_chosen(x, layer, reasons))
    else:
        found = {direction: _chosen(direction, problem, reasons) for direction in directions}
    return [Row(path, direction, problem, *found[direction]) for direction in directions]


_Reasons = Mapping[str, str | None]
_Found = tuple[str, str, dict[str, str]]


def _others(engine: str, reasons: _Reasons, otherwise: Mapping[str, str]) -> dict[str, str]:
    """Why the other engines do not compute it: they cannot, or else for another reason."""
    return {n: why or otherwise[n] for n, why in reasons.items() if n != engine}


def _asked(path: str, asked: str, reasons: _Reasons) -> _Found:
    """The module names an engine, or a backend, which "aten" takes."""
    if reasons[asked] is not None:
        where = repr(path) if path else "the model"
        raise ValueError(
            f"explain: {where}: engine {asked!r} cannot run this layer: {reasons[asked]}"
        )
    why = dict.fromkeys(reasons, f"the layer asks for {asked}")
    return asked, "asked for", _others(asked, reasons, why)


def _not_chosen(x: Tensor, layer: Layer, reasons: _Reasons) -> _Found:
    """Known without looking at the problem."""
    device = x.device.type
    served = {engine.name for engine in rivals(device)}
    why = {
        name: f"the input's {x.numel()} numbers are too few to be worth a choice"
        if name in served and not ENGINES[name].considers(x)
        else _unconsidered(name, device, served)
        for name in reasons
    }
    able = any(reasons[name] is None for name in served)
    reason = "not worth a choice" if able else "the only one that can"
    return "aten", reason, _others("aten", reasons, why)


def _chosen(direction: Direction, problem: Problem, reasons: _Reasons) -> _Found:
    """Measured to be the fastest, or else pinned."""
    record = chooser.known(direction, problem)
    pinned = pinned_engine(problem)
    measured = None if record is None else record.engine
    engine = first_able((measured, pinned), reasons.get)
    served = {rival.name for rival in rivals(problem.device)}
    lost = f"not measured, {pinned} is the pinned choice"
    reason = "pinned, not measured"
    if record is not None and engine == record.engine:
        reason = lost = _times(record)
    elif all(reasons[name] is not None for name in served):
        reason = "the only one that can"
    why = {n: lost if n in served or n == "aten" else _unconsidered(n, problem.device, served)
           for n in reasons}  # fmt: skip
    return engine, reason, _others(engine, reasons, why)


def _times(record: Record) -> str:
    """What a measurement says."""
    base, own = (f"{1e6 * seconds:.1f} µs" for seconds in (record.base_seconds, record.seconds))
    if record.engine == "aten":
        return f"measured, {base}: nothing is faster"
    return f"measured, {own} against {base} of aten"


def _unconsidered(name: str, device: str, served: set[str]) -> str:
    if name in served:
        return "not measured, and never taken unmeasured"
    return f"auto does not consider it on {device}"
