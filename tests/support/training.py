"""Data that a small net learns in a few steps."""

from __future__ import annotations

import torch

from fusedshape.train import Data

#: For `TrainConfig.data`.
BLOBS = f"{__name__}:blobs"


def blobs() -> Data:
    """Four classes that differ in which quarter of the image is bright."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 4
    x = 0.3 * torch.randn(96, 1, 4, 4, generator=g)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 2 * (label // 2) : 2 * (label // 2) + 2, 2 * (label % 2) : 2 * (label % 2) + 2] += 2
    return Data(x[:64], y[:64], x[64:], y[64:], num_classes=4)
