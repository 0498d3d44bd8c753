"""Which backend runs a call, and why another cannot."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, Protocol

import torch
from torch import Tensor

from fusedshape import native, reference
from fusedshape.ops import schema
from fusedshape.ops.checks import transformed
from fusedshape.spec import ActSpec, saves_output
from fusedshape.validate import shown

Backend = Literal["auto", "reference", "native", "triton"]


class Kernels(Protocol):
    """The kernel contract of ARCHITECTURE.md, as one backend serves it."""

    name: str

    def bias_act(self, x: Tensor, bias: Tensor | None, spec: ActSpec, dim: int) -> Tensor:
        """Return y, freshly allocated."""

    def bias_act_(self, x: Tensor, bias: Tensor | None, spec: ActSpec, dim: int) -> None:
        """Overwrite x with y."""

    def act_grad(
        self,
        grad: Tensor,
        saved: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        dim: int,
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of x + b, and its sum over all but the channel if `bias_grad`."""

    def act_grad_(
        self,
        grad: Tensor,
        saved: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        dim: int,
        bias_grad: bool,
    ) -> Tensor | None:
        """Overwrite grad with the gradient of x + b, and return its sums."""


class _Reference:
    name = "reference"

    def bias_act(self, x: Tensor, bias: Tensor | None, spec: ActSpec, dim: int) -> Tensor:
        return reference.bias_act(x, bias, spec, dim)

    def bias_act_(self, x: Tensor, bias: Tensor | None, spec: ActSpec, dim: int) -> None:
        x.copy_(reference.bias_act(x, bias, spec, dim))

    def act_grad(
        self,
        grad: Tensor,
        saved: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        dim: int,
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dx = reference.act_grad(grad, saved, bias, spec, dim)
        return dx, reference.channel_sum(dx, dim) if bias_grad else None

    def act_grad_(
        self,
        grad: Tensor,
        saved: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        dim: int,
        bias_grad: bool,
    ) -> Tensor | None:
        dx, total = self.act_grad(grad, saved, bias, spec, dim, bias_grad)
        grad.copy_(dx)
        return total


class _Library:
    def __init__(self, name: str) -> None:
        self.name = name
        ops = torch.ops.fusedshape
        self._bias_act = getattr(ops, f"{name}_bias_act").default
        self._bias_act_ = getattr(ops, f"{name}_bias_act_").default
        self._act_grad = getattr(ops, f"{name}_act_grad").default
        self._act_grad_ = getattr(ops, f"{name}_act_grad_").default

    def bias_act(self, x: Tensor, bias: Tensor | None, spec: ActSpec, dim: int) -> Tensor:
        return self._bias_act(x, bias, dim, *spec.kernel_args)

    def bias_act_(self, x: Tensor, bias: Tensor | None, spec: ActSpec, dim: int) -> None:
        self._bias_act_(x, bias, dim, *spec.kernel_args)

    def act_grad(
        self,
        grad: Tensor,
        saved: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        dim: int,
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        save_output = saves_output(spec, saved.dtype)
        args = (grad, saved, bias, dim, *spec.kernel_args, save_output, bias_grad)
        dx, total = self._act_grad(*args)
        return dx, total if bias_grad else None

    def act_grad_(
        self,
        grad: Tensor,
        saved: Tensor,
        bias: Tensor | None,
        spec: ActSpec,
        dim: int,
        bias_grad: bool,
    ) -> Tensor | None:
        save_output = saves_output(spec, saved.dtype)
        args = (grad, saved, bias, dim, *spec.kernel_args, save_output, bias_grad)
        total = self._act_grad_(*args)
        return total if bias_grad else None


_KERNELS: dict[str, Kernels] = {
    "reference": _Reference(),
    **{name: _Library(name) for name in schema.KERNEL_BACKENDS},
}
BACKENDS: tuple[str, ...] = ("auto", *_KERNELS)
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def choose(backend: str, x: Tensor) -> Kernels:
    """Kernels for a tensor on x's device.

    "auto" takes csrc for CPU tensors, Triton for CUDA tensors, and the reference where that is not
    to be had (`fusedshape info` says which). Any other name is taken at its word.

    Raises:
        ValueError: unknown backend, or one that does not serve x's device, or kernels named under
            a torch.func transform or an export.
        RuntimeError: the backend is not built or not installed.
    """
    if backend == "auto":
        if x.is_cpu and native.available():
            return _KERNELS["native"]
        if x.is_cuda and HAS_TRITON:
            return _KERNELS["triton"]
        return _KERNELS["reference"]
    reason = why_not(backend, x.device.type)
    if reason is not None:
        raise reason
    refuse_transforms("backend", backend)
    return _KERNELS[backend]


def refuse_transforms(what: str, name: str) -> None:
    """Raise where `transformed` and `name` means kernels."""
    if name in schema.KERNEL_BACKENDS and transformed():
        refuse(what, name)


def refuse(what: str, name: str) -> None:
    """Raise if `name` means kernels, where plain PyTorch must serve."""
    if name in schema.KERNEL_BACKENDS:
        raise ValueError(
            f"{what} {name!r} cannot run under torch.func transforms, forward-mode AD, "
            "torch.jit.trace or, unless under torch.no_grad, torch.export, nor on tensors of other "
            f"classes; with {what}='auto' plain PyTorch serves them"
        )


def why_not(backend: str, device: str) -> Exception | None:
    """The error that naming `backend` for a tensor on `device` deserves; None if it can run."""
    if not isinstance(backend, str) or backend not in _KERNELS:
        return ValueError(f"unknown backend {shown(backend)}; known: {', '.join(BACKENDS)}")
    if backend == "native":
        if device != "cpu":
            return ValueError(f"backend 'native' serves CPU tensors, got one on {device}")
        if not native.available():
            return RuntimeError(f"backend 'native' is not to be had: {native.why_not()}")
    if backend == "triton":
        if not HAS_TRITON:
            return RuntimeError("backend 'triton' needs the triton package, which is not installed")
        if device != "cuda" and not (device == "cpu" and INTERPRET):
            return ValueError(
                f"backend 'triton' serves CUDA tensors, got one on {device}; on the CPU it runs "
                "only in Triton's interpreter (TRITON_INTERPRET=1, set before Python starts)"
            )
    return None
