"""Models that convert refuses, and the normalisations that it can take out."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from fusedshape.convert.calls import refuse_wrapped
from fusedshape.kinds import FusedLayer
from fusedshape.nn import ShapedActivation, ShapedChain
from fusedshape.rewriting import Rewritten
from fusedshape.tracing import behind_norm

_SHAPED = (ShapedActivation, ShapedChain, FusedLayer)


def refuse(model: nn.Module, replace: tuple[type[nn.Module], ...], strip_batchnorm: bool) -> None:
    """Raise if a model cannot be converted, as far as its modules tell.

    Args:
        model: the model.
        replace: the classes of activations to replace.
        strip_batchnorm: whether BatchNorm is to be taken out.

    Raises:
        ValueError: the message names the module and what to do about it.
    """
    if isinstance(model, replace):
        raise ValueError(
            f"convert: the model is itself an {type(model).__name__} and cannot be replaced in "
            "place; make a fusedshape.nn.ShapedActivation of theory.solve's spec instead"
        )
    for path, module in model.named_modules():
        refuse_wrapped("convert", path, module)
        _refuse_module(path, module)
        if type(module) in replace and any(True for _ in module.parameters()):
            where, kind = _at(path), type(module).__name__
            raise ValueError(f"convert: {where} a {kind}, whose parameters would be lost")
        _refuse_norm(path, module, strip_batchnorm)


def _at(path: str) -> str:
    return f"{path!r} is" if path else "the model is"


def _refuse_module(path: str, module: nn.Module) -> None:
    where, kind = _at(path), type(module).__name__
    written = isinstance(module, Rewritten) and module.written_by == "Shaped"
    if written or isinstance(module, _SHAPED):
        raise ValueError(
            f"convert: {where} a {kind} already; a model is converted once (build it anew)"
        )
    if type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantiz")):
        raise ValueError(f"convert: {where} quantised ({kind}); convert the float model")
    found = [*module._parameters.values(), *module._buffers.values()]
    tensors = [tensor for tensor in found if tensor is not None]
    if isinstance(module, LazyModuleMixin) or any(map(is_lazy, tensors)):
        raise ValueError(
            f"convert: {where} a lazy {kind} without shape yet; run the model once first"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"convert: {where} on the meta device; call model.to_empty(device=...) first"
        )


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


def stripped_norms(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
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
