"""The public ops against float64 eager, on every backend to be had here."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fusedshape import ActSpec, native, reference
from fusedshape.ops import ChainLayer, bias_act, conv_act, conv_chain, linear_act, shaped_act
from fusedshape.spec import saves_output
from tests.support.backends import BACKENDS, INTERPRET
from tests.support.operands import LEAKY, SWISH, draw
from tests.support.specs import SPECS, shaped
from tests.support.tolerance import assert_as_good_as

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).requires_grad_()


def eager_grads(f: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_bias_act_against_float64(spec: ActSpec, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip(
            "Triton's interpreter rounds bfloat16 wrongly; the compiled kernels are checked"
        )
    x = draw(2, 5, 3, 7, dtype=dtype).to(memory_format=torch.channels_last)
    bias, grad = draw(5, dtype=dtype, seed=1), draw(2, 5, 3, 7, dtype=dtype, seed=2)
    got = eager_grads(lambda x, b: bias_act(x, b, spec, backend=backend), grad, x, bias)
    truth = reference.bias_act(x.double(), bias.double(), spec)
    assert_as_good_as(got[0], reference.bias_act(x, bias, spec), truth)
    # the truth of dx is that of what was saved
    from_output = saves_output(spec, dtype)
    saved = got[0] if from_output else x
    dx = reference.act_grad(grad.double(), saved.double(), bias.double(), spec, 1, from_output)
    assert_as_good_as(got[1], reference.act_grad(grad, saved, bias, spec, 1), dx)
    total = reference.channel_sum(got[1].double(), 1)
    spread = dx.abs().sum((0, 2, 3)) * torch.finfo(dtype).eps
    assert ((got[2].double() - total).abs() <= 2 * spread + 1e-6 * total.abs()).all()
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[1].stride() == x.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_gradcheck_and_gradgradcheck(spec: ActSpec, backend: str) -> None:
    if backend == "triton" and spec.activation not in ("leaky_relu", "softplus", "swish"):
        pytest.skip("the interpreter is slow; these three take every path")
    x, bias = leaf(2, 3, 2), leaf(3, seed=1)

    def f(x: Tensor, b: Tensor) -> Tensor:
        return bias_act(x, b, spec, backend=backend)

    assert gradcheck(f, (x, bias))
    assert gradgradcheck(f, (x, bias))


CONVS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 4, 9), (6, 4, 3), {"padding": "same"}),
    ((2, 4, 9), (6, 4, 4), {"padding": "same", "dilation": 1}),
    ((2, 4, 7, 6), (6, 4, 3, 3), {"padding": 1, "stride": 2}),
    ((2, 4, 7, 6), (6, 2, 3, 2), {"padding": (2, 0), "groups": 2, "dilation": (1, 2)}),
    ((2, 4, 5, 5), (8, 1, 3, 3), {"padding": 1, "groups": 4, "padding_mode": "circular"}),
    ((2, 4, 5, 5), (3, 4, 3, 3), {"padding": "same", "padding_mode": "reflect"}),
    ((2, 4, 5, 5), (3, 4, 4, 2), {"padding": "same", "padding_mode": "replicate"}),
    ((1, 2, 4, 4, 3), (3, 2, 3, 1, 3), {"padding": (1, 0, 1), "stride": (1, 2, 1)}),
    ((4, 7, 6), (6, 4, 1, 1), {}),
]


def module_conv(x: Tensor, weight: Tensor, bias: Tensor | None, **geometry: Any) -> Tensor:
    """torch's own nn.ConvNd as the oracle for padding in all its forms."""
    n = weight.ndim - 2
    cls = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[n - 1]
    groups = geometry.get("groups", 1)
    out, per_group, *kernel = weight.shape
    module = cls(per_group * groups, out, tuple(kernel), bias=bias is not None, **geometry)
    named = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return torch.func.functional_call(module.to(weight.dtype), named, (x,))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("case", CONVS, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def test_conv_act_against_torch(case: tuple[Any, ...], spec: ActSpec, backend: str) -> None:
    x_shape, w_shape, geometry = case
    x, weight, bias = draw(*x_shape), draw(*w_shape, seed=1), draw(w_shape[0], seed=2)
    dim = 1 if len(x_shape) == len(w_shape) else 0

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.bias_act(module_conv(x, w, b, **geometry), None, spec, dim)

    def fused(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv_act(x, w, b, spec, backend=backend, **geometry)

    grad = draw(*plain(x, weight, bias).shape, seed=3)
    got = eager_grads(fused, grad, x, weight, bias)
    want = eager_grads(plain, grad, x, weight, bias)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)
    leaves = [t.requires_grad_() for t in (x[..., :4], weight, bias)]
    if backend != "triton" and x[..., :4].shape[-1] >= w_shape[-1]:
        assert gradgradcheck(fused, [t.detach().requires_grad_() for t in leaves])


def test_conv_act_takes_sizes_of_any_integers() -> None:
    """Geometry that was checked before is looked up; new values and lists are checked."""
    x, w = draw(1, 2, 7, 7), draw(3, 2, 3, 3, seed=1)
    want = conv_act(x, w, None, LEAKY, stride=2, padding=1)
    for two, one in ((np.int64(2), np.int64(1)), ((2, 2), [1, 1]), ([np.int32(2)], (np.int8(1),))):
        assert torch.equal(conv_act(x, w, None, LEAKY, stride=two, padding=one), want)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"stride=2\.0 must be"):
            conv_act(x, w, None, LEAKY, stride=2.0, padding=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)], ids=str)
