"""ShapedChain: a Sequential in all but its graph, whatever hooks and tampering ask for."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedshape import (
    ActSpec,
    ShapedActivation,
    ShapedChain,
    ShapedConv2d,
    ShapedLinear,
    convert,
)
from fusedshape.nn import why_not_chained
from tests.support.operands import F32, LEAKY, SWISH, draw, nodes


def conv(spec: ActSpec = LEAKY, channels: int = 4, **kwargs: Any) -> ShapedConv2d:
    torch.manual_seed(0)
    made = ShapedConv2d(channels, channels, 3, padding=1, spec=spec, **kwargs)
    with torch.no_grad():
        made.weight.normal_(std=0.2)
    return made


def chained(net: nn.Module, x: Tensor) -> int:
    """Count the layers that ran in a node with others when the net was called."""
    return sum(len(node.steps) for node in nodes(net(x)) if node.name() == "ChainBackward")


def sequential(net: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(OrderedDict(net._modules.items()))


def test_shaped_chain_is_a_sequential_in_all_but_its_graph() -> None:
    net = ShapedChain(
        OrderedDict(
            a=conv(), b=nn.Identity(), c=conv(SWISH), d=nn.MaxPool2d(2), e=conv(), f=conv(SWISH),
            g=nn.Flatten(), h=ShapedLinear(16, 5, spec=LEAKY), i=ShapedLinear(5, 5, spec=LEAKY),
            j=ShapedActivation(SWISH), k=ShapedLinear(5, 2, spec=LEAKY),
        )
    )  # fmt: skip
    plain = sequential(net)
    assert list(net.state_dict()) == list(plain.state_dict())
    x = draw(2, 4, 4, 4, dtype=F32)
    assert chained(net, x) == 6
    grads = []
    for each in (net, plain):
        each.zero_grad()
        each(x).square().sum().backward()
        grads.append([p.grad for p in each.parameters()])
    assert all(torch.equal(g, w) for g, w in zip(*grads, strict=True))
    assert torch.equal(net(x), plain(x))
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), net(x))
    part = ShapedChain(*net, max_length=3)[:4]
    assert type(part) is ShapedChain
    assert part.max_length == 3


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True


def test_shaped_chain_can_be_traced() -> None:
    graph = Leaves().trace(ShapedChain(conv(), nn.Identity(), conv()))
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == ["0", "1", "2"]


HOOKS: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *a: seen.append("forward")),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda *a: seen.append("pre")),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *a: seen.append("back")),
    "backward_pre": lambda m, seen: m.register_full_backward_pre_hook(
        lambda *a: seen.append("back pre")
    ),
    "global": lambda m, seen: nn.modules.module.register_module_forward_hook(
        lambda module, *a: seen.append("global") if module is m else None
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_no_hook_is_skipped(kind: str) -> None:
    net = ShapedChain(*[conv() for _ in range(5)])
    x = draw(2, 4, 4, 4, dtype=F32)
    want = net(x)
    seen: list[Any] = []
    handle = HOOKS[kind](net[2], seen)
    try:
        assert chained(net, x) == (0 if kind == "global" else 4)
        out = net(x.requires_grad_())
        out.sum().backward()
        assert torch.equal(out, want)
        assert seen
    finally:
        handle.remove()
    assert chained(net, x) == 5


def test_what_was_tampered_with_is_called_by_itself() -> None:
    x = draw(2, 4, 4, 4, dtype=F32)

    class Doubled(ShapedConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    own = conv()
    own.forward = lambda x: 2 * x  # type: ignore[method-assign]
    assert why_not_chained(own) == "it has hooks, or a forward or compiled code of its own"
    doubled = Doubled(4, 4, 3, padding=1, spec=LEAKY)
    normed = nn.utils.parametrizations.weight_norm(conv())
    ring = conv(padding_mode="circular")
    even = ShapedConv2d(4, 4, 2, padding="same", spec=LEAKY)
    for odd, why in (
        (doubled, "Doubled is no shaped layer"),
        (normed, "ParametrizedShapedConv2d is no shaped layer"),
        (ring, "padding_mode='circular'"),
        (even, "padding='same' of an even kernel pads more at the end"),
        (own, "own"),
    ):
        assert why in why_not_chained(odd)
        net = ShapedChain(conv(), conv(), odd, conv(), conv())
        assert torch.equal(net(x), sequential(net)(x))
        assert chained(net, x) == 4
    assert why_not_chained(conv()) == ""


def test_parameters_may_be_put_in_by_functional_call() -> None:
    net = ShapedChain(conv(), conv(SWISH))
    x = draw(2, 4, 4, 4, dtype=F32)
    doubled = {name: 2 * p.detach() for name, p in net.named_parameters()}
    got = torch.func.functional_call(net, doubled, (x,))
    assert torch.equal(got, torch.func.functional_call(sequential(net), doubled, (x,)))


def test_a_compiled_chain_trains() -> None:
    torch._dynamo.reset()
    net = ShapedChain(conv(), nn.Identity(), conv(SWISH), nn.Flatten(), nn.Linear(64, 1))
    run = torch.compile(net, fullgraph=True, backend="aot_eager")
    optimiser = torch.optim.SGD(net.parameters(), lr=0.005)
    x, y = draw(8, 4, 4, 4, dtype=F32), draw(8, 1, dtype=F32, seed=1)
    losses = []
    for _ in range(15):
        loss = (run(x) - y).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch._dynamo.reset()
    assert losses[-1] < 0.8 * losses[0]


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(torch.relu(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("chain", [False, True, 2])
def test_convert_chains(chain: bool | int) -> None:
    torch.manual_seed(0)
    net = Branched()
    plain = copy.deepcopy(net)
    keys, body = list(net.state_dict()), net.body
    report = convert(net, init=None, clamp=True, chain=chain)
    convert(plain, init=None, clamp=True)
    assert list(net.state_dict()) == keys
    assert net.body is body
    rows = {row.path: row for row in report.changes}
    x = draw(2, 2, 6, 6, dtype=F32)
    if chain is False:
        assert type(body) is nn.Sequential
        assert report.counts["chained"] == 0
    else:
        assert type(body) is ShapedChain
        assert body.max_length == (None if chain is True else 2)
        assert report.counts["chained"] == 3 == chained(net, x)
        assert rows["body"].note == "in a row: 0 … 4 (3 layers)"
        assert rows["body.0"].note == ""
        assert rows["body.6"].note == "not chained: padding_mode='reflect'"
        assert rows["stem"].note == "not chained: it stands in Branched, no nn.Sequential"
    assert torch.equal(net(x), plain(x))
    with pytest.raises(ValueError, match="already"):
        convert(net)


def test_convert_chains_the_model_itself_and_only_if_it_may() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    dry = convert(net, clamp=True, chain=True, dry_run=True)
    assert type(net) is nn.Sequential
    assert convert(net, clamp=True, chain=True).changes == dry.changes
    assert type(net) is ShapedChain
    with pytest.raises(ValueError, match="ShapedChain already"):
        convert(net)
    hooked = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    seen: list[str] = []
    hooked[0].register_forward_hook(lambda *a: seen.append("hook"))
    report = convert(hooked, clamp=True, chain=True)
    assert report.counts["chained"] == 0
    hooked(torch.zeros(1, 2, 8, 8))
    assert seen == ["hook"]
    for bad in (0, -1, "yes"):
        with pytest.raises(ValueError, match="chain="):
            convert(hooked, chain=bad)
