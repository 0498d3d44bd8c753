"""What tables of layers say: shapes, and where something holds."""

from __future__ import annotations

from collections.abc import Sequence

from fusedshape.ops.problem import Problem

_SHOWN = 3


def shapes(problem: Problem) -> tuple[str, str]:
    """The input of a problem with its dtype and layout, and the weight with its stride."""
    layout = " channels_last" if problem.channels_last and len(problem.weight) > 2 else ""
    dtype = str(problem.dtype).removeprefix("torch.")
    weight = "×".join(map(str, problem.weight))
    if any(s != 1 for s in problem.stride):
        weight += "/" + "×".join(map(str, problem.stride))
    return f"{'×'.join(map(str, problem.input))} {dtype}{layout}", weight


def places(cases: Sequence[str]) -> str:
    """The first few of the cases where something holds, and how many more there are.

    Example:
        >>> places(["0 fprop", "0 wgrad", "1 fprop", "1 dgrad", "1 wgrad"])
        '[0 fprop, 0 wgrad, 1 fprop and 2 more]'
    """
    more = f" and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else ""
    return f"[{', '.join(cases[:_SHOWN])}{more}]"
