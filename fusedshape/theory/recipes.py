"""Recipes: what the constants of an activation are solved for. `METHODS` is the one table of them.

A recipe is a frozen value, `TAT("tanh", tau=0.2)`: it knows its defaults, refuses what it cannot
mean when it is made, compares by value, and its repr makes it again. The functions that take
keywords instead (`convert(method="TAT", eta=0.9)`) make a recipe of them by `recipe_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from fusedshape.activations import ACTIVATIONS, Activation, get_activation
from fusedshape.spec import ActSpec
from fusedshape.validate import UNSET, flag, instance, number, shown

_R = TypeVar("_R", bound="Recipe")

#: The activations that TAT turns into a leaky_relu.
RECTIFIERS = ("relu", "leaky_relu")


class Unreachable(ValueError):  # noqa: N818, as it reads better in a sentence
    """No constants meet the conditions; the message names what can be reached and how."""


@dataclass(frozen=True)
class Target:
    """A number that a recipe is given: its meaning, its range, and its default.

    Attributes:
        about: what the number is, in the words of a command line's help.
        default: the value for one activation; None where the activation has no such target.
        above: it must be larger than this.
        low: it must be at least this.
        below: it must be smaller than this.
        high: it must be at most this.
        why: what goes wrong at or beyond the upper end of the range.
    """

    about: str
    default: Callable[[Activation], float | None]
    above: float = -math.inf
    low: float = -math.inf
    below: float = math.inf
    high: float = math.inf
    why: str = ""

    def check(self, who: str, name: str, value: Any) -> float:
        """The value as a float within the range.

        Raises:
            TypeError: not a number.
            ValueError: not finite, or out of the range.
        """
        value = number(who, name, value, self.low, above=self.above)
        if value < self.below and value <= self.high:
            return value
        end = f"{self.below:g})" if self.below < math.inf else f"{self.high:g}]"
        raise ValueError(
            f"{who}: {name} must be in ({self.above:g}, {end}, got {value}: {self.why}"
        )


def _target(
    default: float | Callable[[Activation], float | None],
    about: str,
    left: Any = None,
    **more: Any,
) -> Any:
    """A field that is a target; one without a number of its own is filled in where it is left."""
    if callable(default):
        return field(default=left, metadata={"target": Target(about, default, **more)})
    value = float(default)
    return field(default=value, metadata={"target": Target(about, lambda row: value, **more)})


@dataclass(frozen=True, repr=False)
class Recipe:
    """A method of the theory, the activation it shapes, and the numbers it aims at.

    This is the common base of `TAT`, `DKS` and `EOC`, which are what to make.
    """

    activation: str = "leaky_relu"

    #: The method's name.
    method: ClassVar[str]
    #: The activations that the method cannot shape, and why.
    impossible: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        kind = type(self)
        if kind is Recipe:
            raise TypeError(f"Recipe: make one of its methods, {', '.join(METHODS)}")
        row = get_activation(self.activation, self.method)
        if row.name in self.impossible:
            raise Unreachable(self.impossible[row.name])
        left: list[str] = []
        for name, target in self.targets().items():
            value, default = getattr(self, name), target.default(row)
            if (value is None or value is UNSET) and getattr(
                kind, name
            ) is value:  # left to the method
                value = default
                left.append(name)
            else:
                value = target.check(self.method, name, value)
                if default is None:
                    raise ValueError(f"{self.method}: {_strange(kind, row.name, name, value)}")
            object.__setattr__(self, name, value)
        for f in fields(self):
            if isinstance(f.default, bool):
                flag(self.method, f.name, getattr(self, f.name))
        object.__setattr__(self, "_left", frozenset(left))

    @property
    def is_default(self) -> bool:
        """Whether the number that it aims at was left to the method; see `defaults`.

        It does not count when recipes are compared.

        Example:
            >>> TAT("tanh").is_default, TAT("tanh", tau=0.3).is_default
            (True, False)
        """
        aim = next(iter(self.defaults(self.activation)))
        return aim in vars(self).get("_left", ())

    @classmethod
    def activations(cls) -> tuple[str, ...]:
        """The activations that the method can shape.

        Example:
            >>> "square" in DKS.activations(), "square" in EOC.activations()
            (False, True)
        """
        return tuple(name for name in ACTIVATIONS if name not in cls.impossible)

    @classmethod
    def targets(cls) -> dict[str, Target]:
        """The numbers that the method can be given, the one that it aims at first."""
        return {f.name: f.metadata["target"] for f in fields(cls) if "target" in f.metadata}

    @classmethod
    def defaults(cls, activation: str) -> dict[str, float]:
        """The targets of one activation with their defaults, the one that is aimed at first.

        Raises:
            ValueError: unknown activation.

        Example:
            >>> TAT.defaults("relu"), TAT.defaults("tanh")
            ({'eta': 0.9}, {'tau': 0.3})
        """
        row = get_activation(activation, cls.__name__)
        found = {name: target.default(row) for name, target in cls.targets().items()}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def spelled(cls: type[_R], who: str, given: Mapping[str, Any]) -> _R:
        """The recipe that keywords spell; its errors name the function that took them.

        Args:
            who: that function.
            given: those keywords that were given.

        Raises:
            ValueError: as the class, or a target that belongs to another method.
            TypeError: as the class.
            Unreachable: as the class.
        """
        row = get_activation(given.get("activation", cls.activation), who)
        own = {f.name for f in fields(cls)}
        for name, value in given.items():
            if name not in own:
                raise ValueError(f"{who}: {_strange(cls, row.name, name, value)}")
            if value is None and name in cls.targets():  # only a recipe's own constructor takes it
                number(who, name, value)
        try:
            return cls(**given)
        except (TypeError, ValueError) as error:
            said, own_name = str(error), f"{cls.method}: "
            if said.startswith(own_name):
                said = f"{who}: {said.removeprefix(own_name)}"
            raise type(error)(said) from None

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        del values["activation"]
        said = [f"{n}={v!r}" for n, v in values.items() if v is not None and v is not False]
        return f"{type(self).__name__}({', '.join([repr(self.activation), *said])})"

    def to_dict(self) -> dict[str, Any]:
        """The method and its arguments as plain data, ready for JSON.

        Example:
            >>> TAT("tanh").to_dict()
            {'method': 'TAT', 'activation': 'tanh', 'tau': 0.3, 'clamp': False}
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"method": self.method, **{n: v for n, v in values.items() if v is not None}}

    @classmethod
    def from_dict(cls: type[_R], data: Mapping[str, Any]) -> _R:
        """Inverse of `to_dict`; on `Recipe` itself the dict says which method it is.

        Raises:
            ValueError: no method, another method than this class's, a key that is no argument of
                it, or a value out of its range.
            TypeError: no dict, or a value of the wrong type.

        Example:
            >>> Recipe.from_dict({"method": "DKS", "activation": "tanh", "zeta": 2.0})
            DKS('tanh', zeta=2.0, q_slope=1.0)
        """
        who = f"{cls.__name__}.from_dict"
        instance(who, "data", data, dict)
        name = data.get("method", cls.__dict__.get("method"))
        kind = METHODS.get(name) if isinstance(name, str) else None
        if kind is None or not issubclass(kind, cls):
            known = ", ".join(repr(n) for n, k in METHODS.items() if issubclass(k, cls))
            raise ValueError(f"{who}: method={shown(name)}; known: {known}")
        own = [f.name for f in fields(kind)]
        unknown = sorted(str(key) for key in set(data) - {"method", *own})
        if unknown:
            raise ValueError(f"{who}: unknown field(s) {unknown} of {name}; known: {own}")
        return kind(**{key: value for key, value in data.items() if key != "method"})


