"""Tape: what a running model computes, as `Step`s, each measured where its value is first used.

A `TorchDispatchMode` sees every operation of a forward pass, whoever wrote it and whatever decided
that it runs, so loops, branches and modules called twice need no special care. Pointwise operations
are gathered until something else takes their result: one activation is one step, however it was
written. Linear arithmetic is gathered as Σ wᵢ·stepᵢ, and becomes one "sum".
"""

from __future__ import annotations

import math
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

from fusedshape.activations import ACTIVATIONS, TORCH_NAMES
from fusedshape.diagnose.layers import Affine, Phi, convolution, matrix
from fusedshape.diagnose.reach import read_share
from fusedshape.nn import PerLocationNorm
from fusedshape.spec import CONSTANTS, ActSpec
from fusedshape.theory.network import Op

Measure = Callable[[Tensor, int], Any]
Expr = tuple[Any, ...]

X: Expr = ("x",)
_SAME = {"detach", "alias", "clone", "contiguous", "_to_copy", "lift_fresh", "to"}
_NEW = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
_NEW |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "bernoulli"}
_CONSTANT = {"zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}
_VIEWS = {"view", "_unsafe_view", "reshape", "permute", "transpose", "unsqueeze", "squeeze"}
_CUTS = {"slice", "select", "split", "split_with_sizes", "unbind", "expand", "constant_pad_nd"}
_CUTS |= {"roll", "flip", "index", "index_select", "unfold", "im2col", "pixel_shuffle", "gather"}
_CUTS |= {"reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "as_strided", "repeat"}
_CUTS |= {"replication_pad1d", "replication_pad2d", "replication_pad3d", "pixel_unshuffle"}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min"}
# Some have no tag that says so, or none yet in torch 2.11.
_POINTWISE = {*(known.name for known in TORCH_NAMES), "_prelu_kernel"}
# Modules of which only inputs and outputs are looked at.
_WHOLE = (PerLocationNorm, nn.RNNBase, nn.RNNCellBase)
_IDS = {row.id: name for name, row in ACTIVATIONS.items()}


@dataclass(eq=False)
class Step:
    """One step of a forward pass, in the words of `fusedshape.theory.network.Node`.

    Attributes:
        op: what it is to the theory.
        inputs: indices of the steps that it takes from.
        path: where it stands in the model, as `Node.path`.
        name: what is computed there: "conv", "relu", "add", …
        channels: in how many numbers one location of its value consists; 0 if not known.
        weights: wᵢ of a sum, or the channels of each input of a concat.
        phi: the function of a nonlinear step.
        affine: what the theory must know of an affine step's weights.
        weight: where an affine step's weight lies in memory; None if it is no parameter itself.
        move: how a step that only moves values acts on kernels of locations; None if unknown.
        reads: share of its input's positions that a convolution or pool reads.
        dim: where its value has the channels; 0 if not known.
        note: why its value is not predicted.
        value: what `Measure` gave; None where the value was never used.
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
        """What must be the same for two passes to have gone the same way."""
        return self.op, self.inputs, self.path, self.name, self.channels


@dataclass(frozen=True)
class _Signal:
    """What a tensor holds: Σ weight · step, or `expr` of the one step.

    Attributes:
        terms: (step, weight) pairs.
        dim: the dimension of the channels; None for a network's input that nobody used yet.
        path: where it was computed last.
        name: the last operation that computed it.
        expr: a pointwise function of the only term's step; None for the identity.
        version: of the tensor when that was so.
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
        batch: how many inputs it is given.
        measure: called with a tensor and the dimension of its channels, at first use.
        known: weights looked at before, to share between passes.
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
        self._constant = WeakTensorKeyDictionary()  # the number that all elements are
        self._random = WeakTensorKeyDictionary()  # what random numbers decide on
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
        return False  # else the first operation imports Dynamo, seconds of it

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Call the model, and record what it does."""
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
        """Where the channels are of each floating tensor that the model was given."""
        return [s.dim or 1 for s in self.steps if s.path == s.name == "input"]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Know which module runs. Hooks on all modules there are, so that the model has none."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with warnings.catch_warnings():
                # That they run for the wrapper of torch.compile, too, is as it should be.
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
                self._take(tensor, 1 if isinstance(module, PerLocationNorm) else None)
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
                if not isinstance(module, PerLocationNorm):
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
        """Run one operation, and record it if it works on what came from the model's input."""
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        in_place = name.endswith("_")
        name = name.rstrip("_") if in_place else name
        if self._quiet:
            return func(*args, **kwargs)
        tensors = [t for t in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(t, Tensor)]
        tracked = [t for t in tensors if self._get(t) is not None]
        if not tracked or name in _NEW:
            is_random = torch.Tag.nondeterministic_seeded in func.tags or self._is_random(tensors)
            out = func(*args, **kwargs)
            if in_place and isinstance(args[0], Tensor):
                self._constant.pop(args[0], None)
            elif name in _CONSTANT:
                self._constant[out] = _CONSTANT[name]
            if is_random:
                for t in _tensors(args[0] if in_place else out):
                    self._random[t] = True
            if name == "embedding":
                self._emit(out, Step("input", path=self._here(name), name=name), -1)
            return out
        record = self._recorder(space, name, func, args, kwargs, tensors, tracked)
        out = func(*args, **kwargs)
        target = args[0] if in_place else out
        # Torch counts an operation in place, and lets a view share the count of what it is a view
        # of, after it has come back from here.
        self._ahead = int(in_place and space == "aten")
        if not in_place and any(r.alias_info is not None for r in func._schema.returns):
            self._ahead = _version(tensors[0])
        record(target)
        base = target._base if in_place and isinstance(target, Tensor) else None
        if base is not None and self._get(base) is None:
            # Put together piece by piece, as circular padding is; measured when all is there.
            signal = self._get(target)
            taken = tuple(i for i, _ in signal.terms) if signal else ()
            self._emit(base, Step("reshape", taken, self._here(name), name), self._dim_like(target))
            self._pieces.add(len(self.steps) - 1)
        self._ahead = 0
        return out

    def _recorder(
        self,
        space: str,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        tracked: list[Tensor],
    ) -> Callable[[Any], None]:
        """Take what an operation takes, before it runs; return what to do with its result."""
        x = tracked[0]
        signal = self._get(x)
        assert signal is not None
        if name in _VIEWS | _CUTS and signal.terms[0][0] in self._pieces:
            return lambda out: None
        if space == "fusedshape":
            return self._fused(name, args)
        if name in _SAME:
            return lambda out: self._set(out, signal)
        if name == "copy":
            source = self._get(args[1])
            return lambda out: self._set(out, source)
        if name == "convolution" and self._is_fixed_average(args[1]):
            return self._restart("pool", "filter", tracked, "")
        if "dropout" in name or name == "rrelu_with_noise":
            return self._restart("dropout", name, tracked, "")
        if name == "convolution" and x is args[0] and len(tracked) == 1:
            affine = self._affine(convolution, args[1], args[2], *args[3:9])
            return self._layer("conv", affine, args[1], x, 1, 1)
        if name in ("addmm", "mm", "linear") and len(tracked) == 1:
            bias, data, weight = args[:3] if name == "addmm" else (None, *args[:2])
            if name == "linear":
                bias, weight = (args[2] if len(args) > 2 else None), weight.t()
            if data is x:
                affine = self._affine(matrix, weight, bias)
                return self._layer("linear", affine, weight, x, -1, -1)
        if name in ("add", "sub") and len(args) == 2 and len(tracked) == len(tensors) == 2:
            alpha = kwargs.get("alpha", 1) * (-1 if name == "sub" else 1)
            if tensors[0].shape == tensors[1].shape:
                return self._sum(name, args, alpha)
        if name in ("mul", "div", "neg") and len(tracked) == 1:
            factor = _factor(name, args, x)
            if factor is not None:
                return self._scaled(name, x, factor)
        if torch.Tag.pointwise in func.tags or name in _POINTWISE:
            return self._pointwise(name, func, args, kwargs, tensors, tracked)
        if name == "cat":
            return self._concat(args, kwargs, tracked)
        if name in _VIEWS:
            return self._view(name, args, x)
        if name in _CUTS:
            return self._restart("reshape", name, tracked, "")
        if "batch_norm" in name or "group_norm" in name or "layer_norm" in name:
            return self._restart("norm", name.removeprefix("native_"), tracked, "")
        if name in ("rms_norm", "_fused_rms_norm"):
            return self._restart("norm", name.strip("_"), tracked, "")
        if name in _REDUCTIONS and len(args) > 1 and self._get(x) is not None:
            return self._reduce(name, args, kwargs, x)
        if "pool" in name or "upsample" in name:
            return self._pool(name, args, x)
        return self._restart("unknown", name, tracked, f"no theory of {name} is known here")

    # Operations.

    def _layer(
        self, name: str, affine: Affine, weight: Tensor, x: Tensor, dim: int, dim_out: int
    ) -> Callable[[Any], None]:
        taken = self._take(x, dim)
        inputs = () if taken is None else (taken,)
        step = Step("affine", inputs, self._here(name), name, affine=affine)
        step.move = affine.over(x.shape[2:])
        if affine.taps is not None and not affine.geometry[3]:
            step.reads = read_share(affine.taps[0, 0], x.shape[2:], *affine.geometry[:3])
        at = weight.untyped_storage().data_ptr()
        if at in self._own:
            step.weight = at, int(weight.storage_offset()), weight.numel()
        return lambda out: self._emit(out, step, dim_out)

    def _is_random(self, tensors: Sequence[Tensor]) -> bool:
        return bool(self._random) and any(t in self._random for t in tensors)

    def _is_fixed_average(self, weight: Tensor) -> bool:
        """Whether a convolution only averages neighbours, by numbers that are no parameters."""
        fixed = weight.untyped_storage().data_ptr() in self._fixed
        return fixed and weight.shape[1] == 1 and bool((weight >= 0).all())

    def _affine(self, look: Callable[..., Affine], weight: Tensor, *rest: Any) -> Affine:
        at = weight.untyped_storage().data_ptr()
        if at not in self._own:  # computed from others, and gone before the next pass
            return look(weight, *rest)
        key = (at, weight.storage_offset(), tuple(weight.shape), str(rest[1:]))
        if key not in self.known:
            self.known[key] = look(weight, *rest)
        return self.known[key]

    def _fused(self, name: str, args: tuple[Any, ...]) -> Callable[[Any], None]:
        """This library's own kernels."""
        kind = name.partition("_")[2]
        x = args[0]
        if kind not in ("bias_act", "conv"):
            return self._restart("unknown", name, [x], f"no theory of {name} is known here")
        path = self._here(kind)
        if kind == "conv":
            if x.ndim == 2:
                affine = self._affine(matrix, args[1].t(), None)
                return self._layer("linear", affine, args[1], x, -1, -1)
            zeros = [0] * (x.ndim - 2)
            affine = self._affine(convolution, args[1], None, *args[2:5], False, zeros, 1)
            return self._layer("conv", affine, args[1], x, 1, 1)
        bias = args[1]
        taken = self._take(x, None if bias is None else args[2])
        dim = self._dim_like(x)
        assert taken is not None
        if bias is not None and bool(bias.count_nonzero()):
            shift = Affine(bias=float(bias.double().square().mean()))
            taken = self._push(Step("affine", (taken,), path, "bias", x.shape[dim], affine=shift))
        spec = _spec(args[-6:])
        made = _Signal(((taken, 1.0),), dim % x.ndim, path, spec.activation, ("spec", spec))
        return lambda out: self._set(out, made)

    def _sum(self, name: str, args: tuple[Any, ...], alpha: float) -> Callable[[Any], None]:
        for t in args[:2]:
            self._settle(t)
        a, b = (self._get(t) for t in args[:2])
        assert a is not None
        assert b is not None
        if a.expr is not None or b.expr is not None:
            if len(a.terms) == len(b.terms) == 1 and a.terms[0][0] == b.terms[0][0]:
                expr = ("add", self._expr(a), self._expr(b), alpha)
                return self._deferred(replace(a, expr=expr, terms=((a.terms[0][0], 1.0),)), name)
            for t in args[:2]:
                self._unscale(t)
            a, b = (self._get(t) for t in args[:2])
            assert a is not None
            assert b is not None
        total = dict(a.terms)
        for i, w in b.terms:
            total[i] = total.get(i, 0.0) + alpha * w
        return self._deferred(_Signal(tuple(total.items()), a.dim), name)

    def _scaled(self, name: str, x: Tensor, factor: float) -> Callable[[Any], None]:
        self._settle(x)
        signal = self._get(x)
        assert signal is not None
        if signal.expr is not None:
            made = replace(signal, expr=("scale", signal.expr, factor))
        else:
            made = replace(signal, terms=tuple((i, w * factor) for i, w in signal.terms))
        return self._deferred(made, name)

    def _pointwise(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        tracked: list[Tensor],
    ) -> Callable[[Any], None]:
        if self._is_random([t for t in tensors if self._get(t) is None]):
            return self._restart("dropout", "noise" if name == "add" else "dropout", tracked, "")
        others = [t for t in tensors if self._get(t) is None and t.numel() != 1]
        others = [t for t in others if t not in self._constant]
        if name == "add" and len(others) == 1 and len(tracked) == 1:
            return self._shifted(tracked[0], others[0])
        if others:
            is_dropout = name == "mul" and _is_dropout(self._stack)
            why = "" if is_dropout else f"{name} with a tensor that is no layer's weight"
            op: Op = "dropout" if is_dropout else "unknown"
            return self._restart(op, "dropout" if is_dropout else name, tracked, why)
        for t in tracked:
            self._settle(t)
            signal = self._get(t)
            if signal is not None and len(signal.terms) > 1:
                self._take(t)
        signals = [self._get(t) for t in tracked]
        bases = {s.terms[0][0] for s in signals if s is not None}
        if len(bases) > 1:
            why = f"{name} of values that come from different layers"
            return self._restart("unknown", name, tracked, why)
        first = signals[0]
        assert first is not None

        def leaf(a: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            signal = self._get(a)
            if signal is not None:
                return self._expr(signal)
            return ("c", self._constant[a] if a in self._constant else float(a))

        functional = getattr(getattr(torch.ops.aten, name), func._overloadname)
        options = tuple((k, leaf(v)) for k, v in kwargs.items() if k not in ("dtype", "layout"))
        expr = ("f", functional, tuple(leaf(a) for a in args), options)
        made = replace(first, expr=expr, terms=((first.terms[0][0], 1.0),))
        return self._deferred(made, name)

    def _shifted(self, x: Tensor, bias: Tensor) -> Callable[[Any], None]:
        if not bool(bias.count_nonzero()):
            signal = self._get(x)
            return lambda out: self._set(out, signal)
        taken, dim = self._take(x), self._dim_like(x)
        shift = Affine(bias=float(bias.double().square().mean()))
        inputs = () if taken is None else (taken,)
        step = Step("affine", inputs, self._here("bias"), "bias", affine=shift)
        return lambda out: self._emit(out, step, dim)

    def _concat(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[Tensor]
    ) -> Callable[[Any], None]:
        parts = [t for t in args[0] if t.numel()]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % parts[0].ndim
        taken = [self._take(t, dim) for t in parts]
        whole = [i for i in taken if i is not None]
        if len(whole) < len(parts):
            return self._restart("reshape", "cat", tracked, "")
        sizes = tuple(float(t.shape[dim]) for t in parts)
        step = Step("concat", tuple(whole), self._here("cat"), "cat", weights=sizes)
        return lambda out: self._emit(out, step, dim)

    def _view(self, name: str, args: tuple[Any, ...], x: Tensor) -> Callable[[Any], None]:
        signal = self._get(x)
        assert signal is not None
        if signal.dim is None and signal.expr is None and len(signal.terms) == 1:
            return lambda out: self._set(out, signal)  # an input that nobody used yet
        taken = self._take(x)
        dim = self._dim_like(x)

        def record(out: Any) -> None:
            if not isinstance(out, Tensor) or taken is None:
                return
            move, to = _moved(name, args, x.shape, out.shape, dim, self.batch)
            step = Step("reshape", (taken,), self._here(name), name, move=move)
            self._emit(out, step, to)
            if move is not None:
                step.channels = out.shape[to]
            elif name in ("permute", "transpose") and taken not in self._lost:
                step.note = "its inputs leave dimension 0, and are not followed there"
                self._lost.add(len(self.steps) - 1)

        return record

    def _reduce(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
    ) -> Callable[[Any], None]:
        dims = {d % x.ndim for d in ([args[1]] if isinstance(args[1], int) else args[1] or ())}
        dim = self._dim_like(x)
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        if not dims or dim in dims or 0 in dims:
            return self._restart("unknown", name, [x], f"{name} over channels or inputs")
        taken = self._take(x)
        step = Step("pool", () if taken is None else (taken,), self._here(name), name)
        to = dim if keep else dim - sum(d < dim for d in dims)
        return lambda out: self._emit(out[0] if isinstance(out, (tuple, list)) else out, step, to)

    def _pool(self, name: str, args: tuple[Any, ...], x: Tensor) -> Callable[[Any], None]:
        record = self._restart("pool", name, [x], "")
        where = len(self.steps)

        def read(out: Any) -> None:
            record(out)
            first = out[0] if isinstance(out, (tuple, list)) else out
            n = next((n for n in (1, 2, 3) if f"{n}d" in name), 0)
            if len(self.steps) == where or not n or x.ndim != n + 2:
                return
            places = x.shape[2:]
            if "nearest" in name:
                self.steps[where].reads = min(1.0, math.prod(first.shape[2:]) / math.prod(places))
            elif name.startswith(("max_pool", "avg_pool")):
                self.steps[where].reads = read_share(*_window(name, args, places))

        return read

    def _restart(
        self, op: Op, name: str, tracked: Sequence[Tensor], note: str
    ) -> Callable[[Any], None]:
        """A step whose value can only be measured."""
        taken = [i for t in tracked if (i := self._take(t)) is not None]
        inputs = tuple(dict.fromkeys(taken))
        dim, ndim = self._dim_like(tracked[0]), tracked[0].ndim
        path = self._here(name)

        def record(out: Any) -> None:
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if not isinstance(t, Tensor) or not t.is_floating_point() or not t.ndim:
                    continue
                to = dim if t.ndim == ndim else _usual(t)
                self._emit(t, Step(op, inputs, path, name, note=note), to)
                if op in ("pool", "norm"):
                    return  # what else they give are indices and statistics

        return record

    # Signals.

    def _get(self, t: Any) -> _Signal | None:
        signal = self._signals.get(t) if isinstance(t, Tensor) else None
        if signal is None or signal.version == _version(t):
            return signal
        if signal.terms[0][0] in self._pieces:
            return signal
        # Changed through a view of it, which was not followed.
        step = Step("unknown", tuple(i for i, _ in signal.terms), signal.path, "write")
        step.note = "it is changed in place through a view"
        self._emit(t, step, signal.dim)
        return self._signals.get(t)

    def _set(self, t: Any, signal: _Signal | None) -> None:
        if isinstance(t, Tensor) and signal is not None:
            self._signals[t] = replace(signal, version=_version(t) + self._ahead)

    def _deferred(self, signal: _Signal, name: str) -> Callable[[Any], None]:
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
        return _usual(t) if signal is None or signal.dim is None else signal.dim

    @staticmethod
    def _expr(signal: _Signal) -> Expr:
        if signal.expr is not None:
            return signal.expr
        ((_, weight),) = signal.terms
        return X if weight == 1 else ("scale", X, weight)

    def _take(self, t: Tensor, dim: int | None = None) -> int | None:
        """The step that a tensor holds, measured; `dim` is where the user has the channels."""
        signal = self._get(t)
        if signal is None:
            return None
        want = None if dim is None else dim % t.ndim
        if signal.dim is None:
            signal = replace(signal, dim=_usual(t) if want is None else want)
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
        # The next layer mixes along another dimension than the last one did.
        turned = Step("reshape", (i,), step.path, "turn", t.shape[want])
        turned.value = None if i in self._lost else self._measured(t, want)
        return self._push(turned)

    def _settle(self, t: Tensor) -> None:
        """Measure a tensor that is a step's value, before arithmetic takes it."""
        signal = self._get(t)
        if signal is None or signal.dim is None or signal.expr is not None:
            return
        if [w for _, w in signal.terms] == [1.0]:
            self._take(t)

    def _unscale(self, t: Tensor) -> None:
        """Let a function's value that was multiplied for a sum be that function's step, weighted.

        What makes q = 1 of it is no weight, but part of an activation written by hand.
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
        self._quiet += 1
        try:
            return self.measure(t, dim)
        finally:
            self._quiet -= 1


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _window(name: str, args: tuple[Any, ...], places: Sequence[int]) -> tuple[Any, ...]:
    """The arguments of `read_share` for a pool."""

    def each(i: int, default: Any) -> list[int]:
        given = args[i] if len(args) > i and args[i] not in ([], None) else default
        given = [given] if isinstance(given, int) else list(given)
        return given * (len(places) // len(given))

    kernel = each(1, 1)
    dilation = each(4, 1) if name.startswith("max_pool") else each(len(args), 1)
    return torch.ones(kernel), places, each(2, kernel), each(3, 0), dilation


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _usual(t: Tensor) -> int:
    """Where the channels are if nothing tells: last in (N, T, C), else after the inputs."""
    return 2 if t.ndim == 3 else min(1, t.ndim - 1)


def _spec(constants: Sequence[Any]) -> ActSpec:
    numbers: dict[str, Any] = dict(zip(CONSTANTS, constants[1:], strict=True))
    return ActSpec(_IDS[int(constants[0])], **numbers)


def _factor(name: str, args: tuple[Any, ...], x: Tensor) -> float | None:
    """The number that an operation multiplies x by, if that is all."""
    if name == "neg":
        return -1.0
    other = args[1] if args[0] is x else args[0]
    if len(args) != 2 or (isinstance(other, Tensor) and other.numel() != 1):
        return None
    if name == "div":
        return 1 / float(other) if args[0] is x and float(other) else None
    return float(other)


def _is_dropout(stack: list[nn.Module]) -> bool:
    return any("drop" in type(module).__name__.lower() for module in stack[-2:])


def _moved(
    name: str,
    args: tuple[Any, ...],
    was: Sequence[int],
    now: Sequence[int],
    dim: int,
    batch: int,
) -> tuple[Callable[[Tensor], Tensor] | None, int]:
    """What a view does to a (pairs, …, *locations) kernel, and where the channels are then."""
    places = [d for d in range(1, len(was)) if d != dim]
    if name in ("permute", "transpose"):
        order = list(range(len(was)))
        if name == "permute":
            order = [d % len(was) for d in args[1]]
        else:
            a, b = args[1] % len(was), args[2] % len(was)
            order[a], order[b] = order[b], order[a]
        to = order.index(dim)
        if order[0] != 0 or was[0] != batch:
            return None, _usual_of(now)
        before = [was[d] for d in places]
        turn = [2 + places.index(d) for d in order[1:] if d != dim]
        return lambda k: k.reshape(*k.shape[:2], *before).permute(0, 1, *turn), to
    # The others keep the order of elements in memory.
    if dim == len(was) - 1 and now[-1] == was[-1]:
        return lambda k: k, len(now) - 1
    if now[0] == was[0] and dim == 1 and len(now) > 1 and now[1] == was[1]:
        return lambda k: k, 1
    if list(now) == [batch, math.prod(was[1:])] and was[0] == batch:
        return lambda k: k.reshape(*k.shape[:2], -1).mean(2), 1
    return None, _usual_of(now)


def _usual_of(shape: Sequence[int]) -> int:
    return 2 if len(shape) == 3 else min(1, len(shape) - 1)
