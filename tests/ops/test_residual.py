"""conv_act and linear_act with a residual: the normalised sum of a layer and a shortcut."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fusedshape import ActSpec, native, reference
from fusedshape.ops import conv_act, linear_act
from fusedshape.ops.choice import install_chooser
from fusedshape.ops.layer import joined_spec
from fusedshape.ops.problem import Direction, Problem
from tests.support.backends import BACKENDS, INTERPRET, NATIVE_SERVES
from tests.support.operands import F32, F64, LEAKY, SWISH, draw, last
from tests.support.specs import SPECS

BOTH = pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
NHWC = torch.channels_last


def normalised(z: Tensor, r: Tensor, w: float, spec: ActSpec) -> Tensor:
    """What all of this must be, from the product and its bias."""
    return reference.shaped_act(math.sqrt((1 - w) * (1 + w)) * z + w * r, spec)


def results(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """F's output, and its gradients for one gradient of that."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = f(*leaves)
    grad = draw(*y.shape, dtype=y.dtype, seed=99)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_close(got: list[Tensor], want: list[Tensor], units: float = 32) -> None:
    """Errors are at most a few roundings, relative to the largest number."""
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        allowed = units * torch.finfo(g.dtype).eps * w.abs().max()
        assert (g.double() - w).abs().max() <= allowed


CONVS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 4, 9), (6, 4, 4), {"padding": "same"}),
    ((2, 4, 7, 6), (6, 2, 3, 2), {"padding": (2, 0), "groups": 2, "dilation": (1, 2)}),
    ((2, 4, 5, 5), (4, 4, 3, 3), {"padding": 1, "stride": 2, "padding_mode": "circular"}),
    ((1, 2, 4, 4, 3), (3, 2, 3, 1, 3), {"padding": (1, 0, 1), "stride": (1, 2, 1)}),
    ((4, 7, 6), (6, 4, 1, 1), {}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("backend", BACKENDS)
@BOTH
@pytest.mark.parametrize("case", CONVS, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def test_conv_act_against_torch(case: tuple[Any, ...], spec: ActSpec, backend: str) -> None:
    x_shape, (k, c, *kernel), how = case
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    oracle = cls(c * how.get("groups", 1), k, tuple(kernel), **how).double()
    x, weight, bias = draw(*x_shape), draw(k, c, *kernel, seed=1), draw(k, seed=2)
    r = draw(*oracle(x).shape, seed=3)

    def truth(x: Tensor, weight: Tensor, bias: Tensor, r: Tensor) -> Tensor:
        z = torch.func.functional_call(oracle, {"weight": weight, "bias": bias}, (x,))
        return normalised(z, r, 0.6, spec)

    def fused(*t: Tensor) -> Tensor:
        return conv_act(*t[:3], spec, residual=t[3], residual_weight=0.6, backend=backend, **how)

    tensors = x, weight, bias, r
    assert_close(results(fused, *tensors), results(truth, *tensors), 256)
    assert_close([fused(*tensors)], [truth(*tensors)])  # where nothing wants a gradient
    plain = results(lambda *t: fused(t[0], t[1], None, t[2]), x, weight, r)
    assert_close(plain, results(lambda *t: truth(t[0], t[1], 0 * bias, t[2]), x, weight, r), 256)


@pytest.mark.parametrize("backend", BACKENDS)
@BOTH
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)], ids=str)
def test_linear_act_against_torch(shape: tuple[int, ...], spec: ActSpec, backend: str) -> None:
    tensors = draw(*shape), draw(4, 5, seed=1), draw(4, seed=2), draw(*shape[:-1], 4, seed=3)

    def fused(*t: Tensor) -> Tensor:
        return linear_act(*t[:3], spec, residual=t[3], residual_weight=0.6, backend=backend)

    got = results(fused, *tensors)
    want = results(lambda *t: normalised(F.linear(*t[:3]), t[3], 0.6, spec), *tensors)
    if not tensors[0].numel():
        assert [g.shape for g in got] == [w.shape for w in want]
        assert not any(g.any() for g in got)
        return
    assert_close(got, want, 256)
    grads = got[1:]
    kept = [g.clone() for g in grads]
    for i, grad in enumerate(grads):  # gradients are nobody else's memory
        grad.zero_()
        assert all(torch.equal(g, k) for g, k in zip(grads[i + 1 :], kept[i + 1 :], strict=True))


