"""convert: puts shaped activations, fused layers and their initialisers into a user's model.

Reading comes first and changes nothing: `Calls` traces every forward with torch.fx, and `Fusion`
decides from the graphs which activation joins which layer. `Plan` holds what follows from that;
its `apply` is the only place that touches the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Generator, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from fusedshape import theory
from fusedshape.activations import ACTIVATIONS
from fusedshape.convert.calls import Calls, refuse_wrapped
from fusedshape.convert.fusion import Fusion
from fusedshape.convert.plan import Constants, Plan
from fusedshape.convert.positions import unread_positions
from fusedshape.convert.report import Change, Report
from fusedshape.faithful import inputs_for, unfaithful
from fusedshape.init import Method
from fusedshape.kinds import FusedLayer
from fusedshape.nn import ShapedActivation, ShapedChain
from fusedshape.ops.dispatch import Backend, why_not
from fusedshape.rewriting import Rewritten
from fusedshape.spec import ActSpec
from fusedshape.tracing import behind_norm
from fusedshape.undo import UndoLog, all_or_nothing
from fusedshape.validate import choice, flag, integer, number, shown

__all__ = ["Change", "Report", "convert"]

_SHAPED = (ShapedActivation, ShapedChain, FusedLayer)
_GROWTH = 1.05  # of q in one sum, from which on it is worth a word
_METHODS = ("TAT", "DKS", "EOC")


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
    chain: bool | int = False,
    example: Any = None,
) -> Report:
    r"""Make a model a shaped vanilla network, in place: activations, fused layers, initialisation.

    * Every nn.ReLU becomes y = γ(φ(αx + β) + δ) with solved constants, and so does every
      ``F.relu(x)``, ``torch.relu(x)``, ``x.relu()`` and their in-place forms: a module that calls
      one gets a subclass of its class whose forward torch.fx wrote. In that forward Python's
      decisions are those of the conversion, but for ``self.training``. ReLUs written in other ways
      (``x.clamp(min=0)``) are not recognised.
    * An nn.Conv1d/2d/3d or nn.Linear whose every output goes to such an activation and nowhere else
      is fused with it, in whatever modules the two stand: a module that ends with the layer then
      gives what is activated. Where that is not certain, the activation stays by itself. A fused
      layer is no nn.Linear by class; where its activation stood an nn.Identity stays (``fused_0``
      for a function), which tells `fusedshape.unfuse` where to put it back.
    * Every linear and convolution layer is initialised as the constants assume, trained ones and
      frozen ones too: load weights afterwards, or pass ``init=None``.

    * What changes an activation's output in place (``y += x``, ``nn.Dropout(inplace=True)``), which
      backward may need, works out of place afterwards, and is refused where that would be seen.

    Parameters stay the same objects under the same state_dict keys, and devices, dtypes, modes and
    requires_grad what they were. Convert before wrapping or compiling the model. If anything
    raises, the model is as it was. A model is converted once; parts of one can be converted one
    by one, each with its own constants.

    Args:
        model: the model.
        method: "TAT", "DKS" or "EOC", case-insensitive; see `fusedshape.theory`.
        activation: φ, a name of `fusedshape.ACTIVATIONS`.
        depth: nonlinear layers of a plain chain; default: the wiring is read off the model, see
            `fusedshape.theory.trace_wiring`.
        subnet_max: the network's wiring, as in `fusedshape.theory.solve`, in place of depth.
        zeta: target of DKS.
        eta: target of TAT for leaky_relu.
        tau: target of TAT for smooth activations.
        clamp: take the nearest reachable target instead of raising.
        sigma_b: EOC's standard deviation of biases; default: the theory's choice.
        spec: constants to use as they are; nothing is solved.
        init: "suo", "suo_full", "delta_orthogonal", "gaussian", or None to keep the weights. Even
            kernels have no centre tap and take "suo_full". "delta_orthogonal" keeps norms; layers
            in which q would fall by that, because they have more outputs than inputs or are
            transposed and strided, take "suo" instead, as the report says.
        generator: source of randomness for `init`; None takes torch's default.
        fuse: whether to fuse at all.
        replace: the classes to replace, with their functional forms; none that has parameters.
        filter_fn: called with each activation module and its qualified name, and for functional
            calls with the module that makes them; False leaves it alone.
        strip_batchnorm: replace BatchNorm by nn.Identity, or by what its own forward calls on what
            it has normalised. Its state_dict keys vanish, and layers made without a bias stay
            without.
        on_untraceable: what to do about a module whose forward may call such an activation but
            cannot be traced faithfully (it branches on values or shapes, takes optional arguments,
            draws random numbers, keeps state, switches gradients or autocast): "error", or
            "report" to leave that call as it is.
        dry_run: change nothing, only report.
        backend: as in `fusedshape.ops.shaped_act`.
        chain: whether nn.Sequential containers that hold fused layers in a row become
            `fusedshape.nn.ShapedChain`, in place; a number is the layers of one autograd node at
            most. The report says which layers are in a row, and why others are not.
        example: an input of the model, or a tuple of them; default: small random ones that fit its
            first layers. The traced forwards are run on it, compared with the model's own, and
            refused where they differ; the report says if no input was found.

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
    for name, value in (("fuse", fuse), ("strip_batchnorm", strip_batchnorm), ("dry_run", dry_run)):
        flag("convert", name, value)
    flag("convert", "clamp", clamp)
    for name, target in (("zeta", zeta), ("eta", eta), ("tau", tau)):
        number("convert", name, target)
    if depth is not None:
        integer("convert", "depth", depth, 1)
    if init is not None and (not isinstance(init, str) or init not in get_args(Method)):
        known = ", ".join(get_args(Method))
        raise ValueError(f"convert: init: unknown method {shown(init)}; known: {known}")
    choice("convert", "activation", activation, ACTIVATIONS)
    if not isinstance(on_untraceable, str) or on_untraceable not in ("error", "report"):
        raise ValueError(f"convert: on_untraceable={on_untraceable!r}; known: 'error', 'report'")
    if not isinstance(chain, int) or (chain is not False and chain < 1):
        raise ValueError(f"convert: chain={chain!r} must be True, False or a positive integer")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"convert: filter_fn must be callable or None, got {filter_fn!r}")
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"convert: generator must be a torch.Generator or None, got {generator!r}")
    _refuse(model, replace, strip_batchnorm, init)
    for device in sorted({p.device.type for p in model.parameters()} or {"cpu"}):
        reason = None if backend == "auto" else why_not(backend, device)
        if reason is not None:
            raise reason

    def change(log: UndoLog) -> Report:
        for path, module in model.named_modules():
            log.module(module, path)
        log.generator(torch.default_generator)  # a filter_fn may draw
        calls = Calls(model, tuple(replace), filter_fn, _stripped(model))
        calls.check(strict=on_untraceable == "error")
        unchecked = _compare(calls, example)
        fusion = Fusion(calls, fuse)
        wired = theory.trace_wiring(model, strip_batchnorm=strip_batchnorm)
        constants = _constants(
            method, activation, depth, subnet_max, zeta, eta, tau, clamp, sigma_b, spec, wired
        )
        more = _unread(wired) + _drifts(wired) + _grows(wired, constants.spec)
        constants = dataclasses.replace(constants, notes=constants.notes + more + unchecked)
        plan = Plan(calls, fusion, constants, init, backend, chain)
        named = [(calls.names[layer], layer, method) for layer, method in plan.layers]
        plan.notes += unread_positions(wired, named)
        report = plan.report(dry_run)
        if not dry_run:
            plan.apply(log, generator)
        return report

    return all_or_nothing(change)


