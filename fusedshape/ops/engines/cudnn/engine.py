"""The engine itself: which layers it takes, and which plans they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fusedshape.compiling import constant_for_dynamo
from fusedshape.ops import schema
from fusedshape.ops.engines.cudnn import building, library
from fusedshape.ops.engines.cudnn.building import NoPlanError
from fusedshape.ops.engines.cudnn.calls import (
    Calls,
    LenientCalls,
    operation_of,
    sums_by_atomics,
)
from fusedshape.ops.engines.cudnn.graph import Kind, Operation
from fusedshape.ops.engines.cudnn.plans import Plans
from fusedshape.ops.engines.kernel_engine import KernelEngine
from fusedshape.ops.engines.protocol import LayerEngine, through
from fusedshape.ops.layer import Before, Layer
from fusedshape.ops.problem import Direction, Problem, problem_of
from fusedshape.spec import saves_output

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PRECISION = (
    "cuDNN's fused convolutions round float32 to tf32; torch.backends.cudnn.conv.fp32_precision = "
    '"tf32" allows it'
)


class Cudnn(KernelEngine):
    """Graphs of cuDNN's, from the package nvidia-cudnn-frontend; imported by its first question.

    A layer needs a plan for each direction, which takes seconds to make: see
    `fusedshape.ops.engines.cudnn.plans`. "auto" takes it only where it has been measured.

    No line of it has run on a device yet. Graphs are computed node by node in tests, and cuDNN
    makes plans of them for GPUs that are described to it.

    Args:
        plans: the plans to use.
        strict: whether a plan that fails is an error; otherwise "aten" computes.
    """

    name = "cudnn"
    devices = ("cuda",)

    def __init__(self, plans: Plans | None = None, strict: bool = True) -> None:
        operators = self.name if strict else f"{self.name}_or_aten"
        super().__init__(operators)
        self.plans = Plans() if plans is None else plans
        calls = (Calls if strict else LenientCalls)(self.plans)
        for operator in schema.LAYERS:
            schema.implement(f"{operators}_{operator}", getattr(calls, operator), "cuda")
        self._lenient = Cudnn(self.plans, strict=False) if strict else self

    @property
    def lenient(self) -> LayerEngine:
        return self._lenient

    def considers(self, x: Tensor) -> bool:
        return library.INSTALLED and x.ndim > 2

    def unavailable(self, device: str) -> Exception | None:
        if device != "cuda":
            return ValueError(f"engine 'cudnn' serves CUDA tensors, got one on {device}")
        reason = library.why_not()
        return None if reason is None else RuntimeError(f"engine 'cudnn' is not there: {reason}")

    def refuses(self, x: Tensor, layer: Layer) -> str | None:
        problem = problem_of(x, layer)
        reason = _why_never(problem)
        # While torch.compile traces, sizes may be symbols; then the call itself asks for the plan.
        if reason is not None or torch.compiler.is_compiling():
            return reason
        joined = layer.shortcut is not None
        kinds: tuple[Kind, ...] = "fprop_act", "fprop", "dgrad", "wgrad"
        operations = [_operation(kind, problem, joined) for kind in kinds]
        return self.plans.why_not(x.device.index or 0, operations)

    def dgrad(
        self, dz: Tensor, x: Tensor, layer: Layer, before: Before | None
    ) -> tuple[Tensor, Tensor | None]:
        if before is None or saves_output(before.spec, dz.dtype):
            return super().dgrad(dz, x, layer, before)
        dx, _ = super().dgrad(dz, x, layer, None)
        return through(dx, layer, before)

    def prepare(
        self,
        cases: Sequence[tuple[Direction, Problem]],
        device: torch.device,
        progress: Callable[[Iterator[None], int], Iterable[None]],
    ) -> None:
        if device.type != "cuda" or library.why_not() is not None:
            return
        index = device.index or 0
        wanted = [
            operation
            for direction, problem in cases
            if _why_never(problem) is None
            for operation in _needed(direction, problem)
        ]
        lacking = self.plans.lacking(index, wanted)
        if lacking:
            for _ in progress(self._made(index, lacking), len(lacking)):
                pass

    def _made(self, index: int, operations: Sequence[Operation]) -> Iterator[None]:
        device = library.device_properties(index)
        for operation, plan in building.build_all(operations, device):
            try:
                if isinstance(plan, NoPlanError):
                    raise plan
                self.plans.keep(index, operation, plan)
            except NoPlanError as error:
                self.plans.give_up(index, operation, str(error))
            yield


def _why_never(problem: Problem) -> str | None:
    """Why no plan can be made for a problem; None if one perhaps can."""
    if len(problem.weight) == 2:
        return "it is a linear layer, and only convolutions are given to cuDNN's graphs"
    if problem.dtype not in _DTYPES:
        return f"cuDNN's graphs are for float16, bfloat16 and float32, got {problem.dtype}"
    if problem.dtype == torch.float32 and not _tf32():
        return _PRECISION
    if problem.capability is not None and problem.capability < library.CAPABILITY:
        own, least = (".".join(map(str, c)) for c in (problem.capability, library.CAPABILITY))
        return f"the GPU has compute capability {own}, cuDNN's fused convolutions need {least}"
    if not problem.channels_last:
        return (
            "its input is not channels_last: channels must be innermost and memory dense; pass "
            "x.to(memory_format=torch.channels_last)"
        )
    if not torch.compiler.is_compiling() and 0 in (*problem.input, *problem.weight):
        return f"its input {problem.input} or weight {problem.weight} has no numbers"
    return None


@constant_for_dynamo
def _tf32() -> bool:
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


def _operation(kind: Kind, problem: Problem, residual: bool = False) -> Operation:
    acts = kind.endswith("act")
    return operation_of(
        kind,
        problem.dtype,
        problem.input,
        problem.weight,
        (problem.stride, problem.padding, problem.dilation),
        problem.activation if acts else None,
        residual and kind == "fprop_act",
        kind == "dgrad_act" and sums_by_atomics(),
    )


def _needed(direction: Direction, problem: Problem) -> list[Operation]:
    """What a direction of a layer gives to cuDNN."""
    kinds: tuple[Kind, ...]
    if direction == "fprop":
        # Where backward needs the pre-activation, a training step stores the product.
        kinds = ("fprop_act",) if problem.saves_output else ("fprop_act", "fprop")
    elif direction == "dgrad_act":
        kinds = ("dgrad_act" if problem.saves_output else "dgrad",)
    else:
        kinds = (direction,)
    return [_operation(kind, problem) for kind in kinds]
