"""The fused layers of a model, and what each is asked to compute."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from fusedshape.ops.problem import Direction, Problem, problem_of
from fusedshape.tuning.calls import Call, Inputs, check_ready, each_call


class Layer(NamedTuple):
    """One call of a fused layer.

    Attributes:
        path: the module's name in the model.
        problem: the layer and its input.
        directions: what a training step computes: dgrad only where the input wants a gradient.
    """

    path: str
    problem: Problem
    directions: tuple[Direction, ...]


def fused_layers(model: nn.Module, *inputs: Any, **named: Any) -> list[Layer]:
    """Run a model once and say what its fused layers were asked for, in the order of the calls.

    Nothing is computed where the model can do with fake numbers; only shapes are.

    Args:
        model: with ShapedConv1d/2d/3d or ShapedLinear in it, as `fusedshape.convert` leaves them.
        inputs: what the model is called with.
        named: the same by name.

    Returns:
        A layer for each call of one.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: there is no fused layer in the model, none is called, or a parameter is lazy.

    Example:
        >>> import torch
        >>> from fusedshape import ActSpec, ShapedLinear
        >>> model = nn.Sequential(ShapedLinear(8, 4, spec=ActSpec("tanh")))
        >>> [(layer.path, layer.directions) for layer in fused_layers(model, torch.zeros(2, 8))]
        [('0', ('fprop', 'wgrad'))]
    """
    check_ready("fused_layers", model)
    return each_call(model, Inputs(inputs, named), _layer)


def _layer(call: Call) -> Layer:
    return Layer(call.path, problem_of(call.x, call.layer), call.directions)
