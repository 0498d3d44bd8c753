"""The pointwise kernels in Triton's interpreter (TRITON_INTERPRET=1), against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedshape import ACTIVATIONS, ActSpec, reference
from fusedshape.activations import Activation
from fusedshape.kernels import epilogue, host, phi, pointwise, reduction
from tests.support.interpreter import poisoned_memory
from tests.support.operands import draw
from tests.support.specs import SPECS, shaped
from tests.support.tolerance import assert_as_good_as

pytestmark = [
    # NumPy warns where the hardware silently returns inf or NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(not host.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
]
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ROWS = list(ACTIVATIONS.values())
OUTPUT_ROWS = [row for row in ROWS if row.d1_from_output is not None]
BY_NAME = {"ids": lambda row: row.name}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN."""
    with poisoned_memory():
        pointwise.make_plan.cache_clear()
        yield
    pointwise.make_plan.cache_clear()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs, many steps of each and many stages of sums, for tensors of 200 elements."""
    monkeypatch.setattr(pointwise, "TILE_BYTES", 64)
    monkeypatch.setattr(pointwise, "PROGRAMS", 5)
    monkeypatch.setattr(pointwise, "SUM_COLUMNS", 4)
    monkeypatch.setattr(reduction, "CHANNEL_PARTS", 2)


@triton.jit
def _phi_kernel(
    u_ptr, out_ptr, slope: tl.float64, WHAT: tl.constexpr, ID: tl.constexpr, N: tl.constexpr
):
    i = tl.arange(0, N)
    u = tl.load(u_ptr + i)
    a = tl.full((), slope, u.dtype)
    if WHAT == "value":
        r = phi.value(u, a, ID)
    elif WHAT == "d1":
        r = phi.d1(u, a, ID)
    else:
        right = u > 0 if ID == phi.LEAKY_RELU else ~(u <= 0)
        r = phi.d1_from_output(u, right, a, ID)
    tl.store(out_ptr + i, r)


SLOPE = 0.37


def run_phi(u: Tensor, what: str, identity: int) -> Tensor:
    n = triton.next_power_of_2(len(u))
    padded = torch.zeros(n, dtype=u.dtype)
    padded[: len(u)] = u
    out = torch.empty_like(padded)
    _phi_kernel[(1,)](padded, out, SLOPE, WHAT=what, ID=identity, N=n)
    return out[: len(u)]


def grid(row: Activation) -> Tensor:
    """Both signs, thirty orders of magnitude, and dense where the functions bend."""
    positive = torch.cat(
        [torch.logspace(-30, 4, 171, dtype=F64), torch.linspace(0.01, 12, 3000, dtype=F64)]
    )
    return torch.cat([positive, -positive, torch.zeros(1, dtype=F64)])


def function(row: Activation, what: str) -> Callable[[Tensor], Tensor]:
    f = {"value": row.value, "d1": row.d1, "output": row.d1_from_output}[what]
    assert f is not None
    return lambda u: f(u, SLOPE)


def assert_stable(got: Tensor, u: Tensor, f: Callable[[Tensor], Tensor], lost: float = 0.0) -> None:
    """Hold `got` to what exact arithmetic gives for an argument within a few roundings of u.

    Args:
        got: f(u) as computed.
        u: the argument.
        f: the function in float64.
        lost: error that the float64 function itself makes near cancellations.
    """
    exact = u.double().requires_grad_()
    truth = f(exact)
    (slope,) = torch.autograd.grad(truth.sum(), exact) if truth.requires_grad else (exact * 0,)
    truth, exact = truth.detach(), exact.detach()
    info = torch.finfo(got.dtype)
    allowed = 6 * info.eps * (truth.abs() + (exact * slope).abs()) + info.tiny + lost
    wrong = (got.double() - truth).abs() / allowed
    worst = int(wrong.argmax())
    assert wrong[worst] <= 1, f"f({u[worst]:.9g}) = {got[worst]:.9g}, should be {truth[worst]:.9g}"


@pytest.mark.parametrize("what", ["value", "d1"])
@pytest.mark.parametrize("row", ROWS, **BY_NAME)
def test_phi_is_stable_everywhere(row: Activation, what: str) -> None:
    u = grid(row).float()
    got = run_phi(u, what, row.id)
    assert_stable(got, u, function(row, what), lost=1e-14)


@pytest.mark.parametrize("row", OUTPUT_ROWS, **BY_NAME)
def test_phi_from_output_is_stable_everywhere(row: Activation) -> None:
    v = row.value(grid(row), SLOPE).float()
    assert_stable(run_phi(v, "output", row.id), v, function(row, "output"), lost=1e-14)


@pytest.mark.parametrize("row", ROWS, **BY_NAME)
def test_phi_in_double_precision(row: Activation) -> None:
    u = torch.linspace(-9, 9, 301, dtype=F64)
    for what in ("value", "d1", "output"):
        if what == "output":
            if row.d1_from_output is None:
                continue
            u = row.value(u, SLOPE)
        truth = function(row, what)(u)
        error = (run_phi(u, what, row.id) - truth).abs() / (1 + truth.abs())
        assert error.max() < 4e-15


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("row", ROWS, **BY_NAME)
def test_phi_at_infinities_nan_and_kinks(row: Activation, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    huge = [1e6, 1e12, 1e20, 3e38, info.max, info.tiny, info.tiny / 4]
    if row.name in ("sin", "cos"):
        huge = [1e3, info.tiny]  # one rounding of the argument turns it around
    inf, nan = float("inf"), float("nan")
    u = torch.tensor([0.0, -0.0, inf, -inf, nan, *huge, *(-h for h in huge)], dtype=dtype)
    for what in ("value", "d1"):
        truth = function(row, what)(u.double()).to(dtype)
        got = run_phi(u, what, row.id)
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-37, equal_nan=True)
    assert run_phi(u, "value", row.id)[4].isnan()


def test_phi_refuses_an_unknown_id() -> None:
    unknown = 1 + max(row.id for row in ROWS)
    for what in ("value", "d1", "output"):
        with pytest.raises(Exception, match="lacks this activation"):
            run_phi(torch.zeros(2), what, unknown)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], int]] = {
    "nchw": (lambda x: x, (2, 5, 3, 7), 1),
    "nchw, vectors": (lambda x: x, (2, 3, 4, 8), 1),
    "channels_last": (lambda x: x.to(memory_format=torch.channels_last), (2, 5, 3, 7), 1),
    "channels_last, vectors": (lambda x: x.to(memory_format=torch.channels_last), (1, 48, 2, 2), 1),
    "rows": (lambda x: x, (9, 33), -1),
    "vector": (lambda x: x, (7,), 0),
    "first dim": (lambda x: x, (3, 40), 0),
    "one channel": (lambda x: x, (3, 1, 5), 1),
    "one pixel": (lambda x: x, (4, 6, 1, 1), 1),
    "permuted": (lambda x: x.permute(2, 0, 1), (2, 3, 8), 1),
    "sliced": (lambda x: x[:, 1:-1, ::2], (3, 6, 5), 1),
    "offset": (lambda x: x[1:], (3, 4, 5), 1),
    "expanded": (lambda x: x[:1].expand(3, -1, -1), (3, 4, 5), 1),
}


def case(layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    arrange, shape, dim = LAYOUTS[layout]
    x = arrange(draw(*shape, dtype=dtype))
    return x, draw(x.shape[dim], dtype=dtype, seed=1), draw(*x.shape, dtype=dtype, seed=2), dim


def check(
    spec: ActSpec,
    x: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    dim: int,
    bias_grad: bool = True,
) -> None:
    """Forward, backward and bias gradient of one case against float64."""
    before = [t.clone() for t in (x, grad)]
    wide = None if bias is None else bias.double()
    y = pointwise.bias_act(x, bias, dim, spec.kernel_args)
    plain = reference.bias_act(x, bias, spec, dim)
    assert_as_good_as(y, plain, reference.bias_act(x.double(), wide, spec, dim))
    assert y.stride() == torch.empty_like(x).stride()
    for saved, save_output in [(x, False), (y, True)][: 1 + spec.saves_output]:
        args = (grad, saved, bias, dim, spec.kernel_args, save_output, bias_grad)
        dx, sums = pointwise.act_grad(*args)
        assert dx.stride() == torch.empty_like(saved).stride()
        truth = true_grad(spec, x, bias, saved, grad, dim, save_output)
        sure = ~truth.isnan()
        assert_as_good_as(dx[sure], truth[sure].to(dx.dtype), truth[sure])
        truth = torch.where(sure, truth, dx.double())
        if bias_grad:
            assert sums.dtype == reference.opmath_dtype(x.dtype)
            # φ′ is off by roundings of 1, not of itself, where it crosses zero.
            scale = spec.input_scale * spec.output_scale
            total = reference.channel_sum(truth, dim)
            size = reference.channel_sum(truth.abs() + (scale * grad.double()).abs(), dim)
            allowed = 16 * torch.finfo(sums.dtype).eps * size
            if not sure.all():
                allowed += torch.finfo(dx.dtype).eps * size
            assert ((sums - total).abs() <= allowed).all()
        else:
            assert sums.numel() == 0
    for t, was in zip((x, grad), before, strict=True):
        assert torch.equal(t, was)


def true_grad(
    spec: ActSpec,
    x: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    grad: Tensor,
    dim: int,
    save_output: bool,
) -> Tensor:
    """The gradient in float64, NaN where rounding the output hides the side of the kink."""
    shape = [1] * x.ndim
    shape[dim] = -1
    u = x.double() if bias is None else x.double() + bias.double().reshape(shape)
    u = spec.input_scale * u + spec.input_shift
    if save_output:
        from_output = spec.row.d1_from_output
        assert from_output is not None
        v = saved.double() / spec.output_scale - spec.output_shift
        if 0.0 in spec.row.kinks:
            v = torch.where(u > 0, v.clamp(min=1e-300), v.clamp(max=0))
        d = from_output(v, spec.negative_slope)
        hidden = 4 * torch.finfo(x.dtype).eps * (1 + abs(spec.output_shift))
        if spec.row.kinks and spec.activation != "softsign":
            d = torch.where(u.abs() < hidden, torch.nan, d)
    else:
        d = spec.row.d1(u, spec.negative_slope)
    return d * (spec.input_scale * spec.output_scale) * grad.double()


@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_every_activation(spec: ActSpec, dtype: torch.dtype) -> None:
    for layout in ("nchw", "channels_last", "rows"):
        x, bias, grad, dim = case(layout, dtype)
        check(spec, x, bias, grad, dim)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["leaky_relu", "swish"])
def test_every_layout_in_one_tile_and_in_many(
    name: str, layout: str, request: pytest.FixtureRequest
) -> None:
    for dtype in (F32, F16):
        check(shaped(name), *case(layout, dtype))
    x, bias, grad, dim = case(layout, F32)
    check(shaped(name), x, None, grad, dim)
    check(shaped(name), x, bias, grad, dim, bias_grad=False)
    check(shaped(name), x, None, grad, dim, bias_grad=False)
    request.getfixturevalue("tiny")
    pointwise.make_plan.cache_clear()
    check(shaped(name), x, bias, grad, dim)
    check(shaped(name), x, None, grad, dim, bias_grad=False)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "rows"])
def test_wide_indices(layout: str, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "WIDE", 0)
    check(shaped("tanh"), *case(layout, F32))
    check(shaped("gelu"), *case(layout, F32))


@pytest.mark.parametrize("tiles", ["one", "many"])
def test_sums_over_many_parts(tiles: str, request: pytest.FixtureRequest) -> None:
    if tiles == "many":
        request.getfixturevalue("tiny")
    spec = ActSpec("square")
    for shape, dim in [((30, 3), 1), ((6, 3, 7), 1), ((3, 40), 0), ((80,), 0), ((2, 1, 40), 1)]:
        x, grad = draw(*shape, dtype=F32), draw(*shape, dtype=F32, seed=1)
        check(spec, x, None, grad, dim)
        args = (grad, x, None, dim, spec.kernel_args, False, True)
        first, second = pointwise.act_grad(*args), pointwise.act_grad(*args)
        assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
def test_bias_of_another_dtype_or_stride(dtype: torch.dtype) -> None:
    x, _, grad, dim = case("channels_last", dtype)
    check(shaped("swish"), x, draw(5, dtype=F32, seed=1), grad, dim)
    check(shaped("swish"), x, draw(10, dtype=dtype, seed=1)[::2], grad, dim)


@pytest.mark.parametrize("save_output", [False, True])
def test_bfloat16_is_read_right(save_output: bool) -> None:
    # Results are float32, because Triton's interpreter does not round to bfloat16 properly.
    spec = shaped("tanh")
    x, bias, grad, dim = case("channels_last", BF16)
    saved = reference.bias_act(x, bias, spec, dim) if save_output else x
    dx, sums = pointwise.act_grad(
        grad.float(), saved, bias, dim, spec.kernel_args, save_output, True
    )
    truth = true_grad(spec, x, bias, saved, grad, dim, save_output)
    assert_as_good_as(dx, truth.float(), truth)
    assert_as_good_as(
        sums, reference.channel_sum(truth, dim).float(), reference.channel_sum(truth, dim)
    )


def test_double_constants_keep_every_bit() -> None:
    third = 1 / 3
    spec = ActSpec("leaky_relu", third, 0.1, -0.7, 1 / 7, third)
    x = draw(64)
    y = pointwise.bias_act(x, None, 0, spec.kernel_args)
    truth = reference.bias_act(x, None, spec)
    assert ((y - truth).abs() <= 1e-15 * truth.abs().clamp(min=0.1)).all()
    dx, _ = pointwise.act_grad(x, x, None, 0, spec.kernel_args, False, False)
    truth = true_grad(spec, x, None, x, x, 0, False)
    assert ((dx - truth).abs() <= 1e-15 * truth.abs()).all()


@pytest.mark.parametrize("gamma", [1.9, -1.9, 0.3])
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_dead_units_stay_dead_behind_a_shifted_output(
    name: str, dtype: torch.dtype, gamma: float
) -> None:
    x = torch.cat([-torch.logspace(-3, 3, 50), torch.zeros(1), torch.logspace(-1, 3, 50)]).to(dtype)
    for delta in (-0.35, 0.1, 0.7, 3.3):
        spec = ActSpec(name, 1.0, 0.0, delta, gamma)
        y = pointwise.bias_act(x, None, 0, spec.kernel_args)
        dx, _ = pointwise.act_grad(torch.ones_like(x), y, None, 0, spec.kernel_args, True, False)
        assert torch.equal(dx, gamma * (x > 0).to(dtype))


def test_expanded_and_transposed_gradients() -> None:
    for name in ("leaky_relu", "swish"):
        x, bias, _, dim = case("channels_last", F32)
        check(shaped(name), x, bias, torch.ones(()).expand(x.shape), dim)
        check(shaped(name), x, bias, draw(7, 3, 5, 2, dtype=F32).permute(3, 2, 1, 0), dim)


@pytest.mark.parametrize(("shape", "dim"), [((0, 5), 1), ((3, 0, 2), 0), ((2, 5, 0), 1), ((0,), 0)])
def test_no_elements(shape: tuple[int, ...], dim: int) -> None:
    spec = shaped("tanh")
    x, bias = torch.ones(shape), torch.ones(shape[dim])
    assert pointwise.bias_act(x, bias, dim, spec.kernel_args).shape == shape
    pointwise.bias_act_(x, bias, dim, spec.kernel_args)
    dx, sums = pointwise.act_grad(x, x, None, dim, spec.kernel_args, True, True)
    assert dx.shape == shape
    assert torch.equal(sums, torch.zeros(shape[dim]))


def test_scalar_tensor() -> None:
    spec = shaped("softplus")
    y = pointwise.bias_act(torch.tensor(0.3), None, 0, spec.kernel_args)
    torch.testing.assert_close(y, reference.shaped_act(torch.tensor(0.3), spec))
    dx, _ = pointwise.act_grad(y, y, None, 0, spec.kernel_args, True, False)
    torch.testing.assert_close(dx, reference.act_grad(y, y, None, spec, 0))


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "permuted", "one pixel"])
def test_in_place_is_the_same_bits(layout: str) -> None:
    spec = shaped("elu")
    x, bias, _, dim = case(layout, F16)
    y = pointwise.bias_act(x, bias, dim, spec.kernel_args)
    assert pointwise.bias_act_(x, bias, dim, spec.kernel_args) is None
    assert torch.equal(x, y)


@pytest.mark.parametrize("row", ROWS, **BY_NAME)
def test_nan_and_infinity_pass_through_the_kernels(row: Activation) -> None:
    spec = shaped(row.name)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    y = pointwise.bias_act(x, None, 0, spec.kernel_args)
    truth = reference.bias_act(x, None, spec)
    known = ~truth.isnan() | x.isnan()
    torch.testing.assert_close(y[known], truth[known], equal_nan=True)
    assert y[0].isnan()
    nan_grad = torch.full_like(x, float("nan"))
    dx, sums = pointwise.act_grad(nan_grad, x, None, 0, spec.kernel_args, False, True)
    assert dx.isnan().all()
    assert sums.isnan().all()


def test_errors_say_what_to_do() -> None:
    args = shaped("tanh").kernel_args
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"not dense.*use bias_act"):
        pointwise.bias_act_(x[:, 1:], None, 1, args)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\).*pass \(4,\)"):
        pointwise.bias_act(x, torch.zeros(3), 1, args)
    with pytest.raises(ValueError, match="must be the same"):
        pointwise.act_grad(x, x[:2], None, 1, args, True, True)


@triton.jit
def _row_kernel(z_ptr, out_ptr, spec, ACTIVATION: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    scale = tl.load(spec.input_scale + tl.arange(0, N))[None, :]
    shift, slope = tl.full((), spec.output_shift, tl.float32), tl.full((), 0.0, tl.float32)
    numbers = epilogue.Spec(slope, scale, slope, shift, scale)
    tl.store(out_ptr + at, epilogue.act(tl.load(z_ptr + at), numbers, ACTIVATION))


def test_constants_may_be_rows_of_numbers() -> None:
    z, alpha = draw(4, 8, dtype=F32), draw(8, dtype=F32, seed=1)
    out = torch.empty_like(z)
    spec = epilogue.Spec(0.0, alpha, 0.0, -0.35, 0.0)
    _row_kernel[(1,)](z, out, spec, ACTIVATION=ACTIVATIONS["tanh"].id, M=4, N=8)
    torch.testing.assert_close(out, alpha * ((alpha * z).tanh() - 0.35))
