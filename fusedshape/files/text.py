"""JSON: one strict reader and one writer."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from fusedshape.files.disk import ContentError, read_bytes, write_bytes
from fusedshape.files.schema import quoted

#: Maximum size of a file in bytes, and maximum nesting of lists and objects.
SIZE, DEPTH = 64 << 20, 64
#: Integers are smaller than this, so that each can be converted to a float.
_INTEGER = 2**1023
_OUTSIDE_STRINGS = bytes(set(range(256)) - set(b'"[]{}'))
_MARKS = {
    b"\xef\xbb\xbf": "UTF-8 with a byte order mark",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_json(path: str | os.PathLike[str], *, limit: int = SIZE, own: bool = False) -> Any:
    """The data of a JSON file; see `parse_json`.

    Args:
        path: a regular file.
        limit: maximum size in bytes.
        own: as for `fusedshape.files.read_bytes`.

    Raises:
        ContentError: it is no JSON, or no regular file; names `path`.
        OSError: it cannot be read; names `path`.
    """
    return parse_json(read_bytes(path, limit, own=own), os.fspath(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """The data of a JSON text.

    Things that Python's json accepts and nobody intends are refused: NaN and infinity (also as
    1e999), a key that occurs twice, integers too large for a float, and nesting deeper than 64.

    Args:
        text: JSON in UTF-8 without a byte order mark.
        source: source of the text for messages, such as a path.

    Raises:
        ContentError: it is something else; the message begins with `source`.
        TypeError: `text` is neither str nor bytes.

    Example:
        >>> parse_json('{"a": [1]}', "example")
        {'a': [1]}
        >>> parse_json("[" * 100000, "example")
        Traceback (most recent call last):
        fusedshape.files.disk.ContentError: example cannot be read as JSON: nested deeper than 64
    """
    if isinstance(text, str):
        content = text.encode("utf-8", "surrogatepass")
    elif isinstance(text, (bytes, bytearray)):
        content = bytes(text)
    else:
        raise TypeError(f"{source}: expected JSON text, got {quoted(text)}")
    try:
        if isinstance(text, str) and text.startswith("\ufeff"):
            raise ContentError("it begins with a byte order mark; leave that out")
        for mark, name in _MARKS.items():
            if content.startswith(mark):
                raise ContentError(f"it is {name}; save it as UTF-8 without a byte order mark")
        if not content.strip():
            raise ContentError("it is empty")
        if len(content) > SIZE:
            raise ContentError(f"it has {len(content):,} bytes, at most {SIZE:,} are read")
        if _depth(content) > DEPTH:
            raise ContentError(f"nested deeper than {DEPTH}")
        return _parsed(
            content.decode("utf-8", "surrogatepass" if isinstance(text, str) else "strict")
        )
    except UnicodeDecodeError as error:
        way = "save it as UTF-8"
        raise ContentError(f"{source} is not JSON in UTF-8 (byte {error.start}); {way}") from None
    except json.JSONDecodeError as error:
        raise ContentError(f"{source} is not JSON ({error})") from None
    except ContentError as error:
        raise ContentError(f"{source} cannot be read as JSON: {error}") from None
    except RecursionError:  # the stack of the caller is deep
        raise ContentError(f"{source} cannot be read as JSON: too deep from here") from None


def write_json(path: Path, data: Any, *, sync: bool = True) -> None:
    """Write JSON in one piece.

    Args:
        path: the file.
        data: JSON data; NaN and infinity are refused.
        sync: as for `fusedshape.files.replacing`.

    Raises:
        ValueError: a number that JSON does not know.
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n", sync=sync)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a text in UTF-8 in one piece.

    Raises:
        OSError: the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"), sync=sync)


def _depth(content: bytes) -> int:
    """The nesting of lists and objects, or the first number beyond the limit; no recursion."""
    if content.count(b"[") + content.count(b"{") <= DEPTH:
        return 0
    # Remove what is escaped, so that all quotes left are ends of strings.
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(plain.translate(None, _OUTSIDE_STRINGS).split(b'"')[::2])
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > DEPTH:
            break
    return depth


def _parsed(text: str) -> Any:
    strange: list[str] = []

    def number(text: str) -> float:
        found = float(text)
        if not math.isfinite(found):
            strange.append(quoted(text).strip("'"))
        return found

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ContentError(f"the key {quoted(twice)} is there twice")
        if strange:  # if the number is in this object, the message names its key
            for key, value in pairs:
                if isinstance(value, float) and not math.isfinite(value):
                    raise ContentError(f"{key}={value}, which is no number of JSON's")
        return found

    data = json.loads(
        text,
        parse_constant=number,
        parse_float=number,
        parse_int=_integer,
        object_pairs_hook=unique,
    )
    if strange:
        raise ContentError(f"{strange[0]} is no number of JSON's")
    return data


def _integer(text: str) -> int:
    # Check before int(), which refuses thousands of digits with a message of its own.
    if len(text) > 310 or not -_INTEGER <= int(text) < _INTEGER:
        raise ContentError(f"the integer {quoted(text)} is out of range")
    return int(text)
