"""The floating-point operations of our kernels, for torch.utils.flop_counter.

We count as torch does for its own convolutions and products: two for each multiplication with its
addition, including taps in the padding, without activations. `torch.utils.flop_counter` imports
Triton, so the formulas are registered when somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import math
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusedshape.ops import schema

_COUNTER = "torch.utils.flop_counter"


def _product(outputs: Sequence[int], weight: Sequence[int]) -> int:
    """Operations of a layer whose output has shape `outputs`, the same in every direction."""
    batch, _, *spatial = outputs
    return 2 * batch * math.prod(spatial) * math.prod(weight)


def _forward(
    x: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Sequence[int], **how: Any
) -> int:
    return _product(out_shape, weight)


def _dgrad(dz: Sequence[int], weight: Sequence[int], *rest: Any, **how: Any) -> int:
    return _product(dz, weight)


def _wgrad(
    dz: Sequence[int], x: Sequence[int], weight_size: Sequence[int], *rest: Any, **how: Any
) -> int:
    # torch counts as if every output channel read all input channels, even with groups.
    return _product(dz, [weight_size[0], x[1], *weight_size[2:]])


_FORMULAS: dict[str, Callable[..., int]] = {
    "conv": _forward,
    "conv_act": _forward,
    "conv_dgrad": _dgrad,
    "conv_wgrad": _wgrad,
}


def _register(counter: Any) -> None:
    for engine in schema.DEFINED:
        for name, formula in _FORMULAS.items():
            op = getattr(torch.ops.fusedshape, f"{engine}_{name}")
            counter.register_flop_formula(op)(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds torch's counter as Python does, and registers the formulas after it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: types.ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register the formulas, now or when torch's counter is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
