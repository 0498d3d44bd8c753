"""Tables of text: cells in aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], left: int | None = None) -> str:
    """Lines of cells as a table, two spaces between columns.

    Args:
        lines: the cells; the first line is the head.
        left: how many columns are aligned to the left, those after them to the right; None for all.

    Example:
        >>> print(aligned([("layer", "time"), ("0", "12.5")], left=1))
        layer  time
        0      12.5
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = len(widths) if left is None else left
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
