"""Modules: drop-ins whose parameters and state_dict keys are the plain ones'."""

# Without `from __future__ import annotations`: torch.fx copies a forward's annotations into its
# code, and cannot pickle that where they are strings.
import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fusedshape import ops
from fusedshape.init import init_module_
from fusedshape.kinds import KINDS, FusedLayer, Kind, LocationNorm, WeightedSum, kind_of, leaf
from fusedshape.ops.choice import Engine, engine_names
from fusedshape.ops.dispatch import Backend, backend_names
from fusedshape.ops.stock import shape_of
from fusedshape.reference import add_scaled
from fusedshape.spec import ActSpec
from fusedshape.validate import choice, instance, real, shown


def _check_how(who: str, spec: ActSpec, backend: str, engine: str = "auto") -> None:
    instance(who, "spec", spec, ActSpec)
    choice(who, "backend", backend, backend_names())
    choice(who, "engine", engine, engine_names())


def _check_locations(x: Any) -> None:
    """Raise unless a tensor is floating and of shape (N, C, *spatial).

    This goes by `type`: isinstance takes a tracer's symbol for a tensor, but it has no shape.
    """
    if issubclass(type(x), Tensor) and (x.ndim < 2 or not x.is_floating_point()):
        raise ValueError(
            f"PerLocationNorm: x must be floating, of shape (N, C, *spatial), got {x.dtype} of "
            f"shape {tuple(x.shape)}; add a batch dimension by x.unsqueeze(0)"
        )


def _check_input(who: str, name: str, x: Any) -> None:
    """Raise unless x is a tensor or stands for one, as torch.fx's proxies do."""
    if not isinstance(x, Tensor) and not hasattr(x, "__torch_function__"):
        raise TypeError(f"{who}: {name} must be a tensor, got {shown(x)}")


class ShapedActivation(nn.Module):
    """y = γ(φ(αx + β) + δ), in place of nn.ReLU and its like; no parameters.

    Args:
        spec: the constants.
        backend: as in `fusedshape.ops.shaped_act`.

    Attributes:
        engine: the engine of the layer if `fusedshape.fuse` fuses this with the layer before.

    Example:
        >>> act = ShapedActivation(ActSpec("tanh", output_scale=2.0))
        >>> act(torch.zeros(3))
        tensor([0., 0., 0.])
    """

    engine: Engine = "auto"

    def __init__(self, spec: ActSpec, backend: Backend = "auto") -> None:
        super().__init__()
        _check_how("ShapedActivation", spec, backend)
        self.spec = spec
        self.backend = backend

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """x of any shape → the same shape."""
        return ops.shaped_act(x, self.spec, backend=self.backend)

    def extra_repr(self) -> str:
        """The constants."""
        return str(self.spec)

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(_unscriptable(self))


def _unscriptable(module: nn.Module) -> str:
    return (
        f"torch.jit.script: {type(module).__name__} runs operators that TorchScript does not know; "
        "take torch.jit.trace, or script what fusedshape.fold or fusedshape.unfuse makes of the "
        "model"
    )


_NOT_GIVEN: Any = inspect.Parameter.empty  # so that inspect.signature shows no default
_IDENTITY = ActSpec("leaky_relu", negative_slope=1.0)


