"""conv_chain: the numbers of the layers one by one, with less memory and passes."""

from __future__ import annotations

import copy
import gc
import itertools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedshape import (
    ActSpec,
    ShapedChain,
    ShapedConv2d,
    reference,
)
from fusedshape.ops import ChainLayer, conv_act, conv_chain, linear_act
from tests.support.backends import BACKENDS, INTERPRET, NATIVE
from tests.support.operands import F32, F64, LEAKY, SWISH, draw, nodes
from tests.support.specs import SPECS

DTYPES = [F64, F32, torch.bfloat16, torch.float16]

Params = Sequence[Tensor | None]
Make = Callable[[Params], list[ChainLayer]]


def convs(
    *specs: ActSpec, dtype: torch.dtype = F64, width: int = 4, backend: str = "auto"
) -> tuple[list[Tensor], Make]:
    """Weights and biases of a stack whose layers differ, and the stack of such tensors."""
    kinds = itertools.cycle(
        [
            ((width, width, 3, 3), {"padding": 1}),
            ((width, width // 2, 3, 2), {"padding": (1, 1), "groups": 2}),
            ((width, width, 1, 1), {"stride": (1, 2)}),
            ((width, width, 3, 3), {"padding": "same", "dilation": (1, 2)}),
        ]
    )
    used = list(itertools.islice(kinds, len(specs)))
    params = []
    for i, (shape, _) in enumerate(used):
        params += [draw(*shape, dtype=dtype, seed=2 * i) / 2]
        params += [draw(shape[0], dtype=dtype, seed=2 * i + 1)]

    def make(params: Params) -> list[ChainLayer]:
        return [
            ChainLayer(params[2 * i], params[2 * i + 1], spec, backend=backend, **geometry)
            for i, (spec, (_, geometry)) in enumerate(zip(specs, used, strict=True))
        ]

    return params, make


def one_by_one(x: Tensor, layers: Sequence[ChainLayer]) -> Tensor:
    """The layers through conv_act and linear_act."""
    for layer in layers:
        weight, bias, spec, stride, padding, dilation, groups, _, backend = layer
        if weight.ndim == 2:
            x = linear_act(x, weight, bias, spec, backend=backend)
        else:
            geometry = {"stride": stride, "padding": padding, "dilation": dilation}
            x = conv_act(x, weight, bias, spec, groups=groups, backend=backend, **geometry)
    return x


def truth(x: Tensor, layers: Sequence[ChainLayer]) -> Tensor:
    """The layers in plain float64 PyTorch."""
    for weight, bias, spec, stride, padding, dilation, groups, *_ in layers:
        if weight.ndim == 2:
            z = F.linear(x, weight, bias)
        else:
            f = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
            z = f(x, weight, bias, stride, padding, dilation, groups)
        x = reference.bias_act(z, None, spec)
    return x


def grads_of(
    f: Callable[[Tensor, list[ChainLayer]], Tensor], make: Make, x: Tensor, params: Params
) -> list[Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, *params)]
    out = f(leaves[0], make(leaves[1:]))
    grad = draw(*out.shape, dtype=out.dtype, seed=99)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_gradients_against_float64(spec: ActSpec, backend: str) -> None:
    params, make = convs(spec, SWISH, spec, LEAKY, backend=backend)
    x = draw(2, 4, 5, 6, seed=50)
    got = grads_of(conv_chain, make, x, params)
    want = grads_of(truth, make, x, params)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9 * w.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_bits_are_those_of_single_layers(dtype: torch.dtype, backend: str, last: bool) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter rounds bfloat16 wrongly")
    params, make = convs(LEAKY, SWISH, SWISH, LEAKY, LEAKY, dtype=dtype, backend=backend)
    x = draw(2, 4, 6, 6, dtype=dtype, seed=50)
    x = x.to(memory_format=torch.channels_last) if last else x
    got = grads_of(conv_chain, make, x, params)
    want = grads_of(one_by_one, make, x, params)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert [g.stride() for g in got] == [w.stride() for w in want]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)], ids=str)
