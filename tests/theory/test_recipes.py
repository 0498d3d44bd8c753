"""Recipes as values, and the one table of methods."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from torch import nn

import fusedshape
from fusedshape import ACTIVATIONS, DKS, EOC, TAT, convert
from fusedshape.theory import (
    METHODS,
    TARGETS,
    EdgeOfChaos,
    Recipe,
    Unreachable,
    dks,
    eoc,
    solve,
    tat,
)
from fusedshape.theory.recipes import recipe_of

EVERY = [(kind, activation) for kind in METHODS.values() for activation in kind.activations()]


@pytest.mark.parametrize(("kind", "activation"), EVERY)
def test_a_recipe_is_a_value(kind: type[Recipe], activation: str) -> None:
    recipe = kind(activation)
    again = [
        kind(activation, **kind.defaults(activation)),
        eval(repr(recipe), vars(fusedshape).copy()),
        pickle.loads(pickle.dumps(recipe)),
        copy.deepcopy(recipe),
        kind.from_dict(recipe.to_dict()),
        Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))),
        recipe_of("convert", kind.method.lower(), {"activation": activation}),
    ]
    assert {recipe, *again} == {recipe}
    with pytest.raises(FrozenInstanceError):
        recipe.activation = "relu"  # type: ignore[misc]


@pytest.mark.parametrize(
    "recipe", [TAT(eta=0.1 + 0.2), TAT("relu", clamp=True), DKS(zeta=2), EOC("tanh", sigma_b=0.3)]
)
def test_a_repr_can_be_pasted(recipe: Recipe) -> None:
    assert eval(repr(recipe), vars(fusedshape).copy()) == recipe
    assert recipe != type(recipe)(recipe.activation)


def test_a_subclass_prints_its_own_name() -> None:
    class Mine(TAT):
        pass

    assert repr(Mine("tanh")) == "Mine('tanh', tau=0.3)"


def test_the_table_of_methods() -> None:
    assert list(METHODS) == ["TAT", "DKS", "EOC"]
    assert list(TARGETS) == ["eta", "tau", "zeta", "q_slope", "sigma_b"]
    assert all(target.about for target in TARGETS.values())
    assert TAT.activations() == DKS.activations()
    assert {*ACTIVATIONS} - {*TAT.activations()} == {"square"}
    assert EOC.activations() == tuple(ACTIVATIONS)
    for kind, activation in EVERY:
        assert set(kind.defaults(activation)) <= set(kind.targets())
        for name, target in kind.targets().items():
            value = getattr(kind(activation), name)
            assert value == kind.defaults(activation).get(name)
            assert value is None or target.check("", name, value) == value
    # A number is a target of one method only, so that a keyword has one owner.
    names = [name for kind in METHODS.values() for name in kind.targets()]
    assert len(names) == len(set(names))


def test_recipes_of_different_methods_differ() -> None:
    assert len({kind("tanh") for kind in METHODS.values()}) == len(METHODS)
    assert TAT("relu") != TAT("leaky_relu")
    assert TAT("tanh", clamp=True) != TAT("tanh")
    assert DKS("tanh", zeta=2) == DKS("tanh", zeta=2.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TAT(eta=1), ValueError, r"TAT: eta must be in \(0, 1\), got 1.0: at 1 all"),
        (lambda: TAT(eta=0), ValueError, "TAT: eta must be finite and above 0, got 0"),
        (lambda: TAT("tanh", tau=-1), ValueError, "TAT: tau must be finite and above 0, got -1"),
        (lambda: TAT("tanh", eta=0.9), ValueError, "TAT of tanh aims at tau, not at eta=0.9"),
        (lambda: TAT(tau=0.3), ValueError, "TAT of leaky_relu aims at eta, not at tau=0.3"),
        (lambda: TAT("tanh", eta="a"), TypeError, "TAT: eta must be a number, got 'a'"),
        (lambda: TAT("nope"), ValueError, "TAT: unknown activation 'nope'; known: .*tanh"),
        (lambda: TAT("square"), Unreachable, "TAT cannot shape square"),
        (lambda: TAT(clamp=1), TypeError, "TAT: clamp must be True or False, got 1"),
        (lambda: TAT(zeta=1.5), TypeError, "zeta"),
        (lambda: DKS(zeta=1), ValueError, "DKS: zeta must be finite and above 1, got 1"),
        (lambda: DKS(zeta=None), TypeError, "DKS: zeta must be a number, got None"),
        (lambda: DKS(q_slope=1.5), ValueError, r"DKS: q_slope must be in \(0, 1\], got 1.5"),
        (lambda: DKS("square"), Unreachable, "DKS cannot shape square"),
        (lambda: EOC("tanh", sigma_b=-1), ValueError, "EOC: sigma_b must be .* at least 0, got -1"),
        (lambda: EOC("relu", sigma_b=0.2), Unreachable, "EOC: relu .* pass sigma_b=0"),
        (lambda: EOC("tanh", negative_slope=0.1), ValueError, "tanh takes no negative_slope"),
        (lambda: Recipe("tanh"), TypeError, "Recipe: make one of its methods, TAT, DKS, EOC"),
        (lambda: Recipe.from_dict({}), ValueError, "method=None; known: 'TAT', 'DKS', 'EOC'"),
        (lambda: Recipe.from_dict([]), TypeError, "data must be a dict"),
        (lambda: DKS.from_dict({"method": "TAT"}), ValueError, "method='TAT'; known: 'DKS'"),
        (lambda: DKS.from_dict({"eta": 0.9}), ValueError, r"unknown field\(s\) \['eta'\] of DKS"),
    ],
)
def test_a_recipe_refuses_when_it_is_made(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("kind", "activation"), EVERY)
def test_a_keyword_of_another_method_is_refused_by_name(
    kind: type[Recipe], activation: str
) -> None:
    own = {field.name for field in fields(kind)}
    for name in set(TARGETS) - own:
        (owner,) = (m for m, other in METHODS.items() if name in other.targets())
        aim = next(iter(kind.defaults(activation)))
        message = re.escape(
            f"f: {kind.method} of {activation} aims at {aim}, not at {name}=0.5, which belongs to "
            f"{owner}; drop it"
        )
        with pytest.raises(ValueError, match=f"^{message}$"):
            recipe_of("f", kind.method, {"activation": activation, name: 0.5})


def test_errors_of_keywords_name_the_function() -> None:
    with pytest.raises(ValueError, match=r"^convert: unknown method 'BN'; known: TAT, DKS, EOC$"):
        recipe_of("convert", "BN", {})
    with pytest.raises(ValueError, match=r"^convert: zeta must be finite and above 1, got 1"):
        recipe_of("convert", "DKS", {"zeta": 1})
    with pytest.raises(ValueError, match=r"^convert: unknown activation 'nope'"):
        recipe_of("convert", "DKS", {"activation": "nope"})
    with pytest.raises(Unreachable, match=r"^convert: relu at the edge of chaos"):
        recipe_of("convert", "EOC", {"activation": "relu", "sigma_b": 0.1})


def mlp() -> nn.Sequential:
    layers = [layer for _ in range(20) for layer in (nn.Linear(4, 4), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(4, 2))


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or the words of its refusal."""
    try:
        return call(*args, **kwargs)
    except Unreachable as error:
        return str(error)