class _Shaped(FusedLayer):
    """Base of the shaped twins of nn.Conv*d and nn.Linear."""

    weight: Tensor
    bias: Tensor | None
    spec: ActSpec
    backend: Backend
    engine: Engine = "auto"  # for modules that were pickled before there were engines

    def __init__(
        self,
        *args: Any,
        spec: ActSpec = _NOT_GIVEN,
        backend: Backend = "auto",
        engine: Engine = "auto",
        device: Any = None,  # named, because torch.nn.utils.skip_init asks whether it is
        **kwargs: Any,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        if spec is _NOT_GIVEN:
            raise TypeError(
                f"{who}: the argument spec is missing; pass the activation's constants by name, "
                "spec=fusedshape.ActSpec(...)"
            )
        _check_how(who, spec, backend, engine)
        if device is not None:
            kwargs["device"] = device
        self.__dict__.update(vars(_undrawn(self.plain_class)(*args, **kwargs)))
        self.spec = spec
        self.backend = backend
        self.engine = engine
        self.reset_parameters()

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(_unscriptable(self))

    @classmethod
    def from_plain(
        cls,
        module: nn.Module,
        spec: ActSpec,
        backend: Backend = "auto",
        engine: Engine = "auto",
    ) -> Self:
        """Make the shaped twin of a plain layer, around the very same parameters and hooks.

        Args:
            module: an instance of `plain_class`.
            spec: the constants of the activation to fuse.
            backend: as in `fusedshape.ops.shaped_act`.
            engine: as in `fusedshape.ops.conv_act`.

        Raises:
            TypeError: module is of another class.
        """
        plain = cls.plain_class
        if type(module) is not plain:
            raise TypeError(
                f"{cls.__name__}.from_plain: needs a {plain.__name__}, got {type(module).__name__} "
                "as its module"
            )
        _check_how(f"{cls.__name__}.from_plain", spec, backend, engine)
        twin = cls.__new__(cls)
        twin.__dict__.update(module.__dict__)
        twin.spec = spec
        twin.backend = backend
        twin.engine = engine
        return twin

    def to_plain(self) -> nn.Module:
        """Make the plain layer, without the activation, around the very same parameters and hooks.

        Raises:
            TypeError: the layer is of a subclass, whose forward or parameters may not be these.

        Example:
            >>> layer = ShapedLinear(4, 2, spec=ActSpec("relu"))
            >>> layer.to_plain().weight is layer.weight
            True
        """
        if type(self) is not SHAPED[self.plain_class]:
            kind = SHAPED[self.plain_class].__name__
            raise TypeError(f"{type(self).__name__}.to_plain: is a subclass of {kind}, not {kind}")
        plain: nn.Module = self.plain_class.__new__(self.plain_class)
        own = ("spec", "backend", "engine")
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k not in own})
        return plain

    def pre_activation(self, x: Tensor) -> Tensor:
        """Compute x ⋆ W + b, to which the activation is applied, with the layer's own engine.

        Example:
            >>> layer = ShapedLinear(4, 2, spec=ActSpec("relu"))
            >>> x = torch.ones(3, 4)
            >>> y = ops.shaped_act(layer.pre_activation(x), layer.spec)
            >>> bool(torch.allclose(y, layer(x)))
            True
        """
        return self._computed(x, _IDENTITY)

    def _computed(self, x: Tensor, spec: ActSpec) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw weights as the constants assume them: scaled uniform orthogonal, biases zero.

        Convolutions take the Delta form, except those with even kernels, which have no centre. As
        in torch, nothing is drawn on the meta device: call this again after ``to_empty``.
        """
        if self.weight.is_meta:
            return
        even = any(k % 2 == 0 for k in getattr(self, "kernel_size", ()))
        init_module_(self, "suo_full" if even else "suo")

    def extra_repr(self) -> str:
        """The plain layer's, and the constants."""
        return f"{self.plain_class.extra_repr(self)}, {self.spec}"


@functools.cache
def _undrawn(plain: Any) -> Any:
    """Make a subclass of a plain layer whose constructor leaves its parameters undrawn."""
    return type(plain.__name__, (plain,), {"reset_parameters": lambda self: None})


class _ShapedConv(_Shaped):
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: str

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """x: `(N, C, *spatial)` or `(C, *spatial)` → convolution, bias and activation."""
        return self._computed(x, self.spec)

    def _computed(self, x: Tensor, spec: ActSpec) -> Tensor:
        return ops.conv_act(
            x,
            self.weight,
            self.bias,
            spec,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            backend=self.backend,
            engine=self.engine,
        )


class ShapedConv1d(_ShapedConv):
    """nn.Conv1d fused with its activation; see `ShapedConv2d`."""

    plain_class = nn.Conv1d


