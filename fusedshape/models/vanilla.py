"""Straight chains of plain layers and nn.ReLU: no normalisation, no skip connections."""

from __future__ import annotations

from torch import nn

from fusedshape.validate import integer

VGG16_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def vanilla_convnet(
    depth: int,
    width: int = 32,
    in_channels: int = 2,
    num_classes: int = 10,
    pool_after: int | None = None,
) -> nn.Sequential:
    """`depth` times 3×3 convolution and ReLU, one average pool by 2, global average pool, head.

    Args:
        depth: number of nonlinear layers, L of the theory.
        width: channels of every hidden layer.
        in_channels: channels of the input; `fusedshape.nn.PerLocationNorm` before the net adds one.
        num_classes: outputs of the head.
        pool_after: layers before the 2×2 average pool, of stride 2; None takes a third of them,
            0 leaves the pool out.

    Returns:
        (N, in_channels, H, W) → (N, num_classes), with H, W ≥ 2.

    Raises:
        ValueError: a size below 1, or pool_after outside 0 … depth.

    Example:
        >>> import torch
        >>> net = vanilla_convnet(3, width=4)
        >>> sum(isinstance(m, nn.ReLU) for m in net), net(torch.zeros(5, 2, 8, 8)).shape
        (3, torch.Size([5, 10]))
    """
    positive("vanilla_convnet", depth=depth, width=width, in_channels=in_channels)
    positive("vanilla_convnet", num_classes=num_classes)
    pool_after = max(depth // 3, 1) if pool_after is None else pool_after
    if not 0 <= integer("vanilla_convnet", "pool_after", pool_after, -(2**70)) <= depth:
        raise ValueError(f"vanilla_convnet: pool_after={pool_after} is outside 0 … depth={depth}")
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else in_channels, width, 3, padding=1), nn.ReLU()]
        if i + 1 == pool_after:
            layers.append(nn.AvgPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
    )


def vanilla_mlp(
    depth: int, width: int = 128, in_features: int = 128, num_classes: int = 10
) -> nn.Sequential:
    """`depth` times linear layer and ReLU, then the head; flattens its input.

    Args:
        depth: number of nonlinear layers, L of the theory.
        width: features of every hidden layer.
        in_features: numbers per example.
        num_classes: outputs of the head.

    Returns:
        (N, …) with in_features numbers each → (N, num_classes).

    Raises:
        ValueError: a size below 1.

    Example:
        >>> import torch
        >>> vanilla_mlp(2, width=4, in_features=6)(torch.zeros(5, 6)).shape
        torch.Size([5, 10])
    """
    positive("vanilla_mlp", depth=depth, width=width, in_features=in_features)
    positive("vanilla_mlp", num_classes=num_classes)
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(width if i else in_features, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def vanilla_vgg16(num_classes: int = 1000, in_channels: int = 3) -> nn.Sequential:
    """VGG-16: thirteen 3×3 convolutions in five stages, each ended by a max pool, and three linear.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the input; `fusedshape.nn.PerLocationNorm` before the net adds one.

    Returns:
        (N, in_channels, H, W) → (N, num_classes), with H, W ≥ 32; 15 nonlinear layers.

    Raises:
        ValueError: a size below 1.

    Source: Simonyan and Zisserman 2015, arXiv 1409.1556, configuration D, without dropout.

    Example:
        >>> import torch
        >>> with torch.device("meta"):  # takes no memory
        ...     net = vanilla_vgg16()
        >>> sum(isinstance(m, nn.ReLU) for m in net), sum(p.numel() for p in net.parameters())
        (15, 138357544)
    """
    positive("vanilla_vgg16", num_classes=num_classes, in_channels=in_channels)
    layers: list[nn.Module] = []
    channels = in_channels
    for width, convolutions in VGG16_STAGES:
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(49 * channels, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, num_classes))


def positive(name: str, **sizes: int) -> None:
    """Raise unless each size is an int, from 1 to 2³¹ − 1."""
    for key, value in sizes.items():
        if integer(name, key, value, -(2**70), 2**31 - 1) < 1:
            raise ValueError(f"{name}: {key}={value} must be at least 1")
