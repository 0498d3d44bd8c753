"""Triton's JIT and driver before pretended GPUs; test_pretend_gpu.py runs this file."""

from __future__ import annotations

import pytest
import torch
from pretend_gpu import GPUS, LAUNCHES, Descriptor, Launch
from torch import Tensor

from fusedshape.kernels import conv, gemm, pointwise
from fusedshape.ops import ChainLayer, bias_act, conv_act, conv_chain, linear_act, shaped_act
from tests.support.specs import shaped

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
LEAKY, SWISH, ATAN = shaped("leaky_relu"), shaped("swish"), shaped("atan")
#: Index of the device of each compute capability.
DEVICES = {10 * gpu.major + gpu.minor: i for i, gpu in enumerate(GPUS)}
ARCHES = [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def launches() -> list[Launch]:
    LAUNCHES.clear()
    return LAUNCHES


def names() -> list[str]:
    return [launch.kernel for launch in LAUNCHES]


def leaf(*shape: int, arch: int, dtype: torch.dtype = BF16) -> Tensor:
    t = torch.zeros(shape, dtype=dtype, device=f"cuda:{DEVICES[arch]}")
    if t.ndim == 4:
        t = t.to(memory_format=torch.channels_last)
    return t.requires_grad_()


def backward(y: Tensor, *leaves: Tensor) -> None:
    for t, grad in zip(leaves, torch.autograd.grad(y, leaves, torch.zeros_like(y)), strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (t.shape, t.dtype, t.device)


def descriptors(launch: Launch) -> list[Descriptor]:
    return [a for a in launch.arguments if isinstance(a, Descriptor)]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_pass_of_its_own(arch: int) -> None:
    x, bias = leaf(4, 24, 5, 7, arch=arch), leaf(24, arch=arch)
    assert torch.cuda.current_device() == 0
    for spec in (LEAKY, ATAN):  # one with, one without a limit of registers
        backward(bias_act(x, bias, spec), x, bias)
    assert names() == ["_bias_act_kernel", "_act_grad_kernel", "_reduce_kernel"] * 2
    assert {launch.arch for launch in LAUNCHES} == {arch}
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("arch", ARCHES)
def test_products(arch: int) -> None:
    x, w, b = leaf(4096, 128, arch=arch), leaf(128, 128, arch=arch), leaf(128, arch=arch)
    backward(linear_act(x, w, b, LEAKY, engine="triton"), x, w, b)
    forward, *_, dgrad, wgrad = (n for n in LAUNCHES if n.kernel == "_gemm_kernel")
    assert {launch.arch for launch in LAUNCHES} == {arch}
    assert "_act_grad_kernel" in names()
    # The parts of wgrad's sum are written through pointers.
    wanted = (0, 0, 0) if arch == 80 else (3, 3, 2)
    assert tuple(len(descriptors(launch)) for launch in (forward, dgrad, wgrad)) == wanted
    assert names()[-1] == "_sum_kernel"


@pytest.mark.parametrize("arch", ARCHES)
def test_convolutions(arch: int) -> None:
    x, w, b = leaf(4, 32, 9, 8, arch=arch), leaf(48, 32, 3, 3, arch=arch), leaf(48, arch=arch)
    v = leaf(16, 48, 3, 3, arch=arch)
    layers = [
        ChainLayer(w, b, LEAKY, padding=1, engine="triton"),
        ChainLayer(v, None, LEAKY, stride=2, engine="triton"),
    ]
    backward(conv_chain(x, layers), x, w, b, v)
    assert names().count("conv_kernel") == 4
    assert names().count("wgrad_kernel") == 2
    assert {launch.arch for launch in LAUNCHES} == {arch}


def test_launches_follow_the_stream() -> None:
    x, bias = leaf(4, 24, 5, 7, arch=90), leaf(24, arch=90)
    with torch.cuda.device(x.device):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            backward(bias_act(x, bias, LEAKY), x, bias)
    assert {launch.stream for launch in LAUNCHES} == {stream.stream_id}
    assert stream.stream_id


def test_sizes_beyond_32_bits() -> None:
    # Memory that is never touched.
    x = torch.empty(2**31 + 4096, dtype=F16, device="cuda:0")
    shaped_act(x, LEAKY)
    rows = torch.empty(2**31 + 4096, 1, dtype=F16, device="cuda:0").requires_grad_()
    bias_act(rows, torch.zeros(1, device="cuda:0"), LEAKY)
    assert names() == ["_bias_act_kernel"] * 2
    for launch in LAUNCHES:
        assert launch.grid[0] * pointwise.TILE_BYTES >= x.numel() * x.itemsize


def test_refusals_name_what_is_wrong() -> None:
    x, w = leaf(2, 16, 5, 5, arch=90), leaf(16, 16, 3, 3, arch=100)
    with pytest.raises(ValueError, match="weight is on cuda:2, x on cuda:0"):
        conv_act(x, w, None, LEAKY, engine="triton")
    config = gemm.Config(128, 128, tma=True)
    a80 = leaf(64, 64, arch=80)
    with pytest.raises(ValueError, match="cannot run"):
        gemm.linear(a80.detach(), a80.detach(), config=config)
    # Off what a descriptor could address by four bytes.
    skewed = torch.zeros(64 * 64 + 2, dtype=BF16, device="cuda:0")[2:].view(64, 64)
    with pytest.raises(ValueError, match="cannot run"):
        gemm.linear(skewed, skewed, config=config)
    gemm.linear(skewed, skewed)
    assert not descriptors(LAUNCHES[-1])
    wide = conv.Config(256, 256, 128, 8, 4)
    with pytest.raises(Exception, match="shared memory"):
        conv.conv(x.detach(), w.detach().to(x.device), [1, 1], [1, 1], [1, 1], config=wide)
