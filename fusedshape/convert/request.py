"""What a caller asks of convert, checked: `Request`, a value that everything below receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from torch import Generator, nn

from fusedshape.init import Method
from fusedshape.ops.dispatch import Backend
from fusedshape.spec import ActSpec
from fusedshape.theory import EOC, Recipe, SubnetMax
from fusedshape.theory.recipes import recipe_of
from fusedshape.torch_ops import ACTIVATION_MODULES
from fusedshape.validate import choice, flag, function, instance, integer, shown

ShortcutWeight = float | Mapping[str, float]
#: What to do about a place that cannot be read: refuse the model, or leave the place and say so.
Escape = Literal["error", "report"]


@dataclass(frozen=True, eq=False)
class Request:
    """All arguments of `convert` but the model; see there.

    Raises:
        ValueError: an argument out of its range, or two that exclude each other.
        TypeError: an argument of the wrong type.
    """

    recipe: Recipe | ActSpec
    depth: int | None
    subnet_max: SubnetMax | None
    init: Method | None
    generator: Generator | None
    fuse: bool
    replace: Sequence[type[nn.Module]] | Literal["all"]
    filter_fn: Callable[[str, nn.Module], bool] | None
    normalisation: Literal["strip"] | None
    strip_batchnorm: bool
    add_biases: bool | None
    shortcuts: ShortcutWeight | None
    on_ambiguous: Escape
    on_untraceable: Escape
    dry_run: bool
    backend: Backend
    chain: bool | int
    example: Any
    check: bool = True

    def __post_init__(self) -> None:
        for name in ("fuse", "strip_batchnorm", "dry_run", "check"):
            flag("convert", name, getattr(self, name))
        if self.add_biases is not None:
            flag("convert", "add_biases", self.add_biases)
        if self.add_biases and not self.strips:
            raise ValueError(
                "convert: add_biases=True gives biases to layers that lose their normalisation; "
                "pass normalisation='strip' with it"
            )
        self._check_network()
        self._check_words()
        self._check_objects()

    def _check_network(self) -> None:
        if self.depth is not None:
            integer("convert", "depth", self.depth, 1)
        if self.subnet_max is not None and not callable(self.subnet_max):
            raise TypeError(
                "convert: subnet_max must be called as subnet_max(x, r), got "
                f"{shown(self.subnet_max)}"
            )
        if self.given_wiring and isinstance(self.recipe, ActSpec):
            raise ValueError("convert: spec is ready; drop depth, subnet_max and sigma_b")
        if self.given_wiring and isinstance(self.recipe, EOC):
            raise ValueError("convert: EOC knows no depth; drop depth and subnet_max")

    def _check_words(self) -> None:
        if self.init is not None and not _is_word(self.init, *get_args(Method)):
            known = ", ".join(get_args(Method))
            raise ValueError(f"convert: init: unknown method {shown(self.init)}; known: {known}")
        for name in ("on_ambiguous", "on_untraceable"):
            choice("convert", name, getattr(self, name), get_args(Escape))
        if self.normalisation is not None and not _is_word(self.normalisation, "strip"):
            raise ValueError(
                f"convert: normalisation={shown(self.normalisation)}; known: 'strip', None"
            )
        if not isinstance(self.chain, int) or (self.chain is not False and self.chain < 1):
            raise ValueError(
                f"convert: chain={self.chain!r} must be True, False or a positive integer"
            )

    def _check_objects(self) -> None:
        if self.replaces_all:
            pass
        elif not isinstance(self.replace, Sequence) or isinstance(self.replace, (str, bytes)):
            raise TypeError(
                f"convert: replace must be a sequence of classes, got {self.replace!r}; or 'all'"
            )
        for wanted in self.classes:
            if not (isinstance(wanted, type) and issubclass(wanted, nn.Module)):
                raise TypeError(f"convert: replace must hold nn.Module classes, got {wanted!r}")
        function("convert", "filter_fn", self.filter_fn, optional=True)
        if self.generator is not None and not isinstance(self.generator, Generator):
            raise TypeError(
                f"convert: generator must be a torch.Generator or None, got {self.generator!r}"
            )

    @property
    def replaces_all(self) -> bool:
        """Whether all activations are to be replaced but gates."""
        return _is_word(self.replace, "all")

    @property
    def classes(self) -> tuple[type[nn.Module], ...]:
        """The classes of activations to replace."""
        if self.replaces_all:
            return tuple(ACTIVATION_MODULES)
        return tuple(cast("Sequence[type[nn.Module]]", self.replace))

    @property
    def strips(self) -> bool:
        """Whether any normalisation is to be taken out."""
        return self.normalisation is not None or self.strip_batchnorm

    @property
    def adds_biases(self) -> bool:
        """Whether layers that lose their normalisation get a bias."""
        return self.normalisation is not None if self.add_biases is None else self.add_biases

    @property
    def given_wiring(self) -> bool:
        """Whether the caller says how deep the network is, so that it is not read off it."""
        return self.depth is not None or self.subnet_max is not None


def _is_word(value: object, *known: str) -> bool:
    return isinstance(value, str) and value in known


def requested_recipe(
    recipe: Recipe | ActSpec | None, spec: ActSpec | None, keywords: Mapping[str, Any]
) -> Recipe | ActSpec:
    """The one recipe that the arguments of `convert` come to.

    Args:
        recipe: the argument of that name.
        spec: the argument of that name.
        keywords: those of method, activation and the targets that were given.

    Raises:
        ValueError: a recipe that cannot be, or two at once.
        TypeError: an argument of the wrong type.
    """
    instance("convert", "spec", spec, ActSpec, optional=True)
    if recipe is not None and not isinstance(recipe, (Recipe, ActSpec)):
        raise TypeError(f"convert: recipe must be a TAT, DKS, EOC or ActSpec, got {shown(recipe)}")
    if recipe is not None and spec is not None:
        raise ValueError(f"convert: {recipe} and spec are both given; drop one")
    ready = spec if recipe is None else recipe
    if ready is None:
        rest = dict(keywords)
        return recipe_of("convert", rest.pop("method", "TAT"), rest)
    if keywords:
        names = ", ".join(keywords)
        if isinstance(ready, ActSpec):
            raise ValueError(f"convert: spec is ready; drop {names}")
        raise ValueError(f"convert: {ready} is a whole recipe; give it {names} when it is made")
    return ready