@pytest.mark.parametrize("w", [1e-9, 0.1, 0.6, 0.95, 1 - 1e-9])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_every_activation_and_weight(spec: ActSpec, w: float) -> None:
    tensors = draw(2, 3, 4), draw(3, 3, 1, seed=1), draw(3, seed=2), draw(2, 3, 4, seed=3)
    got = results(
        lambda *t: conv_act(*t[:3], spec, residual=t[3], residual_weight=w),
        *tensors,
    )
    want = results(lambda *t: normalised(F.conv1d(*t[:3]), t[3], w, spec), *tensors)
    assert_close(got, want, 1 << 12)  # 1/√(1 − w²) and cancellation cost some digits near the ends


@BOTH
@pytest.mark.parametrize("own", [False, True], ids=["another", "x itself"])
def test_gradcheck_and_gradgradcheck(spec: ActSpec, own: bool) -> None:
    x, weight, bias = draw(1, 2, 3, 2), draw(2, 2, 3, 1, seed=1), draw(2, seed=2)
    tensors = [t.requires_grad_() for t in (x, weight, bias, draw(1, 2, 3, 2, seed=3))]

    def conv(x: Tensor, weight: Tensor, bias: Tensor, r: Tensor) -> Tensor:
        how: Any = {"padding": "same", "residual": x if own else r, "residual_weight": 0.6}
        return conv_act(x, weight, bias, spec, **how)

    def linear(x: Tensor, weight: Tensor, bias: Tensor, r: Tensor) -> Tensor:
        how: Any = {"residual": x if own else r, "residual_weight": 0.6}
        return linear_act(x, weight, bias, spec, **how)

    matrices = [draw(*s, seed=i).requires_grad_() for i, s in enumerate([(3, 2), (2, 2), (2,)])]
    for f, inputs in ((conv, tensors), (linear, [*matrices, draw(3, 2).requires_grad_()])):
        given = inputs[:3] if own else inputs
        g = (lambda *t, f=f: f(*t, t[0])) if own else f
        assert gradcheck(g, given)
        assert gradgradcheck(g, given)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product([False, True], repeat=2)), ids=str)
@BOTH
def test_dtypes_and_layouts(spec: ActSpec, layouts: tuple[bool, bool], dtype: torch.dtype) -> None:
    x, r = draw(2, 4, 5, 6, dtype=dtype), draw(2, 6, 5, 6, dtype=dtype, seed=3)
    x, r = (
        t.to(memory_format=NHWC) if last else t for t, last in zip((x, r), layouts, strict=True)
    )
    weight, bias = draw(6, 4, 3, 3, dtype=dtype, seed=1) / 6, draw(6, dtype=dtype, seed=2)
    z = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    u = spec.input_scale * (0.8 * z + 0.6 * r.double()) + spec.input_shift
    r = torch.where(u.abs() < 0.1, r + 0.3 / (0.6 * spec.input_scale), r)  # away from the kink
    tensors = x, weight, bias, r.to(memory_format=NHWC) if layouts[1] else r

    def f(*t: Tensor) -> Tensor:
        how: Any = {"padding": 1, "residual": t[3], "residual_weight": 0.6}
        return conv_act(*t[:3], spec, engine="aten", **how)

    got = results(f, *tensors)
    assert_close(got, results(f, *[t.double() for t in tensors]))
    assert all(g.dtype == dtype for g in got)
    assert got[0].stride() == F.conv2d(*tensors[:2], padding=1).stride()


