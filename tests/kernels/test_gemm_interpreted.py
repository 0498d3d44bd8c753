"""The GEMM kernels in Triton's interpreter (TRITON_INTERPRET=1), against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusedshape import ActSpec, reference
from fusedshape.kernels import gemm, host, reduction
from fusedshape.kernels.gemm import CONFIGS, Config
from tests.support.interpreter import ieee_products, poisoned_memory
from tests.support.operands import draw
from tests.support.specs import SPECS, shaped
from tests.support.tolerance import assert_as_good_as

pytestmark = [
    # NumPy warns where the hardware silently returns inf or NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Triton 3.6's interpreter, where the bound of a loop is not known beforehand.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.skipif(not host.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
]
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
IDENTITY = ActSpec("leaky_relu", negative_slope=1.0)

# Tiles so small that every case has several, with tails.
SMALL = Config(32, 32, bytes_k=64, group_m=2, splits=3)
KINDS = {
    "pointers": SMALL,
    "pointers, persistent": replace(SMALL, persistent=True),
    "descriptors": replace(SMALL, tma=True),
    "descriptors, persistent": replace(SMALL, tma=True, persistent=True, splits=1),
}
# M, C, K
SHAPES = [(1, 1, 1), (5, 3, 7), (70, 40, 24), (33, 37, 17), (3, 100, 2), (64, 16, 32)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and multiply float32 as such."""
    with ieee_products(torch.backends.cuda.matmul), poisoned_memory():
        yield


def operands(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """X, weight, bias, residual and dz."""
    m, c, k = shape
    weight = (draw(k, c, seed=1) / c**0.5).to(dtype)
    bias, residual = draw(k, dtype=dtype, seed=2), draw(m, k, dtype=dtype, seed=3)
    return draw(m, c, dtype=dtype), weight, bias, residual, draw(m, k, dtype=dtype, seed=4)


def wide(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def check_forward(
    spec: ActSpec,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    config: Config | None,
    w: float = 0.6,
) -> None:
    def exact(dtype: torch.dtype) -> Tensor:
        x_, weight_, bias_, residual_ = wide(x, weight, bias, residual, dtype=dtype)
        z = x_ @ weight_.t()
        if bias_ is not None:
            z = z + bias_
        if residual_ is not None:
            z = (1 - w * w) ** 0.5 * z + w * residual_
        return reference.shaped_act(z, spec)

    args = (x, weight, bias, residual, w, spec.kernel_args)
    y = gemm.linear_act(*args, config=config)
    assert y.is_contiguous()
    assert_as_good_as(y, exact(F32).to(x.dtype), exact(F64))


def check_dgrad(
    spec: ActSpec,
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    bias: Tensor | None,
    save_output: bool,
    config: Config | None,
    bias_grad: bool = True,
) -> None:
    """One dgrad; `saved` must keep clear of the kink, where rounding decides the side."""

    def exact(dtype: torch.dtype) -> Tensor:
        dz_, weight_, saved_, bias_ = wide(dz, weight, saved, bias, dtype=dtype)
        dx = dz_ @ weight_
        if saved_ is None:
            return dx
        if not save_output:
            u = saved_ if bias_ is None else saved_ + bias_
            u = spec.input_scale * u + spec.input_shift
            d = spec.row.d1(u, spec.negative_slope)
        else:
            v = saved_ / spec.output_scale - spec.output_shift
            d = spec.row.d1_from_output(v, spec.negative_slope)
        return dx * d * (spec.input_scale * spec.output_scale)

    args = (dz, weight, saved, bias, spec.kernel_args, save_output, bias_grad)
    dx, sums = gemm.linear_dgrad(*args, config=config)
    truth, plain = exact(F64), exact(F32)
    assert dx.is_contiguous()
    assert_as_good_as(dx, plain.to(dx.dtype), truth)
    if bias_grad:
        assert sums.dtype == F32
        allowed = 2 * (plain.double() - truth).abs().sum(0)
        allowed += 8 * torch.finfo(F32).eps * truth.abs().sum(0)
        assert ((sums.double() - truth.sum(0)).abs() <= allowed).all()
    else:
        assert sums.shape == (0,)


def check_wgrad(dz: Tensor, x: Tensor, config: Config | None, tf32: bool | None = None) -> None:
    dw = gemm.linear_wgrad(dz, x, config=config, tf32=tf32)
    plain, truth = dz.float().t() @ x.float(), dz.double().t() @ x.double()
    assert dw.is_contiguous()
    assert_as_good_as(dw, plain.to(x.dtype), truth)


def away_from_kinks(spec: ActSpec, t: Tensor, output: bool) -> Tensor:
    """T moved so that no element is where rounding decides the side of a kink at u = 0."""
    at = spec.output_scale * spec.output_shift if output else -spec.input_shift / spec.input_scale
    return torch.where((t - at).abs() < 0.02, t + 0.04, t)


def check(spec: ActSpec, shape: tuple[int, int, int], dtype: torch.dtype, config: Config) -> None:
    """All three directions."""
    x, weight, bias, residual, dz = operands(shape, dtype)
    check_forward(spec, x, weight, bias, residual, config)
    check_forward(spec, x, weight, None, None, config)
    saved = away_from_kinks(spec, x, False)
    check_dgrad(spec, dz, weight, saved, None, False, config)
    if spec.saves_output:
        y = away_from_kinks(spec, reference.shaped_act(x, spec), True)
        check_dgrad(spec, dz, weight, y, None, True, config)
    check_wgrad(dz, x, config)


def runs(config: Config, shape: tuple[int, int, int], dtype: torch.dtype) -> bool:
    return not config.tma or all(n * dtype.itemsize % 16 == 0 for n in shape[1:])


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: str, dtype: torch.dtype) -> None:
    shapes = [shape for shape in SHAPES if runs(KINDS[kind], shape, dtype)]
    assert shapes
    for shape in shapes:
        check(shaped("leaky_relu"), shape, dtype, KINDS[kind])


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_every_activation(spec: ActSpec, dtype: torch.dtype) -> None:
    check(spec, (37, 24, 8), dtype, KINDS["descriptors, persistent"])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config: Config) -> None:
    dtype = F32 if config.bytes_k == 64 else F16
    m, n, k = config.block_m + 5, config.block_n + 8, 72
    x, weight, bias, residual, dz = operands((m, k, n), dtype)
    check_forward(shaped("tanh"), x, weight, bias, residual, config)
    weight = (draw(k, n, seed=5) / k**0.5).to(dtype)
    check_dgrad(shaped("tanh"), x, weight, residual, None, False, config)
    check_wgrad(dz, x, config)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("config", [c for c in CONFIGS if c.bytes_k == 128], ids=str)
