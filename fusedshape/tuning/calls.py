"""Each call of a fused layer while a model runs, as an engine would be given it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fusedshape.kinds import FusedLayer, kind_of
from fusedshape.nn import ShapedChain, chain_rows
from fusedshape.ops import dispatch
from fusedshape.ops.checks import Geometry, match
from fusedshape.ops.choice import asked_engine
from fusedshape.ops.conv import padded
from fusedshape.ops.layer import Layer
from fusedshape.ops.problem import Direction
from fusedshape.validate import instance

_T = TypeVar("_T")


class Call(NamedTuple):
    """One call of a fused layer while the model runs, with its tensors.

    Attributes:
        path: the module's name in the model.
        x: the input that an engine is given, perhaps without numbers.
        layer: the layer, without its bias.
        engine: the engine that the module asks for; see `fusedshape.ops.choice.asked_engine`.
        directions: what a training step computes: dgrad only where the input wants a gradient.
    """

    path: str
    x: Tensor
    layer: Layer
    engine: str
    directions: tuple[Direction, ...]


class Inputs(NamedTuple):
    """What a model is called with, by position and by name."""

    args: tuple[Any, ...]
    named: dict[str, Any]


def check_ready(verb: str, model: nn.Module) -> None:
    """Raise if a model cannot be run yet.

    Raises:
        TypeError: it is no nn.Module.
        ValueError: a parameter is lazy.
    """
    instance(verb, "model", model, nn.Module)
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(f"{verb}: {lazy[0]!r} is lazy, it has no shape yet; run the model first")


def each_call(model: nn.Module, inputs: Inputs, read: Callable[[Call], _T]) -> list[_T]:
    """Run a model once and `read` each call of a fused layer in it, in order.

    Nothing is computed where the model can do with fake numbers; only shapes are. The calls are
    those of a training step, under `torch.inference_mode` too.

    Raises:
        ValueError: there is no fused layer in the model, or none is called.
    """
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
            shapes = tree_map_only(Tensor, fake.from_tensor, inputs)
            found = _read_calls(model, names, shapes, read)
    # A model whose forward looks at numbers must really run.
    except Exception:
        found = _read_calls(model, names, inputs, read)
    if not found:
        raise ValueError(f"none of the model's {len(names)} fused layers is called by its forward")
    return found


def _read_calls(
    model: nn.Module, names: dict[nn.Module, str], inputs: Inputs, read: Callable[[Call], _T]
) -> list[_T]:
    found: list[_T] = []
    chained = _chained(model)

    def note(module: nn.Module, x: Tensor) -> None:
        found.append(read(_call(names[module], module, x, module in chained)))

    with torch.inference_mode(False), _watched(names, note), torch.enable_grad():
        args, named = tree_map_only(Tensor, _recordable, inputs)
        model(*args, **named)
    return found


def _recordable(x: Tensor) -> Tensor:
    """The input, as a copy where autograd would refuse it."""
    return x.clone() if x.is_inference() else x


@contextmanager
def _watched(
    modules: Iterable[nn.Module], note: Callable[[nn.Module, Tensor], None]
) -> Iterator[None]:
    """Take a note of each call of one of the modules and its input.

    With the hooks on its layers a chain calls them one by one, which computes the same.
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        (x,) = (*args, *named.values())
        note(module, x)

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
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


def _call(path: str, module: Any, x: Tensor, chained: bool) -> Call:
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
    layer = Layer(weight, None, module.spec, geometry, dispatch.choose("auto", x))
    engine = asked_engine(module.engine, module.backend)
    return Call(path, x, layer, engine, tuple(directions))


def _geometry(path: str, module: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Geometry]:
    """The convolution that conv_act hands to an engine, and its input."""
    if x.ndim == weight.ndim - 1:
        x = x.unsqueeze(0)
    moves = module.stride, module.padding, module.dilation, module.groups, module.padding_mode
    return padded(path, x, weight, moves)
