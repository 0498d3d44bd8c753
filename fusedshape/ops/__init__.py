"""Fused ops as PyTorch sees them: checked, differentiable, compiled, autocast."""

from __future__ import annotations

from fusedshape.ops.conv import conv_act
from fusedshape.ops.linear import linear_act
from fusedshape.ops.pointwise import bias_act, shaped_act

__all__ = ["bias_act", "conv_act", "linear_act", "shaped_act"]
