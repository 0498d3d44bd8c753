"""The record of a benchmark run: its file, and the schema that is checked on read and write."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fusedshape.files import (
    CHECKSUM,
    ContentError,
    demand_replaceable,
    expect,
    quoted,
    read_json,
    with_checksum,
    without_checksum,
    write_text,
)
from fusedshape.machine import provenance

Record = dict[str, Any]
Row = dict[str, Any]

KIND = "fusedshape bench"
#: Rises when a reader of the old form would misread the new one. Files of schema 1, which
#: `fusedshape bench compare` meets when it measures older revisions, have no checksum.
SCHEMA = 2
#: The states of a row, and of a candidate in it.
STATES = ("ok", "wrong", "out of memory", "failed", "skipped")
#: 20th, 50th and 80th percentile; the outer ones are null where only the median was recorded.
_PERCENTILES = [(float, None), float, (float, None)]

_CANDIDATE = {
    "status": STATES,
    "why?": str,
    "ms?": _PERCENTILES,
    "samples_ms?": [float, ...],
    "graph_ms?": _PERCENTILES,
    "graph_samples_ms?": [float, ...],
    "graph_why?": str,
    "error?": {...: float},
    "saved_bytes?": int,
    "peak_bytes?": int,
    "GB/s?": float,
    "TFLOP/s?": float,
    "of_copy?": float,
    "of_matmul?": float,
}
_ROW = {
    "case": str,
    "parameters": dict,
    "status": STATES,
    "why?": str,
    "bytes?": int,
    "flops?": int,
    "candidates": {...: _CANDIDATE},
    "ratios": {...: _PERCENTILES},
    "graph_ratios?": {...: _PERCENTILES},
}
_FIT = {
    "series": str,
    "candidate": str,
    "metric": str,
    "exponent": float,
    "sizes": [float, ...],
    "values": [float, ...],
    "at_most": float,
    "holds": bool,
}
_MACHINE: dict[Any, Any] = {
    **dict.fromkeys(("fusedshape", "torch", "cpu", "cpu_tensors"), str),
    "threads": int,
    "gpu": [str, ...],
    ...: object,
}
_RECORD = {
    "kind": str,
    "schema": int,
    "suite": str,
    "device": str,
    "seed": int,
    "finished": bool,
    "machine": _MACHINE,
    "accelerator": ({}, {"driver": object, "cudnn": object, ...: object}),
    "date": str,
    "command": str,
    "commit": (str, None),
    "dirty": (bool, None),
    "ceilings": {...: float},
    "rows": [_ROW, ...],
    "fits": [_FIT, ...],
}


class RecordError(ContentError):
    """A file that is not a record this version can read; the message says how to make one."""


def new(suite: str, device: torch.device, seed: int) -> Record:
    """An empty record of this machine, this commit and this command."""
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "suite": suite,
        "device": str(device),
        "seed": seed,
        "finished": False,
        **provenance(),
        "accelerator": accelerator(device),
        "ceilings": {},
        "rows": [],
        "fits": [],
    }


def accelerator(device: torch.device) -> dict[str, Any]:
    """Facts about a GPU: driver, CUDA, cuDNN, multiprocessors, memory; empty for a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    driver = Path("/sys/module/nvidia/version")
    return {
        "name": properties.name,
        "driver": _line_of(driver),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "L2_bytes": properties.L2_cache_size,
        "conv_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def _line_of(path: Path) -> str | None:
    """The text of a one-line file, or None if there is no such file."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def save(path: Path, record: Record) -> None:
    """Check a record and write it with its checksum, whole or not at all.

    Raises:
        RecordError: the record is not what its schema says.
        ValueError: a number that JSON does not know.
        OSError: the file cannot be written.
    """
    check(record)
    text = _text(with_checksum(record))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def demand_writable(path: Path) -> None:
    """Check that `save` can write a file, before the run begins.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        demand_replaceable(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def load(path: str | Path) -> Record:
    """Read a record and check it.

    Raises:
        RecordError: the file is no record, was cut off, damaged or edited, or is of another
            schema.
        OSError: the file cannot be read.
    """
    path = Path(path)
    again = "make one with: fusedshape bench run --suite cpu --out FILE"
    try:
        record = read_json(path)
    except ContentError as error:
        raise RecordError(f"{error}; {again}") from None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise RecordError(f"{path} is not a record of fusedshape bench; {again}")
    schema = record.get("schema")
    if schema not in (1, SCHEMA) or isinstance(schema, bool):
        way = "install the fusedshape that wrote it" if _newer(schema) else "run its suite again"
        raise RecordError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; {way}")
    content = record if schema == 1 else {k: v for k, v in record.items() if k != CHECKSUM}
    # An error of the schema names the place, so it goes before that of the checksum.
    try:
        check(content)
    except RecordError as error:
        raise RecordError(f"{path}: {error}; {again}") from None
    if schema != 1:
        try:
            without_checksum(record, str(path))
        except ContentError as error:
            way = f"restore it, or run its suite again: --suite {content['suite']}"
            raise RecordError(f"{error}; {way}") from None
    return {**content, "schema": SCHEMA}


def check(record: Record) -> None:
    """Raise RecordError unless a record fits the schema and claims nothing that was not checked.

    Besides the types: each case is there once, times are positive, and no time or ratio belongs to
    a candidate that is not "ok".
    """
    try:
        expect(record, _RECORD, "record")
    except ContentError as error:
        raise RecordError(str(error)) from None
    seen = set()
    for row in record["rows"]:
        where = f"row {row['case']!r}"
        if row["case"] in seen:
            raise RecordError(f"{where} is there twice")
        seen.add(row["case"])
        good = {name for name, c in row["candidates"].items() if c["status"] == "ok"}
        for name, candidate in row["candidates"].items():
            if name not in good and ("ms" in candidate or "graph_ms" in candidate):
                raise RecordError(f"{where}: {name!r} is {candidate['status']}, yet has a time")
            for key in ("ms", "graph_ms", "samples_ms", "graph_samples_ms"):
                times = candidate.get(key, [1.0])
                if not times or any(t is not None and t <= 0 for t in times):
                    raise RecordError(f"{where}: {key} of {name!r} are no times: {quoted(times)}")
        for ratios in (row["ratios"], row.get("graph_ratios", {})):
            for ratio in ratios:
                if not good.issuperset(ratio.split("/")):
                    raise RecordError(f"{where}: ratio {ratio!r} of a candidate that is not ok")


def rows(record: Record, group: str, **parameters: Any) -> Iterator[Row]:
    """Rows of a group ("conv_act", …) whose parameters have the given values."""
    for row in record["rows"]:
        if row["case"].partition("/")[0] == group and all(
            row["parameters"].get(key) == value for key, value in parameters.items()
        ):
            yield row


def _text(record: Record) -> str:
    """JSON with one line for each row, so that a diff of two records can be read."""

    def dump(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(json.dumps(v, allow_nan=False) for v in value) + "\n ]"
        return json.dumps(value, allow_nan=False)

    body = ",\n ".join(f"{json.dumps(key)}: {dump(value)}" for key, value in record.items())
    return "{\n " + body + "\n}\n"


def _newer(schema: object) -> bool:
    return isinstance(schema, int) and schema > SCHEMA
