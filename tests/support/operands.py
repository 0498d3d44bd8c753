"""Tensors for the ops, and the specs that save their output or their input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.support.specs import shaped

LEAKY = shaped("leaky_relu")  # saves its output
SWISH = shaped("swish")  # saves its input
F32, F64 = torch.float32, torch.float64


def draw(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """Standard normal numbers: the same ones in every dtype, rounded once."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def last(x: Tensor) -> Tensor:
    """The same numbers with channels innermost, whatever the number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def nodes(out: Tensor) -> Iterator[Any]:
    """The nodes of the graph that made a tensor."""
    left, seen = [out.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        left += [n for n, _ in node.next_functions]
