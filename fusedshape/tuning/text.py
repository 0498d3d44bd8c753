"""Tables of layers as text: aligned columns, shapes, and where something holds."""

from __future__ import annotations

from collections.abc import Sequence

from fusedshape.ops.problem import Problem

_SHOWN = 3


def aligned(lines: Sequence[Sequence[str]], right: int = 0) -> str:
    """Lines of cells as a table, the last `right` columns aligned to the right.

    Example:
        >>> print(aligned([("layer", "time"), ("0", "12.5")], right=1))
        layer  time
        0      12.5
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = len(widths) - right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


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
