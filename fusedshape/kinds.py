"""The one table of layer kinds, plain and fused, and everything that depends on the kind."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fusedshape.validate import shown

_Forward = TypeVar("_Forward", bound=Callable[..., Any])
Taps = tuple[slice, ...]  # a slice for each spatial dimension

_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_CHANNELS = ("in_channels", "out_channels")


@dataclass(frozen=True)
class Kind:
    """One kind of layer, a row of `KINDS`.

    Attributes:
        plain: torch's class.
        function: name of torch's function that computes it.
        dimensions: spatial dimensions of the kernel; 0 for a linear layer.
        transposed: whether it is a transposed convolution, whose weight is (in, out, *kernel).
        sizes: names of the attributes with the numbers of input and output channels or features;
            none where the weight says them.
        geometry: names of the attributes that describe the kernel, as the constructor takes them.
    """

    plain: type[nn.Module]
    function: str
    dimensions: int = 0
    transposed: bool = False
    sizes: tuple[str, ...] = ("in_features", "out_features")
    geometry: tuple[str, ...] = ()

    @property
    def shaped(self) -> type[FusedLayer] | None:
        """The fused class of this library; None if there is none."""
        return _TWINS.get(self.plain)

    @property
    def channel_dims(self) -> frozenset[int]:
        """The indices, positive and negative, of the output's channel dimension."""
        return frozenset((1, -1 - self.dimensions) if self.dimensions else (-1,))

    def groups(self, layer: Any) -> int:
        """The number of groups of channels."""
        return int(layer.groups) if "groups" in self.geometry else 1

    def phases(self, layer: Any) -> tuple[int, ...]:
        """The number of phases of its taps along each dimension. Each phase feeds other outputs.

        Initialisers fill every phase. A transposed convolution has as many phases as its stride;
        other layers have one.
        """
        return tuple(layer.stride) if self.transposed else (1,) * self.dimensions

    def blank(self, layer: Any, *, bias: bool, **changes: Any) -> nn.Module:
        """Make a plain layer of another's sizes and geometry, on the meta device.

        Args:
            layer: a layer of this kind.
            bias: whether the new one has a bias.
            **changes: geometry to override.

        Example:
            >>> conv = nn.Conv2d(3, 8, 5, padding=2, groups=1)
            >>> kind_of(conv).blank(conv, bias=False, padding=0)
            Conv2d(3, 8, kernel_size=(5, 5), stride=(1, 1), bias=False)
        """
        make: Any = FUNCTIONS.get(
            self.function, self
        ).plain  # of torch, where a class is registered
        geometry = {name: getattr(layer, name) for name in self.geometry} | changes
        blank: nn.Module = make(*features(layer), **geometry, bias=bias, device="meta")
        return blank


def _convolution(plain: type[nn.Module], dimensions: int) -> Kind:
    return Kind(plain, f"conv{dimensions}d", dimensions, sizes=_CHANNELS, geometry=_GEOMETRY)


def _transposed(plain: type[nn.Module], dimensions: int) -> Kind:
    geometry = (*_GEOMETRY, "output_padding")
    return Kind(plain, f"conv_transpose{dimensions}d", dimensions, True, _CHANNELS, geometry)


#: All kinds of layers.
KINDS = (
    Kind(nn.Linear, "linear"),
    _convolution(nn.Conv1d, 1),
    _convolution(nn.Conv2d, 2),
    _convolution(nn.Conv3d, 3),
    _transposed(nn.ConvTranspose1d, 1),
    _transposed(nn.ConvTranspose2d, 2),
    _transposed(nn.ConvTranspose3d, 3),
)
_TWINS: dict[type[nn.Module], type[FusedLayer]] = {}
_REGISTERED: dict[type[nn.Module], Kind] = {}


def register_layer(cls: type[nn.Module], like: type[nn.Module] = nn.Linear) -> None:
    """Let a class of your own count as a linear or convolution layer.

    `fusedshape.convert` then initialises its instances as it does those of `like`, and the theory
    reads them as such a layer. They are not fused with activations. It holds for subclasses too,
    unless they have a forward of their own. Register before you convert.

    An instance has a parameter ``weight`` of the shape that `like` has, (out, in, …), and an
    attribute ``bias``, a parameter or None. Where `like` is a convolution it also has its
    attributes kernel_size, stride, padding, dilation, groups and padding_mode, in their forms.

    Args:
        cls: the class, whose forward takes a tensor x and returns W x + b.
        like: nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d.

    Raises:
        TypeError: cls is no class of modules.
        ValueError: cls is a layer already, or `like` is none of the above.

    Example:
        >>> class Dense(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.weight, self.bias = nn.Linear(width, width).weight, None
        ...
        ...     def forward(self, x):
        ...         return x @ self.weight.T
        >>> register_layer(Dense)
        >>> kind_of(Dense(4)).function, features(Dense(4))
        ('linear', (4, 4))
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_layer: cls must be a class of nn.Modules, got {shown(cls)}")
    kind = next((kind for kind in KINDS if kind.plain is like), None)
    if kind is None:
        known = ", ".join(f"nn.{kind.plain.__name__}" for kind in KINDS)
        raise ValueError(f"register_layer: like={shown(like)}; known: {known}")
    own = cls not in _REGISTERED and any(issubclass(cls, kind.plain) for kind in KINDS)
    if own or issubclass(cls, (FusedLayer, _ConvNd)):
        raise ValueError(f"register_layer: {cls.__name__} is a layer already")
    _REGISTERED[cls] = replace(kind, plain=cls, sizes=())


def _registered(module: object) -> Kind | None:
    """The kind that a module's class was registered as, if any."""
    cls: Any = type(module)
    for known in cls.__mro__ if _REGISTERED else ():
        if known in _REGISTERED and cls.forward is known.forward:
            return _REGISTERED[known]
    return None


