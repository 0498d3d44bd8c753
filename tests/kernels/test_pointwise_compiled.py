"""The Triton kernels compiled for A100, H100/H200 and B200: spills, access widths, index widths."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest
import torch
from aot import (
    ARCHES,
    Compiled,
    assert_no_spills,
    compile_act_grad,
    compile_bias_act,
    compile_reduce,
)

from fusedshape import ACTIVATIONS, ActSpec
from fusedshape.activations import Activation
from fusedshape.kernels import host, pointwise
from fusedshape.kernels.pointwise import Plan, make_plan

pytestmark = pytest.mark.skipif(host.INTERPRETED, reason="kernels are interpreted")

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ROWS = list(ACTIVATIONS.values())
PIXELS = 64 * 56 * 56
SHAPES = {  # numel, channels, stride of a channel
    "channels_last": (PIXELS * 128, 128, 1),
    "channels_last, 24": (PIXELS * 24, 24, 1),
    "nchw": (PIXELS * 128, 128, 56 * 56),
    "flat": (PIXELS * 128, 1, 1),
}
ODD = {"channels_last, 3": (PIXELS * 3, 3, 1), "nchw, 7 x 7": (64 * 512 * 49, 512, 49)}

#: Of an H200: bytes a second to and from memory, nine tenths of what it is sold with,
#: multiprocessors, their clock, and for how many lanes one issues instructions a cycle, and
#: instructions of special functions.
BANDWIDTH, PROCESSORS, CLOCK, LANES, SPECIAL_LANES = 4.3e12, 132, 1.75e9, 128, 16
#: Runs on the unit of special functions, or as slowly.
SPECIAL = ("MUFU", "F2F.", "F2I.", "I2F.")
#: A logarithm is a long polynomial; sines reduce huge arguments in a branch that hides the count.
LONG_FORWARD, UNCOUNTED = ("asinh",), ("sin", "cos")


def plan(shape: tuple[int, int, int], dtype: torch.dtype, sums: bool) -> Plan:
    return make_plan(*shape, dtype.itemsize, sums)


def both(
    row: Activation, shape: tuple[int, int, int], dtype: torch.dtype, arch: int
) -> list[Compiled]:
    """Forward, and backward with bias gradient, as a training step runs them."""
    bias = F32 if shape[1] > 1 else None
    return [
        compile_bias_act(plan(shape, dtype, False), dtype, row.id, arch, bias),
        compile_act_grad(
            plan(shape, dtype, True), dtype, row.id, arch, row.saves == "output", bias=bias
        ),
    ]


def assert_vectors(kernels: list[Compiled], dtype: torch.dtype) -> None:
    """Hold every access to the activations to 16 bytes: 2 a thread and tensor."""
    forward, backward = kernels
    assert forward.vectors("ld") >= 2
    assert forward.vectors("st") == 2
    assert backward.vectors("ld") >= 4
    assert backward.vectors("st") == 2
    for kernel in kernels:
        narrow = kernel.widths("ld") | kernel.widths("st")
        assert not {w for w in narrow if w <= 2}
        if dtype == F64:
            assert not {w for w in kernel.widths("st") - {16} if w != 8}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_activation(row: Activation) -> None:
    kernels = both(row, SHAPES["channels_last"], BF16, 90)
    assert_no_spills(*kernels, activation=row.name)
    assert_vectors(kernels, BF16)
    assert all("cvt.rn.bf16x2.f32" in kernel.ptx for kernel in kernels)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name not in UNCOUNTED], ids=lambda row: row.name
)
def test_memory_is_slower_than_arithmetic(row: Activation) -> None:
    """Bytes take longer than instructions: 2 + 2 bytes a number in place, 2 + 2 + 2 backward."""
    shape = SHAPES["channels_last"]
    for kernel, moved, sums in zip(both(row, shape, BF16, 90), (4, 6), (False, True), strict=True):
        p = plan(shape, BF16, sums)
        numbers = p.tile_rows * p.tile_cols * p.steps / (32 * pointwise.NUM_WARPS)
        assert kernel.issued(p.steps, "STG.E.128") * 16 / BF16.itemsize == pytest.approx(
            numbers, rel=0.1
        )
        cycles = moved / BANDWIDTH * PROCESSORS * CLOCK
        slow = row.name in LONG_FORWARD and not sums
        assert (kernel.issued(p.steps) / numbers > LANES * cycles) == slow
        assert kernel.issued(p.steps, *SPECIAL) / numbers <= SPECIAL_LANES * cycles


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("arch", ARCHES)
def test_every_arch_and_dtype(arch: int, dtype: torch.dtype) -> None:
    for name, layout in (("leaky_relu", "channels_last"), ("tanh", "nchw"), ("swish", "flat")):
        kernels = both(ACTIVATIONS[name], SHAPES[layout], dtype, arch)
        assert_no_spills(*kernels)
        assert_vectors(kernels, dtype)


@pytest.mark.parametrize("layout", ["channels_last, 24", *ODD])
def test_odd_shapes(layout: str) -> None:
    shape = {**SHAPES, **ODD}[layout]
    for dtype in (BF16, F32):
        kernels = both(ACTIVATIONS["tanh"], shape, dtype, 90)
        assert_no_spills(*kernels)
        if layout in SHAPES:
            assert_vectors(kernels, dtype)


def test_pointers_that_are_not_aligned() -> None:
    row = ACTIVATIONS["tanh"]
    p = plan(SHAPES["channels_last"], BF16, False)
    kernel = compile_bias_act(p, BF16, row.id, 90, aligned=False)
    assert kernel.vectors("ld") == kernel.vectors("st") == 0
    assert_no_spills(kernel)


def test_without_bias_gradient() -> None:
    p = plan(SHAPES["channels_last"], BF16, False)
    kernel = compile_act_grad(p, BF16, ACTIVATIONS["gelu"].id, 90, False, bias_grad=False)
    assert_no_spills(kernel)
    assert kernel.vectors("st") == 2


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_second_stage_of_the_sums(dtype: torch.dtype) -> None:
    for arch in ARCHES:
        kernel = compile_reduce(dtype, arch)
        assert_no_spills(kernel)
        assert kernel.vectors("ld") > 0
    assert "i64" in compile_reduce(dtype, 90, wide=True).index_types()


@pytest.mark.parametrize("layout", SHAPES)
def test_index_width(layout: str) -> None:
    numel, channels, inner = SHAPES[layout]
    huge = (2**31 // numel + 1) * numel, channels, inner
    row = ACTIVATIONS["leaky_relu"]
    for shape, width in (((numel, channels, inner), "i32"), (huge, "i64")):
        for kernel in both(row, shape, BF16, 90):
            assert kernel.index_types() == {width}
            assert_no_spills(kernel)
    for kernel in both(row, huge, BF16, 90):  # no product of an index is taken in 32 bits
        for product in re.findall(r"arith\.muli .*", kernel.mlir):
            assert "i64" in product or "step" in product


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_doubles_stay_doubles(row: Activation) -> None:
    """In float64 kernels no constant has passed through float32 and lost bits."""
    p = make_plan(4096, 16, 1, 8, False)
    kernels = [compile_bias_act(p, F64, row.id, 90, F64)]
    for save_output in {False, row.saves == "output"}:
        kernels.append(compile_act_grad(p, F64, row.id, 90, save_output, False, F64))
    for kernel in kernels:
        assert "arith.truncf" not in kernel.mlir
        for function in kernel.mlir.split("tt.func"):
            constants = dict(re.findall(r"(%\w+) = arith\.constant (?:dense<)?([^ >]+)", function))
            for name in re.findall(r"arith\.extf (%\w+)", function):
                assert (float(constants[name]) * 256).is_integer()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_full_matrix(row: Activation, arch: int) -> None:
    for dtype, layout in itertools.product((BF16, F16, F32, F64), SHAPES):
        kernels = both(row, SHAPES[layout], dtype, arch)
        assert_no_spills(*kernels, activation=row.name)
        assert_vectors(kernels, dtype)


def test_cpu_tensors_are_refused() -> None:
    args = (torch.zeros(3), None, 0, ActSpec("relu").kernel_args)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        pointwise.bias_act(*args)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        pointwise.bias_act_(*args)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        pointwise.act_grad(args[0], *args, True, True)


def test_importing_touches_no_driver() -> None:
    code = (
        "import fusedshape.kernels.pointwise, torch; from triton.runtime import driver;"
        "assert driver._default is None and driver._active is None;"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
