"""How many of its input's positions a network reads if its layers start in the Delta form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fusedshape.init import Method
from fusedshape.kinds import kind_of
from fusedshape.theory import Wiring
from fusedshape.windows import read_share

_DELTA = ("suo", "delta_orthogonal")


def share_read(layer: Any, method: Method) -> float:
    """The share of its input's positions that a layer reads, without regard to borders.

    The Delta form has one tap, which reads every s-th position along a dimension of stride s. A
    full kernel reads those of every s positions that its dilated taps fall on.

    Example:
        >>> share_read(nn.Conv2d(3, 8, 3, stride=2), "suo")
        0.25
        >>> share_read(nn.Conv2d(3, 8, 3, stride=2), "suo_full")
        1.0
    """
    kind = kind_of(layer)
    if kind is None or kind.transposed or not kind.dimensions:
        return 1.0
    taps = torch.ones([1 if method in _DELTA else k for k in layer.kernel_size])
    nowhere = (0,) * kind.dimensions
    return read_share(taps, None, layer.stride, nowhere, layer.dilation)


def unread_positions(
    wired: Wiring, layers: Iterable[tuple[str, nn.Module, Method]]
) -> tuple[str, ...]:
    """A note on strided layers that skip positions in the Delta form, and on what remains.

    Args:
        wired: the model's wiring.
        layers: name, layer and initialiser of each layer that is initialised.
    """
    shares = {name: share_read(layer, method) for name, layer, method in layers}
    full = {name: share_read(layer, "suo_full") for name, layer, _ in layers}
    blind = [name for name in shares if shares[name] < full[name]]
    if not blind:
        return ()
    left: dict[int, float] = {}
    for i in wired.live:
        node = wired.nodes[i]
        before = max((left[j] for j in node.inputs if j in left), default=1.0)
        left[i] = before * (shares.get(node.path, 1.0) if node.op == "affine" else 1.0)
    share = max(left[i] for i in wired.outputs)
    names = ", ".join(map(repr, blind))
    whole = f", and 1/{1 / share:.4g} of the input's reach the output" if share < 1 else ""
    return (
        f"in the Delta form {names} read one position of each stride only: "
        f"{', '.join(sorted({f'1/{1 / shares[name]:.4g}' for name in blind}))} of their "
        f"inputs' positions{whole}; pass init='suo_full', which fills every tap, or make them "
        "stride 1 with a pool before",
    )
