"""UndoLog: puts back what was written, newest first, if anything is raised, Ctrl-C included.

Save before you write. A step puts back a state, not a difference, so it does no harm where the
write never happened or happened in part:

    def change(log: UndoLog) -> None:
        for module in changed:
            log.module(module)  # class, attributes, children, hooks, and which tensors it has
        for name, weight in drawn:
            log.tensor(weight, name)  # the numbers themselves
        log.generator(torch.default_generator)
        ...  # and now write

    all_or_nothing(change)
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

_Result = TypeVar("_Result")
_LOG = logging.getLogger(__name__)
# Containers whose contents are put back without running the user's code.
_CANNOT_FAIL = {dict, list, OrderedDict}


class UndoLog:
    """What to put back; see this file's docstring for how to use one.

    Whether gradients are on in this thread is always put back. If something is saved twice, the
    first state counts.

    Attributes:
        failed: what `undo` could not put back, and why.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], None]]] = []
        self._saved: dict[tuple[str, int], Any] = {}  # keeps the objects alive, and their ids
        self.failed: list[str] = []
        # Ctrl-C between a block and its end can leave gradients switched off.
        grad = torch.is_grad_enabled()
        self.save("whether gradients are on", lambda: void(torch.set_grad_enabled(grad)))

    def save(self, what: str, put_back: Callable[[], None]) -> None:
        """Add a step.

        Args:
            what: what it puts back, for the message if it fails.
            put_back: restores the present state; it is called again if Ctrl-C stops it.
        """
        self._steps.append((what, put_back))

    def contents(self, container: dict[Any, Any] | list[Any], what: str) -> None:
        """Save which objects a dict or a list holds, in order."""
        if self._is_new("contents", container):
            held = container.copy()
            self.save(what, lambda: _refill(container, held))

    def module(self, module: nn.Module, name: str = "") -> None:
        """Save a module's class, its attributes, and what its dicts and lists hold."""
        if not self._is_new("module", module):
            return
        what = f"{name!r} ({type(module).__name__})" if name else type(module).__name__
        kind, own = type(module), vars(module)
        held = [(own, own.copy())]
        for value in own.values():
            if type(value) in _CANNOT_FAIL:
                held.append((value, _copied(value)))
            elif isinstance(value, (dict, list)):
                self.contents(value, what)

        def put_back() -> None:
            for container, contents in held:
                if container or contents:
                    _refill(container, contents)

        # One step for all of them, because a model has tens of thousands of such containers.
        self.save(what, put_back)
        self.save(f"the class of {what}", lambda: _set_class(module, kind))

    def tensor(self, tensor: Tensor, name: str) -> None:
        """Save a tensor's numbers."""
        if self._is_new("tensor", tensor):
            numbers = tensor.detach().clone()
            self.save(name, lambda: _write(tensor, numbers))

    def generator(self, generator: Generator) -> None:
        """Save the state of a random number generator."""
        if self._is_new("generator", generator):
            state = generator.get_state()
            self.save(f"the state of {generator}", lambda: void(generator.set_state(state)))

    def _is_new(self, kind: str, thing: Any) -> bool:
        known = len(self._saved)
        self._saved[kind, id(thing)] = thing
        return len(self._saved) > known

    def undo(self) -> None:
        """Put everything back. A step that fails stops no other; `failed` says what, and why.

        A step that Ctrl-C stops is run again, and the interrupt is raised at the end.
        """
        interrupt: BaseException | None = None
        while self._steps:
            what, put_back = self._steps[-1]
            try:
                put_back()
            except Exception as error:
                self.failed.append(f"{what} ({type(error).__name__}: {error})")
            except BaseException as error:
                interrupt = error
                continue
            self._steps.pop()
        self._saved.clear()
        if interrupt is not None:
            raise interrupt