@dataclass(frozen=True, repr=False, kw_only=True)
class TAT(Recipe):
    """Tailored Activation Transformation: how near to linear the whole network is to be.

    See `fusedshape.theory.tat` for the conditions. relu and leaky_relu aim at eta, every other
    activation at tau.

    Args:
        activation: a name of `fusedshape.ACTIVATIONS`. Default "leaky_relu".
        eta: η = C_f(0) of the network, in (0, 1), for relu and leaky_relu. Default 0.9.
        tau: τ = C_f″(1) of the network, above 0, for all others. Default 0.3.
        clamp: take the nearest target that can be reached, where the given one cannot.

    Raises:
        ValueError: unknown activation, a target out of its range, or the other activations' target.
        TypeError: an argument of the wrong type.
        Unreachable: the method cannot shape the activation, as square.

    Example:
        >>> TAT(), TAT("tanh"), TAT(eta=0.8) == TAT("leaky_relu", eta=0.8)
        (TAT('leaky_relu', eta=0.9), TAT('tanh', tau=0.3), True)
    """

    method: ClassVar[str] = "TAT"
    impossible: ClassVar[Mapping[str, str]] = {
        "square": "TAT cannot shape square: Q'(1) = C'(1) gives it E[phi] = 0, hence C''(1) = 0, "
        "whatever the constants; use another activation"
    }

    eta: float | None = _target(
        lambda row: 0.9 if row.name in RECTIFIERS else None,
        "C value that the whole network gives to orthogonal inputs",
        above=0.0,
        below=1.0,
        why="at 1 all inputs would look alike",
    )
    tau: float | None = _target(
        lambda row: None if row.name in RECTIFIERS else 0.3,
        "curvature of the whole network's C map at 1",
        above=0.0,
    )
    clamp: bool = False


