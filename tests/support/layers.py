"""Layers as engines are given them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fusedshape import ActSpec
from fusedshape.ops.checks import Geometry
from fusedshape.ops.dispatch import choose
from fusedshape.ops.layer import Layer


def layer_of(weight: Tensor, spec: ActSpec, geometry: Sequence[Any] | None = None) -> Layer:
    """A layer without bias; of a convolution, where there is a geometry."""
    how = None if geometry is None else Geometry(*geometry)
    return Layer(weight, None, spec, how, choose("auto", weight))
