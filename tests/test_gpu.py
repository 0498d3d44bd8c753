"""The Triton kernels on an NVIDIA GPU. Not yet run: no machine with one was at hand so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import SPECS, assert_as_good_as, shaped
from torch import Tensor

from fusedshape import ActSpec, reference, tuning
from fusedshape.ops import ChainLayer, bias_act, conv_act, conv_chain, linear_act, shaped_act

pytestmark = pytest.mark.gpu
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
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
    saved = y if spec.saves_output else x
    truth_dx = reference.act_grad(grad.double(), saved.double(), bias.double(), spec, 1)
    assert_as_good_as(dx, reference.act_grad(grad, saved, bias, spec, 1), truth_dx)
    total = reference.channel_sum(truth_dx, 1)
    slack = truth_dx.abs().sum((0, 2, 3)) * torch.finfo(dtype).eps
    assert ((dbias.double() - total).abs() <= 2 * slack + 1e-5 * total.abs()).all()
    assert y.stride() == dx.stride() == x.stride()
    for again, first in zip(step(x, bias, grad, spec), (y, dx, dbias), strict=True):
        assert torch.equal(again, first), "the same bits in every run"


@pytest.mark.parametrize("spec", [LEAKY, SWISH], ids=lambda s: s.activation)
def test_conv_and_linear_against_float64(spec: ActSpec) -> None:
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
    got = torch.autograd.grad(net(*inputs), inputs, grad)
    for g, want in zip(got, torch.autograd.grad(plain(*inputs), inputs, grad), strict=True):
        torch.testing.assert_close(g, want, rtol=1e-10, atol=1e-11)
    compiled = torch.compile(net, fullgraph=True)
    for g, want in zip(torch.autograd.grad(compiled(*inputs), inputs, grad), got, strict=True):
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

SPECS_OF_CHAIN = (LEAKY, SWISH, LEAKY)


@pytest.fixture
def ieee() -> Iterator[None]:
    """Multiply float32 as such."""
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    yield
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision


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
    tensors = [draw(4, 16, 15, 14, dtype=dtype)]
    for i, (shape, _, _) in enumerate(CHAIN):
        tensors += [draw(*shape, dtype=dtype, seed=2 * i + 1) / (shape[1] * shape[2] ** 2) ** 0.5]
        tensors += [draw(shape[0], dtype=dtype, seed=2 * i + 2)]
    tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    return tensors, draw(4, 16, 8, 7, dtype=dtype, seed=9)


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


@pytest.mark.parametrize("engine", ["auto", "triton"])
def test_compiled_chain(engine: str) -> None:
    tensors, grad = chain_tensors(torch.bfloat16)
    compiled = torch.compile(lambda *a: chain(engine, *a), fullgraph=True)
    leaves = [t.detach().requires_grad_() for t in tensors]
    got = torch.autograd.grad(compiled(*leaves), leaves, grad)
    for g, w in zip(got, chain_step(engine, tensors, grad)[1:], strict=True):
        torch.testing.assert_close(g, w, rtol=0.02, atol=0.02 * w.abs().max().item())


def test_chain_in_a_cuda_graph() -> None:
    tensors, grad = chain_tensors(torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            chain_step("triton", tensors, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain_step("triton", tensors, grad)
    tensors[0].copy_(draw(4, 16, 15, 14, dtype=torch.bfloat16, seed=20))
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


def layer_step(
    op: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


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

    shape = op("aten")(x, weight, bias).shape
    grad = draw(*shape, dtype=dtype, seed=3).to(memory_format=torch.channels_last)
    operands = (x, weight, bias, grad)
    got = layer_step(op("triton"), *operands)
    truth = layer_step(op("aten"), *(t.double() for t in operands))
    plain = layer_step(op("aten"), *operands)
    for g, p, t in zip(got, plain, truth, strict=True):
        assert_as_good_as(g, p, t)


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
@pytest.mark.parametrize("sizes", [(1024, 512, 256), (77, 130, 33)], ids=str)
def test_triton_products(sizes: tuple[int, int, int], spec: ActSpec) -> None:
    rows, inner, outer = sizes
    dtype = torch.bfloat16
    operands = (
        draw(rows, inner, dtype=dtype),
        draw(outer, inner, dtype=dtype, seed=1) / inner**0.5,
        draw(outer, dtype=dtype, seed=2),
        draw(rows, outer, dtype=dtype, seed=3),
    )

    def op(engine: str) -> Callable[..., Tensor]:
        return lambda x, w, b: linear_act(x, w, b, spec, engine=engine)

    got = layer_step(op("triton"), *operands)
    truth = layer_step(op("aten"), *(t.double() for t in operands))
    plain = layer_step(op("aten"), *operands)
    for g, p, t in zip(got, plain, truth, strict=True):
        assert_as_good_as(g, p, t)


def test_tuning_measures_and_stays_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path))
    tensors, grad = chain_tensors(torch.bfloat16)
    with tuning.mode("full"):
        got = chain_step("auto", tensors, grad)
    assert list(tmp_path.rglob("*.json")), "what was measured is kept"
    want = chain_step("aten", [t.double() for t in tensors], grad.double())
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= 32 * torch.finfo(g.dtype).eps * w.abs().max()
