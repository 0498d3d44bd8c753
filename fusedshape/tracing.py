"""Faithful torch.fx graphs of one nn.Module's forward, in which its children are leaves."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import operator
import random
import textwrap
import threading
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree

from fusedshape.kinds import is_leaf, kind_of
from fusedshape.nodes import Tensors, is_foreign, is_query, operation
from fusedshape.proxies import (
    AttributeValue,
    UntraceableError,
    Value,
    callable_as_known,
    type_as_known,
)
from fusedshape.torch_ops import (
    ALIASES,
    NONLINEAR,
    POOLS,
    RESHAPES,
    base,
    function_of,
    name_of,
    writes,
)
from fusedshape.undo import UndoLog

_Result = TypeVar("_Result")

_GONE = object()
_TABLES = ("", "_parameters", "_buffers", "_modules")
_INTERCEPTED = "_compiled_call_impl"  # what nn.Module calls instead of its forward


class _Tracer(fx.Tracer):
    """Symbolic trace of one module, in which its children are leaves.

    torch.fx's own tracer patches nn.Module for the whole process. This one catches calls of
    children by an attribute on each child, and functions of parameters by a mode, which acts on
    this thread only.
    """

    strict = True

    def __init__(self, module: nn.Module, returns: dict[nn.Module, bool] | None = None) -> None:
        super().__init__()
        by_mode = "forward_training" if module.training else "forward_evaluation"
        if hasattr(type(module), by_mode):
            self.traced_func_name = by_mode
        self.module = module
        self.returns = {} if returns is None else returns
        self.certain = Tensors(self.is_tensor_given, self.called, self.gives_tensor)
        self.refusal: UntraceableError | None = None
        self.modes: Any = None
        self.got: list[AttributeValue] = []  # attributes of values
        self.asleep = False  # while another forward is traced
        self.read: dict[str, Any] = {}  # tensors of the module that were used
        self.tensors: dict[torch.Tensor, str] = {}

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Run the forward on symbols; nothing outside this thread and this module is affected."""
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.submodule_paths = {m: name for name, m in root.named_modules()}
        for name, module in root.named_modules():
            own = {**vars(module), **module._parameters, **module._buffers}
            tensors = {v: k for k, v in own.items() if isinstance(v, torch.Tensor)}
            for tensor, key in tensors.items():
                self.tensors.setdefault(tensor, f"{name}.{key}" if name else key)
            vars(module)[_INTERCEPTED] = self._caught(module)
        forward = self._at_home(getattr(type(root), self.traced_func_name))
        function, args = self.create_args_for_root(forward, True)
        self.modes = _thread_modes()
        with _Functions(self):
            output = self.create_arg(function(*args))
        if self.refusal is not None:  # the forward may have caught the error
            raise self.refusal
        for value in self.got:
            if not value.seen:
                self.refuse(
                    f"it asks what the {value.attr} of a value is, in a way that is not seen"
                )
        self.create_node("output", "output", (output,), {})
        return self.graph

    def refuse(self, why: str) -> None:
        """Raise UntraceableError, and remember it in case the forward catches it."""
        self.refusal = self.refusal or UntraceableError(why)
        raise self.refusal

    def _caught(self, module: nn.Module) -> Callable[..., Any]:
        thread = threading.get_ident()

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return module._call_impl(*args, **kwargs)
            return self.call_module(module, module.forward, args, kwargs)

        return call

    def _at_home(self, function: Any) -> Any:
        """Copy a forward so that `type`, `callable` and torch.fx.wrap's functions take symbols."""
        if not inspect.isfunction(function):
            return function
        scope, names = function.__globals__, _names(function.__code__)
        wrapped = [
            name
            for (_, name), where in _symbolic_trace._wrapped_fns_to_patch.items()
            if where is scope and name in names
        ]
        new: dict[str, Any] = {name: self._whole(scope[name]) for name in wrapped if name in scope}
        answers = {"type": type_as_known, "callable": callable_as_known}
        new |= {k: v for k, v in answers.items() if k in names and k not in scope}
        if not new:
            return function
        moved = types.FunctionType(
            function.__code__,
            {**scope, **new},
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        moved.__kwdefaults__ = function.__kwdefaults__
        return moved

    def _whole(self, function: Any) -> Callable[..., Any]:
        """Wrap a function: given symbols, it becomes one node of the graph."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if any(issubclass(type(leaf), Value) for leaf in pytree.tree_leaves((args, kwargs))):
                return self.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m is self.root:
            self.refuse("it calls itself")
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), Value):
            return a.node
        if _is_real(a):
            return self.create_tensor(a)
        if isinstance(a, dict) and type(a) is not dict:  # torch.fx would turn it into a plain dict
            items = {key: self.create_arg(value) for key, value in a.items()}
            named = dataclasses.is_dataclass(a)
            args, kwargs = ((), items) if named else ((items,), {})
            return self.create_node("call_function", type(a), args, kwargs)
        return super().create_arg(a)

    def create_tensor(self, tensor: torch.Tensor) -> fx.Node:
        """The node of an actual tensor."""
        name = self.tensors.get(tensor)
        if name is None:
            self.refuse("it makes tensors that do not depend on its input")
        assert name is not None
        if name not in self.read:
            self.read[name] = self.create_node("get_attr", name, (), {})
        return self.read[name]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        for what, now, before in zip(_MODES, _thread_modes(), self.modes or (), strict=False):
            if self.strict and now != before:
                self.refuse(f"it {what}, which a trace would lose")
        return super().create_node(*args, **kwargs)

    def function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle a call of one of torch's functions or methods; return its result."""
        if function is torch._C._set_grad_enabled:
            self.refuse(f"it {_MODES[0]}, which a trace would lose")
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if _is_real(leaf)]
        if any(issubclass(type(leaf), Value) for leaf in leaves):
            return self.record(function, args, kwargs)
        if any(tensor in self.tensors for tensor in tensors):
            args, kwargs = pytree.tree_map_only(_is_real, self._symbol, (args, kwargs))
            return self.record(function, args, kwargs)
        return self.compute(function, args, kwargs)

    def _symbol(self, tensor: torch.Tensor) -> Any:
        return Value(self.create_tensor(tensor), self)

    def record(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add a node for a call; return its symbol."""
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return AttributeValue(args[0], function.__self__.__name__)
        if name in ("__set__", "__delete__"):
            self.refuse(f"it changes the {function.__self__.__name__} of a tensor")
        if name in ("__bool__", "__len__", "__iter__", "__contains__", "__int__", "__float__"):
            return getattr(type(args[0]), name)(*args)
        if is_tensor_method_or_property(function) and name.startswith("__"):
            plain = name.strip("_")
            reverse = plain.startswith("r") and hasattr(operator, plain[1:])
            target = getattr(operator, plain[1:] if reverse else plain, None)
            if target is not None:
                args = args[::-1] if reverse else args
                return self.create_proxy("call_function", target, args, kwargs)
        args, kwargs = pytree.tree_map_only(_is_real, self._symbol, (args, kwargs))
        return Value.__torch_function__(function, (), args, kwargs)

    def compute(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a call that takes neither symbols nor tensors of the module."""
        if _draws(str(getattr(function, "__name__", ""))):
            self.refuse("it draws random numbers that steer it")
        return function(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("TraceError: it branches on a value, which cannot steer control flow here")
        raise AssertionError("refuse raises")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.refuse("TraceError: it iterates over a value, whose length is not known")
        raise AssertionError("refuse raises")

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node is known to stand for one tensor."""
        return self.certain.is_tensor(node)

    def is_tensor_given(self, node: fx.Node) -> bool:
        """Whether an argument of the forward is known to be one tensor."""
        return False

    def called(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.module.get_submodule(str(node.target))

    def gives_tensor(self, module: nn.Module, node: fx.Node) -> bool:
        """Whether a call of a module is known to return one tensor."""
        if module not in self.returns:
            self.returns[module] = False  # the answer if the question comes up again inside
            to_slot: Any = lambda argument: Slot(self.is_tensor(argument))  # noqa: E731
            args, kwargs = fx.map_arg((node.args, node.kwargs), to_slot)
            self.asleep = True
            try:
                self.returns[module] = _returns_tensor(module, args, kwargs, self.returns)
            finally:
                self.asleep = False
        return self.returns[module]


def _is_real(value: Any) -> bool:
    """Whether a value is an actual tensor, not a symbol that passes for one."""
    return issubclass(type(value), torch.Tensor)


class _Functions(TorchFunctionMode):
    """Shows a tracer every call of a function or method of torch in this thread."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.tracer.asleep:
            return func(*args, **(kwargs or {}))
        return self.tracer.function(func, args, kwargs or {})


_MODES = (
    "switches gradients off or on (no_grad, enable_grad)",
    "uses inference_mode",
    "uses autocast",
    "uses saved_tensors_hooks",
)


def _thread_modes() -> tuple[Any, ...]:
    """The states of the modes in _MODES on this thread."""
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    inference = torch.is_inference_mode_enabled(), torch._C._is_fwd_grad_enabled()
    return torch.is_grad_enabled(), inference, nesting, hooks


@functools.cache
def _draws(name: str) -> bool:
    """Whether a function of torch draws random numbers."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def _names(code: types.CodeType) -> set[str]:
    """The names that a function's code uses, including functions nested in it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _undisturbed(
    module: nn.Module, run: Callable[[], _Result], strict: bool = True, grad: bool = True
) -> _Result:
    """Run a trace, undo its side effects, and raise UntraceableError if there were any.

    Unless strict, it raises for random numbers only: other side effects do not change what is
    computed.
    """
    log = UndoLog()
    touched = ""
    state = random.getstate()
    try:
        for m in module.modules():
            log.module(m)
        held: list[tuple[str, Any]] = [("", vars(m)) for m in module.modules()]
        held += [(n, v) for _, own in held for n, v in own.items() if isinstance(v, (dict, list))]
        before = [_contents(container) for _, container in held]
        with torch.set_grad_enabled(grad):
            result = run()
        for (name, container), old in zip(held, before, strict=True):
            new = _contents(container)
            changed = [k for k in {**old, **new} if new.get(k, _GONE) is not old.get(k, _GONE)]
            changed = [k for k in changed if k != _INTERCEPTED]
            touched = touched or next((str(k) if name in _TABLES else name for k in changed), "")
    finally:
        try:
            log.undo()
        finally:
            log.undo()
        drew = random.getstate() != state
        if drew:
            random.setstate(state)
    if strict and touched:
        raise UntraceableError(f"it changes its attribute {touched}")
    if drew:
        raise UntraceableError("it draws random numbers that steer it")
    return result


def _contents(container: dict[Any, Any] | list[Any]) -> dict[Any, Any]:
    return dict(container if isinstance(container, dict) else enumerate(container))


@contextmanager
def _untraceable() -> Iterator[None]:
    try:
        yield
    except UntraceableError:
        raise
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise UntraceableError(f"{type(error).__name__}: {line}") from error


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
    graphs = []
    for training in (True, False):
        graph, other = (_graph(module, training, grad, call) for grad in (True, False))
        if graph.python_code("self").src != other.python_code("self").src:
            raise UntraceableError("it asks whether gradients are on (torch.is_grad_enabled)")
        graphs.append(graph)
    first, second = (graph.python_code("self").src for graph in graphs)
    return tuple(graphs[: 1 if first == second else 2])


def _graph(module: nn.Module, training: bool, grad: bool, call: tuple[Any, Any] | None) -> fx.Graph:
    """Trace a forward in one mode."""

    def run() -> fx.Graph:
        module.training = training
        tracer = _Tracer(module) if call is None else _OneCall(module, *call)
        graph = tracer.trace(module)
        module.training = mode
        return graph

    mode = module.training
    with _untraceable():
        graph = _undisturbed(module, run, grad=grad)
    for node in graph.nodes:
        node.type = None
    _drop_dead(graph, lambda node: module.get_submodule(str(node.target)))
    return graph


def _drop_dead(graph: fx.Graph, called: Callable[[fx.Node], nn.Module] | None = None) -> None:
    """Erase nodes without users or side effects; calls of modules only if `called` is given."""
    for node in reversed(list(graph.nodes)):
        if not node.users and _only_computes(node, called):
            graph.erase_node(node)


def _only_computes(node: fx.Node, called: Callable[[fx.Node], nn.Module] | None) -> bool:
    """Whether a node has no side effects: no writes, no checks, no random numbers."""
    name = name_of(node.target)
    if node.kwargs.get("inplace") or "out" in node.kwargs or _draws(name):
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


def _returns_tensor(
    module: nn.Module, args: Any, kwargs: Any, returns: dict[nn.Module, bool]
) -> bool:
    """Whether one call of a module is known to return one tensor."""

    def run() -> bool:
        tracer = _OneCall(module, args, kwargs, returns)
        graph = tracer.trace(module)
        return tracer.is_tensor(next(iter(reversed(graph.nodes))).args[0])

    try:
        with _untraceable():
            return _undisturbed(module, run)
    except UntraceableError:
        return False


@dataclass(frozen=True)
class Slot:
    """A placeholder for a value among the arguments of `trace` and `read`.

    Attributes:
        tensor: whether the value is known to be one tensor.
    """

    tensor: bool = True


@dataclass(frozen=True)
class Reading:
    """What one call of a module's forward computes.

    Attributes:
        graph: the graph, with one placeholder for every `Slot`, in order.
        modules: the module that each call_module node calls.
        constants: the tensors that get_attr nodes stand for, by their target.
    """

    graph: fx.Graph
    modules: dict[fx.Node, nn.Module]
    constants: dict[str, torch.Tensor]


class _OneCall(_Tracer):
    """Traces one call, in which slots become symbols and other arguments keep their values."""

    def __init__(
        self,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        returns: dict[nn.Module, bool] | None = None,
    ) -> None:
        super().__init__(module, returns)
        self.call = args, kwargs
        self.slots: dict[str, Slot] = {}

    def create_args_for_root(self, root_fn: Any, *rest: Any) -> tuple[Any, list[Any]]:
        def given(leaf: Any) -> Any:
            if not isinstance(leaf, Slot):
                return leaf
            name = f"x{len(self.slots)}"
            self.slots[name] = leaf
            return self.create_proxy("placeholder", name, (), {})

        args, kwargs = pytree.tree_map(given, self.call)
        return lambda: root_fn(self.root, *args, **kwargs), []

    def iter(self, obj: Any) -> Iterator[Any]:
        node = obj.node
        parts = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
        if operation(node) == "chunk" and isinstance(parts, int):
            return (obj[i] for i in range(parts))
        return super().iter(obj)

    def is_tensor_given(self, node: fx.Node) -> bool:
        return self.slots[str(node.target)].tensor


class _Reader(_OneCall):
    """Traces one call, and computes everything that does not depend on a slot."""

    strict = False

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__(module, args, kwargs)
        self.names = {m: name for name, m in module.named_modules()}
        self.modules: dict[fx.Node, nn.Module] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.copies: dict[torch.Tensor, torch.Tensor] = {}
        self.originals: dict[torch.Tensor, torch.Tensor] = {}

    def function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        if any(issubclass(type(leaf), Value) for leaf in leaves):
            return self.record(function, args, kwargs)
        args, kwargs = pytree.tree_map_only(_is_real, self._copy, (args, kwargs))
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
        name = f"constant_{len(self.constants)}"
        self.constants[name] = self.originals.get(tensor, tensor)
        return self.create_node("get_attr", name, (), {})

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.names.get(m, "") or type(m).__name__
        proxy = self.create_proxy("call_module", name, args, kwargs)
        self.modules[proxy.node] = m
        return proxy

    def called(self, node: fx.Node) -> nn.Module:
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
        >>> reading = read(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), Slot())
        >>> [type(called).__name__ for called in reading.modules.values()]
        ['Linear', 'ReLU']
    """
    if "forward" in vars(module):
        raise UntraceableError("its forward is set on the instance")

    def run() -> Reading:
        module.training = True
        reader = _Reader(module, args, kwargs)
        graph = reader.trace(module)
        _drop_dead(graph)
        return Reading(graph, reader.modules, reader.constants)

    with _untraceable():
        return _undisturbed(module, run, strict=False)


def required(model: nn.Module) -> list[str]:
    """The names of a forward's required arguments."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    fixed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in fixed and p.default is p.empty]
    return names or [p.name for p in parameters[:1]] or ["input"]


