"""The one table of normalisations, and which modules are one of them: `norm_of`."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fusedshape.faithful import inputs_for, leaving_no_trace
from fusedshape.kinds import kind_of
from fusedshape.nodes import is_query, operation
from fusedshape.proxies import UntraceableError
from fusedshape.torch_ops import CHANNEL_NORMS, COPIES, LOCATION_NORMS, SAME, VIEWS, base
from fusedshape.tracing import is_plain, reachable_code, trace

#: Classes that normalise over locations or the batch, with their subclasses,
CHANNEL_CLASSES = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LocalResponseNorm)
#: those that normalise each location by itself,
LOCATION_CLASSES = (nn.LayerNorm, nn.RMSNorm)
#: and the functions of either kind, by `base`.
CHANNEL_FUNCTIONS = CHANNEL_NORMS | {"local_response_norm"}
LOCATION_FUNCTIONS = LOCATION_NORMS - {"normalize"}
FUNCTIONS = CHANNEL_FUNCTIONS | LOCATION_FUNCTIONS

# What every norm that is written by hand computes with.
_ROOTS = {"sqrt", "rsqrt", "std", "var", "norm", "vector_norm", "normalize", "pow", "std_mean"}
_ROOTS |= {"var_mean"} | FUNCTIONS
_PASSING = VIEWS | SAME | COPIES
_SCALE = 64.0  # a power of two: scaling by it rounds nothing
_FAR = 1e3  # makes the ε that norms add to a variance of no account
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Norm:
    """What a module that normalises does.

    Attributes:
        location: whether it normalises each location by itself, like LayerNorm.
        row: names of the children that it calls one after the other on what it has normalised.
    """

    location: bool
    row: tuple[str, ...] = ()


def is_norm_function(node: fx.Node) -> bool:
    """Whether a node calls one of torch's normalisations as a function."""
    return node.op == "call_function" and base(operation(node)) in FUNCTIONS


def is_location_function(node: fx.Node) -> bool:
    """Whether a node calls a function that normalises each location by itself."""
    return base(operation(node)) in LOCATION_FUNCTIONS


def is_norm_class(module: nn.Module) -> bool:
    """Whether a module is of a class of torch that normalises, or of a subclass."""
    return isinstance(module, CHANNEL_CLASSES + LOCATION_CLASSES)


def norm_of(module: nn.Module) -> Norm | None:
    """What a module that normalises its input, and does nothing else but call children, does.

    A class of torch counts by its class if its forward is torch's. Any other module counts by what
    its forward computes: a function of torch between views that undo each other, or arithmetic
    whose result does not depend on the scale of the input, or that of a frozen BatchNorm.

    Returns:
        None for a module that does anything else, or whose forward cannot be traced.

    Example:
        >>> norm_of(nn.GroupNorm(2, 4)), norm_of(nn.LayerNorm(4)), norm_of(nn.ReLU())
        (Norm(location=False, row=()), Norm(location=True, row=()), None)
    """
    location = isinstance(module, LOCATION_CLASSES)
    if is_plain(module):
        return Norm(location) if is_norm_class(module) else None
    if not is_norm_class(module) and not _may_normalise(module):
        return None
    try:
        graphs = trace(module)
    except UntraceableError:
        return None
    found = {_norm_in(graph, module) for graph in graphs}
    norm = found.pop()
    whole = not found and norm is not None and sorted(norm.row) == sorted(module._modules)
    return norm if whole else None


def norms_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, Norm | None]]:
    """Every module of a model with its name and `norm_of`, computed once for modules alike."""
    known: dict[Any, Norm | None] = {}
    for path, module in model.named_modules():
        key = _likeness(module)
        if key not in known:
            known[key] = norm_of(module)
        yield path, module, known[key]


