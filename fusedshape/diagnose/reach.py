"""How many positions of the input the output depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_FEW = 4  # inputs whose gradient is taken


def reach(
    model: nn.Module, args: Any, kwargs: Any, size: int, dims: Sequence[int]
) -> tuple[int, int]:
    """How many positions of the input the output depends on, and how many there are.

    One forward and one backward pass of a few inputs; no gradient is left anywhere.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        size: number of inputs.
        dims: where the channels are of each floating tensor among them.

    Raises:
        RuntimeError: the model cannot be differentiated with respect to its inputs.
    """
    few = min(size, _FEW)
    leaves: list[Tensor] = []

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        t = t[:few] if t.ndim and len(t) == size else t
        if not t.is_floating_point():
            return t
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a leaf cannot be written to in place

    with torch.enable_grad():
        args, kwargs = pytree.tree_map(leaf, (args, kwargs))
        out = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
        out = [t for t in out if t.requires_grad]
        if not out:
            raise RuntimeError("its output has no gradient")
        # Random, so that outputs whose sum is fixed, as a softmax's, have a gradient too.
        generator = torch.Generator().manual_seed(0)
        along = [torch.randn(t.shape, generator=generator).to(t) for t in out]
        grads = torch.autograd.grad(out, leaves, along, allow_unused=True)
    seen = total = 0
    for grad, t, dim in zip(grads, leaves, dims, strict=True):
        others = (0, dim)
        count = math.prod(s for d, s in enumerate(t.shape) if d not in others)
        total += count
        if grad is not None:
            seen += int((grad != 0).sum(others).count_nonzero())
    return seen, total
