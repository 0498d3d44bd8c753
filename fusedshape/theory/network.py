r"""Networks as the theory sees them: callables ``subnet_max(x, r)``.

Push a number x through the wiring, with every nonlinear layer replaced by r, every normalised sum
Σ wᵢuᵢ (Σ wᵢ² = 1) by Σ wᵢ²vᵢ, and affine layers, pooling and dropout left out; the largest value
that the net or any of its subnetworks reaches is M(x). It is M_{f,r}(x) of Zhang, Botev and
Martens, "Deep Learning without Shortcuts: Shaping the Kernel with Tailored Rectifiers",
arXiv 2203.08120. One recursion serves every method: r(y) = C(y) gives C_f, r(y) = s·y the slope
C_f′(1), and r(y) = t + y the curvature C_f″(1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral

LayerMap = Callable[[float], float]
SubnetMax = Callable[[float, LayerMap], float]

_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


def chain(depth: int) -> SubnetMax:
    """Plain chain of `depth` nonlinear layers, r applied `depth` times.

    Args:
        depth: number of nonlinear layers, at least 1.

    Returns:
        ``subnet_max(x, r)``.

    Raises:
        TypeError: depth is not an int.
        ValueError: depth is below 1.

    Example:
        >>> chain(3)(1.0, lambda y: 2 * y)
        8.0
    """
    if isinstance(depth, bool) or not isinstance(depth, Integral):
        raise TypeError(f"depth must be an int, the number of nonlinear layers, got {depth!r}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, the number of nonlinear layers, got {depth}")

    def subnet_max(x: float, r: LayerMap) -> float:
        for _ in range(depth):
            x = r(x)
        return x

    subnet_max.__name__ = f"depth={depth}"
    return subnet_max


def resnet(depth: int, shortcut_weight: float = 0.0) -> SubnetMax:
    r"""ResNet v2 of the given depth, its sums normalised: w·shortcut + √(1−w²)·branch.

    A branch holds two nonlinear layers (depth 18 and 34) or three. The first block of a group has
    its shortcut behind an activation and a projection, but for the first group of depth 18 and 34,
    which needs no projection. The activation before the head counts; stem and pools do not.

    Args:
        depth: 18, 34, 50, 101, 152 or 200.
        shortcut_weight: w, 0 ≤ w < 1; 0 is the vanilla network.

    Returns:
        ``subnet_max(x, r)``.

    Raises:
        ValueError: another depth, or w outside [0, 1).

    Example:
        >>> resnet(50)(1.0, lambda y: y * 1.01) == chain(49)(1.0, lambda y: y * 1.01)
        True
    """
    if depth not in _BLOCKS:
        raise ValueError(f"resnet: depth must be one of {sorted(_BLOCKS)}, got {depth!r}")
    if not (math.isfinite(shortcut_weight) and 0 <= shortcut_weight < 1):
        raise ValueError(f"resnet: shortcut_weight must be in [0, 1), got {shortcut_weight}")
    deep = depth >= 50
    kept = shortcut_weight**2

    def branch(x: float, r: LayerMap) -> float:
        return r(r(r(x))) if deep else r(r(x))

    def subnet_max(x: float, r: LayerMap) -> float:
        alone = branch(x, r)
        for group, blocks in enumerate(_BLOCKS[depth]):
            for block in range(blocks):
                projected = block == 0 and (deep or group > 0)
                through = branch(x, r)
                # Left out at weight 0, where an infinite shortcut would give 0·∞.
                x = kept * (r(x) if projected else x) + (1 - kept) * through if kept else through
        return max(r(x), alone)

    subnet_max.__name__ = f"resnet({depth}, {shortcut_weight:g})"
    return subnet_max