def all_or_nothing(change: Callable[[UndoLog], _Result]) -> _Result:
    """Run a change, and take it back if it raises anything, Ctrl-C included.

    Args:
        change: writes only what it has saved in the log it is given.

    Returns:
        What `change` returns. An interrupt after that undoes nothing, so let no work follow it.

    Raises:
        BaseException: what `change` raised; a note on it says what could not be put back, if
            anything.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = layer.bias.tolist()
        >>> def change(log):
        ...     log.tensor(layer.bias, "bias")
        ...     layer.bias.data.zero_()
        ...     raise KeyboardInterrupt
        >>> try:
        ...     all_or_nothing(change)
        ... except KeyboardInterrupt:
        ...     layer.bias.tolist() == before
        True
    """
    log = UndoLog()
    try:
        return change(log)
    except BaseException as error:
        try:
            log.undo()
        finally:
            log.undo()  # a second Ctrl-C may have come between two steps
            if log.failed:
                note = f"could not be put back: {'; '.join(log.failed)}"
                _LOG.error(note)
                setattr(error, "__notes__", [*getattr(error, "__notes__", ()), note])  # noqa: B010
        raise


def why_not_written(tensor: Tensor, read_only: Sequence[tuple[int, int]] | None = None) -> str:
    """Why a tensor's numbers cannot be replaced safely; "" if they can.

    Args:
        tensor: the tensor.
        read_only: what `read_only_memory` found just now, if several tensors are asked about.
    """
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.is_meta:
        return "it is on the meta device and has no memory"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "it was made in inference mode, outside of which it cannot be written"
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span:
            return "several of its elements share one place in memory (expanded?)"
        span += (size - 1) * stride
    if tensor.numel() and tensor.device.type == "cpu":
        address = tensor.data_ptr()
        spans = read_only_memory() if read_only is None else read_only
        if not any(first <= address < last for first, last in spans):
            return ""
        return "its memory is read-only (a file that was mapped for reading?)"
    return ""


def overlapping(
    named: Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """Pairs of named tensors, next to each other in memory, that overlap and are not the same."""
    spans = []
    for name, tensor in named:
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
            pairs = zip(tensor.stride(), tensor.shape, strict=True)
            last = sum(stride * (size - 1) for stride, size in pairs)
            start = tensor.data_ptr()
            end = start + (last + 1) * tensor.element_size()
            spans.append((str(tensor.device), start, end, name, tensor))
    furthest: Any = None
    for span in sorted(spans, key=lambda span: span[:3]):
        device, start, end, name, tensor = span
        inside = furthest is not None and furthest[0] == device and start < furthest[2]
        if inside and furthest[4] is not tensor:
            yield furthest[3:], (name, tensor)
        if furthest is None or (device, end) > (furthest[0], furthest[2]):
            furthest = span


def generator_of(device: torch.device) -> Generator:
    """The default random number generator of a device."""
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return torch.cuda.default_generators[index]
    return torch.default_generator


def read_only_memory() -> list[tuple[int, int]]:
    """The addresses to which this process may not write; none where /proc does not tell."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    found = []
    for line in maps.splitlines():
        span, rights = line.split(maxsplit=2)[:2]
        if "w" not in rights:
            first, last = (int(end, 16) for end in span.split("-"))
            found.append((first, last))
    return found


def _copied(container: dict[Any, Any] | list[Any]) -> Any:
    """A copy of a dict or a list; a plain one if it is empty, as most of a module's are."""
    if container:
        return container.copy()
    return {} if isinstance(container, dict) else []


def _refill(container: dict[Any, Any] | list[Any], held: Any) -> None:
    """Put back what a container held, and never empty it: other threads may be reading it."""
    if not isinstance(container, dict):
        container[:] = held
        return
    for key in container.keys() - held.keys():
        container.pop(key, None)
    for key, value in held.items():
        if key not in container or container[key] is not value:
            container[key] = value
    if list(container) != list(held):
        for key, value in held.items():
            container.pop(key, None)
            container[key] = value


def _set_class(module: nn.Module, kind: Any) -> None:
    if type(module) is not kind:
        module.__class__ = kind


def _write(tensor: Tensor, numbers: Tensor) -> None:
    # Equal numbers are not written: the memory may be read-only, or needed by backward.
    if not _same_bits(tensor, numbers):
        with torch.no_grad():
            tensor.copy_(numbers)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors certainly hold the same bits."""
    if one.layout != torch.strided or one.shape != other.shape or one.is_meta:
        return False
    try:
        bits = [t.detach().resolve_conj().reshape(-1).view(torch.uint8) for t in (one, other)]
    except RuntimeError:  # a dtype that has no view as bytes
        return False
    return torch.equal(*bits)


def void(_: object) -> None:
    """Return nothing, in a step whose value is not wanted."""
