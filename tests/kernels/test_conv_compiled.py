"""The convolution kernels compiled for A100, H100/H200 and B200, and which tiles are chosen.

Each test calls a launcher and compiles what it would have launched.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from aot import (
    ARCHES,
    GPUS,
    SHARED,
    TENSOR_CORES,
    Compiled,
    Recorder,
    assert_no_spills,
    multiplies,
)
from torch import Tensor

from fusedshape import ACTIVATIONS
from fusedshape.bench.cases import VGG16
from fusedshape.kernels import conv, gemm, host, images, reduction
from fusedshape.kernels.conv import Config, Direction
from fusedshape.kernels.roofline import Arithmetic, Convolution, resnet50
from tests.support.specs import shaped

pytestmark = pytest.mark.skipif(host.INTERPRETED, reason="kernels are interpreted")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DIRECTIONS: tuple[Direction, ...] = ("fprop", "dgrad", "wgrad")
MIDDLE = Config(128, 64, 128, 4, 4)


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Launchers that take CPU tensors, and keep launches instead of launching."""
    found = {name: Recorder(getattr(conv, name)) for name in ("conv_kernel", "wgrad_kernel")}
    for name, recorder in found.items():
        monkeypatch.setattr(conv, name, recorder)
    monkeypatch.setattr(reduction, "_sum_kernel", Recorder(reduction._sum_kernel))
    monkeypatch.setattr(images, "_why_not", lambda *args, **kwargs: None)
    monkeypatch.setattr(reduction, "channel_sums", lambda sums: sums.sum(0))
    return found


@dataclass(frozen=True)
class Layer:
    """A square convolution of few images, for the kernels do not know how many there are."""

    channels: int = 256
    out: int = 256
    kernel: int = 3
    stride: int = 1
    batch: int = 2
    size: int = 14
    shift: int = 0

    def tensor(self, channels: int, size: int, dtype: torch.dtype, batch: int = 0) -> Tensor:
        shape = (batch or self.batch, size, size, channels)
        elements = torch.Size(shape).numel()
        t = torch.empty(elements + self.shift, dtype=dtype)[self.shift :]
        return t.view(shape).permute(0, 3, 1, 2)


PLAIN = Layer()


class Compiler:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, recorders: dict[str, Recorder]) -> None:
        self.monkeypatch, self.recorders = monkeypatch, recorders

    def __call__(
        self,
        direction: Direction,
        arch: int,
        config: Config | None,
        dtype: torch.dtype = BF16,
        layer: Layer = PLAIN,
        activation: str = "leaky_relu",
        tf32: bool = False,
        aux: bool = True,
    ) -> Compiled:
        """Compile one direction, by default with all its epilogue has."""
        self.monkeypatch.setattr(host, "gpu_of", lambda device: GPUS[arch])
        names = {F16: "float16", BF16: "bfloat16", F32: "tf32" if tf32 else "float32"}
        self.monkeypatch.setattr(images, "arithmetic", lambda dtype, linear: names[dtype])
        spec = shaped(activation)
        pad = layer.kernel // 2
        geometry = [layer.stride] * 2, [pad] * 2, [1, 1]
        x = layer.tensor(layer.channels, layer.size, dtype)
        size = (layer.size + 2 * pad - layer.kernel) // layer.stride + 1
        dz = layer.tensor(layer.out, size, dtype)
        weight = layer.tensor(layer.channels, layer.kernel, dtype, batch=layer.out)
        bias = torch.empty(layer.out)
        if direction == "fprop":
            residual = dz if aux else None
            args: tuple[Any, ...] = (x, weight, bias, residual, 0.5, *geometry, spec.kernel_args)
            conv.conv_act(*args, config=config)
        elif direction == "dgrad":
            save = spec.saves_output
            before = None if save else torch.empty(layer.channels)
            args = (dz, weight, x if aux else None, before, x.shape, *geometry, spec.kernel_args)
            conv.conv_dgrad(*args, save, True, config=config)
        else:
            conv.conv_wgrad(dz, x, weight.shape, *geometry, config=config)
        name = "wgrad_kernel" if direction == "wgrad" else "conv_kernel"
        return self.recorders[name].compile(arch)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, recorders: dict[str, Recorder]) -> Compiler:
    return Compiler(monkeypatch, recorders)


