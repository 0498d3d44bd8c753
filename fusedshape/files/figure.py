"""Figures of matplotlib, written in one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedshape.files.disk import replacing


def save_figure(figure: Any, path: str | Path, **options: Any) -> None:
    """Write a figure in the format of the path's suffix.

    Args:
        figure: a matplotlib Figure.
        path: the file; without a suffix it becomes a PNG.
        **options: of `Figure.savefig`.

    Raises:
        OSError: the file cannot be written; names `path`.
        ValueError: a suffix that matplotlib does not know.
    """
    path = Path(path)
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], **options)
