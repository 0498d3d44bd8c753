"""Measuring one direction of one layer on a device, against torch's convolution."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedshape.kernels import tuned
from fusedshape.ops import choice
from fusedshape.ops.engines import ATEN
from fusedshape.ops.engines.preparing import preparing
from fusedshape.ops.engines.protocol import LayerEngine
from fusedshape.ops.problem import Direction, Problem
from fusedshape.timing import Clock, clock_for
from fusedshape.tuning import contest
from fusedshape.tuning.cache import Record
from fusedshape.tuning.kernels import KernelConfig
from fusedshape.tuning.problems import (
    empty_layer,
    operands,
    settings,
    size_of,
    terms_of,
)

logger = logging.getLogger("fusedshape.tuning")

_LOCK = threading.Lock()


class Result(NamedTuple):
    """What measuring one direction of one problem gave.

    Attributes:
        record: what the cache keeps; None if only "aten" can run.
        wrong: candidates whose results differ from those of "aten", and by how much.
        failed: candidates that could not run, and why; also engines as a whole.
    """

    record: Record | None
    wrong: dict[str, str]
    failed: dict[str, str]


class _Entrant(NamedTuple):
    engine: str
    config: KernelConfig | None
    call: Callable[[], Sequence[Tensor]]


def measure(
    direction: Direction, problem: Problem, device: torch.device, clock: Clock | None = None
) -> Result:
    """Find the fastest engine, and its configuration, of one direction of a layer.

    If an engine wins, the configuration of its kernel is pinned for the rest of the process. If one
    is pinned already, by the same shapes under another activation, only that one is measured.

    Args:
        direction: "fprop", "dgrad", "dgrad_act" (through the layer before) or "wgrad".
        problem: the layer and its input.
        device: where to measure; of the problem's type.
        clock: of the device; None makes one.

    Returns:
        The record and what was left out. Candidates with wrong results are logged too.

    Raises:
        RuntimeError: "aten" itself cannot run: out of memory, for one.
    """
    off = torch.autocast(device.type, enabled=False)
    with _LOCK, preparing(), torch.no_grad(), off:
        if device.type == "cuda":
            with torch.cuda.device(device):
                return _measure(direction, problem, device, clock or clock_for(device))
        return _measure(direction, problem, device, clock or clock_for(device))


def _measure(direction: Direction, problem: Problem, device: torch.device, clock: Clock) -> Result:
    rivals, failed = able(problem, device)
    if not rivals:
        return Result(None, {}, failed)
    tensors = operands(problem, ATEN, device)
    entrants: dict[str, _Entrant] = {}
    for name, rival in rivals.items():
        entrants |= _entrants(name, functools.partial(tensors.call, rival, direction))
    verdict = contest.contest(
        functools.partial(tensors.call, ATEN, direction),
        {name: entrant.call for name, entrant in entrants.items()},
        clock=clock,
        terms=terms_of(direction, problem),
        tf32=settings(problem).tf32,
    )
    for name, how in verdict.wrong.items():
        logger.warning("%s is not used for the %s of %s: %s", name, direction, problem, how)
    if verdict.winner is None:
        record = Record("aten", None, size_of(problem), verdict.base_seconds, verdict.seconds)
        return Result(record, verdict.wrong, failed | verdict.failed)
    name, config, _ = entrants[verdict.winner]
    if config is not None:
        config.pin(size_of(problem))
    kernel = None if config is None else config.to_json()
    record = Record(name, kernel, size_of(problem), verdict.base_seconds, verdict.seconds)
    return Result(record, verdict.wrong, failed | verdict.failed)


def able(problem: Problem, device: torch.device) -> tuple[dict[str, LayerEngine], dict[str, str]]:
    """The engines beside "aten" that can run a problem, and why the others cannot."""
    rivals: dict[str, LayerEngine] = {}
    reasons: dict[str, str] = {}
    x, layer = empty_layer(problem, device)
    for engine in choice.rivals(device.type):
        try:
            with preparing():  # it will, when it is measured
                engines = choice.engines_for(engine.name, x, layer)
        except (ValueError, RuntimeError) as error:
            reasons[engine.name] = str(error)
        else:
            rivals[engine.name] = engines.fprop
    return rivals, reasons


def _entrants(name: str, call: Callable[[], Sequence[Tensor]]) -> dict[str, _Entrant]:
    """One engine with each configuration its kernel may take, or only the one that is pinned."""
    with tuned.asked() as log, contextlib.suppress(Exception):
        call()  # if it fails, it fails again in the contest, which records why
    if not log:
        return {name: _Entrant(name, None, call)}
    tunable, args = log[0]
    pinned = tunable.pinned(*args)
    configs = tunable.candidates(*args) if pinned is None else (pinned,)

    def with_config(config: Any) -> Sequence[Tensor]:
        with tunable.trying(args, config):
            return call()

    return {
        f"{name} {config}": _Entrant(
            name, KernelConfig(tunable, args, config), functools.partial(with_config, config)
        )
        for config in configs
    }