def test_wgrad_of_dealt_operands(config: Config, splits: int) -> None:
    assert gemm.deals(host.gpu_of(torch.device("cpu")), config.block_m, config.block_n)
    m, n, k = config.block_m + 8, config.block_n + 4, 172
    x, dz = draw(k, n).float(), draw(k, m, seed=1).float()
    # The interpreter multiplies in float32. Fewer stages, for the largest to fit as well.
    check_wgrad(dz, x, replace(config, splits=splits, num_stages=1), tf32=True)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_what_is_taken_without_a_configuration(dtype: torch.dtype) -> None:
    x, weight, bias, residual, dz = operands((70, 136, 40), dtype)
    spec = shaped("softplus")
    check_forward(spec, x, weight, bias, residual, None)
    check_dgrad(spec, dz, weight, x, None, False, None)
    check_wgrad(dz, x, None)
    truth = x.double() @ weight.double().t()
    assert_as_good_as(gemm.linear(x, weight), truth.to(dtype), truth)


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.3, 1.0])
def test_residual_weights(w: float) -> None:
    x, weight, bias, residual, _ = operands((40, 24, 16), F16)
    for given in (bias, None):
        check_forward(shaped("swish"), x, weight, given, residual, SMALL, w)


@pytest.mark.parametrize("kind", ["pointers", "descriptors"])
def test_bias_of_the_layer_before(kind: str) -> None:
    x, weight, _, _, dz = operands((40, 24, 16), F16)
    spec = shaped("gelu")
    for bias in (draw(24, dtype=F16, seed=5), draw(48, dtype=F32, seed=5)[::2]):
        check_dgrad(spec, dz, weight, x, bias, False, KINDS[kind])
        check_dgrad(spec, dz, weight, x, bias, False, KINDS[kind], bias_grad=False)


@pytest.mark.parametrize("kind", KINDS)
def test_dgrad_without_an_activation(kind: str) -> None:
    _, weight, _, _, dz = operands((70, 40, 24), F16)
    for bias_grad in (True, False):
        check_dgrad(IDENTITY, dz, weight, None, None, True, KINDS[kind], bias_grad)


def framed(t: Tensor, rows: int, cols: int) -> Tensor:
    """T as a view into a larger matrix of NaN."""
    frame = t.new_full((t.shape[0] + 2 * rows, t.shape[1] + 2 * cols), float("nan"))
    view = frame[rows : rows + t.shape[0], cols : cols + t.shape[1]]
    return view.copy_(t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(37, 40, 24), (70, 24, 40)])