@BOTH
@pytest.mark.parametrize("needs", [n for n in itertools.product([0, 1], repeat=4) if any(n)])
def test_gradients_only_where_asked(needs: tuple[int, ...], spec: ActSpec) -> None:
    shapes = (2, 3, 5, 5), (4, 3, 3, 3), (4,), (2, 4, 3, 3)
    tensors = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]

    def f(*t: Tensor) -> Tensor:
        return conv_act(*t[:3], spec, residual=t[3], residual_weight=0.6)

    want = results(f, *tensors)[1:]
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(bool(need))
    y = f(*tensors)
    y.backward(draw(*y.shape, seed=99))
    for t, need, w in zip(tensors, needs, want, strict=True):
        assert (t.grad is not None) == bool(need)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, w, rtol=1e-12, atol=1e-12)


@BOTH
def test_one_activation_is_saved_and_the_residual_is_not(spec: ActSpec) -> None:
    x, weight, bias = draw(2, 3, 4, 4), draw(3, 3, 3, 3, seed=1), draw(3, seed=2)
    known = {t.data_ptr() for t in (x, weight, bias)}
    residual = draw(2, 3, 4, 4, seed=3).requires_grad_()
    kept: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        kept.update({t.data_ptr()} - known)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        other = residual * 1
        how: Any = {"padding": 1, "residual": other, "residual_weight": 0.6}
        y = conv_act(x, weight.requires_grad_(), bias.requires_grad_(), spec, **how)
    assert len(kept) == 1
    gone = weakref.ref(other)
    del other, how
    gc.collect()
    assert gone() is None
    y.sum().backward()
    assert residual.grad is not None


