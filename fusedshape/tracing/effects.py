"""What running a forward may do besides computing, and undoing it."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from fusedshape.proxies import UntraceableError
from fusedshape.undo import UndoLog

_Result = TypeVar("_Result")

_GONE = object()
_TABLES = ("", "_parameters", "_buffers", "_modules")
INTERCEPTED = "_compiled_call_impl"  # what nn.Module calls instead of its forward


MODES = (
    "switches gradients off or on (no_grad, enable_grad)",
    "uses inference_mode",
    "uses autocast",
    "uses saved_tensors_hooks",
)


def thread_modes() -> tuple[Any, ...]:
    """The states of the modes in MODES on this thread."""
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    inference = torch.is_inference_mode_enabled(), torch._C._is_fwd_grad_enabled()
    return torch.is_grad_enabled(), inference, nesting, hooks


@functools.cache
def draws(name: str) -> bool:
    """Whether a function of torch draws random numbers."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def undisturbed(
    module: nn.Module, run: Callable[[], _Result], strict: bool = True, grad: bool = True
) -> _Result:
    """Run a trace, undo its side effects, and raise UntraceableError if there were any.

    Unless strict, it raises for random numbers only: other side effects do not change what is
    computed.
    """
    log = UndoLog()
    touched = ""
    state = random.getstate()
    try:
        for m in module.modules():
            log.module(m)
        held: list[tuple[str, Any]] = [("", vars(m)) for m in module.modules()]
        held += [(n, v) for _, own in held for n, v in own.items() if isinstance(v, (dict, list))]
        before = [_contents(container) for _, container in held]
        with torch.set_grad_enabled(grad):
            result = run()
        for (name, container), old in zip(held, before, strict=True):
            if not container and not old:
                continue
            new = _contents(container)
            changed = [k for k in {**old, **new} if new.get(k, _GONE) is not old.get(k, _GONE)]
            changed = [k for k in changed if k != INTERCEPTED]
            touched = touched or next((str(k) if name in _TABLES else name for k in changed), "")
    finally:
        try:
            log.undo()
        finally:
            log.undo()
        drew = random.getstate() != state
        if drew:
            random.setstate(state)
    if strict and touched:
        raise UntraceableError(f"it changes its attribute {touched}")
    if drew:
        raise UntraceableError("it draws random numbers that steer it")
    return result


def _contents(container: dict[Any, Any] | list[Any]) -> dict[Any, Any]:
    if not container:
        return {}
    return dict(container if isinstance(container, dict) else enumerate(container))


@contextmanager
def untraceable() -> Iterator[None]:
    """Turn every error raised inside into an UntraceableError."""
    try:
        yield
    except UntraceableError:
        raise
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise UntraceableError(f"{type(error).__name__}: {line}") from error
