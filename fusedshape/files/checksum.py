"""A checksum inside JSON data, so that damaged or edited numbers are detected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fusedshape.files.disk import ContentError
from fusedshape.files.schema import quoted

CHECKSUM = "sha256"


def with_checksum(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data with its checksum as the last field.

    The checksum is of what the data says, not of how it is laid out: keys are sorted and white
    space is left out before it is computed.

    Raises:
        ValueError: a number that JSON does not know.

    Example:
        >>> without_checksum(with_checksum({"a": 1}), "example")
        {'a': 1}
    """
    content = {key: value for key, value in data.items() if key != CHECKSUM}
    return {**content, CHECKSUM: _digest(content)}


def without_checksum(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The data that `with_checksum` was given.

    Args:
        data: what was read.
        source: where it is from, for messages: a path.

    Raises:
        ContentError: there is no checksum, or it is not that of the data.

    Example:
        >>> without_checksum({**with_checksum({"a": 1}), "a": 2}, "example")
        Traceback (most recent call last):
        fusedshape.files.disk.ContentError: example is damaged or was edited: its checksum is not \
that of its content
    """
    content = dict(data)
    found = content.pop(CHECKSUM, None)
    if found is None:
        raise ContentError(f"{source} has lost its checksum, the field {quoted(CHECKSUM)}")
    if found != _digest(content):
        raise ContentError(
            f"{source} is damaged or was edited: its checksum is not that of its content"
        )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
