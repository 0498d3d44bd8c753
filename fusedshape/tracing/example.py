"""Reads one recorded call of a forward, with the values of the call: `read_call`."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fusedshape.nodes import operation
from fusedshape.proxies import Known, UntraceableError, Value
from fusedshape.tracing.effects import undisturbed, untraceable
from fusedshape.tracing.forwards import Reader, Reading, drop_dead
from fusedshape.tracing.tracer import is_real

# Questions about gradients, which the run without gradients would answer differently.
_OF_GRADIENTS = {"requires_grad", "grad_fn", "grad", "is_leaf"}


def leaves_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a value, in order, whatever holds them."""
    return [tensor for tensor, _ in _found(value)]


def ways_of(value: Any) -> list[tuple[Any, ...]]:
    """The way to each of these tensors: keys of containers and names of attributes."""
    return [way for _, way in _found(value)]


def _found(value: Any) -> list[tuple[torch.Tensor, tuple[Any, ...]]]:
    found: list[tuple[torch.Tensor, tuple[Any, ...]]] = []

    def keep(tensor: torch.Tensor, way: tuple[Any, ...]) -> torch.Tensor:
        found.append((tensor, way))
        return tensor

    rebuilt(value, keep)
    return found


def rebuilt(value: Any, make: Callable[[torch.Tensor, tuple[Any, ...]], Any]) -> Any:
    """A value with other things in place of its tensors.

    Args:
        value: a tensor; or a tuple, list, dict or another object that may hold some.
        make: called with each tensor and the way to it: keys, and names of attributes as Attribute.
    """

    def walk(found: Any, path: tuple[Any, ...], above: tuple[int, ...]) -> Any:
        if is_real(found):
            return make(found, path)
        if id(found) in above:
            return found
        above = (*above, id(found))
        parts = _parts(found)
        if parts is None:
            return found
        new = {key: walk(part, (*path, key), above) for key, part in parts.items()}
        same = all(new[key] is part for key, part in parts.items())
        return found if same else _like(found, new)

    return walk(value, (), ())


class Attribute(str):
    """The name of an attribute on the way to a tensor."""

    __slots__ = ()


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a container or another object holds; None for those that hold nothing."""
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if isinstance(value, dict):
        return dict(value)
    plain = isinstance(value, (nn.Module, type, str, int, float, torch.Generator))
    if plain or callable(value) or issubclass(type(value), Value):
        return None
    return {Attribute(k): v for k, v in getattr(value, "__dict__", {}).items()} or None


def _like(value: Any, parts: dict[Any, Any]) -> Any:
    """A container of a value's class with other parts."""
    if isinstance(value, tuple) and hasattr(type(value), "_fields"):
        return type(value)(*parts.values())
    if isinstance(value, (tuple, list)):
        return type(value)(parts.values())
    new = copy.copy(value)
    for key, part in parts.items():
        if isinstance(value, dict):
            new[key] = part
        else:
            object.__setattr__(new, str(key), part)
    return new


