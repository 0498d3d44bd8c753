"""What a forward may do, told from its source where it cannot be traced."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

_Code = tuple[str, dict[str, Any], ast.AST]


@functools.cache
def reachable_code(cls: Any) -> tuple[_Code, ...] | None:
    """Syntax trees of a forward and all functions it reaches outside torch.

    Each comes with the name of its self ("" for functions) and its globals. None if a source is
    missing.
    """
    return _code_from(cls, cls.forward)


def _code_from(cls: Any, method: Any) -> tuple[_Code, ...] | None:
    """As `reachable_code`, for another method."""
    queue: list[tuple[Any, bool]] = [(method, True)]
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


# Methods of nn.Module that give modules at any depth, and those that give children.
_DEEP = {"modules", "named_modules", "get_submodule", "apply", "_modules", "__dict__"}
_SHALLOW = {"children", "named_children"}


def reached_by(module: nn.Module) -> set[nn.Module]:
    """The modules inside an untraceable one that its own forward may call.

    A forward reaches its children, and goes on from those that its source does more with than call
    them: to all children of a container, and elsewhere to children whose names the source mentions.
    """
    everything = set(module.modules()) - {module}
    kind: Any = type(module)
    trees = None if "forward" in vars(module) else reachable_code(kind)
    if trees is None:
        return everything
    loose = _loosely_used(module, trees)
    words = _words(trees)
    if loose is None or words is None:
        return everything
    reached = set(module.children())
    stack = list(loose)
    seen = set(stack)
    while stack:
        holder = stack.pop()
        more = _methods(type(holder), words) if holder is not module else set()
        if more is None:
            return everything
        if more - words:  # they may mention names that were passed over before
            words |= more
            stack, seen = list(loose), set(loose)
            continue
        every = more or words & _SHALLOW or holder is module or hasattr(type(holder), "__iter__")
        for name, child in holder.named_children():
            if (every or name in words) and child not in seen:
                reached.add(child)
                seen.add(child)
                stack.append(child)
    return reached - {module}


def _loosely_used(module: nn.Module, trees: tuple[_Code, ...]) -> set[nn.Module] | None:
    """The module or its children, where they are not only called; None if anything is reached."""
    children = dict(module.named_children())
    found: set[nn.Module] = set()
    for own, _, tree in trees:
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Name) and node.id in (own, "super")):
                continue
            access = parents[node]
            if node.id == "super" and isinstance(access, ast.Call):
                access = parents[access]
            if not isinstance(access, ast.Attribute):
                found.add(module)
                continue
            called = parents.get(access)
            if access.attr in children:
                if not (isinstance(called, ast.Call) and called.func is access):
                    found.add(children[access.attr])
                continue
            attribute = inspect.getattr_static(type(module), access.attr, None)
            if inspect.isfunction(attribute):
                if str(attribute.__module__).partition(".")[0] == "torch":
                    found.add(module)
            elif hasattr(type(attribute), "__get__"):
                return None  # a property, whose code is not looked at
    return found


def _words(trees: tuple[_Code, ...]) -> set[str] | None:
    """The attributes and texts in some code; None if it may reach any module by them."""
    found: set[str] = set()
    for _, _, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.Name) and node.id in ("vars", "eval", "exec"):
                return None
            elif isinstance(node, ast.Call) and _gets_any(node):
                found |= _SHALLOW
    return None if found & _DEEP else found


def _gets_any(call: ast.Call) -> bool:
    """Whether a call is a getattr with a computed name."""
    by_name = isinstance(call.func, ast.Name) and call.func.id == "getattr"
    return by_name and not (len(call.args) > 1 and isinstance(call.args[1], ast.Constant))


def _methods(kind: Any, words: set[str]) -> set[str] | None:
    """What the methods of a class that some code names mention; None if that may be anything."""
    found: set[str] = set()
    for word in words:
        method = inspect.getattr_static(kind, word, None)
        if inspect.isfunction(method) and not hasattr(nn.Module, word):
            if str(method.__module__).partition(".")[0] == "torch":
                continue
            trees = _code_from(kind, method)
            more = None if trees is None else _words(trees)
            if more is None:
                return None
            found |= more | {word}
    return found