class ShapedConv2d(_ShapedConv):
    """nn.Conv2d fused with its activation, y = γ(φ(α(x ⋆ W + b) + β) + δ).

    Takes nn.Conv2d's arguments, and `spec`, `backend` and `engine` by name. Parameters, keys and
    attributes are nn.Conv2d's; weights start scaled uniform orthogonal in Delta form, biases zero.
    It is not a subclass of nn.Conv2d, because its output is not x ⋆ W + b: tools that look for
    plain convolutions, for adapters or for curvature, skip or refuse it.

    Args:
        spec: the constants.
        backend: as in `fusedshape.ops.shaped_act`.
        engine: as in `fusedshape.ops.conv_act`.

    Example:
        >>> spec = ActSpec("leaky_relu", negative_slope=0.4, output_scale=1.3)
        >>> conv = ShapedConv2d(3, 8, 3, padding=1, spec=spec)
        >>> conv(torch.zeros(1, 3, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
        >>> list(conv.state_dict()), isinstance(conv, nn.Conv2d)
        (['weight', 'bias'], False)
    """

    plain_class = nn.Conv2d


class ShapedConv3d(_ShapedConv):
    """nn.Conv3d fused with its activation; see `ShapedConv2d`."""

    plain_class = nn.Conv3d


class ShapedLinear(_Shaped):
    """nn.Linear fused with its activation, y = γ(φ(α(x Wᵀ + b) + β) + δ); see `ShapedConv2d`.

    Example:
        >>> layer = ShapedLinear(4, 2, spec=ActSpec("softplus"))
        >>> layer(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    plain_class = nn.Linear
    in_features: int
    out_features: int

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) → (..., out_features)."""
        return self._computed(x, self.spec)

    def _computed(self, x: Tensor, spec: ActSpec) -> Tensor:
        options: Any = {"backend": self.backend, "engine": self.engine}
        return ops.linear_act(x, self.weight, self.bias, spec, **options)


#: The fused class of each plain one.
SHAPED: Mapping[type[nn.Module], type[_Shaped]] = {
    kind.plain: kind.shaped
    for kind in KINDS
    if kind.shaped is not None and issubclass(kind.shaped, _Shaped)
}


def place() -> nn.Identity:
    """Make the placeholder for an activation that has been fused into a layer.

    It does nothing, like any nn.Identity; it tells `fusedshape.unfuse` where to put the activation.
    """
    found = nn.Identity()
    vars(found)["is_place"] = True
    return found


def is_place(module: object) -> bool:
    """Whether a module was made by `place`.

    Example:
        >>> is_place(place()), is_place(nn.Identity())
        (True, False)
    """
    return type(module) is nn.Identity and "is_place" in vars(module)


class ShapedChain(nn.Sequential):
    r"""nn.Sequential that runs each row of shaped layers in it as one autograd node.

    Results, parameters and state_dict keys are those of nn.Sequential. A row is what
    `fusedshape.ops.conv_chain` can take: ShapedConv1d/2d/3d of one kind or ShapedLinear, one after
    the other, with nothing but nn.Identity in between. Any other module is called as nn.Sequential
    calls it, and ends the row before it. So does a shaped layer that carries hooks, is compiled by
    itself, is of a subclass, or pads other than with zeros on both sides alike (`why_not_chained`
    says which). No hook is ever skipped.

    Args:
        modules: as nn.Sequential's: modules, or one OrderedDict of them.
        max_length: most layers of one node. The gradients of a node arrive together, so shorter
            nodes let DistributedDataParallel send some while backward continues.

    Raises:
        ValueError: max_length below 1.

    Example:
        >>> spec = ActSpec("leaky_relu", negative_slope=0.4, output_scale=1.3)
        >>> layers = [ShapedConv2d(3, 8, 3, spec=spec), ShapedConv2d(8, 8, 3, spec=spec)]
        >>> chain = ShapedChain(*layers, nn.Flatten(), ShapedLinear(8, 2, spec=spec))
        >>> chain(torch.zeros(1, 3, 5, 5)).shape, list(chain.state_dict())[:2]
        (torch.Size([1, 2]), ['0.weight', '0.bias'])
    """

    max_length: int | None

    def __init__(self, *modules: Any, max_length: int | None = None) -> None:
        super().__init__(*modules)
        self.max_length = _checked_length(max_length)

    @leaf
    def forward(self, x: Any) -> Any:
        """As nn.Sequential's forward."""
        if not isinstance(x, Tensor):  # torch.fx traces with something else
            return super().forward(x)
        for row in chain_rows(self._modules):
            if len(row) == 1:
                x = self._modules[row[0]](x)
            else:
                layers = [_chain_layer(self._modules[name]) for name in row]
                x = ops.conv_chain(x, layers, max_length=self.max_length)
        return x

    def __getitem__(self, index: Any) -> Any:
        part: Any = super().__getitem__(index)
        if isinstance(index, slice):
            part.max_length = self.max_length
        return part

    def extra_repr(self) -> str:
        """max_length, where there is one."""
        return "" if self.max_length is None else f"max_length={self.max_length}"


