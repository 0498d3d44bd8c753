"""apart: products and activations one after the other, for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_apart: set[int] = set()  # threads


@contextmanager
def apart() -> Iterator[None]:
    """Let every engine leave its product in memory and run the activation after it, for a while.

    For those who look at the tensors in between; it holds for the thread that asks. A layer with a
    residual takes torch's product, and makes the normalised sum by itself.

    Example:
        >>> with apart():
        ...     pass
    """
    thread = threading.get_ident()
    outer = thread in _apart
    _apart.add(thread)
    try:
        yield
    finally:
        if not outer:
            _apart.discard(thread)


def is_apart() -> bool:
    """Whether `apart` holds, in this thread.

    Example:
        >>> is_apart()
        False
    """
    return bool(_apart) and threading.get_ident() in _apart
