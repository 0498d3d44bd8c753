"""The convolution kernels in Triton's interpreter (TRITON_INTERPRET=1), against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedshape import ActSpec, reference
from fusedshape.kernels import conv, gemm, host, images
from fusedshape.kernels.conv import Config
from fusedshape.ops import conv_act, linear_act
from fusedshape.spec import saves_output
from tests.support.interpreter import ieee_products, poisoned_memory
from tests.support.operands import draw as randn
from tests.support.specs import SPECS, shaped
from tests.support.tolerance import assert_as_good_as

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Triton 3.6's interpreter, where the bound of a loop is not known beforehand.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.skipif(not host.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
]
F32, F64, F16 = torch.float32, torch.float64, torch.float16
IDENTITY = ActSpec("leaky_relu", negative_slope=1.0)
NHWC = torch.channels_last


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and multiply float32 as such."""
    with ieee_products(torch.backends.cudnn.conv), poisoned_memory():
        yield


def draw(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    t = randn(*shape, dtype=dtype, seed=seed)
    return t.contiguous(memory_format=NHWC) if t.ndim == 4 else t


@dataclass(frozen=True)
class Case:
    x: tuple[int, ...]
    out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.dilation)

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.out, self.x[1], *self.kernel)


CASES = {
    "3x3": Case((2, 8, 5, 6), 16, (3, 3), padding=(1, 1)),
    "odd channels": Case((1, 5, 6, 7), 3, (3, 3), padding=(1, 1)),
    "several blocks": Case((3, 67, 4, 3), 37, (2, 1), padding=(1, 1)),
    "no padding": Case((2, 4, 5, 5), 4, (3, 2)),
    "stride 2": Case((2, 20, 8, 7), 9, (3, 3), (2, 2), (1, 1)),
    "stride 3": Case((1, 6, 11, 10), 5, (3, 3), (3, 3), (1, 1)),
    "stride beyond kernel": Case((1, 20, 10, 9), 5, (2, 1), (3, 4), (1, 0)),
    "1x1": Case((2, 20, 4, 5), 18, (1, 1)),
    "1x1 stride 2": Case((2, 20, 5, 6), 18, (1, 1), (2, 2)),
    "1x1 padded": Case((1, 3, 4, 4), 5, (1, 1), (1, 1), (2, 1)),
    "stem": Case((1, 3, 11, 13), 8, (7, 7), (2, 2), (3, 3)),
    "32 taps": Case((1, 20, 6, 9), 5, (4, 8), padding=(2, 3)),
    "42 taps": Case((1, 17, 8, 9), 5, (7, 6), (2, 1), (3, 2)),
    "whole steps": Case((5, 20, 8, 8), 6, (3, 3), padding=(1, 1)),
    "dilated": Case((1, 6, 9, 9), 4, (3, 3), (1, 1), (2, 2), (2, 2)),
    "dilated, stride 2": Case((1, 20, 9, 10), 4, (3, 3), (2, 2), (2, 2), (2, 2)),
    "dilated 3, stride 2": Case((1, 17, 9, 8), 4, (3, 3), (2, 2), (3, 3), (3, 3)),
    "all sides differ": Case((2, 6, 11, 8), 4, (3, 5), (2, 1), (0, 4), (3, 1)),
    "kernel beyond input": Case((2, 4, 2, 3), 4, (5, 5), (1, 1), (2, 2)),
    "padding beyond kernel": Case((1, 4, 2, 3), 4, (2, 2), (1, 2), (3, 4)),
    "input left over": Case((1, 4, 10, 9), 4, (2, 2), (4, 4)),
    "height below stride": Case((3, 17, 1, 5), 4, (3, 3), (3, 2), (1, 1)),
    "one dimension": Case((2, 6, 11), 5, (3,), (2,), (1,), (2,)),
    "linear": Case((7, 20), 6, (), (), (), ()),
}


def truth_of(case: Case, x: Tensor, weight: Tensor, dz: Tensor | None = None) -> list[Tensor]:
    """Z in x's dtype, and the gradients of x and weight for dz."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    n = len(case.kernel)
    if n:
        z = torch.convolution(x, weight, None, *case.geometry, False, [0] * n, 1)
    else:
        z = torch.nn.functional.linear(x, weight)
    grads = () if dz is None else torch.autograd.grad(z, (x, weight), dz)
    return [z.detach(), *grads]


def layout(t: Tensor) -> Tensor:
    """T with channels innermost, whatever its dimensions."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def operands(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = layout(draw(*case.x, dtype=dtype))
    fan_in = math.prod(case.weight[1:])
    weight = (draw(*case.weight, seed=1) / fan_in**0.5).to(dtype)
    dz = layout(draw(*truth_of(case, x.double(), weight.double())[0].shape, dtype=dtype, seed=2))
    return x, weight, dz


