"""trace_wiring: reads the `Wiring` of a model from its modules.

Each module's forward is traced separately with torch.fx, its children as leaves (see
`fusedshape.tracing`), so that nodes keep their qualified names and no example input is needed.
Linear arithmetic is collected as a sum Σ wᵢ·nodeᵢ until something else uses the result.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fusedshape.activations import ACTIVATIONS, TORCH_NAMES, options_of
from fusedshape.faithful import calls, inputs_for, misread
from fusedshape.kinds import FUNCTIONS, LocationNorm, WeightedSum, features, kind_of
from fusedshape.nodes import is_query, operation
from fusedshape.proxies import UntraceableError
from fusedshape.spec import ActSpec, from_torch
from fusedshape.theory.network import Node, Op, Wiring
from fusedshape.torch_ops import (
    ACTIVATION_MODULES,
    ALPHA_DROPOUTS,
    ATTENTION,
    BLOCKS,
    CHANNEL_NORMS,
    CONCATS,
    COPIES,
    DIFFERENCES,
    DROPOUTS,
    LOCATION_NORMS,
    MATMULS,
    MOVES,
    NEW,
    PADS,
    POOLS,
    PRODUCTS,
    QUOTIENTS,
    RESIZES,
    SAME,
    SOFTMAXES,
    SUMS,
    VIEWS,
    WRAPPERS,
    base,
    function_of,
    name_of,
    writes,
)
from fusedshape.tracing import (
    Slot,
    behind_norm,
    is_plain,
    read,
    required,
)
from fusedshape.validate import flag
from fusedshape.windows import overlaps

# A factor on the input of these is a factor on their output; a norm removes it.
_LINEAR = ("affine", "pool", "reshape", "dropout", "norm")
_BY_HAND = "pass depth= or subnet_max= by hand"
_ACTIVATIONS = {*(known.name for known in TORCH_NAMES), *ACTIVATIONS}
_AFFINE = {*FUNCTIONS, *MATMULS, "embedding"}
# The theory's word for functions and modules of torch. Views by functions make no node.
_OPS: dict[str, Op] = {
    **dict.fromkeys(MOVES | PADS | RESIZES | BLOCKS, "reshape"),
    **dict.fromkeys(POOLS, "pool"),
    **dict.fromkeys(DROPOUTS | ALPHA_DROPOUTS, "dropout"),
    **dict.fromkeys(LOCATION_NORMS, "norm"),
}


class _Cell:
    """A piece of memory: its content as Σ weight · node, and where that was computed."""

    def __init__(self, terms: dict[int, float], path: str = "") -> None:
        self.terms = terms
        self.path = path


@dataclass(frozen=True, eq=False)
class _Signal:
    """A tensor that depends on the model's input.

    A view shares the cell of its base, so that an in-place write changes both.

    Attributes:
        cell: the values.
        channels: the number of channels, if known.
        axes: the indices, positive and negative, that name the channel dimension, if known.
    """

    cell: _Cell
    channels: int | None = None
    axes: frozenset[int] = frozenset()


class _Unsized:
    """A value that is independent of the input's content, but unknown before the run."""


_UNSIZED = _Unsized()


