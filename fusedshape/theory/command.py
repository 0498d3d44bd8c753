"""`fusedshape constants`, and the options for recipe and network that other commands take, too."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any

from fusedshape import theory
from fusedshape.activations import ACTIVATIONS
from fusedshape.loading import load_object, make_model
from fusedshape.shell import Commands
from fusedshape.theory import DKS, EOC, METHODS, TARGETS, TAT, Recipe, recipes

#: What is shaped, and how, where nothing is named.
_USUAL = TAT()


def declare(commands: Commands) -> None:
    """Declare `fusedshape constants`."""
    about = "compute the constants of a shaped activation for a network"
    parser = commands.add("constants", _run, about)
    add_recipe(parser)
    add_network(parser)
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
    """Declare what a recipe is made of: the method, the activation, and what to aim at."""
    for name, choices, about in (
        ("method", METHODS, "method by which to shape"),
        ("activation", ACTIVATIONS, "activation to shape"),
    ):
        default = getattr(_USUAL, name)
        kind: Any = {"metavar": name.upper()}
        if name == "method":
            kind |= {"choices": tuple(choices), "type": str.upper}
        # In every command as an option, or as a word.
        parser.add_argument(f"{name}_word", nargs="?", help=f"{name}, as --{name} takes it", **kind)
        about = f"{about}: {', '.join(choices)} (default {default})"
        parser.add_argument(f"--{name}", help=about, **kind)
    group = parser.add_argument_group("targets of the method")
    for name, target in TARGETS.items():
        owners = " and ".join(own for own, kind in METHODS.items() if name in kind.targets())
        about = f"{target.about}, which {owners} aims at (default {_default(target)})"
        _add_number(group, name, about)
    _add_number(group, "negative_slope", "slope of leaky_relu below 0 for EOC (default 0)")
    group.add_argument(
        "--clamp",
        action="store_true",
        default=None,
        help="take the nearest target that can be reached where the wanted one cannot",
    )


def add_network(parser: argparse.ArgumentParser) -> None:
    """Declare the network that constants are for."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--depth",
        type=int,
        metavar="LAYERS",
        help="number of nonlinear layers, if the network is a plain chain of them",
    )
    group.add_argument(
        "--subnet-max",
        metavar="PKG.MODULE:FUNCTION",
        help="take the wiring from a function of (x, r) that applies the map r for each layer",
    )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the options of `add_recipe` spell.

    Raises:
        SystemExit: 2, the method or the activation is given twice.
        ValueError, TypeError: as `fusedshape.theory.recipes.recipe_of`.
    """
    found = {}
    for name in ("method", "activation"):
        word, option = getattr(args, f"{name}_word"), getattr(args, name)
        if word and option:
            args.parser.error(f"{name} is given twice, as {word} and as {option}")
        found[name] = word or option or getattr(_USUAL, name)
    names = dict.fromkeys(field.name for kind in METHODS.values() for field in fields(kind))
    given = {name: getattr(args, name) for name in names if name != "activation"}
    given = {name: value for name, value in given.items() if value is not None}
    method = found.pop("method")
    return recipes.recipe_of(args.parser.prog.split()[-1], method, given | found)


def network_of(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `add_network`, as `solve` and `convert` take it."""
    given: dict[str, Any] = {}
    if args.depth is not None:
        given["depth"] = args.depth
    if args.subnet_max is not None:
        given["subnet_max"] = load_object(args.subnet_max)
    return given


def _add_number(group: Any, name: str, about: str) -> None:
    option = "--" + name.replace("_", "-")
    group.add_argument(option, type=float, metavar="NUMBER", help=about)


def _default(target: recipes.Target) -> str:
    """A target's default, or its defaults by activation."""
    rows: dict[float | None, list[str]] = {}
    for row in ACTIVATIONS.values():
        rows.setdefault(target.default(row), []).append(row.name)
    few = len(ACTIVATIONS) // 2
    return ", ".join(
        f"{value:g}"
        + (
            ""
            if len(rows) == 1
            else f" for {' and '.join(names) if len(names) < few else 'others'}"
        )
        for value, names in rows.items()
        if value is not None
    )


def _run(args: argparse.Namespace) -> None:
    recipe, network = recipe_of(args), network_of(args)
    row: dict[str, Any]
    wiring = None
    if args.model is not None:
        if network or isinstance(recipe, EOC):
            raise ValueError("--model tells the depth; drop --depth and --subnet-max, and EOC")
        wiring = theory.trace_wiring(make_model(args.model), strip_batchnorm=args.strip_batchnorm)
        network["subnet_max"] = wiring
    if isinstance(recipe, EOC):
        if network:
            given = " and ".join("--" + name.replace("_", "-") for name in network)
            raise ValueError(f"EOC takes --sigma-b only and knows no network, got {given}; drop it")
        edge = theory.eoc(recipe)
        row = {"method": recipe.method, "activation": recipe.activation}
        row |= {"sigma_w": edge.sigma_w, "sigma_b": edge.sigma_b, "q": edge.q}
    else:
        assert isinstance(recipe, (TAT, DKS))
        if len(network) != 1:
            args.parser.error(
                "give the network once: --depth for a plain chain of layers, --subnet-max, or "
                "--model"
            )
        row = {"method": recipe.method, **theory.solve(recipe, **network).to_dict()}
        if wiring is not None:
            row |= {"depth": wiring.depth, "notes": list(wiring.notes)}
    if args.json:
        print(json.dumps(row))
    else:
        for key, value in row.items():
            print(f"{key:<14} {value!r}" if isinstance(value, float) else f"{key:<14} {value}")
