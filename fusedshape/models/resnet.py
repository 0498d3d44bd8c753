"""ResNets without normalisation: the branches alone, or joined by normalised sums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from torch import Tensor, nn

from fusedshape.models.vanilla import positive
from fusedshape.nn import NormalizedSum
from fusedshape.theory.network import RESNET_BLOCKS
from fusedshape.validate import real, shown

#: From this depth on a block is 1×1, 3×3, 1×1, before it 3×3, 3×3.
BOTTLENECKS = 50
#: How the image is halved: by the 3×3 convolution's stride, or by an average pool before it.
Downsample = Literal["stride", "pool"]


class Block(NamedTuple):
    """The sizes of a block.

    Attributes:
        channels: of the input.
        inner: of its 3×3 convolutions.
        out: of the output.
        bottleneck: whether it is 1×1, 3×3, 1×1 rather than 3×3, 3×3.
        halves: whether its first 3×3 convolution halves the image.
        downsample: how.
    """

    channels: int
    inner: int
    out: int
    bottleneck: bool
    halves: bool
    downsample: Downsample

    def layers(self) -> list[list[nn.Module]]:
        """Its convolutions, each behind the pool that belongs to it."""
        if not self.bottleneck:
            first = self._spatial(self.channels, self.inner)
            return [first, [nn.Conv2d(self.inner, self.out, 3, padding=1)]]
        narrow, wide = nn.Conv2d(self.channels, self.inner, 1), nn.Conv2d(self.inner, self.out, 1)
        return [[narrow], self._spatial(self.inner, self.inner), [wide]]

    def projection(self) -> nn.Module | None:
        """The shortcut's convolution, where the sizes of input and output differ."""
        if not self.halves:
            same = self.channels == self.out
            return None if same else nn.Conv2d(self.channels, self.out, 1)
        if self.downsample == "pool":
            return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(self.channels, self.out, 1))
        return nn.Conv2d(self.channels, self.out, 1, stride=2)

    def _spatial(self, channels: int, out: int) -> list[nn.Module]:
        if self.halves and self.downsample == "pool":
            return [nn.AvgPool2d(2), nn.Conv2d(channels, out, 3, padding=1)]
        return [nn.Conv2d(channels, out, 3, stride=1 + self.halves, padding=1)]


