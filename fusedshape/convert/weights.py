"""Takes normalisation of weights out of layers: what torch attaches, and standardised weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fusedshape.convert.norms import between, evaluate
from fusedshape.convert.report import Change
from fusedshape.kinds import FUNCTIONS, kind_of
from fusedshape.nodes import operation
from fusedshape.tracing import tensor_args
from fusedshape.undo import UndoLog

_HOOKS = (WeightNorm, SpectralNorm)
_PARAMETRISATIONS = {"_WeightNorm": "weight norm", "_SpectralNorm": "spectral norm"}
_FAR, _SCALE, _TOLERANCE = 1e3, 64.0, 1e-4


def detach_norms(model: nn.Module, log: UndoLog) -> Iterator[Change]:
    """Make weights under weight norm or spectral norm parameters again, with their present values.

    Yields:
        The report's row of each layer.

    Raises:
        ValueError: a layer that has other parametrisations as well; the message names it.
    """
    for path, module in list(model.named_modules()):
        was = type(module).__name__
        names = [*_detach_hooks(module), *_detach_parametrisations(module, path, log)]
        if names:
            note = f"{' and '.join(names)} stripped; its weight is a parameter again"
            yield Change(path, was, type(module).__name__, note)


def _detach_hooks(module: nn.Module) -> Iterator[str]:
    for key, hook in list(module._forward_pre_hooks.items()):
        if not isinstance(hook, _HOOKS):
            continue
        name = hook.name
        spectral = isinstance(hook, SpectralNorm)
        old = [f"{name}_orig"] if spectral else [f"{name}_g", f"{name}_v"]
        with torch.no_grad():
            value = hook.compute_weight(module, *([False] if spectral else []))
        grad = any(module._parameters[own].requires_grad for own in old)  # type: ignore[union-attr]
        for own in (*old, f"{name}_u"):
            module._parameters.pop(own, None)
            module._buffers.pop(own, None)
        module._buffers.pop(f"{name}_v", None)
        vars(module).pop(name, None)
        del module._forward_pre_hooks[key]
        _put(module, name, nn.Parameter(value.detach().clone(), requires_grad=grad))
        yield "spectral norm" if spectral else "weight norm"


def _detach_parametrisations(module: nn.Module, path: str, log: UndoLog) -> Iterator[str]:
    if not parametrize.is_parametrized(module):
        return
    lists: Any = module.parametrizations
    kinds = {
        name: [_PARAMETRISATIONS.get(type(own).__name__) for own in own_list]
        for name, own_list in lists.items()
    }
    if not any(kind for found in kinds.values() for kind in found):
        return
    if not all(kind for found in kinds.values() for kind in found):
        raise ValueError(
            f"convert: {path!r} is a {type(module).__name__} with other parametrisations beside "
            "weight norm or spectral norm; take those out with "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    values = {}
    for name, own_list in lists.items():
        modes = {own: own.training for own in own_list.modules()}
        own_list.eval()  # spectral norm iterates in training
        with torch.no_grad():
            values[name] = own_list().detach().clone()
        for own, mode in modes.items():
            own.training = mode
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        held = list(lists[name].parameters())
        if len(held) == 1:  # the same parameter, as an optimiser may hold it
            log.tensor(held[0], f"the {name} of {path!r}")
            with torch.no_grad():
                held[0].copy_(value)
            _put(module, name, held[0])
        else:
            grad = any(parameter.requires_grad for parameter in held)
            _put(module, name, nn.Parameter(value, requires_grad=grad))
        yield from (kind for kind in kinds[name] if kind)


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make a tensor the first parameter of a module."""
    rest = {k: v for k, v in module._parameters.items() if k != name}
    module._parameters.clear()
    module._parameters.update({name: parameter, **rest})


def standardised(owner: nn.Module, graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """The products of a forward whose weight is a normalised parameter of its own.

    A weight counts as normalised if it stays the same when each output's part of the parameter is
    scaled.

    Returns:
        The weight as it is used and the parameter, by the node of the product.
    """
    found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or operation(node) not in FUNCTIONS:
            continue
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if not isinstance(weight, fx.Node) or weight.op == "get_attr":
            continue
        nodes = between(graph, weight)
        if any(n.op in ("placeholder", "call_module") for n in nodes):
            continue
        parameter = _normalised(owner, nodes, weight)
        if parameter is not None:
            found[node] = weight, parameter
    return found


def _normalised(owner: nn.Module, nodes: list[fx.Node], weight: fx.Node) -> fx.Node | None:
    """The parameter of which a weight is the normalised form; None if it is no such form."""
    try:
        plain = evaluate(owner, nodes, weight)
    except Exception:  # what is computed is not known before the run
        return None
    for node in nodes:
        if node.op != "get_attr":
            continue
        tensor = owner.get_parameter(str(node.target)) if _is_parameter(owner, node) else None
        if tensor is None or tensor.shape != plain.shape:
            continue
        generator = torch.Generator().manual_seed(0)
        far = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * _FAR
        scales = torch.linspace(1, _SCALE, tensor.shape[0], dtype=torch.float64)
        scaled = far * scales.view(-1, *[1] * (tensor.ndim - 1))
        one, other = (
            evaluate(owner, nodes, weight, given={node: value}) for value in (far, scaled)
        )
        if float((one - other).norm()) <= _TOLERANCE * float(one.norm()):
            return node
    return None


def _is_parameter(owner: nn.Module, node: fx.Node) -> bool:
    return str(node.target) in dict(owner.named_parameters())


def plain_layer(owner: nn.Module, graphs: tuple[fx.Graph, ...]) -> nn.Module | None:
    """The plain layer that computes what a layer's forward does; None if it does anything else."""
    kind = kind_of(owner)
    if kind is None or len(graphs) != 1 or not all(hasattr(owner, name) for name in kind.geometry):
        return None
    own = [node for node in graphs[0].nodes if node.op != "get_attr"]
    if [node.op for node in own] != ["placeholder", "call_function", "output"]:
        return None
    start, product, result = own
    if operation(product) != kind.function or result.args[0] is not product:
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {**dict(zip(names, product.args, strict=False)), **product.kwargs}
    geometry: Mapping[str, Any] = {k: v for k, v in given.items() if k in names[3:]}
    same = all(_plain(getattr(owner, name)) == _plain(value) for name, value in geometry.items())
    zeros = getattr(owner, "padding_mode", "zeros") == "zeros" and not kind.transposed
    named = [str(node.target) for node in tensor_args(product)[1:]]
    has_bias = owner._parameters.get("bias") is not None
    if given.get("input") is not start or not (same and zeros) or len(geometry) < len(names[3:]):
        return None
    if named != ["weight", "bias"][: 1 + has_bias]:
        return None
    layer = kind.blank(owner, bias=has_bias)
    for name in ("weight", "bias"):
        layer._parameters[name] = owner._parameters.get(name)
    return layer


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
