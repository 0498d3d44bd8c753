"""A module `cudnn` that is not there: graphs are recorded and computed by torch on the CPU.

It has what fusedshape asks of cudnn-frontend and refuses everything else. Its pointwise operations
are the textbook's, in the dtype that `evaluate` is given; min and max return the other operand
where one is NaN, which is the worst that hardware may do.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__version__ = "1.32.0"


class data_type(Enum):  # noqa: N801 (cudnn's name)
    HALF = torch.float16
    BFLOAT16 = torch.bfloat16
    FLOAT = torch.float32
    BOOLEAN = torch.bool


class reduction_mode(Enum):  # noqa: N801
    ADD = auto()


class heur_mode(Enum):  # noqa: N801
    A = auto()
    FALLBACK = auto()


class build_plan_policy(Enum):  # noqa: N801
    HEURISTICS_CHOICE = auto()


class numerical_note(Enum):  # noqa: N801
    TENSOR_CORE = auto()
    NONDETERMINISTIC = auto()
    DOWN_CONVERT_INPUTS = auto()


class cudnnGraphNotSupportedError(RuntimeError):  # noqa: N801
    pass


def _least(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.minimum(a, b)))


def _most(a: Tensor, b: Tensor) -> Tensor:
    return -_least(-a, -b)


def _compared(name: str) -> Callable[..., Tensor]:
    return lambda input, comparison: getattr(torch, name)(input, comparison)


#: cuDNN's pointwise operations, with its names of their operands.
POINTWISE: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": lambda input0, input1: _least(input0, input1),
    "max": lambda input0, input1: _most(input0, input1),
    "cmp_le": _compared("le"),
    "cmp_gt": _compared("gt"),
    "binary_select": lambda input0, input1, mask: torch.where(mask, input0, input1),
    "neg": lambda input: -input,
    "abs": lambda input: input.abs(),
    **{
        name: (lambda op: lambda input: op(input))(getattr(torch, name))
        for name in ("exp", "log", "sqrt", "tanh", "sigmoid", "erf", "sin", "cos")
    },
}
CONVOLUTIONS = {"conv_fprop": ("image", "weight"), "conv_dgrad": ("loss", "filter"),
                "conv_wgrad": ("image", "loss")}  # fmt: skip


class tensor:  # noqa: N801
    """A tensor of a graph; where it comes from is `made_by`."""

    def __init__(
        self, made_by: tuple[str, dict[str, tensor], dict[str, Any]] | None = None
    ) -> None:
        self.made_by = made_by
        self.uid = 0
        self.name = ""
        self.dim: list[int] | None = None
        self.stride: list[int] | None = None
        self.type: data_type | None = None
        self.by_value = self.output = False

    def set_dim(self, dim: Sequence[int]) -> tensor:
        self.dim = list(dim)
        return self

    def set_stride(self, stride: Sequence[int]) -> tensor:
        self.stride = list(stride)
        return self

    def set_output(self, output: bool) -> tensor:
        self.output = output
        return self

    def set_data_type(self, type: data_type) -> tensor:
        assert isinstance(type, data_type)
        self.type = type
        return self

    def set_uid(self, uid: int) -> tensor:
        self.uid = uid
        return self


class Handle:
    """As `cudnn.create_handle` makes them."""

    def __init__(self) -> None:
        self.stream = 0
        self.thread = threading.get_ident()


def create_handle() -> Handle:
    return Handle()


class Properties:
    """Of a device, by its number or from what `serialize` wrote."""

    def __init__(self, device: int | str) -> None:
        self.text = device if isinstance(device, str) else json.dumps({"cudaDeviceId": device})
        if '"exit"' in self.text and multiprocessing.parent_process() is not None:
            os._exit(3)

    def serialize(self) -> str:
        return self.text


create_device_properties = Properties


def set_stream(handle: Handle, stream: int) -> None:
    handle.stream = stream


def backend_version() -> int:
    return 92800


class State(SimpleNamespace):
    """What a test wants to happen, and what did."""


STATE = State(refused=None, broken=None, built=[], loaded=[], executed=[], seconds=0.0)


def reset() -> None:
    """Forget what happened, and break nothing."""
    STATE.__dict__.update(refused=None, broken=None, built=[], loaded=[], executed=[], seconds=0.0)


class pygraph:  # noqa: N801
    """A graph; `evaluate` computes it."""

    def __init__(self, *, handle: Any = None, device_property: Any = None, **types: Any) -> None:
        self.handle, self.types = handle, types
        self.inputs: list[tensor] = []
        self.steps: list[tensor] = []
        self.stage = 0
        self.notes: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Callable[..., tensor]:
        if name in POINTWISE:
            return lambda **operands: self._apply(name, operands, {})
        raise AttributeError(name)

    def tensor(
        self,
        dim: Sequence[int],
        stride: Sequence[int],
        data_type: data_type,
        name: str,
        uid: int,
        is_pass_by_value: bool = False,
    ) -> tensor:
        made = tensor_of(dim, stride, data_type, name, uid)
        made.by_value = is_pass_by_value
        self.inputs.append(made)
        return made

    def _apply(self, op: str, operands: dict[str, tensor], how: dict[str, Any]) -> tensor:
        known = {id(t) for t in (*self.inputs, *self.steps)}
        for operand in operands.values():
            assert id(operand) in known, f"{op}: an operand of another graph"
        if op in POINTWISE:
            codes = POINTWISE[op].__code__
            assert set(operands) == set(codes.co_varnames[: codes.co_argcount]), (op, operands)
        made = tensor((op, operands, how))
        self.steps.append(made)
        return made

    def conv_fprop(self, image: tensor, weight: tensor, **how: Any) -> tensor:
        return self._apply("conv_fprop", {"image": image, "weight": weight}, how)

    def conv_dgrad(self, loss: tensor, filter: tensor, **how: Any) -> tensor:
        return self._apply("conv_dgrad", {"loss": loss, "filter": filter}, how)

    def conv_wgrad(self, image: tensor, loss: tensor, **how: Any) -> tensor:
        return self._apply("conv_wgrad", {"image": image, "loss": loss}, how)

    def reduction(self, input: tensor, mode: reduction_mode) -> tensor:
        assert mode is reduction_mode.ADD
        return self._apply("reduction", {"input": input}, {})

    def _next(self, stage: int) -> None:
        assert self.stage == stage - 1, f"stage {stage} after {self.stage}"
        self.stage = stage

    def validate(self) -> None:
        self._next(1)
        results = [t for t in self.steps if t.output]
        assert results
        uids = [t.uid for t in (*self.inputs, *results)]
        assert sorted(uids) == list(range(1, len(uids) + 1))
        for t in self.inputs:
            assert t.dim is not None
            assert t.stride is not None
            assert not t.by_value or set(t.dim) == {1}

    def build_operation_graph(self) -> None:
        self._next(2)

    def create_execution_plans(self, modes: Sequence[heur_mode]) -> None:
        assert modes
        self._next(3)

    def select_numeric_notes(self, notes: Sequence[numerical_note]) -> pygraph:
        assert self.stage == 3
        self.notes += [("select", note) for note in notes]
        return self

    def deselect_numeric_notes(self, notes: Sequence[numerical_note]) -> pygraph:
        assert self.stage == 3
        self.notes += [("deselect", note) for note in notes]
        return self

    def build_plans(self, policy: build_plan_policy) -> None:
        self._next(4)
        time.sleep(STATE.seconds)
        reason = STATE.refused(self) if STATE.refused else None
        if reason:
            raise cudnnGraphNotSupportedError(reason)
        STATE.built.append(self)

    def get_workspace_size(self) -> int:
        assert self.stage == 4
        return 1024

    def serialize(self, *, as_bytes: bool) -> bytes:
        assert self.stage == 4
        assert as_bytes
        order = {id(t): i for i, t in enumerate((*self.inputs, *self.steps))}

        def plain(t: tensor) -> dict[str, Any]:
            made = None
            if t.made_by is not None:
                op, operands, how = t.made_by
                made = [op, {k: order[id(v)] for k, v in operands.items()}, how]
            keep = ("uid", "name", "dim", "stride", "by_value", "output")
            return {k: getattr(t, k) for k in keep} | {
                "type": t.type and t.type.name,
                "made_by": made,
            }

        data = [plain(t) for t in (*self.inputs, *self.steps)]
        return json.dumps({"fake": 1, "inputs": len(self.inputs), "tensors": data}).encode()

    def deserialize(self, handle: Any, data: bytes) -> None:
        found = json.loads(bytes(data))
        if found.get("fake") != 1:
            raise RuntimeError("CUDNN_STATUS_BAD_PARAM")
        tensors: list[tensor] = []
        for fields in found["tensors"]:
            made = tensor()
            own = fields.pop("made_by")
            type = fields.pop("type")
            made.type = type and data_type[type]
            made.__dict__.update(fields)
            if own is not None:
                made.made_by = own[0], {k: tensors[i] for k, i in own[1].items()}, own[2]
            tensors.append(made)
        self.inputs, self.steps = tensors[: found["inputs"]], tensors[found["inputs"] :]
        self.stage = 4
        STATE.loaded.append(self)

    def execute(self, pack: Mapping[int, int], workspace: int, handle: Handle) -> None:
        assert self.stage == 4
        assert handle.thread == threading.get_ident(), "a handle serves one thread"
        broken = STATE.broken(self) if STATE.broken else None
        if broken:
            raise RuntimeError(broken)
        results = [t for t in self.steps if t.output]
        assert set(pack) == {t.uid for t in (*self.inputs, *results)}
        assert workspace
        for pointer in (pack[t.uid] for t in (*self.inputs, *results) if not t.by_value):
            assert pointer % 16 == 0
        feeds = {t.uid: at(pack[t.uid], t) for t in self.inputs}
        for uid, value in evaluate(self, feeds, torch.float32).items():
            place = next(t for t in results if t.uid == uid)
            at(pack[uid], place).copy_(value)
        STATE.executed.append((self, dict(pack), handle.stream))


def tensor_of(
    dim: Sequence[int], stride: Sequence[int], type: data_type, name: str, uid: int
) -> tensor:
    made = tensor()
    made.name = name
    return made.set_dim(dim).set_stride(stride).set_data_type(type).set_uid(uid)


def at(pointer: int, t: tensor) -> Tensor:
    """The memory of a tensor."""
    assert t.dim is not None
    assert t.stride is not None
    assert t.type is not None
    size = sum((n - 1) * s for n, s in zip(t.dim, t.stride, strict=True)) + 1
    bytes_ = size * t.type.value.itemsize
    memory = (ctypes.c_char * bytes_).from_address(pointer)
    return torch.frombuffer(memory, dtype=t.type.value).as_strided(t.dim, t.stride)


def evaluate(graph: pygraph, feeds: Mapping[int, Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
    """The results of a graph by uid, computed in `dtype` and not rounded.

    Args:
        graph: what was recorded.
        feeds: its inputs by uid.
        dtype: of everything in between.
    """
    known = {id(t): feeds[t.uid].to(dtype) for t in graph.inputs}
    for step in graph.steps:
        assert step.made_by is not None
        op, operands, how = step.made_by
        given = {name: known[id(t)] for name, t in operands.items()}
        if op in POINTWISE:
            known[id(step)] = POINTWISE[op](**given)
        elif op == "reduction":
            (value,) = given.values()
            assert step.dim is not None
            others = [d for d, n in enumerate(step.dim) if n == 1]
            known[id(step)] = value.sum(others, keepdim=True)
        else:
            known[id(step)] = _convolved(op, list(given.values()), step.dim, how)
    return {t.uid: known[id(t)] for t in graph.steps if t.output}


def _convolved(op: str, given: list[Tensor], dim: Any, how: dict[str, Any]) -> Tensor:
    first, second = given
    zeros = [0] * len(how["stride"])
    geometry = how["stride"], how["padding"], how["dilation"], False, zeros
    backward = torch.ops.aten.convolution_backward.default
    if op == "conv_fprop":
        groups = first.shape[1] // second.shape[1]
        return torch.convolution(first, second, None, *geometry, groups)
    if op == "conv_dgrad":
        like = first.new_empty(dim)
        groups = like.shape[1] // second.shape[1]
        return backward(first, like, second, None, *geometry, groups, [True, False, False])[0]
    like = first.new_empty(dim)
    groups = first.shape[1] // like.shape[1]
    return backward(second, first, like, None, *geometry, groups, [False, True, False])[1]
