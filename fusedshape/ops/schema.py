"""The dispatcher's view of the kernels: signatures, and shape rules (fakes).

`native_*` are implemented for CPU tensors by csrc, `triton_*` for CUDA tensors (and for CPU tensors
under ``TRITON_INTERPRET=1``) by `fusedshape.kernels`. The contract is in ARCHITECTURE.md. They are
for the autograd functions beside this file: by themselves they neither differentiate nor count the
versions of what they overwrite.

The convolutions (`triton_conv*`) take and give tensors (N, C, H, W) or (N, C, L) whose channels are
innermost in memory, or contiguous matrices (M, C) where the weight is one: a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from fusedshape.reference import opmath_dtype

#: The engines whose operators are defined.
DEFINED: list[str] = []

#: The constants of an activation in a signature.
CONSTANTS = (
    "int activation, float negative_slope, float input_scale, float input_shift, "
    "float output_shift, float output_scale"
)
#: The activation by itself.
PASSES = {
    "bias_act": f"(Tensor x, Tensor? bias, int dim, {CONSTANTS}) -> Tensor",
    "bias_act_": f"(Tensor(a!) x, Tensor? bias, int dim, {CONSTANTS}) -> ()",
    "act_grad": (
        f"(Tensor grad, Tensor saved, Tensor? bias, int dim, {CONSTANTS}, "
        "bool save_output, bool bias_grad) -> (Tensor, Tensor)"
    ),
    "act_grad_": (
        f"(Tensor(a!) grad, Tensor saved, Tensor? bias, int dim, {CONSTANTS}, "
        "bool save_output, bool bias_grad) -> Tensor"
    ),
}
_GEOMETRY = "int[] stride, int[] padding, int[] dilation"
#: Layers, with the activation and without.
LAYERS = {
    "conv_act": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float residual_weight, "
        f"{_GEOMETRY}, {CONSTANTS}) -> Tensor"
    ),
    "conv": f"(Tensor x, Tensor weight, {_GEOMETRY}) -> Tensor",
    "conv_dgrad": (
        "(Tensor dz, Tensor weight, Tensor? saved, Tensor? bias, SymInt[] input_size, "
        f"{_GEOMETRY}, {CONSTANTS}, bool save_output, bool bias_grad) -> (Tensor, Tensor)"
    ),
    "conv_wgrad": f"(Tensor dz, Tensor x, SymInt[] weight_size, {_GEOMETRY}) -> Tensor",
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


def _fake_act_grad_(
    grad: Tensor, saved: Tensor, bias: Tensor | None, dim: int, *rest: Any
) -> Tensor:
    return saved.new_empty(saved.shape[dim] if rest[-1] else 0, dtype=opmath_dtype(saved.dtype))


def _channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    batch, channels, *spatial = shape
    return like.new_empty(batch, *spatial, channels).movedim(-1, 1)


def _fake_conv(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False)
    spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return _channels_last(x, [x.shape[0], weight.shape[0], *spatial])


def _fake_conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *constants: float,
) -> Tensor:
    return _fake_conv(x, weight, stride, padding, dilation)


def _fake_conv_dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    bias: Tensor | None,
    input_size: Sequence[int],
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    channels = input_size[1] if rest[-1] else 0
    return _channels_last(dz, input_size), dz.new_empty(channels, dtype=torch.float32)


def _fake_conv_wgrad(
    dz: Tensor, x: Tensor, weight_size: Sequence[int], *geometry: Sequence[int]
) -> Tensor:
    return _channels_last(x, weight_size)


_FAKES: dict[str, Callable[..., Any]] = {
    "bias_act": _fake_bias_act,
    "bias_act_": _fake_bias_act_,
    "act_grad": _fake_act_grad,
    "act_grad_": _fake_act_grad_,
    "conv_act": _fake_conv_act,
    "conv": _fake_conv,
    "conv_dgrad": _fake_conv_dgrad,
    "conv_wgrad": _fake_conv_wgrad,
}


_library = library.Library("fusedshape", "DEF")


def define(engine: str, passes: bool = True) -> None:
    """Define the operators ``<engine>_…``, for all devices; `implement` says what they run.

    Args:
        engine: the name that theirs begin with.
        passes: whether the activation by itself is among them.

    Example:
        >>> sorted(DEFINED)
        ['cudnn', 'cudnn_or_aten', 'native', 'triton']
    """
    for name, signature in (LAYERS | (PASSES if passes else {})).items():
        operator = f"{engine}_{name}"
        _library.define(operator + signature, tags=(torch.Tag.pt2_compliant_tag,))
        library.register_fake(f"fusedshape::{operator}", _FAKES[name], lib=_library)
    DEFINED.append(engine)


def implement(operator: str, kernel: Callable[..., Any], device: str) -> None:
    """Let an operator run `kernel` on tensors of a type of device."""
    _library.impl(operator, kernel, device.upper())