def _likeness(module: nn.Module) -> Any:
    """What modules have in common whose forwards trace alike: class, settings, shapes, children."""
    settings = tuple((k, v) for k, v in vars(module).items() if not isinstance(v, dict))
    own = (*module._parameters.items(), *module._buffers.items())
    shapes = tuple((k, None if t is None else t.shape) for k, t in own)
    key = type(module), settings, shapes, tuple((k, type(c)) for k, c in module._modules.items())
    try:
        hash(key)
    except TypeError:
        return module
    return key


def _may_normalise(module: nn.Module) -> bool:
    """Whether a module has the look of a norm: vectors alone, few children, and a root."""
    own = [*module._parameters.values(), *module._buffers.values()]
    flat = all(t is None or t.numel() == max((1, *t.shape)) for t in own)
    few = len(module._modules) <= 4 and not isinstance(module, nn.Sequential)
    cls: Any = type(module)
    return flat and few and _mentions_roots(cls)


@functools.cache
def _mentions_roots(cls: Any) -> bool:
    """Whether the source of a forward, where it is known, has what norms are computed with."""
    trees = reachable_code(cls)
    nodes = (node for *_, tree in trees or () for node in ast.walk(tree))
    return trees is None or any(
        isinstance(node, ast.Pow)
        or base(str(getattr(node, "attr", getattr(node, "id", "")))) in _ROOTS
        for node in nodes
    )


def _norm_in(graph: fx.Graph, module: nn.Module) -> Norm | None:
    """What a forward does, if it normalises its one input and calls children on the result."""
    inputs = graph.find_nodes(op="placeholder")
    (result,) = graph.find_nodes(op="output")
    head, row = result.args[0], list[str]()
    while isinstance(head, fx.Node) and head.op == "call_module":
        if len(head.args) != 1 or head.kwargs:
            return None
        row.insert(0, str(head.target))
        head = head.args[0]
    if len(inputs) != 1 or not isinstance(head, fx.Node) or len(head.users) != 1:
        return None
    nodes = between(graph, head)
    if inputs[0] not in nodes or any(node.op == "call_module" for node in nodes):
        return None
    if not any(operation(node).rstrip("_") in _ROOTS or is_norm_function(node) for node in nodes):
        return _frozen(module, nodes, head, row)
    location = _called_norm(inputs[0], head)
    if location is not None:
        (norm,) = (node for node in nodes if is_norm_function(node))
        undone = all(torch.equal(y, x) for x, y in _samples(module, nodes, head, norm))
        moved = any(base(operation(n)) in VIEWS for n in nodes if not is_query(n))
        return Norm(location, tuple(row)) if undone or not moved else None
    return _frozen(module, nodes, head, row) or _by_hand(module, nodes, head, row)


def between(graph: fx.Graph, head: fx.Node) -> list[fx.Node]:
    """The nodes that a value is computed from, and itself, in order."""
    found, stack = {head}, [head]
    while stack:
        new = [arg for arg in stack.pop().all_input_nodes if arg not in found]
        found.update(new)
        stack += new
    return [node for node in graph.nodes if node in found]


def _called_norm(start: fx.Node, head: fx.Node) -> bool | None:
    """Whether a value is one of torch's location norms of the input, or another norm of it.

    None if anything but views and casts stands between.
    """
    node, location = head, None
    while node is not start:
        args = [arg for arg in node.all_input_nodes if not is_query(arg)]
        if location is None and is_norm_function(node):
            location = base(operation(node)) in LOCATION_FUNCTIONS
        elif base(operation(node)) not in _PASSING:
            return None
        if not args or [user for user in args[0].users if user is not node and not is_query(user)]:
            return None
        node = args[0]
    return location


def _frozen(module: nn.Module, nodes: Sequence[fx.Node], head: fx.Node, row: list[str]) -> Any:
    """A BatchNorm written by hand whose statistics do not move, or None."""
    mean, var = (getattr(module, f"running_{name}", None) for name in ("mean", "var"))
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return None
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    w, b = (t.detach().double() if isinstance(t, Tensor) else None for t in (weight, bias))
    eps = getattr(module, "eps", 1e-5)
    pairs = [
        (F.batch_norm(x, mean.double(), var.double(), w, b, eps=eps), y)
        for x, y in _samples(module, nodes, head)
        if x.ndim > 2
    ]
    same = bool(pairs) and all(torch.allclose(a, b, rtol=_TOLERANCE) for a, b in pairs)
    return Norm(location=False, row=tuple(row)) if same else None


