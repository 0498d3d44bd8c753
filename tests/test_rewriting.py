"""Forwards that are rewritten twice, and reading rewritten ones; tests/convert/ has the rest."""

from __future__ import annotations

import pickle

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedshape.rewriting import Rewritten, source, subclass
from fusedshape.tracing import Slot, read, trace


class ByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x)) if self.training else torch.tanh(self.layer(x))


def swapped(module: nn.Module, old: object, new: object, prefix: str) -> type[nn.Module]:
    """The module's class with one function in its forward replaced by another."""
    graphs = trace(module)
    for graph in graphs:
        for node in graph.nodes:
            if node.target is old:
                node.target = new
    return subclass(type(module), tuple(map(source, graphs)), prefix)


def test_rewritten_twice() -> None:
    net, plain = ByMode(), ByMode()
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 3)
    net.__class__ = swapped(net, F.relu, F.elu, "Once")
    net.__class__ = swapped(net, torch.tanh, torch.sin, "Twice")
    assert type(net).__bases__ == (ByMode, Rewritten)
    assert (type(net).__name__, net.written_by) == ("TwiceByMode", "Twice")
    again = pickle.loads(pickle.dumps(net))
    assert type(again) is type(net)
    for module in (net, again):
        assert torch.equal(module.train()(x), F.elu(plain.layer(x)))
        assert torch.equal(module.eval()(x), torch.sin(plain.layer(x)))


def test_reads_training_of_what_was_rewritten() -> None:
    net = ByMode()
    net.__class__ = swapped(net, F.relu, F.elu, "Once")
    targets = [node.target for node in read(net.eval(), Slot()).graph.nodes]
    assert F.elu in targets
    assert torch.tanh not in targets
    assert not net.training
    assert isinstance(trace(net)[0], fx.Graph)
