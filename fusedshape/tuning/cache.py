"""Measurements on disk: one file each, found by a hash of all they depend on.

A file is replaced atomically, so that a reader sees all of it or none, and no process removes
another's files. A file that cannot be read, is damaged or belongs to something else counts as
absent; the first one is named in a warning. A folder that other users may write to is not used.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedshape import native
from fusedshape.files import distrust, own_cache, read_json, remove_leftovers, write_json
from fusedshape.ops.engines.triton import HAS_TRITON, INTERPRET

logger = logging.getLogger("fusedshape.tuning")

#: Counts up whenever files, keys, or the rules of measuring change their meaning.
FORMAT = 3
#: Bytes of one measurement.
_LIMIT = 1 << 20
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Record:
    """What was measured for one direction of one problem.

    Attributes:
        engine: the engine to take.
        kernel: its kernel and configuration, as `fusedshape.tuning.kernels` writes them; or None.
        size: the batch (rows of a linear layer) it was measured at.
        base_seconds: of "aten".
        seconds: of `engine`.
    """

    engine: str
    kernel: dict[str, Any] | None
    size: int
    base_seconds: float
    seconds: float

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """Inverse of `dataclasses.asdict`.

        Raises:
            ValueError: data that is not a record's.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(data, dict) or sorted(data) != sorted(names):
            raise ValueError(f"a record has the fields {', '.join(names)}")
        record = cls(**data)
        good = (
            isinstance(record.engine, str)
            and (record.kernel is None or isinstance(record.kernel, dict))
            and type(record.size) is int
            and record.size > 0
            and all(_is_time(value) for value in (record.base_seconds, record.seconds))
        )
        if not good:
            raise ValueError(f"no values of a record: {data}")
        return record


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


class Cache:
    """The measurements of one environment.

    Args:
        root: directory of all environments; need not exist.
        environment: what every measurement depends on: device and versions. JSON data.
    """

    def __init__(self, root: Path, environment: Mapping[str, Any]) -> None:
        self.environment = dict(environment)
        self.folder = root / _digest(self.environment)
        #: Whether everything could be written so far.
        self.writable = True
        self._swept = False
        self._told = False
        self._missed = False

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the measurement of `key` is, or would be."""
        return self.folder / f"{_digest(key)}.json"

    def get(self, key: Mapping[str, Any]) -> Record | None:
        """The record of `key`; None if there is none that can be used."""
        path = self.path(key)
        reason = self.refused()
        if reason is not None:
            if os.path.lexists(self.folder.parent):  # else there is nothing to ignore
                way = "name another place in FUSEDSHAPE_CACHE"
                self._tell(self.folder.parent, reason, way)
            return None
        try:
            own, record = self._read(path)
            if own != _plain(key):
                raise ValueError("it is of another problem")
        except FileNotFoundError:
            if not self._missed and not self.folder.is_dir():
                root = self.folder.parent
                if any(root.glob("*/*.json")):
                    self._tell(root, "it holds measurements of other devices or versions only")
            self._missed = True
            return None
        except (OSError, ValueError) as error:
            self._tell(path, str(error))
            return None
        return record

    def put(self, key: Mapping[str, Any], record: Record) -> None:
        """Write a record in one piece. Where that cannot be, say so once and go on."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "environment": self.environment,
            "key": dict(key),
            "record": dataclasses.asdict(record),
        }
        if not self.writable:
            return
        reason = self.refused()
        try:
            if reason is None:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                reason = self.refused()  # somebody may have made it first
            if reason is None:
                self._sweep()
                path = self.path(key)
                if os.path.lexists(path) and not path.is_file():
                    path.unlink()  # a pipe or the like, in a folder that is all ours
                write_json(path, content | {"sha256": _digest(content)}, sync=False)
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is not None:
            self.writable = False
            logger.warning("tuning results cannot be kept in %s: %s", self.folder, reason)

    def refused(self) -> str | None:
        """Why files in the folder are not trusted; None if only this user may write there."""
        return distrust(self.folder)

    def _sweep(self) -> None:
        if not self._swept:
            self._swept = True
            for folder in self.folder.parent.glob("*"):
                remove_leftovers(folder)

    def count(self) -> int:
        """How many records can be used; 0 if the folder may not be read."""
        if self.refused() is not None:
            return 0
        try:
            return sum(self._is_valid(path) for path in self.folder.glob("*.json"))
        except OSError:
            return 0

    def _is_valid(self, path: Path) -> bool:
        try:
            key, _ = self._read(path)
        except (OSError, ValueError):
            return False
        return path == self.path(key)

    def _read(self, path: Path) -> tuple[dict[str, Any], Record]:
        data = read_json(path, limit=_LIMIT, own=True)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"it has not the format {FORMAT}")
        if data.pop("sha256", None) != _digest(data):
            raise ValueError("its checksum is not that of its content")
        if data.get("environment") != _plain(self.environment):
            raise ValueError("it is of another device or version")
        key = data.get("key")
        if not isinstance(key, dict):
            raise ValueError("it has no key")
        return key, Record.from_json(data.get("record"))

    def _tell(self, path: Path, problem: str, way: str = "`fusedshape tune` measures anew") -> None:
        level = logging.DEBUG if self._told else logging.WARNING
        self._told = True
        line = " ".join(problem.split()).removeprefix(f"{path} ")
        logger.log(level, "ignoring %s: %s; %s", path, line, way)


def _plain(data: Mapping[str, Any]) -> Any:
    """Data as it is after it has been written as JSON and read again."""
    return json.loads(json.dumps(data))


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cache_directory() -> Path:
    """The folder of measurements for all devices and versions; it need not exist.

    A user without a home gets one below the directory for temporary files. A relative path in
    ``$FUSEDSHAPE_CACHE`` is returned unchanged, and nothing is kept there.

    Example:
        >>> cache_directory().name
        'tuning'
    """
    return own_cache() / "tuning"


def environment(device: torch.device) -> dict[str, Any]:
    """What every measurement on a device depends on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else native.cpu_name(),
        "threads": None if cuda else torch.get_num_threads(),
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": importlib.metadata.version("triton") if HAS_TRITON else None,
        "interpreted": INTERPRET,
        "kernels": kernel_hash(_PACKAGE),
        "native": native.library_path().name if not cuda and native.available() else None,
    }


@functools.cache
def kernel_hash(package: Path) -> str:
    """Hash of the sources that decide how fast an engine is."""
    digest = hashlib.sha256()
    folders = package / "kernels", package / "ops" / "engines"
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
