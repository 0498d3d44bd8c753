"""The fused layers of a model, and what each is asked to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedshape.kinds import FusedLayer, kind_of
from fusedshape.nn import ShapedChain, chain_rows
from fusedshape.ops import dispatch
from fusedshape.ops.checks import Geometry, match
from fusedshape.ops.conv import padded
from fusedshape.ops.layer import Layer
from fusedshape.ops.problem import Direction, Problem, problem_of
from fusedshape.validate import instance


class LayerCall(NamedTuple):
    """One call of a fused layer.

    Attributes:
        path: the module's name in the model.
        problem: the layer and its input.
        directions: what a training step computes: dgrad only where the input wants a gradient.
    """

    path: str
    problem: Problem
    directions: tuple[Direction, ...]


def fused_layers(model: nn.Module, *inputs: Any) -> list[LayerCall]:
    """Run a model once and say what its fused layers were asked for, in the order of the calls.

    Nothing is computed where the model can do with fake numbers; only shapes are.

    Args:
        model: with ShapedConv1d/2d/3d or ShapedLinear in it, as `fusedshape.convert` leaves them.
        inputs: what the model is called with.

    Returns:
        A layer for each call of one.

    Raises:
        ValueError: there is no fused layer in the model, or none is called.

    Example:
        >>> from fusedshape import ActSpec, ShapedLinear
        >>> model = nn.Sequential(ShapedLinear(8, 4, spec=ActSpec("tanh")))
        >>> [(layer.path, layer.directions) for layer in fused_layers(model, torch.zeros(2, 8))]
        [('0', ('fprop', 'wgrad'))]
    """
    instance("fused_layers", "model", model, nn.Module)
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, FusedLayer)
    }
    if not names:
        raise ValueError(
            "the model has no fused layers; fusedshape.convert(model, ...) makes them, or build it "
            "of fusedshape.nn.ShapedConv2d and the like"
        )
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            copies = [fake.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
            found = _run(model, names, copies)
    # A model that looks at its numbers needs some.
    except Exception:
        found = _run(model, names, inputs)
    if not found:
        raise ValueError(f"none of the model's {len(names)} fused layers is called by its forward")
    return found


def _run(model: nn.Module, names: dict[nn.Module, str], inputs: Any) -> list[LayerCall]:
    found: list[LayerCall] = []
    chained = _chained(model)
    with _watched(names, found, chained), torch.enable_grad():
        model(*inputs)
    return found


@contextmanager
def _watched(
    names: dict[nn.Module, str], found: list[LayerCall], chained: set[nn.Module]
) -> Iterator[None]:
    """Take notes of calls. Hooks part chains into their layers, which compute the same."""

    def note(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        (x,) = (*args, *named.values())
        found.append(_layer(names[module], module, x, module in chained))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _chained(model: nn.Module) -> set[nn.Module]:
    """Layers whose dgrad goes on through the layer before."""
    found = set()
    for module in model.modules():
        if isinstance(module, ShapedChain):
            for row in chain_rows(module._modules):
                nodes = -(-len(row) // (module.max_length or len(row)))
                firsts = {i * len(row) // nodes for i in range(nodes)}
                found |= {module.get_submodule(row[i]) for i in range(len(row)) if i not in firsts}
    return found


def _layer(path: str, module: Any, x: Tensor, chained: bool) -> LayerCall:
    needs = x.requires_grad
    x, weight = match(path, x.detach(), module.weight.detach())
    geometry: Geometry | None = None
    kind = kind_of(module)
    if kind is not None and kind.dimensions:
        x, geometry = _geometry(path, module, x, weight)
    directions: list[Direction] = ["fprop"]
    if needs:
        directions.append("dgrad_act" if chained else "dgrad")
    if module.weight.requires_grad:
        directions.append("wgrad")
    kernels = dispatch.choose("auto", x)
    layer = Layer(weight, None, module.spec, geometry, kernels)
    return LayerCall(path, problem_of(x, layer), tuple(directions))


def _geometry(path: str, module: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Geometry]:
    """The convolution that conv_act hands to an engine, and its input."""
    if x.ndim == weight.ndim - 1:
        x = x.unsqueeze(0)
    sizes = module.stride, module.padding, module.dilation, module.groups, module.padding_mode
    return padded(path, x, weight, *sizes)
