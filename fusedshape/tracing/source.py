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
