"""The symbols that flow through a traced forward, and what they answer about themselves."""

from __future__ import annotations

import dis
import linecache
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import fx

from fusedshape.nodes import is_number


class UntraceableError(Exception):
    """Why a forward cannot be traced faithfully."""


# A question that comes from these modules of torch is the forward's. Other modules of torch ask for
# purposes of their own.
_ASKS_FOR_OTHERS = ("torch.jit", "torch._jit_internal")
_QUESTIONS = ("isinstance", "__class__", "getattr", "MATCH_CLASS")


class Value(fx.Proxy):
    """A proxy that keeps in-place arithmetic in place, and answers as a tensor would or refuses.

    Its tracer needs `is_tensor(node)`, `refuse(why)`, which records the reason before it raises, so
    that a forward that catches the error is refused too, and for what a symbol cannot answer itself
    `answer(value, how, why)`, `attribute(value, name)` and `type_of(value)`.
    """

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
        asker = sys._getframe(1)
        if _asserts(asker.f_code, asker.f_lasti):
            line = linecache.getline(asker.f_code.co_filename, asker.f_lineno).strip()
            message = line or f"an assertion in {asker.f_code.co_name}"
            self.tracer.create_proxy("call_function", torch._assert, (self, message), {})
            return True
        return self.tracer.to_bool(self)

    def _refuse(self, what: str) -> NoReturn:
        self.tracer.refuse(what)  # type: ignore[attr-defined]
        raise AssertionError("refuse raises")

    def _answer(self, how: Callable[[Any], Any], why: str) -> Any:
        return self.tracer.answer(self, how, why)  # type: ignore[attr-defined]

    def _is_tensor(self) -> bool:
        return bool(self.tracer.is_tensor(self.node))  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return int(self._answer(len, "it asks for the length of a value (len)"))

    def __contains__(self, item: Any) -> bool:
        holds: Callable[[Any], Any] = lambda value: item in value  # noqa: E731
        return bool(self._answer(holds, "it asks whether a value holds another (in)"))

    def __float__(self) -> float:
        return float(self._answer(float, "it takes a value as a number (float)"))

    def __int__(self) -> int:
        return int(self._answer(int, "it takes a value as a number (int)"))

    def __hash__(self) -> int:
        if not (_is_torchs(sys._getframe(1)) or self._hashes_by_identity()):
            why = "it looks a value up, which is compared by what it is (hash)"
            return int(self._answer(hash, why))
        return object.__hash__(self)

    def _hashes_by_identity(self) -> bool:
        return self._is_tensor()

    def __deepcopy__(self, memo: Any) -> Any:
        self._refuse("it copies a value (copy.deepcopy)")

    # isinstance(x, nn.Parameter) asks tensors for this attribute.
    _is_param = False

    def __getattr__(self, name: str) -> Any:
        known, found = self.tracer.attribute(self, name)  # type: ignore[attr-defined]
        if known:
            return found
        dunder = name.startswith("__") and name.endswith("__")
        if not hasattr(torch.Tensor, name) and (dunder or self._is_tensor()):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        asker = sys._getframe(1)
        whether = _asks_whether(asker)
        if whether and not self._is_tensor():
            self._refuse(f"it asks whether a value has the attribute {name} (hasattr)")
        value = AttributeValue(self, name)
        if whether != "hasattr" and not _is_torchs(asker):
            self.tracer.got.append(value)  # type: ignore[attr-defined]
        return value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance() comes here after its own quick test has failed. torch's C++ comes here too,
        # and must never take a symbol for a tensor.
        asker = sys._getframe(1)
        by_abc = asker.f_globals.get("__name__") == "abc" and asker.f_back is not None
        asker = asker.f_back if by_abc and asker.f_back is not None else asker
        if _is_torchs(asker) or not (by_abc or _running(asker) in _QUESTIONS):
            return type(self)
        return self.kind()

    def kind(self) -> type:
        """The class of the value, where it is known."""
        found: type = self.tracer.type_of(self)  # type: ignore[attr-defined]
        return found


class Known(Value):
    """A symbol whose value in one call is known to its tracer."""

    def __index__(self) -> int:
        return int(self._answer(operator.index, "it takes a value as a number (index)"))


class AttributeValue(Value):
    """An attribute of a value. It becomes a node unless it is called as a method.

    Attributes:
        seen: whether it was used in a way that the trace records. If not, the forward may have
            compared it by `is`, which Python reports to nobody.
    """

    def __init__(self, root: Value, attr: str) -> None:
        self.root = root
        self.attr = attr
        self.tracer = root.tracer
        self.seen = False
        self._node: fx.Node | None = None

    def __repr__(self) -> str:
        self.seen = True  # for instance in an assertion's message, which steers nothing
        return super().__repr__()

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The node that gets the attribute."""
        self.seen = True
        if self._node is None:
            proxy = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})
            self._node = proxy.node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it as a method."""
        self.seen = True
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)

    def _hashes_by_identity(self) -> bool:
        return False


def type_as_known(*args: Any) -> Any:
    """Python's `type`, which gives the class that a symbol stands for."""
    (value, *rest) = args
    return value.kind() if issubclass(type(value), Value) and not rest else type(*args)


def callable_as_known(value: Any) -> bool:
    """Python's `callable`, which answers for the value that a symbol stands for."""
    if issubclass(type(value), Value):
        value.kind()
        return False  # tensors are not callable
    return callable(value)


def _asserts(code: types.CodeType, at: int) -> bool:
    """Whether the instruction at an offset tests the condition of an assert statement."""
    found = [i for i in dis.get_instructions(code) if i.opname not in ("TO_BOOL", "NOT_TAKEN")]
    k, jump = next((k, i) for k, i in enumerate(found) if i.offset >= at)
    if "JUMP" not in jump.opname or not jump.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return False
    ahead = found[k + 1 :]
    if jump.opname.endswith("IF_FALSE"):  # assert a and b
        ahead = [i for i in ahead if i.offset == jump.argval]
    raises = ahead[:1] and (ahead[0].opname, ahead[0].argval)
    return bool(raises) and (raises[0] == "LOAD_ASSERTION_ERROR" or raises[1] is AssertionError)


def _running(frame: types.FrameType) -> str:
    """The name of what a frame calls, else of the attribute it gets, else of its instruction."""
    found = list(dis.get_instructions(frame.f_code))
    at = next(k for k, instruction in enumerate(found) if instruction.offset == frame.f_lasti)
    if not found[at].opname.startswith(("CALL", "PRECALL")):
        by_name = found[at].opname in ("LOAD_ATTR", "LOAD_METHOD")
        return str(found[at].argval) if by_name else found[at].opname
    # Go back over the instructions that push arguments to the one that pushes the function.
    missing = found[at].arg or 0
    ahead = found[: at - 1] if found[at - 1].opname == "PRECALL" else found[:at]
    for instruction in reversed(ahead):
        if missing == 0 and instruction.opname != "PUSH_NULL":
            return str(instruction.argval)
        missing -= dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
    return ""


def _asks_whether(frame: types.FrameType) -> str:
    """Whether a frame runs "hasattr", or "getattr" with a default; "" if neither."""
    called = _running(frame)
    last = next(i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti)
    return called if called == "hasattr" or (called == "getattr" and last.arg == 3) else ""


def _is_torchs(frame: types.FrameType) -> bool:
    """Whether a frame belongs to torch or this library and asks for its own purposes."""
    module = str(frame.f_globals.get("__name__"))
    ours = module.startswith(("torch.", "fusedshape."))
    return ours and not module.startswith(_ASKS_FOR_OTHERS)