class RescaledBlock(nn.Module):
    """Pre-activation ("v2") residual block, y = w·shortcut(x) + √(1−w²)·branch(relu(x)).

    The shortcut is x itself or, where the block changes the image's or the channels' number, a 1×1
    convolution of relu(x).

    Args:
        block: its sizes.
        shortcut_weight: w, 0 ≤ w ≤ 1.
    """

    def __init__(self, block: Block, shortcut_weight: float) -> None:
        super().__init__()
        first, *more = block.layers()
        self.relu = nn.ReLU()
        self.branch = nn.Sequential(*first, *(m for part in more for m in (nn.ReLU(), *part)))
        self.projection = block.projection()
        self.sum = NormalizedSum.shortcut(shortcut_weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, H, W) → (N, out, H, W), or half of H and W where the block halves."""
        activated = self.relu(x)
        shortcut = x if self.projection is None else self.projection(activated)
        return self.sum(shortcut, self.branch(activated))


def vanilla_resnet(
    depth: int = 50,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: int = 64,
    *,
    widen: int = 1,
    downsample: Downsample = "stride",
) -> nn.Sequential:
    """The residual branches of a pre-activation ("v2") ResNet, one after the other.

    Stem 7×7 convolution of stride 2, 3×3 max pool of stride 2, blocks of ReLU and convolution, a
    last ReLU, global average pool and head. ResNet-50 has 49 nonlinear layers. In "v1" a ReLU
    stands behind its convolution; without shortcuts that is the same chain, but for the stem's
    ReLU, which it has before the pool.

    Args:
        depth: 18, 34 (two 3×3 convolutions a block), 50, 101, 152 or 200 (1×1, 3×3, 1×1).
        num_classes: outputs of the head.
        in_channels: channels of the input; `fusedshape.nn.PerLocationNorm` before the net adds one.
        width: channels of the stem, and of the first stage's 3×3 convolutions.
        widen: the 3×3 convolutions of all stages are so many times wider, as in Wide ResNets.
        downsample: how a stage begins: "stride", its first 3×3 convolution has stride 2; or "pool",
            a 2×2 average pool stands before it.

    Returns:
        (N, in_channels, H, W) → (N, num_classes).

    Raises:
        ValueError: an unknown depth, a size below 1, or an unknown downsample.

    Source: the wiring of He et al. 2016, arXiv 1603.05027, without shortcuts and normalisation;
    Zagoruyko and Komodakis 2016, arXiv 1605.07146, for the width.

    Example:
        >>> net = vanilla_resnet(50, width=4)
        >>> sum(isinstance(m, nn.ReLU) for m in net)
        49
    """
    blocks = _blocks("vanilla_resnet", depth, width, widen, downsample)
    positive("vanilla_resnet", num_classes=num_classes, in_channels=in_channels)
    layers = _stem(in_channels, width)
    for block in blocks:
        layers += [m for part in block.layers() for m in (nn.ReLU(), *part)]
    return nn.Sequential(*layers, *_end(blocks[-1].out, num_classes))


def rescaled_resnet(
    depth: int = 50,
    shortcut_weight: float = 0.8,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: int = 64,
    *,
    widen: int = 1,
    downsample: Downsample = "stride",
) -> nn.Sequential:
    r"""Pre-activation ResNet without normalisation layers, its sums normalised with weight w.

    `fusedshape.theory.network.resnet` is its wiring. With w = 0 it computes what `vanilla_resnet`
    does, and its projections go unused.

    Args:
        depth: as in `vanilla_resnet`.
        shortcut_weight: w, 0 ≤ w ≤ 1.
        num_classes: as in `vanilla_resnet`.
        in_channels: as in `vanilla_resnet`.
        width: as in `vanilla_resnet`.
        widen: as in `vanilla_resnet`.
        downsample: as in `vanilla_resnet`, for the shortcuts, too.

    Returns:
        (N, in_channels, H, W) → (N, num_classes).

    Raises:
        ValueError: as `vanilla_resnet`, or w outside 0 … 1.

    Source: the wiring of He et al. 2016, arXiv 1603.05027; rescaled as in Martens et al. 2021,
    arXiv 2110.01765, and Zhang et al. 2022, arXiv 2203.08120.

    Example:
        >>> from fusedshape import convert
        >>> convert(rescaled_resnet(18, 0.5, width=4), method="DKS", activation="softplus").depth
        17
    """
    if not 0 <= real("rescaled_resnet", "shortcut_weight", shortcut_weight) <= 1:
        raise ValueError(f"rescaled_resnet: shortcut_weight={shortcut_weight} is outside 0 … 1")
    blocks = _blocks("rescaled_resnet", depth, width, widen, downsample)
    positive("rescaled_resnet", num_classes=num_classes, in_channels=in_channels)
    layers = _stem(in_channels, width)
    layers += [RescaledBlock(block, shortcut_weight) for block in blocks]
    return nn.Sequential(*layers, *_end(blocks[-1].out, num_classes))


def _blocks(
    who: str, depth: int, width: int, widen: int, downsample: Downsample
) -> tuple[Block, ...]:
    """The sizes of all blocks.

    Raises:
        ValueError: an unknown depth or downsample, or a size below 1.
    """
    if type(depth) is not int or depth not in RESNET_BLOCKS:
        raise ValueError(f"{who}: depth={shown(depth)}; known: {sorted(RESNET_BLOCKS)}")
    if downsample not in get_args(Downsample):
        known = ", ".join(map(repr, get_args(Downsample)))
        raise ValueError(f"{who}: downsample={shown(downsample)}; known: {known}")
    positive(who, width=width, widen=widen)
    return tuple(_sizes(depth, width, widen, downsample))


def _sizes(depth: int, width: int, widen: int, downsample: Downsample) -> Iterator[Block]:
    bottleneck = depth >= BOTTLENECKS
    channels = width
    for stage, count in enumerate(RESNET_BLOCKS[depth]):
        inner = width * 2**stage
        out = 4 * inner if bottleneck else inner * widen
        for i in range(count):
            halves = stage > 0 and i == 0
            yield Block(channels, inner * widen, out, bottleneck, halves, downsample)
            channels = out


def _stem(in_channels: int, width: int) -> list[nn.Module]:
    first = nn.Conv2d(in_channels, width, 7, stride=2, padding=3)
    return [first, nn.MaxPool2d(3, stride=2, padding=1)]


def _end(channels: int, num_classes: int) -> list[nn.Module]:
    pool = nn.AdaptiveAvgPool2d(1)
    return [nn.ReLU(), pool, nn.Flatten(), nn.Linear(channels, num_classes)]