def is_plain(module: nn.Module) -> bool:
    """Whether a module's forward belongs to torch, this library or a class in the table of kinds.

    Such a module is read as a whole, whatever its children are.
    """
    forward = inspect.unwrap(type(module).forward)
    if forward is nn.Sequential.forward:
        return False
    kind = kind_of(module)
    if kind is not None and forward is kind.plain.forward:
        return True
    return is_leaf(forward) or str(getattr(forward, "__module__", "")).startswith("torch.nn.")


def behind_norm(norm: nn.Module) -> tuple[str, ...] | None:
    """The names of the children that a BatchNorm calls one after the other on its result.

    None if its forward does anything else, or cannot be traced.
    """
    if is_plain(norm):
        return ()
    try:
        found = {_row_behind_norm(graph) for graph in trace(norm)}
    except UntraceableError:
        return None
    row = found.pop()
    whole = not found and row is not None and sorted(row) == sorted(norm._modules)
    return row if whole else None


def _row_behind_norm(graph: fx.Graph) -> tuple[str, ...] | None:
    norms = graph.find_nodes(op="call_function", target=F.batch_norm)
    inputs = graph.find_nodes(op="placeholder")
    if len(norms) != 1 or len(inputs) != 1:
        return None
    before, node = inputs[0], norms[0]
    if any(user is not node and not is_query(user) for user in before.users):
        return None
    if node.args[:1] != (before,) or tensor_args(node).count(before) != 1:
        return None
    names: list[str] = []
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output" and user.args == (node,):
            return tuple(names)
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            return None
        names.append(str(user.target))
        node = user
    return None


