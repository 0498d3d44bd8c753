"""Faithful torch.fx graphs of one nn.Module's forward, its children as leaves."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import operator
import random
import textwrap
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

# What these return is no tensor.
_SHAPE_QUERIES = {"size", "dim", "ndim", "shape", "numel", "nelement", "ndimension", "stride"}
_SHAPE_QUERIES |= {"dtype", "device", "type", "is_contiguous", "element_size", "item"}
# What these return may be their argument under another name.
_ALIASES = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze"}
_ALIASES |= {"unsqueeze", "transpose", "permute", "movedim", "swapaxes", "t", "T", "mT", "chunk"}
_ALIASES |= {"split", "unbind", "narrow", "select", "getitem", "getattr", "expand", "expand_as"}
_ALIASES |= {"contiguous", "detach", "to", "type_as", "float", "double", "half", "bfloat16"}
_ALIASES |= {"dropout"}
_ALIAS_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)

_GONE = object()
_TABLES = ("", "_parameters", "_buffers", "_modules")


class UntraceableError(Exception):
    """Why a forward cannot be traced faithfully."""


class _Value(fx.Proxy):
    """A proxy that keeps in-place arithmetic in place, and does not stand for its type."""

    def _in_place(self, name: str, other: Any) -> Any:
        if is_number(self.node):
            return NotImplemented
        return self.tracer.create_proxy("call_method", name, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place("add_", other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place("sub_", other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place("mul_", other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place("div_", other)

    def __bool__(self) -> bool:
        frame = inspect.currentframe()
        assert frame is not None
        asker = frame.f_back
        assert asker is not None
        if _asserts(asker.f_code, asker.f_lasti):
            line = linecache.getline(asker.f_code.co_filename, asker.f_lineno).strip()
            message = line or f"an assertion in {asker.f_code.co_name}"
            self.tracer.create_proxy("call_function", torch._assert, (self, message), {})
            return True
        return self.tracer.to_bool(self)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance() asks here, after its own quick test has failed; so do torch's own functions.
        frame = inspect.currentframe()
        assert frame is not None
        asker = frame.f_back
        assert asker is not None
        module = str(asker.f_globals.get("__name__")).partition(".")[0]
        if module not in ("torch", "abc") and _asks_for_types(asker.f_code):
            if isinstance(self.tracer, _OneCall) and self.tracer.is_tensor(self.node):
                return torch.Tensor
            raise UntraceableError("it asks for the type of a value (isinstance)")
        return _Value


def _asserts(code: types.CodeType, at: int) -> bool:
    """Whether the value that an instruction asks for is one that an assert statement demands."""
    found = [i for i in dis.get_instructions(code) if i.opname not in ("TO_BOOL", "NOT_TAKEN")]
    k, jump = next((k, i) for k, i in enumerate(found) if i.offset >= at)
    if "JUMP" not in jump.opname or not jump.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return False
    ahead = found[k + 1 :]
    if jump.opname.endswith("IF_FALSE"):  # assert a and b
        ahead = [i for i in ahead if i.offset == jump.argval]
    raises = ahead[:1] and (ahead[0].opname, ahead[0].argval)
    return bool(raises) and (raises[0] == "LOAD_ASSERTION_ERROR" or raises[1] is AssertionError)


def _asks_for_types(code: types.CodeType) -> bool:
    """Whether a function's own code may ask for the type of a value."""
    by_pattern = dis.opmap["MATCH_CLASS"] in code.co_code[::2]
    return by_pattern or not {"isinstance", "__class__"}.isdisjoint(code.co_names)