def _plain(tree: Any) -> Any:
    """A node's arguments in new lists and dicts, as the call may write to them."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    return tuple(map(_plain, tree)) if type(tree) is tuple else tree


class _ExampleReader(Reader):
    """Traces one call of which all values are known: only its tensors are symbols.

    What holds tensors is a container of symbols, and all else is as in the call, so that Python may
    ask of it what it likes. Only the numbers in tensors must not steer the forward.
    """

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__(module, args, kwargs)
        self.values: dict[fx.Node, Any] = {}
        self.next_called: nn.Module | None = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Known(node, self)

    def whole(self, function: Any) -> Callable[..., Any]:
        return function  # its values are known, so that it can be followed, too

    def create_args_for_root(self, root_fn: Any, *rest: Any) -> tuple[Any, list[Any]]:
        def given(tensor: torch.Tensor, path: tuple[Any, ...]) -> Any:
            node = self.create_node("placeholder", f"x{len(self.values)}", (), {})
            self.values[node] = tensor
            return self.proxy(node)

        args, kwargs = rebuilt(self.call, given)
        return lambda: root_fn(self.root, *args, **kwargs), []

    def create_arg(self, a: Any) -> Any:
        parts = None if isinstance(a, (tuple, list, dict)) else _parts(a)
        if parts is not None and any(
            issubclass(type(leaf), Value) for leaf in pytree.tree_leaves(list(parts.values()))
        ):
            fields = {str(key): self.create_arg(part) for key, part in parts.items()}
            node = self.create_node("call_function", type(a), (), fields)
            self.values[node] = rebuilt_of(a, self.value)
            return node
        if parts is not None or isinstance(a, type):
            node = self.create_node("get_attr", f"object_{len(self.constants)}", (), {})
            self.constants[str(node.target)] = a
            self.values[node] = a
            return node
        made = super().create_arg(a)
        if isinstance(made, fx.Node) and made not in self.values and isinstance(a, dict):
            self.values[made] = rebuilt_of(a, self.value)
        return made

    def value(self, node: fx.Node) -> Any:
        """The value of a node in the call."""
        if node not in self.values and node.op == "get_attr":
            self.values[node] = self.constants[str(node.target)]
        return self.values[node]

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        if kind == "call_module":
            assert self.next_called is not None
            self.modules[node], self.next_called = self.next_called, None
        self.values[node] = self._computed(node)
        return self._symbols(proxy)

    def _computed(self, node: fx.Node) -> Any:
        args, kwargs = _plain(fx.map_arg((node.args, node.kwargs), self.value))
        asleep, self.asleep = self.asleep, True
        try:
            with torch.no_grad():
                if node.op == "call_module":
                    return self.modules[node](*args, **kwargs)
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                assert callable(node.target)
                return node.target(*args, **kwargs)
        finally:
            self.asleep = asleep

    def _symbols(self, proxy: fx.Proxy) -> Any:
        """The value of a symbol's node, with symbols in place of its tensors."""
        node = proxy.node
        value = self.values[node]
        if is_real(value):
            return proxy
        tensors = leaves_of(value)
        name = operation(node)
        computes = node.op != "call_module" and node.target is not getattr
        if computes and not tensors and name in _DATA:
            self.refuse("TraceError: it takes numbers out of tensors, which cannot steer it here")

        def part(tensor: torch.Tensor, path: tuple[Any, ...]) -> Any:
            at, found = node, value
            for key in path:
                attribute = isinstance(key, Attribute)
                get: Any = getattr if attribute else operator.getitem
                found = get(found, key)
                at = self.create_node(
                    "call_function", get, (at, str(key) if attribute else key), {}
                )
                self.values[at] = found
            return self.proxy(at)

        return rebuilt(value, part) if tensors else value

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m is self.root:
            self.refuse("it calls itself")
        self.next_called = m
        return self.create_proxy(
            "call_module", self.names.get(m, "") or type(m).__name__, args, kwargs
        )

    def is_tensor(self, node: fx.Node) -> bool:
        return is_real(self.value(node))

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(self.value(obj.node)))])

    def answer(self, value: Value, how: Callable[[Any], Any], why: str) -> Any:
        if how is len:
            return len(self.value(value.node))
        return super().answer(value, how, why)

    def attribute(self, value: Value, name: str) -> tuple[bool, Any]:
        whole = self.value(value.node)
        if not hasattr(whole, name):
            raise AttributeError(f"{type(whole).__name__!r} object has no attribute {name!r}")
        if name in _OF_GRADIENTS:
            self.refuse(f"it asks for the {name} of a value")
        found = getattr(whole, name)
        if is_real(found):
            return True, self.create_proxy("call_function", getattr, (value, name), {})
        return not callable(found), found

    def type_of(self, value: Value) -> type:
        return type(self.value(value.node))


# What gives a number that the numbers in a tensor decide.
_DATA = {"item", "tolist", "equal", "allclose", "is_nonzero"}


def rebuilt_of(value: Any, value_of: Callable[[fx.Node], Any]) -> Any:
    """A container of symbols with the symbols' values in their place."""
    if issubclass(type(value), Value):
        return value_of(value.node)
    parts = _parts(value)
    if parts is None:
        return value
    return _like(value, {key: rebuilt_of(part, value_of) for key, part in parts.items()})


def read_call(module: nn.Module, args: Any, kwargs: Any, training: bool | None = None) -> Reading:
    """Read what a recorded call of a module's forward computes.

    The graph holds for calls that take the same decisions: arguments of the same structure, types
    and shapes. Its placeholders are the tensors among the arguments, in the order of `leaves_of`.
    The call is run, so that the caller must undo what that does to the module's tensors.

    Args:
        module: the module; its children are leaves.
        args: the positional arguments of the call.
        kwargs: its keyword arguments.
        training: the mode of the module; by default training, and evaluation if that does not run.

    Raises:
        UntraceableError: a forward that the numbers in tensors steer, or that a trace cannot hold.
    """
    if "forward" in vars(module):
        raise UntraceableError("its forward is set on the instance")

    def run(training: bool) -> Reading:
        module.training = training
        reader = _ExampleReader(module, args, kwargs)
        graph = reader.trace(module)
        drop_dead(graph)
        return Reading(graph, reader.modules, reader.constants, training)

    try:
        with untraceable():
            return undisturbed(module, lambda: run(training is not False), strict=False)
    except UntraceableError:
        if training is not None:
            raise
        with untraceable():
            return undisturbed(module, lambda: run(False), strict=False)
