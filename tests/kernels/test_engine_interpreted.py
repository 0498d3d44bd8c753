"""Across modules: the Triton engine in the interpreter (TRITON_INTERPRET=1), alone and mixed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fusedshape import ShapedChain, ShapedConv2d, reference
from fusedshape.ops import ChainLayer, conv_act, conv_chain, linear_act
from fusedshape.ops.choice import install_chooser
from fusedshape.ops.engines.triton import INTERPRET
from fusedshape.ops.problem import Direction, Problem
from fusedshape.spec import saves_output
from tests.support.interpreter import ieee_products
from tests.support.operands import draw as randn
from tests.support.specs import shaped

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Triton 3.6's interpreter, where the bound of a loop is not known beforehand.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1"),
]
F16, F32, F64 = torch.float16, torch.float32, torch.float64
LEAKY, SWISH = shaped("leaky_relu"), shaped("swish")
KINDS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((6, 5, 3, 3), {"padding": 1}),
    ((4, 6, 1, 1), {}),
    ((5, 4, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
]


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    """Multiply float32 without rounding it to tf32."""
    with ieee_products(torch.backends.cudnn.conv):
        yield


def draw(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    t = randn(*shape, dtype=dtype, seed=seed)
    return t.to(memory_format=torch.channels_last) if t.ndim == 4 else t


def stack(dtype: torch.dtype) -> list[Tensor]:
    tensors = [draw(2, 5, 6, 5, dtype=dtype)]
    for i, (shape, _) in enumerate(KINDS):
        tensors += [draw(*shape, dtype=dtype, seed=2 * i + 1) / 3]
        tensors += [draw(shape[0], dtype=dtype, seed=2 * i + 2)]
    return tensors


def layers(params: Sequence[Tensor], specs: Any, engines: Any) -> list[ChainLayer]:
    return [
        ChainLayer(*params[2 * i : 2 * i + 2], spec, engine=engine, **geometry)
        for i, ((_, geometry), spec, engine) in enumerate(zip(KINDS, specs, engines, strict=True))
    ]


def grads_of(f: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*leaves)
    grad = draw(*out.shape, dtype=out.dtype, seed=99)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Within the rounding of `dtype` at each of a few layers, as a share of the largest."""
    allowed = 32 * torch.finfo(dtype).eps
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g.double() - w).abs().max() <= allowed * w.abs().max()