def test_strided_rows_among_nan(kind: str, shape: tuple[int, int, int]) -> None:
    spec = shaped("swish")
    cols = 8  # halves, to keep rows aligned for descriptors
    x, weight, bias, residual, dz = operands(shape, F16)
    x, weight, residual, dz = (framed(t, 1, cols) for t in (x, weight, residual, dz))
    check_forward(spec, x, weight, bias, residual, KINDS[kind])
    check_dgrad(spec, dz, weight, x, None, False, KINDS[kind])
    check_wgrad(dz, x, KINDS[kind])


@pytest.mark.parametrize("shape", [(37, 5, 9), (20, 40, 24)])
def test_unaligned_views(shape: tuple[int, int, int]) -> None:
    spec = shaped("swish")
    x, weight, bias, residual, dz = operands(shape, F32)
    x, weight, residual, dz = (framed(t, 1, 3) for t in (x, weight, residual, dz))
    check_forward(spec, x, weight, bias[::1], residual, None)
    check_dgrad(spec, dz, weight, x, None, False, None)
    check_wgrad(dz, x, None)
    with pytest.raises(ValueError, match=r"tma=True.*configs_for"):
        gemm.linear(x, weight, config=KINDS["descriptors"])


def test_skipped_and_expanded_rows() -> None:
    spec = shaped("swish")
    x, weight, bias, _, dz = operands((40, 24, 16), F32)
    check_forward(spec, x[::2], weight[::3], bias[::3], None, None)
    expanded = dz[:1].expand(40, -1)
    check_dgrad(spec, expanded, weight, x, None, False, None)
    check_wgrad(expanded, x, None)
    check_wgrad(dz[:1], x[:1], None)
    column = x[:, 3:4]
    check_forward(spec, column, weight[:, 3:4], bias, None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_wide_indices(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "WIDE", 0)
    check(shaped("tanh"), (70, 40, 24), F16, KINDS[kind])


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 1000])
def test_splits(splits: int) -> None:
    for m in (1, 31, 32, 33, 150):
        x, _, _, _, dz = operands((m, 24, 8), F16)
        check_wgrad(dz, x, replace(SMALL, splits=splits))


@pytest.mark.parametrize("number", [2, 3, 32, 33, 70])
@pytest.mark.parametrize("size", [(3, 5), (20, 36)])
def test_any_number_of_parts_is_added(number: int, size: tuple[int, int]) -> None:
    parts = draw(number, *size, dtype=F32)
    total, out = parts.double().sum(0), parts.new_empty(size)
    reduction.add_parts(parts, out)
    # Each sum of up to `number` terms is rounded as often, by half an ulp of what is summed.
    bound = number * 2.0**-24 * parts.double().abs().sum(0)
    assert ((out.double() - total).abs() <= bound).all()


