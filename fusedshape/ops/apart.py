"""apart: every engine stores its product and runs the activation after it, for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_apart: set[int] = set()  # threads


@contextmanager
def apart() -> Iterator[None]:
    """Let every engine store its product and run the activation as a pass after it.

    Use this when you need the pre-activations, as `fusedshape.diagnose` does. It holds for the
    calling thread until the block ends. A layer with a residual takes torch's product and computes
    the normalised sum after it.

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
    """Whether `apart` holds in this thread.

    Example:
        >>> is_apart()
        False
    """
    return bool(_apart) and threading.get_ident() in _apart
