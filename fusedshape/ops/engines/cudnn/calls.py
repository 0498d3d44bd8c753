"""One call of cuDNN: from the tensors of a layer to the plan that computes it."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedshape import reference
from fusedshape.activations import ACTIVATIONS
from fusedshape.ops.checks import channels_last
from fusedshape.ops.engines.cudnn import library
from fusedshape.ops.engines.cudnn.building import NoPlanError
from fusedshape.ops.engines.cudnn.graph import Kind, Operation, graph_of, values
from fusedshape.ops.engines.cudnn.plans import Plan, Plans
from fusedshape.reference import own_weight
from fusedshape.spec import ActSpec, KernelArgs

logger = logging.getLogger("fusedshape.cudnn")

#: Lets cuDNN sum gradients of biases with atomic additions, in an order that changes.
ATOMICS = "FUSEDSHAPE_CUDNN_ATOMICS"
_NAMES = tuple(ACTIVATIONS)
_NO_CONSTANTS: KernelArgs = (0, 0.0, 1.0, 0.0, 0.0, 1.0)
_ALIGNMENT = 16  # bytes, which cuDNN expects of tensors
_conv_backward = torch.ops.aten.convolution_backward.default

Sizes = Sequence[int]


def sums_by_atomics() -> bool:
    """Whether dgrad sums the bias's gradient itself: allowed, and torch need not be deterministic.

    Example:
        >>> sums_by_atomics()
        False
    """
    return os.environ.get(ATOMICS) == "1" and not torch.are_deterministic_algorithms_enabled()


def operation_of(
    kind: Kind,
    dtype: torch.dtype,
    image: Sizes,
    weight: Sizes,
    geometry: tuple[Sizes, Sizes, Sizes],
    activation: str | None = None,
    residual: bool = False,
    sums: bool = False,
) -> Operation:
    """The operation of a layer; one of one spatial dimension is one of two, the first of size 1.

    Example:
        >>> sizes = (2, 8, 5), (4, 8, 3), ([1], [1], [1])
        >>> operation = operation_of("fprop", torch.float16, *sizes)
        >>> operation.image, operation.weight, operation.padding
        ((2, 8, 1, 5), (4, 8, 1, 3), (0, 1))
    """
    stride, padding, dilation = map(tuple, geometry)
    image, weight = tuple(image), tuple(weight)
    if len(stride) == 1:
        image, weight = (*image[:2], 1, *image[2:]), (*weight[:2], 1, *weight[2:])
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    name = str(dtype).removeprefix("torch.")
    return Operation(
        kind, name, image, weight, stride, padding, dilation, activation, residual, sums
    )


class Calls:
    """The operators of `fusedshape.ops.schema.LAYERS` by cuDNN; a plan that fails is an error.

    Args:
        plans: the plans to use.
    """

    def __init__(self, plans: Plans) -> None:
        self.plans = plans

    def conv(
        self, x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes
    ) -> Tensor:
        """The product alone."""
        geometry = stride, padding, dilation
        operation = operation_of("fprop", x.dtype, x.shape, weight.shape, geometry)
        return self._forward(operation, [x, channels_last(weight)], _NO_CONSTANTS, 0.0)

    def conv_act(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        residual_weight: float,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        *constants: float,
    ) -> Tensor:
        """The layer, joined by the residual."""
        number, slope, input_scale, *rest = constants
        geometry = stride, padding, dilation
        joined = residual is not None
        operation = operation_of(
            *("fprop_act", x.dtype, x.shape, weight.shape, geometry),
            *(_NAMES[int(number)], joined),
        )
        tensors = [x, channels_last(weight), self._bias(bias, x, weight.shape[0])]
        if residual is not None:
            tensors.append(residual)
            input_scale *= own_weight(residual_weight)
        args: KernelArgs = (int(number), slope, input_scale, *rest)  # type: ignore[assignment]
        return self._forward(operation, tensors, args, residual_weight)

    def conv_dgrad(
        self,
        dz: Tensor,
        weight: Tensor,
        saved: Tensor | None,
        bias: Tensor | None,
        input_size: Sizes,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        *rest: float,
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the input, through the layer before where its output is given."""
        *constants, _, bias_grad = rest
        geometry = stride, padding, dilation
        kind: Kind = "dgrad" if saved is None else "dgrad_act"
        name = None if saved is None else _NAMES[int(constants[0])]
        inside = bool(bias_grad) and sums_by_atomics()
        operation = operation_of(
            kind, dz.dtype, input_size, weight.shape, geometry, name, sums=inside
        )
        dx = _empty(dz, input_size)
        sums = dz.new_empty(input_size[1] if inside else 0, dtype=torch.float32)
        tensors = [dz, channels_last(weight)] + ([] if saved is None else [saved])
        results = [dx, sums] if inside else [dx]
        self._run(operation, tensors, results, tuple(constants), 0.0)  # type: ignore[arg-type]
        if bias_grad and not inside:
            sums = dx.sum([0, *range(2, dx.ndim)], dtype=torch.float32)
        return dx, sums

    def conv_wgrad(
        self,
        dz: Tensor,
        x: Tensor,
        weight_size: Sizes,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
    ) -> Tensor:
        """The gradient of the weight."""
        geometry = stride, padding, dilation
        operation = operation_of("wgrad", x.dtype, x.shape, weight_size, geometry)
        dweight = _empty(x, weight_size)
        self._run(operation, [x, dz], [dweight], _NO_CONSTANTS, 0.0)
        return dweight

    def _forward(
        self, operation: Operation, tensors: list[Tensor], constants: KernelArgs, weight: float
    ) -> Tensor:
        shape = operation.output
        x = tensors[0]
        y = _empty(x, shape if x.ndim == len(shape) else (*shape[:2], shape[-1]))
        self._run(operation, tensors, [y], constants, weight)
        return y

    def _run(
        self,
        operation: Operation,
        tensors: Sequence[Tensor],
        results: Sequence[Tensor],
        constants: KernelArgs,
        residual_weight: float,
    ) -> None:
        device = tensors[0].device
        index = device.index
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self._run(operation, tensors, results, constants, residual_weight)
            return
        plan = self._plan(index, operation)
        # What is copied must live until the call has been made.
        given = [t if t.data_ptr() % _ALIGNMENT == 0 else t.clone() for t in tensors]
        pointers = [t.data_ptr() for t in given]
        pointers += _numbers(operation, constants, residual_weight)[1]
        pointers += [t.data_ptr() for t in results]
        workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=device)
        cudnn, handle = library.module(), library.handle(index)
        try:
            cudnn.set_stream(handle, torch.cuda.current_stream(index).cuda_stream)
            plan.graph.execute(
                dict(zip(plan.uids, pointers, strict=True)), workspace.data_ptr(), handle
            )
        # cuDNN raises what it likes, of classes of its own.
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            reason = f"its plan failed ({type(error).__name__}: {line})"
            self.plans.give_up(index, operation, reason)
            raise _refusal(operation, reason) from error

    def _plan(self, index: int, operation: Operation) -> Plan:
        try:
            return self.plans.get(index, operation)
        except NoPlanError as error:
            raise _refusal(operation, str(error)) from error

    def _bias(self, bias: Tensor | None, x: Tensor, channels: int) -> Tensor:
        """The bias in float32; a vector of zeros for none, so that one plan serves both."""
        if bias is not None:
            return bias.detach().float().contiguous()
        if torch.cuda.is_current_stream_capturing():  # its memory would be the CUDA graph's
            return torch.zeros(channels, device=x.device)
        return _zeros(x.device, channels)


