"""Where a model mixes locations by attention: `attention_in`."""

from __future__ import annotations

import ast
from typing import Any

from torch import fx, nn

from fusedshape.convert.calls import Calls
from fusedshape.convert.values import Values
from fusedshape.nodes import is_foreign, operation
from fusedshape.torch_ops import ATTENTION, MATMULS, base, name_of
from fusedshape.tracing import reachable_code

_MATMULS = MATMULS | {"bmm", "baddbmm"}
_MODULES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def attention_in(calls: Calls) -> nn.Module | None:
    """The first module of a model that computes attention; None if none does.

    Attention is torch's own, or any product of matrices that both depend on the input. In a forward
    that cannot be traced, any product of matrices is taken for it.
    """
    values = Values(calls, frozenset())
    for module in calls.names:
        if isinstance(module, _MODULES):
            return module
        if module in calls.opaque and _may_attend(module):
            return module
        nodes = (node for graph in calls.graphs.get(module, ()) for node in graph.nodes)
        if any(_attends(node, values) for node in nodes):
            return module
    return None


def _attends(node: fx.Node, values: Values) -> bool:
    name = operation(node)
    if base(name) in ATTENTION or (is_foreign(node) and _computes(node.target)):
        return True
    return base(name) in _MATMULS and len(values.depending(node)) > 1


def _may_attend(module: nn.Module) -> bool:
    kind: Any = type(module)
    trees = reachable_code(kind)
    return trees is None or any(_has_products(tree) for _, _, tree in trees)


def _computes(function: Any) -> bool:
    """Whether a function that tracing does not enter holds products of matrices."""
    holder = type(name_of(function), (), {"forward": staticmethod(function)})
    trees = reachable_code(holder)
    return trees is not None and any(_has_products(tree) for _, _, tree in trees)


def _has_products(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        name = getattr(node, "attr", getattr(node, "id", ""))
        if isinstance(node, ast.MatMult) or base(str(name)) in _MATMULS | ATTENTION:
            return True
    return False
