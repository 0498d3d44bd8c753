"""convert: puts shaped activations, fused layers and their initialisers into a user's model.

`Request` holds what was asked for. `read` looks at the model and changes nothing: it traces every
forward with torch.fx, decides from the graphs which activation joins which layer, and solves the
recipe for the wiring. `plan_for` makes a `Plan` of that, whose `apply` alone touches the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Generator, nn

from fusedshape.convert.health import health_of
from fusedshape.convert.normalisation import strip
from fusedshape.convert.order import preactivate
from fusedshape.convert.plan import plan_for
from fusedshape.convert.reading import read
from fusedshape.convert.refusals import refuse_model
from fusedshape.convert.report import Change, Report
from fusedshape.convert.request import Escape, Request, ShortcutWeight, requested_recipe
from fusedshape.convert.skips import reweight
from fusedshape.init import Method
from fusedshape.ops.dispatch import Backend, unavailable
from fusedshape.spec import ActSpec
from fusedshape.theory import Recipe, SubnetMax
from fusedshape.undo import UndoLog, all_or_nothing
from fusedshape.validate import UNSET, given

__all__ = ["Change", "Report", "convert"]


def convert(
    model: nn.Module,
    recipe: Recipe | ActSpec | None = None,
    *,
    method: str = UNSET,
    activation: str = UNSET,
    depth: int | None = None,
    subnet_max: SubnetMax | None = None,
    zeta: float = UNSET,
    eta: float = UNSET,
    tau: float = UNSET,
    clamp: bool = UNSET,
    sigma_b: float | None = None,
    spec: ActSpec | None = None,
    init: Method | None = "suo",
    generator: Generator | None = None,
    fuse: bool = True,
    replace: Sequence[type[nn.Module]] | Literal["all"] = (nn.ReLU,),
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    normalisation: Literal["strip"] | None = None,
    strip_batchnorm: bool = False,
    add_biases: bool | None = None,
    shortcuts: ShortcutWeight | None = None,
    on_ambiguous: Escape = "error",
    on_untraceable: Escape = "error",
    dry_run: bool = False,
    backend: Backend = "auto",
    chain: bool | int = False,
    example: Any = None,
    check: bool = True,
) -> Report:
    r"""Make a model a shaped vanilla network, in place: activations, fused layers, initialisation.

    * Every nn.ReLU becomes y = γ(φ(αx + β) + δ) with solved constants, and so does every
      ``F.relu(x)``, ``torch.relu(x)``, ``x.relu()`` and their in-place forms: a module that calls
      one gets a subclass of its class, whose forward torch.fx wrote. In that forward Python's
      control flow is frozen as it was at conversion, except for ``self.training``. ReLUs written in
      other ways (``x.clamp(min=0)``) are not recognised.
    * An nn.Conv1d/2d/3d or nn.Linear is fused with such an activation if its every output goes to
      it and nowhere else. The two may stand in different modules: a module that ends with the layer
      then returns the activated output. If this is not certain, the activation stays by itself. A
      fused layer is no instance of nn.Linear or nn.Conv*. In the activation's place an nn.Identity
      stays (``fused_0`` for a function), which tells `fusedshape.unfuse` where to put it back.
    * Every linear and convolution layer is initialised as the constants assume, trained and frozen
      ones too: load weights afterwards, or pass ``init=None``.
    * Whatever changes an activation's output in place (``y += x``, ``nn.Dropout(inplace=True)``)
      works out of place afterwards, because backward may need that output. It is refused if the
      difference would be seen.

    Parameters stay the same objects under the same state_dict keys; devices, dtypes, modes and
    requires_grad stay as they are. Convert before wrapping or compiling the model. If anything
    raises, the model is left as it was. A model is converted once; its parts can be converted one
    by one, each with its own constants.

    Args:
        model: the model.
        recipe: what to solve for, `fusedshape.TAT`, `DKS` or `EOC`; or an `ActSpec`, whose
            constants are used as they are. Default ``TAT("leaky_relu", eta=0.9)``. The keywords
            method, activation, zeta, eta, tau, clamp and sigma_b spell the same recipes.
        method: "TAT", "DKS" or "EOC", in any case. Default "TAT".
        activation: φ, a name of `fusedshape.ACTIVATIONS`. Default "leaky_relu".
        depth: nonlinear layers of a plain chain; default: the wiring is read off the model, see
            `fusedshape.theory.trace_wiring`.
        subnet_max: the network's wiring, as in `fusedshape.theory.solve`, in place of depth.
        zeta: target of DKS. Default 1.5.
        eta: target of TAT for relu and leaky_relu. Default 0.9.
        tau: target of TAT for all other activations. Default 0.3.
        clamp: take the nearest reachable target instead of raising. Default False.
        sigma_b: EOC's standard deviation of biases; default: the theory's choice.
        spec: the same as an `ActSpec` for recipe.
        init: "suo", "suo_full", "delta_orthogonal", "gaussian", or None to keep the weights. Even
            kernels have no centre tap and take "suo_full". "delta_orthogonal" keeps norms. Layers
            that have more outputs than inputs, or are transposed and strided, would lower q by
            that: they take "suo" instead, and the report says so.
        generator: source of randomness for `init`; None takes torch's default.
        fuse: whether to fuse at all.
        replace: the activation classes to replace, with their functional forms. They must have no
            parameters. "all" replaces every activation that torch has but gates, which are those
            that scale another value, and bounded ones at the network's end; nn.PReLU then goes with
            its parameter.
        filter_fn: called as ``filter_fn(name, module)`` with each activation module and, for
            functional calls, with the module that makes them; False leaves them alone.
        normalisation: None refuses normalisation over the batch or over locations. "strip" takes
            out BatchNorm, GroupNorm, InstanceNorm and their like, LayerNorm and RMSNorm unless the
            model holds attention, and weight standardisation, weight norm and spectral norm. An
            nn.Identity, or what a module does behind its norm, takes the place, and the keys of the
            norms leave the state_dict.
        strip_batchnorm: take out BatchNorm alone.
        add_biases: whether layers whose output was normalised get a bias if they have none; the
            report names the new keys. Default: with ``normalisation="strip"``.
        shortcuts: w, from 0 to 1: every skip connection ``x + f(x)`` becomes the normalised sum
            w·x + √(1−w²)·f(x), and 0 removes it; a mapping gives w by qualified names, as in
            `fusedshape.reweight_shortcuts`. The shortcut is the operand with fewer nonlinear
            layers, then with fewer parameters, behind the fork; of more than two operands the
            others get equal parts of 1 − w². In all other sums, linear branches side by side among
            them, each of n operands gets the weight 1/√n, which keeps q if they are independent. A
            number that weighs an operand is dropped. An activation whose output a shortcut carries
            acts at the start of the branch instead (v1 blocks, which activate the sum, become v2
            blocks), as sums must add Gaussians of mean 0. Default: sums stay as they are.
        on_ambiguous: what to do about a sum whose operands all count alike: "error", or "report" to
            give each the weight 1/√n.
        on_untraceable: what to do about a module whose forward may call such an activation but
            cannot be traced faithfully, because it branches on values or shapes, takes optional
            arguments, draws random numbers, keeps state, or switches gradients or autocast:
            "error", or "report" to leave that call as it is.
        dry_run: only report, and change nothing.
        backend: as in `fusedshape.ops.shaped_act`.
        chain: whether nn.Sequential containers that hold fused layers in a row become
            `fusedshape.nn.ShapedChain`, in place; a number limits the layers of one autograd node.
            The report says which layers are in a row, and why others are not.
        example: an input of the model, or a tuple of inputs. Default: small random ones that fit
            its first layers. The traced forwards are run on it and compared with the model's own;
            a difference is refused. The report says if no input was found.
        check: whether `fusedshape.diagnose` looks at the converted model on the example, if one of
            at least 2 inputs is given; what it says is the report's ``health``. It costs about
            three forward passes on the example, and changes nothing. A dry run has no such check.

    Returns:
        What was done, row by row; print it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a model that cannot be converted, targets that cannot be met, a target of
            another method or activation, or keywords beside a recipe; the message says what to do.

    Example:
        >>> from fusedshape import TAT
        >>> layers = [layer for _ in range(16) for layer in (nn.Linear(8, 8), nn.ReLU())]
        >>> report = convert(nn.Sequential(*layers, nn.Linear(8, 2)), TAT(eta=0.9))
        >>> report.depth, report.counts["fused"], report.counts["initialised"]
        (16, 16, 17)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    keywords = given(method=method, activation=activation, zeta=zeta, eta=eta, tau=tau, clamp=clamp)
    if sigma_b is not None:
        keywords["sigma_b"] = sigma_b
    request = Request(
        recipe=requested_recipe(recipe, spec, keywords),
        depth=depth,
        subnet_max=subnet_max,
        init=init,
        generator=generator,
        fuse=fuse,
        replace=replace,
        filter_fn=filter_fn,
        normalisation=normalisation,
        strip_batchnorm=strip_batchnorm,
        add_biases=add_biases,
        shortcuts=shortcuts,
        on_ambiguous=on_ambiguous,
        on_untraceable=on_untraceable,
        dry_run=dry_run,
        backend=backend,
        chain=chain,
        example=example,
        check=check,
    )
    refuse_model(model, request)
    for device in sorted({p.device.type for p in model.parameters()} or {"cpu"}):
        reason = None if backend == "auto" else unavailable(backend, device)
        if reason is not None:
            raise reason
    return all_or_nothing(lambda log: _convert(model, request, log))


def _convert(model: nn.Module, request: Request, log: UndoLog) -> Report:
    """Read the model, plan what is to be done to it, and do it."""
    for path, module in model.named_modules():
        log.module(module, path)
    log.generator(torch.default_generator)  # a filter_fn may draw
    stripped = strip(model, request, log)
    reweighted = reweight(model, request)
    moved = preactivate(model, request)
    plan = plan_for(read(model, request), (stripped, reweighted, moved))
    if request.dry_run:
        log.undo()
        return plan.report
    plan.apply(log)
    health, why = health_of(model, request)
    return dataclasses.replace(plan.report, health=health, notes=(*plan.report.notes, *why))
