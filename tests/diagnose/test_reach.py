"""diagnose says how much of the input reaches the output, and which layers skip positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import ShapedActivation, theory
from fusedshape.diagnose import diagnose
from fusedshape.diagnose.reach import reach
from fusedshape.init import init_module_
from fusedshape.windows import read_share


@pytest.mark.parametrize("taps", ["all", "centre", "corner"])
@pytest.mark.parametrize("length", [7, 8, 9, 16])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
def test_share_that_is_read_is_that_of_the_gradient(
    taps: str, length: int, stride: int, padding: int, dilation: int
) -> None:
    window = torch.zeros(3, 2) if taps != "all" else torch.ones(3, 2)
    window[(1, 1) if taps == "centre" else (0, 0)] = 1
    x = torch.randn(1, 1, length, length + 1, dtype=torch.float64, requires_grad=True)
    where = [stride] * 2, [padding] * 2, [dilation] * 2
    y = F.conv2d(x, window.double()[None, None], None, *where)
    (grad,) = torch.autograd.grad(y.sum(), x)
    want = 1.0 if stride == 1 else (grad != 0).double().mean().item()
    assert read_share(window, x.shape[2:], *where) == pytest.approx(want)


def net_of(*layers: nn.Module, init: Any = "suo") -> nn.Sequential:
    spec = theory.solve("TAT", "tanh", depth=20)
    net = nn.Sequential(*(m for layer in layers for m in (layer, ShapedActivation(spec))))
    for m in net.modules():
        if hasattr(m, "weight"):
            init_module_(m, init)
    return net


@pytest.mark.parametrize(
    ("layers", "init", "seen", "paths"),
    [
        (lambda: [nn.Conv2d(32, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 2, 1)], "suo", 16, ("0", "2")),
        (lambda: [nn.Conv2d(32, 32, 3, 2, 1)], "delta_orthogonal", 64, ("0",)),
        (lambda: [nn.Conv2d(32, 32, 3, 2, 1)], "gaussian", 256, ()),
        (lambda: [nn.Conv2d(32, 32, 1, 2)], "suo_full", 64, ("0",)),
        (lambda: [nn.Conv2d(32, 32, 2, 3)], "suo_full", 100, ("0",)),
        (lambda: [nn.Conv2d(32, 32, 1), nn.MaxPool2d(1, 2)], "suo", 64, ("2",)),
        (lambda: [nn.Conv2d(32, 32, 1), nn.AvgPool2d(2, 4)], "suo", 64, ("2",)),
        (lambda: [nn.Conv2d(32, 32, 1), nn.Upsample(scale_factor=0.5)], "suo", 64, ("2",)),
        # Neighbours that were mixed before are not lost.
        (lambda: [nn.Conv2d(32, 32, 3, 1, 1), nn.MaxPool2d(1, 2)], "suo_full", 256, ()),
        (lambda: [nn.Conv2d(32, 32, 1), nn.MaxPool2d(2)], "suo", 256, ()),
        (lambda: [nn.Conv2d(32, 32, 4, 4)], "suo_full", 256, ()),
        (lambda: [nn.Conv2d(32, 32, 3, 1, 1)], "suo", 256, ()),
        (lambda: [nn.ConvTranspose2d(32, 32, 4, 2, 1)], "suo", 256, ()),
    ],
)
def test_lost_positions(
    layers: Callable[[], list[nn.Module]], init: str, seen: int, paths: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    net, x = net_of(*layers(), init=init), torch.randn(16, 32, 16, 16)
    assert reach(net, (x,), {}, 16, [1])[1] == 256
    lost = [f for f in diagnose(net, x).findings if f.cause == "lost positions"]
    assert tuple(p for f in lost for p in f.paths) == paths
    if paths:
        assert f"{seen} of 256 positions" in lost[0].text
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(leaf).square().sum(), leaf)
        assert (grad.abs().amax((0, 1)) > 0).sum() == seen
    assert all(p.grad is None for p in net.parameters())


def test_a_shortcut_that_reads_everything_loses_nothing() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.shortcut = nn.Conv2d(32, 32, 3, 2, 1), nn.Conv2d(32, 32, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return 0.6 * self.branch(x) + 0.8 * self.shortcut(x)

    torch.manual_seed(0)
    net, x = Block(), torch.randn(16, 32, 8, 8)
    init_module_(net.branch)
    init_module_(net.shortcut, "suo_full")
    assert diagnose(net, x).agrees
    init_module_(net.shortcut, "gaussian")
    with torch.no_grad():
        net.shortcut.weight[..., 1, :] = 0
        net.shortcut.weight[..., 0] = 0
        net.shortcut.weight *= 2
    found = diagnose(net, x)
    assert found.cause == "lost positions"
    assert "32 of 64" in found.verdict


def test_positions_that_a_forward_leaves_out_itself_are_its_own_affair() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, -1]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(32, 32, 1), Last(), nn.Linear(32, 32))
    init_module_(net[0])
    init_module_(net[2])
    assert diagnose(net, torch.randn(16, 32, 9)).agrees


def test_what_cannot_be_differentiated_is_said() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return x * 1.0

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), Cut(), Cut())
    init_module_(net[0])
    found = diagnose(net, torch.randn(16, 32, 8, 8))
    assert any("is not known" in note for note in found.notes)
