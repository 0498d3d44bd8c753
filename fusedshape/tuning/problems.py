"""A problem as a key of the cache, and as tensors to measure with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedshape.activations import ACTIVATIONS
from fusedshape.ops import choice, dispatch
from fusedshape.ops.checks import Geometry
from fusedshape.ops.engines.protocol import LayerEngine
from fusedshape.ops.layer import Before, Layer, channel_dim
from fusedshape.ops.problem import Direction, Problem
from fusedshape.spec import ActSpec, saves_output


class Settings(NamedTuple):
    """torch's switches for the speed and precision of "aten" on a GPU; all off on a CPU."""

    benchmark: bool
    deterministic: bool
    tf32: bool


# From torch._C, because the public attributes take longer than the rest of a look-up.
_benchmark = torch._C._get_cudnn_benchmark
_cudnn_deterministic = torch._C._get_cudnn_deterministic
_all_deterministic = torch._C._get_deterministic_algorithms
_precision = torch._C._get_fp32_precision_getter


def switches(dtype: torch.dtype, linear: bool) -> tuple[bool, bool, bool]:
    """The current `Settings` for a layer of this dtype, as a plain tuple, which is faster."""
    return (
        _benchmark(),
        _cudnn_deterministic() or _all_deterministic(),
        dtype is torch.float32 and _precision("cuda", "matmul" if linear else "conv") == "tf32",
    )


def settings(problem: Problem) -> Settings:
    """The current switches that count for a problem."""
    if problem.device != "cuda":
        return Settings(benchmark=False, deterministic=False, tf32=False)
    return Settings(*switches(problem.dtype, len(problem.weight) == 2))


def bucket(size: int) -> int:
    """The least power of two that is not below `size`.

    Example:
        >>> [bucket(n) for n in (1, 2, 3, 32, 33)]
        [1, 2, 4, 32, 64]
    """
    # With a symbolic size, each comparison is a guard, and so the bucket's bounds are all that
    # torch.compile compiles anew for.
    power = 1
    while power < size:
        power *= 2
    return power


def size_of(problem: Problem) -> int:
    """The batch, or the rows of a linear layer."""
    if len(problem.weight) > 2:
        return problem.input[0]
    rows = 1
    for n in problem.input[:-1]:
        rows *= n
    return rows


def is_passed_over(problem: Problem) -> bool:
    """Whether "auto" gives a layer to "aten" without looking up what has been measured.

    It does so for small inputs on a CPU, but not under torch.compile.
    """
    if problem.device != "cpu":
        return False
    return choice.only_aten("auto", empty_input(problem, torch.device("cpu")))


def resized(problem: Problem, size: int) -> Problem:
    """The same layer with another batch, or number of rows."""
    rest = problem.input[1:] if len(problem.weight) > 2 else problem.input[-1:]
    return problem._replace(input=(size, *rest))


def key_of(direction: Direction, problem: Problem) -> dict[str, Any]:
    """The key of a measurement under torch's current switches, one for each bucket."""
    fields = resized(problem, bucket(size_of(problem)))._asdict()
    for name in ("device", "capability"):
        del fields[name]  # part of the environment
    fields["dtype"] = str(problem.dtype).removeprefix("torch.")
    return {"direction": direction, **fields, **settings(problem)._asdict()}


def terms_of(direction: Direction, problem: Problem) -> int:
    """How many numbers, at most, are added up for one element of a direction's result."""
    taps = math.prod(problem.weight[2:])
    if direction == "fprop":
        return math.prod(problem.weight[1:])
    pixels = size_of(problem) * math.prod(problem.input[2:] if taps else ())
    if direction == "wgrad":
        return pixels
    return max(problem.weight[0] * taps, pixels if direction == "dgrad_act" else 0)


class Operands(NamedTuple):
    """Tensors of a layer, distributed as in a network at its start."""

    x: Tensor
    layer: Layer
    before: Before
    dz: Tensor

    def call(self, own: LayerEngine, direction: Direction) -> Sequence[Tensor]:
        """Let an engine compute one direction."""
        x, layer, before, dz = self
        if direction == "fprop":
            return [own.fprop_act(x, layer)]
        if direction == "wgrad":
            return [own.wgrad(dz, x, layer)]
        found = own.dgrad(dz, x, layer, before if direction == "dgrad_act" else None)
        return [t for t in found if t is not None]


def spec_of(problem: Problem) -> ActSpec:
    """Constants to measure with; which ones does not change how fast a kernel is."""
    slope = 0.5 if ACTIVATIONS[problem.activation].has_slope else 0.0
    for spec in (
        ActSpec(problem.activation, negative_slope=slope),
        ActSpec(problem.activation, output_shift=0.125, negative_slope=-slope),
    ):
        if saves_output(spec, problem.dtype) == problem.saves_output:
            return spec
    raise ValueError(
        f"no {problem.activation} has saves_output={problem.saves_output} in {problem.dtype}"
    )


def geometry_of(problem: Problem) -> Geometry | None:
    """The convolution's geometry; None for a linear layer."""
    p = problem
    if len(p.weight) == 2:
        return None
    zeros = [0] * len(p.stride)
    return Geometry(list(p.stride), list(p.padding), list(p.dilation), False, zeros, p.groups)


def empty_input(problem: Problem, device: torch.device) -> Tensor:
    """A tensor of the input's shape, dtype and layout, without numbers."""
    batch, *rest = problem.input
    if not problem.channels_last or len(problem.weight) == 2:
        return torch.empty(problem.input, dtype=problem.dtype, device=device)
    shape = batch, *rest[1:], rest[0]
    return torch.empty(shape, dtype=problem.dtype, device=device).movedim(-1, 1)


def empty_layer(problem: Problem, device: torch.device) -> tuple[Tensor, Layer]:
    """An input and a layer without numbers, for questions about them."""
    x = empty_input(problem, device)
    weight = torch.empty(problem.weight, dtype=problem.dtype, device=device)
    kernels = dispatch.choose("auto", x)
    return x, Layer(weight, None, spec_of(problem), geometry_of(problem), kernels)


def operands(problem: Problem, base: LayerEngine, device: torch.device) -> Operands:
    """Tensors to measure a problem with; always the same, without torch's global generators.

    Args:
        problem: the layer.
        base: an engine that can compute it.
        device: where the tensors are to be.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(like: Tensor, scale: float = 1.0) -> Tensor:
        numbers = torch.empty_like(like, dtype=torch.float32)
        return numbers.normal_(0.0, scale, generator=generator).to(problem.dtype)

    def vector(size: int) -> Tensor:
        return normal(torch.empty(size, device=device), 0.1)

    spec, geometry = spec_of(problem), geometry_of(problem)
    z = normal(empty_input(problem, device))
    fan_in = math.prod(problem.weight[1:])
    weight = normal(torch.empty(problem.weight, device=device), fan_in**-0.5)
    if problem.channels_last and geometry is not None:
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    kernels = dispatch.choose("auto", z)
    dim = channel_dim(z, geometry)
    before_bias = vector(problem.input[dim])
    x = kernels.bias_act(z, before_bias, spec, dim)
    before = Before(x if saves_output(spec, z.dtype) else z, before_bias, spec, kernels, True)
    layer = Layer(weight, None, spec, geometry, kernels)
    dz = normal(base.fprop(x, layer))
    return Operands(x, layer._replace(bias=vector(problem.weight[0])), before, dz)
