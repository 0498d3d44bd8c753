"""Checks a converted model against the theory its constants assume: `health_of`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fusedshape.convert.request import Request
from fusedshape.diagnose import Diagnosis, diagnose


def health_of(model: nn.Module, request: Request) -> tuple[Diagnosis | None, tuple[str, ...]]:
    """What `fusedshape.diagnose` says of a model on the example that was given.

    Args:
        model: the converted model; it is left as it is.
        request: what was asked of convert.

    Returns:
        The diagnosis, None where there is none; and why there is none, for the report's notes.
    """
    if request.example is None or not request.check or request.dry_run:
        return None, ()
    try:
        return diagnose(model, [_batch(model, request.example)]), ()
    except Exception as error:  # of the model's own forward, too
        said = str(error).removeprefix("diagnose: ")
        return None, (f"the model's health was not checked: {type(error).__name__}: {said}",)


def _batch(model: nn.Module, example: Any) -> Any:
    """An example as `diagnose` takes a batch: several inputs become keyword arguments."""
    if not isinstance(example, tuple) or len(example) == 1:
        return example
    return dict(inspect.signature(model.forward).bind(*example).arguments)
