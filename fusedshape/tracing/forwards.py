"""Reads forwards as graphs: `trace` what holds for any call, `read` what one call computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fusedshape.kinds import kind_of
from fusedshape.proxies import UntraceableError, Value
from fusedshape.torch_ops import NONLINEAR, POOLS, RESHAPES, base, function_of, name_of, writes
from fusedshape.tracing.effects import draws, undisturbed, untraceable
from fusedshape.tracing.graphs import is_plain
from fusedshape.tracing.tracer import OneCall, Tracer, is_real


def trace(module: nn.Module, call: tuple[Any, Any] | None = None) -> tuple[fx.Graph, ...]:
    """Trace a module's forward in training and in evaluation mode.

    Args:
        module: the module; its children are leaves (`call_module` nodes).
        call: the positional and keyword arguments of the call to trace, with a `Slot` in place of
            every tensor; each slot becomes a placeholder. By default the graphs hold for any call.

    Returns:
        The graphs of training and of evaluation, or one graph if they are the same.

    Raises:
        UntraceableError: a forward that branches on values or shapes, takes optional arguments,
            draws random numbers, keeps state, or switches gradients or autocast; the message
            says which.

    Example:
        >>> (graph,) = trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        >>> [node.op for node in graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    forward = type(module).forward
    if "forward" in vars(module):
        raise UntraceableError("its forward is set on the instance")
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if call is not None:
            break
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UntraceableError(f"its forward takes *{parameter.name}")
        if parameter.default is not parameter.empty:
            raise UntraceableError(
                f"its forward takes an optional argument, {parameter.name}, that may steer it"
            )
    graphs, sources = [], []
    for training in (True, False):
        graph, other = (_graph(module, training, grad, call) for grad in (True, False))
        source = graph.python_code("self").src
        if source != other.python_code("self").src:
            raise UntraceableError("it asks whether gradients are on (torch.is_grad_enabled)")
        graphs.append(graph)
        sources.append(source)
    return tuple(graphs[: 1 if sources[0] == sources[1] else 2])


def _graph(module: nn.Module, training: bool, grad: bool, call: tuple[Any, Any] | None) -> fx.Graph:
    """Trace a forward in one mode."""

    def run() -> fx.Graph:
        module.training = training
        tracer = Tracer(module) if call is None else OneCall(module, *call)
        graph = tracer.trace(module)
        module.training = mode
        return graph

    mode = module.training
    with untraceable():
        graph = undisturbed(module, run, grad=grad)
    for node in graph.nodes:
        node.type = None
    drop_dead(graph, lambda node: module.get_submodule(str(node.target)))
    return graph


def drop_dead(graph: fx.Graph, called: Callable[[fx.Node], nn.Module] | None = None) -> None:
    """Erase nodes without users or side effects; calls of modules only if `called` is given."""
    for node in reversed(list(graph.nodes)):
        if not node.users and _only_computes(node, called):
            graph.erase_node(node)


def _only_computes(node: fx.Node, called: Callable[[fx.Node], nn.Module] | None) -> bool:
    """Whether a node has no side effects: no writes, no checks, no random numbers."""
    name = name_of(node.target)
    if node.kwargs.get("inplace") or "out" in node.kwargs or draws(name):
        return False
    if node.op == "call_module":
        if called is None:
            return False
        module = called(node)
        hooks = module._forward_hooks or module._forward_pre_hooks
        known = base(function_of(module)) in POOLS | RESHAPES | NONLINEAR
        # RReLU draws random numbers.
        acts = getattr(module, "inplace", False) or isinstance(module, nn.RReLU)
        known = is_plain(module) and (kind_of(module) is not None or known)
        return known and not hooks and not acts
    if node.op == "call_method":
        return not writes(name)
    if node.op == "call_function":
        home = str(getattr(node.target, "__module__", "")).partition(".")[0]
        known = home in ("torch", "_operator", "builtins", "None") or node.target is getattr
        return known and not name.startswith(("_assert", "setitem")) and not writes(name)
    return node.op == "get_attr"


@dataclass(frozen=True)
class Reading:
    """What one call of a module's forward computes.

    Attributes:
        graph: the graph, with one placeholder for every `Slot`, in order.
        modules: the module that each call_module node calls.
        constants: what get_attr nodes stand for, by their target.
        training: the mode of the module in that call.
    """

    graph: fx.Graph
    modules: dict[fx.Node, nn.Module]
    constants: dict[str, Any]
    training: bool = True


class Reader(OneCall):
    """Traces one call, and computes everything that does not depend on a slot."""

    strict = False

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__(module, args, kwargs)
        self.names = {m: name for name, m in module.named_modules()}
        self.modules: dict[fx.Node, nn.Module] = {}
        self.constants: dict[str, Any] = {}
        self.copies: dict[torch.Tensor, torch.Tensor] = {}
        self.originals: dict[torch.Tensor, torch.Tensor] = {}

    def function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call that takes symbols, and compute all others."""
        leaves = pytree.tree_leaves((args, kwargs))
        if any(issubclass(type(leaf), Value) for leaf in leaves):
            return self.record(function, args, kwargs)
        args, kwargs = pytree.tree_map_only(is_real, self._copy, (args, kwargs))
        return self.compute(function, args, kwargs)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of one of the module's tensors, since the forward may write to it."""
        if tensor not in self.tensors:
            return tensor
        if tensor not in self.copies:
            copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            self.copies[tensor], self.originals[copy] = copy, tensor
        return self.copies[tensor]

    def create_tensor(self, tensor: torch.Tensor) -> fx.Node:
        """The node of an actual tensor, which becomes a constant."""
        name = f"constant_{len(self.constants)}"
        self.constants[name] = self.originals.get(tensor, tensor)
        return self.create_node("get_attr", name, (), {})

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Add a node for a call of any module."""
        name = self.names.get(m, "") or type(m).__name__
        proxy = self.create_proxy("call_module", name, args, kwargs)
        self.modules[proxy.node] = m
        return proxy

    def called(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.modules[node]


def read(module: nn.Module, *args: Any, **kwargs: Any) -> Reading:
    """Read what one call of a module's forward computes, in training mode.

    This is less strict than `trace`, because no code is generated from the result: a forward may
    take optional arguments, keep state and switch gradients. Everything that does not depend on a
    slot is computed.

    Args:
        module: the module; its children are leaves.
        *args: positional arguments of the call, with a `Slot` in place of every tensor; containers
            may hold slots.
        **kwargs: keyword arguments of the call, likewise.

    Raises:
        UntraceableError: a forward that branches on values or shapes, or draws random numbers that
            steer it.

    Example:
        >>> from fusedshape.tracing import Slot
        >>> reading = read(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), Slot())
        >>> [type(called).__name__ for called in reading.modules.values()]
        ['Linear', 'ReLU']
    """
    if "forward" in vars(module):
        raise UntraceableError("its forward is set on the instance")

    def run() -> Reading:
        module.training = True
        reader = Reader(module, args, kwargs)
        graph = reader.trace(module)
        drop_dead(graph)
        return Reading(graph, reader.modules, reader.constants)

    with untraceable():
        return undisturbed(module, run, strict=False)
