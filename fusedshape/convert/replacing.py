"""Puts new modules in the place of old ones, with the mode and the hooks of what they replace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from fusedshape.convert.fusion import HOOKS

_Module = TypeVar("_Module", bound=nn.Module)
_HOOK_FLAGS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


def like(old: nn.Module, new: _Module) -> _Module:
    """Give a replacement the mode and the hooks of what it replaces."""
    new.training = old.training
    for name in (*HOOKS, *_HOOK_FLAGS):
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    return new


def swap(parents: Iterable[nn.Module], swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Put each module's replacement wherever one of some parents holds it."""
    for parent in parents:
        for name, child in parent._modules.items():
            if child is not None and child in swaps:
                parent._modules[name] = swaps[child]
