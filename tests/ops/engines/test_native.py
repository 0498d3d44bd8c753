"""Engine "native": layers and chains by csrc's convolutions, and what goes to torch instead."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedshape import ActSpec, ShapedConv2d, ShapedLinear, native, reference
from fusedshape.ops import ChainLayer, conv_act, conv_chain, linear_act
from fusedshape.ops.choice import install_chooser
from tests.support.backends import INTERPRET
from tests.support.convolutions import (
    EPS,
    KINDS,
    LAST,
    Case,
    conv2d,
    draw,
    plain,
    wide,
)
from tests.support.operands import F32, F64, LEAKY, SWISH, last

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"native: {native.why_not()}"),
    pytest.mark.usefixtures("one_thread"),
]


class Layer(NamedTuple):
    """One layer by a public entry, on an input in the layout that the engine wants."""

    case: Case
    call: Callable[..., Tensor]  # of x, weight, bias; keywords: spec, engine


def by_conv_act(case: Case) -> Callable[..., Tensor]:
    geometry = dict(zip(("stride", "padding", "dilation"), case.geometry, strict=True))

    def call(x: Tensor, w: Tensor, b: Tensor | None, spec: ActSpec, **choice: Any) -> Tensor:
        return conv_act(x, w, b, spec, **geometry, **choice)

    return call


def by_module(case: Case) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor | None, spec: ActSpec, **choice: Any) -> Tensor:
        shape, n = case.weight, case.x[1]
        sizes = zip(("stride", "padding", "dilation"), case[3:], strict=True)
        module: nn.Module = (
            ShapedConv2d(
                n, shape[0], shape[2:], bias=b is not None, spec=spec, **dict(sizes), **choice
            )
            if case.kernel
            else ShapedLinear(n, shape[0], bias=b is not None, spec=spec, **choice)
        )
        named = {"weight": w} if b is None else {"weight": w, "bias": b}
        return torch.func.functional_call(module, named, (x,))

    return call


def by_chain(case: Case) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor | None, spec: ActSpec, **choice: Any) -> Tensor:
        sizes = [t or default for t, default in zip(case[3:], (1, 0, 1), strict=True)]
        return conv_chain(x, [ChainLayer(w, b, spec, *sizes, **choice)])

    return call


def by_linear_act(case: Case) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor | None, spec: ActSpec, **choice: Any) -> Tensor:
        return linear_act(x, w, b, spec, **choice)

    return call


SMALL, FLAT_CASE = conv2d((3, 16, 7, 6), 32, 3, 2, 1), Case((20, 16), 32)
LAYERS = {
    "conv_act": Layer(SMALL, by_conv_act(SMALL)),
    "conv_act, 1d": Layer(KINDS["1d"], by_conv_act(KINDS["1d"])),
    "conv_act, 3d": Layer(KINDS["3d"], by_conv_act(KINDS["3d"])),
    "ShapedConv2d": Layer(SMALL, by_module(SMALL)),
    "conv_chain": Layer(SMALL, by_chain(SMALL)),
    "linear_act": Layer(FLAT_CASE, by_linear_act(FLAT_CASE)),
    "ShapedLinear": Layer(FLAT_CASE, by_module(FLAT_CASE)),
    "conv_chain, linear": Layer(FLAT_CASE, by_chain(FLAT_CASE)),
}


def operands(case: Case, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = draw(*case.weight, seed=1) / math.prod(case.weight[1:]) ** 0.5
    return last(draw(*case.x)), weight, draw(case.out, seed=2) if bias else None


def grads_of(f: Callable[..., Tensor], grad: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = f(*leaves)
    wanted = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


def assert_near(got: Tensor, truth: Tensor, terms: int) -> None:
    """The error is at most a random walk of float32 roundings over so many terms."""
    assert got.dtype == F32
    assert got.shape == truth.shape
    error = (got.double() - truth).abs().amax().item()
    assert error <= 8 * terms**0.5 * EPS * truth.abs().amax().item()


class Ops(TorchDispatchMode):
    """Counts the calls of csrc's convolutions, and of torch's, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        if name.startswith("native_conv") or name in TORCHS:
            self.names.append(name)
        return func(*args, **kwargs or {})