def test_linear_stacks(shape: tuple[int, ...], backend: str) -> None:
    specs = LEAKY, SWISH, LEAKY
    sizes = [(4, 5), (6, 4), (3, 6)]
    params: list[Tensor | None] = [draw(4, 5), draw(4), draw(6, 4), None, draw(3, 6), draw(3)]

    def make(params: Params) -> list[ChainLayer]:
        left = list(params)
        if len(left) < 2 * len(sizes):
            left.insert(3, None)
        pairs = zip(left[::2], left[1::2], specs, strict=True)
        return [ChainLayer(w, b, spec, backend=backend) for w, b, spec in pairs]

    x = draw(*shape, seed=50)
    got, want = (grads_of(f, make, x, params) for f in (conv_chain, one_by_one))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    exact = grads_of(truth, make, x, params)
    for g, w in zip(got, exact, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n", [1, 3])
def test_one_and_three_dimensions(n: int) -> None:
    shape, kernel = (4,) * n, (3,) * n
    params = [draw(4, 4, *kernel) / 2, draw(4, seed=1), draw(4, 4, *kernel, seed=2) / 2]

    def make(params: Params) -> list[ChainLayer]:
        first = ChainLayer(params[0], params[1], LEAKY, padding=1)
        return [first, ChainLayer(params[2], None, SWISH, padding="same")]

    for x in (draw(2, 4, *shape, seed=3), draw(4, *shape, seed=3)):
        got, want = (grads_of(f, make, x, params) for f in (conv_chain, one_by_one))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("specs", [(LEAKY, SWISH), (SWISH, LEAKY)], ids=["output", "input"])
def test_gradcheck_and_gradgradcheck(specs: tuple[ActSpec, ActSpec]) -> None:
    params, make = convs(*specs, width=2)
    inputs = [t.requires_grad_() for t in (draw(1, 2, 3, 3, seed=50), *params)]

    def f(x: Tensor, *params: Tensor) -> Tensor:
        return conv_chain(x, make(params))

    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def test_a_tensor_in_several_places() -> None:
    weight, bias = (draw(3, 3, 3, 3) / 3).requires_grad_(), draw(3, seed=1).requires_grad_()
    x = draw(2, 3, 4, 4, seed=2).requires_grad_()
    layers = [ChainLayer(weight, bias, spec, padding=1) for spec in (LEAKY, SWISH, LEAKY)]

    def penalty(f: Callable[..., Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(f(x, layers).sum(), (x, weight, bias), create_graph=True)
        total = sum(g.square().sum() for g in first)
        assert isinstance(total, Tensor)
        return [*first, *torch.autograd.grad(total, (x, weight, bias))]

    for g, w in zip(penalty(conv_chain), penalty(truth), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("needs", [n for n in itertools.product([0, 1], repeat=5) if any(n)])
@pytest.mark.parametrize("specs", [(LEAKY, SWISH), (SWISH, LEAKY)], ids=["output", "input"])
def test_gradients_only_where_asked(needs: tuple[int, ...], specs: tuple[ActSpec, ActSpec]) -> None:
    params, make = convs(*specs)
    tensors = [draw(2, 4, 5, 5, seed=50), *params]
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(bool(need))
    found = []
    for f in (conv_chain, one_by_one):
        f(tensors[0], make(tensors[1:])).square().sum().backward()
        found.append([t.grad for t in tensors])
        for t in tensors:
            t.grad = None
    for got, want, need in zip(*found, needs, strict=True):
        assert (got is not None) == bool(need)
        assert got is None or torch.equal(got, want)


class Saved:
    """Counts what autograd keeps between forward and backward, by the memory it lies in."""

    def __init__(self, *known: Tensor) -> None:
        self.known = {t.data_ptr() for t in known}
        self.kept: list[Tensor] = []

    def pack(self, t: Tensor) -> Tensor:
        if t.data_ptr() not in {*self.known, *(k.data_ptr() for k in self.kept)}:
            self.kept.append(t)
        return t

    def of(self, f: Callable[[], Tensor]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t):
            f()
        return len(self.kept)


def test_one_activation_is_saved_a_layer() -> None:
    specs = LEAKY, SWISH, SWISH, LEAKY, SWISH
    params, make = convs(*specs)
    x = draw(2, 4, 6, 6).requires_grad_()
    params = [p.requires_grad_() for p in params]
    known = x, *params
    assert Saved(*known).of(lambda: conv_chain(x, make(params))) == 5
    assert Saved(*known).of(lambda: conv_chain(x, make(params), max_length=2)) == 6
    assert (
        Saved(*known).of(lambda: one_by_one(x, make(params))) == 7
    )  # two where swish is in between
    with torch.no_grad():
        assert Saved(*known).of(lambda: conv_chain(x, make(params))) == 0
    frozen = [p.detach() for p in params[:6]]
    layers = make([*frozen, *params[6:]])
    kept = Saved(*known, *frozen)
    assert kept.of(lambda: conv_chain(x.detach(), layers)) == 3  # two layers and their input


class Calls(TorchDispatchMode):
    """Counts the ops that run and notes the memory that some of them write to."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.made: dict[str, list[int]] = {}
        self.saw: Callable[[str], None] = lambda name: None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        self.counts[name] += 1
        self.saw(name)
        out = func(*args, **(kwargs or {}))
        if name == "convolution_backward" and out[0] is not None:
            self.made.setdefault(name, []).append(out[0].data_ptr())
        elif name.endswith("act_grad_"):
            self.made.setdefault(name, []).append(args[0].data_ptr())
        return out


@NATIVE
def test_backward_makes_one_pass_a_layer() -> None:
    params, make = convs(*[LEAKY] * 4, dtype=F32, backend="native")
    params = [p.requires_grad_() for p in params]
    x = draw(2, 4, 6, 6, dtype=F32).requires_grad_()
    y = conv_chain(x, make(params))
    grad = torch.ones_like(y)
    with Calls() as calls:
        torch.autograd.grad(y, [x, *params], grad)
    # Nothing else touches the memory of an activation: no sum, no multiplication, no copy.
    work = {n: c for n, c in calls.counts.items() if n not in ("detach", "view", "_to_copy")}
    assert work == {"native_act_grad": 1, "native_act_grad_": 3, "convolution_backward": 4}
    # The pass writes where dgrad wrote; the last dgrad is that of x.
    assert calls.made["native_act_grad_"] == calls.made["convolution_backward"][:-1]


@NATIVE
def test_forward_makes_one_pass_a_layer() -> None:
    params, make = convs(LEAKY, SWISH, SWISH, dtype=F32, backend="native")
    x = draw(2, 4, 6, 6, dtype=F32)
    with torch.no_grad(), Calls() as calls:
        conv_chain(x, make(params))
    assert calls.counts == {"convolution": 3, "native_bias_act_": 3}
    params = [p.requires_grad_() for p in params]
    with Calls() as calls:
        conv_chain(x, make(params))
    calls.counts.pop("detach", None)
    assert calls.counts == {"convolution": 3, "native_bias_act_": 1, "native_bias_act": 2}


@pytest.mark.parametrize("retain", [False, True])
def test_activations_are_let_go_as_backward_proceeds(retain: bool) -> None:
    params, make = convs(*[LEAKY] * 4)
    params = [p.requires_grad_() for p in params]
    saved = Saved(*params)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        out = conv_chain(draw(2, 4, 6, 6), make(params))
    alive = [weakref.ref(t) for t in saved.kept]
    del saved
    loss = out.sum()
    del out
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 5  # x and four layers
    counts = []
    with Calls() as calls:
        calls.saw = lambda name: (
            counts.append(sum(ref() is not None for ref in alive))
            if name == "convolution_backward"
            else None
        )
        loss.backward(retain_graph=retain)
    assert counts == ([5] * 4 if retain else [4, 3, 2, 1])


def test_backward_twice() -> None:
    params, make = convs(LEAKY, SWISH)
    x = draw(2, 4, 5, 5).requires_grad_()
    y = conv_chain(x, make(params))
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), x)


def test_hooks_see_and_change_the_gradient_of_the_output() -> None:
    params, make = convs(LEAKY, SWISH)
    x = draw(2, 4, 5, 5).requires_grad_()
    (plain,) = torch.autograd.grad(conv_chain(x, make(params)).sum(), x)
    y = conv_chain(x, make(params))
    seen: list[Tensor] = []
    y.register_hook(lambda g: seen.append(g.clone()) or 3 * g)
    (hooked,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(hooked, 3 * plain)
    assert torch.equal(seen[0], torch.ones_like(y))


def test_writing_on_what_was_saved_is_noticed() -> None:
    params, make = convs(LEAKY, LEAKY)
    x = draw(2, 4, 5, 5).requires_grad_()
    for changed in (lambda y: y.mul_(2), lambda y: params[2].mul_(2)):
        y = conv_chain(x, make(params))
        changed(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_nothing_of_the_callers_is_written() -> None:
    params, make = convs(LEAKY, SWISH)
    params = [p.requires_grad_() for p in params]
    x = draw(2, 4, 5, 5).requires_grad_()
    tensors = x, *params
    before = [t.detach().clone() for t in tensors]
    y = conv_chain(x, make(params))
    kept, grad = y.detach().clone(), torch.ones_like(y)
    y.backward(grad)
    assert torch.equal(y, kept)
    assert torch.equal(grad, torch.ones_like(grad))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_gradients_accumulate() -> None:
    params, make = convs(LEAKY, SWISH)
    params = [p.requires_grad_() for p in params]
    halves = draw(4, 4, 5, 5).split(2)
    for half in halves:
        conv_chain(half, make(params)).sum().backward()
    summed = [p.grad for p in params]
    whole = torch.autograd.grad(conv_chain(torch.cat(halves), make(params)).sum(), params)
    for s, w in zip(summed, whole, strict=True):
        torch.testing.assert_close(s, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("max_length", "lengths"), [(None, [5]), (9, [5]), (3, [3, 2]), (2, [2, 2, 1]), (1, [1] * 5)]
)
def test_max_length_splits_evenly(max_length: int | None, lengths: list[int]) -> None:
    params, make = convs(LEAKY, SWISH, LEAKY, SWISH, LEAKY)
    params = [p.requires_grad_() for p in params]
    arrived: list[int] = []
    for i, p in enumerate(params[::2]):
        p.register_post_accumulate_grad_hook(lambda _, i=i: arrived.append(i))
    y = conv_chain(draw(2, 4, 6, 8), make(params), max_length=max_length)
    assert [n.name() for n in nodes(y)].count("ChainBackward") == len(lengths)
    torch.testing.assert_close(y, truth(draw(2, 4, 6, 8), make(params)))
    y.sum().backward()
    # A node's gradients come when it is done, and the last node is done first.
    bounds = [0, *itertools.accumulate(sorted(lengths))]
    assert len(arrived) == 5
    ends = list(itertools.accumulate(reversed([b - a for a, b in itertools.pairwise(bounds)])))
    groups = [set(arrived[a:b]) for a, b in itertools.pairwise([0, *ends])]
    want = [set(range(a, b)) for a, b in itertools.pairwise(bounds)]
    assert groups == want[::-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    params, make = convs(LEAKY, SWISH, LEAKY, dtype=F32)
    x = draw(2, 4, 5, 6, dtype=F32)
    found = []
    for f in (conv_chain, one_by_one):
        leaves = [t.clone().requires_grad_() for t in (x, *params)]
        with torch.autocast("cpu", dtype):
            y = f(leaves[0], make(leaves[1:]))
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert all(t.grad is not None and t.grad.dtype == F32 for t in leaves)
        found.append([y, *(t.grad for t in leaves)])
    assert all(torch.equal(g, w) for g, w in zip(*found, strict=True))


@pytest.mark.parametrize("dynamo", ["eager", "aot_eager"])
def test_fullgraph_compile(dynamo: str) -> None:
    torch._dynamo.reset()
    params, make = convs(LEAKY, SWISH, SWISH, LEAKY)
    x = draw(2, 4, 6, 6, seed=50)

    def f(x: Tensor, *params: Tensor) -> Tensor:
        return conv_chain(x, make(params), max_length=3)

    compiled = torch.compile(f, fullgraph=True, backend=dynamo)
    for batch in (2, 3):  # the second makes the batch dynamic
        x = draw(batch, 4, 6, 6, seed=50)
        got = grads_of(lambda x, layers: compiled(x, *params_of(layers)), make, x, params)
        want = grads_of(conv_chain, make, x, params)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


def params_of(layers: Sequence[ChainLayer]) -> list[Tensor]:
    return [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]


def test_layers_that_share_a_weight_compile() -> None:
    torch._dynamo.reset()
    weight = (draw(4, 4, 3, 3, seed=51) / 5).requires_grad_()
    bias = draw(4, seed=52).requires_grad_()
    layers = [ChainLayer(weight, bias, LEAKY, 1, 1), ChainLayer(weight, bias, SWISH, 1, 1)]
    x = draw(2, 4, 5, 5, seed=53)
    compiled = torch.compile(conv_chain, fullgraph=True, backend="aot_eager")
    found = [f(x, layers) for f in (conv_chain, compiled)]
    grads = [torch.autograd.grad(y.square().sum(), (weight, bias)) for y in found]
    torch.testing.assert_close([found[1], *grads[1]], [found[0], *grads[0]])
    torch._dynamo.reset()


@NATIVE
@pytest.mark.slow
def test_inductor() -> None:
    torch._dynamo.reset()
    params, make = convs(LEAKY, SWISH, LEAKY, dtype=F32)
    x = draw(2, 4, 6, 6, dtype=F32, seed=50)
    compiled = torch.compile(lambda x, *p: conv_chain(x, make(p)).relu(), fullgraph=True)
    got = grads_of(lambda x, layers: compiled(x, *params_of(layers)), make, x, params)
    want = grads_of(lambda x, layers: conv_chain(x, layers).relu(), make, x, params)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    params, make = convs(LEAKY, SWISH, LEAKY)

    def f(x: Tensor, layers: list[ChainLayer]) -> Tensor:
        return checkpoint(conv_chain, x, layers, use_reentrant=reentrant)

    x = draw(2, 4, 6, 6, seed=50)
    got, want = (grads_of_by_backward(g, make, x, params) for g in (f, conv_chain))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def grads_of_by_backward(
    f: Callable[..., Tensor], make: Make, x: Tensor, params: Params
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, *params) if t is not None]
    f(leaves[0], make(leaves[1:])).square().sum().backward()
    return [t.grad for t in leaves if t.grad is not None]


def test_func_transforms() -> None:
    params, make = convs(LEAKY, SWISH)
    x = draw(3, 2, 4, 5, 5)

    def f(x: Tensor) -> Tensor:
        return conv_chain(x, make(params))

    torch.testing.assert_close(torch.func.vmap(f)(x), torch.stack([f(each) for each in x]))
    _, tangent = torch.func.jvp(f, (x[0],), (draw(2, 4, 5, 5, seed=3),))
    eps = 1e-6
    moved = (f(x[0] + eps * draw(2, 4, 5, 5, seed=3)) - f(x[0])) / eps
    torch.testing.assert_close(tangent, moved, rtol=1e-4, atol=1e-4)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return conv_chain(x, make([params[0], params[1], weight, params[3]])).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params[2], x)
    weight = params[2].clone().requires_grad_()
    (total,) = torch.autograd.grad(sum(loss(weight, one) for one in x), weight)
    torch.testing.assert_close(each.sum(0), total)


def test_inference_and_no_grad() -> None:
    params, make = convs(LEAKY, SWISH)
    x = draw(2, 4, 5, 5)
    want = conv_chain(x, make(params))
    with torch.inference_mode():
        assert torch.equal(conv_chain(x.clone(), make(params)), want)
    assert not want.requires_grad
    params = [p.requires_grad_() for p in params]
    with torch.no_grad():
        assert torch.equal(conv_chain(x, make(params)), want)


def test_meta_tensors_and_nothing() -> None:
    params, make = convs(LEAKY, SWISH, LEAKY)
    away = [p.to("meta").requires_grad_() for p in params]
    y = conv_chain(draw(2, 4, 6, 6).to("meta"), make(away))
    assert y.shape == conv_chain(draw(2, 4, 6, 6), make(params)).shape
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in away)
    params = [p.requires_grad_() for p in params]
    x = draw(0, 4, 6, 6).requires_grad_()
    y = conv_chain(x, make(params))
    assert y.shape[0] == 0
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in params)
    assert x.grad is not None


def test_distributed_data_parallel() -> None:
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    specs = [LEAKY, SWISH, LEAKY, SWISH]
    net = ShapedChain(*[ShapedConv2d(4, 4, 3, padding=1, spec=s) for s in specs], max_length=2)
    plain = copy.deepcopy(net)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        for _ in range(2):
            x = draw(2, 4, 5, 5, dtype=F32)
            wrapped(x).square().sum().backward()
            plain(x).square().sum().backward()
    finally:
        dist.destroy_process_group()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


ONE = ChainLayer(torch.ones(1, 1, 3, 3), None, LEAKY)
X = torch.ones(1, 1, 4, 4)
BAD: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (ValueError, "no layers", lambda: conv_chain(X, [])),
    (TypeError, "must be ChainLayers, got Tensor", lambda: conv_chain(X, [X])),
    (TypeError, "x has dtype torch.int64", lambda: conv_chain(X.long(), [ONE])),
    (TypeError, "layer 0: spec must be", lambda: conv_chain(X, [ONE._replace(spec="relu")])),
    (TypeError, "weight must be a tensor", lambda: conv_chain(X, [ONE._replace(weight=None)])),
    (ValueError, "max_length=0", lambda: conv_chain(X, [ONE], max_length=0)),
    (
        ValueError,
        "layer 1: weight has 2 input channels per group, input has 1",
        lambda: conv_chain(X, [ONE, ONE._replace(weight=torch.ones(1, 2, 1, 1))]),
    ),
    (
        ValueError,
        "layer 1: a kernel of 3 with dilation 1 reaches over 3, but the padded input has 2",
        lambda: conv_chain(X, [ONE, ONE]),
    ),
    (
        ValueError,
        "layer 1: weight has 2 dimensions, that of layer 0 has 4; make a chain of each kind",
        lambda: conv_chain(X, [ONE, ONE._replace(weight=torch.ones(2, 2))]),
    ),
    (
        ValueError,
        "pads more at the end than at the beginning; use conv_act",
        lambda: conv_chain(X, [ONE._replace(weight=torch.ones(1, 1, 2, 2), padding="same")]),
    ),
    (
        ValueError,
        "layer 0: a linear layer has no stride",
        lambda: conv_chain(X, [ChainLayer(torch.ones(4, 4), None, LEAKY, stride=2)]),
    ),
    (
        ValueError,
        "layer 0: x has shape",
        lambda: conv_chain(X, [ChainLayer(torch.ones(4, 3), None, LEAKY)]),
    ),
    (
        TypeError,
        "layer 1: weight has dtype torch.float64",
        lambda: conv_chain(X, [ONE, ONE._replace(weight=torch.ones(1, 1, 1, 1).double())]),
    ),
    (
        ValueError,
        "layer 0: bias has shape",
        lambda: conv_chain(X, [ONE._replace(bias=torch.ones(2))]),
    ),
    (ValueError, "layer 0: stride=0", lambda: conv_chain(X, [ONE._replace(stride=0)])),
    (ValueError, "layer 0: groups=2", lambda: conv_chain(X, [ONE._replace(groups=2)])),
    (ValueError, "unknown backend 'gpu'", lambda: conv_chain(X, [ONE._replace(backend="gpu")])),
    (ValueError, "unknown engine 'gpu'", lambda: conv_chain(X, [ONE._replace(engine="gpu")])),
    (ValueError, "ShapedChain: max_length=0", lambda: ShapedChain(max_length=0)),
]


@pytest.mark.parametrize("case", BAD, ids=lambda c: c[1])
def test_bad_input_is_refused(case: tuple[type[Exception], str, Callable[[], object]]) -> None:
    error, message, call = case
    with pytest.raises(error, match=message):
        call()


def test_deep_chain_in_float32_is_as_exact_as_single_layers() -> None:
    spec = ActSpec("leaky_relu", negative_slope=0.4, output_scale=1.3)
    widths = 8
    params = [draw(widths, widths, seed=i) / widths**0.5 for i in range(40)]
    x = draw(16, widths, seed=99)
    layers = [ChainLayer(w.float().requires_grad_(), None, spec) for w in params]
    exact = [ChainLayer(w.requires_grad_(), None, spec) for w in params]
    (want,) = torch.autograd.grad(truth(x, exact).sum(), params[0])
    (got,) = torch.autograd.grad(conv_chain(x.float(), layers).sum(), layers[0].weight)
    rounding = 40 * torch.finfo(F32).eps * widths
    assert (got - want).norm() <= rounding * want.norm()
    assert reduce(operator.mul, got.shape) == widths**2


@pytest.mark.skipif(INTERPRET, reason="the interpreter serves CPU tensors")
def test_an_explicit_engine_never_falls_back() -> None:
    with pytest.raises(ValueError, match="engine 'triton' cannot run this layer"):
        conv_chain(X, [ONE, ONE._replace(engine="triton", weight=torch.ones(1, 1, 1, 1))])
