"""convert: puts shaped activations, fused layers and their initialisers into a user's model.

Reading comes first and changes nothing: `_Wiring` traces every forward with torch.fx, and `_Fusion`
decides from the graphs which activation joins which layer. `_Plan` holds what follows from that;
its `apply` is the only place that touches the model.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import random
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from fusedshape import theory
from fusedshape.init import Method, init_module_
from fusedshape.nn import (
    ShapedActivation,
    ShapedConv1d,
    ShapedConv2d,
    ShapedConv3d,
    ShapedLinear,
)
from fusedshape.ops.dispatch import Backend, why_not
from fusedshape.spec import ActSpec

_TWINS: dict[type[nn.Module], Any] = {
    nn.Conv1d: ShapedConv1d,
    nn.Conv2d: ShapedConv2d,
    nn.Conv3d: ShapedConv3d,
    nn.Linear: ShapedLinear,
}
_SHAPED = (ShapedActivation, *_TWINS.values())
# The name under which torch, torch.nn.functional and Tensor know what a module computes.
_FUNCTIONAL = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Softplus: "softplus",
    nn.Softsign: "softsign",
    nn.Hardtanh: "hardtanh",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)
_NORM_FUNCTIONS = (F.batch_norm, F.instance_norm, F.group_norm)
# What these return is no tensor, or may be its argument under another name.
_SHAPE_QUERIES = {"size", "dim", "ndim", "shape", "numel", "nelement", "ndimension", "stride"}
_SHAPE_QUERIES |= {"dtype", "device", "type", "is_contiguous", "element_size", "item"}
_ALIASES = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze"}
_ALIASES |= {"unsqueeze", "transpose", "permute", "movedim", "swapaxes", "t", "T", "mT", "chunk"}
_ALIASES |= {"split", "unbind", "narrow", "select", "getitem", "getattr", "expand", "expand_as"}
_ALIASES |= {"contiguous", "detach", "to", "type_as", "float", "double", "half", "bfloat16"}
_ALIASES |= {"dropout"}
_ALIAS_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_METHODS = ("TAT", "DKS", "EOC")
# By name, because importing torch._dynamo takes seconds.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


@dataclass(frozen=True)
class Change:
    """One row of a `Report`.

    Attributes:
        path: qualified name of the module ("" is the model itself).
        was: what stood there.
        now: what stands there after conversion; the same as `was` where nothing changed.
        note: why, and why not fused.
    """

    path: str
    was: str
    now: str
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `convert` did to a model, or would do.

    Attributes:
        method: "TAT", "DKS", "EOC", or "given" for a ready spec.
        spec: the constants put in.
        depth: nonlinear layers on the longest path, as given or counted; None if neither.
        init: the initialiser, or None.
        dry_run: whether the model was left alone.
        changes: one row for each activation and layer changed or left, in the model's order.
        notes: what else the user should know.
        counts: "fused", "shaped", "rewritten", "stripped", "initialised", "skipped".
    """

    method: str
    spec: ActSpec
    depth: int | None
    init: str | None
    dry_run: bool
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    counts: dict[str, int]

    @property
    def skipped(self) -> tuple[Change, ...]:
        """The rows that say what was left alone, and why."""
        return tuple(c for c in self.changes if c.now == c.was)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        rows = [vars(c).copy() for c in self.changes]
        data = {**vars(self), "spec": self.spec.to_dict(), "changes": rows}
        return {**data, "notes": list(self.notes), "counts": dict(self.counts)}

    def __str__(self) -> str:
        depth = "" if self.depth is None else f", depth {self.depth}"
        verb = "would change" if self.dry_run else "changed"
        counts = ", ".join(f"{n} {what}" for what, n in self.counts.items() if n)
        head = [f"convert ({self.method}{depth}) {verb}: {counts}", f"  {self.spec}"]
        rows = [("module", "was", "now", "")]
        rows += [(c.path or "(model)", c.was, c.now, c.note) for c in self.changes]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        body = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in [*head, "", *body, *self.notes])


