"""Tape: records what a running model computes as `Step`s, each measured when it is first used.

A `TorchDispatchMode` sees every operation of a forward pass, so loops, branches and modules that
are called twice need no special care. Pointwise operations are collected until something else uses
their result, so that an activation is one step however it is written. Linear arithmetic is
collected as Σ wᵢ·stepᵢ, and becomes one "sum".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fusedshape.diagnose.layers import Affine, Phi, convolution, matrix
from fusedshape.diagnose.operation import Operation, usual_dim
from fusedshape.guard import unwatched
from fusedshape.kinds import LocationNorm
from fusedshape.theory.network import Op
from fusedshape.torch_ops import (
    ALPHA_DROPOUTS,
    BLOCKS,
    CONCATS,
    COPIES,
    DROPOUTS,
    FILLED,
    MOVES,
    NEW,
    NORMS,
    PADS,
    POOLS,
    PRODUCTS,
    QUOTIENTS,
    REDUCTIONS,
    RESHAPES,
    RESIZES,
    SAME,
    TURNS,
    VIEWS,
)
from fusedshape.windows import overlaps, read_share

Measure = Callable[[Tensor, int], Any]
Record = Callable[[Any], None]  # called with the result of an operation, to record it
Expr = tuple[Any, ...]

X: Expr = ("x",)
# Modules that are one step; their own operations are not recorded.
_WHOLE = (LocationNorm, nn.RNNBase, nn.RNNCellBase)
_MATRIX = ("addmm", "mm", "linear")
_SAME = SAME | COPIES
_WHOLE_VIEWS = RESHAPES | TURNS
_ELSEWHERE = VIEWS | MOVES | PADS | BLOCKS
_POOLS = POOLS - REDUCTIONS | RESIZES
_SCALES = PRODUCTS | QUOTIENTS | {"neg"}
_NOISE = DROPOUTS | ALPHA_DROPOUTS | {"rrelu_with_noise"}


@dataclass(eq=False)
class Step:
    """One step of a forward pass, in the words of `fusedshape.theory.network.Node`.

    Attributes:
        op: the theory's word for it.
        inputs: indices of the steps that it takes as inputs.
        path: its place in the model, as in `Node.path`.
        name: what it computes: "conv", "relu", "add", …
        channels: number of channels at one location; 0 if not known.
        weights: wᵢ of a sum, or the channels of each input of a concat.
        phi: the function of a nonlinear step.
        affine: description of an affine step's weights.
        weight: an affine step's weight: address, offset and size; None if it is computed.
        move: how a step that only moves values rearranges a kernel's locations; None if unknown.
        reads: share of input positions that a convolution or pool reads.
        dim: the dimension of the channels in its value; 0 if not known.
        note: why its value is not predicted.
        value: the result of `Measure`; None if the value was never used.
    """

    op: Op
    inputs: tuple[int, ...] = ()
    path: str = ""
    name: str = ""
    channels: int = 0
    weights: tuple[float, ...] = ()
    phi: Phi | None = None
    affine: Affine | None = None
    weight: tuple[int, int, int] | None = None
    move: Callable[[Tensor], Tensor] | None = None
    reads: float = 1.0
    dim: int = 0
    note: str = ""
    value: Any = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal in two passes for them to have the same steps."""
        return self.op, self.inputs, self.path, self.name, self.channels


@dataclass(frozen=True)
class _Signal:
    """The content of a tensor: Σ weight · step, or `expr` of one step.

    Attributes:
        terms: (step, weight) pairs.
        dim: the dimension of the channels; None for a network's input that is not used yet.
        path: where it was computed.
        name: the last operation that went into it.
        expr: a pointwise function of the only term's step; None for the identity.
        version: the tensor's version when it had this content.
    """

    terms: tuple[tuple[int, float], ...]
    dim: int | None
    path: str = ""
    name: str = ""
    expr: Expr | None = None
    version: int = 0