def check(kernel: Compiled, arch: int, config: Config, dtype: torch.dtype) -> None:
    """What is promised of every shipped configuration, for aligned tensors of 256 channels."""
    assert_no_spills(kernel)
    assert kernel.shared <= config.shared(dtype.itemsize) <= SHARED[arch]
    assert multiplies(kernel) == TENSOR_CORES[arch]
    assert not kernel.serial
    assert kernel.copies() == {16}
    assert kernel.vectors("st") > 0
    assert not kernel.widths("st") - {4, 16}  # 4: the sums
    assert not kernel.widths("ld") - {4, 8, 16}  # 4 and 8: the bias
    if ".entry wgrad_kernel" in kernel.ptx:  # which has nothing but operands to read
        assert not kernel.widths("ld")
    assert kernel.index_types() == {"i32"}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_largest_tiles(direction: Direction, arch: int, compiled: Compiler) -> None:
    config = conv.CONFIGS[direction][0]
    check(compiled(direction, arch, config), arch, config, BF16)


def test_hungry_activation_in_the_largest_tile(compiled: Compiler) -> None:
    config = Config(128, 256)
    assert config in conv.CONFIGS["fprop"]
    check(compiled("fprop", 90, config, activation="asinh"), 90, config, BF16)


def test_strided_dgrad(compiled: Compiler) -> None:
    kernel = compiled("dgrad", 90, MIDDLE, layer=Layer(stride=2))
    check(kernel, 90, MIDDLE, BF16)
    # The remainder's taps are bounds of the loop, not masks in it.
    body = kernel.mlir.split("scf.for")[1].split("tt.dot")[0]
    assert not re.search(r"arith\.remsi .*tensor", body)


@pytest.mark.parametrize(
    ("direction", "config"),
    [
        *[("fprop", c) for c in (Config(128, 256), Config(128, 128), MIDDLE)],
        *[("fprop", c) for c in (Config(256, 128, num_stages=4), Config(256, 64, 64, 8, 4))],
        *[("dgrad", c) for c in (Config(128, 128, 64, 8, 4), MIDDLE, Config(64, 128, 128, 4))],
        *[("dgrad", c) for c in (Config(256, 128, num_stages=4), Config(256, 64, 64, 8, 4))],
        *[("wgrad", c) for c in conv.CONFIGS["wgrad"][:3]],
    ],
    ids=str,
)
def test_tensor_cores_are_what_a_step_waits_for(
    direction: Direction, config: Config, compiled: Compiler
) -> None:
    """One program alone must issue its instructions in less time than its products take."""
    assert config in conv.CONFIGS[direction]
    kernel = compiled(direction, 90, config)
    check(kernel, 90, config, BF16)
    # A multiprocessor has four schedulers, of an instruction a cycle each, and multiplies 2048
    # pairs of numbers a cycle.
    issue = len(kernel.loop()) * config.num_warps / 4
    products = config.block_m * config.block_n * config.bytes_k / BF16.itemsize / 2048
    assert issue < products


def test_half(compiled: Compiler) -> None:
    check(compiled("fprop", 90, MIDDLE, F16), 90, MIDDLE, F16)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tf32(direction: Direction, arch: int, compiled: Compiler) -> None:
    tf32 = Convolution(2, 256, 14, 14, 256, arithmetic="tf32")
    config = conv.candidates(direction, tf32, GPUS[arch])[0]
    kernel = compiled(direction, arch, config, F32, tf32=True)
    check(kernel, arch, config, F32)
    if direction == "wgrad" and arch >= 90:  # where an operand is turned around in shared memory
        assert 16 in kernel.shared_stores()
        assert 4 not in kernel.shared_stores()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float32_without_tensor_cores(direction: Direction, compiled: Compiler) -> None:
    for config in conv.FMA_CONFIGS:
        kernel = compiled(direction, 80, config, F32)
        assert multiplies(kernel) == "fma"
        assert_no_spills(kernel)
        assert kernel.copies() == {16}


def test_channels_that_are_no_multiple_of_a_vector(compiled: Compiler) -> None:
    kernel = compiled("fprop", 90, MIDDLE, layer=Layer(channels=68))
    assert kernel.copies() == {8}
    assert multiplies(kernel) == TENSOR_CORES[90]
    assert_no_spills(kernel)


STEM = Layer(3, 64, 7, 2, size=28)


