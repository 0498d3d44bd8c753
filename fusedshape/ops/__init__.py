"""Fused ops as PyTorch sees them: checked, differentiable, compiled, autocast."""

from __future__ import annotations

from fusedshape.ops import flops
from fusedshape.ops.chain import ChainLayer, conv_chain
from fusedshape.ops.conv import conv_act
from fusedshape.ops.linear import linear_act
from fusedshape.ops.pointwise import bias_act, shaped_act

__all__ = ["ChainLayer", "bias_act", "conv_act", "conv_chain", "linear_act", "shaped_act"]

flops.install()
