"""Residual networks whose sums are normalised: the rescaled ResNets of the DKS and TAT papers."""

from __future__ import annotations

from torch import Tensor, nn

from fusedshape.models.vanilla import positive
from fusedshape.nn import NormalizedSum
from fusedshape.validate import real, shown

STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


class RescaledBlock(nn.Module):
    """Pre-activation ("v2") residual block, y = w·shortcut(x) + √(1−w²)·branch(relu(x)).

    The shortcut is x itself or, where the block changes stride or channels, a 1×1 convolution of
    relu(x).

    Args:
        channels: of the input.
        inner: of the branch.
        out: of the output.
        stride: of the branch's first 3×3 convolution, and of the shortcut.
        bottleneck: whether the branch is 1×1, 3×3, 1×1 rather than 3×3, 3×3.
        shortcut_weight: w, 0 ≤ w ≤ 1.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        out: int,
        stride: int,
        bottleneck: bool,
        shortcut_weight: float,
    ) -> None:
        super().__init__()
        spatial = nn.Conv2d(inner if bottleneck else channels, inner, 3, stride, padding=1)
        layers: list[nn.Module] = [spatial, nn.ReLU(), nn.Conv2d(inner, out, 3, padding=1)]
        if bottleneck:
            first, last = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, out, 1)
            layers = [first, nn.ReLU(), spatial, nn.ReLU(), last]
        self.relu = nn.ReLU()
        self.branch = nn.Sequential(*layers)
        self.projection: nn.Module | None = None
        if stride != 1 or channels != out:
            self.projection = nn.Conv2d(channels, out, 1, stride)
        self.sum = NormalizedSum.shortcut(shortcut_weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, H, W) → (N, out, H / stride, W / stride)."""
        activated = self.relu(x)
        shortcut = x if self.projection is None else self.projection(activated)
        return self.sum(shortcut, self.branch(activated))


def rescaled_resnet(
    depth: int = 50,
    shortcut_weight: float = 0.8,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: int = 64,
) -> nn.Sequential:
    r"""Pre-activation ResNet without normalisation layers, its sums normalised with weight w.

    Stem 7×7 convolution of stride 2, 3×3 max pool of stride 2, four stages of blocks, a last ReLU,
    global average pool and head. `fusedshape.theory.network.resnet` is its wiring. With w = 0 it
    computes what `vanilla_resnet` does, and its projections go unused.

    Args:
        depth: 18, 34 (two 3×3 convolutions a block), 50, 101, 152 or 200 (bottlenecks).
        shortcut_weight: w, 0 ≤ w ≤ 1.
        num_classes: outputs of the head.
        in_channels: channels of the input; `fusedshape.nn.PerLocationNorm` before the net adds one.
        width: channels of the stem, and of the first stage's 3×3 convolutions.

    Returns:
        (N, in_channels, H, W) → (N, num_classes).

    Raises:
        ValueError: an unknown depth, a size below 1, or w outside 0 … 1.

    Source: the wiring of He et al. 2016, arXiv 1603.05027; rescaled as in Martens et al. 2021,
    arXiv 2110.01765, and Zhang et al. 2022, arXiv 2203.08120.

    Example:
        >>> from fusedshape import convert
        >>> convert(rescaled_resnet(18, 0.5, width=4), method="DKS", activation="softplus").depth
        17
    """
    if not 0 <= real("rescaled_resnet", "shortcut_weight", shortcut_weight) <= 1:
        raise ValueError(f"rescaled_resnet: shortcut_weight={shortcut_weight} is outside 0 … 1")
    if type(depth) is not int or depth not in STAGES:
        raise ValueError(f"rescaled_resnet: depth={shown(depth)}; known: {sorted(STAGES)}")
    positive("rescaled_resnet", num_classes=num_classes, in_channels=in_channels, width=width)
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, width, 7, stride=2, padding=3),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    channels = width
    for stage, blocks in enumerate(STAGES[depth]):
        inner = width * 2**stage
        out = 4 * inner if depth >= 50 else inner
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(RescaledBlock(channels, inner, out, stride, depth >= 50, shortcut_weight))
            channels = out
    return nn.Sequential(
        *layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )
