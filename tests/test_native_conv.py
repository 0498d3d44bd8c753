"""csrc's convolutions: numbers, epilogues, determinism and refusals of the ops; engine "native"."""

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
from conftest import INTERPRET, SPECS, assert_as_good_as, shaped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedshape import ActSpec, ShapedConv2d, ShapedLinear, native, reference
from fusedshape.ops import ChainLayer, conv_act, conv_chain, linear_act
from fusedshape.ops.engine import install_chooser

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"native: {native.why_not()}"),
    pytest.mark.usefixtures("one_thread"),
]
OPS = torch.ops.fusedshape
LEAKY = shaped("leaky_relu")  # saves its output
SWISH = shaped("swish")  # saves its input
IDENTITY = ActSpec("leaky_relu", negative_slope=1.0)
F32, F64 = torch.float32, torch.float64
EPS = torch.finfo(F32).eps
LAST = torch.channels_last


def draw(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers, whose products and sums float32 holds exactly, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


def last(x: Tensor) -> Tensor:
    """The same numbers with channels innermost."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class Case(NamedTuple):
    x: tuple[int, ...]
    out: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.out, self.x[1], *self.kernel)

    @property
    def y(self) -> tuple[int, ...]:
        sizes = zip(*(self.x[2:], *self[2:]), strict=True)
        spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
        return (self.x[0], self.out, *spatial)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.dilation)


def conv2d(
    x: tuple[int, ...],
    out: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Case:
    kernels = (kernel, kernel) if isinstance(kernel, int) else kernel
    return Case(x, out, kernels, (stride,) * 2, (padding,) * 2, (dilation,) * 2)


def truth_of(case: Case, x: Tensor, weight: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW of torch's convolution in float64."""
    x, weight, dz = x.double(), weight.double(), dz.double()
    n = len(case.kernel)
    if not n:
        return x @ weight.t(), dz @ weight, dz.t() @ x
    rest = (*case.geometry, False, [0] * n, 1)
    y = torch.convolution(x, weight, None, *rest)
    mask = [True, True, False]
    return y, *torch.ops.aten.convolution_backward(dz, x, weight, None, *rest, mask)[:2]


def poison(*shapes: tuple[int, ...]) -> None:
    """Leave NaN in the memory that results of these shapes are likely to get."""
    for shape in shapes:
        torch.full(shape, math.nan)


def run(case: Case, x: Tensor, weight: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW of the ops, without an epilogue."""
    poison(case.x, case.weight, case.y)
    y = OPS.native_conv(x, weight, *case.geometry)
    epilogue = (*IDENTITY.kernel_args, True, False)
    dx, sums = OPS.native_conv_dgrad(dz, weight, None, None, case.x, *case.geometry, *epilogue)
    assert sums.shape == (0,)
    return y, dx, OPS.native_conv_wgrad(dz, x, case.weight, *case.geometry)


def as_is(w: Tensor) -> Tensor:
    return w


def transposed(w: Tensor) -> Tensor:
    return w.transpose(0, 1).contiguous().transpose(0, 1)


def strided(w: Tensor) -> Tensor:
    wide = torch.full([2 * n + 1 for n in w.shape], math.nan)
    view = wide[tuple(slice(1, None, 2) for _ in w.shape)]
    return view.copy_(w)


def expanded(w: Tensor) -> Tensor:
    """All input channels are one, in memory too."""
    return w[:, :1].expand(w.shape)


def expanded_out(w: Tensor) -> Tensor:
    return w[:1].expand(w.shape)


WEIGHTS = [as_is, last, transposed, strided, expanded, expanded_out]


def assert_exact(case: Case, layout: Callable[[Tensor], Tensor] = as_is) -> None:
    x, dz = last(integers(*case.x)), last(integers(*case.y, seed=1))
    weight = layout(integers(*case.weight, seed=2))
    got, want = run(case, x, weight, dz), truth_of(case, x, weight, dz)
    for name, g, w in zip(("y", "dx", "dW"), got, want, strict=True):
        assert w.abs().max().item() < 2**24 if w.numel() else True, "not exact in float32"
        assert g.dtype == F32
        assert g.shape == w.shape, name
        wrong = (g.double() != w).nonzero()
        assert not len(wrong), f"{name}: {len(wrong)} of {g.numel()} wrong, first at {wrong[0]}"
        assert g.movedim(1, -1).is_contiguous(), name


CHANNELS = [16, 32, 48, 64, 80, 96, 112, 144, 528]


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    """Layers of any kind that csrc takes, each of some 10⁷ products at most."""
    n = draw_(st.sampled_from([2, 1, 3, 0]))
    widest = (60, 40, 9, 5)[n]
    batch = draw_(st.integers(0, 20) | st.sampled_from([1, 12, 13]))
    kernel, stride, padding, dilation, size = [], [], [], [], []
    for _ in range(n):
        kernel.append(draw_(st.integers(1, 5)))
        stride.append(draw_(st.integers(1, 3)))
        dilation.append(draw_(st.integers(1, 3)))
        padding.append(draw_(st.integers(0, kernel[-1] + 2)))
        least = max(1, dilation[-1] * (kernel[-1] - 1) + 1 - 2 * padding[-1])
        size.append(draw_(st.integers(least, least + widest)))
    geometry = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    positions = math.prod(Case((batch, 16, *size), 16, *geometry).y) // 16
    if n == 0:
        batch = positions = draw_(st.integers(0, 300))
    budget = 10**7 // max(1, positions * math.prod(kernel))
    channels = draw_(st.sampled_from([c for c in CHANNELS if c * 16 <= budget] or [16]))
    out = draw_(st.sampled_from([c for c in CHANNELS if c * channels <= budget] or [16]))
    if draw_(st.booleans()):
        channels, out = out, channels
    return Case((batch, channels, *size), out, *geometry)


@settings(max_examples=400, deadline=None)
@given(cases(), st.sampled_from(WEIGHTS))
def test_any_layer_is_exact(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    assert_exact(case, layout)


KINDS = {
    "linear": Case((7, 32), 48),
    "linear, one row": Case((1, 16), 16),
    "linear, many rows": Case((1000, 80), 144),
    "linear, sum in pieces": Case((13, 1040), 528),
    "sum in pieces": conv2d((2, 1040, 3, 4), 528, 1),
    "sum in uneven pieces": conv2d((1, 544, 4, 4), 1168, (2, 1), padding=1),
    "taps in runs": conv2d((2, 144, 5, 5), 96, 5, padding=2),
    "a tap a run": conv2d((1, 272, 4, 5), 272, 3, padding=1),
    "weight in parts": conv2d((1, 1040, 2, 2), 528, 3, padding=1),
    "many rows": conv2d((20, 16, 10, 9), 32, 3, padding=1),
    "chunks of wgrad": conv2d((13, 32, 13, 11), 16, 3, 2, 1),
    "stride beyond kernel": conv2d((3, 32, 10, 11), 16, 1, 3),
    "stride 3, kernel 2": conv2d((13, 16, 11, 10), 80, 2, 3, 1),
    "even kernel": conv2d((2, 48, 7, 6), 16, 4, 1, 2),
    "dilated": conv2d((2, 32, 9, 12), 112, 3, 1, 2, 2),
    "dilated 3, stride 2": conv2d((13, 16, 9, 8), 16, 3, 2, 3, 3),
    "padding beyond kernel": conv2d((13, 16, 2, 3), 32, 2, 1, 4),
    "kernel beyond input": conv2d((2, 16, 2, 3), 64, 5, 1, 2),
    "one position": conv2d((25, 64, 1, 1), 80, 1),
    "height below stride": Case((3, 16, 1, 5), 16, (3, 3), (3, 2), (1, 1), (1, 1)),
    "1d": Case((13, 32, 45), 48, (4,), (2,), (3,), (2,)),
    "3d": Case((2, 16, 4, 5, 6), 32, (2, 3, 1), (1, 2, 3), (1, 0, 2), (2, 1, 1)),
    "no images": conv2d((0, 16, 5, 5), 32, 3, 2, 1),
    "no rows": Case((0, 48), 32),
}


NO_PIXELS = conv2d((2, 16, 0, 3), 32, 2, 1, 1)  # which torch refuses


def test_an_input_of_padding_alone() -> None:
    x, dz = last(torch.empty(NO_PIXELS.x)), last(draw(*NO_PIXELS.y))
    y, dx, dweight = run(NO_PIXELS, x, draw(*NO_PIXELS.weight), dz)
    assert y.shape == (2, 32, 1, 4)
    assert not y.any()
    assert not dweight.any()
    assert dx.shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_exact(kind: str) -> None:
    for layout in WEIGHTS[:4] if math.prod(KINDS[kind].weight) < 10**6 else WEIGHTS[:1]:
        assert_exact(KINDS[kind], layout)


def test_a_stride_beyond_every_input() -> None:
    """Time must not grow with the stride, of whose residues most meet no input."""
    far = 2**30
    assert_exact(Case((2, 16, 3, 4, 2), 16, (2, 1, 2), (far,) * 3, (1, 1, 0), (1,) * 3))


@pytest.mark.parametrize("kind", ["linear, sum in pieces", "taps in runs", "3d", "many rows"])
def test_rounding(kind: str) -> None:
    """Sums of n float32 products, in any order: n roundings of at most ε/2 of Σ|terms| each."""
    case = KINDS[kind]
    x, weight, dz = last(draw(*case.x)), draw(*case.weight, seed=1), last(draw(*case.y, seed=2))
    got, want = run(case, x, weight, dz), truth_of(case, x, weight, dz)
    bounds = truth_of(case, x.abs(), weight.abs(), dz.abs())
    taps = math.prod(case.kernel)
    terms = (case.x[1] * taps, case.out * taps, math.prod(case.y) // case.out)
    for g, w, bound, n in zip(got, want, bounds, terms, strict=True):
        error = (g.double() - w).abs()
        assert (error <= n * EPS / 2 * bound).all()
        # Roundings are as good as random: they add up like a random walk of √n steps.
        assert error.amax() <= 4 * n**0.5 * EPS * w.abs().amax()


def biases(kind: str, channels: int) -> Tensor | None:
    if kind == "none":
        return None
    return draw(channels, 3, seed=5)[:, 1] if kind == "strided" else draw(channels, seed=5)


EPILOGUES = [
    KINDS["chunks of wgrad"],
    KINDS["3d"],
    Case((200, 80), 1040),  # rows of more than 1024 numbers
    conv2d((2, 144, 4, 3), 16, 2, 3, 1),  # some positions have no taps
]


NONE = (*IDENTITY.kernel_args, True, False)


def check_forward(
    case: Case, spec: ActSpec, bias: Tensor | None, residual_weight: float = 0.0
) -> None:
    x, weight = last(integers(*case.x)), integers(*case.weight, seed=2) / 8
    z = OPS.native_conv(x, weight, *case.geometry)  # exact
    residual = last(draw(*case.y, seed=6)) if residual_weight else None
    args = (bias, residual, residual_weight, *case.geometry, *spec.kernel_args)
    y = OPS.native_conv_act(x, weight, *args)
    assert y.stride() == z.stride()

    def expected(dtype: torch.dtype) -> Tensor:
        shape = (-1, *[1] * (z.ndim - 2))
        total = z.to(dtype) if bias is None else z.to(dtype) + bias.to(dtype).view(shape)
        if residual is not None:
            own = (1 - residual_weight**2) ** 0.5
            total = own * total + residual_weight * residual.to(dtype)
        return reference.bias_act(total, None, spec)

    assert_as_good_as(y, expected(F32), expected(F64))


def check_dgrad(case: Case, spec: ActSpec, bias: Tensor | None) -> None:
    weight, dz = integers(*case.weight, seed=2) / 8, last(integers(*case.y, seed=1))
    pre = last(draw(*case.x, seed=3))
    saved = reference.bias_act(pre, bias, spec) if spec.saves_output else pre
    rest = (case.x, *case.geometry)
    grad = OPS.native_conv_dgrad(dz, weight, None, None, *rest, *NONE)[0]  # exact
    poison(case.x)
    args = (dz, weight, saved, bias, *rest, *spec.kernel_args, spec.saves_output)
    dx, sums = OPS.native_conv_dgrad(*args, True)
    wide = None if bias is None else bias.double()
    truth = reference.act_grad(grad.double(), saved.double(), wide, spec, 1)
    assert_as_good_as(dx, reference.act_grad(grad, saved, bias, spec, 1), truth)
    assert dx.stride() == grad.stride()
    # Of 32 numbers in float32, of the rest in float64; rounded once.
    terms = dx.double()
    error = (sums - reference.channel_sum(terms, 1)).abs()
    assert (error <= 33 * EPS / 2 * reference.channel_sum(terms.abs(), 1)).all()
    again, empty = OPS.native_conv_dgrad(*args, False)
    assert torch.equal(again, dx)
    assert empty.shape == (0,)


@pytest.mark.parametrize("bias_kind", ["none", "plain", "strided"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_every_activation(spec: ActSpec, bias_kind: str) -> None:
    """Of the layer itself after a forward, and of the layer before after a dgrad."""
    for case in EPILOGUES:
        check_forward(case, spec, biases(bias_kind, case.out))
        check_dgrad(case, spec, biases(bias_kind, case.x[1]))


@pytest.mark.parametrize("residual_weight", [0.6, -0.25, 0.999])
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
def test_residual(spec: ActSpec, residual_weight: float) -> None:
    for case, kind in itertools.product(EPILOGUES, ["none", "plain"]):
        check_forward(case, spec, biases(kind, case.out), residual_weight)


def test_epilogues_of_a_weight_in_parts() -> None:
    case = KINDS["weight in parts"]
    check_forward(case, LEAKY, biases("plain", case.out), 0.5)
    check_dgrad(case, SWISH, biases("plain", case.x[1]))


def test_sums_of_long_columns() -> None:
    """Ones and a large number, which a running sum in float32 would swallow."""
    case = conv2d((8, 16, 32, 32), 16, 1)
    dz, weight = last(torch.ones(case.y)), torch.eye(16).view(case.weight)
    dz[0, :, 0, 0] = 2.0**25
    saved = last(torch.ones(case.x))
    args = (*IDENTITY.kernel_args, True, True)
    sums = OPS.native_conv_dgrad(dz, weight, saved, None, case.x, *case.geometry, *args)[1]
    assert torch.allclose(sums, torch.tensor(2.0**25 + 8 * 1024 - 1), rtol=2 * EPS, atol=32)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu", "selu", "softsign"])
def test_kinks(name: str) -> None:
    """At a kink the derivative is the reference's, and values next to it go to their sides."""
    spec = ActSpec(name, 2.0, -1.0, 0.0 if name == "relu" else 0.25, 0.5)
    case = conv2d((1, 16, 1, 7), 16, 1)
    tiny = 2.0**-20
    x = torch.tensor([0.5 - tiny, 0.5, 0.5 + tiny, 0.0, -0.0, 1.0, -1.0]).expand(1, 16, 1, 7)
    eye = torch.eye(16).view(case.weight)
    y = OPS.native_conv_act(last(x), eye, None, None, 0.0, *case.geometry, *spec.kernel_args)
    torch.testing.assert_close(y, reference.bias_act(x, None, spec), rtol=4 * EPS, atol=0)
    saved = y if spec.saves_output else last(x)
    args = (*spec.kernel_args, spec.saves_output, False)
    ones = last(torch.ones(case.y))
    dx = OPS.native_conv_dgrad(ones, eye, saved, None, case.x, *case.geometry, *args)[0]
    want = reference.act_grad(torch.ones(case.x), saved, None, spec, 1)
    torch.testing.assert_close(dx, want, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("name", ["sin", "cos", "atan"])
def test_far_arguments(name: str) -> None:
    """A scale beyond float32's reduction of arguments, in the middle of ordinary ones."""
    spec = ActSpec(name, output_scale=0.5)
    case = conv2d((2, 16, 5, 5), 16, 1)
    x = last(integers(*case.x))
    x[1, 3, 2, 2] = 3.0e6
    x[0, 5, 1, 1] = -1.0e30
    eye = torch.eye(16).view(case.weight)
    y = OPS.native_conv_act(x, eye, None, None, 0.0, *case.geometry, *spec.kernel_args)
    truth = reference.bias_act(x.double(), None, spec)
    torch.testing.assert_close(y.double(), truth, rtol=8 * EPS, atol=2 * EPS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("geometry", [(3, 1, 1, 1), (2, 3, 2, 1), (3, 2, 3, 2)], ids=str)
def test_what_is_not_finite_spreads_as_far_as_taps_do(
    geometry: tuple[int, int, int, int], value: float
) -> None:
    """One bad number reaches the outputs that see it, and no others: padding is zeros."""
    case = conv2d((14, 16, 6, 5), 32, *geometry)
    weight = integers(*case.weight, seed=2).abs() + 1
    for image, row, column in [(0, 0, 0), (12, 3, 4), (13, 5, 2)]:
        x, dz = last(integers(*case.x)), last(integers(*case.y, seed=1))
        at = image, 5, row, column
        x[at] = value
        seen = torch.zeros(case.x)
        seen[at] = 1
        reach = truth_of(case, seen, torch.ones(case.weight), torch.ones(case.y))[0] > 0
        y = OPS.native_conv(x, weight, *case.geometry)
        assert torch.equal(~y.isfinite(), reach)
        if not math.isnan(value):
            assert (y[reach] == value).all()
        if reach.any():
            where = tuple(reach.nonzero()[0].tolist())
            dz[where] = value
            one = torch.zeros(case.y)
            one[where] = 1
            reach = truth_of(case, seen, torch.ones(case.weight), one)[1] > 0
            dx = OPS.native_conv_dgrad(dz, weight, None, None, case.x, *case.geometry, *NONE)[0]
            assert torch.equal(~dx.isfinite(), reach)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("geometry", [(3, 1, 1, 1), (2, 3, 2, 1), (3, 2, 3, 2)], ids=str)
def test_weights_that_are_not_finite(geometry: tuple[int, int, int, int], value: float) -> None:
    """Beside padding they count or do not; everywhere else they do, and nothing else changes."""
    case = conv2d((14, 16, 6, 5), 32, *geometry)
    weight, ones = integers(*case.weight, seed=2), torch.ones(case.x)
    tap = torch.zeros(case.weight)
    tap[5, :, 0, 1] = 1
    without = weight * (1 - tap)
    met = truth_of(case, ones, tap, torch.ones(case.y))[0] > 0
    x = last(ones)
    y = OPS.native_conv(x, torch.where(tap > 0, value, weight), *case.geometry)
    assert not y[met].isfinite().any()
    rest = OPS.native_conv(x, without, *case.geometry)
    beside = ~met & (torch.arange(32) == 5).view(-1, 1, 1)
    assert beside.any()
    assert (y[beside].isnan() | (y[beside] == rest[beside])).all()
    others = [k for k in range(32) if k != 5]
    assert torch.equal(y[:, others], rest[:, others])


@pytest.mark.parametrize("spec", [LEAKY, SWISH, shaped("elu")], ids=lambda s: s.activation)
def test_not_a_number_goes_through_epilogues(spec: ActSpec) -> None:
    case = conv2d((2, 16, 4, 4), 16, 1)
    eye, x = torch.eye(16).view(case.weight), last(draw(*case.x))
    weight = eye.clone()
    x[1, :, 2, 3] = math.nan
    args = (*case.geometry, *spec.kernel_args)
    y = OPS.native_conv_act(x, weight, None, None, 0.0, *args)
    assert torch.equal(y.isnan(), x.isnan())
    dz = last(torch.ones(case.y))
    dz[0, 0, 0, 0] = math.nan
    saved = last(draw(*case.x))
    dx, sums = OPS.native_conv_dgrad(dz, eye, saved, None, case.x, *args, spec.saves_output, True)
    assert dx[0, :, 0, 0].isnan().all()
    assert dx.isnan().sum() == 16
    assert sums.isnan().all()


def outputs(case: Case, threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    x, weight, dz = last(draw(*case.x)), draw(*case.weight, seed=1), last(draw(*case.y, seed=2))
    bias, geometry = draw(case.out, seed=3), case.geometry
    dgrad = (dz, weight, x, None, case.x, *geometry, *LEAKY.kernel_args, True, True)
    return [
        OPS.native_conv(x, weight, *geometry),
        OPS.native_conv_act(x, weight, bias, None, 0.0, *geometry, *SWISH.kernel_args),
        *OPS.native_conv_dgrad(*dgrad),
        OPS.native_conv_wgrad(dz, x, case.weight, *geometry),
    ]


@pytest.mark.parametrize("kind", ["linear, many rows", "many rows", "3d", "taps in runs"])
def test_bits_do_not_depend_on_threads(kind: str) -> None:
    case = KINDS[kind]
    one, *others = [outputs(case, threads) for threads in (1, 2, 2, 3, 16)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_images_do_not_depend_on_their_batch() -> None:
    case = conv2d((14, 16, 6, 5), 32, 3, 2, 1)
    x, weight = last(draw(*case.x)), draw(*case.weight, seed=1)
    together = OPS.native_conv(x, weight, *case.geometry)
    for i in (0, 5, 11, 12, 13):
        alone = OPS.native_conv(last(x[i : i + 1]), weight, *case.geometry)
        assert torch.equal(alone[0], together[i])


X, W = last(torch.ones(2, 16, 5, 4)), torch.ones(32, 16, 3, 3)
DZ = last(torch.ones(2, 32, 3, 2))
ONE = ([1, 1], [0, 0], [1, 1])
FLAT = ([], [], [])
Call = Callable[[], object]


def conv(x: Tensor = X, w: Tensor = W, s: Any = ONE[0], p: Any = ONE[1], d: Any = ONE[2]) -> Call:
    return lambda: OPS.native_conv(x, w, s, p, d)


def act(
    bias: Tensor | None = None,
    activation: int = 0,
    residual: Tensor | None = None,
    residual_weight: float = 0.5,
    w: Tensor = W,
) -> Call:
    constants = (activation, *LEAKY.kernel_args[1:])
    return lambda: OPS.native_conv_act(X, w, bias, residual, residual_weight, *ONE, *constants)


def dgrad(
    dz: Tensor = DZ,
    w: Tensor = W,
    saved: Tensor | None = X,
    bias: Tensor | None = None,
    size: tuple[int, ...] = (2, 16, 5, 4),
    spec: ActSpec = SWISH,
    from_output: bool = False,
    sums: bool = True,
) -> Call:
    rest = (*spec.kernel_args, from_output, sums)
    return lambda: OPS.native_conv_dgrad(dz, w, saved, bias, size, *ONE, *rest)


def wgrad(dz: Tensor = DZ, x: Tensor = X, size: tuple[int, ...] = (32, 16, 3, 3)) -> Call:
    return lambda: OPS.native_conv_wgrad(dz, x, size, *ONE)


REFUSED: list[tuple[str, Call]] = [
    ("x has dtype Double; must be Float", conv(X.double())),
    ("x has dtype BFloat16", conv(X.bfloat16())),
    ("weight has dtype Long", conv(w=W.long())),
    ("dz has dtype Half", dgrad(DZ.half())),
    ("saved has dtype Double", dgrad(saved=X.double())),
    ("dz has dtype Double", wgrad(DZ.double())),
    ("x has dtype Double", wgrad(x=X.double())),
    ("bias has dtype Double", act(torch.ones(32).double())),
    (r"bias has shape \(16,?\); must be \(32,\)", act(torch.ones(16))),
    (r"bias has shape \(1, 32\)", act(torch.ones(1, 32))),
    (r"bias has shape \(\)", act(torch.ones(()))),
    (r"bias has shape \(32,?\); must be \(16,\)", dgrad(bias=torch.ones(32))),
    ("12 channels; must be a multiple of 16", conv(w=torch.ones(12, 16, 3, 3))),
    ("8 channels", conv(last(torch.ones(2, 8, 5, 4)), torch.ones(16, 8, 3, 3))),
    ("0 channels", conv(w=torch.ones(0, 16, 3, 3))),
    ("0 channels", conv(last(torch.ones(2, 0, 5, 4)), torch.ones(16, 0, 3, 3))),
    ("24 channels", wgrad(size=(24, 16, 3, 3))),
    ("weight has 32 input channels, input 16", conv(w=torch.ones(16, 32, 3, 3))),
    ("weight has 32 input channels, input 16", wgrad(size=(32, 32, 3, 3))),
    (r"input \(2, 16, 5, 4\) and weight \(32, 16\)", conv(w=torch.ones(32, 16))),
    (r"input \(16,?\)", conv(torch.ones(16), torch.ones(16))),
    (r"input \(\) and weight \(\)", conv(torch.ones(()), torch.ones(()))),
    ("2 to 5 dimensions", conv(torch.ones([1] * 6), torch.ones([16] * 2 + [1] * 4))),
    (r"input \(2, 16\)", dgrad(size=(2, 16))),
    (r"weight \(\)", wgrad(size=())),
    ("need 2 numbers each", conv(s=[1])),
    ("need 2 numbers each", conv(p=[0, 0, 0])),
    ("need 2 numbers each", conv(d=[])),
    (r"stride \(0, 1\)", conv(s=[0, 1])),
    (r"padding \(-1, 0\)", conv(p=[-1, 0])),
    (r"dilation \(1, 0\)", conv(d=[1, 0])),
    (r"dilation \(1, 4611686018427387904\)", conv(d=[1, 2**62])),
    (r"padding \(4611686018427387904, 0\)", conv(p=[2**62, 0])),
    ("weight.*out of range", conv(w=torch.ones(32, 16, 0, 3))),
    ("a kernel of 3 with dilation 3 reaches over 7, the padded input has 5", conv(d=[3, 1])),
    ("reaches over 3, the padded input has 2", dgrad(size=(2, 16, 5, 2))),
    ("x must lie in memory with its channels innermost", conv(X.contiguous())),
    ("x must lie in memory", conv(last(torch.ones(2, 16, 5, 8))[..., ::2])),
    ("x must lie in memory", conv(X[:1].expand(2, 16, 5, 4))),
    ("x must lie in memory", conv(torch.ones(16, 16).t(), torch.ones(16, 16), *FLAT)),
    ("dz must lie in memory", dgrad(DZ.contiguous())),
    ("dz must lie in memory", wgrad(torch.ones(()).expand(DZ.shape))),
    ("saved must lie in memory", dgrad(saved=X.contiguous())),
    (r"saved has shape \(2, 32, 3, 2\); must be \(2, 16, 5, 4\)", dgrad(saved=DZ)),
    (r"dz has shape \(2, 16, 5, 4\); must be \(2, 32, 3, 2\)", dgrad(X)),
    (r"dz has shape \(1, 32, 3, 2\); must be \(2, 32, 3, 2\)", wgrad(DZ[:1])),
    (r"must be \(-2, 32, 3, 2\)", dgrad(size=(-2, 16, 5, 4))),
    (r"input \(2, 16, -5, 4\) or weight .* out of range", dgrad(size=(2, 16, -5, 4))),
    ("activation=18 is not known", act(activation=18)),
    ("activation=-1 is not known", act(activation=-1)),
    ("residual_weight=1 must lie between -1 and 1", act(residual=DZ, residual_weight=1.0)),
    ("residual_weight=nan", act(residual=DZ, residual_weight=math.nan)),
    (r"residual has shape \(2, 16, 5, 4\); must be \(2, 32, 3, 2\)", act(residual=X)),
    ("residual has dtype Double", act(residual=DZ.double())),
    ("residual must lie in memory", act(residual=DZ.contiguous())),
    ("weight .*2 to 5 dimensions", act(w=torch.ones(32))),
    (r"weight \(\)", act(w=torch.ones(()))),
    ("no derivative from its output", dgrad(from_output=True)),
    ("bias_grad needs what the layer before saved", dgrad(saved=None)),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[m for m, _ in REFUSED])
def test_refusals(message: str, call: Call) -> None:
    with pytest.raises(RuntimeError, match=f"native_conv.*: .*{message}"):
        call()


def test_what_is_refused_is_all_that_is_wrong() -> None:
    for call in (conv(), act(), dgrad(), wgrad()):
        call()


CHECKED = [KINDS[k] for k in ("linear", "1d", "stride 3, kernel 2", "3d", "no images")]


@pytest.mark.parametrize("case", [*CHECKED, NO_PIXELS], ids=lambda case: str(case.x))
def test_opcheck(case: Case) -> None:
    """Schemas, and that shapes and strides of fakes are those of the results."""
    x, weight, dz = last(draw(*case.x)), draw(*case.weight, seed=1), last(draw(*case.y, seed=2))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("conv", (x, weight, *case.geometry)),
        ("conv_act", (x, weight, draw(case.out), None, 0.0, *case.geometry, *LEAKY.kernel_args)),
        ("conv_dgrad", (dz, weight, None, None, case.x, *case.geometry, *NONE)),
        ("conv_wgrad", (dz, x, case.weight, *case.geometry)),
    ]
    for sums in (True, False):
        rest = (*case.geometry, *SWISH.kernel_args, False, sums)
        calls.append(("conv_dgrad", (dz, weight, x, draw(case.x[1]), case.x, *rest)))
    for name, args in calls:
        op = getattr(OPS, f"native_{name}").default
        torch.library.opcheck(op, args, test_utils=checks)
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
        real, fake = op(*args), op(*meta)
        for r, f in zip(*(t if isinstance(t, tuple) else (t,) for t in (real, fake)), strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), name


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


def plain(case: Case, x: Tensor, w: Tensor, b: Tensor | None, spec: ActSpec) -> Tensor:
    """The layer in torch's own operations."""
    if not case.kernel:
        return reference.bias_act(F.linear(x, w, b), None, spec)
    f = (F.conv1d, F.conv2d, F.conv3d)[len(case.kernel) - 1]
    return reference.bias_act(f(x, w, b, *case.geometry), None, spec)


def operands(case: Case, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = draw(*case.weight, seed=1) / math.prod(case.weight[1:]) ** 0.5
    return last(draw(*case.x)), weight, draw(case.out, seed=2) if bias else None


def grads_of(f: Callable[..., Tensor], grad: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = f(*leaves)
    wanted = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def assert_near(got: Tensor, truth: Tensor, terms: int) -> None:
    """Within what float32's roundings, like a random walk, make of sums of so many terms."""
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
    "sliced": ("is not channels_last", lambda: (last(big())[:, :, ::2], small_weight(), {})),
    "float64": (
        "csrc's convolutions are for float32, got torch.float64",
        lambda: (last(big()).double(), small_weight().double(), {}),
    ),
    "bfloat16": (
        "got torch.bfloat16",
        lambda: (last(big()).bfloat16(), small_weight().bfloat16(), {}),
    ),
    "groups": ("groups=2", lambda: (last(big()), draw(32, 16, 3, 3), {"groups": 2})),
    "channels in": ("24 channels", lambda: (last(draw(4, 24, 30, 20)), draw(32, 24, 1, 1), {})),
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
    """By an explicit choice, which has no kernels for them."""
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
    """Where Dynamo makes an input of each number that is not written in the code it traces."""
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
    """Between operations of its own, which it may lay out as it likes."""

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
    """For inputs that are worth a question, unless a backend is named."""
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
    """How many numbers autograd keeps for f's backward, beside `known` tensors."""
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


HUGE = (2**31, 2**40, 2**62, 2**63 - 1)


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("where", ["stride", "padding", "dilation", "input_size", "weight_size"])
def test_sizes_that_overflow_are_refused(where: str, huge: int) -> None:
    """Or taken, where a large stride means a single position; never multiplied beyond int64."""
    x, w = (torch.zeros(*s).to(memory_format=LAST) for s in ((1, 16, 3, 3), (16, 16, 3, 3)))
    sizes = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    dz = torch.zeros(1, 16, 1, 1)
    epilogue = (0, 0.0, 1.0, 0.0, 0.0, 1.0, True, False)
    if where in sizes:
        sizes[where] = [huge, huge]
    given = list(sizes.values())
    calls = {
        "native_conv": (x, w, *given),
        "native_conv_dgrad": (dz, w, None, None, [1, 16, 3, 3], *given, *epilogue),
        "native_conv_wgrad": (dz, x, [16, 16, 3, 3], *given),
    }
    if where == "input_size":
        size = [huge, 16, huge, huge]
        calls = {"native_conv_dgrad": (dz, w, None, None, size, *given, *epilogue)}
    elif where == "weight_size":
        calls = {"native_conv_wgrad": (dz, x, [huge - huge % 16, 16, huge, huge], *given)}
    for name, args in calls.items():
        if where == "stride" and huge == HUGE[0]:
            getattr(OPS, name)(*args)
            continue
        with pytest.raises(
            RuntimeError, match=rf"{name}: .*(at most|addressed|reaches over|shape)"
        ):
            getattr(OPS, name)(*args)
