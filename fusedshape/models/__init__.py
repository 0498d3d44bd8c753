"""Builders of vanilla networks: plain torch modules, ready for `fusedshape.convert`."""

from __future__ import annotations

from fusedshape.models.vanilla import vanilla_convnet, vanilla_mlp, vanilla_resnet, vanilla_vgg16

__all__ = ["vanilla_convnet", "vanilla_mlp", "vanilla_resnet", "vanilla_vgg16"]