@dataclass(eq=False)
class Tape(TorchDispatchMode):
    """Records one forward pass; see the top of this file.

    Args:
        model: the model.
        batch: number of inputs.
        measure: called with a tensor and its channel dimension when the tensor is first used.
        known: descriptions of weights, shared between passes.
    """

    model: nn.Module
    batch: int
    measure: Measure
    known: dict[Any, Affine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.outputs: list[int] = []
        self._signals = WeakTensorKeyDictionary()
        self._constant = WeakTensorKeyDictionary()  # the number that fills a tensor
        self._random = WeakTensorKeyDictionary()  # tensors that depend on random numbers
        self._names = {module: name for name, module in self.model.named_modules()}
        self._stack: list[nn.Module] = []
        self._quiet = 0
        self._ahead = 0
        self._lost: set[int] = set()
        self._pieces: set[int] = set()
        own = [*self.model.parameters(), *self.model.buffers()]
        self._own = {t.untyped_storage().data_ptr() for t in own}
        self._fixed = {t.untyped_storage().data_ptr() for t in self.model.buffers()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the first operation imports Dynamo, which takes seconds

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Call the model and record its operations."""
        for tensor in _tensors((args, kwargs)):
            if tensor.is_floating_point():
                self._emit(tensor, Step("input", path="input", name="input"), None)
        with self._watching(), self:
            out = self.model(*args, **kwargs)
        for tensor in _tensors(out):
            found = self._take(tensor)
            self.outputs += [] if found is None else [found]

    @property
    def input_dims(self) -> list[int]:
        """The channel dimension of each floating tensor among the model's inputs."""
        return [s.dim or 1 for s in self.steps if s.path == s.name == "input"]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Keep track of the running module, by global hooks, so that the model itself gets none."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with warnings.catch_warnings():
                # The warning is about compiled modules, for which these hooks are meant to run too.
                warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)`")
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module not in self._names:
            return
        if isinstance(module, _WHOLE):
            for tensor in _tensors(args):
                self._take(tensor, 1 if isinstance(module, LocationNorm) else None)
            self._quiet += 1
        self._stack.append(module)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if module not in self._names or module not in self._stack:
            return
        while self._stack[-1] is not module:
            self._stack.pop()
        if isinstance(module, _WHOLE):
            self._quiet -= 1
            taken = tuple(i for t in _tensors(args) if (i := self._take(t)) is not None)
            kind = type(module).__name__
            for tensor in _tensors(out):
                step = Step("norm", taken, self._here(kind), kind)
                if not isinstance(module, LocationNorm):
                    step.op, step.note = "unknown", f"no theory of {kind} is known here"
                self._emit(tensor, step, 1 if step.op == "norm" else -1)
        self._stack.pop()

    def _here(self, name: str) -> str:
        if not self._stack:
            return name
        module = self._stack[-1]
        path = self._names[module]
        leaf = not any(True for _ in module.children())
        return path if leaf and path else f"{path}:{name}"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation, and record it if it depends on the model's input."""
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        op = Operation.of(func, args, kwargs, lambda t: self._get(t) is not None)
        if not op.tracked or op.name in NEW:
            return self._run_untracked(op)
        record = self._recorder(op)
        out = func(*args, **kwargs)
        in_place = op.what.in_place
        target = args[0] if in_place else out
        # After this method has returned, torch increases the version of a tensor written in place,
        # and lets a view share the version of its base.
        self._ahead = int(in_place and op.what.namespace == "aten")
        if not in_place and op.what.views:
            self._ahead = _version(op.tensors[0])
        record(target)
        base = target._base if in_place and isinstance(target, Tensor) else None
        if base is not None and self._get(base) is None:
            # A tensor filled piece by piece, as for circular padding, is measured once it is full.
            signal = self._get(target)
            taken = tuple(i for i, _ in signal.terms) if signal else ()
            step = Step("reshape", taken, self._here(op.name), op.name)
            self._emit(base, step, self._dim_like(target))
            self._pieces.add(len(self.steps) - 1)
        self._ahead = 0
        return out

    def _run_untracked(self, op: Operation) -> Any:
        """Run an operation whose result does not depend on the model's input."""
        draws = op.what.draws or self._is_random(op.tensors)
        out = op.func(*op.args, **op.kwargs)
        if op.what.in_place and isinstance(op.args[0], Tensor):
            self._constant.pop(op.args[0], None)
        elif op.name in FILLED:
            self._constant[out] = FILLED[op.name]
        if draws:
            for t in _tensors(op.args[0] if op.what.in_place else out):
                self._random[t] = True
        if op.name == "embedding":
            self._emit(out, Step("input", path=self._here(op.name), name=op.name), -1)
        return out

    def _recorder(self, op: Operation) -> Record:
        """Use the inputs of an operation, before it runs; return how to record its result."""
        readers = (
            self._passed_on,
            self._fused,
            self._noise,
            self._weighted,
            self._arithmetic,
            self._pointwise,
            self._moved,
            self._pooled,
        )
        found = next((record for read in readers if (record := read(op)) is not None), None)
        return found or self._unknown(op)

    # How to record operations of one sort; None for all others.

    def _passed_on(self, op: Operation) -> Record | None:
        """Operations that return their argument's values."""
        signal = self._get(op.x)
        assert signal is not None
        if op.kind in _ELSEWHERE and signal.terms[0][0] in self._pieces:
            return _nothing
        if op.kind in _SAME:
            return lambda out: self._set(out, signal)
        if op.name == "copy":
            source = self._get(op["src"])
            return lambda out: self._set(out, source)
        return None

    def _fused(self, op: Operation) -> Record | None:
        """This library's kernels."""
        if op.what.namespace != "fusedshape":
            return None
        kind = op.name.partition("_")[2]
        if kind == "conv":
            return self._fused_product(op)
        if kind != "bias_act":
            return self._unknown(op)
        path, bias = self._here(kind), op["bias"]
        taken = self._take(op["x"], None if bias is None else op["dim"])
        dim = self._dim_like(op["x"])
        assert taken is not None
        if bias is not None and bool(bias.count_nonzero()):
            step = Step("affine", (taken,), path, "bias", op["x"].shape[dim], affine=_shift(bias))
            taken = self._push(step)
        spec = op.spec
        made = _Signal(((taken, 1.0),), dim % op["x"].ndim, path, spec.activation, ("spec", spec))
        return lambda out: self._set(out, made)

    def _fused_product(self, op: Operation) -> Record:
        x, weight = op["x"], op["weight"]
        if x.ndim == 2:
            return self._layer("linear", op, self._affine(matrix, weight.t(), None), weight, x)
        geometry = op["stride"], op["padding"], op["dilation"], False, [0] * (x.ndim - 2), 1
        affine = self._affine(convolution, weight, None, *geometry)
        return self._layer("conv", op, affine, weight, x)

    def _noise(self, op: Operation) -> Record | None:
        """Dropout and the like."""
        if op.kind in _NOISE:
            return self._restart("dropout", op)
        return None

    def _weighted(self, op: Operation) -> Record | None:
        """Products with weights."""
        if op.name == "convolution":
            weight = op["weight"]
            if self._is_fixed_average(weight):
                return self._restart("pool", op, "filter")
            if op.x is not op["input"] or len(op.tracked) > 1:
                return None
            geometry = "stride", "padding", "dilation", "transposed", "output_padding", "groups"
            affine = self._affine(convolution, weight, op["bias"], *(op[name] for name in geometry))
            return self._layer("conv", op, affine, weight, op.x)
        if op.name not in _MATRIX or len(op.tracked) > 1:
            return None
        data, weight, bias = _product(op)
        if data is not op.x or op.get("alpha", 1) != 1 or op.get("beta", 1) != 1:
            return None
        return self._layer("linear", op, self._affine(matrix, weight, bias), weight, data)

    def _layer(self, name: str, op: Operation, affine: Affine, weight: Tensor, x: Tensor) -> Record:
        dim = 1 if name == "conv" else -1
        taken = self._take(x, dim)
        inputs = () if taken is None else (taken,)
        step = Step("affine", inputs, self._here(name), name, affine=affine)
        step.move = affine.over(x.shape[2:])
        if affine.taps is not None and not affine.geometry[3]:
            step.reads = read_share(affine.taps[0, 0], x.shape[2:], *affine.geometry[:3])
        at = weight.untyped_storage().data_ptr()
        if at in self._own:
            step.weight = at, int(weight.storage_offset()), weight.numel()
        return lambda out: self._emit(out, step, dim)

    def _is_random(self, tensors: Sequence[Tensor]) -> bool:
        return bool(self._random) and any(t in self._random for t in tensors)

    def _is_fixed_average(self, weight: Tensor) -> bool:
        """Whether a convolution averages neighbours with fixed numbers instead of parameters."""
        fixed = weight.untyped_storage().data_ptr() in self._fixed
        return fixed and weight.shape[1] == 1 and bool((weight >= 0).all())

    def _affine(self, look: Callable[..., Affine], weight: Tensor, *rest: Any) -> Affine:
        at = weight.untyped_storage().data_ptr()
        if at not in self._own:  # computed in this pass only
            with unwatched():
                return look(weight, *rest)
        key = (at, weight.storage_offset(), tuple(weight.shape), str(rest[1:]))
        if key not in self.known:
            with unwatched():
                self.known[key] = look(weight, *rest)
        return self.known[key]

    def _arithmetic(self, op: Operation) -> Record | None:
        """Sums of two values, and multiples of one."""
        if op.name in ("add", "sub") and len(op.tracked) == len(op.tensors) == 2:
            a, b = op.tensors
            if a.shape == b.shape:
                alpha = op.get("alpha", 1) * (-1 if op.name == "sub" else 1)
                return self._sum(op.name, a, b, alpha)
        if op.name in _SCALES and len(op.tracked) == 1 and op.factor is not None:
            return self._scaled(op.name, op.x, op.factor)
        return None

    def _sum(self, name: str, one: Tensor, other: Tensor, alpha: float) -> Record:
        for t in (one, other):
            self._settle(t)
        a, b = self._known(one), self._known(other)
        if a.expr is not None or b.expr is not None:
            if len(a.terms) == len(b.terms) == 1 and a.terms[0][0] == b.terms[0][0]:
                expr = ("add", self._expr(a), self._expr(b), alpha)
                return self._deferred(replace(a, expr=expr, terms=((a.terms[0][0], 1.0),)), name)
            for t in (one, other):
                self._unscale(t)
            a, b = self._known(one), self._known(other)
        total = dict(a.terms)
        for i, w in b.terms:
            total[i] = total.get(i, 0.0) + alpha * w
        return self._deferred(_Signal(tuple(total.items()), a.dim), name)

    def _scaled(self, name: str, x: Tensor, factor: float) -> Record:
        self._settle(x)
        signal = self._known(x)
        if signal.expr is not None:
            made = replace(signal, expr=("scale", signal.expr, factor))
        else:
            made = replace(signal, terms=tuple((i, w * factor) for i, w in signal.terms))
        return self._deferred(made, name)

    def _pointwise(self, op: Operation) -> Record | None:
        """Elementwise functions: parts of an activation, if all arguments come from one step."""
        if not op.is_pointwise:
            return None
        other = self._with_others(op)
        if other is not None:
            return other
        for t in op.tracked:
            self._settle(t)
            if len(self._known(t).terms) > 1:
                self._take(t)
        signals = [self._known(t) for t in op.tracked]
        if len({s.terms[0][0] for s in signals}) > 1:
            why = f"{op.name} of values that come from different layers"
            return self._restart("unknown", op, note=why)
        terms = ((signals[0].terms[0][0], 1.0),)
        return self._deferred(replace(signals[0], expr=self._applied(op), terms=terms), op.name)

    def _with_others(self, op: Operation) -> Record | None:
        """An elementwise function that also takes tensors which do not depend on the input."""
        untracked = [t for t in op.tensors if self._get(t) is None]
        if self._is_random(untracked):
            return self._restart("dropout", op, "noise" if op.name == "add" else "dropout")
        others = [t for t in untracked if t.numel() != 1 and t not in self._constant]
        if not others:
            return None
        if op.name == "add" and len(others) == 1 and len(op.tracked) == 1:
            return self._shifted(op.x, others[0])
        if op.name == "mul" and _is_dropout(self._stack):
            return self._restart("dropout", op, "dropout")
        why = f"{op.name} with a tensor that is no layer's weight"
        return self._restart("unknown", op, note=why)

    def _applied(self, op: Operation) -> Expr:
        """The expression of an elementwise operation."""

        def leaf(a: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            signal = self._get(a)
            if signal is not None:
                return self._expr(signal)
            return ("c", self._constant[a] if a in self._constant else float(a))

        functional = getattr(getattr(torch.ops.aten, op.name), op.func._overloadname)
        options = [(k, leaf(v)) for k, v in op.kwargs.items() if k not in ("dtype", "layout")]
        return ("f", functional, tuple(leaf(a) for a in op.args), tuple(options))

    def _shifted(self, x: Tensor, bias: Tensor) -> Record:
        if not bool(bias.count_nonzero()):
            signal = self._get(x)
            return lambda out: self._set(out, signal)
        taken, dim = self._take(x), self._dim_like(x)
        inputs = () if taken is None else (taken,)
        step = Step("affine", inputs, self._here("bias"), "bias", affine=_shift(bias))
        return lambda out: self._emit(out, step, dim)

    def _moved(self, op: Operation) -> Record | None:
        """Operations that move numbers."""
        if op.kind in CONCATS:
            return self._concat(op)
        if op.kind in _WHOLE_VIEWS:
            return self._view(op)
        if op.kind == "col2im" and overlaps(op["kernel_size"], op["stride"], op["dilation"]):
            return None
        return self._restart("reshape", op) if op.kind in _ELSEWHERE else None

    def _concat(self, op: Operation) -> Record:
        parts = [t for t in op["tensors"] if t.numel()]
        dim = op["dim"] % parts[0].ndim
        taken = [self._take(t, dim) for t in parts]
        whole = [i for i in taken if i is not None]
        if len(whole) < len(parts):
            return self._restart("reshape", op)
        sizes = tuple(float(t.shape[dim]) for t in parts)
        step = Step("concat", tuple(whole), self._here("cat"), "cat", weights=sizes)
        return lambda out: self._emit(out, step, dim)

    def _view(self, op: Operation) -> Record:
        x = op.x
        signal = self._known(x)
        if signal.dim is None and signal.expr is None and len(signal.terms) == 1:
            return lambda out: self._set(out, signal)  # an input that is not used yet
        taken = self._take(x)
        dim = self._dim_like(x)

        def record(out: Any) -> None:
            if not isinstance(out, Tensor) or taken is None:
                return
            move, to = op.moved(out.shape, dim, self.batch)
            step = Step("reshape", (taken,), self._here(op.name), op.name, move=move)
            self._emit(out, step, to)
            if move is not None:
                step.channels = out.shape[to]
            elif op.kind in TURNS and taken not in self._lost:
                step.note = "its inputs leave dimension 0, and are not followed there"
                self._lost.add(len(self.steps) - 1)

        return record

    def _pooled(self, op: Operation) -> Record | None:
        """Normalisations, and pools over locations."""
        if op.kind in NORMS:
            return self._restart("norm", op, op.kind)
        if op.kind in REDUCTIONS and op.get("dim") is not None:
            return self._reduce(op)
        if op.kind in _POOLS:
            return self._pool(op)
        return None

    def _reduce(self, op: Operation) -> Record:
        x, given = op.x, op["dim"]
        dims = {d % x.ndim for d in ([given] if isinstance(given, int) else given)}
        dim = self._dim_like(x)
        if not dims or dim in dims or 0 in dims:
            return self._restart("unknown", op, note=f"{op.name} over channels or inputs")
        taken = self._take(x)
        step = Step("pool", () if taken is None else (taken,), self._here(op.name), op.name)
        to = dim if op.get("keepdim", False) else dim - sum(d < dim for d in dims)
        return lambda out: self._emit(_first(out), step, to)

    def _pool(self, op: Operation) -> Record:
        record = self._restart("pool", op)
        where = len(self.steps)

        def read(out: Any) -> None:
            record(out)
            if len(self.steps) > where:
                self.steps[where].reads = op.reads(_first(out))

        return read

    def _unknown(self, op: Operation) -> Record:
        return self._restart("unknown", op, note=f"no theory of {op.name} is known here")

    def _restart(self, kind: Op, op: Operation, name: str = "", note: str = "") -> Record:
        """A step without a prediction, whose value is only measured."""
        name = name or op.name
        taken = [i for t in op.tracked if (i := self._take(t)) is not None]
        inputs = tuple(dict.fromkeys(taken))
        dim, ndim = self._dim_like(op.x), op.x.ndim
        path = self._here(name)

        def record(out: Any) -> None:
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if not isinstance(t, Tensor) or not t.is_floating_point() or not t.ndim:
                    continue
                to = dim if t.ndim == ndim else usual_dim(t.ndim)
                self._emit(t, Step(kind, inputs, path, name, note=note), to)
                if kind in ("pool", "norm"):
                    return  # their other results are indices and statistics

        return record

    # Signals.

    def _get(self, t: Any) -> _Signal | None:
        signal = self._signals.get(t) if isinstance(t, Tensor) else None
        if signal is None or signal.version == _version(t):
            return signal
        if signal.terms[0][0] in self._pieces:
            return signal
        # It was changed through a view, which was not followed.
        step = Step("unknown", tuple(i for i, _ in signal.terms), signal.path, "write")
        step.note = "it is changed in place through a view"
        self._emit(t, step, signal.dim)
        return self._signals.get(t)

    def _known(self, t: Tensor) -> _Signal:
        """The signal of a tensor that is known to have one."""
        signal = self._get(t)
        assert signal is not None
        return signal

    def _set(self, t: Any, signal: _Signal | None) -> None:
        if isinstance(t, Tensor) and signal is not None:
            self._signals[t] = replace(signal, version=_version(t) + self._ahead)

    def _deferred(self, signal: _Signal, name: str) -> Record:
        made = replace(signal, path=self._here(name), name=name)
        return lambda out: self._set(out, made)

    def _push(self, step: Step) -> int:
        self.steps.append(step)
        i = len(self.steps) - 1
        lost = [j in self._lost for j in step.inputs]
        if lost and (all(lost) if step.op in ("sum", "concat") else any(lost)):
            self._lost.add(i)
        return i

    def _emit(self, t: Any, step: Step, dim: int | None) -> None:
        if isinstance(t, Tensor) and t.is_floating_point() and t.ndim:
            i = self._push(step)
            dim = None if dim is None else dim % t.ndim
            self._set(t, _Signal(((i, 1.0),), dim, step.path, step.name))

    def _dim_like(self, t: Any) -> int:
        signal = self._get(t)
        return usual_dim(t.ndim) if signal is None or signal.dim is None else signal.dim

    @staticmethod
    def _expr(signal: _Signal) -> Expr:
        if signal.expr is not None:
            return signal.expr
        ((_, weight),) = signal.terms
        return X if weight == 1 else ("scale", X, weight)

    def _take(self, t: Tensor, dim: int | None = None) -> int | None:
        """The step of a tensor, measured; `dim` is the channel dimension of the operation."""
        signal = self._get(t)
        if signal is None:
            return None
        want = None if dim is None else dim % t.ndim
        if signal.dim is None:
            signal = replace(signal, dim=usual_dim(t.ndim) if want is None else want)
            self._set(t, signal)
        assert signal.dim is not None
        if signal.expr is not None or [w for _, w in signal.terms] != [1.0]:
            i = self._push(self._step(signal))
            self._set(t, _Signal(((i, 1.0),), signal.dim, signal.path, signal.name))
        else:
            ((i, _),) = signal.terms
        step = self.steps[i]
        step.dim = signal.dim
        self._pieces.discard(i)
        if step.value is None and not (step.op == "reshape" and step.move is not None):
            step.channels = t.shape[signal.dim]
            step.value = None if i in self._lost else self._measured(t, signal.dim)
        if want is None or want == signal.dim:
            return i
        # The next layer has its channels in another dimension than the last one.
        turned = Step("reshape", (i,), step.path, "turn", t.shape[want])
        turned.value = None if i in self._lost else self._measured(t, want)
        return self._push(turned)

    def _settle(self, t: Tensor) -> None:
        """Measure a tensor that holds one step, before arithmetic uses it."""
        signal = self._get(t)
        if signal is None or signal.dim is None or signal.expr is not None:
            return
        if [w for _, w in signal.terms] == [1.0]:
            self._take(t)

    def _unscale(self, t: Tensor) -> None:
        """Split a multiple of a function, as it enters a sum, into the function and a weight.

        A factor that gives the function q = 1 is no weight, but part of a hand-written activation.
        """
        signal = self._get(t)
        if signal is None or signal.expr is None:
            return
        kind, inner, *factor = signal.expr
        whole = Phi.of(signal.expr)
        if kind != "scale" or not factor[0] or (whole is not None and whole.keeps_q):
            self._take(t)
            return
        self._quiet += 1
        bare = t / factor[0]
        self._quiet -= 1
        self._set(bare, replace(signal, expr=inner))
        i = self._take(bare)
        assert i is not None
        self._set(t, replace(signal, terms=((i, factor[0]),), expr=None, dim=self._dim_like(bare)))

    def _step(self, signal: _Signal) -> Step:
        inputs, weights = zip(*signal.terms, strict=True)
        if signal.expr is None:
            return Step("sum", inputs, signal.path, signal.name, weights=weights)
        phi = Phi.of(signal.expr)
        if phi is None:
            why = f"{signal.name} cannot be computed by itself"
            return Step("unknown", inputs, signal.path, signal.name, note=why)
        return Step("nonlinear", inputs, signal.path, phi.name, phi=phi)

    def _measured(self, t: Tensor, dim: int) -> Any:
        if t.ndim < 2 or dim == 0 or not t.shape[0] or t.shape[0] % self.batch or not t.numel():
            return None
        if t.shape[0] != self.batch:
            t, dim = t.unflatten(0, (self.batch, -1)), dim + 1
        with unwatched():
            return self.measure(t, dim)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _is_dropout(stack: list[nn.Module]) -> bool:
    return any("drop" in type(module).__name__.lower() for module in stack[-2:])


def _product(op: Operation) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of a matrix product: data, weight (in, out), and bias."""
    if op.name == "linear":
        return op["input"], op["weight"].t(), op["bias"]
    if op.name == "addmm":
        return op["mat1"], op["mat2"], op["self"]
    return op["self"], op["mat2"], None


def _shift(bias: Tensor) -> Affine:
    return Affine(bias=float(bias.double().square().mean()))


def _first(out: Any) -> Any:
    """The first result of an operation, without indices."""
    return out[0] if isinstance(out, (tuple, list)) else out


def _nothing(out: Any) -> None:
    """Record nothing."""
