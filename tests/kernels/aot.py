"""Compiles kernels for GPUs that are not there, and reads what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedshape.activations import ACTIVATIONS
from fusedshape.kernels import pointwise, reduction
from fusedshape.kernels.host import Gpu
from fusedshape.kernels.pointwise import Plan

ARCHES = (80, 90, 100)
NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
DOUBLES = ("negative_slope", "input_scale", "input_shift", "output_shift", "output_scale")
#: A100, H100 or H200, B200, and the bytes of shared memory that a program can have there.
GPUS = {80: Gpu(80, 108), 90: Gpu(90, 132), 100: Gpu(100, 148)}
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    registers: int
    spills: int
    stack: int
    shared: int
    ptx: str
    mlir: str
    cubin: bytes

    def vectors(self, what: str) -> int:
        """Number of 16-byte accesses to global memory; `what` is "ld" or "st"."""
        return self._accesses(what).count(16)

    def widths(self, what: str) -> set[int]:
        """Widths in bytes of the accesses to global memory."""
        return set(self._accesses(what))

    def copies(self) -> set[int]:
        """Widths in bytes of the copies from global to shared memory."""
        found = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], 0x(\w+)", self.ptx)
        return {int(width, 16) for width in found}

    def shared_stores(self) -> set[int]:
        """Bytes of each store to shared memory."""
        found = re.findall(r"\bst\.shared(?:::cta)?(?:\.v(\d))?\.b(\d+)", self.ptx)
        return {int(n or 1) * int(bits) // 8 for n, bits in found}

    def index_types(self) -> set[str]:
        """Integer types by which tiles of pointers are moved."""
        return set(re.findall(r"tt\.addptr .*tensor<[\dx]+x(i\d+)>", self.mlir))

    @property
    def serial(self) -> bool:
        """Whether warp groups wait for each of their products before they begin the next."""
        products = [i for i in self._instructions[0] if "GMMA" in i]
        return bool(products) and all("gsb0" in i for i in products)

    def loop(self) -> list[str]:
        """The instructions of the shortest loop in which tensor cores multiply."""
        bodies = [self._instructions[0][loop.start : loop.stop] for loop in self._loops()]
        return min((body for body in bodies if any("MMA" in i for i in body)), key=len)

    def issued(self, turns: int, *names: str) -> int:
        """Instructions of such names (all if none) that a thread issues when its loop turns so."""
        instructions = self._instructions[0]
        last = max(i for i, instruction in enumerate(instructions) if "EXIT" in instruction)
        repeated = {i for loop in self._loops() for i in loop}
        return sum(
            turns if i in repeated else 1
            for i, instruction in enumerate(instructions[: last + 1])
            if not names or any(name in instruction for name in names)
        )

    def _loops(self) -> list[range]:
        """Where among the instructions the loops are."""
        instructions, labels = self._instructions
        loops = []
        for end, instruction in enumerate(instructions):
            target = re.search(r"\bBRA\b.*?(\.L_\w+)", instruction)
            if target and labels[target[1]] < end:
                loops.append(range(labels[target[1]], end + 1))
        return loops

    @cached_property
    def _instructions(self) -> tuple[list[str], dict[str, int]]:
        """Of the machine code, and where among them its labels are."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel"
            path.write_bytes(self.cubin)
            text = _run(TOOLS / "nvdisasm", "-c", path)
        found: list[str] = []
        labels = {}
        for label, instruction in re.findall(r"^(\.L_\w+):|/\*[0-9a-f]+\*/ +(.*?);", text, re.M):
            if label:
                labels[label] = len(found)
            else:
                found.append(instruction)
        return found, labels

    def _accesses(self, what: str) -> list[int]:
        found = re.findall(rf"\b{what}\.global(?:\.[a-z]\w*)*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        return [int(n or 1) * int(bits) // 8 for n, bits in found]


def compile_kernel(
    kernel: Any,
    pointers: dict[str, torch.dtype | None],
    constexprs: dict[str, Any],
    arch: int,
    options: dict[str, int],
    aligned: bool = True,
    specialised: tuple[str, ...] = (),
) -> Compiled:
    """Compile as a launch with such pointers (None: not given) and constexprs would."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(constexprs)
    attributes = {}
    for i, param in enumerate(kernel.params):
        name = param.name
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in pointers:
            dtype = pointers[name]
            signature[name] = "constexpr" if dtype is None else f"*{NAMES[dtype]}"
            if dtype is None:
                constants[name] = None
            elif aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif param.annotation_type:
            signature[name] = param.annotation_type
        else:
            signature[name] = "i32"  # even of a huge tensor, rows and vectors are that small
            if name in specialised:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _read(built, arch)


def _read(built: Any, arch: int) -> Compiled:
    """Shared memory and texts of a compiled kernel, and what its machine code says of itself."""
    ptx = built.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel"
        path.write_bytes(built.asm["cubin"])
        usage = _run(TOOLS / "cuobjdump", "-res-usage", path)
        registers, stack = _numbers(r"REG:(\d+) STACK:(\d+)", usage)
        spills = 0
        if stack:  # without one nothing is spilled
            path.write_text(ptx)
            (target,) = re.findall(r"\.target (sm_\w+)", ptx)
            ptxas = TOOLS / ("ptxas-blackwell" if arch >= 100 else "ptxas")
            log = _run(ptxas, "-v", f"-arch={target}", path, "-o", Path(folder) / "cubin")
            spills = sum(_numbers(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log))
    texts = ptx, built.asm["source"], built.asm["cubin"]
    return Compiled(registers, spills, stack, built.metadata.shared, *texts)


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    found = re.search(pattern, text)
    assert found is not None, text
    return tuple(map(int, found.groups()))


def plan_constexprs(plan: Plan) -> dict[str, Any]:
    return {
        "BY_COLUMN": plan.by_column,
        "VECTOR": plan.vector,
        "ROWS": plan.tile_rows,
        "COLS": plan.tile_cols,
        "WIDE": plan.wide,
    }


def compile_bias_act(
    plan: Plan,
    dtype: torch.dtype,
    activation: int,
    arch: int,
    bias: torch.dtype | None = torch.float32,
    aligned: bool = True,
) -> Compiled:
    return compile_kernel(
        pointwise._bias_act_kernel,
        {"x_ptr": dtype, "bias_ptr": bias, "y_ptr": dtype},
        {
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "WHOLE_ROWS": plan.whole_rows,
            **plan_constexprs(plan),
        },
        arch,
        pointwise.launch_options(activation, dtype),
        aligned,
    )


def compile_act_grad(
    plan: Plan,
    dtype: torch.dtype,
    activation: int,
    arch: int,
    save_output: bool,
    bias_grad: bool = True,
    bias: torch.dtype | None = torch.float32,
    aligned: bool = True,
) -> Compiled:
    if save_output:
        bias = None
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return compile_kernel(
        pointwise._act_grad_kernel,
        {
            "grad_ptr": dtype,
            "saved_ptr": dtype,
            "bias_ptr": bias,
            "dx_ptr": dtype,
            "sums_ptr": sums,
        },
        {
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "SAVE_OUTPUT": save_output,
            "BIAS_GRAD": bias_grad,
            **plan_constexprs(plan),
        },
        arch,
        pointwise.launch_options(activation, dtype),
        aligned,
    )


def compile_reduce(dtype: torch.dtype, arch: int, wide: bool = False) -> Compiled:
    return compile_kernel(
        reduction._reduce_kernel,
        {"sums_ptr": dtype, "out_ptr": dtype},
        {"PARTS": reduction.CHANNEL_PARTS, "ROWS": 256, "COLS": 16, "WIDE": wide},
        arch,
        {"num_warps": 8},
        specialised=("channels",),
    )


class Recorder:
    """Stands in for a kernel and keeps its last launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        self.grid = grid
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options

    def compile(self, arch: int, floats: str = "fp32") -> Compiled:
        """Compile the launch as Triton would; `floats` is how it types those in a tuple."""
        names = [param.name for param in self.kernel.params]
        given = dict(zip(names, self.args, strict=False)) | self.options
        options = {name: value for name, value in self.options.items() if name not in names}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def type_of(value: Any, *path: int) -> Any:
            if value is None:
                constants[path] = None
                return "constexpr"
            if isinstance(value, TensorDescriptor):
                block = ", ".join(map(str, value.block_shape))
                return f"tensordesc<{NAMES[value.base.dtype]}[{block}]>"
            if isinstance(value, Tensor):
                if value.data_ptr() % 16 == 0:
                    attributes[path] = [["tt.divisibility", 16]]
                return f"*{NAMES[value.dtype]}"
            if isinstance(value, float):
                return floats if len(path) > 1 else "fp64"
            if isinstance(value, tuple):
                types = [type_of(one, *path, i) for i, one in enumerate(value)]
                return type(value)(*types)
            assert len(path) == 1, "whole numbers in a tuple are specialised"
            assert self.kernel.params[path[0]].do_not_specialize
            return "i32" if value < 2**31 else "i64"

        signature: dict[str, Any] = {}
        for i, param in enumerate(self.kernel.params):
            if param.is_constexpr:
                signature[param.name], constants[(i,)] = "constexpr", given[param.name]
            else:
                signature[param.name] = type_of(given[param.name], i)
        source = ASTSource(self.kernel, signature, constants, attributes)
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert built.metadata.global_scratch_size == 0
        return _read(built, arch)


#: The instruction by which tensor cores multiply.
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def multiplies(kernel: Compiled) -> str:
    """The instruction by which the kernel multiplies."""
    found = (name for name in reversed(TENSOR_CORES.values()) if name in kernel.ptx)
    return next(found, "fma")


def assert_no_spills(*kernels: Compiled, activation: str = "leaky_relu") -> None:
    """Hold kernels to registers; libdevice reduces huge arguments of sin and cos in an array."""
    for kernel in kernels:
        assert kernel.spills == 0, (
            f"{activation} spills; its row in activations.py may ask for more registers than "
            f"{ACTIVATIONS[activation].registers!r}"
        )
        assert kernel.stack <= (48 if activation in ("sin", "cos") else 0)
