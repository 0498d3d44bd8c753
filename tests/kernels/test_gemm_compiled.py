"""The GEMM kernels compiled for A100, H100/H200 and B200: spills, tensor cores, accesses, memory.

Each test calls a launcher and compiles what it would have launched.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from aot import ARCHES, GPUS, SHARED, Recorder, multiplies
from conftest import shaped
from torch import Tensor

from fusedshape import ACTIVATIONS, ActSpec
from fusedshape.activations import Activation
from fusedshape.kernels import gemm, pointwise
from fusedshape.kernels.gemm import Config, Problem

pytestmark = pytest.mark.skipif(pointwise._INTERPRETED, reason="kernels are interpreted")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROWS = list(ACTIVATIONS.values())


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Launchers that take CPU tensors, and keep launches instead of launching."""
    recorders = {name: Recorder(getattr(gemm, name)) for name in ("_gemm_kernel", "_sum_kernel")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(gemm, name, recorder)
    monkeypatch.setattr(gemm, "why_not", lambda *matrices: None)
    monkeypatch.setattr(pointwise, "_reduce", lambda sums: sums.sum(0))
    return recorders


def launch(
    problem: Problem, config: Config, spec: ActSpec, save_output: bool, view: Any = lambda t: t
) -> None:
    """Call the launcher of a problem with empty tensors; `view` is taken of each operand."""
    m, n, k = problem.m, problem.n, problem.k
    tf32 = problem.precision == "tf32"

    def empty(rows: int, cols: int) -> Tensor:
        return view(torch.empty(rows, cols, dtype=problem.dtype))

    aux = empty(m, n) if problem.reads else None
    bias = torch.empty(n)
    if problem.direction == "forward":
        x, weight = empty(m, k), empty(n, k)
        args = (x, weight, bias, aux, 0.5, *spec.kernel_args)
        gemm.linear_act(*args, tf32=tf32, config=config)
    elif problem.direction == "dgrad":
        args = (empty(m, k), empty(k, n), aux, bias, *spec.kernel_args, save_output, True)
        gemm.linear_dgrad(*args, tf32=tf32, config=config)
    else:
        gemm.linear_wgrad(empty(k, m), empty(k, n), tf32=tf32, config=config)


def problem(
    direction: str, dtype: torch.dtype = BF16, precision: str = "ieee", reads: bool = True
) -> Problem:
    reads = reads and direction != "wgrad"
    return Problem(direction, 512, 512, 512, dtype, precision, reads=reads)


def check(
    monkeypatch: pytest.MonkeyPatch,
    launches: dict[str, Recorder],
    arch: int,
    problem: Problem,
    config: Config,
    spec: ActSpec,
    save_output: bool = True,
) -> None:
    """Compile one launch and hold it to what is promised of every configuration."""
    monkeypatch.setattr(gemm, "gpu_of", lambda device: GPUS[arch])
    launch(problem, config, spec, save_output and spec.saves_output)
    recorder = launches["_gemm_kernel"]
    kernel = recorder.compile(arch)
    where = f"sm_{arch} {spec.activation} {problem} {config}"
    if spec.activation in ("sin", "cos"):
        # libdevice reduces huge arguments in an array, and saves registers around that path.
        assert kernel.spills <= 512, where
    elif arch == 100 and spec.activation not in ("relu", "leaky_relu"):
        # ptxas caps registers there, and saves a few outside of the loop.
        assert kernel.spills <= 32, where
    else:
        assert kernel.spills == kernel.stack == 0, where
    assert kernel.shared <= config.shared(problem) <= SHARED[arch], where
    best = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
    assert multiplies(kernel) == (best if problem.tensor_cores else "fma"), where
    assert ("cp.async.bulk.tensor" in kernel.ptx) == config.tma, where
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?(0x\w+)", kernel.ptx)
    if not config.tma:
        assert set(copies) == {"0x10"}, where
    if not config.tma:
        assert 16 in kernel.widths("st"), where
        assert kernel.widths("st") <= {4, 8, 16}, where
    if problem.direction == "wgrad":  # which has nothing but operands to read
        assert not kernel.widths("ld"), where
    if problem.reads and not config.persistent:
        assert 16 in kernel.widths("ld"), where


DIRECTIONS = ["forward", "dgrad", "wgrad"]
ARITHMETIC = {"bf16": (BF16, "ieee"), "tf32": (F32, "tf32"), "ieee": (F32, "ieee")}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("arch", ARCHES)
def test_what_large_layers_take(
    arch: int, direction: str, launches: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = replace(problem(direction), m=64 * 56 * 56)
    if direction == "wgrad":
        p = replace(p, m=512, k=64 * 56 * 56)
    config = gemm.config_for(p, GPUS[arch])
    assert config.tma == config.persistent == (arch >= 90)
    check(monkeypatch, launches, arch, problem(direction), config, shaped("tanh"))


@pytest.mark.parametrize("arithmetic", ["tf32", "ieee"])
@pytest.mark.parametrize("direction", ["dgrad", "wgrad"])
@pytest.mark.parametrize("arch", ARCHES)
def test_float32(
    arch: int,
    direction: str,
    arithmetic: str,
    launches: dict[str, Recorder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = problem(direction, *ARITHMETIC[arithmetic])
    config = next(c for c in gemm.configs_for(p, GPUS[arch]) if not c.tma)
    check(monkeypatch, launches, arch, p, config, shaped("gelu"))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("arch", [90, 100])
def test_operands_turned_around(
    arch: int, tma: bool, launches: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem("wgrad", *ARITHMETIC["tf32"])
    config = next(c for c in gemm.configs_for(p, GPUS[arch]) if c.tma == tma)
    check(monkeypatch, launches, arch, p, config, shaped("leaky_relu"))
    ptx = launches["_gemm_kernel"].compile(arch).ptx
    assert "st.shared.v4" in ptx
    assert "st.shared.b32" not in ptx


def unaligned(matrix: Tensor) -> Tensor:
    rows, cols = matrix.shape
    return matrix.new_empty(rows, cols + 1)[:, 1:]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_odd_channels_do_not_spill(
    direction: str, launches: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "gpu_of", lambda device: GPUS[90])
    p = replace(problem(direction), access=2, describable=False)
    launch(p, gemm.config_for(p, GPUS[90]), shaped("tanh"), True, unaligned)
    kernel = launches["_gemm_kernel"].compile(90)
    assert kernel.spills == kernel.stack == 0
    assert multiplies(kernel) == "wgmma.mma_async"


@pytest.mark.parametrize("direction", ["dgrad", "wgrad"])
def test_index_width(
    direction: str, launches: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "gpu_of", lambda device: GPUS[90])
    for least, width in ((pointwise.WIDE, "i32"), (0, "i64")):
        monkeypatch.setattr(pointwise, "WIDE", least)
        launch(problem(direction), Config(128, 128, splits=2), shaped("tanh"), True)
        kernels = [launches["_gemm_kernel"].compile(90)]
        if direction == "wgrad":
            kernels.append(launches["_sum_kernel"].compile(90))
        for kernel in kernels:
            moves = re.findall(r"tt\.addptr .*tensor<[\dx]+x(i\d+)>", kernel.mlir)
            assert set(moves) == {width}
            assert kernel.spills == kernel.stack == 0


@pytest.mark.parametrize("arch", ARCHES)
def test_second_stage_of_wgrad(
    arch: int, launches: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "gpu_of", lambda device: GPUS[arch])
    launch(problem("wgrad"), Config(128, 128, splits=2), shaped("tanh"), True)
    kernel = launches["_sum_kernel"].compile(arch)
    assert kernel.spills == kernel.stack == 0
    assert kernel.vectors("ld") > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("arch", ARCHES)
def test_every_configuration(
    arch: int,
    direction: str,
    arithmetic: str,
    launches: dict[str, Recorder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for reads in {False, direction != "wgrad"}:
        p = problem(direction, *ARITHMETIC[arithmetic], reads=reads)
        configs = gemm.configs_for(p, GPUS[arch])
        assert configs
        for config in configs:
            check(monkeypatch, launches, arch, p, config, shaped("leaky_relu"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("arch", ARCHES)
def test_every_activation(
    row: Activation, arch: int, launches: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where registers are tightest: 64 numbers a thread and more."""
    spec = shaped(row.name)
    for direction, reads in (("forward", False), ("forward", True), ("dgrad", True)):
        p = problem(direction, reads=reads)
        for config in gemm.configs_for(p, GPUS[arch]):
            tight = config.slices == 4 or (config.slices == 2 and reads)
            if tight and config.persistent == config.tma:
                for save_output in {False, direction == "dgrad" and spec.saves_output}:
                    check(monkeypatch, launches, arch, p, config, spec, save_output)
