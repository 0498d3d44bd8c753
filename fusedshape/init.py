"""Initialisers that keep q (mean square over channels), right for PyTorch's [out, in, …] layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from fusedshape.haar import haar
from fusedshape.kinds import Taps, kind_of, matrices, phases
from fusedshape.validate import flag, instance, integer, real, shown

__all__ = ["delta_orthogonal_", "gaussian_", "init_module_", "suo_", "suo_full_"]

Method = Literal["suo", "suo_full", "delta_orthogonal", "gaussian"]
_ALL = slice(None)


def suo_(
    weight: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
    stride: int | Sequence[int] = 1,
    gain: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    r"""Fill a weight, in place, from the scaled uniform orthogonal distribution (SUO).

    W = gain · max(√(out/in), 1) · Q, where Q is Haar-uniform among the matrices with orthonormal
    rows or columns. So q, the mean square over channels, is multiplied by gain²: exactly if
    out ≥ in, in expectation otherwise. Convolutions take the Delta form: every tap but the centre
    one is zero, and the layer applies one matrix at every location. Each group has its own matrix.

    With one tap a transposed convolution of stride s would write only 1/sᵈ of its outputs and leave
    q = 0 at the others. So the s taps around the centre, along each dimension, share the matrix.
    That is nearest-neighbour upsampling followed by the matrix, and keeps q everywhere.

    Args:
        weight: floating tensor: linear `(out, in)`, convolution `(out, in/groups, *kernel)`,
            transposed convolution `(in, out/groups, *kernel)`. Any memory format.
        groups: groups of the convolution.
        transposed: whether `weight` is a transposed convolution's.
        stride: stride of a transposed convolution; ignored for other layers.
        gain: factor on W; 1 for shaped activations.
        generator: source of randomness; None takes torch's default. If it is on another
            device than `weight`, numbers are drawn there and moved.

    Returns:
        `weight`.

    Raises:
        ValueError: an even kernel (no centre), a transposed kernel smaller than its stride, groups
            that do not divide the channels, fewer than two dimensions, a meta tensor, a gain that
            is not finite.
        TypeError: not a real floating tensor.

    Source: Martens et al. 2021, arXiv 2110.01765, section "Parameter distributions".

    Example:
        >>> w = suo_(torch.empty(8, 2), generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(w.T @ w, 4 * torch.eye(2), atol=1e-5)
        True
        >>> suo_(torch.empty(8, 2, 3, 3)).count_nonzero((0, 1)).tolist()
        [[0, 0, 0], [0, 16, 0], [0, 0, 0]]
    """
    filling = _Filling("suo_", weight, groups, transposed, stride, gain, generator)
    return _fill_centre(filling, keep_q=True)


def suo_full_(
    weight: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
    stride: int | Sequence[int] = 1,
    gain: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    r"""Fill a weight, in place, from SUO over channels and taps together: any kernel, even ones.

    As `suo_`, with in·∏kernel in place of in. In expectation, q at an output location is gain²
    times the mean q of the locations that its taps read, so zero padding lowers q at the border.
    The taps of a transposed convolution of stride s fall into sᵈ phases that feed different
    outputs, and every phase is drawn by itself.

    Args:
        weight: as in `suo_`.
        groups: as in `suo_`.
        transposed: as in `suo_`.
        stride: as in `suo_`.
        gain: as in `suo_`.
        generator: as in `suo_`.

    Returns:
        `weight`.

    Raises:
        ValueError: as `suo_`, but for even kernels.
        TypeError: as `suo_`.

    Source: Martens et al. 2021, arXiv 2110.01765, section "Parameter distributions".

    Example:
        >>> w = suo_full_(torch.empty(4, 4, 2, 2)).flatten(1)
        >>> torch.allclose(w @ w.T, torch.eye(4), atol=1e-5)
        True
    """
    filling = _Filling("suo_full_", weight, groups, transposed, stride, gain, generator)
    with torch.no_grad():
        for part in filling.parts():
            groups, out = part.shape[:2]
            fan_in = part[0, 0].numel()
            scale = filling.gain * max(math.sqrt(out / fan_in), 1.0)
            part.copy_(filling.orthogonal(groups, out, fan_in).mul_(scale).reshape(part.shape))
    return weight


def delta_orthogonal_(
    weight: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
    gain: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    r"""Fill a weight, in place, with an orthogonal matrix at the centre tap and zeros elsewhere.

    W = gain · Q, with Q Haar-uniform as in `suo_`, keeps the norm ‖x‖² if gain = 1 and out ≥ in,
    but not q = ‖x‖²/channels: between layers of different width use `suo_`. For equal widths the
    two are the same. gain = √2 is the edge of chaos of ReLU.

    Args:
        weight: as in `suo_`.
        groups: as in `suo_`.
        transposed: as in `suo_`; the centre tap alone is filled, whatever the stride.
        gain: σ_w.
        generator: as in `suo_`.

    Returns:
        `weight`.

    Raises:
        ValueError: as `suo_`.
        TypeError: as `suo_`.

    Source: Xiao et al. 2018, arXiv 1806.05393.

    Example:
        >>> w = delta_orthogonal_(torch.empty(8, 2, 3))[..., 1]
        >>> torch.allclose(w.T @ w, torch.eye(2), atol=1e-5)
        True
    """
    filling = _Filling("delta_orthogonal_", weight, groups, transposed, 1, gain, generator)
    return _fill_centre(filling, keep_q=False)


def gaussian_(
    weight: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
    stride: int | Sequence[int] = 1,
    gain: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    r"""Fill a weight, in place, from N(0, gain²/fan_in), fan_in being the terms in an output's sum.

    gain is σ_w; √2 is He's initialisation for ReLU. For a transposed convolution of stride s,
    fan_in is counted in each of its sᵈ phases, as in `suo_full_`.

    Args:
        weight: as in `suo_`.
        groups: as in `suo_`.
        transposed: as in `suo_`.
        stride: as in `suo_`.
        gain: σ_w.
        generator: as in `suo_`.

    Returns:
        `weight`.

    Raises:
        ValueError: as `suo_`, but for even kernels.
        TypeError: as `suo_`.

    Example:
        >>> w = gaussian_(torch.empty(64, 64, 3, 3), generator=torch.Generator().manual_seed(0))
        >>> round(float(w.var() * 64 * 9), 2)
        1.0
    """
    filling = _Filling("gaussian_", weight, groups, transposed, stride, gain, generator)
    with torch.no_grad():
        for part in filling.parts():
            noise = _normal(part.shape, weight, generator)
            part.copy_(noise * (filling.gain / math.sqrt(part[0, 0].numel())))
    return weight


def init_module_(
    module: nn.Module,
    method: Method = "suo",
    gain: float = 1.0,
    bias_std: float = 0.0,
    generator: Generator | None = None,
) -> None:
    r"""Initialise the weight and bias of one linear or convolution layer, in place.

    Args:
        module: an nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d, or of a subclass, or a
            layer of `fusedshape.nn`.
        method: "suo" (`suo_`), "suo_full", "delta_orthogonal" or "gaussian".
        gain: σ_w.
        bias_std: standard deviation σ_b of the bias, N(0, σ_b²); 0 makes it zero.
        generator: as in `suo_`.

    Raises:
        TypeError: a module of another class.
        ValueError: an unknown method, a negative bias_std, a weight that is computed from others
            (weight_norm, parametrisations) or has no shape yet (lazy modules), a transposed
            convolution whose stride and dilation are both above 1, and whatever `suo_` raises.

    Example:
        >>> layer = nn.Linear(3, 5)
        >>> init_module_(layer, generator=torch.Generator().manual_seed(0))
        >>> layer.bias.abs().sum().item()
        0.0
    """
    check_init(module, method, gain, bias_std)
    layer: Any = module
    groups, transposed, stride = _geometry(layer)
    if method == "delta_orthogonal":
        delta_orthogonal_(
            layer.weight, groups=groups, transposed=transposed, gain=gain, generator=generator
        )
    else:
        fill = {"suo": suo_, "suo_full": suo_full_, "gaussian": gaussian_}[method]
        fill(
            layer.weight,
            groups=groups,
            transposed=transposed,
            stride=stride,
            gain=gain,
            generator=generator,
        )
    bias_std = float(bias_std)
    bias = layer.bias
    if bias is not None:
        with torch.no_grad():
            if bias_std:
                bias.copy_(_normal(bias.shape, bias, generator) * bias_std)
            else:
                bias.zero_()


def check_init(
    module: nn.Module, method: Method = "suo", gain: float = 1.0, bias_std: float = 0.0
) -> None:
    """Raise what `init_module_` would, and write nothing."""
    kind = kind_of(module)
    if kind is None:
        raise TypeError(
            "init_module_: needs a linear or convolution layer as its module, got "
            f"{type(module).__name__}"
        )
    if not isinstance(method, str) or method not in get_args(Method):
        known = ", ".join(get_args(Method))
        raise ValueError(f"init_module_: unknown method {shown(method)}; known: {known}")
    if not 0 <= real("init_module_", "bias_std", bias_std) < math.inf:
        raise ValueError(
            f"init_module_: bias_std={shown(bias_std)} must be finite and not negative"
        )
    if "weight" not in module._parameters:
        raise ValueError(
            f"init_module_: the weight of this {type(module).__name__} is computed from other "
            "tensors (weight_norm or another parametrisation); initialise it before adding those"
        )
    layer: Any = module
    if nn.parameter.is_lazy(layer.weight):
        raise ValueError(
            f"init_module_: the weight of this {type(module).__name__} has no shape yet; run the "
            "model once before initialising it"
        )
    groups, transposed, stride = _geometry(layer)
    if transposed:
        pairs = zip(layer.stride, layer.dilation, strict=True)
        if method != "delta_orthogonal" and any(s > 1 and d > 1 for s, d in pairs):
            raise ValueError(
                f"init_module_: a transposed convolution of stride {layer.stride} and dilation "
                f"{layer.dilation} cannot reach all its outputs alike; use stride 1 or dilation 1"
            )
    own_stride = 1 if method == "delta_orthogonal" else stride
    filling = _Filling(f"{method}_", layer.weight, groups, transposed, own_stride, gain, None)
    if method in ("suo", "delta_orthogonal"):
        filling.centre()


def _geometry(layer: Any) -> tuple[int, bool, tuple[int, ...]]:
    """Groups of a layer, whether it is transposed, and its stride if it is."""
    kind = kind_of(layer)
    assert kind is not None
    return kind.groups(layer), kind.transposed, kind.phases(layer) or (1,)


@dataclass(frozen=True, eq=False)
class _Filling:
    """A weight that is to be filled, and how: arguments of the initialisers, checked.

    Attributes:
        name: the initialiser, for messages.
        weight: the weight.
        groups: groups of its layer.
        transposed: whether its layer is transposed.
        stride: stride of a transposed layer; any other layer's becomes 1. A tuple once it is made.
        gain: factor on the weight.
        generator: source of randomness; None takes torch's default.
    """

    name: str
    weight: Tensor
    groups: int
    transposed: bool
    stride: int | Sequence[int]
    gain: float
    generator: Generator | None

    def __post_init__(self) -> None:
        name, weight = self.name, self.weight
        _check_weight(name, weight)
        integer(name, "groups", self.groups, 1)
        flag(name, "transposed", self.transposed)
        instance(name, "generator", self.generator, Generator, optional=True)
        if not math.isfinite(real(name, "gain", self.gain)):
            raise ValueError(f"{name}: gain={self.gain} must be finite")
        object.__setattr__(self, "gain", float(self.gain))
        object.__setattr__(self, "stride", self._strides())
        if weight.shape[0] % self.groups:
            raise ValueError(
                f"{name}: groups={self.groups} does not divide the {weight.shape[0]} "
                f"{'input' if self.transposed else 'output'} channels of weight "
                f"{tuple(weight.shape)}"
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """One stride for each spatial dimension; 1 unless the layer is transposed."""
        assert isinstance(self.stride, tuple)
        return self.stride

    def matrices(self) -> Tensor:
        """A view of the groups, (groups, out, in, *kernel)."""
        return matrices(self.weight, self.groups, self.transposed)

    def parts(self) -> Iterator[Tensor]:
        """Views of the taps that feed the same outputs: all of them, or one phase; no empty ones.

        Their shape is (groups, out, in, *taps).
        """
        if self.weight.numel():
            for taps in phases(self.strides):
                yield self.matrices()[(_ALL, _ALL, _ALL, *taps)]

    def centre(self) -> Taps:
        """The taps of the Delta form: the centre one, or as many around it as the stride is."""
        kernel = self.weight.shape[2:]
        for k, s in zip(kernel, self.strides, strict=True):
            if s == 1 and k % 2 == 0:
                raise ValueError(
                    f"{self.name}: kernel {tuple(kernel)} has no centre tap; use an odd kernel, or "
                    "suo_full_ (method 'suo_full'), which fills every tap"
                )
        starts = [(k - s + 1) // 2 for k, s in zip(kernel, self.strides, strict=True)]
        return tuple(slice(a, a + s) for a, s in zip(starts, self.strides, strict=True))

    def orthogonal(self, count: int, rows: int, cols: int) -> Tensor:
        """Draw Haar-uniform matrices of orthonormal rows or columns, whichever are fewer."""
        shape = count, min(rows, cols), max(rows, cols)
        drawn = haar(_normal(shape, self.weight, self.generator).mT)
        return drawn if rows >= cols else drawn.mT

    def _strides(self) -> tuple[int, ...]:
        kernel, stride = self.weight.shape[2:], self.stride
        given = stride if isinstance(stride, (tuple, list)) else [stride] * len(kernel)
        if isinstance(stride, (tuple, list)) and not stride:
            raise ValueError(f"{self.name}: stride={stride!r} is empty")
        strides = tuple(integer(self.name, "stride", s, 1, 2**31) for s in given)
        if not self.transposed:
            return (1,) * len(kernel)
        if len(strides) != len(kernel):
            raise ValueError(f"{self.name}: stride={stride!r} does not fit kernel {tuple(kernel)}")
        if any(k < s for k, s in zip(kernel, strides, strict=True)):
            raise ValueError(
                f"{self.name}: a transposed convolution of kernel {tuple(kernel)} and stride "
                f"{strides} leaves outputs that no input reaches; make the kernel at least as "
                "large as the stride"
            )
        return strides


def _check_weight(name: str, weight: Tensor) -> None:
    """Raise unless a weight can be filled."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: weight must be a tensor, got {type(weight).__name__}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"{name}: weight has dtype {weight.dtype}; needs a real floating dtype")
    if weight.is_meta:
        raise ValueError(
            f"{name}: weight of shape {tuple(weight.shape)} is on the meta device and has no "
            "memory; call module.to_empty(device=...) first"
        )
    if weight.ndim < 2:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}; needs (out, in) or (out, in, *kernel)"
        )


def _fill_centre(filling: _Filling, keep_q: bool) -> Tensor:
    """Put orthogonal matrices at the centre and zeros elsewhere; they keep q, or else norms."""
    centre = filling.centre()
    with torch.no_grad():
        filling.weight.zero_()
        if filling.weight.numel():
            groups, out, fan_in = filling.matrices().shape[:3]
            scale = filling.gain * (max(math.sqrt(out / fan_in), 1.0) if keep_q else 1.0)
            drawn = filling.orthogonal(groups, out, fan_in).mul_(scale)
            taps = filling.matrices()[(_ALL, _ALL, _ALL, *centre)]
            taps.copy_(drawn.reshape(*drawn.shape, *[1] * len(centre)))
    return filling.weight


def _normal(shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
    """Draws from N(0, 1) on `like`'s device, in float64 if `like` is, else in float32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    device = like.device if generator is None else generator.device
    drawn = torch.randn(tuple(shape), dtype=dtype, device=device, generator=generator)
    return drawn.to(like.device)
