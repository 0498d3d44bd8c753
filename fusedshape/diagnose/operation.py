"""Operation: one recorded call of an operator, with its arguments by the names of the schema."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusedshape.activations import ACTIVATIONS, TORCH_NAMES
from fusedshape.spec import CONSTANTS, ActSpec
from fusedshape.torch_ops import RESIZES, TURNS, base
from fusedshape.windows import read_share

Move = Callable[[Tensor], Tensor]

# Elementwise; some of them have no tag in torch that says so, or had none in 2.11.
_IDS = {row.id: name for name, row in ACTIVATIONS.items()}
_POINTWISE = {*(known.name for known in TORCH_NAMES), "_prelu_kernel"}


@dataclass(frozen=True)
class Called:
    """What is known about an operator without its arguments.

    Attributes:
        namespace: "aten", "fusedshape" or another.
        name: its name there, without the "_" of an in-place variant.
        in_place: whether it overwrites its first argument.
        views: whether what it returns may be a view.
        draws: whether it draws random numbers.
        parameters: the names of its arguments, with their defaults.
    """

    namespace: str
    name: str
    in_place: bool
    views: bool
    draws: bool
    parameters: tuple[tuple[str, Any], ...]

    @property
    def kind(self) -> str:
        """The name under which `fusedshape.torch_ops` lists the operator."""
        return base(self.name)


@functools.cache
def called(func: Any) -> Called:
    """Describe an operator."""
    schema = func._schema
    namespace, _, name = schema.name.partition("::")
    in_place = name.endswith("_")
    return Called(
        namespace,
        name.rstrip("_") if in_place else name,
        in_place,
        any(result.alias_info is not None for result in schema.returns),
        torch.Tag.nondeterministic_seeded in func.tags,
        tuple((a.name, a.default_value) for a in schema.arguments),
    )


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of an operator.

    Attributes:
        func: the operator's overload.
        what: description of the operator.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        given: all arguments by name, with defaults for those left out.
        tensors: all tensors among the arguments, including those in lists.
        tracked: those of `tensors` that depend on the model's input.
    """

    func: Any
    what: Called
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: dict[str, Any]
    tensors: list[Tensor]
    tracked: list[Tensor]

    @staticmethod
    def of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tracked: Any) -> Operation:
        """Describe a call.

        Args:
            func: the operator's overload.
            args: its positional arguments.
            kwargs: its keyword arguments.
            tracked: tells whether a tensor depends on the model's input.
        """
        what = called(func)
        names = [name for name, _ in what.parameters]
        given = {**dict(what.parameters), **dict(zip(names, args, strict=False)), **kwargs}
        tensors = [t for t in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(t, Tensor)]
        return Operation(func, what, args, kwargs, given, tensors, list(filter(tracked, tensors)))

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument that some overloads do not have."""
        return self.given.get(name, default)

    @property
    def name(self) -> str:
        """The name of the operator."""
        return self.what.name

    @property
    def kind(self) -> str:
        """The name under which `fusedshape.torch_ops` lists the operator."""
        return self.what.kind

    @property
    def x(self) -> Tensor:
        """The first tensor that depends on the model's input."""
        return self.tracked[0]

    @property
    def is_pointwise(self) -> bool:
        """Whether each element of the result depends on one element of each argument."""
        return torch.Tag.pointwise in self.func.tags or self.name in _POINTWISE

    @property
    def factor(self) -> float | None:
        """The number that x is multiplied by; None if the call does anything else."""
        if self.name == "neg":
            return -1.0
        by_x = self["self"] is not self.x
        other = self["self"] if by_x else self["other"]
        if self.get("rounding_mode") is not None:
            return None
        if isinstance(other, Tensor) and other.numel() != 1:
            return None
        if self.name == "div":
            return 1 / float(other) if float(other) and not by_x else None
        return float(other)

    @property
    def spec(self) -> ActSpec:
        """The spec of a call of this library's activation kernels."""
        return ActSpec(_IDS[self["activation"]], **{name: self[name] for name in CONSTANTS})

    def reads(self, out: Tensor) -> float:
        """The share of input positions that a pool or a resizing reads."""
        places = self.x.shape[2:]
        if f"{len(places)}d" not in self.name:
            return 1.0
        if self.kind in RESIZES:
            nearest = "nearest" in self.kind
            return min(1.0, math.prod(out.shape[2:]) / math.prod(places)) if nearest else 1.0
        if self.kind not in ("max_pool", "avg_pool"):
            return 1.0
        kernel = self._each("kernel_size", 1)
        taps = torch.ones(kernel)
        stride, padding = self._each("stride", kernel), self._each("padding", 0)
        return read_share(taps, places, stride, padding, self._each("dilation", 1))

    def _each(self, name: str, default: Any) -> list[int]:
        """An argument as a list with one number for each spatial dimension."""
        given = self.get(name)
        given = default if given in (None, []) else given
        given = [given] if isinstance(given, int) else list(given)
        return given * ((self.x.ndim - 2) // len(given))

    def moved(self, now: Sequence[int], dim: int, batch: int) -> tuple[Move | None, int]:
        """How a view rearranges a kernel's locations, and which dimension then has the channels.

        Args:
            now: the view's shape.
            dim: the dimension of x's channels.
            batch: the number of inputs, which are in dimension 0.

        Returns:
            A function of a (3, pairs, *locations) kernel, None if the view cannot be followed; and
            the dimension of the channels.
        """
        if self.kind in TURNS:
            return self._turned(dim, batch)
        was = self.x.shape
        # Other views keep the order of elements in memory.
        if dim == len(was) - 1 and now[-1] == was[-1]:
            return lambda k: k, len(now) - 1
        if now[0] == was[0] and dim == 1 and len(now) > 1 and now[1] == was[1]:
            return lambda k: k, 1
        if list(now) == [batch, math.prod(was[1:])] and was[0] == batch:
            return lambda k: k.reshape(*k.shape[:2], -1).mean(2), 1
        return None, usual_dim(len(now))

    def _turned(self, dim: int, batch: int) -> tuple[Move | None, int]:
        """`moved` for a view that reorders dimensions."""
        was = self.x.shape
        order = self._order(len(was))
        if order[0] != 0 or was[0] != batch:
            return None, usual_dim(len(was))
        places = [d for d in range(1, len(was)) if d != dim]
        before = [was[d] for d in places]
        turn = [2 + places.index(d) for d in order[1:] if d != dim]

        def move(kernel: Tensor) -> Tensor:
            return kernel.reshape(*kernel.shape[:2], *before).permute(0, 1, *turn)

        return move, order.index(dim)

    def _order(self, ndim: int) -> list[int]:
        """The order into which a turn brings the dimensions of x."""
        if "dims" in self.given:
            return [d % ndim for d in self["dims"]]
        order = list(range(ndim))
        if "dim0" in self.given:
            a, b = self["dim0"] % ndim, self["dim1"] % ndim
            order[a], order[b] = order[b], order[a]
            return order
        return order[::-1]  # t has no arguments


def usual_dim(ndim: int) -> int:
    """The channel dimension by convention: the last of (N, T, C), else the one after N."""
    return 2 if ndim == 3 else min(1, ndim - 1)
