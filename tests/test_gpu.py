"""Across modules: what runs on a GPU: kernels, engines, graphs, tuning, benchmarks, training.

Rehearsed on a pretended GPU (tests/kernels/pretend_gpu.py), in Triton's interpreter and with fewer
and smaller cases; not yet run on a real one, for no machine with one was at hand so far.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedshape import ActSpec, convert, diagnose, reference, timing, tuning
from fusedshape.bench import cases, plot, providers, records, runner, suites, text
from fusedshape.bench.providers import _undecided
from fusedshape.cli import main
from fusedshape.models import vanilla_convnet
from fusedshape.ops import ChainLayer, bias_act, conv_act, conv_chain, linear_act, shaped_act
from fusedshape.ops.choice import engines_for
from fusedshape.ops.engines import ATEN
from fusedshape.ops.layer import Before
from fusedshape.ops.problem import DIRECTIONS, Direction, problem_of
from fusedshape.spec import saves_output
from fusedshape.train import Data, TrainConfig
from fusedshape.train.loop import fit
from fusedshape.tuning import command, measuring
from fusedshape.tuning.contest import difference_of
from fusedshape.tuning.problems import operands, terms_of
from tests.support.backends import INTERPRET
from tests.support.layers import layer_of
from tests.support.specs import SPECS, shaped
from tests.support.tolerance import assert_as_good_as

pytestmark = [
    pytest.mark.gpu,
    # Inductor's advice; and where backward's thread is the first to multiply by torch.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]
#: What a pretended GPU cannot do: Inductor's kernels, and large tensors at an interpreter's pace.
real = pytest.mark.skipif(INTERPRET, reason="needs a GPU that is there")
# Triton's interpreter multiplies bfloat16 wrongly and cuts its digits off.
HALF = torch.float16 if INTERPRET else torch.bfloat16
DTYPES = [torch.float64, torch.float32, torch.float16, *(() if INTERPRET else (torch.bfloat16,))]
LEAKY = shaped("leaky_relu")
SWISH = shaped("swish")
LAYOUTS = {
    "channels_last": ((4, 64, 9, 7), torch.channels_last),
    "channels_last, odd": ((3, 5, 9, 7), torch.channels_last),
    "nchw": ((4, 64, 8, 8), torch.contiguous_format),
    "nchw, odd": ((3, 5, 7, 7), torch.contiguous_format),
}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64).to(dtype)


def step(x: Tensor, bias: Tensor, grad: Tensor, spec: ActSpec) -> list[Tensor]:
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = bias_act(x, bias, spec, backend="triton")
    return [y.detach(), *torch.autograd.grad(y, (x, bias), grad)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_bias_act_against_float64(spec: ActSpec, dtype: torch.dtype, layout: str) -> None:
    shape, memory = LAYOUTS[layout]
    x, grad = (draw(*shape, dtype=dtype, seed=i).to(memory_format=memory) for i in (0, 1))
    bias = draw(shape[1], dtype=dtype, seed=2)
    y, dx, dbias = step(x, bias, grad, spec)
    truth = reference.bias_act(x.double(), bias.double(), spec)
    assert_as_good_as(y, reference.bias_act(x, bias, spec), truth)
    from_output = saves_output(spec, dtype)
    saved = y if from_output else x
    wide = grad.double(), saved.double(), bias.double()
    truth_dx = reference.act_grad(*wide, spec, 1, from_output)
    assert_as_good_as(dx, reference.act_grad(grad, saved, bias, spec, 1), truth_dx)
    total = reference.channel_sum(truth_dx, 1)
    slack = truth_dx.abs().sum((0, 2, 3)) * torch.finfo(dtype).eps
    assert ((dbias.double() - total).abs() <= 2 * slack + 1e-5 * total.abs()).all()
    assert y.stride() == dx.stride() == x.stride()
    for again, first in zip(step(x, bias, grad, spec), (y, dx, dbias), strict=True):
        assert torch.equal(again, first), "the same bits in every run"


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=real)])
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
def test_conv_and_linear_against_float64(spec: ActSpec, compiled: bool) -> None:
    x = draw(2, 8, 9, 9, dtype=torch.float64).requires_grad_()
    w, v = draw(16, 8, 3, 3, dtype=torch.float64, seed=1), draw(5, 16, dtype=torch.float64, seed=2)
    w, v, b = (t.requires_grad_() for t in (w, v, draw(16, dtype=torch.float64, seed=3)))

    def net(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return linear_act(conv_act(x, w, b, spec, padding=1).mean((2, 3)), v, None, spec)

    def plain(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        y = reference.conv_act(x, w, b, spec, [1, 1], [1, 1], [1, 1], 1)
        return reference.linear_act(y.mean((2, 3)), v, None, spec)

    inputs = (x, w, b, v)
    grad = draw(2, 5, dtype=torch.float64, seed=4)
    ours = torch.compile(net, fullgraph=True) if compiled else net
    got = torch.autograd.grad(ours(*inputs), inputs, grad)
    for g, want in zip(got, torch.autograd.grad(plain(*inputs), inputs, grad), strict=True):
        torch.testing.assert_close(g, want, rtol=1e-10, atol=1e-11)


def test_cuda_graph() -> None:
    x, bias, grad = draw(8, 32, 5, 5), draw(32, seed=1), draw(8, 32, 5, 5, seed=2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(x, bias, grad, LEAKY)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, bias, grad, LEAKY)
    x.copy_(draw(8, 32, 5, 5, seed=3))
    graph.replay()
    for got, want in zip(captured, step(x, bias, grad, LEAKY), strict=True):
        assert torch.equal(got, want)


@real
def test_more_elements_than_32_bits_count() -> None:
    n = 2**31 + 4096
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2.0
    y = shaped_act(x, ActSpec("leaky_relu", output_scale=2.0, negative_slope=0.5))
    assert y[-1].item() == 4
    assert y.count_nonzero().item() == 1


def test_non_finite_numbers() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e30], device="cuda")
    for name in ("relu", "leaky_relu", "tanh", "softplus", "selu"):
        got = shaped_act(x, shaped(name))
        want = reference.shaped_act(x.double(), shaped(name)).float()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


CHAIN = [((32, 16, 3, 3), 1, 1), ((64, 32, 1, 1), 1, 0), ((16, 64, 3, 3), 2, 1)]

# Without kinks, beside which rounding would decide on the branch.
SPECS_OF_CHAIN = (shaped("tanh"), SWISH, shaped("tanh"))
IMAGES = (1, 16, 5, 4) if INTERPRET else (4, 16, 15, 14)


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Multiply float32 as such ("ieee"), or rounded ("tf32")."""
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = precision
    yield
    for switch, old in zip(switches, before, strict=True):
        switch.fp32_precision = old


