"""tap: the input of a layer and the gradient of its pre-activation, fused or not."""

from __future__ import annotations

import difflib
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedshape import ops
from fusedshape.kinds import FusedLayer, kind_of
from fusedshape.ops.checks import transformed
from fusedshape.validate import shown


class Tapped(NamedTuple):
    """One call of a layer, once backward has come to it.

    Attributes:
        input: what the layer was called with.
        grad: the gradient of its pre-activation x ⋆ W + b, of that tensor's shape and dtype.
    """

    input: Tensor
    grad: Tensor


@contextmanager
def tap(
    model: nn.Module, layers: Iterable[str | nn.Module] | None = None
) -> Iterator[Mapping[str, list[Tapped]]]:
    r"""Record each layer's input and the gradient of its pre-activation while the block runs.

    For K-FAC, per-sample gradients and the like, which need the two factors of a weight's gradient:
    with input A and gradient G of a linear layer, Gᵀ A is the weight's gradient and the sum of G
    the bias's. Inside the block a fused layer runs its product and its activation one after the
    other, by the same engine, and a `fusedshape.ShapedChain` runs its layers one by one, so the
    numbers are those of the unfused model, up to rounding. Plain layers are recorded too.

    A call is recorded when its gradient arrives: once with activation checkpoints too, and not at
    all without backward. Calls from other threads are not recorded.

    Args:
        model: with layers in it, fused or torch's own.
        layers: names or modules of the layers to tap; all by default.

    Yields:
        For the name of each layer, its calls, in the order in which their gradients arrive. It may
        be read, and its lists cleared, at any time.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: something named is no layer of the model or has a forward of its own, a layer is
            tapped already, or the model is compiled, scripted or in nn.DataParallel.
        RuntimeError: a tapped layer is called under a torch.func transform, or in a graph that
            torch.compile or torch.export must keep whole; other compiled code runs it eagerly.

    Example:
        >>> from fusedshape import ActSpec, ShapedLinear
        >>> net = nn.Sequential(ShapedLinear(4, 3, spec=ActSpec("tanh")), nn.Linear(3, 2))
        >>> with tap(net) as tapped:
        ...     net(torch.ones(5, 4)).square().sum().backward()
        >>> (call,) = tapped["0"]
        >>> bool(torch.allclose(call.grad.T @ call.input, net[0].weight.grad))
        True
    """
    names = _chosen(model, layers)
    found: dict[str, list[Tapped]] = {name: [] for name in names.values()}
    thread = threading.get_ident()
    done: list[nn.Module] = []
    try:
        for layer, name in names.items():
            done.append(layer)
            vars(layer)["forward"] = functools.partial(_forward, layer, found[name], thread)
        yield found
    finally:
        for layer in done:
            vars(layer).pop("forward", None)


def _chosen(model: nn.Module, layers: Iterable[str | nn.Module] | None) -> dict[nn.Module, str]:
    """The layers to tap, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"tap: model must be an nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        kind = type(module).__name__
        compiled = vars(module).get("_compiled_call_impl") is not None
        if (
            compiled
            or isinstance(module, (torch.jit.ScriptModule, nn.DataParallel))
            or (kind == "OptimizedModule")
        ):
            what = f"compiled ({kind})" if compiled else f"a {kind}"
            raise ValueError(
                f"tap: {path!r} is {what}, which may not run its layers' own forward; tap the "
                "module it was made of"
            )
    modules: dict[str, nn.Module] = dict(model.named_modules())
    names = {module: name for name, module in reversed(modules.items())}
    if layers is None:
        chosen = [m for m in modules.values() if kind_of(m) is not None and not _unknown(m)]
    else:
        if isinstance(layers, (str, nn.Module)):
            layers = [layers]
        if not isinstance(layers, Iterable):
            raise TypeError(f"tap: layers must be modules or their names, got {shown(layers)}")
        chosen = [_layer(modules, names, wanted) for wanted in layers]
    for module in chosen:
        if "forward" in vars(module):
            raise ValueError(
                f"tap: the forward of {names[module]!r} ({type(module).__name__}) is set on the "
                "instance already; leave the tap that is open, or take that forward off"
            )
    return {module: names[module] for module in chosen}


def _layer(modules: Mapping[str, nn.Module], names: Mapping[nn.Module, str], wanted: Any) -> Any:
    module = modules.get(wanted) if isinstance(wanted, str) else wanted
    if not isinstance(module, nn.Module) or module not in names:
        close = difflib.get_close_matches(str(wanted), modules, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        what = repr(wanted) if isinstance(wanted, str) else f"a {type(wanted).__name__}"
        raise ValueError(f"tap: the model has no module {what}{hint}")
    if kind_of(module) is None:
        kind = type(module).__name__
        raise ValueError(f"tap: {names[module]!r} is a {kind}, no linear or convolution layer")
    why = _unknown(module)
    if why:
        raise ValueError(f"tap: {names[module]!r} {why}")
    return module


def _unknown(layer: nn.Module) -> str:
    """Why a layer's pre-activation is not known; empty if it is."""
    kind = kind_of(layer)
    assert kind is not None
    own: Any = kind.shaped if isinstance(layer, FusedLayer) else kind.plain
    if own is not None and type(layer).forward is own.forward:
        return ""
    return (
        f"is a {type(layer).__name__} with a forward of its own, whose pre-activation is not known"
    )


def _forward(layer: Any, calls: list[Tapped], thread: int, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's forward: its product, a node that records, and its activation."""
    if torch.compiler.is_compiling() or transformed():
        raise RuntimeError(
            "tap: a tapped layer was called under torch.compile, torch.export or a torch.func "
            "transform, which the tap does not reach; call the model plainly while it is tapped"
        )
    # Autograd's own threads call a layer again when they recompute a checkpoint.
    ours = threading.get_ident() == thread or torch._C._current_graph_task_id() >= 0
    note = calls.append if ours else _ignore
    (x, *_) = (*args, *kwargs.values())
    if not isinstance(layer, FusedLayer):
        return _watched(type(layer).forward(layer, *args, **kwargs), x, note)
    fused: Any = layer
    z = _watched(fused.pre_activation(x), x, note)
    return ops.shaped_act(z, fused.spec, backend=fused.backend)


def _watched(z: Tensor, x: Tensor, note: Any) -> Tensor:
    if not (z.requires_grad and torch.is_grad_enabled()):
        return z
    watched: Tensor = _Watch.apply(z, x.detach(), note)
    return watched


def _ignore(call: Tapped) -> None:
    """Record nothing: the call is another thread's."""


class _Watch(torch.autograd.Function):
    """The identity, which records the gradient that passes and the input that belongs to it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, note: Any) -> Tensor:
        ctx.note = note
        ctx.save_for_backward(x)
        # Not a view, because the activation after a layer may work in place.
        return torch.ops.aten._unsafe_view(z, z.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.note(Tapped(x, grads[0].detach()))
        return grads[0], None, None