class Calls(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name not in ("detach", "view", "permute", "_to_copy"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@NATIVE_SERVES
def test_no_pass_is_needless() -> None:
    shapes = (2, 16, 6, 6), (16, 16, 3, 3), (16,), (2, 16, 6, 6)
    tensors = [draw(*shape, dtype=F32, seed=i) for i, shape in enumerate(shapes)]
    tensors = [t.to(memory_format=NHWC) if t.ndim == 4 else t for t in tensors]
    leaves = [t.requires_grad_() for t in tensors]
    aten, own = {"engine": "aten", "backend": "native"}, {"engine": "native"}
    forward = {
        (LEAKY, "aten"): {"convolution": 1, "add_": 1, "native_bias_act_": 1},
        (SWISH, "aten"): {"convolution": 1, "add_": 1, "native_bias_act": 1},
        (LEAKY, "native"): {"native_conv_act": 1},
        (SWISH, "native"): {"native_conv_act": 1, "native_bias_act": 1},
    }
    backward = {
        "aten": {"native_act_grad": 1, "convolution_backward": 1, "mul": 1},
        "native": {"native_act_grad": 1, "native_conv_dgrad": 1, "native_conv_wgrad": 1, "mul": 1},
    }
    for (spec, engine), want in forward.items():
        how: Any = {"padding": 1, "residual_weight": 0.6, **(aten if engine == "aten" else own)}
        with Calls() as calls:
            y = conv_act(*leaves[:3], spec, residual=leaves[3], **how)
        assert calls.counts == want
        grad = torch.ones_like(y)
        with Calls() as calls:
            torch.autograd.grad(y, leaves, grad)
        assert calls.counts == backward[engine]
        with torch.no_grad(), Calls() as calls:
            conv_act(*leaves[:3], spec, residual=leaves[3], **how)
        assert calls.counts == forward[LEAKY, engine]


NATIVE_CASES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 16, 7, 9), (32, 16, 3, 3), {"padding": 1}),
    ((3, 32, 6, 5), (16, 32, 1, 1), {}),
    ((2, 16, 9, 8), (48, 16, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    ((2, 16, 11), (16, 16, 3), {"stride": 2}),
    ((1, 16, 3, 4, 3), (16, 16, 2, 1, 3), {"padding": (1, 0, 1)}),
    ((70, 48), (144, 48), {}),
    ((2, 3, 16), (16, 16), {}),
    ((16,), (16, 16), {}),
]


@NATIVE_SERVES
@pytest.mark.parametrize("dense", [True, False], ids=["channels_last", "contiguous"])
@BOTH
@pytest.mark.parametrize("case", NATIVE_CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_native_engine(case: tuple[Any, ...], spec: ActSpec, dense: bool) -> None:
    x_shape, w_shape, how = case
    is_conv = len(w_shape) > 2
    op: Any = conv_act if is_conv else linear_act

    def f(*t: Tensor, engine: str = "native") -> Tensor:
        return op(*t[:3], spec, residual=t[3], residual_weight=0.8, engine=engine, **how)

    x, bias = draw(*x_shape, dtype=F32), draw(w_shape[0], dtype=F32, seed=2)
    weight = draw(*w_shape, dtype=F32, seed=1) / math.sqrt(math.prod(w_shape[1:]))
    shape = op(x, weight, bias, spec, engine="aten", **how).shape
    r = draw(*shape, dtype=F32, seed=3)
    if is_conv:
        x, r = last(x), last(r) if dense else r
    elif not dense:
        r = r.mT.contiguous().mT if r.ndim > 1 else r
    tensors = x, weight, bias, r
    want = results(lambda *t: f(*t, engine="aten"), *[t.double() for t in tensors])
    got = results(f, *tensors)
    assert_close(got, want)
    with torch.no_grad():
        assert_close([f(*tensors)], want[:1])
    assert torch.equal(results(f, *tensors)[0], got[0])


@NATIVE_SERVES
@BOTH
def test_second_derivatives_do_not_depend_on_the_engine(spec: ActSpec) -> None:
    x, weight = last(draw(2, 16, 4, 3, dtype=F32)), draw(16, 16, 3, 3, dtype=F32, seed=1) / 12
    leaves = [t.requires_grad_() for t in (x, weight, draw(16, dtype=F32, seed=2))]

    def penalty(*t: Tensor, engine: str) -> list[Tensor]:
        how: Any = {"padding": 1, "residual": t[0], "residual_weight": 0.6, "engine": engine}
        y = conv_act(*t, spec, **how)
        first = torch.autograd.grad(y.square().sum(), t, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), t))

    want = penalty(*[t.detach().double().requires_grad_() for t in leaves], engine="aten")
    assert_close(penalty(*leaves, engine="native"), want, 128)


@NATIVE_SERVES
def test_native_rows_that_do_not_lie_together() -> None:
    # 1x1 convolutions whose result is narrower and wider than a panel, and more rows than a block.
    for channels in (16, 64, 160):
        x, weight = last(draw(3, 32, 9, 11, dtype=F32)), draw(channels, 32, 1, 1, dtype=F32) / 6
        r = last(draw(3, channels, 9, 11, dtype=F32, seed=2))
        how: Any = {"residual": r, "residual_weight": 0.7}
        y = conv_act(x, weight, None, SWISH, engine="native", **how)
        z = F.conv2d(x.double(), weight.double())
        assert_close([y], [normalised(z, r.double(), 0.7, SWISH)])


@NATIVE_SERVES
@BOTH
def test_opcheck(spec: ActSpec) -> None:
    x, weight = last(draw(2, 16, 5, 6, dtype=F32)), draw(32, 16, 3, 3, dtype=F32)
    r = last(draw(2, 32, 5, 6, dtype=F32, seed=2))
    sizes = [1, 1], [1, 1], [1, 1]
    op = torch.ops.fusedshape.native_conv_act.default
    args = (x, weight, None, r, 0.6, *sizes, *spec.kernel_args)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, args, test_utils=checks)
    with pytest.raises(RuntimeError, match="residual has shape"):
        op(x, weight, None, r[:1], *args[4:])
    with pytest.raises(RuntimeError, match="channels innermost"):
        op(x, weight, None, r.contiguous(), *args[4:])
    for w in (1.0, -1.0, float("nan")):
        with pytest.raises(RuntimeError, match="must lie between -1 and 1"):
            op(x, weight, None, r, w, *args[5:])


