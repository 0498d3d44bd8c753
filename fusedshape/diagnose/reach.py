"""How many positions of the input the output depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_FEW = 4  # inputs for which the gradient is computed


def reach(
    model: nn.Module, args: Any, kwargs: Any, size: int, dims: Sequence[int]
) -> tuple[int, int]:
    """Count the positions of the input that the output depends on, and all positions.

    It takes one forward and one backward pass of a few inputs, and leaves no gradients behind.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        size: number of inputs.
        dims: the channel dimension of each floating tensor among the arguments.

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
        return leaves[-1].clone()  # an in-place write to a leaf is an error

    with torch.enable_grad():
        args, kwargs = pytree.tree_map(leaf, (args, kwargs))
        out = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
        out = [t for t in out if t.requires_grad]
        if not out:
            raise RuntimeError("its output has no gradient")
        # Random, because outputs with a fixed sum, as of a softmax, have no gradient along ones.
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