def test_wgrad_is_summed_before_it_is_rounded() -> None:
    dz, x = torch.ones(500, 1, dtype=F16), torch.ones(500, 1, dtype=F16)
    x[0] = 2048  # from where on half precision has no odd numbers
    for splits in (1, 7):
        dw = gemm.linear_wgrad(dz, x, config=replace(SMALL, splits=splits))
        assert dw.item() == 2548  # 2547, rounded to even


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind: str) -> None:
    x, weight, _, _, dz = operands((70, 40, 24), F16)
    args = (dz, weight, x, None, shaped("swish").kernel_args, False, True)
    for first, second in zip(
        *(gemm.linear_dgrad(*args, config=KINDS[kind]) for _ in range(2)), strict=True
    ):
        assert torch.equal(first, second)
    first, second = (gemm.linear_wgrad(dz, x, config=KINDS[kind]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("config", [None, SMALL])
def test_no_elements(config: Config | None) -> None:
    args = shaped("tanh").kernel_args
    x, weight, bias, residual, dz = operands((0, 24, 16), F16)
    assert gemm.linear_act(x, weight, bias, residual, 0.5, args, config=config).shape == (0, 16)
    dx, sums = gemm.linear_dgrad(dz, weight, x, None, args, True, True, config=config)
    assert dx.shape == (0, 24)
    assert torch.equal(sums, torch.zeros(24))
    assert torch.equal(gemm.linear_wgrad(dz, x, config=config), torch.zeros(16, 24, dtype=F16))
    x, weight, bias, residual, dz = (t.half() for t in operands((20, 1, 16), F64))
    x, weight = x[:, :0], weight[:, :0]
    check_forward(shaped("tanh"), x, weight, bias, residual, config)
    assert gemm.linear_wgrad(dz, x, config=config).shape == (16, 0)
    dx, sums = gemm.linear_dgrad(dz, weight, x, None, args, True, True, config=config)
    assert (dx.shape, sums.shape) == ((20, 0), (0,))
    dx, sums = gemm.linear_dgrad(
        dz[:, :0], draw(0, 8, dtype=F16), None, None, args, True, True, config=config
    )
    assert torch.equal(dx, torch.zeros(20, 8, dtype=F16))
    assert torch.equal(sums, torch.zeros(8))
    assert gemm.linear(x, weight[:0], config=config).shape == (20, 0)


def test_nan_and_infinity_stay_in_their_rows() -> None:
    spec = shaped("leaky_relu")
    x, weight, bias, _, dz = operands((40, 24, 16), F16)
    x[7, 3], dz[9, 2], x[20, 0] = float("nan"), float("nan"), float("inf")
    y = gemm.linear_act(x, weight, bias, None, 0.0, spec.kernel_args, config=SMALL)
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[7]] = True
    assert torch.equal(y.isnan().all(1), bad)
    assert torch.equal(y.isnan().any(1), bad)
    assert y[20].isinf().all()
    clean = torch.ones_like(x)
    dx, sums = gemm.linear_dgrad(
        dz, weight, clean, None, spec.kernel_args, True, True, config=SMALL
    )
    assert torch.equal(dx.isnan().any(1), torch.arange(40) == 9)
    assert sums.isnan().all()


def test_bits_do_not_depend_on_how_operands_are_read() -> None:
    x, weight, bias, residual, _ = operands((70, 40, 24), F16)
    args = (x, weight, bias, residual, 0.5, shaped("tanh").kernel_args)
    first, *rest = (gemm.linear_act(*args, config=config) for config in KINDS.values())
    for y in rest:
        assert torch.equal(y, first)


def test_precision_of_float32_is_asked_for() -> None:
    assert gemm._precision(F32, None) == "ieee"
    assert gemm._precision(F32, True) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert gemm._precision(F32, None) == "tf32"
    assert gemm._precision(F32, False) == "ieee"
    assert gemm._precision(F16, True) == "ieee"


REFUSED = {
    "float64": (lambda x: x.double(), "float64 has no Triton GEMM"),
    "bfloat16": (lambda x: x.bfloat16(), "interpreter multiplies bfloat16 wrongly"),
    "three dimensions": (lambda x: x[None], r"shape \(1, 8, 16\) .* has 3 dimensions"),
    "transposed": (lambda x: x.t().contiguous().t(), "channels 8 apart, not 1; .*contiguous"),
    "every other": (lambda x: x[:, ::2], "channels 2 apart"),
    "meta": (lambda x: x.to("meta"), "operands are on cpu and meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_why_not(case: str) -> None:
    change, message = REFUSED[case]
    x, weight = draw(8, 16, dtype=F32), draw(8, 16, dtype=F32, seed=1)
    assert gemm.why_not(x, weight, None) is None
    bad = change(x)
    other = weight if bad.device.type == "meta" else change(weight)
    reason = gemm.why_not(bad, other)
    assert reason is not None
    with pytest.raises(ValueError, match=message):
        gemm.linear(bad, other)
    with pytest.raises(ValueError, match=message):
        gemm.linear_wgrad(bad, other)


def test_errors_say_what_to_do() -> None:
    args = shaped("tanh").kernel_args
    x, weight = draw(8, 16, dtype=F32), draw(4, 16, dtype=F32)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 16\), must have \(4, 15\)"):
        gemm.linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), must have \(4,\)"):
        gemm.linear_act(x, weight, torch.zeros(3), None, 0.0, args)
    with pytest.raises(ValueError, match=r"residual has shape \(4, 8\), must have \(8, 4\)"):
        gemm.linear_act(x, weight, None, torch.zeros(4, 8), 0.5, args)
    with pytest.raises(ValueError, match=r"must lie between -1 and 1, got 1\.5"):
        gemm.linear_act(x, weight, None, torch.zeros(8, 4), 1.5, args)
    with pytest.raises(ValueError, match=r"saved has shape \(8, 4\), must have \(8, 16\)"):
        gemm.linear_dgrad(torch.zeros(8, 4), weight, torch.zeros(8, 4), None, args, True, True)
    with pytest.raises(ValueError, match=r"share a dtype, got torch\.float32 and torch\.float16"):
        gemm.linear(x, weight.half())
    huge = Config(256, 256, num_stages=4)
    with pytest.raises(ValueError, match="cannot run"):
        gemm.linear(x, weight, config=huge)