TORCHS = ("convolution", "convolution_backward", "addmm", "mm", "linear")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_against_float64(name: str, spec: ActSpec, bias: bool) -> None:
    case, call = LAYERS[name]
    inputs, grad = operands(case, bias), draw(*case.y, seed=3)
    with Ops() as ops:
        got = grads_of(lambda *t: call(*t, spec, engine="native"), grad, *inputs)
    forward = "native_conv_act" if spec.saves_output else "native_conv"
    assert ops.names == [forward, "native_conv_dgrad", "native_conv_wgrad"]
    want = grads_of(lambda *t: plain(case, *t, spec), grad.double(), *wide(*inputs))
    for g, w in zip(got, want, strict=True):
        assert_near(g, w, max(math.prod(case.weight), math.prod(case.y)) // case.out)
    assert got[0].movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_only_where_asked(name: str, spec: ActSpec) -> None:
    case, call = LAYERS[name]
    every = grads_of(
        lambda *t: call(*t, spec, engine="native"), torch.ones(case.y), *operands(case)
    )
    for needs in itertools.product([False, True], repeat=3):
        inputs = operands(case)
        for t, need in zip(inputs, needs, strict=True):
            assert t is not None
            t.requires_grad_(need)
        with Ops() as ops:
            y = call(*inputs, spec, engine="native")
            assert y.requires_grad == any(needs)
            if any(needs):
                y.sum().backward()  # whose gradient is expanded
        assert ops.names.count("native_conv_dgrad") == needs[0]
        assert ops.names.count("native_conv_wgrad") == needs[1]
        assert not set(TORCHS) & set(ops.names)
        for t, need, want in zip(inputs, needs, every[1:], strict=True):
            assert t is not None
            assert (t.grad is not None) == need
            assert t.grad is None or torch.equal(t.grad, want)
            assert t.grad is None or t.grad.stride() == t.stride()


def stack(params: list[Tensor], spec: ActSpec, **choice: Any) -> list[ChainLayer]:
    a, b = ChainLayer(*params[:2], spec, 1, 1, **choice), ChainLayer(*params[2:4], LEAKY, **choice)
    return [a, b, ChainLayer(*params[4:6], spec, 2, 1, **choice)]


STACK = [(32, 16, 3, 3), (48, 32, 1, 1), (16, 48, 3, 2)]


def stack_params() -> list[Tensor]:
    params = []
    for i, shape in enumerate(STACK):
        params += [draw(*shape, seed=2 * i) / math.prod(shape[1:]) ** 0.5]
        params += [draw(shape[0], seed=2 * i + 1)]
    return params


def plain_stack(x: Tensor, params: list[Tensor], spec: ActSpec) -> Tensor:
    for layer in stack(params, spec):
        z = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        x = reference.bias_act(z, None, layer.spec)
    return x


@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
def test_chains_against_float64(spec: ActSpec) -> None:
    x, params = last(draw(4, 16, 7, 6, seed=9)), stack_params()

    def chained(x: Tensor, *params: Tensor) -> Tensor:
        return conv_chain(x, stack(list(params), spec, engine="native"))

    def one_by_one(x: Tensor, *params: Tensor) -> Tensor:
        for w, b, s, stride, padding, *_ in stack(list(params), spec):
            x = conv_act(x, w, b, s, stride=stride, padding=padding, engine="native")
        return x

    grad = draw(4, 16, 4, 4, seed=10)
    with Ops() as ops:
        got = grads_of(chained, grad, x, *params)
    assert not set(TORCHS) & set(ops.names)
    assert ops.names.count("native_conv_dgrad") == ops.names.count("native_conv_wgrad") == 3
    truth = grads_of(lambda x, *p: plain_stack(x, list(p), spec), grad, *wide(x, *params))
    alone = grads_of(one_by_one, grad, x, *params)
    for g, w, a in zip(got, truth, alone, strict=True):
        assert_near(g, w, 3 * 48 * 9)
        assert_near(a, w, 3 * 48 * 9)


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_parameters_of_a_chain(frozen: int) -> None:
    """All of one kind, or all of the layers up to one."""
    x, params = last(draw(2, 16, 6, 5)), stack_params()
    out = {0: {0, 2, 4}, 1: {1, 3, 5}, 2: {0, 1}, 3: {0, 1, 2, 3}, 4: {2, 3}, 5: {4, 5}}[frozen]
    for x_wants in (True, False):
        got, want = [], []
        for dtype, results in ((F32, got), (F64, want)):
            leaves = [t.to(dtype, copy=True) for t in params]
            for i, t in enumerate(leaves):
                t.requires_grad_(i not in out)
            first = x.to(dtype, copy=True).requires_grad_(x_wants)
            if dtype == F32:
                y = conv_chain(first, stack(leaves, SWISH, engine="native"))
            else:
                y = plain_stack(first, leaves, SWISH)
            y.square().sum().backward()
            results += [t.grad for t in (first, *leaves)]
        for g, w in zip(got, want, strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                assert_near(g, w, 3 * 48 * 9)


NOT_SERVED: dict[str, tuple[str, Callable[[], tuple[Tensor, Tensor, dict[str, Any]]]]] = {
    "contiguous": ("is not channels_last", lambda: (big(), small_weight(), {})),
    "sliced": (
        "is not channels_last",
        lambda: (last(big())[:, :, ::2], small_weight(), {}),
    ),
    "float64": (
        "csrc's convolutions are for float32, got torch.float64",
        lambda: (last(big()).double(), small_weight().double(), {}),
    ),
    "bfloat16": (
        "got torch.bfloat16",
        lambda: (last(big()).bfloat16(), small_weight().bfloat16(), {}),
    ),
    "groups": ("groups=2", lambda: (last(big()), draw(32, 16, 3, 3), {"groups": 2})),
    "channels in": (
        "24 channels",
        lambda: (last(draw(4, 24, 30, 20)), draw(32, 24, 1, 1), {}),
    ),
    "channels out": ("40 channels", lambda: (last(big()), draw(40, 32, 1, 1), {})),
}


def big() -> Tensor:
    return draw(4, 32, 20, 16)


def small_weight() -> Tensor:
    return draw(32, 32, 3, 3, seed=1)


@pytest.mark.parametrize("kind", NOT_SERVED)
def test_what_is_not_served(kind: str) -> None:
    """An explicit engine says why; "auto" leaves the layer to torch."""
    message, make = NOT_SERVED[kind]
    x, weight, more = make()
    for entry in (
        lambda e: conv_act(x, weight, None, LEAKY, engine=e, **more),
        lambda e: conv_chain(x, [ChainLayer(weight, None, LEAKY, engine=e, **more)]),
    ):
        with pytest.raises(ValueError, match=f"engine 'native' cannot run this layer: .*{message}"):
            entry("native")
        with Ops() as ops:
            y = entry("auto")
        if not INTERPRET:
            assert ops.names == ["convolution"]
        z = F.conv2d(x.double(), weight.double(), **more)
        truth = reference.bias_act(z, None, LEAKY)
        assert (y.double() - truth).abs().amax() <= 8 * torch.finfo(
            y.dtype
        ).eps * truth.abs().amax()


def test_linear_layers_not_served() -> None:
    with pytest.raises(ValueError, match="cannot run this layer: 40 channels or features"):
        linear_act(draw(4, 40), draw(16, 40), None, LEAKY, engine="native")
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        linear_act(draw(4, 16).double(), draw(16, 16).double(), None, LEAKY, engine="native")


@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 5, 16), (2, 0, 16)], ids=str)
def test_linear_inputs_of_any_dimensions(shape: tuple[int, ...]) -> None:
    x, w, b = draw(*shape), draw(32, 16, seed=1) / 4, draw(32, seed=2)
    grad = draw(*shape[:-1], 32, seed=3)
    got = grads_of(lambda *t: linear_act(*t, SWISH, engine="native"), grad, x, w, b)

    def truth(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.bias_act(F.linear(x, w, b), None, SWISH)

    want = grads_of(truth, grad, *wide(x, w, b))
    for g, t in zip(got, want, strict=True):
        assert g.shape == t.shape
        if t.numel():
            assert_near(g, t, 32)


@pytest.mark.parametrize("name", ["conv_act", "linear_act", "conv_chain"])
def test_gradients_of_any_layout(name: str) -> None:
    case, call = LAYERS[name]
    inputs = operands(case)
    dense = last(draw(*case.y, seed=3))
    f = lambda *t: call(*t, SWISH, engine="native")  # noqa: E731
    want = grads_of(f, dense, *inputs)
    padded = torch.cat([dense, dense], 1)[:, : case.out]
    for grad in (dense.contiguous(), padded, dense.flip(0).flip(0)):
        assert all(torch.equal(g, w) for g, w in zip(grads_of(f, grad, *inputs), want, strict=True))


@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("name", ["conv_act", "linear_act", "conv_chain"])
def test_second_derivatives_are_those_of_torch(name: str, spec: ActSpec) -> None:
    case, call = LAYERS[name]

    def penalty(engine: str) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in operands(case) if t is not None]
        y = call(*leaves, spec, engine=engine)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        total = sum(g.square().sum() for g in first)
        return [*(g.detach() for g in first), *torch.autograd.grad(total, leaves)]

    for g, w in zip(penalty("native"), penalty("aten"), strict=True):
        assert_near(g, w.double(), 16 * math.prod(case.weight))


