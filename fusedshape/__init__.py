"""Deep vanilla networks in PyTorch: shaped activations, fused with the layers before them."""

from __future__ import annotations

from fusedshape import init, theory
from fusedshape.activations import ACTIVATIONS
from fusedshape.convert import convert
from fusedshape.nn import (
    PerLocationNorm,
    ShapedActivation,
    ShapedConv1d,
    ShapedConv2d,
    ShapedConv3d,
    ShapedLinear,
)
from fusedshape.ops import bias_act, conv_act, linear_act, shaped_act
from fusedshape.spec import ActSpec

__version__ = "0.1.0"
__all__ = [
    "ACTIVATIONS",
    "ActSpec",
    "PerLocationNorm",
    "ShapedActivation",
    "ShapedConv1d",
    "ShapedConv2d",
    "ShapedConv3d",
    "ShapedLinear",
    "bias_act",
    "conv_act",
    "convert",
    "init",
    "linear_act",
    "shaped_act",
    "theory",
]