def test_linear_act_against_torch(shape: tuple[int, ...], spec: ActSpec, backend: str) -> None:
    x, weight, bias = draw(*shape), draw(4, 5, seed=1), draw(4, seed=2)
    grad = draw(*shape[:-1], 4, seed=3)
    got = eager_grads(
        lambda x, w, b: linear_act(x, w, b, spec, backend=backend), grad, x, weight, bias
    )
    want = eager_grads(
        lambda x, w, b: reference.bias_act(F.linear(x, w, b), None, spec), grad, x, weight, bias
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_linear_act_gradgradcheck() -> None:
    for spec in (LEAKY, SWISH):
        inputs = (leaf(2, 3), leaf(4, 3, seed=1), leaf(4, seed=2))
        assert gradgradcheck(lambda *a, s=spec: linear_act(*a, s), inputs)


@pytest.mark.parametrize("needs", [n for n in itertools.product([0, 1], repeat=3) if any(n)])
def test_gradients_only_where_asked(needs: tuple[int, ...]) -> None:
    inputs = [draw(2, 3, 5, 5), draw(4, 3, 3, 3, seed=1), draw(4, seed=2)]
    for x, need in zip(inputs, needs, strict=True):
        x.requires_grad_(bool(need))
    for spec in (LEAKY, SWISH):
        conv_act(*inputs, spec).sum().backward()
        for x, need in zip(inputs, needs, strict=True):
            assert (x.grad is not None) == bool(need)
            x.grad = None


def saved_tensors(f: Callable[[], Tensor], *known: Tensor) -> int:
    """Count the tensors that autograd saves for f's backward, without `known` ones."""
    kept: dict[int, Tensor] = {}
    pointers = {t.data_ptr() for t in known}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in pointers:
            kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = f()
    assert out.requires_grad
    return len(kept)


def test_one_activation_is_saved_a_layer() -> None:
    weights = [leaf(4, 4, 3, 3, seed=i) for i in range(3)]
    bias, x = leaf(4), leaf(2, 4, 6, 6)

    def fused(spec: ActSpec) -> Tensor:
        y = x
        for w in weights:
            y = conv_act(y, w, bias, spec, padding=1)
        return y

    def eager() -> Tensor:
        y = x
        for w in weights:
            y = 1.9 * F.softplus(F.conv2d(y, w, bias, padding=1))
        return y

    assert saved_tensors(lambda: fused(shaped("softplus")), x, bias, *weights) == 3
    assert saved_tensors(lambda: fused(SWISH), x, bias, *weights) == 5
    assert saved_tensors(eager, x, bias, *weights) >= 5


def test_saved_tensors_are_freed() -> None:
    y = shaped_act(leaf(4), LEAKY)
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_follow_the_input(backend: str) -> None:
    base = draw(4, 6, 8)
    dense = [base, base.permute(2, 0, 1), base.transpose(0, 1)]
    for x in dense:
        y = bias_act(x, draw(x.shape[1]), LEAKY, backend=backend)
        assert y.stride() == x.stride()
    for x in (base[:, ::2], base[..., 1:], base[:1].expand(3, 6, 8), base[:, :0], base[:, :, 0]):
        x = x.detach().requires_grad_()
        y = bias_act(x, draw(x.shape[1]), LEAKY, backend=backend)
        want = reference.bias_act(x, draw(x.shape[1]), LEAKY)
        torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)
        (dx,) = torch.autograd.grad(y.sum(), x)
        (want_dx,) = torch.autograd.grad(want.sum(), x)
        torch.testing.assert_close(dx, want_dx, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_padding_keeps_channels_innermost(n: int, mode: str) -> None:
    """torch's own padding loses this layout; kernels that need it still take the padded input."""
    x = draw(2, 16, *[5, 4, 3][:n], dtype=torch.float32).movedim(1, -1).contiguous().movedim(-1, 1)
    w, same = draw(16, 16, *[2] * n, dtype=torch.float32), {"padding": "same", "padding_mode": mode}
    y = conv_act(x, w, None, LEAKY, **same)
    assert n == 1 or y.movedim(1, -1).is_contiguous()
    assert conv_act(x.contiguous(), w, None, LEAKY, **same).is_contiguous()
    if native.available() and not INTERPRET:
        torch.testing.assert_close(conv_act(x, w, None, LEAKY, **same, engine="native"), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_is_never_written(backend: str) -> None:
    x, weight = draw(2, 3, 4, 4), draw(3, 3, 1, 1, seed=1)
    before = x.clone()
    grad = torch.ones(())
    for y in (
        shaped_act(x.requires_grad_(), LEAKY, backend=backend),
        conv_act(x, weight, None, LEAKY, backend=backend),
    ):
        total = y.sum()
        total.backward(grad)
    assert torch.equal(x.detach(), before)
    assert grad.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["relu", "leaky_relu", "tanh", "softplus", "selu", "gelu", "square"]
)
def test_non_finite_numbers_pass_as_in_torch(name: str, backend: str) -> None:
    spec = shaped(name)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30])
    got = shaped_act(x, spec, backend=backend)
    want = reference.shaped_act(x.double(), spec).float()
    # gelu(-inf) is 0 as a limit and NaN as the product -inf · 0: either will do.
    limit = torch.tensor(spec.output_scale * spec.output_shift)
    undefined = want.isnan() & ~x.isnan() & torch.isclose(got, limit)
    want = torch.where(undefined, got, want)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_zero_dimensional_and_empty() -> None:
    assert shaped_act(torch.tensor(2.0), ActSpec("relu")).item() == 2
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    weight = torch.zeros(5, 3, 3, 3, requires_grad=True)
    y = conv_act(x, weight, None, LEAKY)
    assert y.shape == (0, 5, 2, 2)
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