@NATIVE_SERVES
def test_directions_are_asked_for_when_they_are_due() -> None:
    asked: list[Direction] = []

    def chooser(direction: Direction, problem: Problem) -> str:
        asked.append(direction)
        return "aten" if direction == "dgrad" else "native"

    x, weight = last(draw(16, 16, 16, 16, dtype=F32)), draw(16, 16, 1, 1, dtype=F32, seed=1)
    weight.requires_grad_()
    how: Any = {"residual": x, "residual_weight": 0.6}
    previous = install_chooser(chooser)
    try:
        with torch.no_grad():
            conv_act(x, weight, None, LEAKY, **how)
        assert asked == ["fprop"]
        with Calls() as calls:
            y = conv_act(x.requires_grad_(), weight, None, LEAKY, **how)
            y.backward(y.detach())
    finally:
        install_chooser(previous)
    assert asked == ["fprop", "fprop", "dgrad", "wgrad"]
    for name in ("native_conv_act", "native_conv_wgrad", "convolution_backward"):
        assert calls.counts[name] == 1


@pytest.mark.parametrize("engine", ["auto", pytest.param("native", marks=NATIVE_SERVES)])
@BOTH
def test_fullgraph_compile(spec: ActSpec, engine: str) -> None:
    torch._dynamo.reset()

    def f(x: Tensor, weight: Tensor, bias: Tensor, w: float) -> Tensor:
        how: Any = {"padding": 1, "residual": x, "residual_weight": w, "engine": engine}
        y = conv_act(x, weight, bias, spec, **how)
        v = weight.mean((2, 3))
        x = y.mean((2, 3))
        return linear_act(x, v, bias, spec, residual=x, residual_weight=w, engine=engine)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x, weight = last(draw(2, 16, 4, 4, dtype=F32)), draw(16, 16, 3, 3, dtype=F32, seed=1) / 12
    bias = draw(16, dtype=F32, seed=2)
    for w in (0.6, 0.7, 0.8):
        got = results(lambda *t, w=w: compiled(*t, w), x, weight, bias)
        want = results(lambda *t, w=w: f(*t, w), x, weight, bias)
        assert_close(got, [t.double() for t in want])
        with torch.no_grad():
            assert_close([compiled(x, weight, bias, w)], [want[0].double()])
    x = last(draw(3, 16, 6, 5, dtype=F32))  # of sizes that vary
    want = results(lambda *t: f(*t, 0.6), x, weight, bias)
    assert_close(results(lambda *t: compiled(*t, 0.6), x, weight, bias), [t.double() for t in want])
    torch._dynamo.reset()


