"""`kept`: restores a model and the random number generators after whatever runs.

A parameter is copied only when an operation is about to write to it, so that a model that writes to
none costs no memory. Buffers are copied at once, because the schema of batch_norm does not say that
it writes to them.
"""

from __future__ import annotations

import math
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusedshape.guard import Guard, save_place
from fusedshape.undo import UndoLog

_DEEP = 4  # levels of nested containers and objects that are searched
_FOREIGN = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


@contextmanager
def kept(model: nn.Module) -> Iterator[list[str]]:
    """Restore a model and the random number generators after the block, even after Ctrl-C.

    Args:
        model: restored are the class, attributes, hooks and mode of its modules; the values,
            gradients and requires_grad of parameters and buffers; and containers, tensors, arrays,
            generators and objects with a __dict__ in attributes. Objects without one are not
            restored, nor is state in classes and Python modules.

    Yields:
        A list of what could not be restored; complete after the block.
    """
    log, lost = UndoLog(), list[str]()
    sums: list[tuple[str, Tensor, complex]] = []
    guard = Guard(log)
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    # Compiled code hides its operations. Dynamo is asked only if something imported it.
    eager = torch.compiler.set_stance if "torch._dynamo" in sys.modules else nullcontext
    try:
        _save(model, log, guard, sums)
        with torch.random.fork_rng(devices=list(devices)), eager("force_eager"), guard:
            yield lost
    except BaseException as error:
        _undo(log, sums, lost)
        if lost:
            note = f"not as it was before: {'; '.join(lost)}"
            setattr(error, "__notes__", [*getattr(error, "__notes__", ()), note])  # noqa: B010
        raise
    _undo(log, sums, lost)


def _undo(log: UndoLog, sums: list[tuple[str, Tensor, complex]], lost: list[str]) -> None:
    try:
        log.undo()
    finally:
        log.undo()  # the rest, if Ctrl-C came between two steps
        lost += log.failed
        for name, tensor, before in sums:
            if not _same(_sum(tensor), before):
                lost.append(f"{name!r} was written to past PyTorch, as through NumPy")


def _save(
    model: nn.Module, log: UndoLog, guard: Guard, sums: list[tuple[str, Tensor, complex]]
) -> None:
    """Save everything; `sums` receives checksums of tensors that are only watched."""
    python, numpy = random.getstate(), np.random.get_state()
    log.save("the state of random", lambda: random.setstate(python))
    log.save("the state of numpy.random", lambda: np.random.set_state(numpy))
    for name, buffer in model.named_buffers():
        log.tensor(buffer.detach(), name)
        save_place(buffer, name, log)
    for name, parameter in model.named_parameters():
        guard.watch(parameter, name)
        sums.append((name, parameter.detach(), _sum(parameter.detach())))
        if parameter.grad is not None:
            guard.watch(parameter.grad, f"the gradient of {name}")
        save_place(parameter, name, log)
    seen: set[int] = {id(t) for t in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        # A ScriptModule keeps its attributes elsewhere, and none can be added.
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, value in vars(module).items():
            if not key.endswith("_hooks"):
                _save_value(value, f"{path}.{key}".lstrip("."), log, guard, seen, 0)
        log.module(module, path)


def _save_value(
    value: Any, name: str, log: UndoLog, guard: Guard, seen: set[int], depth: int
) -> None:
    """Save an attribute's value, and the values inside it."""
    if id(value) in seen or depth > _DEEP or isinstance(value, (nn.Module, *_FOREIGN)):
        return
    seen.add(id(value))
    inner: list[Any] = []
    if isinstance(value, Tensor):
        guard.watch(value, name)
    elif isinstance(value, (dict, list)):
        log.contents(value, name)
        inner = list(value.values() if isinstance(value, dict) else value)
    elif isinstance(value, (set, deque, bytearray)):
        log.save(name, _refilling(value))
        inner = [] if isinstance(value, bytearray) else list(value)
    elif isinstance(value, (tuple, frozenset)):
        inner = list(value)
    elif isinstance(value, np.ndarray):
        array = value.copy()
        log.save(name, lambda: _write_array(value, array))
    elif isinstance(value, torch.Generator):
        log.generator(value)
    elif isinstance(value, random.Random):
        state = value.getstate()
        log.save(name, lambda: value.setstate(state))
    elif isinstance(value, np.random.Generator):
        bits, drawn = value.bit_generator, value.bit_generator.state
        log.save(name, lambda: setattr(bits, "state", drawn))
    elif isinstance(getattr(value, "__dict__", None), dict):
        log.contents(vars(value), name)
        inner = list(vars(value).values())
    for part in inner:
        _save_value(part, name, log, guard, seen, depth + 1)


def _refilling(value: set[Any] | deque[Any] | bytearray) -> Callable[[], None]:
    held = value.copy()

    def put_back() -> None:
        value.clear()
        if isinstance(value, set):
            value.update(held)
        else:
            value.extend(held)

    return put_back


def _write_array(array: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any]) -> None:
    if array.shape != numbers.shape or array.tobytes() != numbers.tobytes():
        array[...] = numbers


def _sum(tensor: Tensor) -> complex:
    """A checksum of a tensor: of its bits where that is possible, which is ten times as fast."""
    if tensor.is_meta or tensor.is_quantized:
        return 0.0
    flat = tensor.view(-1) if tensor.is_contiguous() and not tensor.is_complex() else None
    if flat is not None and flat.nbytes % 8 == 0 and flat.data_ptr() % 8 == 0 and len(flat):
        # Modulo 2⁶⁴; the remainder as two numbers that a complex one holds exactly.
        high, low = divmod(int(flat.view(torch.int64).sum().item()), 1 << 32)
        return complex(high, low)
    wide = torch.float64 if tensor.is_floating_point() else None
    return complex(tensor.sum(dtype=wide).item())


def _same(a: complex, b: complex) -> bool:
    return a == b or (math.isnan(a.real) and math.isnan(b.real))