def check_stem(direction: Direction, arch: int, config: Config, compiled: Compiler) -> None:
    kernel = compiled(direction, arch, config, layer=STEM, aux=False)
    assert multiplies(kernel) == TENSOR_CORES[arch]
    assert_no_spills(kernel)


@pytest.mark.parametrize(("direction", "arch"), [("fprop", 80), ("wgrad", 90)])
def test_image_of_three_channels(direction: Direction, arch: int, compiled: Compiler) -> None:
    problem = Convolution(2, 3, 28, 28, 64, (7, 7), (2, 2), (3, 3))
    check_stem(direction, arch, conv.config_for(direction, problem, GPUS[arch]), compiled)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("direction", ["fprop", "wgrad"])
def test_every_tile_of_an_image(direction: Direction, arch: int, compiled: Compiler) -> None:
    problem = Convolution(2, 3, 28, 28, 64, (7, 7), (2, 2), (3, 3))
    for config in conv.candidates(direction, problem, GPUS[arch]):
        check_stem(direction, arch, config, compiled)


def test_pointers_that_are_not_aligned(compiled: Compiler) -> None:
    kernel = compiled("wgrad", 90, Config(64, 64, 64, 4, 4), layer=Layer(shift=1))
    assert not kernel.copies()
    assert multiplies(kernel) == TENSOR_CORES[90]


def test_index_width(compiled: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(64, 64, 128, 4, 3)
    monkeypatch.setattr(host, "WIDE", 1)
    for direction in ("dgrad", "wgrad"):
        kernel = compiled(direction, 90, config)
        assert kernel.index_types() == {"i64"}
        assert_no_spills(kernel)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("direction", "config"),
    [(direction, config) for direction in DIRECTIONS for config in conv.CONFIGS[direction]],
    ids=lambda v: (
        v if isinstance(v, str) else f"{v.block_m}x{v.block_n}x{v.bytes_k}x{v.num_stages}"
    ),
)
def test_every_configuration(
    direction: Direction, config: Config, arch: int, compiled: Compiler
) -> None:
    if config not in conv.candidates(direction, Convolution(2, 256, 14, 14, 256), GPUS[arch]):
        pytest.skip("beyond this GPU's shared memory")
    check(compiled(direction, arch, config), arch, config, BF16)
    tf32 = Convolution(2, 256, 14, 14, 256, arithmetic="tf32")
    if config in conv.candidates(direction, tf32, GPUS[arch]):
        check(compiled(direction, arch, config, F32, tf32=True), arch, config, F32)
    if direction != "wgrad":
        check(compiled(direction, arch, config, activation="tanh", aux=False), arch, config, BF16)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str, arch: int, compiled: Compiler) -> None:
    plain = Convolution(2, 256, 14, 14, 256)
    for direction, aux in (("fprop", False), ("fprop", True), ("dgrad", True)):
        for config in conv.candidates(direction, plain, GPUS[arch]):
            if config.block_m * config.block_n >= 128**2:  # where registers are tightest
                kernel = compiled(direction, arch, config, activation=name, aux=aux)
                assert_no_spills(kernel, activation=name)
                assert multiplies(kernel) == TENSOR_CORES[arch]


def test_heuristic_takes_what_fits() -> None:
    for arch, gpu in {**GPUS, 86: host.Gpu(86, 84)}.items():
        for arithmetic in ("bfloat16", "tf32", "float32"):
            for layer in resnet50(32, arithmetic):
                for direction in DIRECTIONS:
                    config = conv.config_for(direction, layer.problem, gpu)
                    assert config in conv.candidates(direction, layer.problem, gpu)
                    assert config.shared(layer.problem.itemsize) <= SHARED.get(arch, 101_376)


def test_heuristic_makes_tiles_as_large_as_the_problem() -> None:
    gpu = GPUS[90]
    large = Convolution(64, 256, 56, 56, 256)
    for direction in DIRECTIONS:
        config = conv.config_for(direction, large, gpu)
        assert min(config.block_m, config.block_n) == 128
    few = Convolution(1, 512, 7, 7, 512)
    assert conv.config_for("fprop", few, gpu).block_m == 64
    assert conv.config_for("fprop", Convolution(64, 64, 56, 56, 64), gpu).block_n == 64
    assert conv.config_for("dgrad", Convolution(64, 3, 56, 56, 64), gpu).block_n == 32


