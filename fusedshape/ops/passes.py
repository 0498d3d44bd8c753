"""What runs the activation as a pass over memory by itself: the protocol, and its two kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fusedshape import reference
from fusedshape.spec import ActSpec, saves_output


class Kernels(Protocol):
    """The kernel contract of ARCHITECTURE.md, as one backend serves it.

    Attributes:
        name: the backend's, as a call names it.
        devices: types of the devices whose tensors backend "auto" gives it.
    """

    name: str
    devices: tuple[str, ...]

    def unavailable(self, device: str) -> Exception | None:
        """The error to raise if a call insists on this backend on `device`; None if it can run."""

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


class ReferencePass:
    """The pass in plain PyTorch, for every device."""

    name = "reference"
    devices: tuple[str, ...] = ()

    def unavailable(self, device: str) -> Exception | None:
        """None: it runs everywhere."""
        return None

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


class OperatorPass:
    """The pass by the operators `<name>_bias_act` and so on of `fusedshape.ops.schema`.

    Args:
        name: the backend's.
        devices: types of the devices that backend "auto" takes it for.
        unavailable: as `Kernels.unavailable`.
    """

    def __init__(
        self,
        name: str,
        devices: tuple[str, ...],
        unavailable: Callable[[str], Exception | None],
    ) -> None:
        self.name = name
        self.devices = devices
        self.unavailable = unavailable
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


REFERENCE: Kernels = ReferencePass()