def convert(
    model: nn.Module,
    *,
    method: str = "TAT",
    activation: str = "leaky_relu",
    depth: int | None = None,
    subnet_max: Callable[[float, Callable[[float], float]], float] | None = None,
    zeta: float = 1.5,
    eta: float = 0.9,
    tau: float = 0.3,
    clamp: bool = False,
    sigma_b: float | None = None,
    spec: ActSpec | None = None,
    init: Method | None = "suo",
    generator: Generator | None = None,
    fuse: bool = True,
    replace: Sequence[type[nn.Module]] = (nn.ReLU,),
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strip_batchnorm: bool = False,
    on_untraceable: Literal["error", "report"] = "error",
    dry_run: bool = False,
    backend: Backend = "auto",
) -> Report:
    r"""Make a model a shaped vanilla network, in place: activations, fused layers, initialisation.

    * Every nn.ReLU becomes y = γ(φ(αx + β) + δ) with solved constants, and so does every
      ``F.relu(x)``, ``torch.relu(x)``, ``x.relu()`` and their in-place forms: a module that calls
      one gets a subclass of its class whose forward torch.fx wrote. In that forward Python's
      decisions are those of the conversion, but for ``self.training``. ReLUs written in other ways
      (``x.clamp(min=0)``) are not recognised.
    * An nn.Conv1d/2d/3d or nn.Linear whose every output goes to such an activation and nowhere else
      is fused with it. Where that is not certain, the activation stays by itself.
    * Every linear and convolution layer is initialised as the constants assume, trained ones and
      frozen ones too: load weights afterwards, or pass ``init=None``.

    Parameters stay the same objects under the same state_dict keys, and devices, dtypes, modes and
    requires_grad what they were. Convert before wrapping or compiling the model. If anything
    raises, the model is as it was. A model is converted once; parts of one can be converted one
    by one, each with its own constants.

    Args:
        model: the model.
        method: "TAT", "DKS" or "EOC", case-insensitive; see `fusedshape.theory`.
        activation: φ, a name of `fusedshape.ACTIVATIONS`.
        depth: nonlinear layers of a plain chain; default: counted, if the model is one.
        subnet_max: the network's wiring where branches join, as in `fusedshape.theory.solve`.
        zeta: target of DKS.
        eta: target of TAT for leaky_relu.
        tau: target of TAT for smooth activations.
        clamp: take the nearest reachable target instead of raising.
        sigma_b: EOC's standard deviation of biases; default: the theory's choice.
        spec: constants to use as they are; nothing is solved.
        init: "suo", "suo_full", "delta_orthogonal", "gaussian", or None to keep the weights. Even
            kernels have no centre tap and take "suo_full".
        generator: source of randomness for `init`; None takes torch's default.
        fuse: whether to fuse at all.
        replace: the classes to replace, with their functional forms; none that has parameters.
        filter_fn: called with each activation module and its qualified name, and for functional
            calls with the module that makes them; False leaves it alone.
        strip_batchnorm: replace BatchNorm by nn.Identity. Its state_dict keys vanish, and layers
            made without a bias stay without.
        on_untraceable: what to do about a module whose forward may call such an activation but
            cannot be traced faithfully (it branches on values or shapes, takes optional arguments,
            draws random numbers, keeps state, switches gradients or autocast): "error", or
            "report" to leave that call as it is.
        dry_run: change nothing, only report.
        backend: as in `fusedshape.ops.shaped_act`.

    Returns:
        What was done, row by row; print it.

    Raises:
        TypeError: model is no nn.Module, or spec no ActSpec.
        ValueError: a model that cannot be converted, or targets that cannot be met (see the
            message for the way out).

    Example:
        >>> layers = [layer for _ in range(16) for layer in (nn.Linear(8, 8), nn.ReLU())]
        >>> report = convert(nn.Sequential(*layers, nn.Linear(8, 2)))
        >>> report.depth, report.counts["fused"], report.counts["initialised"]
        (16, 16, 17)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    if on_untraceable not in ("error", "report"):
        raise ValueError(f"convert: on_untraceable={on_untraceable!r}; known: 'error', 'report'")
    _refuse(model, replace, strip_batchnorm, init)
    for device in sorted({p.device.type for p in model.parameters()} or {"cpu"}):
        reason = None if backend == "auto" else why_not(backend, device)
        if reason is not None:
            raise reason
    wiring = _Wiring(model, tuple(replace), filter_fn)
    wiring.check(strict=on_untraceable == "error")
    stripped = frozenset(m for m in model.modules() if isinstance(m, _BatchNorm))
    wiring.check_stripped(stripped)
    fusion = _Fusion(wiring, fuse, stripped)
    counted = _chain_depth(wiring)
    constants = _constants(
        method, activation, depth, subnet_max, zeta, eta, tau, clamp, sigma_b, spec, counted
    )
    plan = _Plan(wiring, fusion, constants, init, backend)
    if not dry_run:
        plan.apply(generator)
    return plan.report(dry_run)


def _refuse(
    model: nn.Module, replace: Sequence[type[nn.Module]], strip: bool, init: str | None
) -> None:
    """Raise if the model is of a kind that cannot be converted."""
    for wanted in replace:
        if not (isinstance(wanted, type) and issubclass(wanted, nn.Module)):
            raise TypeError(f"convert: replace must hold nn.Module classes, got {wanted!r}")
    if isinstance(model, tuple(replace)):
        raise ValueError(
            f"convert: the model is itself an {type(model).__name__} and cannot be replaced in "
            "place; make a fusedshape.nn.ShapedActivation of theory.solve's spec instead"
        )
    for path, module in model.named_modules():
        where = f"{path!r} is" if path else "the model is"
        kind = type(module).__name__
        if kind in _WRAPPERS:
            raise ValueError(
                f"convert: {where} a {kind}; convert the module inside, its .{_WRAPPERS[kind]}, "
                "before wrapping it"
            )
        if module.__dict__.get("_compiled_call_impl") is not None:
            raise ValueError(f"convert: {where} compiled already; convert first, then compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"convert: {where} a ScriptModule; convert the module it was made of")
        if isinstance(module, (*_SHAPED, _Rewritten)):
            raise ValueError(
                f"convert: {where} a {kind} already; a model is converted once (build it anew)"
            )
        if type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantiz")):
            raise ValueError(f"convert: {where} quantised ({kind}); convert the float model")
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if isinstance(module, LazyModuleMixin) or any(map(nn.parameter.is_lazy, tensors)):
            raise ValueError(
                f"convert: {where} a lazy {kind} without shape yet; run the model once first"
            )
        if any(t is not None and t.is_meta for t in tensors):
            raise ValueError(
                f"convert: {where} on the meta device; call model.to_empty(device=...) first"
            )
        if type(module) in replace and any(True for _ in module.parameters()):
            raise ValueError(f"convert: {where} a {kind}, whose parameters would be lost")
        _refuse_norm(path, module, strip)


def _refuse_norm(path: str, module: nn.Module, strip: bool) -> None:
    kind = type(module).__name__
    if isinstance(module, _BatchNorm) and not strip:
        raise ValueError(
            f"convert: {path!r} is a {kind}; normalisation undoes what shaped activations set up. "
            "Pass strip_batchnorm=True to replace BatchNorm by nn.Identity, or build the model "
            "without"
        )
    look_alike = "batchnorm" in kind.lower() and not isinstance(module, _BatchNorm)
    if isinstance(module, (_InstanceNorm, nn.GroupNorm)) or look_alike:
        raise ValueError(
            f"convert: {path!r} is a {kind}; normalisation undoes what shaped activations set up. "
            "Replace it by nn.Identity() and convert again"
        )


_GONE = object()
_TABLES = ("", "_parameters", "_buffers", "_modules")


class _UntraceableError(Exception):
    """Why a forward cannot be traced faithfully."""


class _Value(fx.Proxy):
    """A proxy that keeps in-place arithmetic in place, and does not stand for its type."""

    def _in_place(self, name: str, other: Any) -> Any:
        if _is_number(self.node):
            return NotImplemented
        return self.tracer.create_proxy("call_method", name, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place("add_", other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place("sub_", other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place("mul_", other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place("div_", other)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance() asks here, after its own quick test has failed.
        caller = inspect.currentframe()
        assert caller is not None
        assert caller.f_back is not None
        asker = str(caller.f_back.f_globals.get("__name__"))
        if asker.partition(".")[0] not in ("torch", "abc"):
            raise _UntraceableError("it asks for the type of a value (isinstance)")
        return _Value


class _Tracer(fx.Tracer):
    """Symbolic trace of one module, its children as leaves."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise _UntraceableError("it switches gradients off, which a trace would lose")
        return super().create_node(*args, **kwargs)