class _Tracer(fx.Tracer):
    """Symbolic trace of one module, its children as leaves."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        by_mode = "forward_training" if module.training else "forward_evaluation"
        if hasattr(type(module), by_mode):
            self.traced_func_name = by_mode

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise UntraceableError("it switches gradients off, which a trace would lose")
        return super().create_node(*args, **kwargs)


def _refusing(what: str) -> Callable[..., Any]:
    def enter(*args: Any) -> None:
        raise UntraceableError(f"it uses {what}, which a trace would lose")

    return enter


@contextmanager
def _undisturbed(module: nn.Module, strict: bool = True) -> Iterator[None]:
    """Put back, and complain about, what running a forward does besides computing.

    Unless strict, only about random numbers: the rest does not change what is computed.
    """
    held: list[tuple[str, Any]] = [("", vars(m)) for m in module.modules()]
    held += [(n, v) for _, own in held for n, v in own.items() if isinstance(v, (dict, list))]
    before = [_contents(container) for _, container in held]
    state = random.getstate(), torch.get_rng_state()
    kinds: tuple[Any, ...] = (torch.autocast, torch.autograd.graph.saved_tensors_hooks)
    kinds += (torch.no_grad, torch.enable_grad, torch.inference_mode)
    contexts = {cls: cls.__enter__ for cls in kinds}
    touched = ""
    try:
        for cls in contexts if strict else ():
            cls.__enter__ = _refusing(cls.__name__)
        with torch.set_grad_enabled(True):
            yield
    finally:
        for cls, enter in contexts.items():
            cls.__enter__ = enter
        drew = random.getstate() != state[0] or not torch.equal(torch.get_rng_state(), state[1])
        random.setstate(state[0])
        torch.set_rng_state(state[1])
        for (name, container), old in zip(held, before, strict=True):
            new = _contents(container)
            for key in {**old, **new}:
                if new.get(key, _GONE) is not old.get(key, _GONE):
                    touched = touched or (str(key) if name in _TABLES else name)
            if isinstance(container, dict):
                container.clear()
                container.update(old)
            else:
                container[:] = old.values()
    if strict and touched.startswith("_tensor_constant"):
        raise UntraceableError("it makes tensors that do not depend on its input")
    if strict and touched:
        raise UntraceableError(f"it changes its attribute {touched}")
    if drew:
        raise UntraceableError("it draws random numbers that steer it")


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
    """Graphs of a module's forward: training's and evaluation's, or one where they agree.

    Args:
        module: the module; its children are leaves (`call_module` nodes).
        call: the arguments and keyword arguments of the one call that matters, with a `Slot` for
            every tensor, for which the graphs have a placeholder each; by default any call will.

    Returns:
        One graph, or training's and evaluation's.

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
    mode = module.training
    for training in (True, False):
        module.training = training
        try:
            with _untraceable(), _undisturbed(module):
                tracer = _Tracer(module) if call is None else _OneCall(module, *call)
                graphs.append(tracer.trace(module))
        finally:
            module.training = mode
    for graph in graphs:
        for node in graph.nodes:
            node.type = None
    first, second = (graph.python_code("self").src for graph in graphs)
    return tuple(graphs[: 1 if first == second else 2])


class Slot:
    """Stands for a tensor among the arguments of `read`."""


@dataclass(frozen=True)
class Reading:
    """One call of a module's forward.

    Attributes:
        graph: what it does, with one placeholder for every `Slot`, in order.
        modules: what each call_module node calls.
        constants: the tensors that get_attr nodes stand for.
    """

    graph: fx.Graph
    modules: dict[fx.Node, nn.Module]
    constants: dict[str, torch.Tensor]


class _OneCall(_Tracer):
    """Traces one call: of its arguments only the slots are symbols, and all else is what it is."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__(module)
        self.call = args, kwargs

    def create_args_for_root(self, root_fn: Any, *rest: Any) -> tuple[Any, list[Any]]:
        def given(leaf: Any) -> Any:
            if not isinstance(leaf, Slot):
                return leaf
            names.append(f"x{len(names)}")
            return self.create_proxy("placeholder", names[-1], (), {})

        names: list[str] = []
        args, kwargs = pytree.tree_map(given, self.call)
        return lambda: root_fn(self.root, *args, **kwargs), []

    def iter(self, obj: Any) -> Iterator[Any]:
        node = obj.node
        parts = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
        if str(getattr(node.target, "__name__", node.target)) == "chunk" and isinstance(parts, int):
            return (obj[i] for i in range(parts))
        return super().iter(obj)

    def is_tensor(self, node: fx.Node) -> bool:
        return not is_number(node)


class _Reader(_OneCall):
    """Follows one call; what does not come from a slot is computed."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__(module, args, kwargs)
        self.names = {m: name for name, m in module.named_modules()}
        self.modules: dict[fx.Node, nn.Module] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.copies: dict[torch.Tensor, torch.Tensor] = {}
        self.originals: dict[torch.Tensor, torch.Tensor] = {}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        if attr_val not in self.copies:
            # The forward runs for real on what is no symbol, and may work in place.
            copy = attr_val.detach().clone().requires_grad_(attr_val.requires_grad)
            self.copies[attr_val], self.originals[copy] = copy, attr_val
        return self.copies[attr_val]

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Value:
            return a.node
        if not isinstance(a, torch.Tensor):
            return super().create_arg(a)
        name = f"constant_{len(self.constants)}"
        self.constants[name] = self.originals.get(a, a)
        return self.create_node("get_attr", name, (), {})

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.names.get(m, "") or type(m).__name__
        proxy = self.create_proxy("call_module", name, args, kwargs)
        self.modules[proxy.node] = m
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        return fx.Tracer.create_node(self, *args, **kwargs)


