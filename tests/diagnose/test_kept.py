"""diagnose leaves a model as it was, whatever its forward writes, and says what it could not."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusedshape.diagnose import diagnose
from fusedshape.diagnose.kept import kept
from fusedshape.guard import Guard


class Counter:
    def __init__(self) -> None:
        self.calls, self.seen = 0, [0]


class Writer(nn.Module):
    """Does something to itself in its forward, then perhaps raises."""

    def __init__(self, write: Callable[[Any], object], raises: BaseException | None = None) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.Identity()
        self.register_buffer("count", torch.zeros(3))
        self.layer.weight.grad = torch.ones(8, 8)
        self.layer.bias.requires_grad_(False)
        self.cache: dict[str, Any] = {"list": [1, 2], "none": None}
        self.queue, self.names = deque([1, 2], maxlen=2), {"a"}
        self.array, self.step = np.zeros(3), torch.zeros(2)
        self.generator, self.python = torch.Generator(), random.Random(0)
        self.numpy = np.random.default_rng(0)
        self.counter, self.total = Counter(), 0
        self.write, self.raises = write, raises

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        if self.raises is not None:
            raise self.raises
        return self.layer(x)


def state(net: Writer) -> dict[str, Any]:
    """All of it that a forward may change, as plain data."""
    return {
        "weights": {k: v.tolist() for k, v in net.state_dict().items()},
        "places": {k: (v.data_ptr(), v.dtype) for k, v in net.state_dict().items()},
        "grad": [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "modes": [m.training for m in net.modules()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in net.modules()],
        "children": [(name, id(m), type(m)) for name, m in net.named_modules()],
        "attributes": [sorted(vars(m)) for m in net.modules()],
        "containers": copy.deepcopy((net.cache, list(net.queue), sorted(net.names))),
        "numbers": (net.array.tolist(), net.step.tolist(), net.total),
        "drawn": (net.generator.get_state().tolist(), net.python.getstate()),
        "numpy": net.numpy.bit_generator.state,
        "counter": (net.counter.calls, list(net.counter.seen)),
        "random": (torch.get_rng_state().tolist(), random.getstate()),
    }


def swap_class(net: Any) -> None:
    net.layer.__class__ = type("Other", (nn.Linear,), {})


WRITES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda net: None,
    "in place": lambda net: net.layer.weight.clamp_(-0.01, 0.01),
    ".data": lambda net: net.layer.weight.data.mul_(2),
    "a view": lambda net: net.layer.weight[2:, 1].zero_(),
    "indices": lambda net: net.layer.weight.__setitem__((0, 0), 7.0),
    "copy": lambda net: net.layer.bias.copy_(torch.ones(8)),
    "out=": lambda net: torch.mul(net.layer.weight, 2, out=net.layer.weight.data),
    "foreach": lambda net: torch._foreach_mul_(list(net.layer.parameters()), 2.0),
    "twice": lambda net: (net.layer.weight.mul_(2), net.layer.weight.add_(1)),
    "init": lambda net: nn.init.normal_(net.layer.weight),
    "other memory": lambda net: setattr(net.layer.weight, "data", torch.ones(8, 8)),
    "written, then moved": lambda net: (
        net.layer.weight.zero_(),
        setattr(net.layer.weight, "data", torch.ones(8, 8)),
    ),
    "another dtype": lambda net: net.layer.double().float(),
    "another parameter": lambda net: setattr(net.layer, "bias", nn.Parameter(torch.ones(8))),
    "no bias": lambda net: setattr(net.layer, "bias", None),
    "frozen": lambda net: net.layer.requires_grad_(False),
    "gradient": lambda net: net.layer.weight.grad.zero_(),
    "no gradient": lambda net: net.zero_grad(set_to_none=True),
    "buffer": lambda net: net.count.add_(1),
    "new buffer": lambda net: setattr(net, "count", net.count + 1),
    "mode": lambda net: net.eval(),
    "hook": lambda net: net.layer.register_forward_hook(lambda *args: None),
    "child": lambda net: setattr(net, "norm", nn.Flatten()),
    "class": swap_class,
    "counter": lambda net: setattr(net, "total", net.total + 1),
    "dict": lambda net: net.cache.update(x=1),
    "list in a dict": lambda net: net.cache["list"].append(3),
    "deque": lambda net: net.queue.append(3),
    "set": lambda net: net.names.add("b"),
    "array": lambda net: net.array.__iadd__(1),
    "tensor": lambda net: net.step.add_(1),
    "object": lambda net: (setattr(net.counter, "calls", 1), net.counter.seen.append(1)),
    "torch's numbers": lambda net: torch.rand(1),
    "its own numbers": lambda net: torch.rand(1, generator=net.generator),
    "Python's numbers": lambda net: (random.random(), net.python.random()),
    "NumPy's numbers": lambda net: net.numpy.random(),
}


@pytest.mark.parametrize("raises", [None, RuntimeError("on purpose"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", WRITES)
def test_what_a_forward_writes_is_put_back(kind: str, raises: BaseException | None) -> None:
    torch.manual_seed(0)
    net, x = Writer(WRITES[kind], raises), torch.randn(8, 8)
    before = state(net)
    if raises is None:
        found = diagnose(net, x)
        assert not [note for note in found.notes if "as it was" in note]
    else:
        with pytest.raises((ValueError, KeyboardInterrupt)):
            diagnose(net, x)
    assert state(net) == before
    if raises is None:
        with torch.no_grad():
            net(x)
        assert (state(net) == before) == (kind == "nothing")


def test_what_was_written_past_torch_is_said() -> None:
    def write(net: Any) -> None:
        net.layer.weight.detach().numpy()[0, 0] += 1

    net, x = Writer(write), torch.randn(8, 8)
    note = "not as it was before: 'layer.weight' was written to past PyTorch"
    assert any(n.startswith(note) for n in diagnose(net, x).notes)
    net.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught:
        diagnose(net, x)
    (said,) = getattr(caught.value, "__notes__", ())
    assert said.startswith(note)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_least_change_of_one_number_is_seen(dtype: torch.dtype) -> None:
    """Even of one that is lost in the sum of all."""
    layer = nn.Linear(8, 8, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight[0, 0], layer.weight[0, 1] = 1e3, 2**-5
    written = layer.weight.detach().view(torch.int8).numpy()
    with kept(layer) as lost:
        written[0, layer.weight.element_size()] ^= 1  # the last bit of the second number
    assert lost == ["'weight' was written to past PyTorch, as through NumPy"]
    with kept(layer) as lost:
        pass
    assert lost == []


def test_only_the_models_own_operations_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching one takes longer than a prediction takes to compute it."""
    seen: set[str] = set()
    watch = Guard.__torch_dispatch__

    def listen(self: Guard, func: Any, *args: Any) -> Any:
        seen.add(func.overloadpacket.__name__)
        return watch(self, func, *args)

    monkeypatch.setattr(Guard, "__torch_dispatch__", listen)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh())
    assert len(diagnose(net, torch.randn(8, 16)).layers) == 5
    assert {"addmm", "relu", "tanh"} <= seen
    # Predictions take nanmean, descriptions of weights linalg_cholesky_ex, measurements stack.
    assert not {"nanmean", "linalg_cholesky_ex", "stack"} & seen


def test_parameters_are_copied_only_when_they_are_written_to() -> None:
    layers = [nn.Linear(64, 64) for _ in range(4)]
    net, x = nn.Sequential(*layers), torch.randn(8, 64)
    clones: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.clone.default:
                clones.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch(), kept(net):
        net(x)
        assert not clones
        layers[2].weight.mul_(2)
        layers[2].weight.mul_(2)
        assert clones == [layers[2].weight.data_ptr()]


def test_a_pending_backward_survives() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()), torch.randn(8, 8)
    loss = net(x).square().sum()
    diagnose(net.eval(), x)
    loss.backward()
    assert net[0].weight.grad is not None