@pytest.fixture
def ieee() -> Iterator[None]:
    with multiplying("ieee"):
        yield


def chain(engine: str, x: Tensor, *params: Tensor) -> Tensor:
    layers = [
        ChainLayer(*params[2 * i : 2 * i + 2], spec, stride, padding, engine=engine)
        for i, (spec, (_, stride, padding)) in enumerate(zip(SPECS_OF_CHAIN, CHAIN, strict=True))
    ]
    return conv_chain(x, layers)


def chain_step(engine: str, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = chain(engine, *leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def chain_tensors(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    tensors = [draw(*IMAGES, dtype=dtype)]
    for i, (shape, _, _) in enumerate(CHAIN):
        tensors += [draw(*shape, dtype=dtype, seed=2 * i + 1) / (shape[1] * shape[2] ** 2) ** 0.5]
        tensors += [draw(shape[0], dtype=dtype, seed=2 * i + 2)]
    tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    images, _, height, width = IMAGES
    return tensors, draw(images, 16, -(-height // 2), -(-width // 2), dtype=dtype, seed=9)


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_chain_of_triton_convolutions(dtype: torch.dtype) -> None:
    tensors, grad = chain_tensors(dtype)
    got = chain_step("triton", tensors, grad)
    want = chain_step("aten", [t.double() for t in tensors], grad.double())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert (g.double() - w).abs().max() <= 32 * torch.finfo(dtype).eps * w.abs().max()
    for again, first in zip(chain_step("triton", tensors, grad), got, strict=True):
        assert torch.equal(again, first), "the same bits in every run"


@real
@pytest.mark.parametrize("engine", ["auto", "triton"])
def test_compiled_chain(engine: str) -> None:
    tensors, grad = chain_tensors(HALF)
    compiled = torch.compile(lambda *a: chain(engine, *a), fullgraph=True)
    leaves = [t.detach().requires_grad_() for t in tensors]
    got = torch.autograd.grad(compiled(*leaves), leaves, grad)
    for g, w in zip(got, chain_step(engine, tensors, grad)[1:], strict=True):
        torch.testing.assert_close(g, w, rtol=0.02, atol=0.02 * w.abs().max().item())


def test_chain_in_a_cuda_graph() -> None:
    tensors, grad = chain_tensors(HALF)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            chain_step("triton", tensors, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain_step("triton", tensors, grad)
    tensors[0].copy_(draw(*IMAGES, dtype=HALF, seed=20))
    graph.replay()
    for got, want in zip(captured, chain_step("triton", tensors, grad), strict=True):
        assert torch.equal(got, want)


# (input, weight, stride, padding, dilation): one of each kind that the Triton engine serves.
CONVOLUTIONS = {
    "3x3": ((4, 64, 28, 28), (128, 64, 3, 3), 1, 1, 1),
    "3x3 large": ((8, 256, 28, 28), (256, 256, 3, 3), 1, 1, 1),
    "3x3 strided": ((4, 64, 29, 28), (64, 64, 3, 3), 2, 1, 1),
    "1x1": ((4, 256, 28, 28), (64, 256, 1, 1), 1, 0, 1),
    "1x1 strided": ((4, 64, 28, 28), (128, 64, 1, 1), 2, 0, 1),
    "stem": ((4, 3, 64, 64), (64, 3, 7, 7), 2, 3, 1),
    "dilated": ((2, 32, 20, 20), (32, 32, 3, 3), 1, 2, 2),
    "odd": ((3, 5, 13, 11), (7, 5, 3, 2), 1, 1, 1),
    "7x7 maps": ((2, 512, 7, 7), (512, 512, 3, 3), 1, 1, 1),
}
if INTERPRET:
    CONVOLUTIONS = {
        name: ((2, c, 9, 8), (min(k, 24), *kernel), *how)
        for name, ((_, c, *_), (k, *kernel), *how) in CONVOLUTIONS.items()
        if c <= 64
    }


def layer_step(
    op: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_layer(
    op: Callable[[str], Callable[..., Tensor]], operands: Sequence[Tensor], terms: int
) -> None:
    """Hold the Triton engine to what torch's errs by; float32 to a sum of so many `terms`."""
    got = layer_step(op("triton"), *operands)
    truth = layer_step(op("aten"), *(t.double() for t in operands))
    plain = layer_step(op("aten"), *operands)
    for g, p, t in zip(got, plain, truth, strict=True):
        if g.dtype == torch.float32:
            assert difference_of([g], [t.float()], terms, tf32=False) is None
        else:
            assert_as_good_as(g, p, t)


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_triton_convolutions(case: str, dtype: torch.dtype, spec: ActSpec) -> None:
    size, kernel, stride, padding, dilation = CONVOLUTIONS[case]
    x = draw(*size, dtype=dtype).to(memory_format=torch.channels_last)
    weight = draw(*kernel, dtype=dtype, seed=1) / (kernel[1] * kernel[2] * kernel[3]) ** 0.5
    bias = draw(kernel[0], dtype=dtype, seed=2)
    how = {"stride": stride, "padding": padding, "dilation": dilation}

    def op(engine: str) -> Callable[..., Tensor]:
        return lambda x, w, b: conv_act(x, w, b, spec, engine=engine, **how)

    z = F.conv2d(x.double(), weight.double(), bias.double(), **how).to(dtype)
    grad = draw(*z.shape, dtype=dtype, seed=3).to(memory_format=torch.channels_last)
    # Beside a kink rounding decides on the branch, and either is right.
    grad = grad.masked_fill(_undecided(z, spec), 0)
    operands = (x, weight, bias, grad)
    assert_layer(op, operands, terms=max(z.shape[0] * z[0, 0].numel(), weight.numel()))


# Rows, inputs, outputs; the last sums over many rows, in parts.
PRODUCTS = [(77, 130, 33)] if INTERPRET else [(77, 130, 33), (1024, 512, 256), (40_000, 64, 96)]


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
@pytest.mark.parametrize("sizes", PRODUCTS, ids=str)
def test_triton_products(sizes: tuple[int, int, int], spec: ActSpec) -> None:
    rows, inner, outer = sizes
    dtype = HALF
    x, weight = draw(rows, inner, dtype=dtype), draw(outer, inner, dtype=dtype, seed=1) / inner**0.5
    bias = draw(outer, dtype=dtype, seed=2)
    z = F.linear(x.double(), weight.double(), bias.double()).to(dtype)
    grad = draw(rows, outer, dtype=dtype, seed=3).masked_fill(_undecided(z, spec), 0)
    operands = x, weight, bias, grad

    def op(engine: str) -> Callable[..., Tensor]:
        return lambda x, w, b: linear_act(x, w, b, spec, engine=engine)

    assert_layer(op, operands, terms=max(z.shape[0] * z[0, 0].numel(), weight.numel()))


def test_tuning_measures_and_stays_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path))
    if INTERPRET:
        monkeypatch.setattr(measuring, "clock_for", lambda device: Still())
    tensors, grad = chain_tensors(HALF)
    with tuning.mode("full"):
        got = chain_step("auto", tensors, grad)
    assert list(tmp_path.rglob("*.json")), "what was measured is kept"
    want = chain_step("aten", [t.double() for t in tensors], grad.double())
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= 32 * torch.finfo(g.dtype).eps * w.abs().max()


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("kind", ["conv", "1x1", "linear"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_every_activation_at_the_end_of_a_kernel(spec: ActSpec, kind: str) -> None:
    shape = {"conv": (16, 24, 3, 3), "1x1": (16, 24, 1, 1), "linear": (16, 24)}[kind]
    padding = [int(kind == "conv")] * 2
    geometry = None if kind == "linear" else ([1, 1], padding, [1, 1], False, [0, 0], 1)
    z = draw(40, 24, dtype=HALF) if kind == "linear" else draw(2, 24, 5, 4, dtype=HALF)
    if kind != "linear":
        z = z.to(memory_format=torch.channels_last)
    problem = problem_of(z, layer_of(torch.empty(shape, dtype=HALF, device="cuda"), spec, geometry))
    given = operands(problem, ATEN, z.device)
    kernels, bias = given.before.kernels, draw(24, dtype=HALF, seed=1)
    saved = kernels.bias_act(z, bias, spec, 1) if saves_output(spec, HALF) else z
    # Backward starts from what was saved, so that all are on the same side of a kink.
    own = given.layer._replace(spec=spec)
    given = given._replace(layer=own, before=Before(saved, bias, spec, kernels, True))
    triton = engines_for("triton", given.x, own).fprop
    for direction in ("fprop", "dgrad_act"):
        got, want = (given.call(engine, direction) for engine in (triton, ATEN))
        assert difference_of(got, want, terms_of(direction, problem), tf32=False) is None


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_residuals(kernel: int, dtype: torch.dtype, spec: ActSpec) -> None:
    last = torch.channels_last
    x, r = (draw(2, 24, 7, 6, dtype=dtype, seed=i).to(memory_format=last) for i in (0, 1))
    weight, bias = draw(24, 24, kernel, kernel, dtype=dtype, seed=2) / 15, draw(24, seed=3)
    z = F.conv2d(x.double(), weight.double(), bias.double(), padding=kernel // 2)
    near = _undecided((0.8 * z + 0.6 * r.double()).to(dtype), spec)
    grad = draw(2, 24, 7, 6, dtype=dtype, seed=4).to(memory_format=last).masked_fill(near, 0)

    def step_in(engine: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias, r)]
        how: dict[str, Any] = {"padding": kernel // 2, "residual_weight": 0.6, "engine": engine}
        y = conv_act(*leaves[:3], spec, residual=leaves[3], **how)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]

    for got, want in zip(step_in("triton", dtype), step_in("aten", torch.float64), strict=True):
        error = (got.double() - want).square().mean().sqrt()
        assert error <= 16 * torch.finfo(dtype).eps * want.square().mean().sqrt()


class Still:
    """A clock that calls nothing, so that no time is measured."""

    least = 0.0

    def seconds(self, candidate: timing.Candidate, repeats: int) -> float:
        return 1.0


# x, weight, stride, padding, arithmetic.
CONFIGURED: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "conv": ((4, 72, 13, 12), (80, 72, 3, 3), 1, 1),
    "conv strided": ((4, 64, 13, 12), (64, 64, 3, 3), 2, 1),
    "stem": ((2, 3, 19, 18), (40, 3, 7, 7), 2, 3),
    "1x1": ((4, 72, 13, 12), (80, 72, 1, 1), 1, 0),
    "linear": ((1000, 264), (200, 264), 1, 0),
    "linear, odd": ((130, 77), (33, 77), 1, 0),
}
if INTERPRET:
    CONFIGURED = {
        name: ((1, x[1], 5, 4) if len(x) == 4 else (20, x[1] // 4), (16, w[1], *w[2:]), *how)
        for name, (x, w, *how) in CONFIGURED.items()
        if name in ("conv strided", "1x1")
    }


@pytest.mark.parametrize("arithmetic", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CONFIGURED)
def test_every_configuration(case: str, direction: Direction, arithmetic: str) -> None:
    size, kernel, stride, padding = CONFIGURED[case]
    dtype = HALF if arithmetic == "half" else torch.float32
    x, weight = (torch.empty(shape, dtype=dtype, device="cuda") for shape in (size, kernel))
    geometry = None
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
        geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    for spec in (LEAKY, SWISH):
        problem = problem_of(x, layer_of(weight, spec, geometry))
        with multiplying("tf32" if arithmetic == "tf32" else "ieee"):
            result = tuning.measure(direction, problem, x.device, Still())
        # Forget what was pinned.
        tuning.mode(tuning.current_mode())
        failed = {name: why for name, why in result.failed.items() if "is not there" not in why}
        assert (result.wrong, failed) == ({}, {})
        assert result.record is not None


def test_autocast() -> None:
    x = draw(2, 16, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = draw(24, 16, 3, 3, seed=1).requires_grad_(), draw(24, seed=2).requires_grad_()
    with torch.autocast("cuda", HALF):
        for engine in ("aten", "triton"):
            y = conv_act(x, weight, bias, LEAKY, padding=1, engine=engine)
            z = linear_act(y.mean((2, 3)), draw(8, 24, seed=3), None, SWISH, engine=engine)
            assert y.dtype == z.dtype == HALF
    grads = torch.autograd.grad(z.float().sum(), (x, weight, bias))
    assert {g.dtype for g in grads} == {torch.float32}


def test_a_stream_of_ones_own() -> None:
    tensors, grad = chain_tensors(HALF)
    want = chain_step("triton", tensors, grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The numbers are overwritten when all before has run, and not before.
        busy = torch.ones(1 if INTERPRET else 1 << 28, device="cuda")
        for _ in range(20):
            busy.mul_(1.0001)
        late = [torch.zeros_like(t).copy_(t) for t in tensors]
        got = chain_step("triton", late, grad)
    stream.synchronize()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors, grad = chain_tensors(HALF)
    want = chain_step("triton", tensors, grad)
    other = torch.device("cuda", torch.cuda.device_count() - 1)
    got = chain_step("triton", [t.to(other) for t in tensors], grad.to(other))
    x = draw(4, 16, seed=5)
    assert torch.cuda.current_device() == 0
    assert shaped_act(x.to(other), LEAKY).device == other
    for g, w in zip(got, want, strict=True):
        assert g.device == other
        limit = 32 * torch.finfo(HALF).eps * w.abs().max().item()
        assert (g.double().cpu() - w.double().cpu()).abs().max() <= limit


@real
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_layers_of_more_elements_than_32_bits_count(kind: str) -> None:
    n = 64
    weight = draw(n, n, *((3, 3) if kind == "conv" else ()), dtype=HALF) / 24
    if kind == "conv":
        x = torch.randn(129, 513, 512, n, dtype=HALF, device="cuda").movedim(-1, 1)
    else:
        x = torch.randn(2**25 + 64, n, dtype=HALF, device="cuda")
    assert x.numel() > 2**31

    def op(x: Tensor, engine: str = "triton") -> Tensor:
        if kind == "conv":
            return conv_act(x, weight, None, LEAKY, padding=1, engine=engine)
        return linear_act(x, weight, None, LEAKY, engine=engine)

    leaf = x.detach().requires_grad_()
    y = op(leaf)
    (dx,) = torch.autograd.grad(y, leaf, y.detach())
    for part in (slice(0, 1), slice(-1, None)):
        small = x[part].detach().requires_grad_()
        want = op(small, "aten")
        (dwant,) = torch.autograd.grad(want, small, want.detach())
        for got, truth in ((y[part], want), (dx[part], dwant)):
            assert difference_of([got], [truth], 9 * n, tf32=False) is None


def few_cases(*suites: str) -> Iterator[cases.Case]:
    """One of each kind, of the smallest size, and one that no GPU can hold."""
    dtype = "float16" if INTERPRET else "bfloat16"
    plain = cases.Family(suites, dtype, "forward")
    layer = replace(plain, compiled=tuple(providers.COMPILED))
    yield cases._linear(layer, (16, 16, 16))
    yield cases._pointwise(replace(plain, activation="swish", mode="backward"), (2, 8, 6, 6))
    if not INTERPRET:
        convnet = partial(vanilla_convnet, 20, width=8)
        yield cases._conv(replace(layer, mode="step"), (16, 16, 3, 1, 6), 2)
        other = replace(layer, dtype="float32", mode="backward", activation="tanh")
        yield cases._conv(other, (16, 16, 3, 1, 6), 2)
        yield cases._chain(replace(layer, mode="step"), 3, (2, 16, 6))
        yield cases._net(replace(plain, mode="step"), "convnet", convnet, (4, 2, 8, 8))
    yield cases._pointwise(plain, (1 << 20, 1 << 20))


def test_garbage_does_not_lower_the_peak_of_a_benchmark() -> None:
    held: list[object] = [draw(64, 64)]
    held.append(held)  # a cycle, which lives until the collector finds it
    del held

    def run(_: object) -> Tensor:
        gc.collect()
        return draw(8, 8)

    assert timing.peak_bytes(timing.Candidate(run), torch.device("cuda")) > 0


def test_benchmarks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tuple(few_cases("gpu-quick"))
    monkeypatch.setattr(suites, "CASES", own)
    quick = suites.SUITES["gpu-quick"]
    compiled = () if INTERPRET else quick.compiled
    few = replace(quick, budget=0.0, least=2, most=2, compiled=compiled)
    monkeypatch.setitem(suites.SUITES, "gpu-quick", few)
    if INTERPRET:
        sizes = {"copied": 1 << 20, "product": 64}
        monkeypatch.setattr(runner, "ceilings", partial(timing.ceilings, **sizes))
    out = tmp_path / "bench.json"
    assert main(["bench", "--suite", "gpu-quick", "--out", str(out)]) == 0, capsys.readouterr().err
    record = records.load(out)
    assert record["finished"]
    assert record["accelerator"]["capability"]
    assert all(rate > 0 for rate in record["ceilings"].values())
    *rows, last = record["rows"]
    assert last["status"] == "out of memory"
    for row in rows:
        assert row["status"] == "ok", row.get("why")
        for name, candidate in row["candidates"].items():
            assert candidate["status"] == "ok", (row["case"], name, candidate.get("why"))
            assert min(candidate["ms"]) > 0
            assert candidate["peak_bytes"] > 0
            if name != "compiled":
                assert min(candidate["graph_ms"]) > 0, candidate.get("graph_why")
    assert "out of memory" in text.report(record)
    assert plot.plot(record, tmp_path / "plots")


def test_tune_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small_net.py").write_text(
        "from fusedshape import convert\n"
        "from fusedshape.models import vanilla_convnet\n"
        "def net():\n"
        "    model = vanilla_convnet(4, width=16)\n"
        "    convert(model, method='TAT', activation='leaky_relu', clamp=True)\n"
        "    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    if INTERPRET:
        monkeypatch.setattr(command, "clock_for", lambda device: Still())
    with tuning.mode("cached"):
        how = ["small_net:net", "--input", "2,2,8,8", "--dtype", "fp16", "--json"]
        assert main(["tune", *how]) == 0, capsys.readouterr().err
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert all(row["measured"] and not row["wrong"] and not row["failed"] for row in rows)
        assert list((tmp_path / "cache").rglob("*.json"))
        assert main(["tune", *how, "--dry-run"]) == 0
        again = json.loads(capsys.readouterr().out)["rows"]
    assert [row["record"] for row in again] == [row["record"] for row in rows]
    assert main(["info"]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out


def test_diagnose() -> None:
    model = vanilla_convnet(20, width=16)
    convert(model, method="TAT", activation="leaky_relu")
    x = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    want = diagnose(model.to(memory_format=torch.channels_last), x)
    state = torch.cuda.get_rng_state()
    got = diagnose(model.cuda(), x)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert [row.path for row in got.layers] == [row.path for row in want.layers]
    for ours, theirs in zip(got.layers, want.layers, strict=True):
        assert ours.q_measured == pytest.approx(theirs.q_measured, rel=0.01, nan_ok=True)


def blobs() -> Data:
    """Two classes that a linear map parts."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 2
    x = torch.randn(64, 1, 4, 4, generator=generator) + y.view(-1, 1, 1, 1)
    return Data(x, y, x[:32], y[:32], num_classes=2)


@pytest.mark.parametrize("amp", [None, "bfloat16"])
def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str | None) -> None:
    if amp and INTERPRET:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    config = TrainConfig(
        *(), data=f"{__name__}:blobs", depth=6, width=8, epochs=2, batch_size=16, lr=3e-3, eta=0.5,
        device="cuda", channels_last=True, amp=amp,
    )  # fmt: skip
    config.save(tmp_path / "c.json")
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "c.json"), "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "done"
    first, last = (epoch["train_loss"] for epoch in result["epochs"])
    assert last < first

    def stop(result: Any) -> None:
        raise KeyboardInterrupt

    checkpoint = tmp_path / "stopped.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(config, checkpoint=checkpoint, on_epoch=stop)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.cuda.manual_seed_all(7)
        states = torch.cuda.get_rng_state_all()
        resumed = fit(config, checkpoint=checkpoint)
        assert all(map(torch.equal, torch.cuda.get_rng_state_all(), states))
    losses = [epoch["train_loss"] for epoch in resumed["epochs"]]
    assert losses == pytest.approx([first, last], rel=1e-2)