@pytest.mark.parametrize("choice", ["engine", "backend"])
@pytest.mark.parametrize("chain", [False, True], ids=["conv_act", "conv_chain"])
def test_transforms_are_refused(chain: bool, choice: str) -> None:
    """A named engine or backend has no kernels for transforms, so it refuses them."""
    x, w, b = operands(SMALL)

    def f(x: Tensor, **given: Any) -> Tensor:
        if chain:
            return conv_chain(x, [ChainLayer(w, b, SWISH, 2, 1, **given)])
        return conv_act(x, w, b, SWISH, stride=2, padding=1, **given)

    def total(x: Tensor) -> Tensor:
        return f(x, **{choice: "native"}).sum()

    for call in (
        lambda: torch.func.grad(total)(x),
        lambda: torch.func.jvp(total, (x,), (x,)),
        lambda: torch.func.vmap(total)(x.unsqueeze(0)),
        lambda: torch.compile(torch.func.grad(total), backend="eager")(x),
    ):
        with pytest.raises(ValueError, match=f"'native' cannot run under .* {choice}='auto'"):
            call()
    mapped = torch.func.vmap(f)(x.unsqueeze(0))[0]
    torch.testing.assert_close(mapped, f(x, **{choice: "native"}), rtol=1e-5, atol=1e-5)