def _by_hand(module: nn.Module, nodes: Sequence[fx.Node], head: fx.Node, row: list[str]) -> Any:
    """A norm of each location in arithmetic of the module's own, or None.

    Its result stays the same where one location is scaled, and is no constant.
    """
    found = False
    for x, y in _samples(module, nodes, head):
        scaled = evaluate(module, nodes, head, x * _SCALE)
        constant = evaluate(module, nodes, head, x.flip(0))
        if y.shape != x.shape:  # broadcast: the module takes no inputs of this shape
            continue
        if torch.equal(constant, y) or _differ(scaled, y):
            return None
        found = True
    return Norm(location=True, row=tuple(row)) if found else None


def _differ(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm()) > _TOLERANCE * float(other.norm())


def _samples(
    module: nn.Module, nodes: Sequence[fx.Node], head: fx.Node, skipped: fx.Node | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs that a norm takes, each with its result; one node may be read as the identity."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    channels = max([t.numel() for t in own], default=8)
    generator = torch.Generator().manual_seed(0)
    for shape in ((channels,), (3, channels), (channels, 3), (channels, 3, 5), (3, 5, channels)):
        x = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * _FAR
        try:
            y = evaluate(module, nodes, head, x, skipped)
        except Exception:  # the forward refuses this shape, in any way
            continue
        if isinstance(y, Tensor):
            yield x, y


def evaluate(
    module: nn.Module,
    nodes: Sequence[fx.Node],
    head: fx.Node,
    x: Tensor | None = None,
    skipped: fx.Node | None = None,
    given: Mapping[fx.Node, Tensor] | None = None,
) -> Any:
    """Compute a value of a forward that calls no children, in float64 and on copies.

    Args:
        module: whose forward it is.
        nodes: what the value is computed from, in order.
        head: the value.
        x: the input.
        skipped: a node that is read as the identity.
        given: values that are taken as they are.
    """
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: env[arg])
            if given and node in given:
                env[node] = given[node]
            elif node.op == "placeholder":
                env[node] = x
            elif node.op == "get_attr":
                found: Any = module
                for name in str(node.target).split("."):
                    found = getattr(found, name)
                env[node] = _copied(found)
            elif node is skipped:
                env[node] = args[0] if args else kwargs["input"]
            elif node.op == "call_method":
                env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                env[node] = node.target(*args, **kwargs)
    return env[head]


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return copy.copy(value)
    kept = value.detach().clone().cpu()
    return kept.double() if kept.is_floating_point() else kept


def layers_before(
    model: nn.Module, norms: Collection[nn.Module], example: Any = None
) -> set[nn.Module]:
    """The layers whose very outputs some norms take, in one run of a model.

    Args:
        model: the model; it is left unchanged.
        norms: the norms.
        example: an input, or a tuple of inputs; default: small random ones, if any fit.
    """
    args = inputs_for(model, example) if norms else None
    if args is None:
        return set()
    made: dict[int, tuple[nn.Module, Any]] = {}  # holds the tensors, so that no id comes again
    found: set[nn.Module] = set()

    def make(layer: nn.Module, _: Any, out: Any) -> None:
        made[id(out)] = layer, out

    def take(_: nn.Module, given: tuple[Any, ...]) -> None:
        if given and id(given[0]) in made:
            found.add(made[id(given[0])][0])

    def run() -> None:
        for layer in model.modules():
            if kind_of(layer) is not None:
                layer.register_forward_hook(make)
        for norm in norms:
            norm.register_forward_pre_hook(take)
        model.eval()(*args)

    leaving_no_trace(model, run)
    return found
