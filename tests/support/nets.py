"""Nets whose signal is known, healthy ones and their layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from fusedshape import convert
from fusedshape.diagnose import CAUSES, Diagnosis
from fusedshape.init import init_module_
from fusedshape.kinds import kind_of


def mlp(depth: int, width: int = 64, inputs: int = 32) -> nn.Sequential:
    layers = [
        m for i in range(depth) for m in (nn.Linear(width if i else inputs, width), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def converted(net: nn.Module, **kwargs: Any) -> nn.Module:
    convert(net, **kwargs)
    return net


def initialised(net: nn.Module, **kwargs: Any) -> nn.Module:
    for m in net.modules():
        if kind_of(m):
            init_module_(m, **kwargs)
    return net


def assert_finds(found: Diagnosis, cause: str, path: str) -> None:
    """The first finding has this cause, and begins at this layer."""
    assert cause in CAUSES
    assert not found.agrees
    assert (found.cause, found.path) == (cause, path), str(found)
    assert f"1. {cause} at {path!r}" in str(found)