@pytest.mark.slow
@NATIVE_SERVES
@BOTH
def test_inductor(spec: ActSpec) -> None:
    def f(x: Tensor, weight: Tensor) -> Tensor:
        return conv_act(x, weight, None, spec, padding=1, residual=x, residual_weight=0.6)

    tensors = draw(2, 4, 5, 5, dtype=F32), draw(4, 4, 3, 3, dtype=F32, seed=1) / 6
    got = results(torch.compile(f, fullgraph=True), *tensors)
    assert_close(got, results(f, *[t.double() for t in tensors]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half", [False, True])
@BOTH
def test_autocast(spec: ActSpec, half: bool, dtype: torch.dtype) -> None:
    x, r = draw(2, 4, 5, 5, dtype=F32), draw(2, 6, 5, 5, dtype=F32, seed=3)
    tensors = x, draw(6, 4, 3, 3, dtype=F32, seed=1) / 6, draw(6, dtype=F32, seed=2), r

    def f(*t: Tensor) -> Tensor:
        residual = t[3].to(dtype) if half else t[3]
        with torch.autocast("cpu", dtype):
            how: Any = {"padding": 1, "residual": residual, "residual_weight": 0.6}
            y = conv_act(*t[:3], spec, **how)
            x0 = t[0].mean((2, 3))
            x = y.mean((2, 3))
            return linear_act(x, t[1].sum((2, 3)).t(), None, spec, residual=x0, residual_weight=0.6)

    def truth(*t: Tensor) -> Tensor:
        y = normalised(F.conv2d(*t[:3], padding=1), t[3], 0.6, spec)
        z = F.linear(y.mean((2, 3)), t[1].sum((2, 3)).t())
        return normalised(z, t[0].mean((2, 3)), 0.6, spec)

    got = results(f, *tensors)
    assert got[0].dtype == dtype
    assert all(g.dtype == F32 for g in got[1:])
    want = results(truth, *[t.double() for t in tensors])
    eps = torch.finfo(dtype).eps
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= 32 * eps * w.abs().max()


def test_func_transforms() -> None:
    x, weight, bias = draw(5, 2, 3, 4, 4), draw(3, 3, 3, 3, seed=1), draw(3, seed=2)
    r = draw(5, 2, 3, 4, 4, seed=3)

    def conv(x: Tensor, r: Tensor) -> Tensor:
        how: Any = {"padding": 1, "residual": r, "residual_weight": 0.6}
        return conv_act(x, weight, bias, LEAKY, **how)

    def linear(x: Tensor, r: Tensor) -> Tensor:
        return linear_act(x, weight[..., 0, 0], bias, SWISH, residual=r, residual_weight=0.6)

    for f, a, b in ((conv, x, r), (linear, x.movedim(2, -1), r.movedim(2, -1))):
        want = torch.stack([f(*each) for each in zip(a, b, strict=True)])
        torch.testing.assert_close(torch.func.vmap(f)(a, b), want)
        for inputs in ((a[0], b[0]), (a[0].contiguous(), b[0])):
            _, tangent = torch.func.jvp(lambda r, f=f, i=inputs: f(i[0], r), inputs[1:], (b[1],))
            leaf = inputs[1].detach().requires_grad_()
            grad = draw(*want[0].shape, seed=5)
            (back,) = torch.autograd.grad(f(inputs[0], leaf), leaf, grad)
            torch.testing.assert_close((tangent * grad).sum(), (back * b[1]).sum())


def test_a_weight_of_nothing_takes_no_part() -> None:
    x, weight = draw(2, 3, 4, 4), draw(3, 3, 1, 1, seed=1).requires_grad_()
    r = torch.full((2, 3, 4, 4), float("inf"), dtype=F64, requires_grad=True)
    for w in (0, 0.0):
        y = conv_act(x, weight, None, LEAKY, residual=r, residual_weight=w)
        assert torch.equal(y, conv_act(x, weight, None, LEAKY))
        (grad,) = torch.autograd.grad(y.sum(), r, allow_unused=True)
        assert grad is None
        rows = x[:, :, 0, 0]
        y = linear_act(rows, weight[..., 0, 0], None, LEAKY, residual=rows, residual_weight=w)
        assert torch.equal(y, linear_act(rows, weight[..., 0, 0], None, LEAKY))


def test_nothing_of_the_callers_is_written() -> None:
    for engine in ("aten", *(["native"] if native.available() and not INTERPRET else [])):
        x, weight = last(draw(2, 16, 4, 4, dtype=F32)), draw(16, 16, 1, 1, dtype=F32, seed=1)
        kept = x.clone()
        for spec in (LEAKY, SWISH):
            leaf = x.requires_grad_()
            how: Any = {"residual": leaf, "residual_weight": 0.6, "engine": engine}
            y = conv_act(leaf, weight, None, spec, **how)
            grad = torch.ones_like(y)
            y.backward(grad)
            with torch.no_grad():
                conv_act(leaf, weight, None, spec, **how)
            assert torch.equal(x.detach(), kept)
            assert torch.equal(grad, torch.ones_like(y))


def test_meta_tensors() -> None:
    x = torch.empty(2, 3, 8, 8, device="meta", requires_grad=True)
    weight = torch.empty(4, 3, 3, 3, device="meta")
    r = torch.empty(2, 4, 3, 3, device="meta")
    for spec in (LEAKY, SWISH):
        y = conv_act(x, weight, None, spec, stride=2, residual=r, residual_weight=0.5)
        assert y.shape == r.shape
        y.sum().backward()
    assert x.grad is not None


def test_joined_spec_is_exact() -> None:
    spec = joined_spec(SWISH, 0.6)
    assert spec == ActSpec("swish", 0.8 * 0.7, 0.2, -0.35, 1.9)
    assert spec.saves_output == SWISH.saves_output
    assert joined_spec(LEAKY, 0.6).negative_slope == LEAKY.negative_slope


X, W, R = torch.ones(2, 3, 4, 4), torch.ones(5, 3, 3, 3), torch.ones(2, 5, 2, 2)
BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "residual was given without residual_weight", {"residual": R}),
    (ValueError, "residual_weight was given without residual", {"residual_weight": 0.5}),
    (
        ValueError,
        r"residual_weight=1.0 is outside \[0, 1\)",
        {"residual": R, "residual_weight": 1.0},
    ),
    (ValueError, r"residual_weight=-0.1 is out", {"residual": R, "residual_weight": -0.1}),
    (ValueError, r"residual_weight=nan is out", {"residual": R, "residual_weight": math.nan}),
    (TypeError, "must be a number, got a bool", {"residual": R, "residual_weight": True}),
    (TypeError, "must be a number, got a str", {"residual": R, "residual_weight": "0.5"}),
    (TypeError, "residual must be a tensor, got list", {"residual": [1.0], "residual_weight": 0.5}),
    (
        ValueError,
        r"residual has shape \(2, 5, 1, 1\), the output \(2, 5, 2, 2\)",
        {"residual": R[..., :1, :1], "residual_weight": 0.5},
    ),
    (
        TypeError,
        "residual has dtype torch.float64, the output torch.float32",
        {"residual": R.double(), "residual_weight": 0.5},
    ),
    (
        ValueError,
        "residual is on meta, x on cpu",
        {"residual": R.to("meta"), "residual_weight": 0.5},
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda c: c[1])
def test_bad_residuals_are_refused(case: tuple[type[Exception], str, dict[str, Any]]) -> None:
    error, message, how = case
    with pytest.raises(error, match=f"conv_act: .*{message}"):
        conv_act(X, W, None, LEAKY, **how)
    flat = {k: v.reshape(v.shape[0], -1) if isinstance(v, Tensor) else v for k, v in how.items()}
    with pytest.raises(error, match="linear_act: "):
        linear_act(torch.ones(2, 3), torch.ones(20, 3), None, LEAKY, **flat)


def test_a_residual_has_a_batch_where_x_has_one() -> None:
    for x, r in ((X[0], R[:1]), (X[:1], R[0])):
        with pytest.raises(ValueError, match="conv_act: residual has shape"):
            conv_act(x, W, None, LEAKY, residual=r, residual_weight=0.5)


@pytest.mark.skipif(INTERPRET, reason="the interpreter serves CPU tensors")
def test_an_explicit_engine_never_falls_back() -> None:
    how: Any = {"residual": R, "residual_weight": 0.5}
    with pytest.raises(ValueError, match="cannot run this layer: backend 'triton' serves CUDA"):
        conv_act(X, W, None, LEAKY, engine="triton", **how)
    with pytest.raises(ValueError, match=r"'native' cannot run this layer: .*multiples of 16"):
        conv_act(X, W, None, LEAKY, engine="native", **how)