def activated(z: Tensor, bias: Tensor | None, residual: Tensor | None, w: float, spec: ActSpec):
    if bias is not None:
        z = z + bias.to(z.dtype).reshape(-1, *[1] * (z.ndim - 2))
    if residual is not None:
        z = (1 - w * w) ** 0.5 * z + w * residual.to(z.dtype)
    return reference.shaped_act(z, spec)


def check(
    case: Case, dtype: torch.dtype, spec: ActSpec, config: Config | None, residual: bool = False
) -> None:
    """Every kernel on one case, against float64."""
    x, weight, dz = operands(case, dtype)
    plain = truth_of(case, x.float(), weight.float(), dz.float())
    truth = truth_of(case, x.double(), weight.double(), dz.double())
    args = {"config": config}

    z = conv.conv(x, weight, *case.geometry, **args)
    assert_as_good_as(z, plain[0].to(dtype), truth[0])
    assert images._is_packed(images.as_images(z))

    bias = draw(case.out, dtype=dtype, seed=3)
    other = layout(draw(*z.shape, dtype=dtype, seed=4)) if residual else None
    w = 0.6 if residual else 0.0
    y = conv.conv_act(x, weight, bias, other, w, *case.geometry, spec.kernel_args, **args)
    want = activated(truth[0], bias, other, w, spec)
    assert_as_good_as(y, activated(plain[0], bias, other, w, spec).to(dtype), want)
    assert y.stride() == z.stride()

    dw = conv.conv_wgrad(dz, x, case.weight, *case.geometry, **args)
    assert_as_good_as(dw, plain[2].to(dtype), truth[2])
    again = conv.conv_wgrad(dz, x, case.weight, *case.geometry, **args)
    assert torch.equal(dw, again)

    before = draw(x.shape[1], dtype=dtype, seed=5)
    for save_output in {False, spec.saves_output}:
        saved, slope = previous(x.shape, dtype, spec, before, save_output)
        dx, sums = conv.conv_dgrad(
            *(dz, weight, saved, None if save_output else before, case.x, *case.geometry),
            *(spec.kernel_args, save_output, True),
            **args,
        )
        assert_as_good_as(dx, (plain[1] * slope.float()).to(dtype), truth[1] * slope)
        check_sums(sums, truth[1] * slope)
        assert dx.stride() == x.stride()
    dx, sums = conv.conv_dgrad(
        *(dz, weight, None, None, case.x, *case.geometry, spec.kernel_args, True, False), **args
    )
    assert_as_good_as(dx, plain[1].to(dtype), truth[1])
    assert sums.shape == (0,)


def previous(
    shape: tuple[int, ...], dtype: torch.dtype, spec: ActSpec, bias: Tensor, save_output: bool
) -> tuple[Tensor, Tensor]:
    """What the layer before saved, away from its kinks, and φ̂′ there in float64."""
    z = draw(*shape, seed=6)
    z = torch.where((spec.input_scale * z + spec.input_shift).abs() < 0.1, z + 0.5, z)
    if save_output:
        saved = layout(reference.shaped_act(z, spec).to(dtype))
        bias = None
    else:
        saved = layout((z - bias.double().reshape(-1, *[1] * (z.ndim - 2))).to(dtype))
        bias = bias.double()
    one = torch.ones((), dtype=F64).expand(shape)
    return saved, reference.act_grad(one, saved.double(), bias, spec, 1, save_output)


def check_sums(sums: Tensor, dx: Tensor) -> None:
    others = [d for d in range(dx.ndim) if d != 1]
    assert sums.dtype == F32
    size = dx.abs().sum(others) + dx.abs().max()
    assert ((sums - dx.sum(others)).abs() <= 32 * torch.finfo(F32).eps * size).all()


#: Tiles so small that small problems have several.
SMALL = Config(32, 32, 128, 4, 2, group_m=2, splits=3)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_small_tiles(name: str, dtype: torch.dtype) -> None:
    spec = shaped("tanh" if len(name) % 2 else "leaky_relu")
    check(CASES[name], dtype, spec, SMALL, residual=len(name) % 3 == 0)