@dataclass(frozen=True, repr=False, kw_only=True)
class DKS(Recipe):
    """Deep Kernel Shaping: how steep the C map of the whole network is to be.

    See `fusedshape.theory.dks` for the conditions.

    Args:
        activation: a name of `fusedshape.ACTIVATIONS`. Default "leaky_relu".
        zeta: ζ = C_f′(1) of the network, above 1. Default 1.5.
        q_slope: Q′(1) of every layer, in (0, 1]. Default 1.
        clamp: take the nearest target that can be reached, where the given one cannot.

    Raises:
        ValueError: unknown activation, or a target out of its range.
        TypeError: an argument of the wrong type.
        Unreachable: the method cannot shape the activation, as square.

    Example:
        >>> DKS("tanh", q_slope=0.99)
        DKS('tanh', zeta=1.5, q_slope=0.99)
    """

    method: ClassVar[str] = "DKS"
    impossible: ClassVar[Mapping[str, str]] = {
        "square": "DKS cannot shape square: C(0) = 0 gives it Q'(1) = C'(1) > 1 whatever the "
        "constants; use another activation"
    }

    zeta: float = _target(
        lambda row: 1.5, "largest slope of the whole network's C map", left=UNSET, above=1.0
    )
    q_slope: float = _target(
        1.0,
        "slope of every layer's Q map at 1",
        above=0.0,
        high=1.0,
        why="q = 1 would not be stable",
    )
    clamp: bool = False


@dataclass(frozen=True, repr=False, kw_only=True)
class EOC(Recipe):
    """Edge of chaos: the activation as it is, and the weights and biases that suit it.

    See `fusedshape.theory.eoc` for the conditions.

    Args:
        activation: a name of `fusedshape.ACTIVATIONS`. Default "leaky_relu".
        sigma_b: σ_b ≥ 0, standard deviation of biases. Default 0 for relu and leaky_relu, where
            nothing else is possible, 0.2 for all others.
        negative_slope: slope of leaky_relu.

    Raises:
        ValueError: unknown activation, a number out of its range, or a negative_slope of another
            activation than leaky_relu.
        TypeError: an argument of the wrong type.
        Unreachable: relu or leaky_relu with σ_b > 0.

    Example:
        >>> EOC("tanh")
        EOC('tanh', sigma_b=0.2, negative_slope=0.0)
    """

    method: ClassVar[str] = "EOC"

    sigma_b: float | None = _target(
        lambda row: 0.0 if row.homogeneous else 0.2, "standard deviation of biases", low=0.0
    )
    negative_slope: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        slope = number(self.method, "negative_slope", self.negative_slope)
        object.__setattr__(self, "negative_slope", slope)
        if self.spec.row.homogeneous and self.sigma_b:
            raise Unreachable(
                f"EOC: {self.activation} at the edge of chaos adds sigma_b^2 to q in every layer, "
                f"so that no q is fixed with sigma_b={self.sigma_b:g}; pass sigma_b=0"
            )

    @property
    def spec(self) -> ActSpec:
        """The activation as it is."""
        return ActSpec(self.activation, negative_slope=self.negative_slope, origin="EOC")


#: The methods by name; each class knows its activations, its targets and their defaults.
METHODS: dict[str, type[Recipe]] = {kind.method: kind for kind in (TAT, DKS, EOC)}
#: Every number that some method can be given, by name.
TARGETS = {name: target for kind in METHODS.values() for name, target in kind.targets().items()}


def recipe_of(who: str, method: str, given: Mapping[str, Any]) -> Recipe:
    """The recipe that keywords spell; its errors name the function that took them.

    Args:
        who: that function.
        method: a name of `METHODS`, in any case.
        given: those keywords that were given; a target may be any of `TARGETS`.

    Raises:
        ValueError: unknown method or activation, a target that the method does not aim at for the
            activation, or one out of its range.
        TypeError: a value of the wrong type.
        Unreachable: the method cannot shape the activation.

    Example:
        >>> recipe_of("convert", "dks", {"activation": "tanh", "zeta": 2})
        DKS('tanh', zeta=2.0, q_slope=1.0)
        >>> recipe_of("convert", "DKS", {"activation": "tanh", "eta": 0.9})
        Traceback (most recent call last):
        ValueError: convert: DKS of tanh aims at zeta, not at eta=0.9, which belongs to TAT; drop it
    """
    kind = METHODS.get(method.upper()) if isinstance(method, str) else None
    if kind is None:
        raise ValueError(f"{who}: unknown method {shown(method)}; known: {', '.join(METHODS)}")
    return kind.spelled(who, given)


def _strange(kind: type[Recipe], activation: str, name: str, value: object) -> str:
    """Say that a method does not aim at a target, and whose the target is."""
    aim = next(iter(kind.defaults(activation)))
    takers = [k.method for k in METHODS.values() if name in {f.name for f in fields(k)}]
    whose = "other activations" if kind.method in takers else " and ".join(takers)
    belongs = f", which belongs to {whose}" if whose else ""
    return (
        f"{kind.method} of {activation} aims at {aim}, not at {name}={shown(value)}{belongs}; "
        "drop it"
    )