MIXTURES = list(itertools.product(["aten", "triton"], repeat=3))[1:]


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("engines", MIXTURES, ids="-".join)
def test_any_mixture_against_float64(engines: tuple[str, ...], dtype: torch.dtype) -> None:
    tensors = stack(dtype)
    for specs in ((LEAKY, SWISH, LEAKY), (SWISH, LEAKY, SWISH)):

        def chain(x: Tensor, *params: Tensor, specs: Any = specs) -> Tensor:
            return conv_chain(x, layers(params, specs, engines))

        def truth(x: Tensor, *params: Tensor, specs: Any = specs) -> Tensor:
            return conv_chain(x, layers(params, specs, ["aten"] * 3))

        got = grads_of(chain, tensors)
        want = grads_of(truth, [t.double() for t in tensors])
        assert_close(got, want, dtype)
        assert all(g.dtype == dtype for g in got)
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert got[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
def test_single_layers(spec: Any) -> None:
    x, weight, bias = draw(2, 5, 4, 3), draw(6, 5, 3, 3, seed=1), draw(6, seed=2)

    def conv(x: Tensor, w: Tensor, b: Tensor, engine: str = "triton") -> Tensor:
        return conv_act(x, w, b, spec, padding="same", engine=engine)

    def linear(x: Tensor, w: Tensor, b: Tensor, engine: str = "triton") -> Tensor:
        return linear_act(x, w, b, spec, engine=engine)

    def row(x: Tensor, w: Tensor, b: Tensor, engine: str = "triton") -> Tensor:
        return conv_act(x, w, b, spec, stride=2, engine=engine)

    one_dimensional = draw(2, 9, 5).transpose(1, 2), draw(6, 5, 3, seed=1), bias
    for f, tensors in (
        (conv, (x, weight, bias)),
        (linear, (draw(2, 3, 5), draw(6, 5, seed=1), bias)),
        (linear, (draw(5), draw(6, 5, seed=1), bias)),
        (row, one_dimensional),
    ):
        got = grads_of(f, tensors)
        want = grads_of(lambda *a, f=f: f(*a, engine="aten"), [t.double() for t in tensors])
        assert_close(got, want, F32)
    image = x[0].movedim(0, -1).contiguous().movedim(-1, 0)
    assert_close([conv(image, weight, bias)], [conv(x, weight, bias)[0].double()], F32)


class Calls(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().partition("::")[2].partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_no_pass_over_an_activation_is_left_in_between() -> None:
    tensors = [t.requires_grad_() for t in stack(F32)]
    with Calls() as calls:
        y = conv_chain(tensors[0], layers(tensors[1:], [LEAKY] * 3, ["triton"] * 3))
    kernels = {n: c for n, c in calls.counts.items() if n.startswith(("triton", "conv"))}
    assert kernels == {"triton_conv_act": 3}
    grad = torch.ones_like(y)
    with Calls() as calls:
        torch.autograd.grad(y, tensors, grad)
    want = {"triton_conv_dgrad": 3, "triton_conv_wgrad": 3}
    kernels = {n: c for n, c in calls.counts.items() if n.startswith(("triton", "conv"))}
    assert kernels == want
    # The last layer's is the only pass of its own.
    assert sum(c for n, c in calls.counts.items() if n.endswith(("act_grad", "act_grad_"))) == 1
    assert not {"sum", "mul", "add", "clone", "copy_"} & calls.counts.keys()


def test_frozen_parts() -> None:
    x, *params = stack(F32)
    for needs in ((0, 1, 0, 0, 0, 1), (0, 0, 0, 1, 1, 0)):
        for p, need in zip(params, needs, strict=True):
            p.requires_grad_(bool(need))
        found = []
        for engine in ("triton", "aten"):
            conv_chain(x, layers(params, [SWISH, LEAKY, SWISH], [engine] * 3)).sum().backward()
            found.append([p.grad for p in params])
            for p in params:
                p.grad = None
        for got, want, need in zip(*found, needs, strict=True):
            assert (got is not None) == bool(need)
            if want is not None:
                assert_close([got], [want.double()], F32)


def test_second_derivatives_do_not_depend_on_the_engine() -> None:
    tensors = [t.requires_grad_() for t in stack(F32)[:3]]

    def penalty(engine: str) -> list[Tensor]:
        y = conv_act(*tensors, SWISH, padding=1, engine=engine)
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))

    assert_close(penalty("triton"), [t.double() for t in penalty("aten")], F32)


def test_a_chooser_mixes_directions() -> None:
    asked: list[tuple[Direction, Problem]] = []

    def chooser(direction: Direction, problem: Problem) -> str:
        asked.append((direction, problem))
        return "triton" if direction.startswith("dgrad") else "aten"

    tensors = stack(F32)
    want = grads_of(lambda x, *p: conv_chain(x, layers(p, [LEAKY] * 3, ["aten"] * 3)), tensors)
    previous = install_chooser(chooser)
    try:
        with Calls() as calls:
            got = grads_of(
                lambda x, *p: conv_chain(x, layers(p, [LEAKY] * 3, ["auto"] * 3)), tensors
            )
        grouped = conv_act(draw(2, 4, 3, 3), draw(4, 2, 1, 1), None, LEAKY, groups=2)
    finally:
        install_chooser(previous)
    first, later = ["fprop", "dgrad", "wgrad"], ["fprop", "dgrad_act", "wgrad"]
    directions = [direction for direction, _ in asked]
    assert directions[:9] == [*first, *later, *later]
    # Without a gradient Python asks for one direction, a plan of csrc/host for all three.
    assert directions[9:] in (["fprop"], first)
    assert {p.input for _, p in asked[:9]} == {(2, 5, 6, 5), (2, 6, 6, 5), (2, 4, 6, 5)}
    assert all(p.channels_last for _, p in asked[:9])
    assert calls.counts["triton_conv_dgrad"] == 3
    assert calls.counts["convolution"] == 3
    assert calls.counts["triton_conv_wgrad"] == calls.counts["triton_conv_act"] == 0
    assert_close(got, [t.double() for t in want], F32)
    assert grouped.shape == (2, 4, 3, 3), "what cannot run is ATen's"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fullgraph_compile(backend: str) -> None:
    torch._dynamo.reset()

    def chain(x: Tensor, *params: Tensor) -> Tensor:
        return conv_chain(x, layers(params, [LEAKY, SWISH, LEAKY], ["triton", "triton", "aten"]))

    tensors = stack(F32)
    compiled = torch.compile(chain, fullgraph=True, backend=backend, dynamic=False)
    assert_close(grads_of(compiled, tensors), [t.double() for t in grads_of(chain, tensors)], F32)
    torch._dynamo.reset()