def tensor_args(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, repeated as often as they occur."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def memory_roots(
    graph: fx.Graph, owner: nn.Module, fresh: Collection[fx.Node] = ()
) -> dict[fx.Node, fx.Node]:
    """Map each node to the first one whose memory it may share; `fresh` nodes share none."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        name = operation(node)
        alias = base(name) in ALIASES or node.target is getattr or writes(name)
        alias = is_foreign(node) or (alias and not is_query(node))
        if node.op == "call_module":
            alias = base(function_of(_child(owner, str(node.target)))) in ALIASES
        args = node.all_input_nodes
        shared = alias and bool(args) and node not in fresh
        roots[node] = roots[args[0]] if shared else node
    return roots


def take_over(changed: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> None:
    """Let later users of `changed` take the result of `node`, which changes it in place."""
    changed.replace_all_uses_with(node, lambda user: order[user] > order[node])


def write_out_of_place(node: fx.Node) -> None:
    """Replace a function or method that works in place by one that makes a new tensor."""
    name = name_of(node.target)
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.op == "call_method":
        node.target = name.removesuffix("_")
    elif node.op == "call_function":
        home = F if hasattr(F, name.removesuffix("_")) else torch
        plain = getattr(home, name.removesuffix("_"), None)
        node.target = plain or getattr(operator, f"__{name.removeprefix('i')}__")


def _child(owner: nn.Module, name: str) -> nn.Module | None:
    try:
        return owner.get_submodule(name)
    except AttributeError:
        return None  # a child that is planned but not added yet


_Code = tuple[str, dict[str, Any], ast.AST]


@functools.cache
def reachable_code(cls: Any) -> tuple[_Code, ...] | None:
    """Syntax trees of a forward and all functions it reaches outside torch.

    Each comes with the name of its self ("" for functions) and its globals. None if a source is
    missing.
    """
    queue: list[tuple[Any, bool]] = [(cls.forward, True)]
    seen: set[Any] = set()
    found: list[_Code] = []
    while queue:
        function, bound = queue.pop()
        function = inspect.unwrap(function)
        if function in seen:
            continue
        seen.add(function)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            return None
        scope = function.__globals__
        own = next(iter(inspect.signature(function).parameters), "") if bound else ""
        found.append((own, scope, tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                method = inspect.getattr_static(cls, node.attr, None)
                if own and node.value.id == own and inspect.isfunction(method):
                    queue.append((method, True))
            elif isinstance(node, ast.Name) and inspect.isfunction(scope.get(node.id)):
                queue.append((scope[node.id], False))
        queue = [
            (f, b)
            for f, b in queue
            if str(getattr(f, "__module__", "")).partition(".")[0] != "torch"
        ]
    return tuple(found)


def reached_by(module: nn.Module) -> set[nn.Module]:
    """The modules inside an untraceable one that its own forward may call.

    Where the source only ever calls a child, as ``self.child(…)``, modules inside that child are
    left out, because the child's own forward calls them.
    """
    inside = {name: set(child.modules()) for name, child in module.named_children()}
    everything = set().union(*inside.values())
    kind: Any = type(module)
    trees = reachable_code(kind)
    if trees is None or "forward" in vars(module):
        return everything
    reached = set(module.children())
    for own, _, tree in trees:
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Name) and node.id in (own, "super")):
                continue
            access = parents[node]
            if not isinstance(access, ast.Attribute):
                return everything
            called = parents.get(access)
            is_call = isinstance(called, ast.Call) and called.func is access
            if access.attr in inside:
                reached |= set() if is_call else inside[access.attr]
            else:
                found = inspect.getattr_static(kind, access.attr, None)
                if hasattr(nn.Module, access.attr) or not (
                    found is None or inspect.isfunction(found)
                ):
                    return everything
    return reached