class LenientCalls(Calls):
    """The operators for "auto": where cuDNN fails, torch's own functions compute."""

    def conv(self, *args: Any) -> Tensor:
        return _either(super().conv, _conv, args)

    def conv_act(self, *args: Any) -> Tensor:
        return _either(super().conv_act, _conv_act, args)

    def conv_dgrad(self, *args: Any) -> tuple[Tensor, Tensor]:
        return _either(super().conv_dgrad, _conv_dgrad, args)

    def conv_wgrad(self, *args: Any) -> Tensor:
        return _either(super().conv_wgrad, _conv_wgrad, args)


def _either(ours: Callable[..., Any], plain: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What cuDNN computes, or torch where there is no plan, which is said."""
    try:
        return ours(*args)
    except NoPlanError as error:
        _tell(str(error))
        return plain(*args)


@functools.lru_cache(4096)
def _tell(line: str) -> None:
    """Say once what failed."""
    logger.warning("%s; aten computes it", line)


def _refusal(operation: Operation, reason: str) -> NoPlanError:
    shapes = f"input {operation.image}, weight {operation.weight}, {operation.dtype}"
    return NoPlanError(f"engine 'cudnn' cannot run the {operation.kind} of {shapes}: {reason}")


@functools.lru_cache(4096)
def _numbers(
    operation: Operation, constants: KernelArgs, residual_weight: float
) -> tuple[ctypes.Array[ctypes.c_float], list[int]]:
    """The numbers that a call gives, and where in the host's memory each of them is."""
    found = values(graph_of(operation), constants, residual_weight)
    array = (ctypes.c_float * len(found))(*found)
    start = ctypes.addressof(array)
    return array, [start + ctypes.sizeof(ctypes.c_float) * i for i in range(len(found))]


@functools.lru_cache(256)
def _zeros(device: torch.device, channels: int) -> Tensor:
    return torch.zeros(channels, device=device)


def _empty(like: Tensor, shape: Sizes) -> Tensor:
    """A tensor with channels innermost, without numbers."""
    batch, channels, *spatial = shape
    return like.new_empty(batch, *spatial, channels).movedim(-1, 1)


def _groups(channels: int, weight: Sizes) -> int:
    return channels // weight[1]


def _spec(constants: Sequence[float]) -> ActSpec:
    number, slope, input_scale, input_shift, output_shift, output_scale = constants
    return ActSpec(_NAMES[int(number)], input_scale, input_shift, output_shift, output_scale, slope)


def _conv(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    how = False, [0] * len(stride), _groups(x.shape[1], weight.shape)
    return channels_last(torch.convolution(x, weight, None, stride, padding, dilation, *how))


def _conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: float,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    *constants: float,
) -> Tensor:
    groups, spec = _groups(x.shape[1], weight.shape), _spec(constants)
    how = stride, padding, dilation, groups, residual, residual_weight
    return channels_last(reference.conv_act(x, weight, bias, spec, *how))


def _conv_dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    bias: Tensor | None,
    input_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *constants, save_output, bias_grad = rest
    how = False, [0] * len(stride), _groups(input_size[1], weight.shape), [True, False, False]
    x = _empty(dz, input_size)
    dx = _conv_backward(dz, x, weight, None, stride, padding, dilation, *how)[0]
    dx = channels_last(dx)
    if saved is not None:
        dx = reference.act_grad(dx, saved, bias, _spec(constants), 1, bool(save_output))
    sums = reference.channel_sum(dx, 1) if bias_grad else dz.new_empty(0, dtype=torch.float32)
    return dx, sums


def _conv_wgrad(
    dz: Tensor, x: Tensor, weight_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Tensor:
    how = False, [0] * len(stride), _groups(x.shape[1], weight_size), [False, True, False]
    weight = _empty(x, weight_size)
    return channels_last(_conv_backward(dz, x, weight, None, stride, padding, dilation, *how)[1])
