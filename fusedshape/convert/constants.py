"""The constants that go into a model: a recipe, solved for the wiring that was read off it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fusedshape import theory
from fusedshape.convert.request import Request
from fusedshape.spec import ActSpec
from fusedshape.theory import DKS, EOC, TAT, Recipe, Wiring

_GROWTH = 1.05  # growth of q in one sum above which the report warns


@dataclass(frozen=True)
class Constants:
    """What goes into a model.

    Attributes:
        recipe: what was asked for; an ActSpec where the constants were given.
        spec: the constants of its activations.
        gain: the factor of its weights.
        bias_std: the standard deviation of its biases.
        depth: nonlinear layers on the longest path, as given or counted; None if neither is known.
        notes: what the user should know of how the constants fit the model.
    """

    recipe: Recipe | ActSpec
    spec: ActSpec
    gain: float = 1.0
    bias_std: float = 0.0
    depth: int | None = None
    notes: tuple[str, ...] = ()


def constants_for(request: Request, wired: Wiring) -> Constants:
    """Solve the recipe for the wiring read off the model, or for the one that was given.

    Raises:
        ValueError: a wiring that cannot be read, or a recipe that cannot be met in it.
    """
    unread = any(wired.nodes[i].op == "unknown" for i in wired.live)
    counted = None if unread else wired.depth
    if counted == 0:
        raise ValueError(
            "convert: no activation lies between the model's inputs and its outputs, those that it "
            "has are never called"
        )
    depth = counted if request.depth is None else request.depth
    recipe, gain, bias_std = request.recipe, 1.0, 0.0
    notes: tuple[str, ...] = ()
    if isinstance(recipe, ActSpec):
        spec = recipe
    elif isinstance(recipe, EOC):
        edge = theory.eoc(recipe)
        spec, gain, bias_std = edge.spec, edge.sigma_w, edge.sigma_b
    else:
        assert isinstance(recipe, (TAT, DKS))
        if request.given_wiring:
            spec, notes = _solved(recipe, depth=request.depth, subnet_max=request.subnet_max)
            if request.depth is not None and counted not in (None, request.depth):
                notes += (
                    f"depth={request.depth} was given; the model's longest path has {counted}",
                )
        else:
            _refuse_problems(wired)
            spec, notes = _solved(recipe, subnet_max=wired)
            notes += wired.notes
    notes += (*_unread(wired), *_drifts(wired), *_grows(wired, spec))
    return Constants(recipe, spec, gain, bias_std, depth, notes)


def _solved(recipe: TAT | DKS, **network: Any) -> tuple[ActSpec, tuple[str, ...]]:
    """The constants, with the nearest target where the method's own default cannot be met."""
    try:
        return theory.solve(recipe, **network), ()
    except theory.Unreachable:
        if recipe.clamp or not recipe.is_default:
            raise
    spec = theory.solve(replace(recipe, clamp=True), **network)
    return spec, (f"the default target is out of reach, so the nearest was taken: {spec.origin}",)


def _refuse_problems(wired: Wiring) -> None:
    """Raise if the wiring that the constants are to be solved for could not be read."""
    if not wired.problems:
        return
    problem = wired.problems[0]
    learnt = [n for n in wired.notes if " learnt weight" in n and " is a sum " in problem]
    hint = f". {learnt[0]}: it counts as a weight, so set it to 1 first" if learnt else ""
    raise ValueError(f"convert: cannot read the model's wiring: {problem}{hint}")


def _unread(wired: Wiring) -> tuple[str, ...]:
    """Notes on the places that were not read, where the constants do not come from the reading."""
    return tuple(
        "the constants do not know of this, and what they assume need not hold: "
        + problem.partition("; pass depth=")[0]
        for problem in wired.problems
    )


def _drifts(wired: Wiring) -> tuple[str, ...]:
    """A note on activations that take another activation's output, in which q drifts."""
    if not wired.unmixed:
        return ()
    first, *more = wired.unmixed
    where = f"{first!r} takes" if not more else f"{first!r} and {len(more)} more take"
    return (
        f"{where} another activation's output with no linear or convolution layer between, so q "
        "drifts from 1 there; put one between, in residual nets by activating before the branch",
    )


def _grows(wired: Wiring, spec: ActSpec) -> tuple[str, ...]:
    """A note on sums that add activations' outputs, whose means add up."""
    carries: dict[int, bool] = {}
    grown: list[tuple[str, float]] = []
    mean = theory.c_map(spec, 0.0)
    for i in wired.live:
        node = wired.nodes[i]
        carries[i] = node.op == "nonlinear" or (
            node.op not in ("affine", "norm") and any(carries.get(j, False) for j in node.inputs)
        )
        if node.op == "sum":
            w = [w for j, w in zip(node.inputs, node.weights, strict=True) if carries.get(j, False)]
            growth = 1 + mean * (sum(w) ** 2 - math.fsum(v * v for v in w))
            grown += [(node.path, growth)] * (growth > _GROWTH)
    if not grown:
        return ()
    (path, factor), *rest = grown
    more = f" and {len(rest)} more" if rest else ""
    return (
        f"the sum {path!r}{more} adds activations' outputs, whose means ({mean:.3g} of their q) do "
        f"not average out, so that q grows there, {factor:.3g} times or more; end every branch in "
        "a linear or convolution layer, or take DKS, whose means are 0",
    )
