"""conv_chain: a stack of layers as one autograd node, whose backward fuses across layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from fusedshape.ops import stock
from fusedshape.ops.checks import (
    Geometry,
    Size,
    check_bias,
    check_linear,
    check_spec,
    check_tensor,
    conv_geometry,
    conv_shape,
    match,
    node,
    plain_backward,
    transformed,
)
from fusedshape.ops.choice import Engine, asked_engine, engines_for, forward_engine
from fusedshape.ops.dispatch import Backend, choose
from fusedshape.ops.engines.protocol import Engines
from fusedshape.ops.layer import Before, Layer, channel_dim
from fusedshape.ops.layer_act import Step, composed
from fusedshape.reference import product_bias
from fusedshape.spec import ActSpec, saves_output
from fusedshape.validate import shown


class ChainLayer(NamedTuple):
    """One layer of `conv_chain`: a convolution, or a linear layer where weight is a matrix.

    Attributes:
        weight: `(K, C / groups, *kernel)`, or `(out_features, in_features)`.
        bias: (K,) or None.
        spec: the constants of its activation.
        stride: as in `conv_act`, and so are the next three; a linear layer has none of the four.
        padding: of zeros.
        dilation: distance of taps.
        groups: number of groups.
        engine: as in `conv_act`.
        backend: as in `shaped_act`.
    """

    weight: Tensor
    bias: Tensor | None
    spec: ActSpec
    stride: Size = 1
    padding: Size | str = 0
    dilation: Size = 1
    groups: int = 1
    engine: Engine = "auto"
    backend: Backend = "auto"


def conv_chain(x: Tensor, layers: Sequence[ChainLayer], *, max_length: int | None = None) -> Tensor:
    r"""Layers in a row, y_l = φ̂_l(y_{l−1} ⋆ W_l + b_l), as one autograd node.

    The numbers are those of `conv_act` or `linear_act` layer by layer. Backward makes one pass for
    the gradients of activation and bias of a layer, and none of its own where the Triton engine
    computes the layer after it: that layer's dgrad ends with them. Without it, the pass works in
    place on dgrad's result. One activation is kept for each layer: its output, or where φ′ cannot
    be read off that, its pre-activation, from which backward computes the output again for the
    next layer's weight gradient. They are let go as backward proceeds. Nothing is kept for layers
    before the first that wants a gradient. A second derivative recomputes the chain layer by layer.

    Gradients of a node arrive together, when backward has gone through all of its layers, and
    hooks on saved tensors are asked for all of a node's at once. What works piece by piece
    (DistributedDataParallel, save_on_cpu) wants shorter nodes: `max_length`.

    Args:
        x: as for `conv_act` or `linear_act`, whichever the first layer is.
        layers: all convolutions of the same number of spatial dimensions, or all linear. Padding
            is with zeros, the same on both sides.
        max_length: layers of one node at most; None puts all in one. Each node more costs one pass
            more over one activation's gradient.

    Returns:
        The last layer's output.

    Raises:
        TypeError: dtypes that are not supported or do not match, or a layer that is no ChainLayer.
        ValueError: no layers, shapes, devices or sizes that do not match, a mixture of layers, or
            a backend or engine that cannot run.
        RuntimeError: the backend named is not built or not installed.

    Example:
        >>> spec = ActSpec("relu", output_scale=2.0)
        >>> one = ChainLayer(torch.ones(1, 1, 3, 3), torch.tensor([1.0]), spec, padding=1)
        >>> conv_chain(torch.ones(1, 1, 2, 2), [one, one])[0, 0]
        tensor([[82., 82.],
                [82., 82.]])
    """
    if not isinstance(layers, Iterable):
        raise TypeError(
            f"conv_chain: layers must be a sequence of ChainLayers, got {shown(layers)}"
        )
    layers = list(layers)
    if not layers:
        raise ValueError("conv_chain: no layers; pass at least one ChainLayer")
    if max_length is not None and (
        not isinstance(max_length, int) or max_length is True or max_length < 1
    ):
        raise ValueError(
            f"conv_chain: max_length={shown(max_length)} must be a positive integer or None"
        )
    for layer in layers:
        if not isinstance(layer, ChainLayer):
            kind = type(layer).__name__
            raise TypeError(f"conv_chain: layers must be ChainLayers, got {kind}")
    tensors = [x, *(t for layer in layers for t in layer[:2])]
    if has_torch_function(tensors) or stock.looked_into(*tensors):
        return stock.instead_of(conv_chain, tensors, x, layers, max_length=max_length)
    check_tensor("conv_chain", "x", x)
    n = _spatial(layers[0])
    unbatched = n > 0 and x.ndim == n + 1
    if unbatched:
        x = x.unsqueeze(0)
    shape = list(x.shape)
    steps: list[Step] = []
    params: list[Tensor | None] = []
    for i, layer in enumerate(layers):
        op = f"conv_chain: layer {i}"
        if _spatial(layer) != n:
            raise ValueError(
                f"{op}: weight has {layer.weight.ndim} dimensions, that of layer 0 has "
                f"{layers[0].weight.ndim}; make a chain of each kind"
            )
        x, weight, step = _checked(op, x, shape, layer)
        steps.append(step)
        params += [weight, layer.bias]
    length = len(steps) if max_length is None else max_length
    nodes = -(-len(steps) // length)
    bounds = [i * len(steps) // nodes for i in range(nodes + 1)]
    for first, end in itertools.pairwise(bounds):
        x = _chained(x, tuple(steps[first:end]), params[2 * first : 2 * end])
    return x.squeeze(0) if unbatched else x


def _spatial(layer: ChainLayer) -> int:
    check_tensor("conv_chain", "weight", layer.weight)
    return layer.weight.ndim - 2


def _checked(
    op: str, x: Tensor, shape: list[int], layer: ChainLayer
) -> tuple[Tensor, Tensor, Step]:
    """Check a layer for an input of `shape`, which becomes that of its output.

    All layers share the dtype and device of `x`, the chain's input. It is returned, with the
    weight, in the dtype that autocast asks for.
    """
    spec = check_spec(op, layer.spec)
    x, weight = match(op, x, layer.weight)
    geometry = None
    if weight.ndim == 2:
        check_linear(op, shape, weight)
        given = layer.stride, layer.padding, layer.dilation, layer.groups
        if given != (1, 0, 1, 1):
            raise ValueError(
                f"{op}: a linear layer has no stride, padding, dilation or groups, got {given}"
            )
        shape[-1] = weight.shape[0]
    else:
        sizes = layer.stride, layer.padding, layer.dilation, layer.groups
        geometry, widths = conv_geometry(op, tuple(shape), weight.shape, *sizes)
        if widths is not None:
            raise ValueError(
                f"{op}: padding={layer.padding!r} of a kernel of {tuple(weight.shape[2:])} pads "
                "more at the end than at the beginning; use conv_act for this layer, or an odd "
                "kernel"
            )
        shape[:] = conv_shape(shape, weight, geometry)
    if layer.bias is not None:
        check_bias(op, layer.bias, x, weight.shape[0], "weight has {} output channels")
    return (
        x,
        weight,
        Step(spec, geometry, choose(layer.backend, x), asked_engine(layer.engine, layer.backend)),
    )


def _chained(x: Tensor, steps: tuple[Step, ...], params: Sequence[Tensor | None]) -> Tensor:
    """Checked layers as one autograd node; `params` are weight and bias of each in turn."""
    if transformed():
        return _composed(x, steps, params)
    live = 0
    if not torch.is_grad_enabled():
        live = len(steps)
    elif not x.requires_grad:
        wants = [i // 2 for i, p in enumerate(params) if p is not None and p.requires_grad]
        live = wants[0] if wants else len(steps)
    for i in range(live):
        layer = _layer(steps[i], params, i)
        x = forward_engine(steps[i].engine, x, layer).fprop_act(x, layer)
    if live == len(steps):
        return x
    left = params[2 * live :]
    if torch.compiler.is_compiling():  # Dynamo rejects one tensor as two arguments of a Function
        left = [None if t is None else t.view_as(t) for t in left]
    return node(Chain)(steps[live:], x, *left)


def _layer(step: Step, params: Sequence[Tensor | None], i: int) -> Layer:
    """The i-th layer of a chain."""
    weight, bias = params[2 * i], params[2 * i + 1]
    assert weight is not None
    spec, geometry, kernels, _ = step
    return Layer(weight, bias, spec, geometry, kernels)


class Chain(torch.autograd.Function):
    """Layers of which the first needs a gradient, so that backward passes through all of them."""

    @staticmethod
    def forward(ctx: Any, steps: tuple[Step, ...], x: Tensor, *params: Tensor | None) -> Tensor:
        engines: list[Engines] = []
        saved: list[Tensor] = []
        y = x
        for i, step in enumerate(steps):
            layer = _layer(step, params, i)
            weight, bias, spec, geometry, kernels, _ = layer
            own = engines_for(step.engine, y, layer, i > 0)
            engines.append(own)
            if saves_output(spec, y.dtype):
                y = own.fprop.fprop_act(y, layer)
                saved.append(y)
            else:
                inner, rest = product_bias(bias, y, weight)
                z = own.fprop.fprop(y, layer, inner)
                y = kernels.bias_act(z, rest, spec, channel_dim(z, geometry))
                saved.append(z)
        ctx.steps = steps
        ctx.engines = engines
        ctx.save_for_backward(x, *params, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        steps, engines = ctx.steps, ctx.engines
        x, *tensors = ctx.saved_tensors
        count = 2 * len(steps)
        params, saved = tensors[:count], list(tensors[count:])
        _, need_x, *need = ctx.needs_input_grad
        if plain_backward(grads[0]):
            return None, *_composed_grads(grads[0], steps, x, params, [need_x, *need])
        if not torch.compiler.is_compiling():
            ctx.maybe_clear_saved_tensors()
        del tensors
        out: list[Tensor | None] = [None] * count
        spec, geometry, kernels, _ = steps[-1]
        dim = channel_dim(saved[-1], geometry)
        last = product_bias(params[-1], saved[-1], params[-2])[1]
        dz, sums = kernels.act_grad(grads[0], saved[-1], last, spec, dim, need[-1])
        for i in range(len(steps) - 1, -1, -1):
            own, layer = engines[i], _layer(steps[i], params, i)
            saved.pop()  # backward needs it no more, and dz is as large
            if sums is not None:
                out[2 * i + 1] = sums.to(params[2 * i + 1].dtype)
            like, before = x, None
            if i > 0:
                spec, _, kernels, _ = steps[i - 1]
                like = saved[-1]
                bias = product_bias(params[2 * i - 1], like, params[2 * i - 2])[1]
                before = Before(like, bias, spec, kernels, need[2 * i - 1])
            want_x, want_weight = i > 0 or need_x, need[2 * i]
            inputs = _input(before, layer.geometry, x) if want_weight else like
            if want_x and want_weight and own.dgrad is own.wgrad:
                dz, sums, out[2 * i] = own.dgrad.both(dz, inputs, layer, before)
            else:
                if want_weight:
                    out[2 * i] = own.wgrad.wgrad(dz, inputs, layer)
                if want_x:
                    dz, sums = own.dgrad.dgrad(dz, like, layer, before)
            del inputs, like, before  # free their memory before the next layer allocates
        return None, dz if need_x else None, *out


def _input(before: Before | None, geometry: Geometry | None, x: Tensor) -> Tensor:
    """The input of a layer: the output of the layer before, or x."""
    if before is None:
        return x
    saved, bias, spec, kernels, _ = before
    if saves_output(spec, saved.dtype):
        return saved
    return kernels.bias_act(saved, bias, spec, channel_dim(saved, geometry))


def _composed(x: Tensor, steps: Sequence[Step], params: Sequence[Tensor | None]) -> Tensor:
    """The chain in plain PyTorch."""
    for i, step in enumerate(steps):
        x = composed(x, _layer(step, params, i))
    return x


def _composed_grads(
    grad: Tensor,
    steps: Sequence[Step],
    x: Tensor,
    params: Sequence[Tensor | None],
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x and params by plain PyTorch, which can be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a tensor that is passed twice gets a gradient for each of its places.
        names = [None if t is None else t.view_as(t) for t in (x, *params)]
        first, *rest = names
        assert first is not None
        y = _composed(first, steps, rest)
    wanted = [t for t, wants in zip(names, need, strict=True) if wants and t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again))
    return tuple(next(found) if wants else None for wants in need)
