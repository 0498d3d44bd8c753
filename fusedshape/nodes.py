"""What the value of a traced node is: a tensor, a number, or unknown."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusedshape.kinds import is_leaf
from fusedshape.torch_ops import QUERIES, name_of

# Attributes of tensors that are tensors themselves.
_TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH", "data", "real", "imag"}
_OPERATORS = {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos"}
_OPERATORS |= {f"i{name}" for name in _OPERATORS} | {"abs", "invert", "and_", "or_", "xor"}
_OPERATORS |= {"lt", "le", "gt", "ge", "eq", "ne"}
# Methods without an operator of that name in aten.
_METHODS = {"float", "double", "half", "bfloat16", "type", "cpu", "cuda"}
# Modules of torch that return several tensors, or none.
_OTHER_MODULES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss)


def operation(node: fx.Node) -> str:
    """The name of the function, method or attribute that a node evaluates; "" for other nodes."""
    if node.op not in ("call_method", "call_function"):
        return ""
    return str(node.args[1]) if node.target is getattr else name_of(node.target)


def is_foreign(node: fx.Node) -> bool:
    """Whether a node calls a function that belongs to neither torch nor this library.

    torch.fx.wrap puts such calls into a graph without tracing into them.
    """
    home = str(getattr(node.target, "__module__", "")).partition(".")[0]
    return inspect.isfunction(node.target) and home not in ("torch", "fusedshape")


def is_query(node: fx.Node) -> bool:
    """Whether a node asks for a shape, dtype or the like, so that its value is no tensor.

    ``x.type()`` is such a question; ``x.type(torch.half)`` is a cast.
    """
    name = operation(node)
    if name not in QUERIES or is_foreign(node):
        return False
    return name != "type" or len(node.args) + len(node.kwargs) == 1 or node.target is getattr


def is_number(node: fx.Node) -> bool:
    """Whether a node's value is computed from such questions alone."""
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


class Tensors:
    """Tells which nodes of a graph are known to stand for one tensor.

    Args:
        placeholder: answers for a placeholder.
        called: returns the module that a call_module node calls.
        module: answers for a call of a module that is not torch's own.
    """

    def __init__(
        self,
        placeholder: Callable[[fx.Node], bool],
        called: Callable[[fx.Node], nn.Module],
        module: Callable[[nn.Module, fx.Node], bool] = lambda module, node: False,
    ) -> None:
        self._placeholder = placeholder
        self._called = called
        self._module = module
        self._known: dict[fx.Node, bool] = {}

    def is_tensor(self, node: Any) -> bool:
        """Whether a node's value is known to be one tensor."""
        if not isinstance(node, fx.Node):
            return False
        if node not in self._known:
            self._known[node] = False  # the answer if the question comes up again inside
            self._known[node] = self._ask(node)
        return self._known[node]

    def _ask(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return True
        if node.op == "call_module":
            return self._of_call(node)
        if node.op not in ("call_method", "call_function") or is_query(node):
            return False
        name = operation(node)
        if node.target is getattr:
            return name in _TENSOR_ATTRIBUTES and self.is_tensor(node.args[0])
        if node.target is operator.getitem:
            whole = node.args[0]
            if isinstance(whole, fx.Node) and isinstance(node.args[1], int):
                parts = _returns(name_of(whole.target))
                if parts and parts <= {"Tensor", "Tensors"}:
                    return True
            return self.is_tensor(whole)
        if getattr(operator, name, None) is node.target:
            return name in _OPERATORS and self._takes_tensor(node)
        if inspect.isfunction(node.target):
            annotation = inspect.get_annotations(node.target).get("return")
            if annotation in (Tensor, "Tensor", "torch.Tensor"):
                return True
            if not str(node.target.__module__).startswith("torch"):
                return False
        return _returns(name) == {"Tensor"}

    def _takes_tensor(self, node: fx.Node) -> bool:
        return any(self.is_tensor(argument) for argument in node.all_input_nodes)

    def _of_call(self, node: fx.Node) -> bool:
        module = self._called(node)
        if type(module) is nn.Identity:
            return self._takes_tensor(node)
        forward = inspect.unwrap(type(module).forward)
        known = is_leaf(forward) or str(forward.__module__).startswith("torch.nn.modules.")
        if known and not isinstance(module, (nn.Sequential, *_OTHER_MODULES)):
            return not getattr(module, "return_indices", False)
        return self._module(module, node)


@functools.cache
def _returns(name: str) -> frozenset[str]:
    """The kinds of results of torch's operators of a name: "Tensor", "Tensors" or "other"."""
    found = {"Tensor"} if name in _METHODS else set()
    for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        if not any("Tensor" in str(argument.type) for argument in schema.arguments):
            continue  # an operator on Python numbers
        kinds = {str(result.type) for result in schema.returns}
        one = len(schema.returns) == 1 and kinds == {"Tensor"}
        several = kinds and kinds <= {"Tensor", "List[Tensor]"}
        found.add("Tensor" if one else "Tensors" if several else "other")
    return frozenset(found)