@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("kind", [*range(3), "row", "linear"])
def test_opcheck(kind: int | str, spec: Any) -> None:
    if kind == "linear":
        x, weight = draw(7, 5), draw(4, 5, seed=1)
        sizes: list[list[int]] = [[], [], []]
    elif kind == "row":
        x, weight = draw(2, 7, 5).transpose(1, 2), draw(4, 5, 3, seed=1)
        sizes = [[2], [1], [1]]
    else:
        shape, geometry = KINDS[int(kind)]
        x, weight = draw(2, shape[1], 6, 5), draw(*shape, seed=1)
        pairs = (
            (geometry.get(n, d), d) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))
        )
        sizes = [[v] * 2 if isinstance(v, int) else list(v) for v, _ in pairs]
    ops = torch.ops.fusedshape
    bias, before = draw(weight.shape[0], seed=2), draw(weight.shape[1], seed=3)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")

    def check(op: Any, *args: Any) -> Any:
        torch.library.opcheck(op.default, args, test_utils=checks)
        return op(*args)

    z = check(ops.triton_conv, x, weight, *sizes)
    y = check(ops.triton_conv_act, x, weight, bias, None, 0.0, *sizes, *spec.kernel_args)
    check(ops.triton_conv_act, x, weight, None, z, 0.6, *sizes, *spec.kernel_args)
    assert_close([y], [reference.bias_act(z.double(), bias.double(), spec)], F32)
    epilogue = (*spec.kernel_args, saves_output(spec, x.dtype), True)
    check(ops.triton_conv_dgrad, z, weight, x, before, x.shape, *sizes, *epilogue)
    check(ops.triton_conv_dgrad, z, weight, None, None, x.shape, *sizes, *epilogue[:-1], False)
    check(ops.triton_conv_wgrad, z, x, weight.shape, *sizes)


def test_modules_and_refusals() -> None:
    x = draw(2, 4, 5, 5)
    net = ShapedChain(
        *[ShapedConv2d(4, 4, 3, padding=1, spec=LEAKY, engine="triton") for _ in range(2)]
    )
    with Calls() as calls, torch.no_grad():
        got = net(x)
    assert calls.counts["triton_conv_act"] == 2
    plain = nn.Sequential(*net)
    for layer in plain:
        layer.engine = "aten"
    assert_close([got], [plain(x).double()], F32)
    wide = torch.ones(2, 4, 5, 5).to(memory_format=torch.contiguous_format)
    ring = torch.ones(4, 1, 3, 3)
    for call, why in (
        (
            lambda: conv_act(wide[:, :3], ring[:, :1].expand(4, 3, 3, 3), None, LEAKY),
            "channels_last",
        ),
        (lambda: conv_act(x, ring, None, LEAKY, groups=4), "groups=4"),
        (lambda: conv_act(x.double(), torch.ones(4, 4, 3, 3).double(), None, LEAKY), "float64"),
    ):
        call()
        with pytest.raises(ValueError, match=f"cannot run this layer: .*{why}"):
            conv_act_with_triton(call)


def conv_act_with_triton(call: Callable[[], Tensor]) -> Tensor:
    """Repeat a call of conv_act with the Triton engine."""
    defaults = conv_act.__kwdefaults__
    conv_act.__kwdefaults__ = {**defaults, "engine": "triton"}
    try:
        return call()
    finally:
        conv_act.__kwdefaults__ = defaults


def test_gradgradcheck_in_a_chain_that_ends_in_aten() -> None:
    # float64 has no Triton engine; the formula is the same for both.
    params = [draw(3, 2, 1, 1, dtype=F64, seed=1), draw(3, dtype=F64, seed=2)]
    inputs = [t.requires_grad_() for t in (draw(1, 2, 2, 2, dtype=F64), *params)]
    assert gradgradcheck(lambda *a: conv_chain(a[0], [ChainLayer(a[1], a[2], SWISH)]), inputs)