@pytest.mark.parametrize("pixels", [(1, 7), (32, 14), (256, 56)])
@pytest.mark.parametrize("channels", [3, 64, 512])
def test_splits_cover_all_pixels(channels: int, pixels: tuple[int, int]) -> None:
    batch, size = pixels
    problem = Convolution(batch, channels, size, size, channels)
    for config in conv.candidates("wgrad", problem, GPUS[90]):
        splits, steps = conv._splits(config, problem, GPUS[90])
        block = config.bytes_k // problem.itemsize
        assert (splits - 1) * steps * block < problem.pixels <= splits * steps * block
        assert splits == 1 or splits * conv._wgrad_tiles(config, problem) <= 132 * 8


def vgg16(batch: int, arithmetic: Arithmetic) -> list[Convolution]:
    return [Convolution(batch, c, n, n, out, arithmetic=arithmetic) for c, out, _, _, n in VGG16]


def launched(
    direction: Direction, p: Convolution, gpu: host.Gpu
) -> tuple[gemm.Config | Config, int, float]:
    """The pinned tiling, how many programs it has, and how many products each number takes."""
    if p.is_gemm:
        sizes = {
            "fprop": (p.pixels, p.out_channels, p.channels),
            "dgrad": (p.pixels, p.channels, p.out_channels),
            "wgrad": (p.out_channels, p.channels, p.pixels),
        }
        half = p.itemsize == 2
        how = (BF16 if half else F32), ("ieee" if half else "tf32")
        product = gemm.Product(direction, *sizes[direction], *how, reads=direction == "dgrad")
        tiling = gemm.config_for(product, gpu)
        splits, steps = gemm._splits(product, tiling, gpu)
        return tiling, tiling.tiles(product) * splits, steps * tiling.bytes_k / p.itemsize
    tiling = conv.config_for(direction, p, gpu)
    block_k = tiling.bytes_k // p.itemsize
    if direction == "wgrad":
        splits, steps = conv._splits(tiling, p, gpu)
        return tiling, conv._wgrad_tiles(tiling, p) * splits, steps * block_k
    read, written, rows, subs = p.channels, p.out_channels, p.pixels, 1
    if direction == "dgrad":
        read, written, subs = written, read, p.stride[0] * p.stride[1]
        rows = p.batch * math.ceil(p.height / p.stride[0]) * math.ceil(p.width / p.stride[1])
    programs = subs * math.ceil(rows / tiling.block_m) * math.ceil(written / tiling.block_n)
    if read <= conv.FLAT_CHANNELS:
        return tiling, programs, math.ceil(p.taps * read / block_k) * block_k
    return tiling, programs, p.taps * math.ceil(read / block_k) * block_k / subs


@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32"])
@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("arch", ARCHES)
def test_pinned_launches_keep_the_gpu_busy(arch: int, batch: int, arithmetic: Arithmetic) -> None:
    gpu = GPUS[arch]
    layers = [layer.problem for layer in resnet50(batch, arithmetic)] + vgg16(batch, arithmetic)
    for p, direction in itertools.product(layers, DIRECTIONS):
        if direction == "dgrad" and p.channels == 3:
            continue  # nobody asks for the image's gradient
        tiling, programs, reduction = launched(direction, p, gpu)
        tile, products = tiling.block_m * tiling.block_n, p.pixels * p.weights
        # Padding is a fifth at most: 27 numbers of 3×3 pixels of an image are summed as 32.
        assert programs * tile * reduction < 1.2 * products
        # The busiest multiprocessor has less than twice its share of the work.
        rounds = math.ceil(programs / gpu.processors)
        assert rounds * tile * reduction < 2 * products / gpu.processors
        # Where large tiles do that too, what is read is multiplied as often as in such of 128×128.
        written = p.channels if direction == "dgrad" else p.out_channels
        if batch == 256 and direction != "wgrad":
            side = min(written, 128)
            rows = p.height * p.width if direction == "dgrad" else p.out_height * p.out_width
            if batch * rows * written >= 2 * gpu.processors * 128**2:
                edges = tiling.block_m + tiling.block_n
                assert tile / edges >= 128 * side / (128 + side)


def test_cpu_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = torch.zeros(2, 4, 4, 8).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        conv.conv(x, torch.zeros(4, 8, 3, 3), [1, 1], [1, 1], [1, 1])
