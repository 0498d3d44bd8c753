"""Traces a forward on symbols with torch.fx: `Tracer` any call, `OneCall` one of them."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree

from fusedshape.nodes import Tensors, operation
from fusedshape.proxies import (
    AttributeValue,
    UntraceableError,
    Value,
    callable_as_known,
    type_as_known,
)
from fusedshape.tracing.effects import (
    INTERCEPTED,
    MODES,
    draws,
    thread_modes,
    undisturbed,
    untraceable,
)


@dataclass(frozen=True)
class Slot:
    """A placeholder for a value among the arguments of `trace` and `read`.

    Attributes:
        tensor: whether the value is known to be one tensor.
    """

    tensor: bool = True


class Tracer(fx.Tracer):
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
            vars(module)[INTERCEPTED] = self._caught(module)
        forward = self._at_home(getattr(type(root), self.traced_func_name))
        function, args = self.create_args_for_root(forward, True)
        self.modes = thread_modes()
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

    def refuse(self, why: str) -> NoReturn:
        """Raise UntraceableError, and remember it in case the forward catches it."""
        self.refusal = self.refusal or UntraceableError(why)
        raise self.refusal

    def _caught(self, module: nn.Module) -> Callable[..., Any]:
        thread = threading.get_ident()

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or self.asleep:
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
        new: dict[str, Any] = {name: self.whole(scope[name]) for name in wrapped if name in scope}
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

    def whole(self, function: Any) -> Callable[..., Any]:
        """Wrap a function: given symbols, it becomes one node of the graph."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if any(issubclass(type(leaf), Value) for leaf in pytree.tree_leaves((args, kwargs))):
                return self.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Add a node for a call of a child."""
        if m is self.root:
            self.refuse("it calls itself")
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a child is not traced into: none is."""
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Make the symbol of a node."""
        return Value(node, self)

    def create_arg(self, a: Any) -> Any:
        """Make an argument of a node from a value."""
        if issubclass(type(a), Value):
            return a.node
        if is_real(a):
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
        """Add a node, unless a mode has changed that a graph cannot hold."""
        for what, now, before in zip(MODES, thread_modes(), self.modes or (), strict=False):
            if self.strict and now != before:
                self.refuse(f"it {what}, which a trace would lose")
        return super().create_node(*args, **kwargs)

    def function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle a call of one of torch's functions or methods; return its result."""
        if function is torch._C._set_grad_enabled:
            self.refuse(f"it {MODES[0]}, which a trace would lose")
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if is_real(leaf)]
        if any(issubclass(type(leaf), Value) for leaf in leaves):
            return self.record(function, args, kwargs)
        if any(tensor in self.tensors for tensor in tensors):
            args, kwargs = pytree.tree_map_only(is_real, self._symbol, (args, kwargs))
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
        args, kwargs = pytree.tree_map_only(is_real, self._symbol, (args, kwargs))
        return Value.__torch_function__(function, (), args, kwargs)

    def compute(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a call that takes neither symbols nor tensors of the module."""
        if draws(str(getattr(function, "__name__", ""))):
            self.refuse("it draws random numbers that steer it")
        return function(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse a branch on a value."""
        self.refuse("TraceError: it branches on a value, which cannot steer control flow here")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Refuse a loop over a value."""
        self.refuse("TraceError: it iterates over a value, whose length is not known")

    def answer(self, value: Value, how: Callable[[Any], Any], why: str) -> Any:
        """Answer a question about what a symbol stands for, or refuse."""
        self.refuse(why)

    def attribute(self, value: Value, name: str) -> tuple[bool, Any]:
        """Whether an attribute of what a symbol stands for is known, and the attribute."""
        return False, None

    def type_of(self, value: Value) -> type:
        """The class of what a symbol stands for, or refuse."""
        if not self.is_tensor(value.node):
            self.refuse("it asks for the type of a value (isinstance)")
        return torch.Tensor

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


def is_real(value: Any) -> bool:
    """Whether a value is an actual tensor, not a symbol that passes for one."""
    return issubclass(type(value), torch.Tensor)


class _Functions(TorchFunctionMode):
    """Shows a tracer every call of a function or method of torch in this thread."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.tracer.asleep:
            return func(*args, **(kwargs or {}))
        return self.tracer.function(func, args, kwargs or {})


def _names(code: types.CodeType) -> set[str]:
    """The names that a function's code uses, including functions nested in it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


class OneCall(Tracer):
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
        """Make the forward's arguments: symbols in place of the slots."""

        def given(leaf: Any) -> Any:
            if not isinstance(leaf, Slot):
                return leaf
            name = f"x{len(self.slots)}"
            self.slots[name] = leaf
            return self.create_proxy("placeholder", name, (), {})

        args, kwargs = pytree.tree_map(given, self.call)
        return lambda: root_fn(self.root, *args, **kwargs), []

    def iter(self, obj: Any) -> Iterator[Any]:
        """Loop over the parts of a tensor whose number is known."""
        node = obj.node
        parts = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
        if operation(node) == "chunk" and isinstance(parts, int):
            return (obj[i] for i in range(parts))
        return super().iter(obj)

    def is_tensor_given(self, node: fx.Node) -> bool:
        """Whether a slot stands for one tensor."""
        return self.slots[str(node.target)].tensor


def _returns_tensor(
    module: nn.Module, args: Any, kwargs: Any, returns: dict[nn.Module, bool]
) -> bool:
    """Whether one call of a module is known to return one tensor."""

    def run() -> bool:
        tracer = OneCall(module, args, kwargs, returns)
        graph = tracer.trace(module)
        return tracer.is_tensor(next(iter(reversed(graph.nodes))).args[0])

    try:
        with untraceable():
            return undisturbed(module, run)
    except UntraceableError:
        return False
