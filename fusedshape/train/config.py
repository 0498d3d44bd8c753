"""`TrainConfig`: everything that determines a training run, its checks, and its JSON file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fusedshape.files import parse_json, quoted, read_json, write_json
from fusedshape.init import Method
from fusedshape.loading import is_path
from fusedshape.theory import METHODS, TARGETS, Recipe
from fusedshape.theory.recipes import recipe_of
from fusedshape.validate import real

#: Maximum size of a configuration's file in bytes.
SIZE = 1 << 20
CHOICES: dict[str, tuple[str | None, ...]] = {
    "method": (*METHODS, None),
    "init": ("suo", "suo_full", "delta_orthogonal", "gaussian", None),
    "optimiser": ("adam", "sgd"),
    "schedule": ("onecycle", "constant"),
    "amp": ("bfloat16", None),
}
MODELS = ("convnet", "mlp")
DATA = ("digits",)
WHOLE = ("depth", "width", "epochs", "batch_size", "seed", "threads")
OPTIONAL = ("depth", "threads")
LIMITS: dict[str, tuple[float, float]] = {
    "depth": (1, 2**31 - 1),
    "width": (1, 2**31 - 1),
    "epochs": (1, 2**31 - 1),
    "batch_size": (1, 2**31 - 1),
    "seed": (0, 2**32 - 1),
    "threads": (1, 1024),
    "lr": (1e-12, math.inf),
    "gain": (1e-12, math.inf),
    "momentum": (0, 0.999999),
    "weight_decay": (0, math.inf),
    "label_smoothing": (0, 0.999999),
}


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how. Two equal configurations give bitwise equal weights.

    Args:
        model: "convnet" or "mlp" (`fusedshape.models`), or "pkg.module:factory". A factory is
            called with in_channels and num_classes and returns a plain nn.Module.
        data: "digits", or "pkg.module:factory" of a `Data`.
        depth: nonlinear layers; needed by the built-in models and passed on to `convert`.
        width: channels or features of a layer of the built-in models.
        pln: put `fusedshape.nn.PerLocationNorm` before the model, which adds an input channel.
        method: "TAT", "DKS", "EOC", or None to leave the model's own activations.
        activation: activation of the converted model.
        zeta: target of DKS; None takes the method's default, as for the other targets.
        eta: target of TAT with relu and leaky_relu.
        tau: target of TAT with all other activations.
        sigma_b: target of EOC.
        init: how `fusedshape.init.init_module_` draws every linear and convolution layer; None
            leaves the model's own weights.
        gain: σ_w of every layer, for method None; the other methods decide it themselves.
        epochs: passes over the training examples.
        batch_size: examples a step; the last batch of an epoch may be smaller.
        lr: peak learning rate.
        schedule: "onecycle" (cosine from lr/25 up to lr over the first 30 % of the steps, and
            down to lr/250 000) or "constant".
        optimiser: "adam" or "sgd" (Nesterov).
        momentum: momentum of "sgd".
        weight_decay: L2 for "sgd", decoupled for "adam".
        label_smoothing: label smoothing of the cross entropy in training.
        seed: determines weights and the order of examples.
        device: "cpu", "cuda", "cuda:1", …
        threads: CPU threads; None leaves torch's setting.
        channels_last: whether models with 2-d convolutions are laid out channels last.
        amp: "bfloat16" for autocast, or None.
        q_slope: target of DKS; None takes its default.
        clamp: take the nearest target that can be reached where the given one cannot.

    Raises:
        ValueError: a value outside its limits.
        TypeError: a value of the wrong type.

    Example:
        >>> config = TrainConfig(depth=30, lr=3e-4)
        >>> TrainConfig.from_json(config.to_json()) == config
        True
    """

    model: str = "convnet"
    data: str = "digits"
    depth: int | None = None
    width: int = 32
    pln: bool = True
    method: str | None = "TAT"
    activation: str = "leaky_relu"
    zeta: float | None = None
    eta: float | None = None
    tau: float | None = None
    sigma_b: float | None = None
    init: Method | None = "suo"
    gain: float = 1.0
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-4
    schedule: str = "onecycle"
    optimiser: str = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    channels_last: bool = True
    amp: str | None = None
    q_slope: float | None = None
    clamp: bool = False

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, (str, type(None))) or value not in known:
                raise ValueError(f"TrainConfig: {name}={value!r}; known: {_listed(known)}")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            _check_number(name, value, low, high)
            if name not in WHOLE:
                object.__setattr__(self, name, float(value))
        for name in ("pln", "clamp", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"TrainConfig: {name} must be true or false, got {getattr(self, name)!r}"
                )
        for name, builtin in (("model", MODELS), ("data", DATA)):
            value = getattr(self, name)
            if value not in builtin and not is_path(value):
                raise ValueError(
                    f"TrainConfig: {name}={value!r}; known: {_listed(builtin)}, or the form "
                    "pkg.module:factory"
                )
        for name in ("activation", "device"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(
                    f"TrainConfig: {name} must be a string, got {getattr(self, name)!r}"
                )
        if self.model in MODELS and self.depth is None:
            raise ValueError(f"TrainConfig: model {self.model!r} needs a depth, e.g. depth=100")
        self._demand_recipe()
        if self.method is not None and self.gain != 1:
            raise ValueError(
                f"TrainConfig: {self.method} decides the scale of the weights, got "
                f"gain={self.gain}; leave it at 1, or set method to null"
            )

    def _demand_recipe(self) -> None:
        if self.method is not None:
            recipe = self.recipe
            for name in self._aims():
                object.__setattr__(self, name, getattr(recipe, name))
        elif self._aims():
            raise ValueError(
                f"TrainConfig: method null aims at nothing, not at {', '.join(self._aims())}; set "
                "it to null, and clamp to false"
            )

    def _aims(self) -> dict[str, Any]:
        """The arguments of the recipe that are not left to their defaults."""
        given = {name: getattr(self, name) for name in TARGETS}
        given = {name: value for name, value in given.items() if value is not None}
        return given | ({"clamp": True} if self.clamp else {})

    @property
    def recipe(self) -> Recipe | None:
        """The recipe by which the model is converted; None for method None.

        Example:
            >>> TrainConfig(depth=30, eta=0.8).recipe
            TAT('leaky_relu', eta=0.8)
        """
        if self.method is None:
            return None
        given = {"activation": self.activation, **self._aims()}
        return recipe_of("TrainConfig", self.method, given)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of the fields."""
        return asdict(self)

    def to_json(self) -> str:
        """JSON text; floats keep every bit."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Inverse of `to_json`; fields left out take their defaults.

        Raises:
            ValueError: text that is not a JSON object, an unknown field, or a value out of limits.
            TypeError: a value of the wrong type.
        """
        return cls.from_dict(parse_json(text, "TrainConfig: the text"))

    @classmethod
    def from_dict(cls, data: Any) -> TrainConfig:
        """Inverse of `to_dict`; fields left out take their defaults.

        Raises:
            ValueError: no dict, an unknown field, or a value out of limits.
            TypeError: a value of the wrong type.
        """
        if not isinstance(data, dict):
            raise ValueError(f"TrainConfig: expected a JSON object, got {quoted(data)}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"TrainConfig: unknown field(s) {unknown}; known: {sorted(known)}")
        return cls(**data)

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read a JSON file.

        Raises:
            OSError: the file cannot be read.
            ValueError: as `from_json`; the message names the file.
            TypeError: as `from_json`.
        """
        data = read_json(path, limit=SIZE)
        try:
            return cls.from_dict(data)
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        write_json(Path(path), self.to_dict())


def _listed(values: tuple[str | None, ...]) -> str:
    return ", ".join("null" if v is None else repr(v) for v in values)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    kinds = (int,) if name in WHOLE else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "a whole number" if name in WHOLE else "a number"
        raise TypeError(f"TrainConfig: {name} must be {kind}, got {value!r}")
    assert isinstance(value, (int, float))
    if not (low <= value <= high and math.isfinite(real("TrainConfig", name, value))):
        limits = " … ".join(
            f"{n:g}" if n == math.inf or name not in WHOLE else str(n) for n in (low, high)
        )
        raise ValueError(f"TrainConfig: {name}={value} must be finite and in {limits}")
