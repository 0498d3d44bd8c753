"""Whether engines may take seconds to compile what they lack: while tuning, and in mode "full"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0
_always = False


@contextmanager
def preparing() -> Iterator[None]:
    """Let engines compile what they lack, until the end of the block.

    It holds for all threads, because backward runs in threads of autograd.

    Example:
        >>> with preparing():
        ...     may_prepare()
        True
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def prepare_always(always: bool) -> None:
    """Let engines compile what they lack at any time, or forbid it outside `preparing`.

    Example:
        >>> prepare_always(False)
        >>> may_prepare()
        False
    """
    global _always
    _always = always


def may_prepare() -> bool:
    """Whether an engine may compile now."""
    return _always or _depth > 0
