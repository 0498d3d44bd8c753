"""The engine that "auto" means for a layer: tuning modes, and the answers known so far."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fusedshape.compiling import constant_for_dynamo
from fusedshape.kernels import tuned
from fusedshape.ops import choice
from fusedshape.ops.engines.preparing import prepare_always
from fusedshape.ops.problem import Direction, Problem
from fusedshape.tuning import measuring
from fusedshape.tuning.cache import Cache, Record, cache_directory, environment
from fusedshape.tuning.kernels import adopt
from fusedshape.tuning.problems import (
    bucket,
    key_of,
    resized,
    settings,
    size_of,
    switches,
)
from fusedshape.validate import shown

logger = logging.getLogger("fusedshape.tuning")

MODES = ("off", "cached", "full")
_VARIABLE = "FUSEDSHAPE_TUNING"

_mode: str | None = None
_answers: dict[tuple[Direction, Problem, tuple[bool, bool, bool]], str | None] = {}
_caches: dict[tuple[Path, torch.device], Cache] = {}


class mode:  # noqa: N801 (read as a function)
    """Set the mode of this process; as a context manager, until the end of the block.

    Code that torch.compile or a CUDA graph has recorded keeps the engines of that time.

    Args:
        name: "off", "cached" or "full"; see `fusedshape.tuning`.

    Raises:
        ValueError: another name.

    Example:
        >>> with mode("off"):
        ...     current_mode()
        'off'
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or name not in MODES:
            raise ValueError(
                f"mode: name: unknown tuning mode {shown(name)}; known: {', '.join(MODES)}"
            )
        self._before = current_mode()
        _set(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _set(self._before)


def current_mode() -> str:
    """The mode of this process, which starts as ``$FUSEDSHAPE_TUNING``, or as "cached"."""
    global _mode
    if _mode is None:
        _mode = os.environ.get(_VARIABLE) or "cached"
        if _mode not in MODES:
            known = ", ".join(MODES)
            logger.warning("%s=%s is unknown, taking cached; known: %s", _VARIABLE, _mode, known)
            _mode = "cached"
    return _mode


def _set(name: str) -> None:
    global _mode
    _mode = name
    forget()
    _install(name)


def _install(name: str) -> None:
    choice.install_chooser(None if name == "off" else choose, steady=name != "full")
    prepare_always(name == "full")


def forget() -> None:
    """Forget what this process has read from the cache, so that it reads again."""
    choice.forget_choices()
    _answers.clear()
    _caches.clear()
    tuned.unpin()


def choose(direction: Direction, problem: Problem) -> str | None:
    """The fastest engine for one direction of a layer; None where that is not known.

    From the second call on this is one look-up in a dictionary. It never raises.

    Args:
        direction: "fprop", "dgrad", "dgrad_act" (dgrad that goes on through the activation of the
            layer before) or "wgrad".
        problem: the layer and its input.
    """
    if torch.compiler.is_compiling():
        return _while_compiling(direction, problem)
    known = direction, problem, switches(problem.dtype, len(problem.weight) == 2)
    try:
        return _answers[known]
    except KeyError:
        return _learn(*known)


def _while_compiling(direction: Direction, problem: Problem) -> str | None:
    """`choose` while Dynamo traces: the answer holds for a bucket, whose bounds become guards."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    size = size_of(problem)
    sizes = resized(problem, 1).input + problem.weight
    # An exported program has no guards. torch 2.11 calls everything that Dynamo traces an export,
    # so there a symbolic batch gets the pinned engine.
    if torch.compiler.is_exporting():
        sizes = (*sizes, size)
    if not _anything() or not all([has_static_value(n) for n in sizes]):  # noqa: C419
        return None
    return _traced(direction, *resized(problem, bucket(size)))


@constant_for_dynamo
def _traced(direction: Direction, *fields: Any) -> str | None:
    problem = Problem(*fields)
    return _learn(direction, problem, settings(problem))


@constant_for_dynamo
def _anything() -> bool:
    """Whether there may be measurements, and so a reason for guards."""
    return os.path.isdir(cache_directory())


def _learn(direction: Direction, problem: Problem, now: tuple[bool, bool, bool]) -> str | None:
    device = _device_of(problem)
    if device is None or size_of(problem) == 0 or current_mode() == "off":
        return None
    record = lookup(direction, problem, device)
    if record is None and current_mode() == "full":
        if not _may_measure(device):
            return None  # and ask again next time
        record = _measured(direction, problem, device)
    answer = None if record is None else _adopt(problem, device, record)
    _answers[direction, problem, now] = answer
    return answer


def cache_of(device: torch.device) -> Cache:
    """The cache of a device with the versions of now."""
    place = cache_directory(), device
    if place not in _caches:
        _caches[place] = Cache(place[0], environment(device))
    return _caches[place]


def lookup(direction: Direction, problem: Problem, device: torch.device) -> Record | None:
    """What has been measured for a problem's bucket."""
    return cache_of(device).get(key_of(direction, problem))


def known(direction: Direction, problem: Problem) -> Record | None:
    """The measurement that `choose` goes by; None where there is none that it would take.

    Nothing is measured, in mode "full" either.
    """
    device = _device_of(problem)
    if device is None or size_of(problem) == 0 or current_mode() == "off":
        return None
    record = lookup(direction, problem, device)
    return None if record is None or _adopt(problem, device, record) is None else record


def keep(direction: Direction, problem: Problem, device: torch.device, record: Record) -> None:
    """Write a measurement to the cache."""
    cache_of(device).put(key_of(direction, problem), record)


def _measured(direction: Direction, problem: Problem, device: torch.device) -> Record | None:
    try:
        record, _, failed = measuring.measure(direction, problem, device)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        logger.warning("%s of %s could not be measured: %s", direction, problem, reason)
        return None
    if record is None:
        logger.info(
            "aten computes the %s of %s: %s", direction, problem, "; ".join(failed.values())
        )
    else:
        keep(direction, problem, device, record)
    return record


def _adopt(problem: Problem, device: torch.device, record: Record) -> str | None:
    try:
        return adopt(record, device)
    except Exception as error:  # whatever a damaged or foreign file holds, it must not raise
        logger.warning("a measurement of %s cannot be used: %s", problem, error)
        return None


def _device_of(problem: Problem) -> torch.device | None:
    """A device of this process with the problem's type and capability; None if there is none."""
    if problem.device != "cuda":
        return torch.device(problem.device)
    if not torch.cuda.is_available():
        return None
    # Two devices of one capability count as the same, even if their names differ.
    current = torch.cuda.current_device()
    for index in (current, *range(torch.cuda.device_count())):
        if torch.cuda.get_device_capability(index) == problem.capability:
            return torch.device("cuda", index)
    return None


def _may_measure(device: torch.device) -> bool:
    """Whether operations really run now, instead of being recorded or faked."""
    # In `_traced`, torch 2.11 does not report that it compiles, but it has a tracing context.
    traced = torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None
    if traced or _get_current_dispatch_mode() is not None:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def status() -> Mapping[str, Any]:
    """The mode, where measurements lie, and how many can be used on this machine's first device.

    If other users may write to the folder, the entry says so instead of naming it.

    Example:
        >>> sorted(status())
        ['tuning', 'tuning_cache', 'tuning_entries']
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cache = cache_of(device)
    reason = cache.refused()
    return {
        "tuning": current_mode(),
        "tuning_cache": str(cache_directory()) if reason is None else f"no: {reason}",
        "tuning_entries": cache.count(),
    }


_install(os.environ.get(_VARIABLE) or "cached")