@pytest.mark.parametrize("name", ["odd channels", "stride 2", "1x1", "one dimension", "linear"])
def test_as_shipped(name: str) -> None:
    check(CASES[name], F16, shaped("softplus"), None)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_every_activation(spec: ActSpec) -> None:
    case = Case((1, 5, 4, 3), 6, (2, 2), padding=(1, 0))
    for dtype in (F32, F16):
        check(case, dtype, spec, SMALL, residual=True)


@pytest.mark.parametrize("name", ["odd channels", "stride 2", "42 taps", "whole steps", "linear"])
def test_wide_indices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "WIDE", 0)
    check(CASES[name], F32, shaped("leaky_relu"), SMALL)


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_every_shipped_tile(direction: conv.Direction) -> None:
    case = Case((1, 33, 5, 4), 34, (2, 1), padding=(1, 0))
    x, weight, dz = operands(case, F16)
    plain = truth_of(case, x.float(), weight.float(), dz.float())
    truth = truth_of(case, x.double(), weight.double(), dz.double())
    spec = IDENTITY.kernel_args
    for config in {*conv.CONFIGS[direction], *conv.FMA_CONFIGS}:
        if direction == "fprop":
            got, i = conv.conv(x, weight, *case.geometry, config=config), 0
        elif direction == "dgrad":
            args = (dz, weight, None, None, case.x, *case.geometry, spec, True, True)
            (got, sums), i = conv.conv_dgrad(*args, config=config), 1
            check_sums(sums, truth[1])
        else:
            config = replace(config, splits=2)
            got, i = conv.conv_wgrad(dz, x, case.weight, *case.geometry, config=config), 2
        assert_as_good_as(got, plain[i].half(), truth[i])


@pytest.mark.parametrize("name", ["stride 2", "1x1", "linear"])
def test_a_layer_is_planned_once(name: str) -> None:
    caches = images._checked, conv._plan, conv._wgrad_plan, gemm._problem, gemm._plan

    def planned() -> int:
        check(CASES[name], F16, shaped("leaky_relu"), None)
        return sum(cache.cache_info().misses for cache in caches)

    first = planned()
    assert first > 0
    assert planned() == first


def test_taps_far_beyond_the_image() -> None:
    """Their places in memory, which nobody reads, are 2³¹ and more elements away."""
    far, channels, width = 2**19 - 1, 64, 64
    case = Case((1, channels, 1, width), 4, (3, 3), (1, 1), (far, width), (far, width))
    middle = Case((1, channels, 1, width), 4, (1, 3), (1, 1), (0, width), (1, width))
    x, weight, dz = operands(middle, F16)
    z, dx, dw = truth_of(middle, x.double(), weight.double(), dz.double())
    plain = truth_of(middle, x.float(), weight.float(), dz.float())
    whole = torch.zeros(case.weight, dtype=F16)
    whole[:, :, 1:2] = weight
    assert_as_good_as(conv.conv(x, whole, *case.geometry), plain[0].half(), z)
    args = (dz, whole, None, None, case.x, *case.geometry, IDENTITY.kernel_args, True, False)
    assert_as_good_as(conv.conv_dgrad(*args)[0], plain[1].half(), dx)
    got = conv.conv_wgrad(dz, x, case.weight, *case.geometry)
    assert_as_good_as(got[:, :, 1:2], plain[2].half(), dw)


@pytest.mark.parametrize("name", ["3x3", "whole steps"])
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 100])
def test_splits(splits: int, name: str) -> None:
    case = CASES[name]
    x, weight, dz = operands(case, F16)
    truth = truth_of(case, x.double(), weight.double(), dz.double())
    plain = truth_of(case, x.float(), weight.float(), dz.float())
    config = replace(SMALL, splits=splits)
    dw = conv.conv_wgrad(dz, x, case.weight, *case.geometry, config=config)
    assert_as_good_as(dw, plain[2].half(), truth[2])


def test_tf32_is_taken_where_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.arithmetic(F32, linear=False) == "float32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert images.arithmetic(F32, linear=False) == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert images.arithmetic(F32, linear=True) == "float32", "products have a switch of their own"
    check(CASES["3x3"], F32, shaped("tanh"), SMALL)  # the interpreter multiplies in float32
    assert images.arithmetic(F16, linear=False) == "float16"


@pytest.mark.parametrize("name", ["3x3", "several blocks", "stem", "dilated, stride 2"])
@pytest.mark.parametrize("config", conv.CONFIGS["wgrad"][-2:], ids=str)
def test_wgrad_of_dealt_operands(name: str, config: Config) -> None:
    case = CASES[name]
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # the interpreter multiplies in float32
    assert gemm.deals(host.gpu_of(torch.device("cpu")), config.block_m, config.block_n)
    x, weight, dz = operands(case, F32)
    truth = truth_of(case, x.double(), weight.double(), dz.double())
    plain = truth_of(case, x, weight, dz)
    dw = conv.conv_wgrad(dz, x, case.weight, *case.geometry, config=replace(config, splits=2))
    assert_as_good_as(dw, plain[2], truth[2])


