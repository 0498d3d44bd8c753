"""trace_wiring: reads the `Wiring` of a model from its modules.

Each module's forward is traced separately with torch.fx, its children as leaves (see
`fusedshape.tracing`), so that nodes keep their qualified names and no example input is needed.
Linear arithmetic is collected as a sum Σ wᵢ·nodeᵢ until something else uses the result.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fusedshape.theory.network import Wiring
from fusedshape.theory.trace.model import Trace
from fusedshape.validate import flag

__all__ = ["trace_wiring"]


def trace_wiring(model: nn.Module, example: Any = None, *, strip_batchnorm: bool = False) -> Wiring:
    r"""Read a model's wiring, which is all that the theory needs to know about its structure.

    It understands the layers, activations, pools and normalisations of torch.nn,
    torch.nn.functional and this library; sums with constant or learnt weights (their present values
    are used); concatenations of channels; and modules that are called more than once. Gates
    (products with a sigmoid) are passed, and attention is taken for a mean over locations;
    `Wiring.notes` says so. A forward that takes decisions by shapes, types or lengths is read as it
    runs on the example. What cannot be read (control flow by the numbers in tensors, BatchNorm)
    becomes an "unknown" node. A sum whose squared weights do not add up to 1 is kept. In both cases
    evaluating the wiring raises an error that names the place.

    Args:
        model: the model; it is left unchanged. It is read in training mode.
        example: an input, or a tuple of inputs, which is run without gradients. It tells how many
            channels a concatenation joins where the layers before it do not, and serves to compare
            each traced forward with the module and to read those that cannot be traced. By default
            small random inputs do both, if any fit the first layers.
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
    return Trace(model, example, strip_batchnorm).wiring()
