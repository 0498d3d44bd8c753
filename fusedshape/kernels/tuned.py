"""Which configuration a kernel uses: the cost model's choice, or a pinned one that was measured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

#: Size of each memo, so that shapes that never return do not fill memory.
REMEMBERED = 4096


class _Pin(NamedTuple):
    low: int
    high: int
    config: Any


class Tunable:
    """A function from arguments to a configuration, which `pin` overrides.

    The last argument but one is the problem, a frozen dataclass. A pin covers a range of its size
    (`batch` of a convolution; of a product `m`, or `k` in wgrad); all else must be equal.

    Args:
        choose: the choice.
        candidates: all configurations for the same arguments.
    """

    def __init__(
        self, choose: Callable[..., Any], candidates: Callable[..., tuple[Any, ...]]
    ) -> None:
        self.choose = choose
        self.candidates = candidates
        self._pins: dict[tuple[Any, ...], list[_Pin]] = {}
        self._memo: dict[tuple[Any, ...], Any] = {}
        self.name = choose.__module__.rpartition(".")[2]
        self.__doc__ = choose.__doc__
        _ALL.append(self)

    def __call__(self, *args: Any) -> Any:
        """The configuration to use; from the second call on this is one dictionary lookup."""
        if _listener is not None and _listener[0] == threading.get_ident():
            _listener[1].append((self, args))
        try:
            return self._memo[args]
        except KeyError:
            pass
        config = self.pinned(*args) or self.choose(*args)
        if len(self._memo) >= REMEMBERED:
            self._memo.clear()
        self._memo[args] = config
        return config

    def pinned(self, *args: Any) -> Any | None:
        """The configuration pinned for these arguments, or None."""
        family, size = family_of(args)
        fits = (pin.config for pin in self._pins.get(family, ()) if pin.low <= size <= pin.high)
        return next(fits, None)

    def pin(self, args: tuple[Any, ...], low: int, high: int, config: Any) -> None:
        """Use `config` for problems like that in `args` of sizes from low to high, both included.

        A later pin takes precedence over an earlier one.
        """
        self._pins.setdefault(family_of(args)[0], []).insert(0, _Pin(low, high, config))
        self._memo.clear()

    @contextmanager
    def trying(self, args: tuple[Any, ...], config: Any) -> Iterator[None]:
        """Use `config` for exactly these arguments within the context."""
        before = self(*args)
        self._memo[args] = config
        try:
            yield
        finally:
            self._memo[args] = before

    def unpin(self) -> None:
        """Forget all pins."""
        self._pins.clear()
        self._memo.clear()


_ALL: list[Tunable] = []
_listener: tuple[int, list[tuple[Tunable, tuple[Any, ...]]]] | None = None


@contextmanager
def asked() -> Iterator[list[tuple[Tunable, tuple[Any, ...]]]]:
    """Collect the choices that this thread asks for, with their arguments; do not nest."""
    global _listener
    log: list[tuple[Tunable, tuple[Any, ...]]] = []
    _listener = threading.get_ident(), log
    try:
        yield log
    finally:
        _listener = None


def unpin() -> None:
    """Forget all pins of all kernels."""
    for one in _ALL:
        one.unpin()


def tunable(
    candidates: Callable[..., tuple[Any, ...]],
) -> Callable[[Callable[..., Any]], Tunable]:
    """Make a function that chooses among `candidates(*args)` a `Tunable`.

    Example:
        >>> from fusedshape.kernels.roofline import Convolution
        >>> @tunable(lambda problem, gpu: ("small", "large"))
        ... def config_for(problem, gpu):
        ...     return "small"
        >>> config_for(Convolution(8, 64, 56, 56, 64), "gpu")
        'small'
        >>> config_for.pin((Convolution(8, 64, 56, 56, 64), "gpu"), 5, 8, "large")
        >>> [config_for(Convolution(n, 64, 56, 56, 64), "gpu") for n in (4, 5, 8, 9)]
        ['small', 'large', 'large', 'small']
    """
    return lambda choose: Tunable(choose, candidates)


def family_of(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
    """The arguments with their problem's size set to 0, and that size."""
    *before, problem, gpu = args
    along = "k" if getattr(problem, "direction", None) == "wgrad" else "m"
    field = "batch" if hasattr(problem, "batch") else along
    return (*before, replace(problem, **{field: 0}), gpu), getattr(problem, field)
