"""The engine "triton": kernels of `fusedshape.kernels` on CUDA, activation included."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fusedshape.ops import schema
from fusedshape.ops.engines.kernel_engine import KernelEngine
from fusedshape.ops.layer import Layer

HAS_TRITON = importlib.util.find_spec("triton") is not None
#: Whether Triton's kernels run in its interpreter, which serves CPU tensors too.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class Triton(KernelEngine):
    """Triton, which is imported by the first call of a kernel."""

    name = "triton"
    devices = ("cuda", "cpu") if INTERPRET else ("cuda",)
    pass_devices = ("cuda",)

    def __init__(self) -> None:
        super().__init__()
        for module, operators in (("pointwise", schema.PASSES), ("conv", schema.LAYERS)):
            for operator, signature in operators.items():
                launch = _launcher(module, operator, signature)
                for device in self.devices:
                    schema.implement(f"{self.name}_{operator}", launch, device)

    def unavailable(self, device: str) -> Exception | None:
        if not HAS_TRITON:
            return RuntimeError("backend 'triton' needs the triton package, which is not installed")
        if device not in self.devices:
            return ValueError(
                f"backend 'triton' serves CUDA tensors, got one on {device}; on the CPU it runs "
                "only in Triton's interpreter (TRITON_INTERPRET=1, set before Python starts)"
            )
        return None

    def refuses(self, x: Tensor, layer: Layer) -> str | None:
        from fusedshape.kernels import conv  # imports Triton

        if layer.geometry is not None:
            return conv.why_not(x, layer.weight, groups=layer.geometry.groups)
        matrix = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return conv.why_not(matrix, layer.weight, groups=1)


def _launcher(module: str, name: str, signature: str) -> Callable[..., Any]:
    """The kernel `name`, imported by its first call; it takes an activation's constants as one."""
    before, constants, _ = signature.partition(schema.CONSTANTS)
    begin, end = before.count(","), before.count(",") + schema.CONSTANTS.count(",") + 1

    def kernel(*args: Any) -> Any:
        launch = getattr(importlib.import_module(f"fusedshape.kernels.{module}"), name)
        if not constants:
            return launch(*args)
        return launch(*args[:begin], args[begin:end], *args[end:])

    return kernel
