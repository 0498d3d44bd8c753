"""Checkpoints: torch's own format, with a digest of the file in the comment at its end.

torch.load reads such a file like any other. A zip archive may end with a comment; here it is the
SHA-256 of all bytes before it, so that a change of any bit is detected.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from fusedshape.files.disk import ContentError, read_bytes, write_bytes
from fusedshape.files.schema import quoted

logger = logging.getLogger("fusedshape.files")

_LABEL = b"fusedshape sha256 "
_LENGTH = len(_LABEL) + 2 * hashlib.sha256().digest_size


def save_checkpoint(path: Path, state: dict[str, Any], kind: str, schema: int) -> None:
    """Write tensors and plain data in one piece.

    Args:
        path: the file; the old one stays as it was if anything fails.
        state: what `torch.load(weights_only=True)` can read.
        kind: what the file is, such as "fusedshape train".
        schema: version of the form; rises when an old reader would misread the new form.

    Raises:
        OSError: the file cannot be written; names `path`, the reason, and the room on the disk.
    """
    buffer = io.BytesIO()
    torch.save({"kind": kind, "schema": schema, **state}, buffer)
    # A zip archive ends with the length of its comment and the comment.
    body, length = buffer.getbuffer()[:-2], struct.pack("<H", _LENGTH)
    digest = hashlib.sha256(body)
    digest.update(length)
    write_bytes(path, body, length, _LABEL, digest.hexdigest().encode())


def load_checkpoint(path: Path, kind: str, schema: int, limit: int) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU; nothing in the file can run code.

    A file without a digest comes from an older version or another program. It is checked against
    the checksums that zip keeps of every tensor, and a warning is logged.

    Args:
        path: the file.
        kind: the kind that was written.
        schema: the newest version that the caller can read.
        limit: maximum size of the file, and of its content, in bytes.

    Returns:
        The state, without kind and schema.

    Raises:
        ContentError: the file is damaged, of another kind or of a newer version; names `path`.
        OSError: it cannot be read; names `path`.
    """
    content = read_bytes(path, limit)
    problem = _problem(content, limit)
    if problem is not None:
        raise ContentError(f"{path} {problem}")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # A foreign file can make the unpickler raise anything.
    except Exception as error:
        first = str(error).strip().split("\n")[0][:120]
        raise ContentError(
            f"{path} is no checkpoint that can be read ({type(error).__name__}: {first})"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ContentError(f"{path} is no checkpoint of {kind}, but holds {quoted(type(state))}")
    found, number = state.pop("kind", kind), state.pop("schema", 0)
    if found != kind:
        raise ContentError(f"{path} is no checkpoint of {kind}, but of {quoted(found)}")
    if type(number) is not int or number < 0:
        raise ContentError(f"{path} has the schema {quoted(number)}, which is no version")
    if number > schema:
        raise ContentError(
            f"{path} was written by a newer fusedshape (schema {number}; this one reads up to "
            f"{schema}); install that one"
        )
    if not _is_signed(content):
        logger.warning(
            "%s has no checksum of its own: an older version or another program wrote it; those of "
            "its tensors are right",
            path,
        )
    return state


def _is_signed(content: bytes) -> bool:
    return content[-_LENGTH:].startswith(_LABEL)


def _problem(content: bytes, limit: int) -> str | None:
    """What is wrong with the bytes of the file; checked before torch reads them."""
    if not content:
        return "is empty"
    if _is_signed(content):
        digest = hashlib.sha256(content[:-_LENGTH]).hexdigest().encode()
        if content[-_LENGTH:] != _LABEL + digest:
            return "is damaged: its checksum is not that of its content"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.comment and not _is_signed(content):
                return "is damaged: its checksum cannot be read"
            entries = archive.infolist()
            # torch compresses nothing; compressed or overlapping entries might fill the memory.
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > min(limit, len(content)):
                return "is no checkpoint: it is packed as none of torch's files is"
            damaged = None if _is_signed(content) else archive.testzip()
    except Exception as error:  # zipfile raises errors of several kinds
        return f"is no checkpoint that can be read ({type(error).__name__}: {error})"
    return damaged and f"is damaged: the checksum of {damaged!r} in it is not that of its content"
