"""Plans: kept in this process and on disk, and made where that is allowed.

On disk a plan is one file below ``plans`` in this package's cache, found by a hash of its operation
in a folder for each device and set of versions. A file is replaced atomically. It holds native
code, so files and folders that other users can write are not read; a file that is damaged, or
whose plan does not load, counts as absent, which is said in one line of the log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedshape.files import (
    distrust,
    own_cache,
    read_json,
    remove_leftovers,
    with_checksum,
    without_checksum,
    write_json,
)
from fusedshape.ops.engines.cudnn import building, library
from fusedshape.ops.engines.cudnn.building import Build, NoPlanError
from fusedshape.ops.engines.cudnn.graph import Operation, graph_of
from fusedshape.ops.engines.preparing import may_prepare

logger = logging.getLogger("fusedshape.cudnn")

#: Counts up whenever files or graphs change their meaning.
FORMAT = 1
#: Bytes of one file; plans have up to 0.3 MB.
_LIMIT = 16 << 20
_WAY = "`fusedshape tune` makes it, and so does the first use in tuning mode 'full'"


class Plan(NamedTuple):
    """A plan on one device.

    Attributes:
        graph: a `cudnn.pygraph` that can be executed.
        uids: of what a call gives: tensors, numbers, results.
        workspace: bytes that it needs beside them.
    """

    graph: Any
    uids: tuple[int, ...]
    workspace: int


class Plans:
    """All plans of this process, by device and operation.

    Args:
        build: makes a plan.
    """

    def __init__(self, build: Build = building.build) -> None:
        self.build = build
        self._ready: dict[tuple[int, Operation], Plan] = {}
        self._broken: dict[tuple[int, Operation], str] = {}
        self._absent: set[tuple[int, Operation]] = set()
        self._stored: set[tuple[int, Operation]] = set()
        self._lock = threading.RLock()
        self._swept = False
        self._told: set[str] = set()

    def get(self, device: int, operation: Operation) -> Plan:
        """The plan of an operation, from this process, from disk, or made now.

        Raises:
            NoPlanError: there is none, and none may be made now; or cuDNN has none.
        """
        found = self._ready.get((device, operation))
        return self._obtained(device, operation) if found is None else found

    def why_not(self, device: int, operations: Iterable[Operation]) -> str | None:
        """Why a layer of these operations is not to be computed; None if one of them can be.

        Nothing is loaded or made.
        """
        for operation in operations:
            reason = self._broken.get((device, operation))
            if reason is not None:
                return reason
        if may_prepare() or any(self._has(device, operation) for operation in operations):
            return None
        return f"there is no plan for this layer and batch yet; {_WAY}"

    def lacking(self, device: int, operations: Iterable[Operation]) -> list[Operation]:
        """Those operations, each once, that have no plan here or on disk and may have one."""
        return [
            operation
            for operation in dict.fromkeys(operations)
            if (device, operation) not in self._broken and not self._has(device, operation)
        ]

    def give_up(self, device: int, operation: Operation, reason: str) -> None:
        """Use no plan for an operation for the rest of the process."""
        self._broken[device, operation] = reason

    def keep(self, device: int, operation: Operation, plan: bytes) -> None:
        """Write a plan to disk, and use it from now on. Where that cannot be, say so once."""
        key = device, operation
        with self._lock:
            self._ready[key] = self._loaded(device, operation, plan)
            self._absent.discard(key)
        path = self._path(device, operation)
        data = {
            "format": FORMAT,
            "environment": library.environment(device),
            "operation": operation._asdict(),
            "plan": base64.b64encode(plan).decode(),
        }
        reason = distrust(path.parent)
        try:
            if reason is None:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                reason = distrust(path.parent)  # somebody may have made it first
            if reason is None:
                self._sweep(path.parent)
                write_json(path, with_checksum(data), sync=False)
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is not None:
            self._tell(f"plans of cuDNN cannot be kept in {path.parent}: {reason}")

    def forget(self) -> None:
        """Forget all that this process knows of plans."""
        with self._lock:
            for known in (self._ready, self._broken, self._absent, self._stored, self._told):
                known.clear()

    def _obtained(self, device: int, operation: Operation) -> Plan:
        key = device, operation
        reason = self._broken.get(key)
        if reason is not None:
            raise NoPlanError(reason)
        if torch.cuda.is_current_stream_capturing():
            raise NoPlanError(
                "its plan is not loaded, and a CUDA graph is being captured; run the layer once "
                "before the capture"
            )
        with self._lock:
            found = self._ready.get(key)  # another thread may have been quicker
            if found is None:
                found = self._from_disk(device, operation)
            if found is not None:
                self._ready[key] = found
                return found
            if not may_prepare():
                raise NoPlanError(f"there is no plan for its {operation.kind} yet; {_WAY}")
            try:
                plan = self.build(operation, library.device_properties(device))
                self.keep(device, operation, plan)
            except NoPlanError as error:
                self.give_up(device, operation, str(error))
                raise
            return self._ready[key]

    def _has(self, device: int, operation: Operation) -> bool:
        key = device, operation
        if key in self._ready or key in self._stored:
            return True
        if key in self._absent:
            return False
        path = self._path(device, operation)
        found = os.path.isfile(path) and distrust(path.parent) is None
        (self._stored if found else self._absent).add(key)
        return found

    def _path(self, device: int, operation: Operation) -> Path:
        environment = {"format": FORMAT, **library.environment(device)}
        folder = own_cache() / "plans" / _digest(environment)
        return folder / f"{_digest(operation._asdict())}.json"

    def _from_disk(self, device: int, operation: Operation) -> Plan | None:
        key, path = (device, operation), self._path(device, operation)
        reason = distrust(path.parent)
        if reason is not None:
            if os.path.lexists(own_cache()):
                self._tell(f"plans of cuDNN in {own_cache()} are not used: {reason}")
            return None
        try:
            return self._loaded(device, operation, self._read(path, device, operation))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, NoPlanError) as error:
            line = " ".join(str(error).split())[:300].removeprefix(f"{path} ")
            logger.warning("ignoring the plan %s, which is made anew: %s", path, line)
            return None
        finally:
            self._stored.discard(key)

    def _read(self, path: Path, device: int, operation: Operation) -> bytes:
        data = read_json(path, limit=_LIMIT, own=True)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"it has not the format {FORMAT}")
        data = without_checksum(data, str(path))
        own = {"environment": library.environment(device), "operation": operation._asdict()}
        if any(data.get(name) != _plain(value) for name, value in own.items()):
            raise ValueError("it is of another device, version or operation")
        try:
            return base64.b64decode(data["plan"], validate=True)
        except (KeyError, TypeError, binascii.Error):
            raise ValueError("it holds no plan") from None

    def _loaded(self, device: int, operation: Operation, plan: bytes) -> Plan:
        cudnn = library.module()
        try:
            with torch.cuda.device(device):
                handle = library.handle(device)
                graph = cudnn.pygraph(handle=handle)
                graph.deserialize(handle, plan)
                workspace = int(graph.get_workspace_size())
        # cuDNN raises what it likes, of classes of its own.
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            raise NoPlanError(f"its plan does not load: {line}") from error
        parts = graph_of(operation)
        count = len(parts.tensors) + len(parts.numbers) + len(parts.results)
        return Plan(graph, tuple(range(1, count + 1)), workspace)

    def _sweep(self, folder: Path) -> None:
        if not self._swept:
            self._swept = True
            remove_leftovers(folder)

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            logger.warning("%s", line)


def _plain(value: Any) -> Any:
    """A value as it is after it has been written as JSON and read again."""
    return json.loads(json.dumps(value))


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]
