"""`fusedshape constants`, and the options for method, activation and network of every command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from fusedshape.activations import ACTIVATIONS
from fusedshape.loading import load_object, make_model
from fusedshape.shell import Commands
from fusedshape.theory import eoc, solve, trace_wiring

METHODS = ("DKS", "TAT", "EOC")
TARGETS = ("zeta", "eta", "tau", "sigma_b")


def declare(commands: Commands) -> None:
    """Declare `fusedshape constants`."""
    about = "compute the constants of a shaped activation for a network"
    parser = commands.add("constants", _run, about)
    add_recipe(parser)
    parser.add_argument(
        "--model",
        metavar="PKG.MODULE:FACTORY",
        help="read the network's wiring off the model that this factory returns when called "
        "without arguments",
    )
    parser.add_argument(
        "--strip-batchnorm",
        action="store_true",
        help="read the model as if its BatchNorm layers were not there",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Declare the method, the activation, the targets, and the network they are for."""
    for name, choices, about in (
        ("method", METHODS, f"method by which to shape: {', '.join(METHODS)} (default TAT)"),
        ("activation", None, f"activation to shape: {', '.join(ACTIVATIONS)} (default leaky_relu)"),
    ):
        kind: Any = {"metavar": name.upper(), "choices": choices}
        kind["type"] = str.upper if choices else str
        # In every command as an option, or as a word.
        parser.add_argument(f"{name}_word", nargs="?", help=f"{name}, as --{name} takes it", **kind)
        parser.add_argument(f"--{name}", help=about, **kind)
    targets = parser.add_argument_group("targets")
    for name, about in (
        ("zeta", "largest slope of the network's C map that DKS aims at (default 1.5)"),
        ("eta", "value of the network's C map at 0 that TAT of leaky_relu aims at (default 0.9)"),
        ("tau", "curvature of the network's C map at 1 that other TAT aims at (default 0.3)"),
        ("sigma-b", "standard deviation of the biases for EOC (default: the theory's choice)"),
    ):
        targets.add_argument(f"--{name}", type=float, metavar="NUMBER", help=about)
    targets.add_argument(
        "--clamp",
        action="store_true",
        help="take the nearest target that can be reached where the wanted one cannot",
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--depth",
        type=int,
        metavar="LAYERS",
        help="number of nonlinear layers, if the network is a plain chain of them",
    )
    network.add_argument(
        "--subnet-max",
        metavar="PKG.MODULE:FUNCTION",
        help="take the wiring from a function of (x, r) that applies the map r for each layer",
    )


def recipe_of(args: argparse.Namespace) -> dict[str, Any]:
    """The method, the activation and what else was given, as `solve` and `convert` take them.

    Raises:
        SystemExit: 2, the method or the activation is given twice.
        ValueError: a target that the method does not aim at, or no such function.
    """
    found: dict[str, Any] = {}
    for name, usual in (("method", "TAT"), ("activation", "leaky_relu")):
        word, option = getattr(args, f"{name}_word"), getattr(args, name)
        if word and option:
            args.parser.error(f"{name} is given twice, as {word} and as {option}")
        found[name] = word or option or usual
    given = {n: getattr(args, n) for n in ("depth", *TARGETS) if getattr(args, n) is not None}
    strange = strange_targets(found["method"], found["activation"], given)
    if strange:
        raise ValueError(f"{strange}; drop what is not its own")
    if args.subnet_max is not None:
        given["subnet_max"] = load_object(args.subnet_max)
    if args.clamp:
        given["clamp"] = True
    return found | given


def strange_targets(method: str | None, activation: str, given: Mapping[str, object]) -> str | None:
    """Say which of the targets that are given, and not None, a method does not aim at.

    Example:
        >>> strange_targets("TAT", "tanh", {"zeta": 1.5, "tau": 0.3})
        'TAT of tanh aims at tau, not at zeta'
        >>> strange_targets("DKS", "tanh", {"zeta": 1.5, "tau": None})
    """
    aims: dict[str | None, str | None] = {"DKS": "zeta", "TAT": "tau", "EOC": "sigma_b", None: None}
    name = method and method.upper()
    if name not in aims:
        return None  # who knows the methods says so
    aim = "eta" if name == "TAT" and activation in ("relu", "leaky_relu") else aims[name]
    strange = [other for other in TARGETS if given.get(other) is not None and other != aim]
    if not strange:
        return None
    of = f"{name} of {activation}" if name else "method null"
    return f"{of} aims at {aim or 'nothing'}, not at {', '.join(strange)}"


def _run(args: argparse.Namespace) -> None:
    given = recipe_of(args)
    method, activation = given.pop("method"), given.pop("activation")
    networks = given.keys() & {"depth", "subnet_max"}
    wiring = None
    if args.model is not None:
        if networks or method == "EOC":
            raise ValueError("--model tells the depth; drop --depth and --subnet-max, and EOC")
        wiring = trace_wiring(make_model(args.model), strip_batchnorm=args.strip_batchnorm)
        given["subnet_max"] = wiring
    elif method != "EOC" and len(networks) != 1:
        args.parser.error(
            "give the network once: --depth for a plain chain of layers, --subnet-max, or --model"
        )
    row: dict[str, Any]
    if method == "EOC":
        sigma_b = given.pop("sigma_b", None)
        if given:
            raise ValueError(f"EOC takes --sigma-b only, got {', '.join(sorted(given))}")
        edge = eoc(activation, sigma_b=sigma_b)
        row = {"method": "EOC", "activation": activation}
        row |= {"sigma_w": edge.sigma_w, "sigma_b": edge.sigma_b, "q": edge.q}
    else:
        row = {"method": method, **solve(method, activation, **given).to_dict()}
        if wiring is not None:
            row |= {"depth": wiring.depth, "notes": list(wiring.notes)}
    if args.json:
        print(json.dumps(row))
    else:
        for key, value in row.items():
            print(f"{key:<14} {value!r}" if isinstance(value, float) else f"{key:<14} {value}")
