"""Plans: what Python checked and chose for a call, so that C++ alone computes the next one like it.

A call is known again by the shapes, strides and dtypes of its tensors and by its other arguments.
The extension of csrc/host keeps the plans, and each layer of one is a single node of autograd in
C++. It hands a call back to Python wherever something watches or changes what operators do: modes,
transforms, tracers, autocast, forward-mode AD, and tensors of other classes; and Python computes
what is differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedshape import native
from fusedshape.ops.apart import is_apart
from fusedshape.ops.checks import Geometry
from fusedshape.ops.choice import engines_for, steady
from fusedshape.ops.engines import ENGINES, PASSES
from fusedshape.ops.engines.protocol import Engines, LayerEngine
from fusedshape.ops.layer import Layer
from fusedshape.ops.passes import Kernels
from fusedshape.spec import ActSpec, is_half, saves_output

#: The extension's handle of a layer or pass; None where Python must compute the call.
Plan = Any
_PASS, _LINEAR, _CONV = range(3)  # csrc/host/step.h has the same
_ENGINES = ("aten", "native")  # and so with these
_steps: dict[Any, Plan] = {}


def run(planner: Callable[..., Plan], x: Any, weight: Any, bias: Any, *how: Any) -> Any:
    """What the plan of a call computes; None where Python must.

    Args:
        planner: makes the plan of a new call from the arguments after it, or raises what is wrong.
        x: the input.
        weight: of the layer; None for a pass.
        bias: of either; None for none.
        how: everything else that the plan depends on.
    """
    if torch.compiler.is_compiling():
        return None
    host = native.host()
    if host is None or is_apart() or not steady():
        return None
    return host.run(planner, x, weight, bias, *how)


@dataclass
class Recalled:
    """What a backward in Python reads on `ctx`, for a node that C++ made."""

    spec: ActSpec
    dim: int
    kernels: Kernels
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor | None, ...]
    bias_dtype: torch.dtype | None
    geometry: Geometry | None = None
    engines: Engines | None = None


def plan_of(
    x: Tensor,
    bias: Tensor | None,
    spec: ActSpec,
    kernels: Kernels,
    again: Callable[..., Any],
    place: int | tuple[Tensor, Geometry | None, str],
) -> Plan:
    """The plan of a checked layer, or of a pass.

    Args:
        x: the input.
        bias: the layer's or the pass's.
        spec: the constants.
        kernels: what runs the activation as a pass.
        again: computes backward in Python from a `Recalled` and the gradient.
        place: the channels' dimension for a pass; weight, geometry and engine asked for a layer.
    """
    if kernels is not PASSES.get("cpu") or kernels.name != "native" or is_half(x.dtype):
        return None
    geometry, engines, dim = None, None, 0
    if isinstance(place, int):
        kind, dim = _PASS, place
    else:
        weight, geometry, asked = place
        kind = _LINEAR if geometry is None else _CONV
        engines = engines_for(asked, x, Layer(weight, bias, spec, geometry, kernels))
        if not all(map(_is_known, engines)):
            return None
    bias_dtype = None if bias is None else bias.dtype
    sizes: tuple[Any, ...] = (), (), ()
    groups = 1
    if geometry is not None:
        sizes, groups = tuple(map(tuple, geometry[:3])), geometry.groups
    numbers = (0, 0, 0) if engines is None else tuple(_ENGINES.index(e.name) for e in engines)
    from_output = saves_output(spec, x.dtype)
    own = kind, spec, from_output, dim, sizes, groups, numbers, bias_dtype
    if (found := _steps.get((own, again))) is None:
        how = partial(_again, again, spec, dim, kernels, geometry, engines, bias_dtype)
        wide = bias_dtype == torch.float64
        values = kind, spec.kernel_args, from_output, dim, sizes, groups, numbers
        found = native.host().step(*values, bias is not None, wide, how)
        _steps[own, again] = found
    return found


def _is_known(engine: LayerEngine) -> bool:
    return engine.name in _ENGINES and ENGINES[engine.name] is engine


def _again(
    backward: Callable[..., Any],
    spec: ActSpec,
    dim: int,
    kernels: Kernels,
    geometry: Geometry | None,
    engines: Engines | None,
    bias_dtype: torch.dtype | None,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor,
    bias: Tensor | None,
    wanted: tuple[int, int, int],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias."""
    want_x, want_weight, want_bias = map(bool, wanted)
    if engines is None:
        needs: tuple[bool, ...] = want_x, want_bias
        kept: tuple[Tensor | None, ...] = saved, bias
    else:
        needs, kept = (want_x, want_weight, want_bias), (x, weight, saved, bias)
        dim = 1 if geometry is not None else saved.ndim - 1
    ctx = Recalled(spec, dim, kernels, needs, kept, bias_dtype, geometry, engines)
    dx, *rest = backward(ctx, grad)
    return (dx, None, rest[0]) if engines is None else (dx, rest[0], rest[1])