@pytest.mark.parametrize(("kind", "activation"), EVERY)
def test_keywords_spell_the_same_recipe(kind: type[Recipe], activation: str) -> None:
    recipe, targets = kind(activation), kind.defaults(activation)
    if isinstance(recipe, EOC):
        solved = outcome(eoc, recipe)
        assert solved == outcome(eoc, activation, **targets)
    else:
        assert isinstance(recipe, (TAT, DKS))
        solved = solve(recipe, depth=20)
        assert solved == solve(kind.method.lower(), activation, depth=20, **targets)
        assert solved == {"DKS": dks, "TAT": tat}[kind.method](activation, depth=20)
    targets.pop("q_slope", None)  # which convert takes in a recipe only
    named = {"method": kind.method, "activation": activation}
    report = outcome(convert, mlp(), recipe, dry_run=True)
    assert report == outcome(convert, mlp(), **named, **targets, dry_run=True)
    if isinstance(solved, str):
        assert report == solved
    else:
        assert report.spec == (solved.spec if isinstance(solved, EdgeOfChaos) else solved)


def test_solve_takes_one_recipe() -> None:
    with pytest.raises(ValueError, match=r"^solve: TAT\(.*\) is a whole recipe; give it eta when"):
        solve(TAT(), depth=20, eta=0.5)
    with pytest.raises(ValueError, match=r"^solve: EOC\(.*\) is solved by eoc"):
        solve(EOC(), depth=20)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^solve: activation is missing"):
        solve("TAT", depth=20)
    with pytest.raises(ValueError, match=r"^solve: TAT of tanh aims at tau, not at zeta=2, which"):
        solve("TAT", "tanh", depth=20, zeta=2)
    with pytest.raises(ValueError, match=r"^eoc: EOC\(.*\) is a whole recipe; give it sigma_b"):
        eoc(EOC("tanh"), sigma_b=0.1)