def test_unaligned_and_foreign_layouts() -> None:
    case = CASES["3x3"]
    spec = shaped("leaky_relu")
    x, weight, dz = operands(case, F16)
    whole = torch.empty(x.numel() + 1, dtype=F16)
    n, c, h, w = x.shape
    moved = whole[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)
    zero = torch.zeros(case.out, dtype=F16)
    args = (zero, None, 0.0, *case.geometry, spec.kernel_args)
    y = conv.conv_act(x, weight, *args)
    assert torch.equal(conv.conv_act(moved, weight, *args), y)
    assert torch.equal(conv.conv_act(x, weight.to(memory_format=NHWC), *args), y)
    strange = torch.zeros(2 * case.out, dtype=F16)[::2]
    assert torch.equal(conv.conv_act(x, weight, strange, *args[1:]), y)
    rest = (case.x, *case.geometry, spec.kernel_args, True, True)
    want = conv.conv_dgrad(dz, weight, x, None, *rest)
    for other in (dz.contiguous(), dz.transpose(2, 3).contiguous().transpose(2, 3)):
        got = conv.conv_dgrad(other, weight, x.contiguous(), None, *rest)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        dw = conv.conv_wgrad(other, x, case.weight, *case.geometry)
        assert torch.equal(dw, conv.conv_wgrad(dz, x, case.weight, *case.geometry))
    one = torch.ones((), dtype=F16).expand(dz.shape)
    got = conv.conv_dgrad(one, weight, x, None, *rest)
    assert torch.equal(got[0], conv.conv_dgrad(torch.ones_like(dz), weight, x, None, *rest)[0])


def test_bias_in_float32_beside_half() -> None:
    case = CASES["3x3"]
    x, weight, _ = operands(case, F16)
    bias = draw(case.out, dtype=F32, seed=3)
    y = conv.conv_act(
        x, weight, bias, None, 0.0, *case.geometry, shaped("tanh").kernel_args, config=SMALL
    )
    truth, plain = (truth_of(case, x.to(t), weight.to(t))[0] for t in (F64, F32))
    spec = shaped("tanh")
    assert_as_good_as(
        y, activated(plain, bias, None, 0, spec).half(), activated(truth, bias, None, 0, spec)
    )


@pytest.mark.parametrize("name", ["3x3", "1x1", "linear", "one dimension"])
def test_no_batch(name: str) -> None:
    case = replace(CASES[name], x=(0, *CASES[name].x[1:]))
    x, weight, dz = torch.empty(case.x), torch.ones(case.weight), None
    spec = shaped("tanh")
    x = layout(x)
    y = conv.conv_act(x, weight, None, None, 0.0, *case.geometry, spec.kernel_args)
    assert y.shape == truth_of(case, x, weight)[0].shape
    dz = torch.empty_like(y)
    dx, sums = conv.conv_dgrad(
        dz, weight, x, None, case.x, *case.geometry, spec.kernel_args, True, True
    )
    assert dx.shape == case.x
    assert torch.equal(sums, torch.zeros(case.x[1]))
    assert not conv.conv_wgrad(dz, x, case.weight, *case.geometry).any()


def test_nan_stays_where_the_gradient_is_zero() -> None:
    case = CASES["1x1 stride 2"]
    x, weight, dz = operands(case, F32)
    saved = x.clone()
    saved[0, 3, 1, 1] = torch.nan  # no tap meets an odd pixel
    dx, sums = conv.conv_dgrad(
        *(dz, weight, saved, None, case.x, *case.geometry),
        *(shaped("tanh").kernel_args, False, True),
    )
    assert dx.isnan().nonzero().tolist() == [[0, 3, 1, 1]]
    assert sums.isnan().nonzero().tolist() == [[3]]
    odd = torch.ones(dx.shape, dtype=torch.bool)
    odd[:, :, ::2, ::2] = False
    odd[0, 3, 1, 1] = False
    assert not dx[odd].any()