def _compare(calls: Calls, example: Any) -> tuple[str, ...]:
    """Raise where a traced forward is not the model's own; a note if no input was found."""
    args = inputs_for(calls.model, example)
    if args is None:
        return (
            "no input was found on which to compare the traced forwards with the model's own; "
            "pass example=",
        )
    graphs = {m: g for m, g in calls.graphs.items() if m not in calls.stripped}
    found = unfaithful(calls.model, graphs, args)
    if found is not None:
        module, difference = found
        raise ValueError(
            f"convert: {calls.describe(module)} cannot be followed: traced, its forward gives "
            f"{difference}. It takes a decision that a trace does not see, for instance by the "
            "type of a value in a helper; make that a decision of the constructor"
        )
    return ()


def _refuse(
    model: nn.Module, replace: Sequence[type[nn.Module]], strip: bool, init: str | None
) -> None:
    """Raise if the model is of a kind that cannot be converted."""
    if not isinstance(replace, Sequence) or isinstance(replace, (str, bytes)):
        raise TypeError(f"convert: replace must be a sequence of classes, got {replace!r}")
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
        refuse_wrapped("convert", path, module)
        written = isinstance(module, Rewritten) and module.written_by == "Shaped"
        if written or isinstance(module, _SHAPED):
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
            "Pass strip_batchnorm=True to take BatchNorm out, or build the model without"
        )
    look_alike = "batchnorm" in kind.lower() and not isinstance(module, _BatchNorm)
    if isinstance(module, (_InstanceNorm, nn.GroupNorm)) or look_alike:
        inside = module._modules.keys()
        rest = f"its {', '.join(inside)}" if inside else "nn.Identity()"
        raise ValueError(
            f"convert: {path!r} is a {kind}; normalisation undoes what shaped activations set up. "
            f"Replace it by {rest} and convert again"
        )


