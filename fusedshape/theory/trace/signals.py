"""The values that flow through a wiring as it is read, and structures of them."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from fusedshape.kinds import features, kind_of
from fusedshape.theory.network import Op
from fusedshape.torch_ops import (
    ALPHA_DROPOUTS,
    BLOCKS,
    DROPOUTS,
    LOCATION_NORMS,
    MOVES,
    PADS,
    POOLS,
    RESIZES,
)
from fusedshape.windows import overlaps

#: The way out of what cannot be read.
BY_HAND = "pass depth= or subnet_max= by hand"
# The theory's word for functions and modules of torch. Views by functions make no node.
OPS: dict[str, Op] = {
    **dict.fromkeys(MOVES | PADS | RESIZES | BLOCKS, "reshape"),
    **dict.fromkeys(POOLS, "pool"),
    **dict.fromkeys(DROPOUTS | ALPHA_DROPOUTS, "dropout"),
    **dict.fromkeys(LOCATION_NORMS, "norm"),
}


class Cell:
    """A piece of memory: its content as Σ weight · node, and where that was computed."""

    def __init__(self, terms: dict[int, float], path: str = "") -> None:
        self.terms = terms
        self.path = path


@dataclass(frozen=True, eq=False)
class Signal:
    """A tensor that depends on the model's input.

    A view shares the cell of its base, so that an in-place write changes both.

    Attributes:
        cell: the values.
        channels: the number of channels, if known.
        axes: the indices, positive and negative, that name the channel dimension, if known.
    """

    cell: Cell
    channels: int | None = None
    axes: frozenset[int] = frozenset()


class Unsized:
    """A value that is independent of the input's content, but unknown before the run."""


UNSIZED = Unsized()


def add(terms: list[tuple[Signal, float]], path: str) -> Signal:
    """Σ weight · signal; its node is added when it is used."""
    total: dict[int, float] = defaultdict(float)
    for signal, weight in terms:
        for i, w in signal.cell.terms.items():
            total[i] += weight * w
    known = next((s for s, _ in terms if s.channels is not None), terms[0][0])
    return Signal(Cell(dict(total), path), known.channels, known.axes)


def signals_in(tree: Any) -> list[Signal]:
    """All signals in a structure, in order."""
    if isinstance(tree, Signal):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [signal for item in tree for signal in signals_in(item)]


def record(cls: Any, args: Any, kwargs: Any) -> Any:
    """An object that a forward constructs: a named tuple, or a dict for other classes."""
    if hasattr(cls, "_fields"):
        return cls(*args, **kwargs)
    if len(args) == 1 and isinstance(args[0], dict) and not kwargs:
        return args[0]
    return dict(kwargs) if kwargs else args


def item(whole: Any, key: Any) -> Any:
    """whole[key]; for a record, an integer or slice selects among its values in order."""
    if isinstance(whole, dict) and isinstance(key, (int, slice)) and key not in whole:
        return tuple(value for value in whole.values() if value is not None)[key]
    return operator.getitem(whole, key)


def part(whole: Any, name: str) -> Any:
    """An attribute of a record."""
    return whole.get(name) if isinstance(whole, dict) else getattr(whole, name, None)


def channels_of(layer: Any) -> tuple[int | None, frozenset[int]]:
    """The number of a layer's output channels, and the indices that name their dimension."""
    kind = kind_of(layer)
    if kind is not None:
        return features(layer)[1], kind.channel_dims
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, frozenset((-1,))
    return None, frozenset()


def keeps_channels(name: str, padding: Any, x: Signal) -> bool:
    """Whether resizing or padding leaves the channels of a tensor as they are."""
    if name in RESIZES:
        return True
    pads = name in PADS or name.endswith("_pad")
    padded = len(padding) // 2 if isinstance(padding, (tuple, list)) else 0
    return pads and 0 < padded < min((-a for a in x.axes if a < 0), default=0)


def folds_overlapping(
    output_size: Any = None,
    kernel_size: Any = 1,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
    **others: Any,
) -> bool:
    """Whether torch.nn.functional.fold, with these arguments, adds up blocks that overlap."""
    pairs = (v if isinstance(v, tuple) else (v, v) for v in (kernel_size, stride, dilation))
    return overlaps(*pairs)


def cuts_locations(index: Any, x: Signal) -> bool:
    """Whether x[index] keeps all of x's channels in their dimension."""
    if not isinstance(index, tuple) or not all(isinstance(i, slice) for i in index):
        return False
    return 1 in x.axes and index[1:2] in ((), (slice(None),))


def join(path: str, name: str) -> str:
    """Make the qualified name of a child."""
    return f"{path}.{name}" if path else name
