"""The optional arguments of `conv_act` and `linear_act`, as values."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusedshape.ops.checks import Size


class Moves(NamedTuple):
    """How a convolution moves over its input, as `conv_act` is told.

    Attributes:
        stride: as in `conv_act`, and so are the next four.
        padding: of both sides, or a word.
        dilation: distance of taps.
        groups: number of groups.
        padding_mode: what is padded with.
    """

    stride: Size = 1
    padding: Size | str = 0
    dilation: Size = 1
    groups: int = 1
    padding_mode: str = "zeros"


class Options(NamedTuple):
    """What computes a layer, and what joins it.

    Attributes:
        backend: as in `conv_act`, and so are the next three.
        engine: of the layer.
        residual: what joins before the activation; None for a plain layer.
        residual_weight: its weight.
    """

    backend: str = "auto"
    engine: str = "auto"
    residual: Tensor | None = None
    residual_weight: float | None = None
