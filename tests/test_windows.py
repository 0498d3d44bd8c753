"""Which positions a moving window reads, against a gradient through the convolution itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusedshape.windows import overlaps, read_share

CASES = [
    # kernel, stride, dilation
    ((3,), (2,), (1,)),
    ((2,), (4,), (2,)),
    ((2,), (3,), (3,)),
    ((3, 1), (2, 2), (1, 1)),
    ((2, 3), (3, 2), (2, 1)),
    ((1, 1, 2), (2, 1, 3), (1, 1, 1)),
]
CONVS = (F.conv1d, F.conv2d, F.conv3d)


def measured(taps: torch.Tensor, x: torch.Tensor, where: tuple[tuple[int, ...], ...]) -> float:
    """The share of x that a convolution with these taps depends on."""
    x.requires_grad_()
    CONVS[taps.ndim - 1](x, taps[None, None], None, *where).sum().backward()  # type: ignore[operator]
    assert x.grad is not None
    return float((x.grad != 0).double().mean())


@pytest.mark.parametrize(("kernel", "stride", "dilation"), CASES)
@pytest.mark.parametrize("single", [False, True])
def test_with_and_without_borders(
    kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], single: bool
) -> None:
    taps = torch.zeros(kernel) if single else torch.ones(kernel)
    taps.view(-1)[-1] = 1
    sizes = [7 + i for i in range(len(kernel))]
    x = torch.ones(1, 1, *sizes)
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    share = read_share(taps, sizes, stride, padding, dilation)
    assert share == pytest.approx(measured(taps, x, (stride, padding, dilation)))
    # Without borders: on a ring whose length every stride divides.
    ring = [12 * d * k for k, d in zip(kernel, dilation, strict=True)]
    inner = torch.ones(1, 1, *ring)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    for dim, more in enumerate(reach):
        inner = torch.cat((inner, inner.narrow(dim + 2, 0, more)), dim + 2)
    whole = torch.zeros(ring, dtype=torch.bool)
    read = torch.zeros(1, 1, *inner.shape[2:])
    read.requires_grad_()
    nowhere = (0,) * len(kernel)
    CONVS[len(kernel) - 1](read, taps[None, None], None, stride, nowhere, dilation).sum().backward()  # type: ignore[operator]
    assert read.grad is not None
    for index in (read.grad[0, 0] != 0).nonzero():
        whole[tuple(int(i) % n for i, n in zip(index, ring, strict=True))] = True
    want = float(whole.double().mean())
    assert read_share(taps, None, stride, nowhere, dilation) == pytest.approx(want)


def test_overlaps() -> None:
    assert not overlaps((2, 2), (2, 2), (1, 1))
    assert overlaps((2, 2), (1, 2), (1, 1))
    assert overlaps((2,), (2,), (2,))
    assert not overlaps((1,), (1,), (5,))
