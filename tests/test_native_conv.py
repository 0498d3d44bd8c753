"""csrc's convolutions: numbers, epilogues, determinism and refusals of the ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedshape import ActSpec, native, reference
from tests.support.convolutions import (
    EPS,
    KINDS,
    LAST,
    ONE,
    OPS,
    Call,
    Case,
    W,
    X,
    cases,
    conv,
    conv2d,
    draw,
)
from tests.support.operands import F32, F64, LEAKY, SWISH, last
from tests.support.specs import SPECS, shaped
from tests.support.tolerance import assert_as_good_as

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"native: {native.why_not()}"),
    pytest.mark.usefixtures("one_thread"),
]

IDENTITY = ActSpec("leaky_relu", negative_slope=1.0)


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers, whose products and sums float32 holds exactly, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


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


@settings(max_examples=400, deadline=None)
@given(cases(), st.sampled_from(WEIGHTS))
def test_any_layer_is_exact(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    assert_exact(case, layout)


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
    """The layer's own activation after a forward, and the previous layer's after a dgrad."""
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
    """Outputs whose taps meet pixels are not finite; over padding alone they may be either."""
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


DZ = last(torch.ones(2, 32, 3, 2))

FLAT = ([], [], [])


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


HUGE = (2**31, 2**40, 2**62, 2**63 - 1)


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("where", ["stride", "padding", "dilation", "input_size", "weight_size"])
def test_sizes_that_overflow_are_refused(where: str, huge: int) -> None:
    """A large stride with a single position is taken; no product of sizes exceeds int64."""
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
