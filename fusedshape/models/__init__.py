"""Builders of vanilla and rescaled networks of plain layers, ready for `fusedshape.convert`."""

from __future__ import annotations

from fusedshape.models.resnet import rescaled_resnet, vanilla_resnet
from fusedshape.models.vanilla import vanilla_convnet, vanilla_mlp, vanilla_vgg16

__all__ = [
    "rescaled_resnet",
    "vanilla_convnet",
    "vanilla_mlp",
    "vanilla_resnet",
    "vanilla_vgg16",
]
