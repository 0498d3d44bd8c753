"""Save the numbers of a tensor just before the first operation that writes to it.

So a model that writes to none of its parameters is run without a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fusedshape.undo import UndoLog


class Guard(TorchDispatchMode):
    """Saves watched tensors whose memory an operation is about to write to."""

    def __init__(self, log: UndoLog) -> None:
        super().__init__()
        self.log = log
        self.watched: dict[int, list[tuple[str, Tensor]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the first operation imports Dynamo, which takes seconds

    def watch(self, tensor: Tensor, name: str) -> None:
        """Save this tensor's numbers before they are written to."""
        address = _address(tensor)
        if address:
            self.watched.setdefault(address, []).append((name, tensor.detach()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, after its targets have been saved."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = args[i] if i < len(args) else kwargs.get(argument.name)
                    for target in _tensors(given):
                        for name, tensor in self.watched.pop(_address(target), ()):
                            self.log.tensor(tensor, name)
        return func(*args, **kwargs)


@contextmanager
def unwatched() -> Iterator[None]:
    """Hide operations from every dispatch mode: for those of this library that write to no model.

    A mode takes longer over an operation than a small tensor takes to be computed.
    """
    with _disable_current_modes():
        yield


def save_place(tensor: Tensor, name: str, log: UndoLog) -> None:
    """Save in which memory a tensor lies, whether it requires grad, and its gradient."""
    data, requires_grad = tensor.detach(), tensor.requires_grad
    place = _place(tensor)
    grad = tensor.grad if tensor.is_leaf else None

    def put_back() -> None:
        if _place(tensor) != place:
            tensor.data = data
        if tensor.is_leaf:
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.grad is not grad:
                tensor.grad = grad

    log.save(name, put_back)


def _address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 if it has none."""
    if isinstance(tensor, FakeTensor):
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where and how a tensor lies in memory."""
    where = _address(tensor)
    if not where:
        return tensor.dtype, tensor.device, tensor.shape
    return where, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