def compiled_layers(x: Tensor, *params: Tensor) -> Tensor:
    y = conv_act(x, params[0], params[1], SWISH, padding=1, engine="native")
    y = conv_chain(y, stack(list(params), LEAKY, engine="native")[1:])
    return linear_act(y.mean((2, 3)), params[6], None, SWISH, engine="native")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_fullgraph_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    params = [*stack_params(), draw(32, 16, seed=11)]
    compiled = torch.compile(compiled_layers, fullgraph=True, backend="aot_eager")
    for batch in (4, 6, 3) if dynamic else (4,):
        leaves = [
            t.detach().clone().requires_grad_() for t in (last(draw(batch, 16, 7, 6)), *params)
        ]
        if dynamic:
            torch._dynamo.mark_dynamic(leaves[0], 0)
        results = []
        for f in (compiled, compiled_layers):
            y = f(*leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for g, w in zip(*results, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5 * w.abs().amax().item())


@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_compile_with_every_size_dynamic(kind: str) -> None:
    """Dynamo turns each number that is not a literal in the traced code into an input."""
    torch._dynamo.reset()
    weights = [(draw(32, 32, seed=i) / 6).requires_grad_() for i in range(3)]

    def stack(x: Tensor) -> Tensor:
        for w in weights:
            if kind == "linear":
                x = linear_act(x, w, None, LEAKY, engine="native")
            else:
                x = conv_act(x, w[..., None, None], None, SWISH, engine="native")
        return x

    compiled = torch.compile(stack, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch in (4, 6):
        x = draw(batch, 32) if kind == "linear" else last(draw(batch, 32, 7, 6))
        for g, w in zip(
            *(torch.autograd.grad(f(x).sum(), weights) for f in (compiled, stack)), strict=True
        ):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5 * w.abs().amax().item())


@pytest.mark.slow
def test_inductor_keeps_layouts() -> None:
    """Inductor may choose the layouts of its own operations before and after ours."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        y = conv_act(x.sin(), w, None, LEAKY, padding=1, engine="native")
        return y.tanh()

    torch._dynamo.reset()
    inputs, grad = (last(draw(3, 16, 7, 6)), draw(16, 16, 3, 3) / 12), draw(3, 16, 7, 6, seed=3)
    got, want = (grads_of(g, grad, *inputs) for g in (torch.compile(f, fullgraph=True), f))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5 * w.abs().amax().item())


AUTO = pytest.mark.skipif(INTERPRET, reason="the interpreter serves CPU tensors")
LARGE = conv2d((4, 32, 20, 16), 32, 3, 1, 1)


@pytest.fixture
def always_native() -> Iterator[None]:
    """Measurements that found csrc the fastest everywhere."""
    previous = install_chooser(lambda direction, problem: "native")
    yield
    install_chooser(previous)


@AUTO
@pytest.mark.usefixtures("always_native")
@pytest.mark.parametrize("name", ["conv_act", "module", "chain"])
def test_auto_takes_csrc(name: str) -> None:
    """Large inputs go to csrc, unless a backend or another engine is named."""
    entry = {"conv_act": by_conv_act, "module": by_module, "chain": by_chain}[name]
    small = conv2d((4, 32, 15, 16), 32, 3, 1, 1)
    csrc = ["native_conv_act", "native_conv_dgrad", "native_conv_wgrad"]
    for case, choice, served in (
        (LARGE, {}, True),
        (LARGE, {"backend": "native", "engine": "native"}, True),
        (LARGE, {"backend": "native"}, False),
        (LARGE, {"backend": "reference"}, False),
        (LARGE, {"engine": "aten"}, False),
        (small, {}, False),
    ):
        inputs, grad = operands(case), draw(*case.y, seed=3)
        with Ops() as ops:
            got = grads_of(lambda *t: entry(case)(*t, LEAKY, **choice), grad, *inputs)  # noqa: B023
        assert ops.names == (csrc if served else ["convolution", "convolution_backward"]), choice
        want = grads_of(lambda *t: plain(case, *t, LEAKY), grad.double(), *wide(*inputs))  # noqa: B023
        for g, w in zip(got, want, strict=True):
            assert_near(g, w, math.prod(case.y) // case.out)


@AUTO
@pytest.mark.usefixtures("always_native")
def test_auto_takes_csrc_for_linear_layers() -> None:
    case = Case((2048, 16), 32)
    inputs, grad = operands(case), draw(*case.y, seed=3)
    with Ops() as ops:
        grads_of(lambda *t: linear_act(*t, SWISH), grad, *inputs)
    assert ops.names == ["native_conv", "native_conv_dgrad", "native_conv_wgrad"]


@AUTO
@pytest.mark.usefixtures("always_native")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_fullgraph_compile_of_auto(dynamic: bool) -> None:
    torch._dynamo.reset()
    f = by_conv_act(LARGE)
    called: list[str] = []

    def note(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        called.extend(str(node.target) for node in module.graph.nodes)
        return module

    noted = torch.compile(lambda *t: f(*t, SWISH), fullgraph=True, backend=note)
    compiled = torch.compile(lambda *t: f(*t, SWISH), fullgraph=True, backend="aot_eager")
    _, w, b = operands(LARGE)
    for batch in (4, 6, 5) if dynamic else (4,):
        x, grad = last(draw(batch, *LARGE.x[1:])), draw(batch, *LARGE.y[1:], seed=3)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            y = noted(x, w, b)
        torch.testing.assert_close(y, f(x, w, b, SWISH), rtol=1e-5, atol=1e-5)
        leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
        if dynamic:
            torch._dynamo.mark_dynamic(leaves[0], 0)
        got = torch.autograd.grad(compiled(*leaves), leaves, grad)
        for g, t in zip(got, torch.autograd.grad(f(*leaves, SWISH), leaves, grad), strict=True):
            torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-5 * t.abs().amax().item())
    # One graph, whatever the batch.
    assert [name for name in called if "conv" in name] == ["fusedshape.native_conv_act.default"]


@AUTO
def test_autocast_goes_to_torch() -> None:
    x, w = last(big()).requires_grad_(), small_weight().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        with Ops() as ops:
            y = conv_act(x, w, None, LEAKY)
        with pytest.raises(ValueError, match=r"for float32, got torch\.bfloat16"):
            conv_act(x, w, None, LEAKY, engine="native")
    assert ops.names == ["convolution"]
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == F32


def saved_numbers(f: Callable[[], Tensor], *known: Tensor) -> int:
    """Count the numbers that autograd saves for f's backward, without `known` tensors."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if all(t.data_ptr() != k.data_ptr() for k in known):
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = f()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
def test_one_activation_is_saved_a_layer(spec: ActSpec) -> None:
    x = last(draw(2, 16, 6, 5))
    weight, bias = draw(16, 16, 3, 3).requires_grad_(), draw(16).requires_grad_()
    layer = ChainLayer(weight, bias, spec, 1, 1, engine="native")
    one = lambda: conv_chain(x, [layer])  # noqa: E731
    assert saved_numbers(one, x, weight, bias) == x.numel()
    three = lambda: conv_chain(x, [layer] * 3)  # noqa: E731
    assert saved_numbers(three, x, weight, bias) == 3 * x.numel()
    alone = lambda: conv_act(x, weight, bias, spec, padding=1, engine="native")  # noqa: E731
    assert saved_numbers(alone, x, weight, bias) == x.numel()


def test_inference_mode_and_no_grad() -> None:
    x, w, b = operands(SMALL)
    f = LAYERS["conv_act"].call
    want = f(x, w, b, SWISH, engine="native")
    with torch.inference_mode():
        assert torch.equal(f(x.clone(), w, b, SWISH, engine="native"), want)
    with torch.no_grad():
        y = f(x, w.requires_grad_(), b, SWISH, engine="native")
    assert torch.equal(y, want)
    assert not y.requires_grad


def test_copies_of_modules_and_hooks() -> None:
    x = last(draw(*SMALL.x))
    sizes = {"stride": 2, "padding": 1}
    module = ShapedConv2d(16, 32, 3, **sizes, spec=LEAKY, engine="native").to(memory_format=LAST)
    want = module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for other in (*copies, torch.load(file, weights_only=False)):
        assert other.engine == "native"
        with Ops() as ops:
            assert torch.equal(other(x), want)
        assert ops.names == ["native_conv_act"]
        with pytest.raises(ValueError, match="is not channels_last"):
            other(x.contiguous())
    seen: list[tuple[int, ...]] = []
    module.register_forward_hook(lambda _, inputs, out: seen.append(tuple(out.shape)))
    module.register_full_backward_hook(lambda _, gx, gy: seen.append(tuple(gx[0].shape)))
    module.weight.register_hook(lambda g: 2 * g)
    leaf = x.clone().requires_grad_()
    module(leaf).sum().backward()
    assert seen == [(3, 32, 4, 3), (3, 16, 7, 6)]
    twice = module.weight.grad
    assert twice is not None
    (once,) = torch.autograd.grad(copies[0](leaf).sum(), copies[0].weight)
    assert torch.equal(twice, 2 * once)


def test_no_images() -> None:
    x = last(torch.empty(0, 16, 7, 6)).requires_grad_()
    w, b = draw(*SMALL.weight).requires_grad_(), draw(32).requires_grad_()
    y = conv_act(x, w, b, LEAKY, stride=2, padding=1, engine="native")
    y.sum().backward()
    assert y.shape == (0, 32, 4, 3)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for t in (w, b):
        assert t.grad is not None
        assert not t.grad.any()


def test_threads_of_python_do_not_disturb_each_other() -> None:
    """Memory that a kernel borrows belongs to one call at a time."""
    cases = [
        conv2d((4, 32, 9, 8), 48, 3, 2, 1),
        conv2d((5, 48, 8, 9), 32, 3, 1, 1),
        Case((90, 64), 64),
    ]
    calls = [by_conv_act(c) if c.kernel else by_linear_act(c) for c in cases]

    def layer(i: int) -> list[Tensor]:
        f = lambda *t: calls[i](*t, SWISH, engine="native")  # noqa: E731
        return grads_of(f, last(draw(*cases[i].y, seed=3)), *operands(cases[i]))

    want = [layer(i) for i in range(len(cases))]
    wrong: list[str] = []

    def work(offset: int) -> None:
        torch.set_num_threads(1)
        for turn in range(30):
            i = (turn + offset) % len(cases)
            for g, w in zip(layer(i), want[i], strict=True):
                if not torch.equal(g, w):
                    wrong.append(f"case {i}, turn {turn}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
