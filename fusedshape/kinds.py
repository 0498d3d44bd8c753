"""What a layer is: linear or a convolution, torch's own or fused with its activation."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Kind:
    """One kind of layer.

    Attributes:
        plain: torch's class.
        dimensions: of its kernel; 0 for a linear layer.
        transposed: whether it is a transposed convolution.
    """

    plain: type[nn.Module]
    dimensions: int
    transposed: bool = False


#: All there are.
KINDS = (
    Kind(nn.Linear, 0),
    Kind(nn.Conv1d, 1),
    Kind(nn.Conv2d, 2),
    Kind(nn.Conv3d, 3),
    Kind(nn.ConvTranspose1d, 1, transposed=True),
    Kind(nn.ConvTranspose2d, 2, transposed=True),
    Kind(nn.ConvTranspose3d, 3, transposed=True),
)


class FusedLayer(nn.Module):
    """Base class of layers fused with what follows them.

    They have the plain layer's parameters and attributes, and are not of its class: their output is
    not W x + b, which those who test for the class count on.

    Attributes:
        plain_class: torch's class of the layer.
    """

    plain_class: ClassVar[Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # torch.nn.utils.fusion asks for no class. It copies any layer and folds BatchNorm into it.
        frame = sys._getframe(2) if sys._getframe(1).f_globals is vars(copy) else None
        if frame is not None and frame.f_globals.get("__name__") == "torch.nn.utils.fusion":
            raise TypeError(
                f"{frame.f_code.co_name}: folds what follows a layer into W x + b, and in a "
                f"{type(self).__name__} the activation comes between; fusedshape.unfuse the model "
                "first"
            )
        return super().__reduce_ex__(protocol)


def kind_of(module: object) -> Kind | None:
    """What kind of layer a module is, plain, fused or of a subclass; None if it is no layer.

    Example:
        >>> kind_of(nn.Conv2d(3, 8, 3)).dimensions
        2
        >>> kind_of(nn.ReLU()) is None
        True
    """
    cls = module.plain_class if isinstance(module, FusedLayer) else type(module)
    found = next((kind for kind in KINDS if issubclass(cls, kind.plain)), None)
    if found is None and isinstance(module, _ConvNd):  # of a class beside torch's
        shape = len(module.kernel_size), isinstance(module, _ConvTransposeNd)
        found = next((k for k in KINDS if (k.dimensions, k.transposed) == shape), None)
    return found


def features(layer: Any) -> tuple[int, int]:
    """How many channels or features a layer takes and gives.

    Raises:
        TypeError: a module that is no layer.

    Example:
        >>> features(nn.Linear(3, 5))
        (3, 5)
    """
    kind = kind_of(layer)
    if kind is None:
        raise TypeError(f"features: {type(layer).__name__} is no linear or convolution layer")
    if kind.dimensions:
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features