OP_CASES = [
    (draw(2, 3, 4, dtype=torch.float32), draw(3, dtype=torch.float32), 1),
    (draw(2, 3, 4, dtype=torch.bfloat16).transpose(1, 2), draw(4, dtype=torch.float32), 1),
    (draw(2, 3, 8, dtype=torch.float32)[..., ::2], None, 2),
]


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("case", OP_CASES, ids=lambda c: f"{tuple(c[0].shape)}-{c[0].dtype}")
def test_opcheck(case: tuple[Tensor, Tensor | None, int], spec: ActSpec, backend: str) -> None:
    x, bias, dim = case
    ops = torch.ops.fusedshape
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (x, bias, dim, *spec.kernel_args)
    torch.library.opcheck(getattr(ops, f"{backend}_bias_act").default, args, test_utils=checks)
    dense = (x.contiguous(), *args[1:])
    torch.library.opcheck(getattr(ops, f"{backend}_bias_act_").default, dense, test_utils=checks)
    for bias_grad in (True, False):
        grad = torch.ones(()).to(x.dtype).expand(x.shape)
        grad_args = (grad, *dense, saves_output(spec, x.dtype), bias_grad)
        op = getattr(ops, f"{backend}_act_grad").default
        torch.library.opcheck(op, grad_args, test_utils=checks)
        torch.library.opcheck(
            getattr(ops, f"{backend}_act_grad_").default,
            (torch.ones_like(dense[0]), *grad_args[1:]),
            test_utils=checks,
        )


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("case", OP_CASES, ids=lambda c: f"{tuple(c[0].shape)}-{c[0].dtype}")
def test_act_grad_in_place(
    case: tuple[Tensor, Tensor | None, int], spec: ActSpec, backend: str
) -> None:
    x, bias, dim = case
    if backend == "triton" and x.dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter rounds bfloat16 wrongly")
    saved, ops = torch.empty_like(x).copy_(x), torch.ops.fusedshape
    args = (bias, dim, *spec.kernel_args, saves_output(spec, x.dtype), True)
    grad = torch.empty_like(saved).copy_(draw(*x.shape, seed=1))
    want = getattr(ops, f"{backend}_act_grad")(grad, saved, *args)
    memory = grad.data_ptr()
    sums = getattr(ops, f"{backend}_act_grad_")(grad, saved, *args)
    assert torch.equal(grad, want[0])
    assert torch.equal(sums, want[1])
    assert grad.data_ptr() == memory
    kept = grad.clone()
    foreign = torch.empty(2 * x.shape[0], *x.shape[1:], dtype=x.dtype)[::2].copy_(x)
    for wrong in (foreign, grad.expand(2, *grad.shape)[0][..., :1].expand(x.shape)):
        with pytest.raises((RuntimeError, ValueError), match="act_grad"):
            getattr(ops, f"{backend}_act_grad_")(wrong, saved, *args)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
