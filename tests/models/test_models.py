"""Builders of models: their depth and shapes, plain layers only, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fusedshape import TAT, convert, diagnose
from fusedshape.models import (
    rescaled_resnet,
    vanilla_convnet,
    vanilla_mlp,
    vanilla_resnet,
    vanilla_vgg16,
)

PLAIN = (
    nn.Linear,
    nn.Conv2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
)


def tiny(builder: Callable[[], nn.Sequential]) -> nn.Sequential:
    with torch.device("meta"):
        return builder()


@pytest.mark.parametrize(
    ("build", "depth", "shape", "classes"),
    [
        (lambda: vanilla_convnet(7, width=4), 7, (2, 8, 8), 10),
        (lambda: vanilla_convnet(1, width=4, in_channels=3, num_classes=2), 1, (3, 8, 8), 2),
        (lambda: vanilla_convnet(3, width=4, pool_after=0), 3, (2, 9, 5), 10),
        (lambda: vanilla_mlp(5, width=8, in_features=12), 5, (3, 4), 10),
        (lambda: vanilla_resnet(18, width=8), 17, (3, 64, 64), 1000),
        (lambda: vanilla_resnet(34, downsample="pool"), 33, (3, 64, 64), 1000),
        (lambda: vanilla_resnet(50), 49, (3, 64, 64), 1000),
        (lambda: vanilla_resnet(50, widen=2), 49, (3, 64, 64), 1000),
        (lambda: vanilla_resnet(101, num_classes=7, in_channels=4), 100, (4, 64, 64), 7),
        (lambda: vanilla_resnet(152, width=8), 151, (3, 64, 64), 1000),
        (lambda: vanilla_vgg16(num_classes=5, in_channels=4), 15, (4, 32, 32), 5),
    ],
)
def test_depth_shapes_and_plain_layers(
    build: Callable[[], nn.Sequential], depth: int, shape: tuple[int, ...], classes: int
) -> None:
    model = tiny(build)
    assert sum(isinstance(m, nn.ReLU) for m in model) == depth
    assert all(isinstance(m, PLAIN) for m in model)
    assert len(set(model)) == len(model)  # no module is used twice
    out = model(torch.empty(2, *shape, device="meta"))
    assert out.shape == (2, classes)


def test_resnet_has_the_weights_of_the_published_one() -> None:
    """25.56 M less 2.77 M in projection shortcuts and 0.05 M in BatchNorm, plus 0.02 M biases."""
    model = tiny(lambda: vanilla_resnet(50))
    shortcuts = 64 * 256 + 256 * 512 + 512 * 1024 + 1024 * 2048
    published = 25_557_032 - shortcuts
    norms = 53_120 - 2 * (256 + 512 + 1024 + 2048)  # scales and shifts of the main path
    convs = [m for m in model if isinstance(m, nn.Conv2d)]
    biases = sum(m.bias.numel() for m in convs if m.bias is not None)
    ours = sum(p.numel() for p in model.parameters())
    assert ours - biases == published - norms - 2 * (256 + 512 + 1024 + 2048)


#: Parameters of torchvision's nets, less those of their BatchNorm layers: what stands in the paper.
PUBLISHED = {
    (18, 1): 11_689_512 - 9_600,
    (34, 1): 21_797_672 - 17_024,
    (50, 1): 25_557_032 - 53_120,
    (101, 1): 44_549_160 - 105_344,
    (152, 1): 60_192_808 - 151_424,
    (50, 2): 68_883_240 - 68_224,
}


@pytest.mark.parametrize("downsample", ["stride", "pool"])
@pytest.mark.parametrize(("depth", "widen"), PUBLISHED)
def test_rescaled_resnets_have_the_weights_of_the_published_ones(
    depth: int, widen: int, downsample: Literal["stride", "pool"]
) -> None:
    with torch.device("meta"):
        model = rescaled_resnet(depth, widen=widen, downsample=downsample)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    biases = sum(m.bias.numel() for m in convs if m.bias is not None)
    ours = sum(p.numel() for p in model.parameters()) - biases
    assert ours == PUBLISHED[depth, widen]
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("downsample", ["stride", "pool"])
@pytest.mark.parametrize("depth", [18, 50])
def test_resnets_halve_in_one_way_or_the_other(
    depth: int, downsample: Literal["stride", "pool"]
) -> None:
    how: dict[str, Any] = {"num_classes": 5, "width": 8, "downsample": downsample}
    for model in (vanilla_resnet(depth, **how), rescaled_resnet(depth, 0.6, **how)):
        strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        pools = [m for m in model.modules() if isinstance(m, nn.AvgPool2d)]
        assert (len(strided) > 1) == (downsample == "stride")
        assert bool(pools) == (downsample == "pool")
        report = convert(model, TAT("tanh", clamp=True))
        assert report.depth == depth - 1
        assert report.counts["fused"] > 0
        verdict = diagnose(model, torch.randn(4, 3, 64, 64)).verdict
        # Under Delta initialisation a strided layer reads one position in four; the stem is one.
        assert verdict.startswith("lost positions at '0'")
        assert ("more)" in verdict) == (downsample == "stride")


@pytest.mark.parametrize(("depth", "pool_after", "size"), [(6, None, 2), (6, 5, 5), (1, None, 1)])
def test_convnet_pools_where_told(depth: int, pool_after: int | None, size: int) -> None:
    model = vanilla_convnet(depth, width=2, pool_after=pool_after)
    sizes: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        sizes.append(tuple(out.shape[2:]))

    for module in model:
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(note)
    assert model(torch.zeros(1, 2, 8, 8)).shape == (1, 10)
    assert sizes == [(8, 8)] * size + [(4, 4)] * (depth - size)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: vanilla_convnet(0), "depth=0 must be at least 1"),
        (lambda: vanilla_convnet(3, width=0), "width=0"),
        (lambda: vanilla_convnet(3, pool_after=4), "pool_after=4 is outside 0 … depth=3"),
        (lambda: vanilla_mlp(3, in_features=0), "in_features=0"),
        (lambda: vanilla_resnet(20), r"depth=20; known: \[18, 34, 50, 101, 152, 200\]"),
        (lambda: vanilla_resnet(18, widen=0), "widen=0 must be at least 1"),
        (
            lambda: rescaled_resnet(18, downsample="max"),
            "downsample='max'; known: 'stride', 'pool'",
        ),
        (lambda: vanilla_vgg16(num_classes=0), "num_classes=0"),
    ],
)
def test_refusals(build: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()
