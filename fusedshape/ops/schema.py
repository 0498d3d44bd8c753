"""The dispatcher's view of the kernels: schemas, shape rules (fakes), and who implements them.

`native_*` are implemented for CPU tensors by csrc, `triton_*` for CUDA tensors (and for CPU tensors
under ``TRITON_INTERPRET=1``) by `fusedshape.kernels`. The contract is in ARCHITECTURE.md. They are
for the autograd functions beside this file: by themselves they neither differentiate nor count the
versions of what they overwrite.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedshape import native
from fusedshape.reference import opmath_dtype

KERNEL_BACKENDS = ("native", "triton")

_CONSTANTS = (
    "int activation, float negative_slope, float input_scale, float input_shift, "
    "float output_shift, float output_scale"
)
_SCHEMAS = {
    "bias_act": f"(Tensor x, Tensor? bias, int dim, {_CONSTANTS}) -> Tensor",
    "bias_act_": f"(Tensor(a!) x, Tensor? bias, int dim, {_CONSTANTS}) -> ()",
    "act_grad": (
        f"(Tensor grad, Tensor saved, Tensor? bias, int dim, {_CONSTANTS}, "
        "bool save_output, bool bias_grad) -> (Tensor, Tensor)"
    ),
}


def _fake_bias_act(x: Tensor, bias: Tensor | None, dim: int, *constants: float) -> Tensor:
    return torch.empty_like(x)


def _fake_bias_act_(x: Tensor, bias: Tensor | None, dim: int, *constants: float) -> None:
    return None


def _fake_act_grad(
    grad: Tensor, saved: Tensor, bias: Tensor | None, dim: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    bias_grad = rest[-1]
    channels = saved.shape[dim] if bias_grad else 0
    return (
        torch.empty_like(saved, dtype=grad.dtype),
        saved.new_empty(channels, dtype=opmath_dtype(saved.dtype)),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "bias_act": _fake_bias_act,
    "bias_act_": _fake_bias_act_,
    "act_grad": _fake_act_grad,
}


def _triton(name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        from fusedshape.kernels import pointwise  # Triton is imported by the first call, not before

        return getattr(pointwise, name)(*args)

    return kernel


_library = torch.library.Library("fusedshape", "DEF")
for _backend in KERNEL_BACKENDS:
    for _name, _schema in _SCHEMAS.items():
        _op = f"{_backend}_{_name}"
        _library.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fusedshape::{_op}", _FAKES[_name], lib=_library)
for _name in _SCHEMAS:
    _library.impl(f"triton_{_name}", _triton(_name), "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _library.impl(f"triton_{_name}", _triton(_name), "CPU")
native.load()
