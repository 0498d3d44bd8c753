"""Models whose wiring is well known: own copies, small in width, their depth and blocks in full."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape.nn import NormalizedSum

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class Plus(nn.Module):
    """The sum as it is usually written: not normalised."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def join(weight: float | None) -> nn.Module:
    return Plus() if weight is None else NormalizedSum.shortcut(weight)


def conv(i: int, o: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups)


class BlockV1(nn.Module):
    """Activation after the sum, as in torchvision."""

    def __init__(self, i: int, o: int, stride: int, deep: bool, weight: float | None) -> None:
        super().__init__()
        inner = o // 4 if deep else o
        self.conv1 = conv(i, inner, 1, 1) if deep else conv(i, inner, 3, stride)
        self.conv2 = conv(inner, inner, 3, stride if deep else 1)
        self.conv3 = conv(inner, o, 1) if deep else None
        self.relu = nn.ReLU(inplace=True)
        self.downsample = conv(i, o, 1, stride) if stride > 1 or i != o else None
        self.join = join(weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        if self.conv3 is not None:
            out = self.conv3(self.relu(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.join(shortcut, out))


class BlockV2(BlockV1):
    """Activation before every convolution; a projected shortcut shares the first one."""

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(x)
        shortcut = x if self.downsample is None else self.downsample(active)
        out = self.conv2(torch.relu(self.conv1(active)))
        if self.conv3 is not None:
            out = self.conv3(torch.relu(out))
        return self.join(shortcut, out)


class ResNet(nn.Module):
    """ResNet 18 to 152, version 1 or 2; its shortcuts weigh `weight`, or stay ``x + f(x)``."""

    def __init__(self, depth: int, version: int = 1, weight: float | None = None) -> None:
        super().__init__()
        deep = depth >= 50
        block = BlockV1 if version == 1 else BlockV2
        self.conv1, self.relu = nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.version = version
        stages, i = [], 4
        for group, count in enumerate(BLOCKS[depth]):
            o = (16 if deep else 4) << min(group, 1)
            stages.append(nn.Sequential())
            for n in range(count):
                stages[-1].append(block(i, o, 1 + (n == 0 and group > 0), deep, weight))
                i = o
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(i, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.maxpool(self.relu(x) if self.version == 1 else x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.relu(x) if self.version == 2 else x
        return self.fc(torch.flatten(self.avgpool(x), 1))


class VGG16(nn.Module):
    """VGG with 13 convolutions and three linear layers: 15 activations in a chain."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        i = 3
        for o, count in ((4, 2), (4, 2), (8, 3), (8, 3), (8, 3)):
            for _ in range(count):
                layers += [conv(i, o), nn.ReLU(inplace=True)]
                i = o
            layers.append(nn.MaxPool2d(2))
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(nn.Linear(8 * 49, 16), nn.ReLU(True), nn.Dropout()),
            *(nn.Linear(16, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class DenseLayer(nn.Module):
    """Takes a list of features, as torchvision's does."""

    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(i, 2 * growth, 1), conv(2 * growth, growth)

    def forward(self, features: list[Tensor] | Tensor) -> Tensor:
        features = [features] if isinstance(features, Tensor) else features
        x = self.conv1(F.relu(torch.cat(features, 1)))
        return self.conv2(F.relu(x))


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, i: int, growth: int) -> None:
        super().__init__({f"layer{n}": DenseLayer(i + n * growth, growth) for n in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Two dense blocks of three layers each, and the transition between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.block1, self.block2 = DenseBlock(3, 6, 4), DenseBlock(3, 9, 4)
        self.transition = nn.Sequential(nn.ReLU(), conv(18, 9, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(21, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(self.block1(self.stem(x)))
        return self.head(F.relu(self.block2(x)).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(scale * torch.ones(width))
        self.kept = (1 - scale**2) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        x = self.gamma * self.pwconv2(self.act(self.pwconv1(x)))
        return self.kept * shortcut + x.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Depthwise convolutions, LayerNorm, one GELU a block, and a layer scale."""

    def __init__(self, blocks: int = 3, scale: float = 0.8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(4, scale) for _ in range(blocks)))
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean([-2, -1]))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int, weight: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        w, v = self.weight, (1 - self.weight**2) ** 0.5
        x = w * x + v * self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return torch.add(w * x, self.channels(self.norm2(x)), alpha=v)


class Mixer(nn.Module):
    """MLP-Mixer: linear layers over tokens and over channels in turn."""

    def __init__(self, blocks: int = 2, weight: float = 0.6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.blocks = nn.ModuleList(MixerBlock(16, 6, weight) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class NormAct(nn.BatchNorm2d):
    """A BatchNorm that activates, too, as image models have it."""

    def __init__(self, width: int, act: nn.Module | None = None) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "needs images")
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum)
        return self.act(self.drop(x))


class NormActBlock(nn.Module):
    """A residual block that normalises and activates first, in place, and uses its input again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = NormAct(width), conv(width, width)
        self.norm2, self.conv2 = NormAct(width), conv(width, width)
        self.norm3 = NormAct(width, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.norm3(self.conv2(self.norm2(self.conv1(self.norm1(x))))) + x


class AssertsShapes(nn.Module):
    """Demands a shape. Here, because pytest writes the assertions of its test files anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        n, features = x.shape
        assert features == 6, f"{features} features"
        assert x.dim() == 2 and n > 1  # noqa: PT018
        return F.relu(self.layer(x)).view(n, 2, -1)


class V1(nn.Module):
    """torchvision's block: activation in place after the sum, with a downsample."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.relu(out)
        out = self.conv2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)

    def by_hand(self, x: Tensor, w: float) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        branch = self.conv2(self.conv1(x).relu())
        return (w * shortcut + math.sqrt(1 - w * w) * branch).relu()
