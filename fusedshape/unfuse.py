"""unfuse and fuse: fused layers as plain ones with activations after them, and the way back.

`read_calls` reads the model, as for `convert`, and `read_fusion` says which activation belongs to
which layer: unfuse asks it about the places that convert left, fuse about the activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fusedshape.convert.calls import Calls, Site, read_calls
from fusedshape.convert.fusion import OUTPUT_HOOKS, Matches, read_fusion
from fusedshape.convert.refusals import refuse_wrapped
from fusedshape.convert.report import Change
from fusedshape.kinds import FusedLayer
from fusedshape.nn import SHAPED, ShapedActivation, ShapedChain, is_place, place
from fusedshape.undo import UndoLog, all_or_nothing

# Hooks that move between a fused layer and an `Unfused`, which have the same input and output.
_MOVED = ("_forward_pre_hooks", *OUTPUT_HOOKS)
_FLAGS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)
# Hooks that compute the weight of the module they are called with.
_REPARAMETRISE = (BasePruningMethod, SpectralNorm, WeightNorm)


class Unfused(nn.Module):
    """A plain layer with its activation, if `unfuse` finds no place for the activation alone.

    Its state_dict has the layer's keys without a prefix of its own, so that files go on fitting
    (`named_parameters` has ``layer.``); attributes that it lacks are the layer's.

    Args:
        layer: the plain layer.
        activation: what follows it.

    Example:
        >>> from fusedshape.spec import ActSpec
        >>> net = Unfused(nn.Linear(2, 2), ShapedActivation(ActSpec("relu")))
        >>> list(net.state_dict()), net.in_features
        (['weight', 'bias'], 2)
    """

    def __init__(self, layer: nn.Module, activation: ShapedActivation) -> None:
        super().__init__()
        self.layer = layer
        self.activation = activation
        self.training = layer.training

    def forward(self, x: Any) -> Any:
        """What the fused layer takes and gives."""
        return self.activation(self.layer(x))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's."""
        return self.layer.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        inner = f"{prefix}layer."
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(inner)]:
            state_dict[inner + key.removeprefix(prefix)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def unfuse(model: nn.Module) -> tuple[Change, ...]:
    r"""Make every fused layer a plain one with a `ShapedActivation` after it, in place.

    For tools that look for nn.Linear and nn.Conv2d: adapters (LoRA), K-FAC, per-sample gradients,
    quantisation, pruning by class. They skip or refuse fused layers, whose output is not W x + b.
    The model computes the same to rounding. Its parameters stay the same objects, and the keys of
    the state_dict, modes, dtypes and devices stay as they are. `fuse` is the way back.

    The activation returns to the place that `fusedshape.convert` took it from. If the layer was
    built by hand in an nn.Sequential, the activation becomes a child after it, named after the
    layer (``0_act`` after ``0``: the keys stay, the positions of later children move). Elsewhere,
    and if hooks watch the layer's output, the layer and its activation stand together in an
    `Unfused`, whose child ``layer`` is the plain layer. Hooks go where they see the same tensors.
    A `fusedshape.ShapedChain` stays one, with nothing left to chain.

    Args:
        model: the model; one without fused layers is left as it is.

    Returns:
        One row for each module that was changed.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: model is itself a fused layer, wrapped (DistributedDataParallel) or compiled, or
            holds a layer that is not one of ours to the letter: of a subclass, parametrised, with a
            forward of its own, or kept in a plain list. Nothing has been changed then.

    Example:
        >>> from fusedshape import ActSpec, ShapedLinear
        >>> net = nn.Sequential(ShapedLinear(4, 4, spec=ActSpec("tanh")), nn.Linear(4, 2))
        >>> _ = unfuse(net)
        >>> [name for name, _ in net.named_children()], list(net.state_dict())[:2]
        (['0', '0_act', '1'], ['0.weight', '0.bias'])
        >>> _ = fuse(net)
        >>> type(net[0]).__name__, len(net)
        ('ShapedLinear', 2)
    """
    _check("unfuse", model)
    calls = read_calls(model, (nn.Identity,), lambda name, module: is_place(module))
    layers: list[Any] = [module for module in calls.names if isinstance(module, FusedLayer)]
    for layer in layers:
        _check_layer(calls.names[layer], layer)
    parting = read_fusion(calls, _Parting(calls))
    swaps: dict[nn.Module, nn.Module] = {}
    added: dict[nn.Module, ShapedActivation] = {}
    notes: dict[nn.Module, str] = {}
    for found in parting.merged:
        swaps[found] = _activation(parting.of_module(found)[0].layer)
        notes[found] = "the activation is back in its place"
    for layer in layers:
        swaps[layer] = plain = layer.to_plain()
        if layer in parting.layers:
            notes[layer] = "its activation is back in its place"
        elif not _watched(layer) and _only_in_rows(calls, layer):
            added[layer] = _activation(layer)
            vars(added[layer])["added"] = True
            notes[layer] = "its activation follows it"
        else:
            swaps[layer] = wrapper = Unfused(plain, _activation(layer))
            if _watched(layer):
                _take_hooks(wrapper, layer)
                _take_hooks(plain, nn.Module())
            notes[layer] = "holds the plain layer as .layer; the keys of the state_dict stay"
    calls.check_held("unfuse", swaps)
    all_or_nothing(lambda log: _swap(log, calls, swaps, added))
    return _rows(calls, swaps, notes)


def fuse(model: nn.Module) -> tuple[Change, ...]:
    """Fuse every plain layer with the `ShapedActivation` that alone uses its output, in place.

    The way back from `unfuse`, also for models converted with ``fuse=False``. The rules are those
    of `fusedshape.convert`. Parameters, keys of the state_dict and hooks stay.

    Args:
        model: the model; one without `ShapedActivation` is left as it is.

    Returns:
        One row for each module that was changed, and for each activation left, with the reason.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: model is wrapped (DistributedDataParallel) or compiled, or keeps a layer in a
            plain list. Nothing has been changed then.

    Example:
        >>> from fusedshape import ActSpec
        >>> net = nn.Sequential(nn.Linear(4, 4), ShapedActivation(ActSpec("tanh")))
        >>> [(row.was, row.now) for row in fuse(net)]
        [('Linear', 'ShapedLinear'), ('ShapedActivation', 'Identity')]
    """
    _check("fuse", model)
    calls = read_calls(model, (ShapedActivation,))
    joining = read_fusion(calls, _Joining(calls))
    swaps: dict[nn.Module, nn.Module] = {}
    notes: dict[nn.Module, str] = {}
    wrappers = _wrappers(calls)
    for wrapper in wrappers:
        swaps[wrapper] = fused = _fused(wrapper.layer, wrapper.activation)
        if _watched(wrapper) or wrapper._forward_pre_hooks:
            _take_hooks(fused, wrapper)
        notes[wrapper] = "fused with its activation"
    inside = {part for wrapper in wrappers for part in wrapper.children()}
    for merged in joining.merged - inside:
        swaps[merged] = place().train(merged.training)
        notes[merged] = "fused into the layer before"
    for site, match in joining.matches.items():
        layer, activation = match.layer, site.module
        if site.owner in wrappers:
            continue
        if layer is None or layer not in joining.layers:
            if activation is not None:
                notes.setdefault(activation, f"not fused: {match.why}")
            continue
        if layer not in swaps:
            swaps[layer], notes[layer] = _fused(layer, activation), "fused with its activation"
    calls.check_held("fuse", swaps)
    all_or_nothing(lambda log: _swap(log, calls, swaps, {}))
    return _rows(calls, swaps, notes)


@dataclass(frozen=True)
class _Parting:
    """The rules of unfuse: which places take which fused layers' activations back."""

    calls: Calls

    def why_never(self, layer: nn.Module, sites: Sequence[Site], matches: Matches) -> str:
        """Why a layer's activation does not go to `sites`, the places that take its output."""
        if not isinstance(layer, FusedLayer):
            return "it is not fused"
        if _watched(layer):
            return "hooks see its activated output"
        if layer in self.calls.unknown:
            return "a module that cannot be traced may use its activated output"
        places = {site.module for site in sites}
        others = [match.layer for site, match in matches.items() if site.module in places]
        same = all(_constants(other) == _constants(layer) for other in others)
        return "" if same else "layers of other constants come to the same place"

    def why_kept(self, site: Site, merged: bool) -> str:
        """Why a place takes nothing, as other calls of it would be activated too."""
        return "" if merged else "other values come to the same place"


@dataclass(frozen=True)
class _Joining:
    """The rules of fuse: which layers take in which of the activations that follow them."""

    calls: Calls

    def why_never(self, layer: nn.Module, sites: Sequence[Site], matches: Matches) -> str:
        """Why a layer takes in no activation, here those of `sites`."""
        if type(layer) not in SHAPED:
            return f"{type(layer).__name__} has no fused form"
        if _watched(layer):
            return "the layer has hooks, which would see the activated output"
        if "forward" in vars(layer):
            return "the layer's forward is not the plain one"
        if layer in self.calls.unknown:
            return "a module that cannot be traced may use the layer's plain output"
        same = len({_constants(site.module) for site in sites}) == 1
        return "" if same else "activations of different constants follow it"

    def why_kept(self, site: Site, merged: bool) -> str:
        """Why a call of an activation cannot be dropped."""
        return "" if merged else "the activation is shared or has hooks"


def _check(verb: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model must be an nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        refuse_wrapped(verb, path, module)


def _check_layer(path: str, layer: Any) -> None:
    """Raise if a fused layer cannot be taken apart."""
    kind = type(layer).__name__
    if not path:
        raise ValueError(
            f"unfuse: the model is itself a {kind} and cannot be replaced in place; put it into an "
            "nn.Sequential first"
        )
    if type(layer) not in SHAPED.values():
        raise ValueError(
            f"unfuse: {path!r} is a {kind}, a subclass of a fused layer, whose forward or "
            "parameters may be others; take parametrisations off first "
            "(torch.nn.utils.parametrize.remove_parametrizations) and put them back afterwards"
        )
    if _watched(layer) and any(isinstance(h, _REPARAMETRISE) for h in _pre_hooks(layer)):
        raise ValueError(
            f"unfuse: {path!r} ({kind}) has hooks on its output, which belong after the "
            "activation, and hooks that compute its weight, which belong on the plain layer; take "
            "either off first (torch.nn.utils.prune.remove, remove_weight_norm)"
        )
    if "forward" in vars(layer):
        raise ValueError(
            f"unfuse: the forward of {path!r} ({kind}) is set on the instance, and would be lost; "
            "take it off first"
        )


def _constants(module: Any) -> tuple[Any, ...] | None:
    """What a fused layer and the activation after a plain one have in common."""
    if not isinstance(module, (FusedLayer, ShapedActivation)):
        return None
    own: Any = module
    return own.spec, own.backend, own.engine


def _activation(layer: Any) -> ShapedActivation:
    found = ShapedActivation(layer.spec, layer.backend)
    found.engine = layer.engine
    return found.train(layer.training)


def _watched(layer: nn.Module) -> bool:
    """Whether hooks see a layer's output."""
    return any(getattr(layer, name) for name in OUTPUT_HOOKS)


def _take_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let hooks watch another module too; handles that take them off go on working."""
    vars(new).update({name: vars(old)[name] for name in (*_MOVED, *_FLAGS)})


def _fused(layer: nn.Module, activation: Any) -> nn.Module:
    own = activation.spec, activation.backend, activation.engine
    return SHAPED[type(layer)].from_plain(layer, *own)


def _wrappers(calls: Calls) -> list[Any]:
    """All `Unfused` that one fused layer can replace."""
    held = Counter(child for parent in calls.names for child in parent.children())
    found: list[Any] = []
    for module in calls.names:
        if isinstance(module, Unfused) and calls.names[module]:
            layer, activation = module.layer, module.activation
            ours = type(layer) in SHAPED and type(activation) is ShapedActivation
            outer = _watched(module) or bool(module._forward_pre_hooks)
            hooks = _watched(layer) or (outer and bool(layer._forward_pre_hooks))
            hooks = hooks or any(getattr(activation, name) for name in _MOVED)
            alone = held[layer] == held[activation] == 1
            if ours and alone and not hooks and "forward" not in vars(layer):
                found.append(module)
    return found


def _pre_hooks(layer: nn.Module) -> Iterable[Any]:
    return layer._forward_pre_hooks.values()


def _only_in_rows(calls: Calls, layer: nn.Module) -> bool:
    """Whether all calls of a layer are known, and are made by nn.Sequentials on their children."""
    owners = {owner for owner, _ in calls.calls.get(layer, ())}
    return bool(owners) and layer not in calls.unknown and all(map(_is_row, owners))


def _is_row(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other."""
    return type(module).forward in (nn.Sequential.forward, ShapedChain.forward)


def _swap(
    log: UndoLog,
    calls: Calls,
    swaps: Mapping[nn.Module, nn.Module],
    added: Mapping[nn.Module, ShapedActivation],
) -> None:
    """Put new children in the place of old ones, and added ones behind them."""
    for parent, name in calls.names.items():
        children: dict[str, Any] = {}
        for key, child in parent._modules.items():
            children[key] = child
            if child is None:
                continue
            children[key] = swaps.get(child, child)
            if is_place(children[key]) and "added" in vars(child):
                del children[key]
            elif child in added and _is_row(parent):
                children[_free(parent, f"{key}_act")] = added[child]
        if children != dict(parent._modules):
            log.module(parent, name)
            parent._modules.clear()
            parent._modules.update(children)


def _free(parent: nn.Module, name: str) -> str:
    names = (f"{name}_{i}" if i else name for i in range(10**6))
    return next(found for found in names if not hasattr(parent, found))


def _rows(
    calls: Calls, swaps: Mapping[nn.Module, nn.Module], notes: Mapping[nn.Module, str]
) -> tuple[Change, ...]:
    """A row for each module with a note, in the model's order."""
    return tuple(
        Change(path, type(old).__name__, type(swaps.get(old, old)).__name__, notes[old])
        for old, path in calls.names.items()
        if old in notes
    )
