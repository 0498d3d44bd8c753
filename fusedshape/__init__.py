"""Deep vanilla networks in PyTorch: shaped activations, fused with the layers before them."""

from __future__ import annotations

from fusedshape.activations import ACTIVATIONS
from fusedshape.spec import ActSpec

__all__ = ["ACTIVATIONS", "ActSpec"]
