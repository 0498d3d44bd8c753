"""What torch's functions and methods do to the signals of a wiring: `Functions`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fusedshape.activations import ACTIVATIONS, TORCH_NAMES, options_of
from fusedshape.kinds import FUNCTIONS
from fusedshape.nodes import is_query, operation
from fusedshape.spec import ActSpec
from fusedshape.theory.maps import q_map
from fusedshape.theory.trace.nodes import Nodes
from fusedshape.theory.trace.signals import (
    BY_HAND,
    OPS,
    UNSIZED,
    Cell,
    Signal,
    Unsized,
    add,
    cuts_locations,
    folds_overlapping,
    item,
    keeps_channels,
    part,
    record,
    signals_in,
)
from fusedshape.torch_ops import (
    ATTENTION,
    CHANNEL_NORMS,
    CONCATS,
    COPIES,
    DIFFERENCES,
    LIKE_ANOTHER,
    MATMULS,
    NEW,
    PRODUCTS,
    QUOTIENTS,
    SAME,
    SOFTMAXES,
    SUMS,
    VIEWS,
    base,
    name_of,
    writes,
)

_ACTIVATIONS = {*(known.name for known in TORCH_NAMES), *ACTIVATIONS}
# E[clip(z/6 + 1/2, 0, 1)²] is 1/4 + 1/36 but for the tails beyond |z| = 3.
_HARD_GATE = 0.2777
_AFFINE = {*FUNCTIONS, *MATMULS, "embedding"}


class Functions(Nodes):
    """The nodes found so far, and those that functions add to them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.running: list[nn.Module] = []  # the modules whose forwards are being read
        self.joined: dict[nn.Module, list[list[int]]] = {}

    def function(self, node: fx.Node, args: Any, kwargs: Any, at: str) -> Any:
        """The value of a function or method."""
        taken = signals_in((args, kwargs))
        if not taken:
            return _computed(node, args, kwargs)
        if isinstance(node.target, type):
            return record(node.target, args, kwargs)
        name = operation(node)
        if is_query(node) or name in NEW or name.startswith(("_assert", "size")):
            return UNSIZED
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if in_place else name
        if node.target is getattr and not isinstance(args[0], Signal):
            return part(args[0], name) or self.unknown(taken, at, f"it has no {name} as traced")
        try:
            result = self._computation(name.lstrip("_"), list(args), kwargs, taken, at)
        except Exception as error:  # any error from Python on a structure of symbols
            why = f"{type(error).__name__}: {error}"
            return self.unknown(taken, at, f"{name} failed on what was traced ({why}); {BY_HAND}")
        if (in_place or kwargs.get("inplace")) and isinstance(result, Signal):
            return self._in_place(taken[0], result)
        return result

    def _computation(
        self, name: str, args: list[Any], kwargs: dict[str, Any], taken: list[Signal], at: str
    ) -> Any:
        """The value of a function or method that takes signals."""
        if not args:
            args = [kwargs.get("input", taken[0])]
        x = args[0]
        if name == "getitem" and not isinstance(x, Signal):
            return item(*args)
        if name in CONCATS:
            return self._concat(args, kwargs, taken, at)
        if name in SUMS | DIFFERENCES:
            return self._sum(name, args, kwargs, at)
        if name in PRODUCTS | QUOTIENTS | {"neg"}:
            return self._product(name, args, kwargs, taken, at)
        attended = self._attention(name, args, kwargs, taken, at)
        if attended is not None:
            return attended
        if name in _AFFINE and len(taken) == 1:
            return self._affine_function(name, args, kwargs, x, at)
        if name in LIKE_ANOTHER and x is taken[0]:
            return self._of_one(name, args, kwargs, x, at)
        if len(taken) > 1 or x is not taken[0]:
            return self.unknown(taken, at, _why_not_function(name))
        return self._of_one(name, args, kwargs, x, at)

    def _of_one(
        self, name: str, args: list[Any], kwargs: dict[str, Any], x: Signal, at: str
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
            return replace(x, cell=Cell(dict(x.cell.terms), x.cell.path))
        kind = base(name)
        op = OPS.get(kind)
        if op is None or (kind == "fold" and folds_overlapping(*args[1:], **kwargs)):
            return self.unknown([x], at, _why_not_function(name))
        widths = (*args[1:], kwargs.get("pad", ()))[0]
        if op != "reshape" or keeps_channels(kind, widths, x):
            return self.like(op, x, at)
        return self.emit(op, [x], at)

    def _view(self, name: str, args: list[Any], kwargs: dict[str, Any], x: Signal) -> Any:
        """A view of a signal, or several."""
        if name == "chunk":
            return self._chunks(x, *args[1:], **kwargs)
        if name in ("split", "split_with_sizes"):
            parts = self._split(x, *args[1:], **kwargs)
            if parts:
                return parts
        if name == "getitem" and cuts_locations(args[1], x):
            return x
        return replace(x, channels=None, axes=frozenset())

    def _chunks(self, x: Signal, chunks: Any, dim: Any = 0) -> Any:
        """The chunks of a tensor; their channels are known if they are equal."""
        if not isinstance(chunks, int):
            return replace(x, channels=None, axes=frozenset())
        whole = dim in x.axes and x.channels is not None and x.channels % chunks == 0
        channels = x.channels // chunks if whole and x.channels else None
        if dim not in x.axes and x.axes:
            channels = x.channels
        return [replace(x, channels=channels) for _ in range(chunks)]

    def _split(
        self, x: Signal, size: Any = None, dim: Any = 0, **kwargs: Any
    ) -> list[Signal] | None:
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
    ) -> Signal:
        given = [*args, *kwargs.values()]
        weight = next((v for v in given if isinstance(v, Tensor) and v.ndim > 1), None)
        signal = next(v for v in pytree.tree_leaves(given) if isinstance(v, Signal))
        if name != "einsum" and (weight is None or (signal is not x and name not in MATMULS)):
            return self.unknown([signal], at, f"{name} takes weights that are not known; {BY_HAND}")
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
            return self.unknown(signals_in((a, b)), at, f"alpha={alpha} is not known; {BY_HAND}")
        terms = []
        for value, weight in zip((a, b), (weights[0], weights[1] * alpha), strict=True):
            if isinstance(value, Signal):
                terms.append((value, weight))
            elif not isinstance(value, (int, float)) or value != 0:
                self.notes[
                    f"{at!r} adds what does not depend on the input; read as 0, like biases"
                ] = None
        return add(terms, at)

    def _product(
        self, name: str, args: list[Any], kwargs: dict[str, Any], taken: list[Signal], at: str
    ) -> Signal:
        divides = name in QUOTIENTS
        if len(taken) == 2:
            swish = None if divides else self._swish(taken)
            if swish is not None:
                return self._activate("silu", {}, swish, at)
            gate = None if divides else self._gate(taken)
            if gate is not None:
                return self.gated(*gate, at)
            return self.unknown(
                taken,
                at,
                f"it {'divides' if divides else 'multiplies'} values that all depend on the input; "
                f"{BY_HAND}",
            )
        others = [v for v in (*args, *kwargs.values()) if not isinstance(v, (Signal, str))]
        factor = -1.0 if name == "neg" else self._factor(others[0], at)
        if factor is None or (divides and (args[0] is not taken[0] or factor == 0)):
            return self.unknown(taken, at, f"its factor is not known before the run; {BY_HAND}")
        return add([(taken[0], 1 / factor if divides else factor)], at)

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

    def _swish(self, taken: list[Signal]) -> Signal | None:
        """Return x if the product is x · sigmoid(x), else None."""
        for x, gate in (taken, taken[::-1]):
            if (gate.channels, gate.axes) != (x.channels, x.axes):
                continue  # one is a part of the other
            node = self.nodes[self.index(gate)]
            if node.spec == ActSpec("sigmoid") and node.inputs == (self.index(x),):
                return x
        return None

    def _gate(self, taken: list[Signal]) -> tuple[Signal, float] | None:
        """The value that a product lets through, and the mean square of the gate; None if none."""
        for x, gate in (taken, taken[::-1]):
            i = self.index(gate)
            while self.nodes[i].op in ("reshape", "pool", "dropout"):
                (i,) = self.nodes[i].inputs
            node = self.nodes[i]
            if node.spec is not None and node.spec.activation == "sigmoid":
                return x, q_map(node.spec, 1.0)
            if node.op == "nonlinear" and node.note == "hardsigmoid":
                return x, _HARD_GATE
            if i in self.softmax:
                return x, 1.0
        return None

    def _attention(
        self, name: str, args: list[Any], kwargs: dict[str, Any], taken: list[Signal], at: str
    ) -> Signal | None:
        """The means that attention takes; None if the function is no attention."""
        if name == "scaled_dot_product_attention":
            values = args[2] if len(args) > 2 else kwargs.get("value")
            return self.attended(values, at) if isinstance(values, Signal) else None
        if name not in MATMULS or len(taken) != 2:
            return None
        for weights, values in (taken, taken[::-1]):
            i = self.index(weights)
            while self.nodes[i].op in ("reshape", "dropout"):
                (i,) = self.nodes[i].inputs
            if i in self.softmax:
                return self.attended(values, at)
        return None

    def _concat(
        self, args: list[Any], kwargs: dict[str, Any], taken: list[Signal], at: str
    ) -> Signal:
        parts = kwargs.get("tensors", args[0])
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        seen = self.joined.get(self.running[-1] if self.running else self.model)
        while seen and len(seen[0]) != len(parts):
            seen.pop(0)  # another join, of what does not depend on the input
        sizes = seen.pop(0) if seen else None
        if len(parts) == 1:
            return self.like("reshape", taken[0], at)
        if len(taken) < len(parts) and _are_tokens(parts, dim):
            self.notes[
                f"{at!r} joins tokens that do not depend on the input, which were left out"
            ] = None
            return (
                self.like("reshape", taken[0], at)
                if len(taken) == 1
                else (
                    self.emit("concat", taken, at, weights=(1.0,) * len(taken), axes=taken[0].axes)
                )
            )
        if len(taken) < len(parts):
            return self.unknown(taken, at, f"it joins what does not depend on the input; {BY_HAND}")
        axes = frozenset.intersection(*(s.axes for s in taken)) or taken[0].axes
        if dim not in axes and (dim == 0 or (axes and axes != {-1})):
            return self.unknown(
                taken, at, f"it joins along dimension {dim}, not along that of channels; {BY_HAND}"
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


def _are_tokens(parts: Any, dim: Any) -> bool:
    """Whether a join along a dimension adds constant tokens, as transformers do."""
    others = [part for part in parts if not isinstance(part, Signal)]
    return dim in (1, -2) and all(isinstance(t, Tensor) and t.ndim == 3 for t in others)


def _computed(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Compute a function of constants; UNSIZED if that is not possible."""
    in_place = writes(name_of(node.target))
    if in_place or any(isinstance(leaf, Unsized) for leaf in pytree.tree_leaves((args, kwargs))):
        return UNSIZED
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
    except Exception:  # any error means that the value is unknown
        return UNSIZED


def _activation(name: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and options of the activation that a call computes."""
    if name.startswith("cl"):
        low, high = (*args[1:], None, None)[:2]
        low, high = kwargs.get("min", low), kwargs.get("max", high)
        return ("relu" if (low, high) == (0, None) else "hardtanh"), {}
    options = options_of(name)
    given = dict(zip(options, args[1:], strict=False))
    return name, {**options, **given, **{k: v for k, v in kwargs.items() if k in options}}


def _why_not_function(name: str) -> str:
    """Why a function of torch cannot be read."""
    if name == "fold":
        return f"fold adds up values of blocks that overlap; {BY_HAND}"
    if name in CHANNEL_NORMS:
        return (
            f"{name} undoes what shaped activations set up; build the model without, or use "
            "F.layer_norm"
        )
    if name in ATTENTION | {"bmm", "matmul"}:
        return (
            f"{name} of values that all depend on the input is attention or the like, which mixes "
            f"locations in a way that depends on the data; {BY_HAND}"
        )
    return f"{name} is not understood here; {BY_HAND}"
