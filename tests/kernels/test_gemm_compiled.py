"""The GEMM kernels compiled for A100, H100/H200 and B200: spills, tensor cores, accesses, memory.

Each test calls a launcher and compiles what it would have launched.
"""

from __future__ import annotations

from dataclasses import replace
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

from fusedshape import ACTIVATIONS, ActSpec
from fusedshape.kernels import gemm, host, reduction
from fusedshape.kernels.gemm import Config, Product
from tests.support.specs import shaped

pytestmark = pytest.mark.skipif(host.INTERPRETED, reason="kernels are interpreted")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Launchers that take CPU tensors, and keep launches instead of launching."""
    recorders = {}
    for module, name in ((gemm, "_gemm_kernel"), (reduction, "_sum_kernel")):
        recorders[name] = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorders[name])
    monkeypatch.setattr(gemm, "why_not", lambda *matrices: None)
    monkeypatch.setattr(reduction, "channel_sums", lambda sums: sums.sum(0))
    return recorders


def launch(
    problem: Product, config: Config, spec: ActSpec, save_output: bool, view: Any = lambda t: t
) -> None:
    """Call the launcher of a problem with empty tensors; `view` is taken of each operand."""
    m, n, k = problem.m, problem.n, problem.k
    tf32 = problem.precision == "tf32"

    def empty(rows: int, cols: int) -> Tensor:
        return view(torch.empty(rows, cols, dtype=problem.dtype))

    aux = empty(m, n) if problem.reads else None
    bias = torch.empty(n)
    if problem.direction == "fprop":
        x, weight = empty(m, k), empty(n, k)
        args = (x, weight, bias, aux, 0.5, spec.kernel_args)
        gemm.linear_act(*args, tf32=tf32, config=config)
    elif problem.direction == "dgrad":
        args = (empty(m, k), empty(k, n), aux, bias, spec.kernel_args, save_output, True)
        gemm.linear_dgrad(*args, tf32=tf32, config=config)
    else:
        gemm.linear_wgrad(empty(k, m), empty(k, n), tf32=tf32, config=config)


def problem(
    direction: str, dtype: torch.dtype = BF16, precision: str = "ieee", reads: bool = True
) -> Product:
    reads = reads and direction != "wgrad"
    return Product(direction, 512, 512, 512, dtype, precision, reads=reads)


class Checker:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, launches: dict[str, Recorder]) -> None:
        self.monkeypatch, self.launches = monkeypatch, launches

    def __call__(
        self, arch: int, problem: Product, config: Config, name: str, save_output: bool = True
    ) -> Compiled:
        """Compile one launch and hold it to what is promised of every configuration."""
        self.monkeypatch.setattr(host, "gpu_of", lambda device: GPUS[arch])
        spec = shaped(name)
        launch(problem, config, spec, save_output and spec.saves_output)
        kernel = self.launches["_gemm_kernel"].compile(arch)
        assert_no_spills(kernel, activation=name)
        assert kernel.shared <= config.shared(problem) <= SHARED[arch]
        assert multiplies(kernel) == (TENSOR_CORES[arch] if problem.tensor_cores else "fma")
        assert not kernel.serial
        assert ("cp.async.bulk.tensor" in kernel.ptx) == config.tma
        if not config.tma:
            assert kernel.copies() == {16}
            assert 16 in kernel.widths("st")
            assert kernel.widths("st") <= {4, 8, 16}
        if problem.direction == "wgrad":  # which has nothing but operands to read
            assert not kernel.widths("ld")
        if problem.reads and not config.persistent:
            assert 16 in kernel.widths("ld")
        return kernel


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, launches: dict[str, Recorder]) -> Checker:
    return Checker(monkeypatch, launches)


DIRECTIONS = ["fprop", "dgrad", "wgrad"]
ARITHMETIC = {"bf16": (BF16, "ieee"), "tf32": (F32, "tf32"), "ieee": (F32, "ieee")}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("arch", ARCHES)
def test_what_large_layers_take(arch: int, direction: str, check: Checker) -> None:
    p = replace(problem(direction), m=64 * 56 * 56)
    if direction == "wgrad":
        p = replace(p, m=512, k=64 * 56 * 56)
    config = gemm.config_for(p, GPUS[arch])
    assert config.tma == config.persistent == (arch >= 90)
    check(arch, problem(direction), config, "tanh")


PERSISTENT = Config(128, 128, num_stages=4, tma=True, persistent=True)


@pytest.mark.parametrize(
    ("arch", "name", "config"),
    [
        (100, "tanh", PERSISTENT),
        (100, "bentid", PERSISTENT),
        (100, "sin", Config(128, 128)),
        (100, "sigmoid", Config(128, 64, num_warps=4)),
        (100, "gelu_exact", Config(128, 64, num_warps=4)),
        (80, "cos", Config(128, 64, num_warps=4)),
    ],
)
def test_where_registers_are_tightest(arch: int, name: str, config: Config, check: Checker) -> None:
    p = problem("dgrad")
    assert config in gemm.configs_for(p, GPUS[arch])
    check(arch, p, config, name, save_output=False)


@pytest.mark.parametrize("arithmetic", ["tf32", "ieee"])
@pytest.mark.parametrize("direction", ["dgrad", "wgrad"])
@pytest.mark.parametrize("arch", ARCHES)
def test_float32(arch: int, direction: str, arithmetic: str, check: Checker) -> None:
    p = problem(direction, *ARITHMETIC[arithmetic])
    config = next(c for c in gemm.configs_for(p, GPUS[arch]) if not c.tma)
    check(arch, p, config, "gelu")


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("arch", [90, 100])
def test_operands_turned_around(arch: int, tma: bool, check: Checker) -> None:
    p = problem("wgrad", *ARITHMETIC["tf32"])
    config = next(c for c in gemm.configs_for(p, GPUS[arch]) if c.tma == tma)
    stores = check(arch, p, config, "leaky_relu").shared_stores()
    assert 16 in stores
    assert 4 not in stores


def unaligned(matrix: Tensor) -> Tensor:
    rows, cols = matrix.shape
    return matrix.new_empty(rows, cols + 1)[:, 1:]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_odd_channels_do_not_spill(
    direction: str, launches: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "gpu_of", lambda device: GPUS[90])
    p = replace(problem(direction), access=2, describable=False)
    launch(p, gemm.config_for(p, GPUS[90]), shaped("tanh"), True, unaligned)
    kernel = launches["_gemm_kernel"].compile(90)
    assert_no_spills(kernel)
    assert multiplies(kernel) == "wgmma.mma_async"


@pytest.mark.parametrize("direction", ["dgrad", "wgrad"])
def test_index_width(
    direction: str, launches: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "gpu_of", lambda device: GPUS[90])
    for least, width in ((host.WIDE, "i32"), (0, "i64")):
        monkeypatch.setattr(host, "WIDE", least)
        launch(problem(direction), Config(128, 128, splits=2), shaped("tanh"), True)
        kernels = [launches["_gemm_kernel"].compile(90)]
        if direction == "wgrad":
            kernels.append(launches["_sum_kernel"].compile(90))
        for kernel in kernels:
            assert kernel.index_types() == {width}
            assert_no_spills(kernel)


@pytest.mark.parametrize("arch", ARCHES)
def test_second_stage_of_wgrad(
    arch: int, launches: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "gpu_of", lambda device: GPUS[arch])
    launch(problem("wgrad"), Config(128, 128, splits=2), shaped("tanh"), True)
    kernel = launches["_sum_kernel"].compile(arch)
    assert_no_spills(kernel)
    assert kernel.vectors("ld") >= 4  # in flight at a time


@pytest.mark.exhaustive
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("arch", ARCHES)
def test_every_configuration(arch: int, direction: str, arithmetic: str, check: Checker) -> None:
    for reads in {False, direction != "wgrad"}:
        p = problem(direction, *ARITHMETIC[arithmetic], reads=reads)
        configs = gemm.configs_for(p, GPUS[arch])
        assert configs
        for config in configs:
            check(arch, p, config, "leaky_relu")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("arch", ARCHES)
def test_every_activation(arch: int, name: str, check: Checker) -> None:
    """Where registers are tightest: 64 numbers a thread and more."""
    for direction, reads in (("fprop", False), ("fprop", True), ("dgrad", True)):
        p = problem(direction, reads=reads)
        for config in gemm.configs_for(p, GPUS[arch]):
            each = config.block_m * config.block_n // (32 * config.num_warps)
            tight = each == 128 or (each == 64 and reads)
            if tight and config.persistent == config.tma:
                for save_output in {False, direction == "dgrad" and shaped(name).saves_output}:
                    check(arch, p, config, name, save_output)
