"""What a BatchNorm of a class of its own does with what it has normalised."""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx, nn

from fusedshape.nodes import is_query
from fusedshape.proxies import UntraceableError
from fusedshape.tracing.forwards import trace
from fusedshape.tracing.graphs import is_plain, tensor_args


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
