"""Across modules: every argument of every public callable refuses values that it cannot mean.

A call takes what is legal for the argument and refuses all else by an error that names the callable
and the argument; nothing is taken silently, hangs, or ends in an error of some place further down.
"""

from __future__ import annotations

import importlib
import inspect
import math
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedshape
from fusedshape import (
    ACTIVATIONS,
    ActSpec,
    ChainLayer,
    NormalizedSum,
    PerLocationNorm,
    ShapedActivation,
    ShapedChain,
    ShapedConv1d,
    ShapedConv2d,
    ShapedConv3d,
    ShapedLinear,
    init,
    models,
    ops,
    theory,
    train,
    tuning,
)
from fusedshape.ops.choice import engine_names
from fusedshape.ops.dispatch import backend_names
from fusedshape.theory import Node, Wiring

SECONDS = 20  # for one call, on a busy machine
VALUES: dict[str, Any] = {
    "None": None,
    "empty text": "",
    "text": "a",
    "list": [],
    "dict": {},
    "object": object(),
    "True": True,
    "nan": math.nan,
    "inf": math.inf,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "2**70": 2**70,
    "2**2000": 2**2000,
    "Parameter": nn.Parameter(torch.ones(2)),
    "random.Random": random.Random(0),
}
Kind = Callable[[Any], bool]


def nothing(value: Any) -> bool:
    return False


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def text(value: Any) -> bool:
    return isinstance(value, str)


def tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def real(low: float = -math.inf, high: float = math.inf) -> Kind:
    def legal(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and low <= value <= high and abs(value) < 2**1000

    return legal


def whole(low: int, high: int = 10**4) -> Kind:
    return lambda value: type(value) is int and low <= value <= high


def word(*known: str) -> Kind:
    return lambda value: isinstance(value, str) and value in known


def empty(kind: type) -> Kind:
    return lambda value: type(value) is kind


def maybe(*kinds: Kind) -> Kind:
    return lambda value: value is None or any(kind(value) for kind in kinds)


BACKEND, ENGINE, ACTIVATION = word(*backend_names()), word(*engine_names()), word(*ACTIVATIONS)
SIZES = {"stride": whole(1), "padding": whole(0), "dilation": whole(1), "groups": whole(1)}
RELU = ActSpec("relu", output_scale=2**0.5)
X, W = torch.zeros(2, 3, 5, 5), torch.zeros(3, 3, 3, 3)


@dataclass(frozen=True)
class Entry:
    """A callable, arguments with which it works, and what else each of them may be."""

    call: Callable[..., Any]
    given: Callable[[], dict[str, Any]]
    legal: dict[str, Kind] = field(default_factory=dict)
    #: Of whom the arguments are, where `call` only makes the call.
    of: Any = None
    #: What the messages may call it.
    names: tuple[str, ...] = ()
    #: What they may name instead of the argument.
    parts: tuple[str, ...] = ()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def skip() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    return nn.Sequential(Block(), Block())


def layer(cls: Any, **own: Any) -> Entry:
    arguments = {"in_channels": 3, "out_channels": 3, "kernel_size": 3}
    if cls is ShapedLinear:
        arguments = {"in_features": 3, "out_features": 3}
    legal = {"spec": nothing, "backend": BACKEND, "engine": ENGINE}
    return Entry(cls, lambda: {**arguments, "spec": RELU}, legal)


def fill(f: Any) -> Entry:
    legal = {
        "weight": nothing,
        "groups": whole(1),
        "transposed": flag,
        "stride": whole(1),
        "gain": real(),
        "generator": maybe(),
    }
    if f is init.delta_orthogonal_:
        del legal["stride"]
    return Entry(f, lambda: {"weight": torch.zeros(3, 3, 3)}, legal)


SOLVED = {
    "activation": ACTIVATION,
    "depth": maybe(whole(1, 2**39)),
    "subnet_max": maybe(),
    "zeta": real(1),
    "q_slope": real(0, 1),
    "eta": real(0, 1),
    "tau": real(0),
    "clamp": flag,
}


def solver(f: Any, activation: str, **more: Any) -> Entry:
    legal = {**SOLVED, "method": word("DKS", "TAT")}
    names = inspect.signature(f).parameters
    given = {"activation": activation, "depth": 20, **more}
    return Entry(
        f, lambda: dict(given), {n: legal[n] for n in names}, names=("dks", "tat", "chain")
    )


def moment(f: Any, at: str, low: float, high: float, **more: Kind) -> Entry:
    return Entry(f, lambda: {"spec": RELU, at: 0.5}, {"spec": nothing, at: real(low, high), **more})


def builder(f: Any, **given: int) -> Entry:
    legal: dict[str, Kind] = dict.fromkeys(inspect.signature(f).parameters, whole(1, 1000))
    if "pool_after" in legal:
        legal["pool_after"] = maybe(whole(0))
    if "shortcut_weight" in legal:
        legal["shortcut_weight"] = real(0, 1)
    return Entry(f, lambda: dict(given), legal)


def entered(manager: Callable[..., Any]) -> Callable[..., Any]:
    """Enter a context manager and leave it again."""

    def wrapped(**given: Any) -> Any:
        with manager(**given):
            pass

    return wrapped


def on_meta(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, making parameters that take no memory."""

    def wrapped(**given: Any) -> Any:
        with torch.device("meta"):
            return call(**given)

    return wrapped


ENTRIES: dict[str, Entry] = {
    **{
        f.__name__: Entry(
            lambda f=f, **given: f(
                **{"model": nn.Sequential(ShapedLinear(3, 3, spec=RELU)), **given}
            ),
            dict,
            {"model": nothing},
            f,
        )
        for f in (fusedshape.fuse, fusedshape.unfuse)
    },
    "tap": Entry(
        entered(fusedshape.tap),
        lambda: {"model": mlp()},
        {"model": nothing, "layers": maybe(empty(list), empty(dict))},
        fusedshape.tap,
        parts=("has no module", "no linear or convolution layer"),
    ),
    "vanilla_vgg16": Entry(
        on_meta(models.vanilla_vgg16),
        lambda: {"num_classes": 10},
        {"num_classes": whole(1), "in_channels": whole(1)},
        models.vanilla_vgg16,
    ),
    "ActSpec": Entry(
        ActSpec,
        lambda: {"activation": "leaky_relu"},
        {
            "activation": ACTIVATION,
            **dict.fromkeys(
                (
                    "input_scale",
                    "input_shift",
                    "output_shift",
                    "output_scale",
                    "negative_slope",
                ),
                real(),
            ),
            "origin": text,
        },
    ),
    "ActSpec.from_json": Entry(
        ActSpec.from_json, lambda: {"text": RELU.to_json()}, {"text": nothing}
    ),
    "ActSpec.from_dict": Entry(
        ActSpec.from_dict, lambda: {"data": RELU.to_dict()}, {"data": nothing}, parts=("field",)
    ),
    "ChainLayer": Entry(
        lambda **given: fusedshape.conv_chain(X, [ChainLayer(**given)]),
        lambda: {"weight": W, "bias": None, "spec": RELU},
        {
            "weight": nothing,
            "bias": maybe(),
            "spec": nothing,
            **SIZES,
            "backend": BACKEND,
            "engine": ENGINE,
        },
        ChainLayer,
        ("conv_chain",),
    ),
    "NormalizedSum": Entry(NormalizedSum, lambda: {"weights": (0.6, 0.8)}, {"weights": nothing}),
    "NormalizedSum.shortcut": Entry(
        NormalizedSum.shortcut, lambda: {"weight": 0.5}, {"weight": real(0, 1)}
    ),
    "NormalizedSum.forward": Entry(
        lambda branches: NormalizedSum((1.0,))(branches),
        lambda: {"branches": X},
        {"branches": tensor},
        NormalizedSum.forward,
        ("NormalizedSum",),
    ),
    "PerLocationNorm": Entry(
        PerLocationNorm,
        dict,
        {"homog_mode": word("one", "avg_q", "off"), "homog_scale": real(1e-300)},
    ),
    "PerLocationNorm.forward": Entry(
        lambda x: PerLocationNorm()(x),
        lambda: {"x": X},
        {"x": nothing},
        PerLocationNorm.forward,
        ("PerLocationNorm",),
    ),
    "ShapedActivation": Entry(
        ShapedActivation, lambda: {"spec": RELU}, {"spec": nothing, "backend": BACKEND}
    ),
    "ShapedChain": Entry(
        lambda **given: ShapedChain(nn.ReLU(), **given),
        dict,
        {"max_length": maybe(whole(1, 2**2001))},
        ShapedChain,
    ),
    **{
        cls.__name__: layer(cls) for cls in (ShapedConv1d, ShapedConv2d, ShapedConv3d, ShapedLinear)
    },
    "ShapedLinear.from_plain": Entry(
        ShapedLinear.from_plain,
        lambda: {"module": nn.Linear(3, 3), "spec": RELU},
        {"module": nothing, "spec": nothing, "backend": BACKEND, "engine": ENGINE},
    ),
    "shaped_act": Entry(
        ops.shaped_act,
        lambda: {"x": X, "spec": RELU},
        {"x": tensor, "spec": nothing, "backend": BACKEND},
    ),
    "bias_act": Entry(
        ops.bias_act,
        lambda: {"x": X, "bias": torch.zeros(3), "spec": RELU},
        {
            "x": nothing,
            "bias": maybe(),
            "spec": nothing,
            "dim": whole(1, 1),
            "backend": BACKEND,
        },
    ),
    "conv_act": Entry(
        ops.conv_act,
        lambda: {"x": X, "weight": W, "bias": None, "spec": RELU, "padding": 1},
        {
            "x": nothing,
            "weight": nothing,
            "bias": maybe(),
            "spec": nothing,
            **SIZES,
            "padding_mode": word("zeros", "reflect", "replicate", "circular"),
            "backend": BACKEND,
            "engine": ENGINE,
            "residual": maybe(),
            "residual_weight": maybe(),
        },
    ),
    "linear_act": Entry(
        ops.linear_act,
        lambda: {"x": X, "weight": torch.zeros(4, 5), "bias": None, "spec": RELU},
        {
            "x": nothing,
            "weight": nothing,
            "bias": maybe(),
            "spec": nothing,
            "backend": BACKEND,
            "engine": ENGINE,
            "residual": maybe(),
            "residual_weight": maybe(),
        },
    ),
    "conv_chain": Entry(
        ops.conv_chain,
        lambda: {"x": X, "layers": [ChainLayer(W, None, RELU)]},
        {"x": nothing, "layers": nothing, "max_length": maybe(whole(1, 2**2001))},
    ),
    "convert": Entry(
        lambda **given: fusedshape.convert(**{"model": mlp(), **given}),
        lambda: {"spec": None, "clamp": True},
        {
            "model": nothing,
            "recipe": maybe(),
            "method": word("TAT", "DKS", "EOC"),
            "sigma_b": maybe(),
            "spec": maybe(),
            "init": maybe(word("suo", "suo_full", "delta_orthogonal", "gaussian")),
            "generator": maybe(),
            "fuse": flag,
            "replace": lambda v: empty(list)(v) or word("all")(v),
            "filter_fn": maybe(),
            "normalisation": maybe(word("strip")),
            "check": flag,
            "strip_batchnorm": flag,
            "add_biases": maybe(lambda v: v is False),
            "shortcuts": maybe(lambda v: real(0, 1)(v) or v == {}),
            "on_ambiguous": word("error", "report"),
            "on_untraceable": word("error", "report"),
            "dry_run": flag,
            "backend": BACKEND,
            "chain": lambda v: flag(v) or whole(1, 2**2001)(v),
            **{n: k for n, k in SOLVED.items() if n != "q_slope"},
        },
        fusedshape.convert,
        ("tat", "chain"),
    ),
    "diagnose": Entry(
        fusedshape.diagnose,
        lambda: {"model": mlp(), "data": torch.randn(4, 4)},
        {
            "model": nothing,
            "data": nothing,
            "batches": whole(1, 2**2001),
            "sigma_w": maybe(real(1e-9)),
            "sigma_b": maybe(real(0)),
        },
    ),
    "fold": Entry(
        lambda **given: fusedshape.fold(**{"model": mlp(), **given}),
        dict,
        {"model": nothing, "keep_delta": flag},
        fusedshape.fold,
    ),
    "register_layer": Entry(
        fusedshape.register_layer,
        lambda: {"cls": type("Own", (nn.Module,), {})},
        {"cls": nothing, "like": nothing},
    ),
    "reweight_shortcuts": Entry(
        lambda **given: fusedshape.reweight_shortcuts(**{"model": skip(), **given}),
        lambda: {"shortcut_weight": 0.5},
        {
            "model": nothing,
            "shortcut_weight": lambda v: real(0, 1)(v) or v == {},
            "filter_fn": maybe(),
            "drop_unused": flag,
            "dry_run": flag,
            "on_ambiguous": word("error", "report"),
        },
        fusedshape.reweight_shortcuts,
    ),
    **{
        f.__name__: fill(f)
        for f in (init.suo_, init.suo_full_, init.delta_orthogonal_, init.gaussian_)
    },
    "init_module_": Entry(
        init.init_module_,
        lambda: {"module": nn.Linear(3, 3)},
        {
            "module": nothing,
            "method": word("suo", "suo_full", "delta_orthogonal", "gaussian"),
            "gain": real(),
            "bias_std": real(0),
            "generator": maybe(),
        },
        names=("suo_",),
    ),
    "Node": Entry(
        lambda **given: Wiring((Node("input"), Node(**given))),
        lambda: {"op": "affine", "inputs": (0,)},
        {
            "op": word("input", "affine"),
            "inputs": nothing,
            "weights": lambda v: v == (),
            "path": text,
            "spec": maybe(),
            "note": text,
        },
        Node,
        ("Wiring",),
    ),
    "Wiring": Entry(
        Wiring,
        lambda: {"nodes": (Node("input"), Node("nonlinear", (0,)))},
        {"nodes": nothing, "outputs": nothing, "notes": nothing},
    ),
    "c_map": moment(theory.c_map, "c", -1, 1),
    "c_slope": moment(theory.c_slope, "c", -1, 1),
    "c_curve": moment(theory.c_curve, "c", -1, 1, corners=flag),
    "q_map": moment(theory.q_map, "q", 0, 1e8),
    "q_slope": moment(theory.q_slope, "q", 1e-9, 1e8),
    "chain": Entry(theory.chain, lambda: {"depth": 3}, {"depth": whole(1, 10**12)}),
    "resnet": Entry(
        theory.resnet, lambda: {"depth": 50}, {"depth": nothing, "shortcut_weight": real(0, 1)}
    ),
    "dks": solver(theory.dks, "tanh"),
    "tat": solver(theory.tat, "leaky_relu"),
    "solve": solver(theory.solve, "tanh", method="DKS"),
    "eoc": Entry(
        theory.eoc,
        lambda: {"activation": "leaky_relu"},
        {"activation": ACTIVATION, "sigma_b": maybe(real(0, 0)), "negative_slope": real()},
    ),
    "TAT": Entry(
        theory.TAT,
        lambda: {"activation": "leaky_relu"},
        {"activation": ACTIVATION, "eta": maybe(), "tau": maybe(), "clamp": flag},
    ),
    "DKS": Entry(
        theory.DKS,
        lambda: {"activation": "tanh"},
        {"activation": ACTIVATION, **{n: SOLVED[n] for n in ("zeta", "q_slope", "clamp")}},
    ),
    "EOC": Entry(
        theory.EOC,
        lambda: {"activation": "leaky_relu"},
        {"activation": ACTIVATION, "sigma_b": maybe(real(0, 0)), "negative_slope": real()},
    ),
    "trace_wiring": Entry(
        theory.trace_wiring,
        lambda: {"model": mlp()},
        {"model": nothing, "strip_batchnorm": flag},
    ),
    "rescaled_resnet": builder(models.rescaled_resnet, depth=18, width=1),
    "vanilla_convnet": builder(models.vanilla_convnet, depth=2, width=1),
    "vanilla_mlp": builder(models.vanilla_mlp, depth=2, width=1),
    "vanilla_resnet": builder(models.vanilla_resnet, depth=50, width=1),
    "mode": Entry(
        entered(tuning.mode),
        lambda: {"name": "off"},
        {"name": word("off", "cached", "full")},
        tuning.mode,
    ),
    "fused_layers": Entry(
        lambda model: tuning.fused_layers(model, torch.zeros(1, 3)),
        lambda: {"model": nn.Sequential(ShapedLinear(3, 3, spec=RELU))},
        {"model": nothing},
    ),
    "explain": Entry(
        lambda model: fusedshape.explain(model, torch.zeros(1, 3)),
        lambda: {"model": nn.Sequential(ShapedLinear(3, 3, spec=RELU))},
        {"model": nothing},
    ),
}
FIELDS = inspect.signature(train.TrainConfig).parameters
ENTRIES |= {
    "TrainConfig": Entry(
        train.TrainConfig,
        lambda: {"depth": 3},
        # What each field may be is tested in test_train; here it has to be said by name.
        dict.fromkeys(FIELDS, lambda v: True),
    ),
    "TrainConfig.from_json": Entry(
        train.TrainConfig.from_json, lambda: {"text": '{"depth": 3}'}, {"text": nothing}
    ),
    "run": Entry(
        lambda config: train.run(config, "never made"),
        lambda: {"config": None},
        {"config": nothing},
        lambda config: None,
    ),
}
# Made by the package for people to read, or what it raises.
RECORDS = {
    *("Change", "Diagnosis", "EdgeOfChaos", "Finding", "Layer", "Report", "Result"),
    *("Recipe", "ShortcutReport", "SubnetMax", "UnreadableError", "Unreachable"),
}
# Asked for far below, where it is not known by whom: "unknown backend 'a'; known: …".
UNNAMED = ("backend", "engine")
# torch says what a device may be, and a model what its input may be; their errors say more.
UNSWEPT = {"device", "example"}
# Take no argument, or what only the package makes: problems of the tuner and tensors of a loader.
OTHERS = {
    *("cache_directory", "current_mode", "status", "choose", "measure", "Data"),
    *("place", "is_place", "chain_rows", "why_not_chained", "check_init"),
}
MODULES = (
    *("fusedshape", "fusedshape.ops", "fusedshape.nn", "fusedshape.init", "fusedshape.theory"),
    *("fusedshape.tuning", "fusedshape.models", "fusedshape.train", "fusedshape.diagnose"),
    *("fusedshape.convert", "fusedshape.fold", "fusedshape.shortcuts"),
)


def public() -> Iterator[str]:
    """Names of all public callables."""
    for path in MODULES:
        module = importlib.import_module(path)
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == path]
        for name in getattr(module, "__all__", [n for n in own if n[0] != "_"]):
            if callable(getattr(module, name)) and not inspect.ismodule(getattr(module, name)):
                yield name


@contextmanager
def limited() -> Iterator[None]:
    """Fail if the call inside does not end in time."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def arguments(entry: Entry) -> list[str]:
    """The parameters that can be given by name."""
    found = inspect.signature(entry.of or entry.call).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for p in found if p.kind in named and p.name != "self"]
    return names or list(entry.legal)


def faults(name: str, entry: Entry, argument: str) -> Iterable[str]:
    """The faults in how a callable takes values of one argument."""
    called = [*name.split("."), *entry.names]
    for label, value in VALUES.items():
        where = f"{name}({argument}={label})"
        try:
            with limited():
                entry.call(**{**entry.given(), argument: value})
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            said = str(error)
            derived = type(error) not in (TypeError, ValueError, IndexError, RuntimeError)
            if derived and not type(error).__module__.startswith("fusedshape"):
                yield f"{where} ends in {type(error).__name__}: {said:.100}"
            elif not any(word in said for word in (argument, *entry.parts)) or not (
                argument in UNNAMED or any(who in said for who in called)
            ):
                yield f"{where} does not name both: {type(error).__name__}: {said:.120}"
        except Exception as error:
            yield f"{where} ends in {type(error).__name__}: {error!s:.100}"
        else:
            if not entry.legal[argument](value):
                yield f"{where} is taken silently"


def test_every_public_callable_has_an_entry() -> None:
    assert set(public()) - RECORDS - OTHERS - set(ENTRIES) == set()
    for name, entry in ENTRIES.items():
        assert set(arguments(entry)) - UNSWEPT <= set(entry.legal), (
            f"{name} has an argument without a kind"
        )
        if name != "run":
            entry.call(**entry.given())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "argument"), [(n, a) for n, entry in ENTRIES.items() for a in entry.legal]
)
def test_bad_input_is_refused_by_name(name: str, argument: str) -> None:
    assert "\n".join(faults(name, ENTRIES[name], argument)) == ""


if __name__ == "__main__":  # all at once, to read
    for name, entry in ENTRIES.items():
        for argument in entry.legal:
            for fault in faults(name, entry, argument):
                print(fault, flush=True)