def _checked_length(max_length: int | None) -> int | None:
    whole = isinstance(max_length, int) and not isinstance(max_length, bool)
    if max_length is not None and not (whole and max_length >= 1):
        raise ValueError(
            f"ShapedChain: max_length={max_length!r} must be a positive integer or None"
        )
    return max_length


def chain_rows(children: Mapping[str, nn.Module | None]) -> list[list[str]]:
    """Names of an nn.Sequential's children; those that a `ShapedChain` runs together in one list.

    Any other child is in a list by itself, and an nn.Identity that nobody watches in none.

    Example:
        >>> spec = ActSpec("relu")
        >>> layers = [ShapedLinear(2, 2, spec=spec) for _ in range(3)]
        >>> net = nn.Sequential(*layers[:2], nn.Dropout(), layers[2])
        >>> chain_rows(net._modules)
        [['0', '1'], ['2'], ['3']]
    """
    rows: list[list[str]] = []
    last: Kind | None = None  # of the layers in the row that is open; None where none is
    for name, module in children.items():
        assert module is not None
        if why_not_chained(module):
            if type(module) is not nn.Identity or _is_watched(module):
                rows.append([name])
                last = None
            continue
        kind = kind_of(module)
        if kind is last:
            rows[-1].append(name)
        else:
            rows.append([name])
        last = kind
    return rows


def why_not_chained(module: nn.Module) -> str:
    """Why a `ShapedChain` must call a module by itself; empty if it need not.

    Example:
        >>> why_not_chained(nn.MaxPool2d(2))
        'MaxPool2d is no shaped layer'
    """
    own = type(module)
    if own not in SHAPED.values():
        return f"{own.__name__} is no shaped layer"
    if _is_watched(module):
        return "it has hooks, or a forward or compiled code of its own"
    if issubclass(own, _ShapedConv):
        conv: Any = module
        if conv.padding_mode != "zeros":
            return f"padding_mode={conv.padding_mode!r}"
        reaches = zip(conv.dilation, conv.kernel_size, strict=True)
        if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in reaches):
            return "padding='same' of an even kernel pads more at the end"
    return ""