def trace_wiring(model: nn.Module, example: Any = None, *, strip_batchnorm: bool = False) -> Wiring:
    r"""Read a model's wiring, which is all that the theory needs to know about its structure.

    It understands the layers, activations, pools and normalisations of torch.nn,
    torch.nn.functional and this library; sums with constant or learnt weights (their present values
    are used); concatenations of channels; and modules that are called more than once. What cannot
    be read (data-dependent control flow, BatchNorm, attention) becomes an "unknown" node. A sum
    whose squared weights do not add up to 1 is kept. In both cases evaluating the wiring raises an
    error that names the place.

    Args:
        model: the model; it is left unchanged. It is read in training mode.
        example: an input, or a tuple of inputs, which is run without gradients. It tells how many
            channels a concatenation joins where the layers before it do not, and serves to compare
            each traced forward with the module. By default the comparison uses small random inputs
            that fit the first layers, if any do.
        strip_batchnorm: read BatchNorm as the identity, as `convert` leaves it with this flag.

    Returns:
        The wiring, which is itself a ``subnet_max``; `Wiring.notes` lists what was assumed.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: no output depends on an input.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
        >>> wiring = trace_wiring(net)
        >>> wiring.depth, [node.op for node in wiring.nodes]
        (2, ['input', 'affine', 'nonlinear', 'affine', 'nonlinear'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"trace_wiring: model must be an nn.Module, got {type(model).__name__}")
    flag("trace_wiring", "strip_batchnorm", strip_batchnorm)
    return _Trace(model, example, strip_batchnorm).wiring()


class _Trace:
    """The nodes found so far."""

    def __init__(self, model: nn.Module, example: Any, strip: bool) -> None:
        self.model = model
        self.strip = strip
        self.nodes: list[Node] = []
        self.notes: dict[str, None] = {}
        self.running: list[nn.Module] = []
        self.seen: set[nn.Module] = set()
        self.opaque: set[nn.Module] = set()
        self.softmax: set[int] = set()
        self.origins: list[int] = []  # for each node, the first node with the same weights
        self.weights: dict[Any, int] = {}
        self.joined = {} if example is None else _joined(model, example)
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
        found = _signals(self.call(self.model, "", tuple(inputs), {}))
        if not found:
            raise ValueError("trace_wiring: no output of the model depends on its input")
        outputs = tuple(dict.fromkeys(self.bare(signal)[0] for signal in found))
        for i in outputs:
            self._leave_out_softmax(i)
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

    # Nodes and signals.

    def append(self, node: Node) -> int:
        """Add a node and return its index."""
        self.nodes.append(node)
        self.origins.append(len(self.origins))
        return len(self.nodes) - 1

    def emit(
        self,
        op: Op,
        taken: Sequence[_Signal],
        path: str,
        *,
        weights: tuple[float, ...] = (),
        spec: ActSpec | None = None,
        note: str = "",
        channels: int | None = None,
        axes: frozenset[int] = frozenset(),
    ) -> _Signal:
        """Add a node and return its value."""
        factor = 1.0
        inputs: tuple[int, ...]
        if op in _LINEAR:
            i, factor = self.bare(taken[0])
            inputs = (i,)
        else:
            inputs = tuple(self.index(signal) for signal in taken)
        i = self.append(Node(op, inputs, weights, path, spec, note))
        terms = {i: 1.0 if op == "norm" else factor}
        return _Signal(_Cell(terms, taken[0].cell.path if taken else ""), channels, axes)

    def like(self, op: Op, signal: _Signal, path: str, **kwargs: Any) -> _Signal:
        """Add a node whose output has its input's channels."""
        return self.emit(op, [signal], path, channels=signal.channels, axes=signal.axes, **kwargs)

    def unknown(self, taken: Sequence[_Signal], path: str, note: str) -> _Signal:
        """Add a node that cannot be read."""
        return self.emit("unknown", taken, path or type(self.model).__name__, note=note)

    def bare(self, signal: _Signal) -> tuple[int, float]:
        """The node that a signal is a multiple of, and the factor."""
        if len(signal.cell.terms) != 1:
            self.index(signal)
        ((i, factor),) = signal.cell.terms.items()
        return i, factor

    def index(self, signal: _Signal) -> int:
        """The node that holds a signal's value; a sum is added for it if there is none."""
        cell = signal.cell
        if list(cell.terms.values()) != [1.0]:
            inputs, weights = tuple(cell.terms), tuple(cell.terms.values())
            node = Node("sum", inputs, weights, cell.path)
            why = self._dependent(inputs)
            if why:
                node = replace(node, op="unknown", weights=(), note=why)
            cell.terms = {self.append(node): 1.0}
        return next(iter(cell.terms))

    def _dependent(self, inputs: tuple[int, ...]) -> str:
        """Why the terms of a sum are not independent of one another; "" if they are.

        Weights of its own make a term independent of the others, so only the nodes after the last
        affine node of each term are compared. Terms are visited from the latest to the earliest: no
        term leads to a node later than itself, which keeps the search short.
        """
        owner: dict[int, int] = {}
        earliest = 0
        for term in sorted(inputs, reverse=True):
            stack, own = [term], set()
            while stack:
                i = stack.pop()
                if i in own or i < earliest:
                    continue
                own.add(i)
                if owner.setdefault(self.origins[i], term) != term:
                    return (
                        "it adds up values that are not independent: more than one comes from "
                        f"{self.nodes[i].path!r} without weights of its own in between; {_BY_HAND}"
                    )
                if self.nodes[i].op != "affine":
                    stack += self.nodes[i].inputs
            earliest = min(owner)
        return ""

    # Modules.

    def call(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The value that a module returns."""
        kind = type(module).__name__
        self.seen.add(module)
        if kind in WRAPPERS:
            inside = getattr(module, WRAPPERS[kind])
            return self.call(inside, _join(path, WRAPPERS[kind]), args, kwargs)
        if module._forward_hooks or module._forward_pre_hooks:
            self.notes[f"{path!r} ({kind}) has forward hooks, which were not read"] = None
        taken = _signals((args, kwargs))
        if not taken:
            return _UNSIZED
        row = behind_norm(module) if self.strip and isinstance(module, _BatchNorm) else None
        if _is_sequential(module):
            row = tuple(name for name, child in module._modules.items() if child is not None)
        if row is not None:
            (value,) = args
            if isinstance(module, _BatchNorm):
                # A new tensor: an in-place write to it leaves the norm's input alone.
                value = replace(value, cell=_Cell(dict(value.cell.terms), value.cell.path))
            for name in row:
                value = self.call(module.get_submodule(name), _join(path, name), (value,), {})
            return value
        known = self._layer(module, path, taken)
        if known is not None:
            self.seen.update(module.modules())
            return known
        if module in self.running:
            return self.unknown(taken, path, f"{kind} calls itself; {_BY_HAND}")
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
                f"constructor, or {_BY_HAND}",
            )
        finally:
            self.running.pop()

    def _layer(self, module: nn.Module, path: str, taken: list[_Signal]) -> _Signal | None:
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
            total = _add(list(zip(taken, module.weights, strict=True)), path)
            self.index(total)
            return total
        if isinstance(module, LocationNorm):
            channels = None if x.channels is None else x.channels + module.added_channels
            return self.emit("norm", [x], path, channels=channels, axes=x.axes)
        return self._stock(module, path, x)

    def _stock(self, module: nn.Module, path: str, x: _Signal) -> _Signal | None:
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
        op = "reshape" if base(name) in VIEWS else _OPS.get(base(name))
        if op is None or (isinstance(module, nn.Fold) and _overlaps(**vars(module))):
            return None
        if op != "reshape" or _keeps_channels(base(name), getattr(module, "padding", ()), x):
            return self.like(op, x, path)
        return self.emit(op, [x], path)

    def _affine(self, x: _Signal, weight: Any, path: str, layer: Any) -> _Signal:
        channels, axes = _channels(layer)
        y = self.emit("affine", [x], path, channels=channels, axes=axes)
        if weight is not None:
            self.origins[-1] = self.weights.setdefault(weight, self.origins[-1])
        return y

    def _activate(self, name: str, options: dict[str, Any], x: _Signal, path: str) -> _Signal:
        spec = from_torch(name, options)
        y = self.like("nonlinear", x, path, spec=spec, note="" if spec else name)
        if name == "prelu":
            self.notes[f"{path!r} learns its negative slope; its present value was read"] = None
        return y

    def _softmax(self, x: _Signal, path: str) -> _Signal:
        y = self.unknown([x], path, f"softmax couples the channels; {_BY_HAND}")
        self.softmax.add(self.index(y))
        return y

    def _in_place(self, old: _Signal, new: _Signal) -> _Signal:
        old.cell.terms, old.cell.path = new.cell.terms, new.cell.path
        return replace(new, cell=old.cell)

    # Forwards.

    def _follow(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        """Trace a module's forward and evaluate the graph on signals."""
        given = _signals((args, kwargs))
        for signal in given:
            self.bare(signal)
        slots = pytree.tree_map(lambda v: Slot() if isinstance(v, _Signal) else v, (args, kwargs))
        reading = read(module, *slots[0], **slots[1])
        if module in self.calls:
            difference = misread(module, reading, slots, self.calls[module])
            if difference:
                raise UntraceableError(
                    f"traced, it gives {difference}, as it takes a decision that a trace does not "
                    "see, for instance by the type of a value in a helper"
                )
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
                for signal in _signals(result):
                    self.bare(signal)
                return result
            elif node.op == "call_module":
                called = reading.modules[node]
                where = _join(path, str(node.target))
                env[node] = self.call(called, where, value_of(node.args), value_of(node.kwargs))
            else:
                args, kwargs = value_of(node.args), value_of(node.kwargs)
                env[node] = self._function(node, args, kwargs, at)
            if len(node.users) > 1 and isinstance(env[node], _Signal):
                self.bare(env[node])
        raise AssertionError("a graph without an output")

    def _function(self, node: fx.Node, args: Any, kwargs: Any, at: str) -> Any:
        """The value of a function or method."""
        taken = _signals((args, kwargs))
        if not taken:
            return _computed(node, args, kwargs)
        if isinstance(node.target, type):
            return _record(node.target, args, kwargs)
        name = operation(node)
        if is_query(node) or name in NEW or name.startswith(("_assert", "size")):
            return _UNSIZED
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if in_place else name
        if node.target is getattr and not isinstance(args[0], _Signal):
            return _part(args[0], name) or self.unknown(taken, at, f"it has no {name} as traced")
        try:
            result = self._computation(name.lstrip("_"), list(args), kwargs, taken, at)
        except Exception as error:  # any error from Python on a structure of symbols
            why = f"{type(error).__name__}: {error}"
            return self.unknown(taken, at, f"{name} failed on what was traced ({why}); {_BY_HAND}")
        if (in_place or kwargs.get("inplace")) and isinstance(result, _Signal):
            return self._in_place(taken[0], result)
        return result

    def _computation(
        self, name: str, args: list[Any], kwargs: dict[str, Any], taken: list[_Signal], at: str
    ) -> Any:
        """The value of a function or method that takes signals."""
        if not args:
            args = [kwargs.get("input", taken[0])]
        x = args[0]
        if name == "getitem" and not isinstance(x, _Signal):
            return _item(*args)
        if name in CONCATS:
            return self._concat(args, kwargs, taken, at)
        if name in SUMS | DIFFERENCES:
            return self._sum(name, args, kwargs, at)
        if name in PRODUCTS | QUOTIENTS | {"neg"}:
            return self._product(name, args, kwargs, taken, at)
        if name in _AFFINE and len(taken) == 1:
            return self._affine_function(name, args, kwargs, x, at)
        if len(taken) > 1 or x is not taken[0]:
            return self.unknown(taken, at, _why_not_function(name))
        return self._of_one(name, args, kwargs, x, at)

    def _of_one(
        self, name: str, args: list[Any], kwargs: dict[str, Any], x: _Signal, at: str
    ) -> Any:
        """The value of a function or method of one signal, its first argument."""
        if name in ("clamp", "clip", "clamp_min") or name in _ACTIVATIONS:
            return self._activate(*_activation(name, args, kwargs), x, at)
        if name == "pow" and args[1] == 2:
            return self._activate("square", {}, x, at)
        if name in SOFTMAXES:
            return self._softmax(x, at)
        if name in VIEWS:
            return self._view(name, args, kwargs, x)
        if name in SAME:
            return x
        if name in COPIES:
            return replace(x, cell=_Cell(dict(x.cell.terms), x.cell.path))
        kind = base(name)
        op = _OPS.get(kind)
        if op is None or (kind == "fold" and _overlaps(*args[1:], **kwargs)):
            return self.unknown([x], at, _why_not_function(name))
        widths = (*args[1:], kwargs.get("pad", ()))[0]
        if op != "reshape" or _keeps_channels(kind, widths, x):
            return self.like(op, x, at)
        return self.emit(op, [x], at)

    def _view(self, name: str, args: list[Any], kwargs: dict[str, Any], x: _Signal) -> Any:
        """A view of a signal, or several."""
        if name == "chunk":
            return self._chunks(x, *args[1:], **kwargs)
        if name in ("split", "split_with_sizes"):
            parts = self._split(x, *args[1:], **kwargs)
            if parts:
                return parts
        if name == "getitem" and _cuts_locations(args[1], x):
            return x
        return replace(x, channels=None, axes=frozenset())

    def _chunks(self, x: _Signal, chunks: Any, dim: Any = 0) -> Any:
        """The chunks of a tensor; their channels are known if they are equal."""
        if not isinstance(chunks, int):
            return replace(x, channels=None, axes=frozenset())
        whole = dim in x.axes and x.channels is not None and x.channels % chunks == 0
        channels = x.channels // chunks if whole and x.channels else None
        if dim not in x.axes and x.axes:
            channels = x.channels
        return [replace(x, channels=channels) for _ in range(chunks)]

    def _split(
        self, x: _Signal, size: Any = None, dim: Any = 0, **kwargs: Any
    ) -> list[_Signal] | None:
        """The parts of a tensor that is split along its channels; None if sizes are not known."""
        size = kwargs.get("split_size_or_sections", kwargs.get("split_size", size))
        if x.channels is None or dim not in x.axes:
            return None
        if isinstance(size, int):
            size = [min(size, x.channels - at) for at in range(0, x.channels, size)]
        if not isinstance(size, (list, tuple)) or not all(isinstance(n, int) for n in size):
            return None
        return [replace(x, channels=n) for n in size]

    def _affine_function(
        self, name: str, args: list[Any], kwargs: dict[str, Any], x: Any, at: str
    ) -> _Signal:
        given = [*args, *kwargs.values()]
        weight = next((v for v in given if isinstance(v, Tensor) and v.ndim > 1), None)
        signal = next(v for v in pytree.tree_leaves(given) if isinstance(v, _Signal))
        if name != "einsum" and (weight is None or (signal is not x and name not in MATMULS)):
            return self.unknown(
                [signal], at, f"{name} takes weights that are not known; {_BY_HAND}"
            )
        kind = FUNCTIONS.get(name)
        y = self._affine(signal, weight, at, None)
        if kind is None or kind.transposed or weight is None:
            return y
        return replace(y, channels=weight.shape[0], axes=kind.channel_dims)

    def _sum(self, name: str, args: list[Any], kwargs: dict[str, Any], at: str) -> Any:
        a, b = (*args, kwargs.get("other"))[:2]
        alpha = kwargs.get("alpha", 1)
        sign = -1.0 if name in DIFFERENCES else 1.0
        weights = (sign, 1.0) if name == "rsub" else (1.0, sign)
        if not isinstance(alpha, (int, float)):
            return self.unknown(_signals((a, b)), at, f"alpha={alpha} is not known; {_BY_HAND}")
        terms = []
        for value, weight in zip((a, b), (weights[0], weights[1] * alpha), strict=True):
            if isinstance(value, _Signal):
                terms.append((value, weight))
            elif not isinstance(value, (int, float)) or value != 0:
                self.notes[
                    f"{at!r} adds what does not depend on the input; read as 0, like biases"
                ] = None
        return _add(terms, at)

    def _product(
        self, name: str, args: list[Any], kwargs: dict[str, Any], taken: list[_Signal], at: str
    ) -> _Signal:
        divides = name in QUOTIENTS
        if len(taken) == 2:
            swish = None if divides else self._swish(taken)
            if swish is not None:
                return self._activate("silu", {}, swish, at)
            return self.unknown(
                taken,
                at,
                f"it {'divides' if divides else 'multiplies'} values that all depend on the input; "
                f"{_BY_HAND}",
            )
        others = [v for v in (*args, *kwargs.values()) if not isinstance(v, (_Signal, str))]
        factor = -1.0 if name == "neg" else self._factor(others[0], at)
        if factor is None or (divides and (args[0] is not taken[0] or factor == 0)):
            return self.unknown(taken, at, f"its factor is not known before the run; {_BY_HAND}")
        return _add([(taken[0], 1 / factor if divides else factor)], at)

    def _factor(self, value: Any, at: str) -> float | None:
        """A constant factor; for a tensor with several elements, their root mean square."""
        if isinstance(value, (int, float)):
            return float(value)
        if not isinstance(value, Tensor) or value.is_meta or not value.numel():
            return None
        numbers = value.detach().double()
        factor = numbers.item() if numbers.numel() == 1 else numbers.square().mean().sqrt().item()
        if value.requires_grad:
            self.notes[f"{at!r} has a learnt weight; its present value, {factor:.6g}, was read"] = (
                None
            )
        return factor

    def _swish(self, taken: list[_Signal]) -> _Signal | None:
        """Return x if the product is x · sigmoid(x), else None."""
        for x, gate in (taken, taken[::-1]):
            if (gate.channels, gate.axes) != (x.channels, x.axes):
                continue  # one is a part of the other
            node = self.nodes[self.index(gate)]
            if node.spec == ActSpec("sigmoid") and node.inputs == (self.index(x),):
                return x
        return None

    def _concat(
        self, args: list[Any], kwargs: dict[str, Any], taken: list[_Signal], at: str
    ) -> _Signal:
        parts = kwargs.get("tensors", args[0])
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        seen = self.joined.get(self.running[-1] if self.running else self.model)
        sizes = seen.pop(0) if seen else None
        if len(taken) < len(parts):
            return self.unknown(
                taken, at, f"it joins what does not depend on the input; {_BY_HAND}"
            )
        axes = frozenset.intersection(*(s.axes for s in taken)) or taken[0].axes
        if dim not in axes and (dim == 0 or (axes and axes != {-1})):
            return self.unknown(
                taken, at, f"it joins along dimension {dim}, not along that of channels; {_BY_HAND}"
            )
        if dim not in axes:
            self.notes[f"{at!r} joins along dimension {dim}, taken for that of channels"] = None
        known = [s.channels for s in taken if s.channels is not None]
        counts = sizes or (known if len(known) == len(taken) else [])
        return self.emit(
            "concat",
            taken,
            at,
            weights=tuple(map(float, counts)),
            channels=sum(counts) if counts else None,
            axes=axes or frozenset((dim,)),
        )


def _add(terms: list[tuple[_Signal, float]], path: str) -> _Signal:
    """Σ weight · signal; its node is added when it is used."""
    total: dict[int, float] = defaultdict(float)
    for signal, weight in terms:
        for i, w in signal.cell.terms.items():
            total[i] += weight * w
    known = next((s for s, _ in terms if s.channels is not None), terms[0][0])
    return _Signal(_Cell(dict(total), path), known.channels, known.axes)


def _signals(tree: Any) -> list[_Signal]:
    """All signals in a structure, in order."""
    if isinstance(tree, _Signal):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [signal for item in tree for signal in _signals(item)]


def _record(cls: Any, args: Any, kwargs: Any) -> Any:
    """An object that a forward constructs: a named tuple, or a dict for other classes."""
    if hasattr(cls, "_fields"):
        return cls(*args, **kwargs)
    if len(args) == 1 and isinstance(args[0], dict) and not kwargs:
        return args[0]
    return dict(kwargs) if kwargs else args


def _item(whole: Any, key: Any) -> Any:
    """whole[key]; for a record, an integer or slice selects among its values in order."""
    if isinstance(whole, dict) and isinstance(key, (int, slice)) and key not in whole:
        return tuple(value for value in whole.values() if value is not None)[key]
    return operator.getitem(whole, key)


def _part(whole: Any, name: str) -> Any:
    """An attribute of a record."""
    return whole.get(name) if isinstance(whole, dict) else getattr(whole, name, None)


def _computed(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Compute a function of constants; _UNSIZED if that is not possible."""
    in_place = writes(name_of(node.target))
    if in_place or any(isinstance(leaf, _Unsized) for leaf in pytree.tree_leaves((args, kwargs))):
        return _UNSIZED
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
    except Exception:  # any error means that the value is unknown
        return _UNSIZED


def _activation(name: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and options of the activation that a call computes."""
    if name.startswith("cl"):
        low, high = (*args[1:], None, None)[:2]
        low, high = kwargs.get("min", low), kwargs.get("max", high)
        return ("relu" if (low, high) == (0, None) else "hardtanh"), {}
    options = options_of(name)
    given = dict(zip(options, args[1:], strict=False))
    return name, {**options, **given, **{k: v for k, v in kwargs.items() if k in options}}


def _channels(layer: Any) -> tuple[int | None, frozenset[int]]:
    """The number of a layer's output channels, and the indices that name their dimension."""
    kind = kind_of(layer)
    if kind is not None:
        return features(layer)[1], kind.channel_dims
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, frozenset((-1,))
    return None, frozenset()


def _keeps_channels(name: str, padding: Any, x: _Signal) -> bool:
    """Whether resizing or padding leaves the channels of a tensor as they are."""
    if name in RESIZES:
        return True
    pads = name in PADS or name.endswith("_pad")
    padded = len(padding) // 2 if isinstance(padding, (tuple, list)) else 0
    return pads and 0 < padded < min((-a for a in x.axes if a < 0), default=0)


def _overlaps(
    output_size: Any = None,
    kernel_size: Any = 1,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
    **others: Any,
) -> bool:
    """Whether torch.nn.functional.fold, with these arguments, adds up blocks that overlap."""
    pairs = (v if isinstance(v, tuple) else (v, v) for v in (kernel_size, stride, dilation))
    return overlaps(*pairs)


def _cuts_locations(index: Any, x: _Signal) -> bool:
    """Whether x[index] keeps all of x's channels in their dimension."""
    if not isinstance(index, tuple) or not all(isinstance(i, slice) for i in index):
        return False
    return 1 in x.axes and index[1:2] in ((), (slice(None),))


def _is_sequential(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other."""
    return isinstance(module, nn.Sequential) and (
        type(module).forward is nn.Sequential.forward or is_plain(module)
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


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
        return f"{kind} adds up values of blocks that overlap; {_BY_HAND}"
    if "Attention" in kind or "Transformer" in kind:
        return (
            f"{kind} holds attention, which mixes locations in a way that depends on the data; "
            f"{_BY_HAND}"
        )
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return f"{kind} is recurrent, a wiring has no cycles; {_BY_HAND}"
    return f"{kind} is not understood; {_BY_HAND}"


def _why_not_function(name: str) -> str:
    """Why a function of torch cannot be read."""
    if name == "fold":
        return f"fold adds up values of blocks that overlap; {_BY_HAND}"
    if name in CHANNEL_NORMS:
        return (
            f"{name} undoes what shaped activations set up; build the model without, or use "
            "F.layer_norm"
        )
    if name in ATTENTION | {"bmm", "matmul"}:
        return (
            f"{name} of values that all depend on the input is attention or the like, which mixes "
            f"locations in a way that depends on the data; {_BY_HAND}"
        )
    return f"{name} is not understood here; {_BY_HAND}"


def _joined(model: nn.Module, example: Any) -> dict[nn.Module, list[list[int]]]:
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