def _stripped(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """The normalisations to take out, and which of its children each calls in a row afterwards."""
    found: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            row = behind_norm(module)
            if row is None:
                raise ValueError(
                    f"convert: {path!r} is a {type(module).__name__}, a BatchNorm whose own "
                    "forward does more than call children on what it has normalised; replace it "
                    "by what it does besides normalising"
                )
            found[module] = row
    return found


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
    wired: theory.Wiring,
) -> Constants:
    """Solve for the constants, for the wiring read off the model where none is given."""
    name = method.upper() if isinstance(method, str) else ""
    if name not in _METHODS:
        raise ValueError(f"convert: unknown method {shown(method)}; known: {', '.join(_METHODS)}")
    unread = any(wired.nodes[i].op == "unknown" for i in wired.live)
    counted = None if unread else wired.depth
    if counted == 0:
        raise ValueError(
            "convert: no activation lies between the model's inputs and its outputs, those that it "
            "has are never called"
        )
    has_wiring = depth is not None or subnet_max is not None
    if spec is not None:
        if not isinstance(spec, ActSpec):
            raise TypeError(f"convert: spec must be an ActSpec, got {type(spec).__name__}")
        if has_wiring or sigma_b is not None:
            raise ValueError("convert: spec is ready; drop depth, subnet_max and sigma_b")
        return Constants("given", spec, depth=counted)
    if name == "EOC":
        if has_wiring:
            raise ValueError("convert: EOC knows no depth; drop depth and subnet_max")
        edge = theory.eoc(activation, sigma_b=sigma_b)
        return Constants(name, edge.spec, edge.sigma_w, edge.sigma_b, counted)
    if sigma_b is not None:
        raise ValueError(f"convert: sigma_b={sigma_b} belongs to EOC; {name} starts biases at 0")
    notes: tuple[str, ...] = ()
    if not has_wiring:
        if wired.problems:
            problem = wired.problems[0]
            learnt = [n for n in wired.notes if " learnt weight" in n and " is a sum " in problem]
            hint = f". {learnt[0]}: it counts as a weight, so set it to 1 first" if learnt else ""
            raise ValueError(f"convert: cannot read the model's wiring: {problem}{hint}")
        subnet_max, notes = wired, wired.notes
    elif counted is not None and depth not in (None, counted):
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
    return Constants(name, solved, depth=counted if depth is None else depth, notes=notes)


def _unread(wired: theory.Wiring) -> tuple[str, ...]:
    """Notes on the places at which a wiring read off the model would have been refused.

    They are there only where the constants do not come from it.
    """
    return tuple(
        "the constants do not know of this, and what they assume need not hold: "
        + problem.partition("; pass depth=")[0]
        for problem in wired.problems
    )


def _grows(wired: theory.Wiring, spec: ActSpec) -> tuple[str, ...]:
    """A note on sums whose terms have means, which add up."""
    carries: dict[int, bool] = {}
    grown: list[tuple[str, float]] = []
    mean = theory.c_map(spec, 0.0)
    for i in wired.live:
        node = wired.nodes[i]
        carries[i] = node.op == "nonlinear" or (
            node.op not in ("affine", "norm") and any(carries.get(j, False) for j in node.inputs)
        )
        if node.op == "sum":
            w = [w for j, w in zip(node.inputs, node.weights, strict=True) if carries.get(j, False)]
            growth = 1 + mean * (sum(w) ** 2 - math.fsum(v * v for v in w))
            grown += [(node.path, growth)] * (growth > _GROWTH)
    if not grown:
        return ()
    (path, factor), *rest = grown
    more = f" and {len(rest)} more" if rest else ""
    return (
        f"the sum {path!r}{more} adds activations' outputs, whose means ({mean:.3g} of their q) do "
        f"not average out, so that q grows there, {factor:.3g} times or more; end every branch in "
        "a linear or convolution layer, or take DKS, whose means are 0",
    )


def _drifts(wired: theory.Wiring) -> tuple[str, ...]:
    """A note on activations whose input is not what the constants assume."""
    if not wired.unmixed:
        return ()
    first, *more = wired.unmixed
    where = f"{first!r} takes" if not more else f"{first!r} and {len(more)} more take"
    return (
        f"{where} another activation's output with no linear or convolution layer between, so q "
        "drifts from 1 there; put one between, in residual nets by activating before the branch",
    )
