"""Deep vanilla networks in PyTorch: shaped activations, fused with the layers before them."""

from __future__ import annotations

from fusedshape import init, theory, tuning
from fusedshape.activations import ACTIVATIONS
from fusedshape.convert import convert
from fusedshape.diagnose import diagnose
from fusedshape.explain import explain
from fusedshape.fold import fold
from fusedshape.kinds import register_layer
from fusedshape.nn import (
    NormalizedSum,
    PerLocationNorm,
    ShapedActivation,
    ShapedChain,
    ShapedConv1d,
    ShapedConv2d,
    ShapedConv3d,
    ShapedLinear,
)
from fusedshape.ops import (
    ChainLayer,
    bias_act,
    conv_act,
    conv_chain,
    linear_act,
    shaped_act,
)
from fusedshape.shortcuts import reweight_shortcuts
from fusedshape.spec import ActSpec
from fusedshape.tap import tap
from fusedshape.theory import DKS, EOC, TAT
from fusedshape.unfuse import fuse, unfuse

__version__ = "0.1.0"
__all__ = [
    "ACTIVATIONS",
    "DKS",
    "EOC",
    "TAT",
    "ActSpec",
    "ChainLayer",
    "NormalizedSum",
    "PerLocationNorm",
    "ShapedActivation",
    "ShapedChain",
    "ShapedConv1d",
    "ShapedConv2d",
    "ShapedConv3d",
    "ShapedLinear",
    "bias_act",
    "conv_act",
    "conv_chain",
    "convert",
    "diagnose",
    "explain",
    "fold",
    "fuse",
    "init",
    "linear_act",
    "register_layer",
    "reweight_shortcuts",
    "shaped_act",
    "tap",
    "theory",
    "tuning",
    "unfuse",
]
