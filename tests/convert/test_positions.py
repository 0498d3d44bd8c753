"""convert names the positions that strided layers do not read."""

from __future__ import annotations

import torch
from torch import nn

from fusedshape.convert import convert
from tests.support.convertible import SPEC


def test_positions_that_strided_layers_do_not_read_are_named() -> None:
    def make() -> nn.Sequential:
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(8, 8, 1, 2), nn.Flatten(), nn.LazyLinear(4))

    image = torch.randn(2, 3, 32, 32, requires_grad=True)
    for init, named in (("suo", True), ("delta_orthogonal", True), ("suo_full", False)):
        net = make()
        net(image)
        notes = " ".join(convert(net, spec=SPEC, init=init).notes)
        assert ("'0', '2' read one position" in notes) is named
        if named:
            (grad,) = torch.autograd.grad(net(image).square().sum(), image)
            seen = int((grad.abs().amax((0, 1)) > 0).sum())
            assert seen * 64 == 32 * 32
            assert "1/64 of the input's reach the output" in notes
            assert "suo_full" in notes
