"""Models that convert refuses, by their modules and by what these call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from fusedshape.convert.calls import FUNCTIONAL, Calls
from fusedshape.convert.in_place import refuse_overwrites
from fusedshape.convert.norms import CHANNEL_CLASSES, norm_of
from fusedshape.convert.request import Request
from fusedshape.kinds import FusedLayer
from fusedshape.nn import ShapedActivation, ShapedChain
from fusedshape.rewriting import Rewritten
from fusedshape.torch_ops import WRAPPERS, name_of

_GATES = (nn.Sigmoid, nn.Hardsigmoid)
_NORM_FUNCTIONS = (F.batch_norm, F.instance_norm, F.group_norm)
_SHAPED = (ShapedActivation, ShapedChain, FusedLayer)


def refuse_model(model: nn.Module, request: Request) -> None:
    """Raise if one of a model's modules makes it impossible to convert.

    Args:
        model: the model.
        request: what was asked for.

    Raises:
        ValueError: the message names the module and what to do about it.
    """
    classes = request.classes
    if isinstance(model, classes):
        raise ValueError(
            f"convert: the model is itself an {type(model).__name__} and cannot be replaced in "
            "place; make a fusedshape.nn.ShapedActivation of theory.solve's spec instead"
        )
    for path, module in model.named_modules():
        refuse_wrapped("convert", path, module)
        _refuse_module(path, module)
        lost = type(module) in classes and any(True for _ in module.parameters())
        if lost and not request.replaces_all:
            where, kind = _at(path), type(module).__name__
            raise ValueError(
                f"convert: {where} a {kind}, whose parameters would be lost; pass replace='all' to "
                "take them out"
            )
        if request.normalisation is None:
            _refuse_norm(path, module, request.strip_batchnorm)


def _at(path: str) -> str:
    return f"{path!r} is" if path else "the model is"


def _refuse_module(path: str, module: nn.Module) -> None:
    where, kind = _at(path), type(module).__name__
    written = isinstance(module, Rewritten) and module.written_by == "Shaped"
    if written or isinstance(module, _SHAPED):
        raise ValueError(
            f"convert: {where} a {kind} already; a model is converted once (build it anew)"
        )
    if type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantiz")):
        raise ValueError(f"convert: {where} quantised ({kind}); convert the float model")
    found = [*module._parameters.values(), *module._buffers.values()]
    tensors = [tensor for tensor in found if tensor is not None]
    if isinstance(module, LazyModuleMixin) or any(map(is_lazy, tensors)):
        raise ValueError(
            f"convert: {where} a lazy {kind} without shape yet; run the model once first"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"convert: {where} on the meta device; call model.to_empty(device=...) first"
        )


def _refuse_norm(path: str, module: nn.Module, strip: bool) -> None:
    kind = type(module).__name__
    if isinstance(module, _BatchNorm):
        if not strip:
            raise ValueError(
                f"convert: {path!r} is a {kind}; normalisation undoes what shaped activations set "
                "up. Pass strip_batchnorm=True to take BatchNorm out, or normalisation='strip' to "
                "take out every norm and add biases, or build the model without"
            )
    elif isinstance(module, CHANNEL_CLASSES) or (path and _normalises(module)):
        inside = module._modules.keys()
        rest = f"its {', '.join(inside)}" if inside else "nn.Identity()"
        raise ValueError(
            f"convert: {path!r} is a {kind}; normalisation undoes what shaped activations set up. "
            f"Replace it by {rest} and convert again, or pass normalisation='strip' to take it out"
        )


def _normalises(module: nn.Module) -> bool:
    norm = norm_of(module)
    return norm is not None and not norm.location


def refuse_calls(calls: Calls, strict: bool) -> None:
    """Raise if something that a model calls makes it impossible to convert.

    Args:
        calls: the model's calls.
        strict: whether a module that cannot be traced and may call an activation is an error.

    Raises:
        ValueError: the message names the module and what to do about it.
    """
    if strict:
        _refuse_untraced(calls)
    for owner, node in calls.nodes():
        if node.target in _NORM_FUNCTIONS:
            _refuse_norm_function(calls, owner, node)
    refuse_overwrites(
        calls,
        {
            site.node: f"{calls.describe(site.owner)} activates in place ({site.node.name})"
            for site in calls.sites
            if site.in_place
        },
    )
    if not calls.sites and not calls.acts:
        _refuse_no_activation(calls)


def _refuse_untraced(calls: Calls) -> None:
    for module in calls.names:
        if module in calls.graphs or not calls.wanted.may_be_called_by(module):
            continue
        if not calls.wanted.keeps(module):
            reason = calls.opaque.get(module, "its forward is torch's own")
            raise ValueError(
                f"convert: {calls.describe(module)} may call {calls.wanted.forms} in its forward, "
                f"which cannot be traced: {reason}. Use an nn module for the activation "
                "there, or pass on_untraceable='report' to leave that call as it is"
            )


def _refuse_norm_function(calls: Calls, owner: nn.Module, node: fx.Node) -> None:
    """Raise for a normalisation called as a function, of data or of weights."""
    where, name = calls.describe(owner), name_of(node.target)
    if any(arg.op == "placeholder" for arg in _ancestors(node)):
        raise ValueError(
            f"convert: {where} calls F.{name}; normalisation undoes what shaped activations set "
            "up; pass normalisation='strip' to take it out"
        )
    raise ValueError(
        f"convert: {where} standardises its weights (F.{name}), so that it loses its inputs' mean, "
        "which shaped activations keep; pass normalisation='strip' to make it a plain layer"
    )


def _refuse_no_activation(calls: Calls) -> None:
    """Raise as there is nothing to replace, and say what else could be."""
    targets = [n.target for _, n in calls.nodes() if n.op in ("call_function", "call_method")]
    names = {name_of(target).rstrip("_") for target in targets}
    present = {type(module) for module in calls.names}
    known = [k for k, word in FUNCTIONAL.items() if k in present or word in names]
    known.sort(key=lambda kind: (kind in _GATES, kind.__name__))
    others = {k: f"nn.{k.__name__}" for k in known if FUNCTIONAL[k] not in calls.wanted.words}
    # Sigmoids are taken for gates if there are other activations.
    hidden = [name for kind, name in others.items() if kind not in _GATES]
    wanted = ", ".join(hidden or others.values())
    raise ValueError(
        "convert: found no activation to replace; looked for "
        f"{calls.wanted.forms} (see the arguments replace and filter_fn)"
        + (
            f"; there are {', '.join(others.values())}: pass replace=[{wanted}], or replace='all'"
            if others
            else ""
        )
    )


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node is computed from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        new = [arg for arg in stack.pop().all_input_nodes if arg not in found]
        found.update(new)
        stack += new
    return found


def refuse_wrapped(verb: str, path: str, module: nn.Module) -> None:
    """Raise if a module wraps the one that should be changed, or was compiled from it.

    Raises:
        ValueError: it does; the message says what to do first.
    """
    where = f"{path!r} is" if path else "the model is"
    kind = type(module).__name__
    if kind in WRAPPERS:
        raise ValueError(
            f"{verb}: {where} a {kind}; {verb} the module inside, its .{WRAPPERS[kind]}, "
            "before wrapping it"
        )
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise ValueError(f"{verb}: {where} compiled already; {verb} first, then compile")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{verb}: {where} a ScriptModule; {verb} the module it was made of")