def _is_watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward."""
    everywhere = nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def _chain_layer(layer: Any) -> ops.ChainLayer:
    geometry = {}
    if isinstance(layer, _ShapedConv):
        geometry = {name: getattr(layer, name) for name in _GEOMETRY}
    tensors = layer.weight, layer.bias
    return ops.ChainLayer(
        *tensors, layer.spec, engine=layer.engine, backend=layer.backend, **geometry
    )


_GEOMETRY = ("stride", "padding", "dilation", "groups")


class NormalizedSum(WeightedSum):
    r"""Normalised sum of branches, y = Σ wᵢ·uᵢ with Σ wᵢ² = 1: keeps q = 1 where branches join.

    Use it in place of ``x + f(x)``; see `shortcut`. At initialisation q(y) = Σ wᵢ²·q(uᵢ), for
    independent branches. A branch of weight 0 is left out, with its inf and nan. It has no
    parameters. In bfloat16 and float16 each branch costs at most one rounding of the result's
    precision, as in ``a + b``; torch.compile rounds once.

    Args:
        weights: one number for each branch, of either sign.

    Raises:
        TypeError: a weight that is not a number.
        ValueError: no weights, one that is not finite, or Σ wᵢ² off 1 by more than 1e-9.

    Source: Martens et al. 2021, arXiv 2110.01765 (normalised sums).

    Example:
        >>> add = NormalizedSum((0.6, 0.8))
        >>> add(torch.tensor([5.0]), torch.tensor([10.0]))
        tensor([11.])
    """

    def __init__(self, weights: Iterable[float]) -> None:
        super().__init__()
        if isinstance(weights, str) or not isinstance(weights, Iterable):
            raise TypeError(f"NormalizedSum: weights must be numbers, got {shown(weights)}")
        numbers = list(weights)
        for w in numbers:
            if isinstance(w, (bool, str)) or not hasattr(w, "__float__"):
                raise TypeError(f"NormalizedSum: weights must be numbers, got {shown(w)}")
        self.weights = tuple(real("NormalizedSum", "weights", w) for w in numbers)
        total = sum(w * w for w in self.weights)
        if not math.isfinite(total):
            raise ValueError(f"NormalizedSum: weights must be finite, got {self.weights}")
        if total == 0:
            raise ValueError(
                f"NormalizedSum: needs a weight other than 0, got weights {self.weights}"
            )
        if abs(total - 1) > 1e-9:
            fixed = tuple(w / math.sqrt(total) for w in self.weights)
            raise ValueError(
                f"NormalizedSum: the squares of weights {self.weights} add up to {total:.9g}, not "
                f"to 1; divide them by its root, which gives {fixed}"
            )

    @classmethod
    def shortcut(cls, weight: float) -> Self:
        r"""The sum of a skip connection, (x, f(x)) ↦ w·x + √(1−w²)·f(x).

        Args:
            weight: w, from 0 (no skip) to 1.

        Raises:
            ValueError: a weight outside 0 … 1.

        Example:
            >>> NormalizedSum.shortcut(0.8)
            NormalizedSum(0.8, 0.6)
        """
        if not 0 <= real("NormalizedSum.shortcut", "weight", weight) <= 1:
            raise ValueError(f"NormalizedSum.shortcut: weight={weight} is outside 0 … 1")
        weight = float(weight)
        return cls((weight, math.sqrt((1 - weight) * (1 + weight))))

    @leaf
    def forward(self, *branches: Tensor) -> Tensor:
        """One tensor for each weight, all of one shape → a new tensor of that shape."""
        if len(branches) != len(self.weights):
            raise ValueError(
                f"NormalizedSum: got {len(branches)} branches for {len(self.weights)} weights"
            )
        for u in branches:
            _check_input("NormalizedSum", "branches", u)
        shapes = [shape_of(u) for u in branches if isinstance(u, Tensor)]  # no proxies
        if any(shape != shapes[0] for shape in shapes):
            listed = ", ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"NormalizedSum: branches must have one shape, got {listed}")
        total: Tensor | None = None
        for u, w in zip(branches, self.weights, strict=True):
            if w != 0:
                total = u * w if total is None else add_scaled(total, u, w)
        assert total is not None
        return total

    def extra_repr(self) -> str:
        """The weights, to six digits."""
        return ", ".join(f"{w:.6g}" for w in self.weights)


class PerLocationNorm(LocationNorm):
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
        if not isinstance(homog_mode, str) or homog_mode not in ("one", "avg_q", "off"):
            raise ValueError(
                f"PerLocationNorm: homog_mode={homog_mode!r}; known: 'one', 'avg_q', 'off'"
            )
        if not 0 < real("PerLocationNorm", "homog_scale", homog_scale) < math.inf:
            raise ValueError(
                f"PerLocationNorm: homog_scale={homog_scale} must be positive and finite"
            )
        self.homog_mode = homog_mode
        self.homog_scale = float(homog_scale)

    @property
    def added_channels(self) -> int:
        """1, or 0 with "off"."""
        return int(self.homog_mode != "off")

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """x: `(N, C, *spatial)` → `(N, C + 1, *spatial)`, or `(N, C, *spatial)` with "off"."""
        _check_input("PerLocationNorm", "x", x)
        _check_locations(x)
        # In float32 or better, and without a branch on the dtype, which torch.fx cannot follow.
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        if self.homog_mode != "off":
            h = torch.full_like(x[:, :1], self.homog_scale)
            if self.homog_mode == "avg_q":
                rms = x.flatten(1).square().mean(1, keepdim=True).sqrt()
                h = (h.flatten(1) * rms).reshape_as(h)
            x = torch.cat([x, h], 1)
        scale = x.square().mean(1, keepdim=True).sqrt()
        return (x / scale.where(scale > 0, 1.0)).to(dtype)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"homog_mode={self.homog_mode!r}, homog_scale={self.homog_scale}"
