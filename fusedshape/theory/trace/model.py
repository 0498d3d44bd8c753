"""Reads a whole model: its modules, and forwards that call them: `Trace`."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fusedshape.activations import options_of
from fusedshape.faithful import calls, inputs_for, leaving_no_trace, misread, reading_of_call
from fusedshape.kinds import LocationNorm, WeightedSum, kind_of
from fusedshape.nodes import is_foreign
from fusedshape.proxies import UntraceableError
from fusedshape.spec import ActSpec
from fusedshape.theory.network import Wiring
from fusedshape.theory.trace.functions import Functions
from fusedshape.theory.trace.signals import (
    BY_HAND,
    OPS,
    UNSIZED,
    Cell,
    Signal,
    add,
    folds_overlapping,
    join,
    keeps_channels,
    signals_in,
)
from fusedshape.torch_ops import (
    ACTIVATION_MODULES,
    CHANNEL_NORMS,
    CONCATS,
    SOFTMAXES,
    VIEWS,
    WRAPPERS,
    base,
    function_of,
    name_of,
)
from fusedshape.tracing import Reading, Slot, behind_norm, is_plain, read, required, ways_of


class Trace(Functions):
    """The nodes found so far, with the modules that they came from."""

    def __init__(self, model: nn.Module, example: Any, strip: bool) -> None:
        super().__init__(model)
        self.strip = strip
        self.seen: set[nn.Module] = set()
        self.opaque: set[nn.Module] = set()
        self.by_example: list[nn.Module] = []
        self.joined: dict[nn.Module, list[list[int]]] = {}
        if example is not None:
            self.joined = leaving_no_trace(model, lambda: joined_sizes(model, example))
        self.example = example

    @functools.cached_property
    def calls(self) -> dict[nn.Module, tuple[Any, Any]]:
        """The arguments of one call of each module, for comparing the reading with the module."""
        args = inputs_for(self.model, self.example)
        return {} if args is None else calls(self.model, self.model.modules(), args)

    def wiring(self) -> Wiring:
        """Read the whole model."""
        arguments = required(self.model)
        inputs = [self.emit("input", [], "" if len(arguments) == 1 else name) for name in arguments]
        found = signals_in(self.call(self.model, "", tuple(inputs), {}))
        if not found:
            raise ValueError("trace_wiring: no output of the model depends on its input")
        outputs = tuple(dict.fromkeys(self.bare(signal)[0] for signal in found))
        for i in outputs:
            self._leave_out_softmax(i)
        self.note_products()
        if self.by_example:
            kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in self.by_example))
            self.notes[
                f"{len(self.by_example)} forward(s) that take decisions by their inputs' shapes or "
                f"types were read as they run on the example ({kinds})"
            ] = None
        self._note_uncalled()
        return Wiring(tuple(self.nodes), outputs, tuple(self.notes))

    def _leave_out_softmax(self, i: int) -> None:
        while self.nodes[i].op in ("reshape", "pool", "dropout"):
            (i,) = self.nodes[i].inputs
        if i in self.softmax:
            self.nodes[i] = replace(self.nodes[i], op="reshape", note="a softmax at the output")

    def _note_uncalled(self) -> None:
        called = self.seen | self.opaque
        for path, module in self.model.named_modules():
            own = next(module.parameters(recurse=False), None) is not None
            if (own or type(module) in ACTIVATION_MODULES) and module not in called:
                self.notes[f"{path!r} ({type(module).__name__}) is never called"] = None

    def call(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The value that a module returns."""
        kind = type(module).__name__
        self.seen.add(module)
        if kind in WRAPPERS:
            inside = getattr(module, WRAPPERS[kind])
            return self.call(inside, join(path, WRAPPERS[kind]), args, kwargs)
        if module._forward_hooks or module._forward_pre_hooks:
            self.notes[f"{path!r} ({kind}) has forward hooks, which were not read"] = None
        taken = signals_in((args, kwargs))
        if not taken:
            return UNSIZED
        row = behind_norm(module) if self.strip and isinstance(module, _BatchNorm) else None
        if _is_sequential(module):
            row = tuple(name for name, child in module._modules.items() if child is not None)
        if row is not None:
            (value,) = args
            if isinstance(module, _BatchNorm):
                # A new tensor: an in-place write to it leaves the norm's input alone.
                value = replace(value, cell=Cell(dict(value.cell.terms), value.cell.path))
            for name in row:
                value = self.call(module.get_submodule(name), join(path, name), (value,), {})
            return value
        known = self._layer(module, path, taken)
        if known is not None:
            self.seen.update(module.modules())
            return known
        if module in self.running:
            return self.unknown(taken, path, f"{kind} calls itself; {BY_HAND}")
        if is_plain(module):
            self.opaque.update(module.modules())
            return self.unknown(taken, path, _why_not(module))
        self.running.append(module)
        try:
            return self._follow(module, path, args, kwargs)
        except UntraceableError as error:
            self.opaque.update(module.modules())
            return self.unknown(
                taken,
                path,
                f"the forward of {kind} cannot be followed: {error}; make that a decision of the "
                f"constructor, or {BY_HAND}",
            )
        finally:
            self.running.pop()

    def _layer(self, module: nn.Module, path: str, taken: list[Signal]) -> Signal | None:
        """The value of a layer or another module that is known by its class; None for others."""
        x = taken[0]
        spec = getattr(module, "spec", None)
        spec = spec if isinstance(spec, ActSpec) else None
        if not is_plain(module):
            return None
        weighs = kind_of(module) is not None or isinstance(module, nn.Embedding)
        if spec is not None or weighs:
            y = x
            if weighs:
                weight = module._parameters.get("weight")
                y = self._affine(x, module if weight is None else weight, path, module)
            return y if spec is None else self.like("nonlinear", y, path, spec=spec)
        if isinstance(module, WeightedSum):
            total = add(list(zip(taken, module.weights, strict=True)), path)
            self.index(total)
            return total
        if isinstance(module, LocationNorm):
            channels = None if x.channels is None else x.channels + module.added_channels
            return self.emit("norm", [x], path, channels=channels, axes=x.axes)
        return self._stock(module, path, x)

    def _stock(self, module: nn.Module, path: str, x: Signal) -> Signal | None:
        """The value of one of torch's modules without weights; None for those not understood."""
        name = function_of(module)
        if name == "identity":
            return x
        if name in ACTIVATION_MODULES.values():
            options = {k: getattr(module, k, v) for k, v in options_of(name).items()}
            y = self._activate(name, options, x, path)
            return self._in_place(x, y) if getattr(module, "inplace", False) else y
        if name in SOFTMAXES:
            return self._softmax(x, path)
        op = "reshape" if base(name) in VIEWS else OPS.get(base(name))
        if op is None or (isinstance(module, nn.Fold) and folds_overlapping(**vars(module))):
            return None
        if op != "reshape" or keeps_channels(base(name), getattr(module, "padding", ()), x):
            return self.like(op, x, path)
        return self.emit(op, [x], path)

    def _read(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Reading, list[Any]]:
        """Read a forward, and what its placeholders stand for: for any call, else for this one."""
        given = signals_in((args, kwargs))
        call = self.calls.get(module)
        recorded = None if call is None else _as_in(call, (args, kwargs))
        try:
            reading = self._symbolic(module, args, kwargs, call)
        except UntraceableError as error:
            found = self._recorded(module, call, recorded)
            if found is None:
                raise error
            return found
        if any(is_foreign(node) for node in reading.graph.nodes):
            return self._recorded(module, call, recorded) or (reading, given)
        return reading, given

    def _symbolic(self, module: nn.Module, args: Any, kwargs: Any, call: Any) -> Reading:
        """Read a forward as it is for any values of its tensors."""
        slots = pytree.tree_map(lambda v: Slot() if isinstance(v, Signal) else v, (args, kwargs))
        reading = read(module, *slots[0], **slots[1])
        difference = "" if call is None else misread(module, reading, slots, call)
        if difference:
            raise UntraceableError(
                f"traced, it gives {difference}, as it takes a decision that a trace does not "
                "see, for instance by the type of a value in a helper"
            )
        return reading

    def _recorded(
        self, module: nn.Module, call: Any, given: list[Any] | None
    ) -> tuple[Reading, list[Any]] | None:
        """Read a recorded call of a forward; None if there is none like the present one."""
        if given is None:
            return None
        try:
            reading = reading_of_call(module, call)
        except UntraceableError:
            return None
        self.by_example.append(module)
        return reading, given

    def _follow(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        """Trace a module's forward and evaluate the graph on signals."""
        for signal in signals_in((args, kwargs)):
            self.bare(signal)
        reading, given = self._read(module, args, kwargs)
        queue = iter(given)
        env: dict[fx.Node, Any] = {}

        def value_of(tree: Any) -> Any:
            return fx.node.map_arg(tree, lambda node: env[node])

        for node in reading.graph.nodes:
            at = f"{path}:{node.name}"
            if node.op == "placeholder":
                env[node] = next(queue)
            elif node.op == "get_attr":
                env[node] = reading.constants[str(node.target)]
            elif node.op == "output":
                result = value_of(node.args[0])
                for signal in signals_in(result):
                    self.bare(signal)
                return result
            elif node.op == "call_module":
                called = reading.modules[node]
                where = join(path, str(node.target))
                env[node] = self.call(called, where, value_of(node.args), value_of(node.kwargs))
            else:
                args, kwargs = value_of(node.args), value_of(node.kwargs)
                env[node] = self.function(node, args, kwargs, at)
            if len(node.users) > 1 and isinstance(env[node], Signal):
                self.bare(env[node])
        raise AssertionError("a graph without an output")


def _as_in(call: Any, given: Any) -> list[Any] | None:
    """What stands in a call's arguments where a recorded call has its tensors.

    None if some signals stand elsewhere, so that the two calls are not alike.
    """
    values = [_at(given, way) for way in ways_of(call)]
    found = [id(value) for value in values if isinstance(value, Signal)]
    return values if all(id(signal) in found for signal in signals_in(given)) else None


def _at(value: Any, way: tuple[Any, ...]) -> Any:
    """What stands at the end of a way; UNSIZED if there is no such way."""
    for key in way:
        if isinstance(value, Signal):
            return value
        try:
            value = value[key]
        except (TypeError, LookupError):
            return UNSIZED
    return value if isinstance(value, (Signal, torch.Tensor)) else UNSIZED


def _is_sequential(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other."""
    return isinstance(module, nn.Sequential) and (
        type(module).forward is nn.Sequential.forward or is_plain(module)
    )


def _why_not(module: nn.Module) -> str:
    """Why a module of torch cannot be read."""
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        return f"{kind} has no forward; take the module that calls what is in it"
    if isinstance(module, _BatchNorm):
        return (
            f"{kind} normalises over the batch, which undoes what shaped activations set up; build "
            "the model without, or pass strip_batchnorm=True"
        )
    if base(function_of(module)) in CHANNEL_NORMS or isinstance(module, nn.LocalResponseNorm):
        return (
            f"{kind} normalises over locations, which undoes what shaped activations set up; "
            "replace it by nn.Identity() or nn.LayerNorm"
        )
    if isinstance(module, nn.Fold):
        return f"{kind} adds up values of blocks that overlap; {BY_HAND}"
    if "Attention" in kind or "Transformer" in kind:
        return (
            f"{kind} holds attention, which mixes locations in a way that depends on the data; "
            f"{BY_HAND}"
        )
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return f"{kind} is recurrent, a wiring has no cycles; {BY_HAND}"
    return f"{kind} is not understood; {BY_HAND}"


def joined_sizes(model: nn.Module, example: Any) -> dict[nn.Module, list[list[int]]]:
    """Run a model and record the sizes that each concatenation joins, by module."""
    found: dict[nn.Module, list[list[int]]] = defaultdict(list)
    running: list[nn.Module] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if name_of(func) in CONCATS:
                parts = kwargs.get("tensors", args[0] if args else ())
                dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
                found[running[-1]].append([part.shape[dim] for part in parts])
            return func(*args, **kwargs)

    modes = {module: module.training for module in model.modules()}
    hooks = [m.register_forward_pre_hook(lambda m, _: running.append(m)) for m in modes]
    hooks += [m.register_forward_hook(lambda m, *_: void(running.pop())) for m in modes]
    try:
        model.eval()
        with torch.no_grad(), Recorder():
            model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def void(_: object) -> None:
    """Return None, for hooks whose result would otherwise replace the output."""