def test_gemm_is_called_for_1x1(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("linear_act", "linear_dgrad", "linear_wgrad"):
        function = getattr(gemm, name)

        def spy(*args, name=name, function=function, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(gemm, name, spy)
    for name in ("1x1", "linear"):
        check(CASES[name], F32, shaped("tanh"), None, residual=True)
        assert set(called) == {"linear_act", "linear_dgrad", "linear_wgrad"}
        called.clear()
    for name in ("1x1 stride 2", "1x1 padded"):
        check(CASES[name], F32, shaped("tanh"), None, residual=True)
    check(CASES["1x1"], F32, shaped("tanh"), SMALL)
    assert not called


def test_refusals() -> None:
    x, weight, dz = operands(CASES["3x3"], F32)
    geometry = CASES["3x3"].geometry
    spec = shaped("tanh").kernel_args
    with pytest.raises(ValueError, match=r"strides .* is not channels_last.*pass x\.to"):
        conv.conv(x.contiguous(), weight, *geometry)
    with pytest.raises(ValueError, match=r"same dtype.*float64 and torch\.float64"):
        conv.conv(x.double(), weight.double(), *geometry)
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        conv.conv(x.bfloat16(), weight.bfloat16(), *geometry)
    with pytest.raises(ValueError, match="2, 3 or 4 dimensions"):
        conv.conv(x[..., None], weight[..., None], *geometry)
    with pytest.raises(ValueError, match="wants an input of 4 dimensions and 7 channels"):
        conv.conv(x, draw(4, 7, 3, 3, dtype=F32), *geometry)
    with pytest.raises(ValueError, match=r"stride=\[0, 1\] must be 2 numbers of at least 1"):
        conv.conv(x, weight, [0, 1], *geometry[1:])
    with pytest.raises(ValueError, match=r"reaches beyond .*pad more"):
        conv.conv(x, weight, [1, 1], [0, 0], [5, 5])
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), it must be \(16,\)"):
        conv.conv_act(x, weight, torch.zeros(3), None, 0.0, *geometry, spec)
    with pytest.raises(ValueError, match=r"residual has shape"):
        conv.conv_act(x, weight, None, x, 0.5, *geometry, spec)
    with pytest.raises(ValueError, match="residual_weight must lie between"):
        conv.conv_act(x, weight, None, dz, 1.5, *geometry, spec)
    with pytest.raises(ValueError, match=r"saved has shape"):
        conv.conv_dgrad(dz, weight, dz, None, x.shape, *geometry, spec, True, True)
    with pytest.raises(ValueError, match=r"dz has shape"):
        conv.conv_wgrad(x, x, weight.shape, *geometry)
    assert "groups=2" in str(conv.why_not(x, weight, groups=2))
    assert "leave nothing to sum" in str(conv.why_not(x[:, :0], weight[:, :0]))
    assert conv.why_not(x, weight) is None


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize(
    "spec", [shaped("leaky_relu"), shaped("swish")], ids=lambda s: s.activation
)
@pytest.mark.parametrize("name", ["odd channels", "stride 2", "1x1", "one dimension", "linear"])
def test_residuals_of_the_public_ops(name: str, spec: ActSpec, dtype: torch.dtype) -> None:
    case, w = CASES[name], 0.6
    x, weight, other = operands(case, dtype)
    bias = draw(case.out, dtype=F32, seed=3)
    z = activated(truth_of(case, x.double(), weight.double())[0], bias, None, 0.0, IDENTITY)
    u = spec.input_scale * activated(z, None, other, w, IDENTITY) + spec.input_shift
    other = torch.where(u.abs() < 0.1, other + 0.3 / (w * spec.input_scale), other)  # off the kink
    geometry = dict(zip(("stride", "padding", "dilation"), case.geometry, strict=True))

    def f(*t: Tensor, engine: str = "triton") -> Tensor:
        how: dict[str, Any] = {"residual": t[3], "residual_weight": w, "engine": engine}
        if case.kernel:
            return conv_act(*t[:3], spec, **geometry, **how)
        return linear_act(*t[:3], spec, **how)

    def results(g: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = g(*leaves)
        grad = draw(*y.shape, seed=7).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    tensors = x, weight, bias, other
    got = results(f, *tensors)
    want = results(lambda *t: f(*t, engine="aten"), *[t.double() for t in tensors])
    with torch.no_grad():
        inside = f(*tensors)
        plain = f(x, weight, bias, other.contiguous())  # a layout of its own
    assert torch.equal(inside, plain)
    for g, t in zip([*got, inside], [*want, want[0]], strict=True):
        assert (g.double() - t).abs().max() <= 32 * torch.finfo(dtype).eps * t.abs().max()
    assert not saves_output(spec, dtype) or torch.equal(got[0], inside)
