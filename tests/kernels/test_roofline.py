"""Bytes and FLOPs of convolutions, against counting them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedshape.kernels.roofline import KERNELS, ROOFS, Convolution, Traffic, resnet50, traffic

PROBLEMS = [
    Convolution(2, 3, 9, 8, 5),
    Convolution(1, 4, 11, 7, 6, (3, 2), (2, 3), (1, 0), (2, 1)),
    Convolution(3, 2, 8, 9, 4, (1, 1), (2, 2), (0, 0)),
    Convolution(1, 2, 6, 6, 2, (2, 2), (4, 4), (0, 0)),
    Convolution(2, 2, 3, 3, 2, (5, 5), (1, 1), (3, 4)),
]


def convolve(p: Convolution, x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, None, p.stride, p.padding, p.dilation)


@pytest.mark.parametrize("p", PROBLEMS)
def test_counts_are_those_of_the_tensors(p: Convolution) -> None:
    x = torch.ones(p.batch, p.channels, p.height, p.width, requires_grad=True)
    weight = torch.ones(p.out_channels, p.channels, *p.kernel)
    y = convolve(p, x, weight)
    assert y.shape == (p.batch, p.out_channels, p.out_height, p.out_width)
    y.sum().backward()
    assert x.grad is not None
    touched = int((x.grad != 0).sum())
    expected = 2 * (touched + weight.numel() + y.numel())
    # With ones, an output without padding is the number of its products.
    flops = 2 * p.channels * p.taps * y.numel()
    assert traffic(p, "conv") == Traffic(expected, flops)
    assert traffic(p, "conv_wgrad") == Traffic(expected, flops)
    assert traffic(p, "conv_dgrad").bytes == 2 * (x.numel() + weight.numel() + y.numel())


def test_passes_over_activations() -> None:
    """Where a layer is wide, everything but activations vanishes: 4 passes become 2, 7 become 5."""
    p = Convolution(4096, 8, 64, 64, 8)
    one = 2 * p.pixels * p.out_channels

    def passes(*kernels: str) -> float:
        return sum(traffic(p, kernel).bytes for kernel in kernels) / one  # type: ignore[arg-type]

    assert passes("conv", "act") == pytest.approx(4, rel=1e-4)
    assert passes("conv_act") == pytest.approx(2, rel=1e-4)
    assert passes("act_grad", "conv_dgrad", "conv_wgrad") == pytest.approx(7, rel=1e-4)
    assert passes("conv_dgrad_act", "conv_wgrad") == pytest.approx(5, rel=1e-4)
    residual = traffic(p, "conv_act", residual=True).bytes - traffic(p, "conv_act").bytes
    assert residual == one


def test_splits_are_written_and_read() -> None:
    p = PROBLEMS[0]
    more = traffic(p, "conv_wgrad", splits=7).bytes - traffic(p, "conv_wgrad").bytes
    assert more == 2 * 4 * 7 * p.weights


def test_roofs_order_gpus_and_bound_layers() -> None:
    for layer in resnet50(32):
        for kernel in KERNELS:
            cost = traffic(layer.problem, kernel)
            seconds = [ROOFS[name].seconds(cost) for name in ("A100", "H100", "B200")]
            assert seconds == sorted(seconds, reverse=True)
            h200 = ROOFS["H200"]
            assert h200.seconds(cost) >= max(cost.bytes / h200.bandwidth, cost.flops / h200.half)
    slow = traffic(Convolution(32, 512, 14, 14, 512, arithmetic="float32"), "conv")
    assert ROOFS["A100"].seconds(slow, "float32") == slow.flops / 19.5e12
    assert ROOFS["A100"].seconds(slow, "tf32") == slow.flops / 156e12


def test_no_output_and_unknown_kernel() -> None:
    with pytest.raises(ValueError, match=r"reaches beyond an input of \(2, 2\).*pad more"):
        Convolution(1, 1, 2, 2, 1, (5, 5))
    with pytest.raises(ValueError, match=r"kernel='gemm' is unknown; known: conv, "):
        traffic(PROBLEMS[0], "gemm")  # type: ignore[arg-type]
