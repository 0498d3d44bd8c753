"""Questions about traced graphs, and small changes of them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedshape.kinds import is_leaf, kind_of
from fusedshape.nodes import is_foreign, is_query, operation
from fusedshape.torch_ops import ALIASES, base, function_of, name_of, writes


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