def read(module: nn.Module, *args: Any, **kwargs: Any) -> Reading:
    """What one call of a module's forward computes, in training mode.

    Less strict than `trace`, as nothing will be written from it: a forward may take optional
    arguments, keep state and switch gradients. What does not come from a slot is computed.

    Args:
        module: the module; its children are leaves.
        *args: arguments of the call, with a `Slot` for every tensor; containers may hold slots.
        **kwargs: the same.

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
    mode = module.training
    module.training = True
    try:
        with _untraceable(), _undisturbed(module, strict=False):
            reader = _Reader(module, args, kwargs)
            return Reading(reader.trace(module), reader.modules, reader.constants)
    finally:
        module.training = mode


def required(model: nn.Module) -> list[str]:
    """Names of the tensors that a forward cannot do without."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    fixed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in fixed and p.default is p.empty]
    return names or [p.name for p in parameters[:1]] or ["input"]


def is_plain(module: nn.Module) -> bool:
    """Whether torch or this library wrote the module's forward, and its children are no matter."""
    forward = inspect.unwrap(type(module).forward)
    if forward is nn.Sequential.forward:
        return False
    return str(getattr(forward, "__module__", "")).startswith(("torch.nn.", "fusedshape.nn"))


def behind_norm(norm: nn.Module) -> tuple[str, ...] | None:
    """Names of the children that a BatchNorm calls in a row on what it has normalised.

    None if its forward does more than that, or cannot be traced.
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
    """The nodes among a node's arguments, as often as they occur."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def is_query(node: fx.Node) -> bool:
    """Whether a node asks for a shape or the like, and so makes no tensor."""
    name = node.args[1] if node.target is getattr else node.target
    return node.op in ("call_method", "call_function") and name in _SHAPE_QUERIES


def is_number(node: fx.Node) -> bool:
    """Whether a node's value comes from such questions alone."""
    stack = [node]
    seen = {node}
    while stack:
        node = stack.pop()
        inputs = [] if node.op == "call_module" else node.all_input_nodes
        if not is_query(node):
            if not inputs:
                return False
            stack += [i for i in inputs if i not in seen]
            seen.update(inputs)
    return True


def memory_roots(
    graph: fx.Graph, owner: nn.Module, fresh: Collection[fx.Node] = ()
) -> dict[fx.Node, fx.Node]:
    """For each node of a module's graph, the one whose memory it may share; `fresh` share none."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", node.target)
        function = node.op in ("call_method", "call_function")
        alias = function and (name in _ALIASES or str(name).endswith("_")) and not is_query(node)
        if inspect.isfunction(node.target):
            home = str(node.target.__module__).partition(".")[0]
            # Those of torch.fx.wrap may return what they are given.
            alias = alias or home not in ("torch", "fusedshape")
        if node.op == "call_module":
            alias = isinstance(_child(owner, str(node.target)), _ALIAS_MODULES)
        args = node.all_input_nodes
        shared = alias and bool(args) and node not in fresh
        roots[node] = roots[args[0]] if shared else node
    return roots


def take_over(changed: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> None:
    """Let what uses `changed` after `node`, which changes it in place, use that node's result."""
    changed.replace_all_uses_with(node, lambda user: order[user] > order[node])


def write_out_of_place(node: fx.Node) -> None:
    """Let a function or method that changes its input in place make a new tensor."""
    name = str(getattr(node.target, "__name__", node.target))
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.op == "call_method":
        node.target = name.removesuffix("_")
    elif node.op == "call_function":
        home = F if hasattr(F, name.removesuffix("_")) else torch
        plain = operator.add if name == "iadd" else getattr(home, name.removesuffix("_"))
        node.target = plain


def _child(owner: nn.Module, name: str) -> nn.Module | None:
    try:
        return owner.get_submodule(name)
    except AttributeError:
        return None  # only planned yet


_Code = tuple[str, dict[str, Any], ast.AST]


@functools.cache
def reachable_code(cls: Any) -> tuple[_Code, ...] | None:
    """Syntax trees of forward and all it reaches outside torch; None if there is no source.

    Each with the name of its self ("" for functions) and its globals.
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
    """Modules below an untraceable one that it may call itself.

    Where its source only ever calls a child, ``self.child(…)``, what is inside that child is left
    to the child's own forward.
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