def test_fullgraph_compile(spec: ActSpec, backend: str) -> None:
    def f(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        y = conv_act(x, w, b, spec, padding="same", backend=backend)
        return shaped_act(linear_act(y.mean((2, 3)), v, None, spec, backend=backend), spec)

    inputs = draw(2, 3, 5, 5), draw(4, 3, 3, 3, seed=1), draw(4, seed=2), draw(6, 4, seed=3)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    grad = draw(2, 6, seed=4)
    got, want = eager_grads(compiled, grad, *inputs), eager_grads(f, grad, *inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_serves_layers_of_different_constants(backend: str) -> None:
    def f(x: Tensor, w: Tensor, spec: ActSpec) -> Tensor:
        return shaped_act(linear_act(x, w, None, spec, backend=backend), spec, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x, w, grad = draw(3, 4), draw(5, 4, seed=1), draw(3, 5, seed=2)
    for slope in (0.1, 0.2, 0.3):
        spec = ActSpec("leaky_relu", 1.0 + slope, slope, -slope, 2.0 - slope, slope)
        got = eager_grads(lambda *a, s=spec: compiled(*a, s), grad, x, w)
        want = eager_grads(lambda *a, s=spec: f(*a, s), grad, x, w)
        for g, v in zip(got, want, strict=True):
            torch.testing.assert_close(g, v, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not native.available(), reason="needs the compiler that inductor needs")
def test_inductor() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return conv_act(x, w, None, LEAKY, padding=1).relu()

    x, w = draw(2, 3, 5, 5, dtype=torch.float32), draw(4, 3, 3, 3, dtype=torch.float32, seed=1)
    grad = draw(2, 4, 5, 5, dtype=torch.float32, seed=2)
    got, want = (eager_grads(g, grad, x, w) for g in (torch.compile(f, fullgraph=True), f))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_func_transforms() -> None:
    x, w, b = draw(5, 2, 3, 4, 4), draw(4, 3, 3, 3, seed=1), draw(4, seed=2)

    def f(x: Tensor) -> Tensor:
        return conv_act(x, w, b, LEAKY, padding=1)

    torch.testing.assert_close(torch.func.vmap(f)(x), torch.stack([f(each) for each in x]))
    _, tangent = torch.func.jvp(f, (x[0],), (draw(2, 3, 4, 4, seed=3),))
    assert tangent.shape == (2, 4, 4, 4)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return linear_act(x, w, None, SWISH).square().sum()

    v, rows = draw(4, 6), draw(5, 6, seed=1)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(v, rows)
    leaf_v = v.clone().requires_grad_()
    (total,) = torch.autograd.grad(loss(leaf_v, rows), leaf_v)
    torch.testing.assert_close(per_sample.sum(0), total)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(rows, torch.ones_like(rows))
        out = forward_ad.unpack_dual(shaped_act(dual, SWISH))
    torch.testing.assert_close(
        out.tangent, reference.act_grad(torch.ones_like(rows), rows, None, SWISH, 1)
    )


# Since 2.14 torch.compile refuses dual tensors, and without fullgraph runs the function as written.
TAKES_DUALS = torch.__version__ < (2, 14)
TRANSFORMED: dict[str, Callable[[Tensor, Tensor, Tensor, ActSpec], Tensor]] = {
    "shaped_act": lambda x, w, b, spec: shaped_act(x * w[0, 0, 0, 0] + b[0], spec),
    "bias_act": lambda x, w, b, spec: bias_act(x * w[0, 0, 0, 0], b, spec),
    "conv_act": lambda x, w, b, spec: conv_act(x, w, b, spec, padding=1),
    "residual": lambda x, w, b, spec: conv_act(
        x, w, b, spec, padding=1, residual=x, residual_weight=0.6
    ),
    "linear_act": lambda x, w, b, spec: linear_act(x.movedim(1, -1), w[:, :, 0, 0], b, spec),
    "conv_chain": lambda x, w, b, spec: conv_chain(x, [ChainLayer(w, b, spec, padding=1)] * 2),
}


@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("op", TRANSFORMED)
def test_func_transforms_within_compile(op: str, spec: ActSpec) -> None:
    """Dynamo's own transforms count too: an op in place would leave them out, and say nothing."""
    torch._dynamo.reset()
    x, w, b = draw(2, 4, 3, 4), draw(4, 4, 3, 3, seed=1) / 6, draw(4, seed=2)

    def loss(w: Tensor, x: Tensor, b: Tensor) -> Tensor:
        return TRANSFORMED[op](x, w, b, spec).square().sum()

    gradient = torch.func.grad(loss, (0, 1, 2))
    leaves = [t.clone().requires_grad_() for t in (w, x, b)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    for g, t in zip(compiled(w, x, b), want, strict=True):
        torch.testing.assert_close(g, t)
    plain = torch.compile(loss, fullgraph=True, backend="eager")
    if not TAKES_DUALS:
        torch.testing.assert_close(plain(w, x, b), loss(w, x, b))
        with forward_ad.dual_level(), pytest.raises(torch._dynamo.exc.Unsupported, match="dual"):
            plain(forward_ad.make_dual(w, torch.ones_like(w)), x, b)
        torch._dynamo.reset()  # who was refused is not compiled again
        plain = torch.compile(loss, backend="eager")
    for _ in range(2):  # what was compiled without a transform is not what serves one
        torch.testing.assert_close(plain(w, x, b), loss(w, x, b))
        with forward_ad.dual_level():
            out = plain(forward_ad.make_dual(w, torch.ones_like(w)), x, b)
            tangent = forward_ad.unpack_dual(out).tangent
        torch.testing.assert_close(tangent, want[0].sum())
    torch._dynamo.reset()
    jvp = torch.compile(
        lambda w: torch.func.jvp(lambda w: loss(w, x, b), (w,), (torch.ones_like(w),))[1],
        fullgraph=True,
        backend="eager",
    )
    torch.testing.assert_close(jvp(w), want[0].sum())
    samples = torch.func.vmap(lambda x: gradient(w, x, b)[0])
    each = torch.compile(samples, fullgraph=True, backend="eager")(x.unsqueeze(1))
    torch.testing.assert_close(each.sum(0), want[0])


@pytest.mark.parametrize("batched", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("op", TRANSFORMED)
def test_several_gradients_at_once(op: str, spec: ActSpec, batched: str) -> None:
    """Vectorised Jacobians batch gradients over a graph that was made before."""
    leaves = [leaf(2, 4, 3, 4), leaf(4, 4, 3, 3, seed=1), leaf(4, seed=2)]
    y = TRANSFORMED[op](*leaves, spec)
    grads = draw(3, *y.shape, seed=3)

    def back(grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, grad, retain_graph=True)

    if batched == "vmap":
        got = torch.func.vmap(back)(grads)
    else:
        got = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for g, *each in zip(got, *map(back, grads), strict=True):
        torch.testing.assert_close(g, torch.stack(each))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("op", TRANSFORMED)
def test_exports_keep_gradients(op: str, strict: bool) -> None:
    """Exports made with gradients enabled are plain PyTorch; the others call the kernels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(draw(4, 4, 3, 3, seed=1) / 6)
            self.b = nn.Parameter(draw(4, seed=2))

        def forward(self, x: Tensor) -> Tensor:
            return TRANSFORMED[op](x, self.w, self.b, LEAKY)

    net, x = Net(), draw(2, 4, 3, 4)
    want = torch.autograd.grad(net(x).square().sum(), net.parameters(), allow_unused=True)
    module = torch.export.export(net, (x,), strict=strict).module()
    torch.testing.assert_close(module(x), net(x))
    got = torch.autograd.grad(module(x).square().sum(), module.parameters(), allow_unused=True)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        module = torch.export.export(net, (x,), strict=strict).module()
        torch.testing.assert_close(module(x), net(x))
    ours = [str(node.target) for node in module.graph.nodes if "fusedshape" in str(node.target)]
    assert bool(ours) == native.available()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_func_transforms_refuse_kernels_that_were_named(backend: str) -> None:
    x, b = draw(2, 3), draw(3)
    for call in (
        lambda x: shaped_act(x, LEAKY, backend=backend).sum(),
        lambda x: bias_act(x, b, LEAKY, backend=backend).sum(),
        lambda x: linear_act(x, draw(4, 3), None, LEAKY, backend=backend).sum(),
    ):
        with pytest.raises(ValueError, match=r"cannot run under .* backend='auto'"):
            torch.func.grad(call)(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x = draw(2, 3, 5, 5, dtype=torch.float32).requires_grad_()
    w = draw(4, 3, 3, 3, dtype=torch.float32, seed=1).requires_grad_()
    b = draw(4, dtype=torch.float32, seed=2).requires_grad_()
    v = draw(6, 4, dtype=torch.float32, seed=3).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = conv_act(x, w, b, LEAKY, padding=1)
        z = linear_act(y.mean((2, 3)), v, None, LEAKY)
        a = shaped_act(z, LEAKY)
    assert (y.dtype, z.dtype, a.dtype) == (dtype,) * 3
    truth = reference.conv_act(*(t.double() for t in (x, w, b)), LEAKY, [1, 1], [1, 1], [1, 1], 1)
    scale = truth.abs().amax()
    assert (y - truth).abs().amax() <= 4 * torch.finfo(dtype).eps * scale
    a.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, w, b, v))


def test_hooks_checkpoint_and_copies() -> None:
    x = leaf(2, 3)
    seen: list[Tensor] = []
    y = shaped_act(x, LEAKY)
    y.register_hook(lambda g: seen.append(g) or 2 * g)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, 2 * torch.autograd.grad(shaped_act(x, LEAKY).sum(), x)[0])
    assert len(seen) == 1
    run = lambda x: shaped_act(shaped_act(x, SWISH), LEAKY)  # noqa: E731
    y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x), torch.autograd.grad(run(x).sum(), x)
    )
    assert copy.deepcopy(LEAKY) == LEAKY


@pytest.mark.parametrize(
    "op",
    [
        lambda x: shaped_act(x, LEAKY),
        lambda x: linear_act(x, torch.ones(16, 16), None, LEAKY),
        lambda x: linear_act(x.unsqueeze(1), torch.ones(16, 16), None, LEAKY),
    ],
    ids=["activation", "matrix", "three dimensions"],
)
def test_writing_on_the_output_is_noticed(op: Callable[[Tensor], Tensor]) -> None:
    """backward raises torch's own message, whatever engine made the output."""
    y = op(torch.ones(2048, 16, requires_grad=True))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_and_no_grad() -> None:
    x, w = draw(2, 3, 4, 4), draw(3, 3, 1, 1)
    want = conv_act(x, w, None, LEAKY)
    with torch.inference_mode():
        inside = x.clone()
        assert torch.equal(conv_act(inside, w, None, LEAKY), want)
    assert torch.equal(conv_act(inside, w, None, LEAKY), want)
    with pytest.raises(RuntimeError, match=r"(?i)inference tensor"):
        conv_act(inside, w.requires_grad_(), None, LEAKY)


def test_meta_and_fake_tensors() -> None:
    x = torch.empty(2, 3, 8, 8, device="meta").to(memory_format=torch.channels_last)
    w = torch.empty(4, 3, 3, 3, device="meta", requires_grad=True)
    y = conv_act(x, w, None, LEAKY, stride=2)
    y.sum().backward()
    assert y.shape == (2, 4, 3, 3)
    assert w.grad is not None
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2**17, 3, 80, 80)
        y = shaped_act(x, LEAKY)
        assert y.shape == x.shape
        assert y.stride() == x.stride()


@st.composite
def conv_calls(draw_: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Calls of any kind, most of them with something wrong."""
    n = draw_(st.integers(1, 3))
    small = st.integers(0, 4)
    x_shape = draw_(st.lists(small, min_size=n + 1, max_size=n + 3))
    w_shape = draw_(st.lists(small, min_size=n + 2, max_size=n + 2))
    if draw_(st.booleans()) and len(x_shape) > n + 1:
        x_shape[1] = w_shape[1]
    dtype = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.int32])
    bias = draw_(st.sampled_from([None, w_shape[0], 3]))
    step = st.integers(-1, 3) | st.lists(st.integers(1, 2), min_size=1, max_size=3)
    geometry = {
        "stride": draw_(step),
        "padding": draw_(step | st.sampled_from(["same", "valid", "full"])),
        "dilation": draw_(step),
        "groups": draw_(st.integers(0, 2)),
    }
    x = torch.ones(x_shape, dtype=draw_(dtype))
    if draw_(st.booleans()) and x.ndim >= 2:
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    weight = torch.ones(w_shape, dtype=draw_(dtype))
    return x, weight, None if bias is None else torch.ones(bias), geometry


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own convolution
@settings(max_examples=300, deadline=None)
@given(conv_calls())
@example((torch.ones(1, 0, 0), torch.ones(1, 1, 1, 1), None, {"padding": 1}))
@example((torch.ones(1, 0, 2, 2), torch.ones(1, 0, 1, 1), torch.ones(1), {}))
def test_conv_act_is_right_or_refuses(call: tuple[Tensor, Tensor, Tensor | None, Any]) -> None:
    x, weight, bias, geometry = call
    try:
        got = conv_act(x, weight, bias, LEAKY, **geometry)
    except (ValueError, TypeError) as error:
        if not str(error).startswith("conv_act: "):
            raise
        return
    f = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    z = f(x.double(), weight.double(), None if bias is None else bias.double(), **geometry)
    want = reference.bias_act(z, None, LEAKY, 0)
    assert got.shape == want.shape
    eps = torch.finfo(x.dtype).eps
    assert torch.allclose(got.double(), want, rtol=4 * eps, atol=4 * eps * 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["conv", "linear", "chain", "residual", "float32 bias", "twice"])
@pytest.mark.parametrize("spec", [LEAKY, shaped("tanh")], ids=lambda s: s.activation)
def test_a_bias_that_nearly_cancels_the_product_in_half_precision(
    spec: ActSpec, how: str, dtype: torch.dtype
) -> None:
    """The error against float64 is at most torch's, which rounds product and bias once."""
    x, grad = draw(512, 16), draw(512, 32, seed=3)
    weight, bias = draw(32, 16, seed=1) / 4, -50 + draw(32, seed=2)
    x[:, 0], weight[:, 0] = 1.0, 50.0
    wide = how in ("float32 bias", "residual")
    inputs = [t.to(dtype) for t in (x, weight, bias)]
    residual = draw(512, 32, seed=4).to(dtype)
    joining = {"residual": residual, "residual_weight": 0.5} if how == "residual" else {}

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if how == "conv":
            return conv_act(x[..., None], weight[..., None], bias, spec)[..., 0]
        if how == "chain":
            return conv_chain(x, [ChainLayer(weight, bias, spec)])
        return linear_act(x, weight, bias.float() if wide else bias, spec, **joining)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if how == "conv":
            z = F.conv1d(x[..., None], weight[..., None], bias)[..., 0]
        else:
            z = F.linear(x, weight, bias)
        if joining:
            z = reference.joined(z, None, residual, 0.5, 1).to(z.dtype)
        return reference.shaped_act(z, spec)

    def errors(f: Callable[..., Tensor]) -> Tensor:
        leaves = [t.clone().requires_grad_() for t in inputs]
        found = f(*leaves)
        got = [found, *torch.autograd.grad(found, leaves, grad.to(dtype), create_graph=twice)]
        pairs = zip(got, truth, strict=True)
        return torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs])

    twice = how == "twice"
    exact = [t.double() for t in inputs]
    truth = eager_grads(plain, grad.to(dtype).double(), *exact)
    # By chance a few values round across the kink, in either; each weighs 1 / numel in the square.
    few = (4 / grad.numel()) ** 0.5
    assert (errors(fused) <= 2 * errors(plain) + few).all()


def test_a_float32_bias_beyond_float16_is_not_rounded() -> None:
    x, weight = torch.ones(2, 4).half(), torch.ones(5, 4).half()
    bias = torch.tensor([1e6, -1e6, 2049.0, torch.inf, torch.nan])
    spec = ActSpec("leaky_relu", 1e-4, negative_slope=1.0)  # 1e-4 · (4 + b)
    want = (1e-4 * (4 + bias)).half().expand(2, 5)
    for leaf in (bias, bias.clone().requires_grad_()):
        y = linear_act(x, weight, leaf, spec).detach()
        torch.testing.assert_close(y, want, equal_nan=True)