def _refusing(what: str) -> Callable[..., Any]:
    def enter(*args: Any) -> None:
        raise _UntraceableError(f"it uses {what}, which a trace would lose")

    return enter


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Put back, and complain about, what running a forward does besides computing."""
    held: list[tuple[str, Any]] = [("", vars(m)) for m in module.modules()]
    held += [(n, v) for _, own in held for n, v in own.items() if isinstance(v, (dict, list))]
    before = [_contents(container) for _, container in held]
    state = random.getstate(), torch.get_rng_state()
    kinds: tuple[Any, ...] = (torch.autocast, torch.autograd.graph.saved_tensors_hooks)
    kinds += (torch.no_grad, torch.enable_grad, torch.inference_mode)
    contexts = {cls: cls.__enter__ for cls in kinds}
    touched = ""
    try:
        for cls in contexts:
            cls.__enter__ = _refusing(cls.__name__)
        with torch.set_grad_enabled(True):
            yield
    finally:
        for cls, enter in contexts.items():
            cls.__enter__ = enter
        drew = random.getstate() != state[0] or not torch.equal(torch.get_rng_state(), state[1])
        random.setstate(state[0])
        torch.set_rng_state(state[1])
        for (name, container), old in zip(held, before, strict=True):
            new = _contents(container)
            for key in {**old, **new}:
                if new.get(key, _GONE) is not old.get(key, _GONE):
                    touched = touched or (str(key) if name in _TABLES else name)
            if isinstance(container, dict):
                container.clear()
                container.update(old)
            else:
                container[:] = old.values()
    if touched.startswith("_tensor_constant"):
        raise _UntraceableError("it makes tensors that do not depend on its input")
    if touched:
        raise _UntraceableError(f"it changes its attribute {touched}")
    if drew:
        raise _UntraceableError("it draws random numbers that steer it")


def _contents(container: dict[Any, Any] | list[Any]) -> dict[Any, Any]:
    return dict(container if isinstance(container, dict) else enumerate(container))


def _trace(module: nn.Module) -> tuple[fx.Graph, ...]:
    """Graphs of a module's forward: training's and evaluation's, or one where they agree."""
    forward = type(module).forward
    if "forward" in vars(module):
        raise _UntraceableError("its forward is set on the instance")
    cls = type(module)
    own = (cls.__reduce_ex__, cls.__reduce__) != (object.__reduce_ex__, object.__reduce__)
    if own or hasattr(cls, "__getnewargs_ex__"):
        raise _UntraceableError(f"{cls.__name__} pickles in its own way")
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise _UntraceableError(f"its forward takes *{parameter.name}")
        if parameter.default is not parameter.empty:
            raise _UntraceableError(
                f"its forward takes an optional argument, {parameter.name}, that may steer it"
            )
    graphs = []
    mode = module.training
    for training in (True, False):
        module.training = training
        try:
            with _undisturbed(module):
                graphs.append(_Tracer().trace(module))
        except _UntraceableError:
            raise
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise _UntraceableError(f"{type(error).__name__}: {line}") from error
        finally:
            module.training = mode
    for graph in graphs:
        for node in graph.nodes:
            node.type = None
    if _source(graphs[0])[0] == _source(graphs[1])[0]:
        del graphs[1]
    return tuple(graphs)


def _is_plain(module: nn.Module) -> bool:
    """Whether torch or this library wrote the module's forward, and its children are no matter."""
    forward = inspect.unwrap(type(module).forward)
    if forward is nn.Sequential.forward:
        return False
    return str(getattr(forward, "__module__", "")).startswith(("torch.nn.", "fusedshape.nn"))


@dataclass(eq=False)
class _Site:
    """One call of an activation to be replaced, in one graph."""

    owner: nn.Module
    node: fx.Node
    module: nn.Module | None  # None for a functional call
    layer: nn.Module | None = None  # the layer whose output it takes, seen through identities
    why: str = ""  # why it is not fused

    @property
    def input(self) -> fx.Node:
        found = self.node.args[0] if self.node.args else self.node.kwargs["input"]
        assert isinstance(found, fx.Node)
        return found

    @property
    def in_place(self) -> bool:
        if self.module is not None:
            return bool(getattr(self.module, "inplace", False))
        name = str(getattr(self.node.target, "__name__", self.node.target))
        return name.endswith("_") or bool(self.node.kwargs.get("inplace"))


