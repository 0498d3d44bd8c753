"""Modules: drop-ins whose parameters and state_dict keys are the plain ones'."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fusedshape import ops
from fusedshape.init import init_module_
from fusedshape.ops.dispatch import Backend
from fusedshape.spec import ActSpec


class ShapedActivation(nn.Module):
    """y = γ(φ(αx + β) + δ), in place of nn.ReLU and its like; no parameters.

    Args:
        spec: the constants.
        backend: as in `fusedshape.ops.shaped_act`.

    Example:
        >>> act = ShapedActivation(ActSpec("tanh", output_scale=2.0))
        >>> act(torch.zeros(3))
        tensor([0., 0., 0.])
    """

    def __init__(self, spec: ActSpec, backend: Backend = "auto") -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape → the same shape."""
        return ops.shaped_act(x, self.spec, backend=self.backend)

    def extra_repr(self) -> str:
        """The constants."""
        return str(self.spec)


class _Shaped:
    """What the shaped twins of nn.Conv*d and nn.Linear share."""

    spec: ActSpec
    backend: Backend

    def __init__(self, *args: Any, spec: ActSpec, backend: Backend = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spec = spec
        self.backend = backend

    @classmethod
    def from_plain(cls, module: nn.Module, spec: ActSpec, backend: Backend = "auto") -> Self:
        """Make the shaped twin of a plain layer, around the very same parameters and hooks.

        Args:
            module: an instance of this class' plain parent.
            spec: the constants of the activation to fuse.
            backend: as in `fusedshape.ops.shaped_act`.

        Raises:
            TypeError: module is of another class.
        """
        plain = cls.__mro__[cls.__mro__.index(_Shaped) + 1]
        if type(module) is not plain:
            raise TypeError(
                f"{cls.__name__}.from_plain: needs a {plain.__name__}, got {type(module).__name__}"
            )
        twin = cls.__new__(cls)
        twin.__dict__.update(module.__dict__)
        twin.spec = spec
        twin.backend = backend
        return twin

    def reset_parameters(self) -> None:
        """Draw weights as the constants assume them: scaled uniform orthogonal, biases zero.

        Convolutions take the Delta form, but for even kernels, which have no centre.
        """
        assert isinstance(self, nn.Module)
        even = any(k % 2 == 0 for k in getattr(self, "kernel_size", ()))
        init_module_(self, "suo_full" if even else "suo")

    def extra_repr(self) -> str:
        """The plain layer's, and the constants."""
        return f"{super().extra_repr()}, {self.spec}"  # type: ignore[misc]


class _ShapedConv(_Shaped):
    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *spatial) or (C, *spatial) → convolution, bias and activation."""
        assert isinstance(self, nn.modules.conv._ConvNd)
        return ops.conv_act(
            x,
            self.weight,
            self.bias,
            self.spec,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            backend=self.backend,
        )


class ShapedConv1d(_ShapedConv, nn.Conv1d):
    """nn.Conv1d fused with its activation; see `ShapedConv2d`."""


class ShapedConv2d(_ShapedConv, nn.Conv2d):
    """nn.Conv2d fused with its activation, y = γ(φ(α(x ⋆ W + b) + β) + δ).

    Takes nn.Conv2d's arguments, and `spec` and `backend` by name. Parameters, state_dict keys and
    attributes are nn.Conv2d's; weights start scaled uniform orthogonal in Delta form, biases zero.

    Args:
        spec: the constants.
        backend: as in `fusedshape.ops.shaped_act`.

    Example:
        >>> spec = ActSpec("leaky_relu", negative_slope=0.4, output_scale=1.3)
        >>> conv = ShapedConv2d(3, 8, 3, padding=1, spec=spec)
        >>> conv(torch.zeros(1, 3, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
        >>> list(conv.state_dict())
        ['weight', 'bias']
    """


class ShapedConv3d(_ShapedConv, nn.Conv3d):
    """nn.Conv3d fused with its activation; see `ShapedConv2d`."""


class ShapedLinear(_Shaped, nn.Linear):
    """nn.Linear fused with its activation, y = γ(φ(α(x Wᵀ + b) + β) + δ); see `ShapedConv2d`.

    Example:
        >>> layer = ShapedLinear(4, 2, spec=ActSpec("softplus"))
        >>> layer(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) → (..., out_features)."""
        return ops.linear_act(x, self.weight, self.bias, self.spec, backend=self.backend)


class PerLocationNorm(nn.Module):
    r"""Per-location normalisation (PLN) of a network's input: every location gets q = 1.

    Appends one homogeneous channel h, so that the scale of a location is not lost, and divides by
    the root mean square over channels: y = (x, h) / √mean((x, h)²). Put it first in the network; it
    adds one channel unless `homog_mode` is "off".

    Args:
        homog_mode: "one" (h = homog_scale), "avg_q" (h = homog_scale times the root mean square of
            the whole example) or "off" (no extra channel; an all-zero location stays zero).
        homog_scale: factor on h.

    Raises:
        ValueError: an unknown homog_mode, or a homog_scale that is not positive.

    Source: Martens et al. 2021, arXiv 2110.01765, section on uniform q values via PLN.

    Example:
        >>> y = PerLocationNorm()(torch.zeros(1, 3, 2, 2))
        >>> y.shape, y.square().mean(1).unique().tolist()
        (torch.Size([1, 4, 2, 2]), [1.0])
    """

    def __init__(
        self, homog_mode: Literal["one", "avg_q", "off"] = "one", homog_scale: float = 1.0
    ) -> None:
        super().__init__()
        if homog_mode not in ("one", "avg_q", "off"):
            raise ValueError(
                f"PerLocationNorm: homog_mode={homog_mode!r}; known: 'one', 'avg_q', 'off'"
            )
        if not homog_scale > 0:
            raise ValueError(f"PerLocationNorm: homog_scale={homog_scale} must be positive")
        self.homog_mode = homog_mode
        self.homog_scale = homog_scale

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, *spatial) → (N, C + 1, *spatial), or (N, C, *spatial) with "off"."""
        if self.homog_mode != "off":
            h = torch.full_like(x[:, :1], self.homog_scale)
            if self.homog_mode == "avg_q":
                h = h * x.square().mean(tuple(range(1, x.ndim)), keepdim=True).sqrt()
            x = torch.cat([x, h], 1)
        scale = x.square().mean(1, keepdim=True).sqrt()
        return x / torch.where(scale > 0, scale, 1.0)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"homog_mode={self.homog_mode!r}, homog_scale={self.homog_scale}"
