"""Files: read within limits and checked, written whole or not at all. Messages name the path."""

from __future__ import annotations

from fusedshape.files.checkpoint import load_checkpoint, save_checkpoint
from fusedshape.files.checksum import CHECKSUM, with_checksum, without_checksum
from fusedshape.files.disk import (
    ContentError,
    demand_replaceable,
    read_bytes,
    replacing,
    write_bytes,
)
from fusedshape.files.figure import save_figure
from fusedshape.files.leftovers import remove_leftovers
from fusedshape.files.schema import expect, quoted
from fusedshape.files.text import parse_json, read_json, write_json, write_text
from fusedshape.files.trust import distrust, own_cache, user_cache

__all__ = [
    "CHECKSUM",
    "ContentError",
    "demand_replaceable",
    "distrust",
    "expect",
    "load_checkpoint",
    "own_cache",
    "parse_json",
    "quoted",
    "read_bytes",
    "read_json",
    "remove_leftovers",
    "replacing",
    "save_checkpoint",
    "save_figure",
    "user_cache",
    "with_checksum",
    "without_checksum",
    "write_bytes",
    "write_json",
    "write_text",
]