class _Wiring:
    """What calls what in a model, as far as tracing can tell.

    Attributes:
        names: qualified name of every module, the first where there are several.
        acts: the activation modules to replace.
        graphs: graphs of every module that has a forward of its own and can be traced.
        opaque: the others, with the reason.
        unknown: modules that an opaque one may call in ways not known.
        calls: all known calls of each module, (owner, node).
        sites: all known calls of activations to be replaced.
    """

    def __init__(
        self,
        model: nn.Module,
        replace: tuple[type[nn.Module], ...],
        filter_fn: Callable[[str, nn.Module], bool] | None,
    ) -> None:
        self.model = model
        self.names: dict[nn.Module, str] = {m: n for n, m in model.named_modules()}
        self.filter_fn = filter_fn or (lambda name, module: True)
        self.kept: dict[nn.Module, bool] = {}
        self.words = {_FUNCTIONAL[cls] for cls in replace if cls in _FUNCTIONAL}
        self.words |= {word + "_" for word in self.words}
        self.functions: set[Any] = {
            getattr(home, word) for home in (F, torch) for word in self.words if hasattr(home, word)
        }
        self.acts = {m for m in self.names if _is_one_of(m, replace) and not self.keeps(m)}
        self.graphs: dict[nn.Module, tuple[fx.Graph, ...]] = {}
        self.opaque: dict[nn.Module, str] = {}
        self.unknown: set[nn.Module] = set()
        self.calls: dict[nn.Module, list[tuple[nn.Module, fx.Node]]] = {}
        self.sites: list[_Site] = []
        for module in self.names:
            has_forward = type(module).forward is not nn.Module.forward
            if not has_forward or _is_plain(module) or module in self.acts:
                continue
            try:
                self.graphs[module] = _trace(module)
            except _UntraceableError as error:
                self.opaque[module] = str(error)
                self.unknown |= _reached_by(module)
        for owner, graphs in self.graphs.items():
            for node in (node for graph in graphs for node in graph.nodes):
                called = self.called(owner, node)
                if called is not None:
                    self.calls.setdefault(called, []).append((owner, node))
                if called in self.acts or self._calls_function(owner, node):
                    self.sites.append(_Site(owner, node, called))

    def called(self, owner: nn.Module, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        if node.op != "call_module":
            return None
        return owner.get_submodule(str(node.target))

    def _calls_function(self, owner: nn.Module, node: fx.Node) -> bool:
        return self.is_functional(node) and not self.keeps(owner)

    def is_functional(self, node: fx.Node) -> bool:
        """Whether a node is an activation called as a function or method."""
        if node.op == "call_function":
            return node.target in self.functions
        return node.op == "call_method" and node.target in self.words

    def keeps(self, module: nn.Module) -> bool:
        """Whether the user wants a module's activations left alone."""
        if module not in self.kept:
            self.kept[module] = not self.filter_fn(self.names[module], module)
        return self.kept[module]

    def may_call(self, module: nn.Module) -> bool:
        """Whether a module that cannot be traced may call an activation as a function."""
        if not self.words:
            return False
        if getattr(module, "activation_relu_or_gelu", 0):
            return True  # nn.TransformerEncoderLayer's fast path, whatever its activation module
        if any(_contains(self.functions, value) for value in vars(module).values()):
            return True
        if _is_plain(module):
            return False
        kind: Any = type(module)
        trees = _reachable_code(kind)
        return trees is None or any(
            self._names_function(node, own, functions)
            for own, functions, tree in trees
            for node in ast.walk(tree)
        )

    def _names_function(self, node: ast.AST, own: str, scope: dict[str, Any]) -> bool:
        if isinstance(node, ast.Attribute):
            on_self = isinstance(node.value, ast.Name) and node.value.id == own
            return node.attr in self.words and not on_self
        return isinstance(node, ast.Name) and _contains(self.functions, scope.get(node.id))

    def check(self, strict: bool) -> None:
        """Raise where the graphs show something that cannot be converted.

        Args:
            strict: whether an opaque module that may call an activation is an error.
        """
        for module in self.names:
            reason = self.opaque.get(module, "its forward is torch's own")
            may_call = strict and module not in self.graphs and self.may_call(module)
            if may_call and not self.keeps(module):
                raise ValueError(
                    f"convert: {self.describe(module)} may call {self._forms()} in its forward, "
                    f"which cannot be traced: {reason}. Use an nn module for the activation "
                    "there, or pass on_untraceable='report' to leave that call as it is"
                )
        for owner, graphs in self.graphs.items():
            for node in (node for graph in graphs for node in graph.nodes):
                if node.target in _NORM_FUNCTIONS:
                    raise ValueError(
                        f"convert: {self.describe(owner)} calls F.{node.name}; normalisation "
                        "undoes what shaped activations set up, build the model without"
                    )
        self._check_in_place()
        if not self.sites and not self.acts:
            raise ValueError(
                "convert: found no activation to replace; looked for "
                f"{self._forms()} (see the arguments replace and filter_fn)"
            )

    def check_stripped(self, stripped: frozenset[nn.Module]) -> None:
        """Raise where a normalisation's output is changed in place, and would be its input then."""
        for norm in stripped:
            for owner, node in self.calls.get(norm, []):
                source = node.all_input_nodes[0]
                fresh = isinstance(self.called(owner, source), (nn.Linear, _ConvNd))
                for user in node.users:
                    name = str(getattr(user.target, "__name__", user.target))
                    called = self.called(owner, user)
                    changes = name.endswith("_") or bool(getattr(called, "inplace", False))
                    if called in self.acts or self.is_functional(user) or not changes:
                        continue
                    if not fresh or len(source.users) > 1:
                        raise ValueError(
                            f"convert: {self.describe(owner)} changes the output of "
                            f"{self.describe(norm)} in place ({user.name}), which without the "
                            "BatchNorm is its input; write it out of place"
                        )

    def describe(self, module: nn.Module) -> str:
        """A module's name and class, for messages."""
        name = self.names[module]
        return f"{name!r} ({type(module).__name__})" if name else f"{type(module).__name__}"

    def _forms(self) -> str:
        return ", ".join(sorted(w for w in self.words if not w.endswith("_"))) or "modules only"

    def _check_in_place(self) -> None:
        """Raise if an in-place activation changes a tensor that is used again afterwards.

        A shaped activation makes a new tensor, so the later use would see the old values.
        """
        overwrites: dict[fx.Node, str] = {
            site.node: f"{self.describe(site.owner)} activates in place ({site.node.name})"
            for site in self.sites
            if site.in_place
        }
        # Parents after their children: a child that overwrites its input makes its call in place.
        for owner in sorted(self.graphs, key=lambda m: -self._height(m)):
            for graph in self.graphs[owner]:
                roots = _roots(graph, overwrites, self, owner)
                order = {node: i for i, node in enumerate(graph.nodes)}
                for node in graph.nodes:
                    if node not in overwrites:
                        continue
                    hit = {roots[a] for a in _tensor_args(node)}
                    for other, root in roots.items():
                        later = [
                            u
                            for u in other.users
                            if order[u] > order[node] and not _is_query(u) and other is not node
                        ]
                        if root in hit and later:
                            raise ValueError(
                                f"convert: {overwrites[node]} a tensor that is used again "
                                f"afterwards (by {later[0].name}), which would now see other "
                                "values; make it inplace=False, and assign the result"
                            )
                    if any(root.op == "placeholder" for root in hit):
                        for _, call in self.calls.get(owner, []):
                            overwrites[call] = overwrites[node]

    def _height(self, module: nn.Module) -> int:
        return self.names[module].count(".") + bool(self.names[module])


def _is_one_of(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(module, c) and type(module).forward is c.forward for c in classes)


def _contains(functions: set[Any], value: Any) -> bool:
    return callable(value) and getattr(value, "__hash__", None) is not None and value in functions


def _tensor_args(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, as often as they occur."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _is_query(node: fx.Node) -> bool:
    """Whether a node asks for a shape or the like, and so makes no tensor."""
    name = node.args[1] if node.target is getattr else node.target
    return node.op in ("call_method", "call_function") and name in _SHAPE_QUERIES


def _is_number(node: fx.Node) -> bool:
    """Whether a node's value comes from such questions alone."""
    inputs = node.all_input_nodes
    return _is_query(node) or (bool(inputs) and all(map(_is_number, inputs)))


def _roots(
    graph: fx.Graph, overwrites: dict[fx.Node, str], wiring: _Wiring, owner: nn.Module
) -> dict[fx.Node, fx.Node]:
    """For each node, the one whose memory it may share."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", node.target)
        function = node.op in ("call_method", "call_function")
        alias = function and (name in _ALIASES or str(name).endswith("_")) and not _is_query(node)
        alias = alias or isinstance(wiring.called(owner, node), _ALIAS_MODULES)
        args = node.all_input_nodes
        shared = alias and bool(args) and node not in overwrites
        roots[node] = roots[args[0]] if shared else node
    return roots


_Code = tuple[str, dict[str, Any], ast.AST]


@functools.cache
def _reachable_code(cls: Any) -> tuple[_Code, ...] | None:
    """Syntax trees of forward and all it reaches outside torch; None if there is no source.

    Each with the name of its self ("" for functions) and its globals.
    """
    queue: list[tuple[Any, bool]] = [(cls.forward, True)]
    seen: set[Any] = set()
    found: list[_Code] = []
    while queue:
        function, bound = queue.pop()
        function = inspect.unwrap(function)
        if function in seen:
            continue
        seen.add(function)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            return None
        scope = function.__globals__
        own = next(iter(inspect.signature(function).parameters), "") if bound else ""
        found.append((own, scope, tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                method = inspect.getattr_static(cls, node.attr, None)
                if own and node.value.id == own and inspect.isfunction(method):
                    queue.append((method, True))
            elif isinstance(node, ast.Name) and inspect.isfunction(scope.get(node.id)):
                queue.append((scope[node.id], False))
        queue = [
            (f, b)
            for f, b in queue
            if str(getattr(f, "__module__", "")).partition(".")[0] != "torch"
        ]
    return tuple(found)


def _reached_by(module: nn.Module) -> set[nn.Module]:
    """Modules below an untraceable one that it may call itself.

    Where its source only ever calls a child, ``self.child(…)``, what is inside that child is left
    to the child's own forward.
    """
    inside = {name: set(child.modules()) for name, child in module.named_children()}
    everything = set().union(*inside.values())
    kind: Any = type(module)
    trees = _reachable_code(kind)
    if trees is None or "forward" in vars(module):
        return everything
    reached = set(module.children())
    for own, _, tree in trees:
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Name) and node.id in (own, "super")):
                continue
            access = parents[node]
            if not isinstance(access, ast.Attribute):
                return everything
            called = parents.get(access)
            is_call = isinstance(called, ast.Call) and called.func is access
            if access.attr in inside:
                reached |= set() if is_call else inside[access.attr]
            else:
                found = inspect.getattr_static(kind, access.attr, None)
                if hasattr(nn.Module, access.attr) or not (
                    found is None or inspect.isfunction(found)
                ):
                    return everything
    return reached


class _Fusion:
    """Which activation joins which layer.

    Attributes:
        layers: the layers to fuse.
        merged: activation modules all of whose calls are fused, so that nothing is left to do.
        rewritten: modules whose forward must be written anew.
    """

    def __init__(self, wiring: _Wiring, fuse: bool, stripped: frozenset[nn.Module]) -> None:
        self.wiring = wiring
        self.stripped = stripped
        self.merged: set[nn.Module] = set()
        self.of_module: dict[nn.Module | None, list[_Site]] = {}
        by_node = {site.node: site for site in wiring.sites}
        of_layer: dict[nn.Module, list[_Site]] = {}
        rejected: dict[nn.Module, str] = {}
        for site in wiring.sites:
            self.of_module.setdefault(site.module, []).append(site)
            site.layer, site.why = self._layer_before(site)
            if site.layer is not None and not fuse:
                rejected[site.layer] = "fuse=False"
        for layer in {site.layer for site in wiring.sites if site.layer is not None}:
            reason = rejected.get(layer) or self._why_never(layer)
            of_layer[layer] = []
            for owner, node in wiring.calls[layer]:
                after = self._consumer(owner, node)
                if after in by_node and by_node[after].input is self._last(owner, node):
                    of_layer[layer].append(by_node[after])
                else:
                    reason = reason or "another call or use of the layer wants its plain output"
            if reason:
                rejected[layer] = reason
        live = set(of_layer) - set(rejected)
        while True:
            self.merged = {m for m in wiring.acts if self._all_fused(m, live)}
            stuck = {
                layer: why
                for layer in live
                for why in [next(filter(None, map(self._why_kept, of_layer[layer])), "")]
                if why
            }
            if not stuck:
                break
            rejected |= stuck
            live -= set(stuck)
        self.layers = live
        for site in wiring.sites:
            if site.layer is not None and site.layer not in live:
                site.why = rejected[site.layer]
        self.rewritten = {
            site.owner
            for site in wiring.sites
            if site.module is None or (not site.why and site.module not in self.merged)
        }

    def _passes(self, owner: nn.Module, node: fx.Node) -> bool:
        """Whether a node is, or will be, an identity that nobody watches."""
        called = self.wiring.called(owner, node)
        if called is None or _hooked(called):
            return False
        return type(called) is nn.Identity or called in self.stripped

    def _layer_before(self, site: _Site) -> tuple[nn.Module | None, str]:
        node = site.input
        while self._passes(site.owner, node):
            node = node.all_input_nodes[0]
        called = self.wiring.called(site.owner, node)
        if isinstance(called, (nn.Linear, _ConvNd)):
            return called, ""
        if node.op == "placeholder":
            return None, "its input comes from outside the module that calls it"
        what = type(called).__name__ if called is not None else node.name
        return None, f"its input comes from {what}"

    def _last(self, owner: nn.Module, node: fx.Node) -> fx.Node:
        """The last of the identities after a layer's call."""
        while len(node.users) == 1 and self._passes(owner, next(iter(node.users))):
            node = next(iter(node.users))
        return node

    def _consumer(self, owner: nn.Module, node: fx.Node) -> fx.Node | None:
        users = list(self._last(owner, node).users)
        return users[0] if len(users) == 1 else None

    def _why_never(self, layer: nn.Module) -> str:
        kind = type(layer)
        if kind not in _TWINS:
            return f"{kind.__name__} has no fused form"
        if _hooked(layer):
            return "the layer has hooks, which would see the activated output"
        if "forward" in vars(layer) or layer._parameters.get("weight") is None:
            return "the layer's forward or weight is not the plain one"
        if layer in self.wiring.unknown:
            return "a module that cannot be traced may use the layer's plain output"
        return ""

    def _all_fused(self, module: nn.Module, live: set[nn.Module]) -> bool:
        sites = self.of_module.get(module, [])
        known = module not in self.wiring.unknown and not _hooked(module)
        return bool(sites) and known and all(site.layer in live for site in sites)

    def _why_kept(self, site: _Site) -> str:
        """Why a call of an activation cannot be dropped; "" if it can."""
        if site.module is None or site.module in self.merged:
            return ""
        if _hooked(site.module):
            return "the activation has hooks"
        if _is_sequential(site.owner):
            return "the activation is shared with other places"
        return ""


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def _is_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


class _NotAChainError(Exception):
    """Why the depth cannot be read off a model."""


def _chain_depth(wiring: _Wiring) -> int | str:
    """Activations on the longest path of a model in which no two branches join, or why not."""
    sites = {site.node for site in wiring.sites}

    @functools.cache
    def of_module(module: Any) -> int:
        if module in wiring.graphs:
            return max(of_graph(module, graph) for graph in wiring.graphs[module])
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            raise _NotAChainError(f"{wiring.describe(module)} is recurrent")
        opaque = module in wiring.opaque or any(True for _ in module.children())
        if opaque and (wiring.acts & set(module.modules()) or wiring.may_call(module)):
            why = wiring.opaque.get(module, "torch wrote it")
            raise _NotAChainError(f"{wiring.describe(module)} cannot be traced: {why}")
        return 0

    def of_graph(owner: nn.Module, graph: fx.Graph) -> int:
        depths: dict[fx.Node, int | None] = {}
        for node in graph.nodes:
            args = [depths[a] for a in _tensor_args(node)]
            data = [d for d in args if d is not None]
            if node.op == "placeholder":
                depths[node] = 0
            elif not data or _is_query(node):
                depths[node] = None
            elif node.op == "output":
                return max(data)
            elif len(data) > 1:
                raise _NotAChainError(f"branches join in {wiring.describe(owner)} ({node.name})")
            else:
                called = wiring.called(owner, node)
                if node in sites:
                    depths[node] = data[0] + 1
                else:
                    depths[node] = data[0] + (0 if called is None else of_module(called))
        return 0

    try:
        return of_module(wiring.model)
    except _NotAChainError as error:
        return str(error)


@dataclass(frozen=True)
class _Constants:
    method: str
    spec: ActSpec
    gain: float = 1.0
    bias_std: float = 0.0
    depth: int | None = None
    notes: tuple[str, ...] = ()


def _constants(
    method: str,
    activation: str,
    depth: int | None,
    subnet_max: Callable[[float, Callable[[float], float]], float] | None,
    zeta: float,
    eta: float,
    tau: float,
    clamp: bool,
    sigma_b: float | None,
    spec: ActSpec | None,
    counted: int | str,
) -> _Constants:
    """Solve for the constants, at the depth counted where none is given."""
    name = str(method).upper()
    if name not in _METHODS:
        raise ValueError(f"convert: unknown method {method!r}; known: {', '.join(_METHODS)}")
    chain = counted if isinstance(counted, int) else None
    has_wiring = depth is not None or subnet_max is not None
    if spec is not None:
        if not isinstance(spec, ActSpec):
            raise TypeError(f"convert: spec must be an ActSpec, got {type(spec).__name__}")
        if has_wiring or sigma_b is not None:
            raise ValueError("convert: spec is ready; drop depth, subnet_max and sigma_b")
        return _Constants("given", spec, depth=chain)
    if name == "EOC":
        if has_wiring:
            raise ValueError("convert: EOC knows no depth; drop depth and subnet_max")
        edge = theory.eoc(activation, sigma_b=sigma_b)
        return _Constants(name, edge.spec, edge.sigma_w, edge.sigma_b, chain)
    if sigma_b is not None:
        raise ValueError(f"convert: sigma_b={sigma_b} belongs to EOC; {name} starts biases at 0")
    notes: tuple[str, ...] = ()
    if not has_wiring:
        if isinstance(counted, str):
            raise ValueError(
                f"convert: cannot count the model's depth: {counted}. Pass depth= (nonlinear "
                "layers of a plain chain) or subnet_max= (see fusedshape.theory.solve)"
            )
        depth = counted
    elif isinstance(counted, int) and depth not in (None, counted):
        notes = (f"depth={depth} was given; the model's longest path has {counted}",)
    solved = theory.solve(
        name,
        activation,
        depth=depth,
        subnet_max=subnet_max,
        zeta=zeta,
        eta=eta,
        tau=tau,
        clamp=clamp,
    )
    return _Constants(name, solved, depth=chain if depth is None else depth, notes=notes)


class _Rewritten:
    """Marks classes made by `_subclass`."""

    __slots__ = ()


def _source(graph: fx.Graph) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """Source of a graph as a function `forward`, and the globals it needs besides fx's usual."""
    code = graph.python_code("self")
    extra = {k: v for k, v in code.globals.items() if k not in _usual_globals()}
    return code.src.strip() + "\n", tuple(sorted(extra.items()))


@functools.cache
def _usual_globals() -> dict[str, Any]:
    return dict(fx.Graph().python_code("self").globals)


@functools.cache
def _subclass(
    base: Any, sources: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
) -> type[nn.Module]:
    """Subclass of a module's class with another forward: one source, or training's and eval's.

    The same arguments give the same class, so that equal modules go on sharing compiled code.
    """
    forwards = []
    for source, extra in sources:
        scope = {**_usual_globals(), **dict(extra), "__name__": base.__module__}
        file = f"<fusedshape.convert {base.__qualname__} {abs(hash(source))}>"
        # So that tracebacks and inspect.getsource show it.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec"), scope)
        forwards.append(scope["forward"])

    def by_mode(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forwards[0 if self.training else 1](self, *args, **kwargs)

    forward: Any = forwards[0] if len(forwards) == 1 else by_mode
    forward.__doc__ = base.forward.__doc__
    forward.__signature__ = inspect.signature(base.forward)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        # The class has no importable name; what it was made of has.
        _, arguments, *rest = tuple(object.__reduce_ex__(self, max(2, protocol)))
        return (_revive, (base, sources, *arguments[1:]), *rest)

    namespace = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__reduce_ex__": reduce_ex,
        "forward": forward,
    }
    return types.new_class(
        f"Shaped{base.__name__}", (base, _Rewritten), exec_body=lambda ns: ns.update(namespace)
    )


def _revive(base: Any, sources: Any, *arguments: Any) -> nn.Module:
    cls = _subclass(base, sources)
    return cls.__new__(cls, *arguments)


@dataclass
class _Rewrite:
    cls: type[nn.Module]
    children: dict[str, nn.Module]


class _Plan:
    """All that will be done to a model, made before anything is."""

    def __init__(
        self,
        wiring: _Wiring,
        fusion: _Fusion,
        constants: _Constants,
        init: Method | None,
        backend: Backend,
    ) -> None:
        self.wiring = wiring
        self.fusion = fusion
        self.constants = constants
        self.init = init
        self.backend = backend
        self.swaps: dict[nn.Module, nn.Module] = {}
        self.rewrites: dict[nn.Module, _Rewrite] = {}
        self.rows: list[Change] = []
        self.notes = list(constants.notes)
        self.layers: list[tuple[nn.Module, Method]] = []
        self.counts = Counter({"fused": 0, "shaped": 0, "rewritten": 0, "stripped": 0})
        for module in wiring.names:
            self._plan_module(module)
        self._plan_init()
        self._check_held()
        order = {name: i for i, name in enumerate(wiring.names.values())}
        self.rows.sort(key=lambda row: order[row.path])

    def _plan_module(self, module: nn.Module) -> None:
        fusion, wiring, spec = self.fusion, self.wiring, self.constants.spec
        if module in fusion.layers:
            self._swap(module, _TWINS[type(module)].from_plain(module, spec, self.backend))
            self.counts["fused"] += 1
        elif module in fusion.merged:
            self._swap(module, _like(module, nn.Identity()), "fused into the layer before")
        elif module in wiring.acts:
            whys = dict.fromkeys(s.why for s in fusion.of_module.get(module, []) if s.why)
            why = "; ".join(whys) or "no call of it was traced"
            self._swap(module, _like(module, self._activation()), f"not fused: {why}")
            self.counts["shaped"] += 1
        elif module in fusion.stripped:
            self._swap(module, _like(module, nn.Identity()), "BatchNorm stripped")
            self.counts["stripped"] += 1
        elif module in fusion.rewritten:
            self._rewrite(module)
        elif module in wiring.opaque:
            left = " and may call activations that stay as they are"
            note = f"not traced: {wiring.opaque[module]}"
            self._skip(module, note + (left if wiring.may_call(module) else ""))
        elif module not in wiring.graphs and wiring.may_call(module):
            self._skip(module, "torch's own forward may call activations, which stay as they are")
        elif wiring.kept.get(module):
            self._skip(module, "left alone by filter_fn")
        elif type(module) in _FUNCTIONAL:
            self._skip(module, "not among the classes to replace")

    def _activation(self) -> ShapedActivation:
        return ShapedActivation(self.constants.spec, self.backend)

    def _swap(self, old: nn.Module, new: nn.Module, note: str = "") -> None:
        self.swaps[old] = new
        names = type(old).__name__, type(new).__name__
        self.rows.append(Change(self.wiring.names[old], *names, note))

    def _skip(self, module: nn.Module, note: str) -> None:
        kind = type(module).__name__
        self.rows.append(Change(self.wiring.names[module], kind, kind, note))

    def _rewrite(self, owner: nn.Module) -> None:
        """Write an owner's forward without its fused calls, and functional ones as modules."""
        children: dict[str, nn.Module] = {}
        whys: list[str] = []
        for graph in self.wiring.graphs[owner]:
            names = (f"shaped_{i}" for i in range(10**6))
            free = (name for name in names if not hasattr(owner, name))
            for site in [s for s in self.wiring.sites if s.node.graph is graph]:
                node = site.node
                if not site.why:
                    new = site.input
                elif site.module is None:
                    name = next(free)
                    if name not in children:
                        children[name] = self._activation().train(owner.training)
                        whys.append(f".{name} not fused: {site.why}")
                    with graph.inserting_before(node):
                        new = graph.call_module(name, (site.input,))
                else:
                    continue
                node.replace_all_uses_with(new)
                graph.erase_node(node)
        sources = tuple(_source(graph) for graph in self.wiring.graphs[owner])
        base: Any = type(owner)
        cls = _subclass(base, sources)
        self.rewrites[owner] = _Rewrite(cls, children)
        self.counts["rewritten"] += 1
        self.counts["shaped"] += len(children)
        kinds = type(owner).__name__, cls.__name__
        note = "; ".join(["forward rewritten", *whys])
        self.rows.append(Change(self.wiring.names[owner], *kinds, note))

    def _plan_init(self) -> None:
        no_bias = even = 0
        for module in self.wiring.names:
            if not isinstance(module, (nn.Linear, _ConvNd)):
                continue
            no_bias += module.bias is None
            if self.init is None:
                continue
            if parametrize.is_parametrized(module) or module._parameters.get("weight") is None:
                self._skip(module, "not initialised: its weight is computed from other tensors")
                continue
            method = self.init
            if method in ("suo", "delta_orthogonal") and _lacks_centre(module, method):
                method = "suo_full"
                even += 1
            self.layers.append((module, method))
        self.counts["initialised"] = len(self.layers)
        self.counts["skipped"] = sum(row.now == row.was for row in self.rows)
        if even:
            self.notes.append(f"{even} layer(s) with an even kernel took suo_full, not {self.init}")
        if self.counts["stripped"]:
            self.notes.append(
                f"{self.counts['stripped']} BatchNorm layer(s) are nn.Identity now: their keys are "
                f"gone from the state_dict, and {no_bias} layer(s) have no bias (make them with "
                "bias=True to have one)"
            )

    def _check_held(self) -> None:
        """Raise where replacing a module would leave the old one in use."""
        for module in self.wiring.names:
            for name, value in vars(module).items():
                if name == "_modules" or not isinstance(value, (list, tuple, dict)):
                    continue
                held = value.values() if isinstance(value, dict) else value
                if any(isinstance(item, nn.Module) and item in self.swaps for item in held):
                    raise ValueError(
                        f"convert: {self.wiring.describe(module)} keeps modules in a plain "
                        f"{type(value).__name__}, .{name}, which would go on holding the old "
                        "ones; make it an nn.ModuleList or nn.ModuleDict"
                    )

    def apply(self, generator: Generator | None) -> None:
        """Change the model; if initialising fails, put its weights back and raise."""
        saved: list[tuple[Tensor, Tensor]] = []
        try:
            for module, method in self.layers:
                saved += [(p, p.detach().clone()) for p in module.parameters(recurse=False)]
                gain, bias_std = self.constants.gain, self.constants.bias_std
                init_module_(module, method, gain, bias_std, generator)
        except Exception:
            with torch.no_grad():
                for parameter, value in reversed(saved):
                    parameter.copy_(value)
            raise
        for parent in self.wiring.names:
            for name, child in parent._modules.items():
                if child in self.swaps:
                    parent._modules[name] = self.swaps[child]
        for owner, rewrite in self.rewrites.items():
            for name, child in rewrite.children.items():
                owner.add_module(name, child)
            owner.__class__ = rewrite.cls

    def report(self, dry_run: bool) -> Report:
        """Say what was planned."""
        return Report(
            method=self.constants.method,
            spec=self.constants.spec,
            depth=self.constants.depth,
            init=self.init,
            dry_run=dry_run,
            changes=tuple(self.rows),
            notes=tuple(self.notes),
            counts=dict(self.counts),
        )


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give a replacement the mode and the hooks of what it replaces."""
    new.training = old.training
    for name in (*_HOOKS, *_HOOK_FLAGS):
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    return new


def _lacks_centre(module: nn.Linear | _ConvNd, method: str) -> bool:
    if isinstance(module, nn.Linear):
        return False
    spread = isinstance(module, _ConvTransposeNd) and method == "suo"
    pairs = zip(module.kernel_size, module.stride, strict=True)
    return any(k % 2 == 0 and not (spread and s > 1) for k, s in pairs)