class FusedLayer(nn.Module):
    """Base class of layers fused with what follows them.

    They have the plain layer's parameters and attributes, but are not of its class: code that tests
    for the class expects the output W x + b. The first class that defines a `plain_class` becomes
    that kind's `Kind.shaped`.

    Attributes:
        plain_class: torch's class of the layer.
    """

    plain_class: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "plain_class" in vars(cls):
            _TWINS.setdefault(cls.plain_class, cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # torch.nn.utils.fusion checks no class: it copies any layer and folds BatchNorm in.
        frame = sys._getframe(2) if sys._getframe(1).f_globals is vars(copy) else None
        if frame is not None and frame.f_globals.get("__name__") == "torch.nn.utils.fusion":
            raise TypeError(
                f"{frame.f_code.co_name}: folds what follows a layer into W x + b, and in a "
                f"{type(self).__name__} the activation comes between; fusedshape.unfuse the model "
                "first"
            )
        return super().__reduce_ex__(protocol)


def leaf(forward: _Forward) -> _Forward:
    """Mark a forward that tracers do not follow: its module is read as a whole.

    Example:
        >>> class Twice(nn.Module):
        ...     @leaf
        ...     def forward(self, x):
        ...         return 2 * x
        >>> is_leaf(Twice.forward), is_leaf(nn.Module.forward)
        (True, False)
    """
    vars(forward)["is_leaf"] = True
    return forward


def is_leaf(forward: Any) -> bool:
    """Whether a forward is marked by `leaf`."""
    return getattr(forward, "is_leaf", False) is True


class WeightedSum(nn.Module):
    """Base class of modules that add up branches, Σ wᵢ·uᵢ.

    Attributes:
        weights: one number for each branch.
    """

    weights: tuple[float, ...]


class LocationNorm(nn.Module):
    """Base class of modules that normalise each location to mean square 1 over channels."""

    @property
    def added_channels(self) -> int:
        """The number of channels that it appends."""
        raise NotImplementedError


def kind_of(module: object) -> Kind | None:
    """The kind of a plain or fused layer or of a subclass; None for other modules.

    Example:
        >>> kind_of(nn.Conv2d(3, 8, 3)).dimensions
        2
        >>> kind_of(nn.ReLU()) is None
        True
    """
    cls = module.plain_class if isinstance(module, FusedLayer) else type(module)
    found = next((kind for kind in KINDS if issubclass(cls, kind.plain)), None)
    if found is None and isinstance(module, _ConvNd):  # a class beside torch's own
        shape = len(module.kernel_size), isinstance(module, _ConvTransposeNd)
        found = next((k for k in KINDS if (k.dimensions, k.transposed) == shape), None)
    return found or _registered(module)


def features(layer: Any) -> tuple[int, int]:
    """The numbers of input and output channels or features of a layer.

    Raises:
        TypeError: a module that is no layer.

    Example:
        >>> features(nn.Linear(3, 5))
        (3, 5)
    """
    kind = kind_of(layer)
    if kind is None:
        raise TypeError(f"features: {type(layer).__name__} is no linear or convolution layer")
    if kind.sizes:
        inputs, outputs = (getattr(layer, name) for name in kind.sizes)
        return inputs, outputs
    first, second = layer.weight.shape[:2]
    second *= kind.groups(layer)
    return (first, second) if kind.transposed else (second, first)


def zeros_around(layer: Any) -> list[int]:
    """A convolution's zero padding, in the form that torch.nn.functional.pad takes.

    Empty without zero padding, and for a transposed convolution, whose padding crops its output.

    Example:
        >>> zeros_around(nn.Conv2d(3, 8, (3, 4), padding="same"))
        [1, 2, 1, 1]
    """
    kind = kind_of(layer)
    if kind is None or "padding" not in kind.geometry or kind.transposed:
        return []
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return []
    pads: list[int] = []
    for i, size in enumerate(layer.kernel_size):
        if layer.padding == "same":
            total = layer.dilation[i] * (size - 1)
            pads = [total // 2, total - total // 2, *pads]
        else:
            pads = [layer.padding[i], layer.padding[i], *pads]
    return pads if any(pads) else []


def matrices(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """View a weight of any kind as matrices, (groups, out, in, *kernel).

    Args:
        weight: (out, in/groups, *kernel), or (in, out/groups, *kernel) of a transposed convolution.
        groups: groups of the convolution.
        transposed: whether it is a transposed convolution's.
    """
    parts = weight.unflatten(0, (groups, -1))
    return parts.transpose(1, 2) if transposed else parts


def phases(stride: Sequence[int]) -> Iterator[Taps]:
    """The taps of each phase; see `Kind.phases`.

    Example:
        >>> list(phases((1, 2)))
        [(slice(0, None, 1), slice(0, None, 2)), (slice(0, None, 1), slice(1, None, 2))]
    """
    return itertools.product(*([slice(p, None, s) for p in range(s)] for s in stride))


#: The kinds by the name of torch's function.
FUNCTIONS = {kind.function: kind for kind in KINDS}
