"""Shapes of data: what a file should contain, and the place where it differs."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from fusedshape.files.disk import ContentError


def expect(value: Any, shape: Any, where: str) -> None:
    """Compare `value` with a shape.

    A shape is a type (`float` accepts whole numbers, but neither NaN nor infinity), None, a tuple
    of alternatives (shapes or strings), a dict of fields ("key?" may be missing; the key ... stands
    for all keys that are not named), or a list ([shape, ...] for any length).

    Args:
        value: data of JSON or of a checkpoint.
        shape: the shape that it should have.
        where: name of the value in messages.

    Raises:
        ContentError: it has another shape; the message names the place in `value`.

    Example:
        >>> expect({"epochs": [{"loss": 0.5}]}, {"epochs": [{"loss": float}, ...]}, "result")
        >>> expect({"epochs": [{"loss": "0.5"}]}, {"epochs": [{"loss": float}, ...]}, "result")
        Traceback (most recent call last):
        fusedshape.files.disk.ContentError: result.epochs[0].loss is '0.5', expected float
    """
    if isinstance(shape, tuple):
        for alternative in shape:
            try:
                return expect(value, alternative, where)
            except ContentError:
                continue
        raise ContentError(f"{where} is {quoted(value)}, which is none of {quoted(shape)}")
    if isinstance(shape, dict):
        expect(value, dict, where)
        return _expect_fields(value, shape, where)
    if isinstance(shape, list):
        expect(value, list, where)
        shapes = [shape[0]] * len(value) if shape[-1] is ... else shape
        if len(shapes) != len(value):
            raise ContentError(f"{where} has {len(value)} entries, expected {len(shapes)}")
        for i, (entry, expected) in enumerate(zip(value, shapes, strict=True)):
            expect(entry, expected, f"{where}[{i}]")
        return None
    if not _fits(value, shape):
        name = shape.__name__ if isinstance(shape, type) else repr(shape)
        raise ContentError(f"{where} is {quoted(value)}, expected {name}")
    return None


def _fits(value: Any, shape: Any) -> bool:
    if not isinstance(shape, type):
        return type(value) is type(shape) and bool(value == shape)
    if shape is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, shape) and not (shape is int and isinstance(value, bool))


def _expect_fields(value: Mapping[Any, Any], shape: Mapping[Any, Any], where: str) -> None:
    named = {key: entry for key, entry in shape.items() if key is not ...}
    known: dict[str, Any] = {key.rstrip("?"): entry for key, entry in named.items()}
    missing = [key for key in named if not key.endswith("?") and key not in value]
    unknown = sorted(map(str, set(value) - set(known))) if ... not in shape else []
    if missing or unknown:
        parts = [f"lacks {missing}"] * bool(missing) + [f"has unknown {unknown}"] * bool(unknown)
        raise ContentError(f"{where} {' and '.join(parts)}")
    for key, entry in value.items():
        if key in known:
            expect(entry, known[key], f"{where}.{key}")
        else:
            expect(entry, shape[...], f"{where}[{quoted(key)}]")


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def quoted(value: Any) -> str:
    """A value as messages quote it: on one line, and short even if it is long or deep.

    Example:
        >>> quoted([[[[1]]]])
        '[[[...]]]'
    """
    return " ".join(_SHORT.repr(value).split())
