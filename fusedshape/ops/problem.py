"""What the choice of an engine depends on: a layer's shapes, dtype, layout and activation."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fusedshape.compiling import constant_for_dynamo
from fusedshape.ops.checks import is_channels_last
from fusedshape.ops.layer import Layer
from fusedshape.spec import saves_output

#: "dgrad_act" is a dgrad that continues through the activation of the layer before.
Direction = Literal["fprop", "dgrad", "dgrad_act", "wgrad"]
DIRECTIONS: tuple[Direction, ...] = ("fprop", "dgrad", "dgrad_act", "wgrad")


class Problem(NamedTuple):
    """Everything that the choice of an engine may depend on; hashable.

    Attributes:
        device: type, "cuda" or "cpu".
        capability: compute capability of a CUDA device.
        dtype: of input and weight.
        input: shape of the layer's input.
        weight: shape of its weight; two dimensions are a linear layer.
        channels_last: whether the input is dense in memory with channels innermost.
        stride, padding, dilation: one number for each spatial dimension.
        groups: number of groups.
        activation: name of φ.
        saves_output: whether backward works from the layer's output.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    input: tuple[int, ...]
    weight: tuple[int, ...]
    channels_last: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    activation: str
    saves_output: bool


def problem_of(x: Tensor, layer: Layer) -> Problem:
    """Describe a layer and its input."""
    weight, _, spec, geometry, *_ = layer
    sizes = ([], [], []) if geometry is None else geometry[:3]
    stride, padding, dilation = map(tuple, sizes)
    return Problem(
        device=x.device.type,
        capability=_capability(x.device) if x.is_cuda else None,
        dtype=x.dtype,
        input=tuple(x.shape),
        weight=tuple(weight.shape),
        channels_last=x.is_contiguous() if geometry is None else is_channels_last(x),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=1 if geometry is None else geometry.groups,
        activation=spec.activation,
        saves_output=saves_output(spec, x.dtype),
    )


@constant_for_dynamo
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
