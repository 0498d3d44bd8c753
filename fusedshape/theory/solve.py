r"""Constants of shaped activations: DKS, TAT and the edge of chaos, solved to float64 precision.

The conditions are those of Martens et al., arXiv 2110.01765 (DKS), and Zhang, Botev and Martens,
arXiv 2203.08120 (TAT), and the names those of the public package `dks`.

Which root is taken. The conditions usually have several roots. The search runs from a fixed list of
starts, the public package's own first, so the answer depends on the arguments alone and is mostly
the package's. It takes the first root that passes these tests. They are tests of φ̂ itself, so they
do not depend on how φ̂ is written with α, β, γ and δ:

* The steepest slope, max |φ̂′|, is below 2. If max |φ′| = 1, as for tanh, this is the package's rule
  αγ < 2.
* The curvature is spread: E[φ̂″²]² / E[φ̂″⁴] ≥ 1/10, as if at least a tenth of all inputs met it. A
  layer of finite width gets averages over rare inputs wrong.
* Under TAT, corners (selu has one) weigh less than the curvature that C″(1) counts: the sum of
  jump² · density at the corners is at most C″(1).

If no root passes, the least steep is taken. Two φ that are affine images of each other (sigmoid and
tanh, cos and sin) are solved as one and get the same φ̂.

Which constants are returned. φ̂(−x) and −φ̂(x) meet the same conditions as φ̂, and sin, cos, sigmoid
and odd φ can write some of these in several ways. The solver returns the constants that float32
evaluates most accurately: the rounding error of αx + β grows with |β|, and that of φ + δ with |φ|.
So |β| is at most π/2 for sin and cos, and sigmoid has β < 0, where it is small. See
`_Conditions._tidied`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fusedshape.activations import Activation, get_activation
from fusedshape.spec import ActSpec
from fusedshape.theory.maps import Local, corners_of, leaky_c_map, normal_pdf
from fusedshape.theory.network import Chain, Scaled, Shifted, SubnetMax, Wiring, chain
from fusedshape.theory.recipes import DKS, EOC, TARGETS, TAT, Recipe, Unreachable, recipe_of
from fusedshape.validate import UNSET, given, real, shown

Array = NDArray[np.float64]

STEEPEST = 2.0
SPREAD = 0.1
_TOLERANCE = 1e-11  # on the residuals
# With a larger α nearly all inputs see φ's asymptotes, and float32 loses φ + δ to cancellation.
_WIDEST = 100.0
# The search cannot resolve a smaller excess over a linear layer, because of cancellation.
_STRAIGHTEST = 3e-6
# Longer plain chains of rectifiers are solved as a flow if κ is at most _SLOW. The error of C_f(0)
# was measured to be 0.03·κ³.
_LONG = 10**5
_SLOW = 4e-4
# With β = 1 and C(0) = 0, no α gives relu a larger C′(1); above it β = −1 is used.
_RELU_TURN = 1.466942206924260361


def solve(
    method: TAT | DKS | str,
    activation: str = UNSET,
    *,
    depth: int | None = None,
    subnet_max: SubnetMax | None = None,
    zeta: float = UNSET,
    eta: float = UNSET,
    tau: float = UNSET,
    q_slope: float = UNSET,
    clamp: bool = UNSET,
) -> ActSpec:
    """Constants that meet a recipe in a network given by depth or by `subnet_max`.

    Args:
        method: a recipe, `TAT` or `DKS`; or the name of one, in any case, whose arguments are the
            keywords below.
        activation: a name of the activation table, for a method given by name.
        depth: number of nonlinear layers of a plain chain.
        subnet_max: any other network, see `fusedshape.theory.network`. Exactly one of the two.
        zeta: target of DKS. Default 1.5.
        eta: target of TAT for relu and leaky_relu; for others it is checked and not used. Default
            0.9.
        tau: target of TAT for all others; for relu and leaky_relu it is checked and not used.
            Default 0.3.
        q_slope: Q′(1) of every layer under DKS. Default 1.
        clamp: take the nearest target that can be reached, where the given one cannot. Default
            False.

    Returns:
        The solved spec; its `origin` says how.

    Raises:
        ValueError: unknown method or activation, a target out of its range or of another method,
            or a keyword beside a recipe.
        TypeError: an argument of the wrong type.
        Unreachable: the network or the activation cannot reach the target.

    Example:
        >>> spec = solve(TAT("leaky_relu", eta=0.9), depth=49)
        >>> round(spec.negative_slope, 4), round(spec.output_scale, 4)
        (0.4259, 1.3011)
        >>> solve("TAT", "leaky_relu", depth=49, eta=0.9) == spec
        True
    """
    keywords = given(
        activation=activation, zeta=zeta, eta=eta, tau=tau, q_slope=q_slope, clamp=clamp
    )
    recipe: Recipe
    if isinstance(method, Recipe):
        recipe = method
        if keywords:
            raise ValueError(
                f"solve: {method} is a whole recipe; give it {', '.join(keywords)} when it is made"
            )
    else:
        name = method.upper() if isinstance(method, str) else method
        if name not in ("DKS", "TAT"):
            raise ValueError(
                f"solve: unknown method {shown(method)}; known: 'DKS', 'TAT' (and eoc() for EOC)"
            )
        if "activation" not in keywords:
            raise TypeError(f"solve: activation is missing; name the function that {name} shapes")
        if name == "TAT":
            keywords = _tat_keywords("solve", keywords)
        recipe = recipe_of("solve", name, keywords)
    if isinstance(recipe, TAT):
        return _solve_tat(recipe, _Net.of("solve", depth, subnet_max))
    if isinstance(recipe, DKS):
        return _solve_dks(recipe, _Net.of("solve", depth, subnet_max))
    raise ValueError(f"solve: {recipe} is solved by eoc(), for it knows no depth")


def dks(
    activation: str,
    *,
    depth: int | None = None,
    subnet_max: SubnetMax | None = None,
    zeta: float = UNSET,
    q_slope: float = DKS.q_slope,
    clamp: bool = False,
) -> ActSpec:
    r"""Deep Kernel Shaping: Q(1) = 1, Q′(1) = 1, C(0) = 0, C′(1) = s.

    s is such that the steepest C map of a subnetwork has C_f′(1) = ζ; s = ζ^(1/L) for a chain of L
    layers. Unknowns are α, β, δ, γ; negative_slope, β, δ, γ for leaky_relu. relu has one unknown
    less and drops the condition on Q′; leaky_relu is better in every respect.

    square cannot be solved: E[φ̂φ̂″] = Q′(1) − C′(1) by Stein's lemma, φ̂″ is constant, and C(0) = 0
    means E[φ̂] = 0; so Q′(1) = C′(1) = s > 1 whatever the constants.

    Args:
        activation: a name of the activation table.
        depth: number of nonlinear layers of a plain chain.
        subnet_max: any other network. Exactly one of the two.
        zeta: ζ > 1. Default 1.5, the paper's.
        q_slope: Q′(1) of each layer, in (0, 1]. Default 1, the paper's.
        clamp: take the largest ζ that can be reached, where the given one cannot.

    Returns:
        The solved spec, residuals below 1e-9.

    Raises:
        ValueError: an argument out of its range.
        TypeError: an argument of the wrong type.
        Unreachable: φ has no such constants.

    Example:
        >>> spec = dks("tanh", depth=20)
        >>> round(spec.input_scale, 4), round(spec.output_scale, 4)
        (0.2056, 6.8292)
    """
    keywords = {"activation": activation, **given(zeta=zeta), "q_slope": q_slope, "clamp": clamp}
    return _solve_dks(DKS.spelled("dks", keywords), _Net.of("dks", depth, subnet_max))


def _solve_dks(recipe: DKS, net: _Net) -> ActSpec:
    conditions = _Conditions(get_activation(recipe.activation), "DKS", recipe.q_slope)
    return _shape(conditions, net, "zeta", recipe.zeta, recipe.clamp)


def tat(
    activation: str,
    *,
    depth: int | None = None,
    subnet_max: SubnetMax | None = None,
    eta: float = UNSET,
    tau: float = UNSET,
    clamp: bool = False,
) -> ActSpec:
    r"""Tailored Activation Transformation.

    relu and leaky_relu become leaky_relu ("TReLU") of the slope a with max C_f(0) = η over
    subnetworks f, and γ = √(2/(1+a²)). Every other φ gets Q(1) = Q′(1) = C′(1) = 1 and C″(1) = t
    with max C_f″(1) = τ; t = τ/L for a chain of L layers. A corner of φ (selu) counts for nothing
    in C″(1), as in the public package, although it makes the true C″(1) infinite.

    relu and leaky_relu reach η to 1e-11 in chains of up to 10⁵ layers, whose C map is applied layer
    by layer. Longer chains are taken as the flow that the layers follow, which is as exact (1e-12
    up to 10⁶ layers); then float64's spacing of slopes near 1 costs 1e-16·√L, or 1e-10 at the
    limit of 10¹² layers.

    square cannot be solved: E[φ̂φ̂″] = Q′(1) − C′(1) = 0 by Stein's lemma and φ̂″ is constant, so
    E[φ̂] = 0. In Hermite coefficients b₁ + b₂ = Q(1) = 1 and b₁ + 2b₂ = C′(1) = 1, hence
    C″(1) = 2b₂ = 0, and no τ > 0 is reached.

    Args:
        activation: a name of the activation table.
        depth: number of nonlinear layers of a plain chain.
        subnet_max: any other network. Exactly one of the two.
        eta: η in (0, 1), for relu and leaky_relu; for others it is checked and not used. Default
            0.9, the paper's.
        tau: τ > 0, for all others; for relu and leaky_relu it is checked and not used. Default
            0.3, the paper's.
        clamp: take the largest η or τ that can be reached, where the given one cannot.

    Returns:
        The solved spec, residuals below 1e-9.

    Raises:
        ValueError: an argument out of its range.
        TypeError: an argument of the wrong type.
        Unreachable: the network is too shallow for η, or φ has no such constants.

    Example:
        >>> tat("relu", depth=16).origin
        'TAT eta=0.9, depth=16'
        >>> round(tat("tanh", depth=49, tau=0.2).output_scale, 3)
        19.307
    """
    keywords = {"activation": activation, **given(eta=eta, tau=tau), "clamp": clamp}
    recipe = TAT.spelled("tat", _tat_keywords("tat", keywords))
    return _solve_tat(recipe, _Net.of("tat", depth, subnet_max))


def _tat_keywords(who: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Check both of TAT's targets, and leave out the one that the activation does not aim at.

    Callers with a list of activations give both for all of them, as the public package wants it.
    """
    aims = TAT.defaults(get_activation(keywords["activation"], who).name)
    own = TAT.targets().keys() & keywords.keys()
    for name in own:
        TARGETS[name].check(who, name, keywords[name])
    return {name: value for name, value in keywords.items() if name in aims or name not in own}


def _solve_tat(recipe: TAT, net: _Net) -> ActSpec:
    if recipe.eta is not None:
        return _tailored_rectifier(net, recipe.eta, recipe.clamp)
    assert recipe.tau is not None
    conditions = _Conditions(get_activation(recipe.activation), "TAT", 1.0)
    return _shape(conditions, net, "tau", recipe.tau, recipe.clamp)


@dataclass(frozen=True)
class EdgeOfChaos:
    """An activation as it is, with the weights and biases that put it at the edge of chaos.

    Attributes:
        spec: the untransformed activation.
        sigma_w: standard deviation of weights times √fan_in, or the factor of orthogonal weights.
        sigma_b: standard deviation of biases.
        q: mean square of the pre-activations that the layers keep.
    """

    spec: ActSpec
    sigma_w: float
    sigma_b: float
    q: float


def eoc(
    activation: EOC | str, *, sigma_b: float | None = None, negative_slope: float = UNSET
) -> EdgeOfChaos:
    r"""Edge of chaos: weights N(0, σ_w²/fan_in) and biases N(0, σ_b²) with χ₁ = 1 at a fixed q.

    q = σ_w² E[φ(√q z)²] + σ_b² and χ₁ = σ_w² E[φ′(√q z)²] = 1, the fixed point being attractive or
    neutral: `|σ_w² d/dq E[φ(√q z)²]| ≤ 1`. See Poole et al., arXiv 1606.05340, and Schoenholz et
    al., arXiv 1611.01232.

    softplus has none: q < E[φ(√q z)²] / E[φ′(√q z)²] for every q, which leaves σ_b² < 0. sigmoid
    has, but far out, with σ_w above 10. relu and leaky_relu have theirs at σ_b = 0 only, where
    every q is fixed; q = 1 is returned.

    Args:
        activation: a recipe, `EOC`; or a name of the activation table.
        sigma_b: σ_b ≥ 0. Default 0 for relu and leaky_relu, 0.2 for all others.
        negative_slope: slope of leaky_relu. Default 0.

    Returns:
        The spec, σ_w, σ_b and q; of several fixed points the one with the smallest q.

    Raises:
        ValueError: an argument out of its range, or a keyword beside a recipe.
        TypeError: an argument of the wrong type.
        Unreachable: no such fixed point; the message says for which σ_b there is.

    Example:
        >>> round(eoc("tanh").sigma_w, 3), round(eoc("relu").sigma_w, 6)
        (1.304, 1.414214)
        >>> eoc(EOC("tanh", sigma_b=0.1)) == eoc("tanh", sigma_b=0.1)
        True
    """
    bias = UNSET if sigma_b is None else sigma_b
    keywords = given(sigma_b=bias, negative_slope=negative_slope)
    if not isinstance(activation, EOC):
        return _solve_eoc(EOC.spelled("eoc", {"activation": activation, **keywords}))
    if keywords:
        raise ValueError(
            f"eoc: {activation} is a whole recipe; give it {', '.join(keywords)} when it is made"
        )
    return _solve_eoc(activation)


def _solve_eoc(recipe: EOC) -> EdgeOfChaos:
    spec, row, bias = recipe.spec, recipe.spec.row, recipe.sigma_b
    assert bias is not None
    if row.homogeneous:
        return EdgeOfChaos(spec, math.sqrt(2 / (1 + spec.negative_slope**2)), 0.0, 1.0)

    def weights2(q: float) -> tuple[float, float, float]:
        """σ_w² and σ_b² with which q is fixed and χ₁ = 1, and the Q map's slope there."""
        at = Local.of(row, math.sqrt(q), 0.0, spec.negative_slope)
        scale2 = q / float(at.w @ at.d1**2)
        moment = float(at.w @ (at.f * at.d1 * at.z))
        return scale2, q - scale2 * float(at.w @ at.f**2), scale2 * moment / q

    from scipy import optimize  # see _tailored_rectifier

    grid = [float(q) for q in np.geomspace(1e-4, 1e4, 161)]
    curve = [weights2(q) for q in grid]
    if bias == 0:
        # If φ(0) = 0 and a small q does not grow, q = 0 is the fixed point.
        zero = torch.zeros((), dtype=torch.float64)
        still, slope = (f(zero, spec.negative_slope).item() for f in (row.value, row.d1))
        if still == 0 and slope != 0 and curve[0][2] <= 1:
            return EdgeOfChaos(spec, 1 / abs(slope), 0.0, 0.0)
    for (low, (_, below, _)), (high, (_, above, _)) in itertools.pairwise(
        zip(grid, curve, strict=True)
    ):
        if (below - bias**2) * (above - bias**2) <= 0:
            q = optimize.brentq(lambda q: weights2(q)[1] - bias**2, low, high, xtol=1e-300)
            scale2, _, slope = weights2(q)
            if abs(slope) <= 1:
                return EdgeOfChaos(spec, math.sqrt(scale2), bias, q)
    stable = [math.sqrt(b2) for _, b2, slope in curve if b2 >= 0 and abs(slope) <= 1]
    ways = (
        f"pass sigma_b between {min(stable):.3g} and {max(stable):.3g}"
        if stable
        else "whatever sigma_b; use DKS or TAT"
    )
    raise Unreachable(
        f"{recipe.activation} has no edge of chaos with sigma_b={bias:g}, as no q up to 1e4 is an "
        f"attractive fixed point with chi_1 = 1: {ways}"
    )


def _tailored_rectifier(net: _Net, eta: float, clamp: bool) -> ActSpec:
    from scipy import optimize  # here, because it adds 0.2 s to importing fusedshape

    def excess(a: float) -> float:
        return net.reach(0.0, lambda c: leaky_c_map(a, c)) - eta

    if isinstance(net.subnet_max, Chain) and net.subnet_max.depth > _LONG:
        slope = _slope_of_long_chain(net.subnet_max.depth, eta)
        if slope is not None:
            return _rectifier(slope, f"{eta:.6g}", net)
    reachable = excess(0.0) + eta
    net.check_linear(excess(1.0) + eta, eta)
    note = ""
    if reachable <= 0:
        raise Unreachable(f"{net.label} does not grow with r; does it apply r at all?")
    if reachable >= eta:
        slope = optimize.brentq(excess, 0.0, 1.0, xtol=1e-15, rtol=1e-15)
    elif clamp:
        slope, note = 0.0, f" clamped from {eta:g}"
    else:
        raise Unreachable(
            f"eta={eta:g} is out of reach for {net.label}: even slope 0 gives C_f(0) = "
            f"{reachable:.6g}; pass eta <= {_floor(reachable)}, a deeper network, or clamp=True"
        )
    return _rectifier(slope, f"{min(eta, reachable):.6g}{note}", net)


def _rectifier(slope: float, eta: str, net: _Net) -> ActSpec:
    return ActSpec(
        "leaky_relu",
        negative_slope=slope,
        output_scale=math.sqrt(2 / (1 + slope * slope)),
        origin=f"TAT eta={eta}, {net.label}",
    )


def _slope_of_long_chain(depth: int, eta: float) -> float | None:
    r"""Slope a with which the C map takes 0 to η in `depth` steps; None if the steps are too large.

    C(c) = c + κg(c), with g(c) = √(1−c²) − c·arccos c and κ = (1−a)²/(π(1+a²)), makes the steps of
    Euler's method for dc/dt = κg. Backward error analysis (Hairer, Lubich and Wanner, Geometric
    Numerical Integration, IX.1) gives the flow that these steps follow to O(κ³),

        dc/dt = κg · (1 − κg′/2 + κ²(gg″/12 + g′²/3)),

    in which c = cos θ, g′ = −θ and g″ = 1/sin θ. Its time from 0 to η is `depth`, so
    κ = I(κ)/depth with I an integral over θ that hardly depends on κ.
    """
    from scipy import integrate  # see _tailored_rectifier

    end = math.acos(eta)
    if not 3 / (end * depth) <= _SLOW:  # κ up to a factor near 1
        return None

    def pace(s: float, kappa: float) -> float:
        # Integrate over s = 1/θ: near c = 1 the flow takes as long from θ to θ/2 as it took to θ.
        theta = 1 / s
        sine = math.sin(theta)
        g = sine - theta * math.cos(theta)
        if theta < 0.02:
            g = theta**3 * (1 / 3 - theta**2 / 30 + theta**4 / 840)
        bend = 0.5 * kappa * theta + kappa**2 * (g / (12 * sine) + theta**2 / 3)
        return sine * theta**2 / (g * (1 + bend))

    kappa = 0.0
    for _ in range(4):  # each pass adds at least three digits
        whole, _ = integrate.quad(
            pace, 2 / math.pi, 1 / end, args=(kappa,), epsabs=0, epsrel=1e-13, limit=200
        )
        kappa = whole / depth
    # Solve the quadratic equation for 1 − a without cancellation.
    p = math.pi * kappa
    return 1 - (math.sqrt(2 * p - p * p) - p) / (1 - p)


def _shape(conditions: _Conditions, net: _Net, name: str, aim: float, clamp: bool) -> ActSpec:
    """Solve for the local target that makes the network reach `aim`."""
    net.check_linear(net.reach_of(conditions.method, 0.0), aim)
    if net.reach_of(conditions.method, _STRAIGHTEST) > aim:
        raise ValueError(
            f"{name}={aim!r} leaves {net.label} less nonlinearity a layer than {_STRAIGHTEST:g}, "
            f"which is what the search resolves; pass a larger {name}, or take a shallower network"
        )
    excess = net.local_excess(conditions.method, aim)
    root = conditions.solve(excess)
    note = ""
    if root is None:
        excess, root = conditions.largest_below(excess)
        reachable = net.reach_of(conditions.method, excess)
        local = "C'(1)" if conditions.method == "DKS" else "C''(1)"
        if not clamp:
            raise Unreachable(
                f"{name}={aim:g} is out of reach of {conditions.row.name} for {net.label}: with "
                f"input_scale up to {_WIDEST:g}, constants were found up to {local} = "
                f"{excess + (conditions.method == 'DKS'):.6g}, or {name}={reachable:.6g}; pass "
                f"{name} <= {_floor(reachable)}, a deeper network, or clamp=True"
            )
        note, aim = f" clamped from {aim:g}", reachable
    return replace(root, origin=f"{conditions.method} {name}={aim:.6g}{note}, {net.label}")


@dataclass(frozen=True)
class _Net:
    """A checked subnet_max, and what messages call it."""

    subnet_max: SubnetMax
    label: str

    @classmethod
    def of(cls, who: str, depth: int | None, subnet_max: SubnetMax | None) -> _Net:
        if (depth is None) == (subnet_max is None):
            raise ValueError(
                f"{who}: give exactly one of depth=, the nonlinear layers of a plain chain, and "
                f"subnet_max=, got depth={shown(depth)} and subnet_max={shown(subnet_max)}"
            )
        if subnet_max is None:
            assert depth is not None
            subnet_max = chain(depth)
        elif not callable(subnet_max):
            raise TypeError(
                f"{who}: subnet_max must be called as subnet_max(x, r), got {shown(subnet_max)}"
            )
        if isinstance(subnet_max, Wiring):
            return cls(subnet_max, subnet_max.label)
        name = getattr(subnet_max, "__name__", type(subnet_max).__name__)
        return cls(subnet_max, name if depth is not None else f"subnet_max={name}")

    def reach(self, x: float, r: Callable[[float], float]) -> float:
        value = self.subnet_max(x, r)
        if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
            raise TypeError(f"subnet_max must return a number, got {value!r}")
        value = real(self.label, "the returned value", value)
        if math.isnan(value):
            raise ValueError(f"subnet_max returned nan from x = {x}")
        return value

    def check_linear(self, value: float, aim: float) -> None:
        """Raise if the network reaches its target with linear layers already."""
        if value >= aim:
            raise ValueError(
                f"{self.label} gets to {value:.6g} with linear layers already, the target is "
                f"{aim:g}: it must give back x where r does"
            )

    def reach_of(self, method: str, excess: float) -> float:
        """The network's ζ if s = 1 + excess (DKS), or its τ if t = excess (TAT)."""
        if method == "DKS":
            return self.reach(1.0, Scaled(excess))
        return self.reach(0.0, Shifted(excess))

    def local_excess(self, method: str, aim: float) -> float:
        """The excess with which the network reaches `aim`."""
        from scipy import optimize  # see _tailored_rectifier

        low, high = 0.0, 1e-9
        # Grow it from below, so that no power of it overflows.
        while self.reach_of(method, high) < aim:
            low, high = high, 4 * high
            if high > 1e9:
                raise Unreachable(
                    f"{self.label} does not grow with r: it gets to "
                    f"{self.reach_of(method, low):.6g}, not {aim:g}; does it apply r at all?"
                )
        return optimize.brentq(
            lambda e: self.reach_of(method, e) - aim, low, high, xtol=1e-300, rtol=1e-15
        )


@dataclass(frozen=True)
class _Conditions:
    """The system of equations of one method for one φ.

    The local target is given as its excess over a linear layer's: C′(1) − 1 for DKS, C″(1) for TAT.
    """

    row: Activation
    method: str
    q_slope: float

    def solve(self, excess: float) -> ActSpec | None:
        """The root described at the top of this file, or None."""
        twin = _TWINS.get(self.row.name)
        if twin is not None:
            root = replace(self, row=get_activation(twin.name)).solve(excess)
            return None if root is None else twin.translate(root)
        second: tuple[float, ActSpec] | None = None
        for start in self._starts(excess):
            spec = self._from(start, excess)
            if spec is None:
                continue
            steepest = _steepest(spec)
            hidden = _hidden(spec) if self.method == "TAT" else 0.0
            if steepest < STEEPEST and _spread(spec) >= SPREAD and hidden <= excess:
                return spec
            if second is None or steepest < second[0]:
                second = (steepest, spec)
        return None if second is None else second[1]

    def largest_below(self, excess: float) -> tuple[float, ActSpec]:
        """The largest excess with a root, below one without, to a relative 1e-6; and that root."""
        twin = _TWINS.get(self.row.name)
        if twin is not None:
            low, root = replace(self, row=get_activation(twin.name)).largest_below(excess)
            return low, twin.translate(root)
        low, high = 0.5 * excess, excess
        while (found := self.solve(low)) is None:
            low, high = 0.5 * low, low
            if low < _STRAIGHTEST:
                raise Unreachable(
                    f"{self.method} finds no constants for {self.row.name}; use another activation"
                )
        root = found
        while True:
            # Follow the branch of the present root, which is cheap; then look for a longer branch.
            while high - low > 1e-6 * low:
                middle = 0.5 * (low + high)
                found = self._from(self._unknowns(root), middle)
                low, high, root = (low, middle, root) if found is None else (middle, high, found)
            further = min(1.01 * low, 0.5 * (low + excess))
            found = self.solve(further)
            if found is None:
                return low, root
            low, high, root = further, excess, found

    def _starts(self, excess: float) -> Iterator[tuple[float, ...]]:
        scales, shifts = (1.0, 0.1), (0.0, 1.0, -1.0)
        if self.row.name == "relu":
            yield from itertools.product((*scales, 0.01))
        elif self.row.has_slope:
            yield from itertools.product((0.0, 0.5, 0.9, 0.99), shifts)
        elif self.method == "DKS":
            yield from itertools.product(scales, shifts)
            yield from self._nearly_linear(excess)
        else:
            yield from itertools.product(scales, shifts, shifts)
            for scale, shift in self._nearly_linear(excess):
                # The two δ for which Q(1) = C′(1) = 1 holds already.
                at = Local.of(self.row, scale, shift)
                mean = float(at.w @ at.f)
                gap = float(at.w @ at.d1**2) - float(at.w @ (at.f - mean) ** 2)
                for sign in (1, -1):
                    yield scale, shift, sign * math.sqrt(max(gap, 0.0)) - mean

    @staticmethod
    def _nearly_linear(excess: float) -> Iterator[tuple[float, float]]:
        """Starts (α, β) of little curvature, which grows with α², with kinks near and far."""
        for factor in (0.7, 2.0):
            scale = factor * math.sqrt(excess)
            for shift in (0.4, -0.4, 3 * scale, -3 * scale, 1.2, -1.2):
                yield scale, shift

    def _from(self, start: tuple[float, ...], excess: float) -> ActSpec | None:
        """The root that Powell's hybrid method finds from a start; None if it finds none."""
        from scipy import optimize  # see _tailored_rectifier

        rough = optimize.root(
            self._residuals, start, args=(excess, 1.0), method="hybr", options={"maxfev": 200}
        )
        if not np.abs(rough.fun).max() < 1e-5:
            return None
        # The excess of a deep network is small, and must be met to as many digits as a large one.
        unit = min(1.0, excess)
        tidied = self._tidied(rough.x)
        fine = optimize.root(
            self._residuals, tidied, args=(excess, unit), method="hybr", options={"xtol": 1e-14}
        )
        left = np.abs(fine.fun).max()
        if not (left * unit < _TOLERANCE and left < 1e-4):
            return None
        slope, scale, shift, output_shift, at = self._constants(self._tidied(fine.x), excess)
        return ActSpec(
            self.row.name,
            input_scale=scale,
            input_shift=shift,
            output_shift=output_shift,
            output_scale=float(at.w @ (at.f + output_shift) ** 2) ** -0.5,
            negative_slope=slope,
        )

    def _tidied(self, p: Array) -> Array:
        """The best conditioned of the unknowns that give the same φ̂ up to signs.

        tanh and sin are odd: (α, −β, −δ) gives −φ̂(−x). The sign of β is free for them, so their
        twins decide it: sigmoid is small for β < 0, and cos has |β| ≤ π/2 if sin has β ≥ 0.
        """
        if self.row.name not in ("tanh", "sin"):
            return p
        scale, shift, output_shifts = abs(p[0]), float(p[1]), p[2:]
        if self.row.name == "sin":
            shift = math.remainder(shift, 2 * math.pi)
            if abs(shift) > 0.5 * math.pi:  # sin(u ± π) = −sin u
                shift -= math.copysign(math.pi, shift)
                output_shifts = -output_shifts
        if (shift < 0) == (self.row.name == "sin"):
            shift, output_shifts = -shift, -output_shifts
        return np.array([scale, shift, *output_shifts])

    def _unknowns(self, spec: ActSpec) -> tuple[float, ...]:
        """Inverse of `_constants`."""
        if self.row.name == "relu":
            return (spec.input_scale,)
        if self.row.has_slope:
            return spec.negative_slope, spec.input_shift
        known = (spec.input_scale, spec.input_shift, spec.output_shift)
        return known[:2] if self.method == "DKS" else known

    def _constants(self, p: Array, excess: float) -> tuple[float, float, float, float, Local]:
        """(a, α, β, δ) of the unknowns p, and φ at the nodes."""
        slope, scale, shift = 0.0, 1.0, 0.0
        if self.row.name == "relu":
            scale, shift = float(p[0]), 1.0 if 1 + excess < _RELU_TURN else -1.0
        elif self.row.has_slope:
            slope, shift = map(float, p)
        else:
            scale, shift = map(float, p[:2])
        at = Local.of(self.row, scale, shift, slope)
        return slope, scale, shift, float(p[2]) if self.method == "TAT" else -float(at.w @ at.f), at

    def _residuals(self, p: Array, excess: float, unit: float) -> Array:
        # Far out, where φ overflows or is flat, there is no root: nan makes the method turn back.
        nowhere = np.full(len(p), np.nan)
        if not np.isfinite(p).all() or not (self.row.has_slope or 0 < abs(p[0]) <= _WIDEST):
            return nowhere
        *_, output_shift, at = self._constants(p, excess)
        f = at.f + output_shift
        # Divide by Q(1), as γ does to make Q(1) = 1.
        q = float(at.w @ f**2)
        if not 0 < q < math.inf:
            return nowhere
        left = [at.w @ (f * at.d1 * at.z) / q - self.q_slope] if self.row.name != "relu" else []
        slope = at.w @ at.d1**2 / q - 1
        if self.method == "DKS":
            return np.array([*left, slope - excess]) / unit
        return np.array([*left, slope, at.w @ at.d2**2 / q - excess]) / unit


@dataclass(frozen=True)
class _Twin:
    """φ(u) = scale · ψ(u·inner + shift) + offset for the row ψ called `name`."""

    name: str
    own: str
    inner: float
    shift: float
    scale: float
    offset: float

    def translate(self, root: ActSpec) -> ActSpec:
        """The spec of φ that gives the same φ̂ as `root` gives with ψ."""
        return ActSpec(
            self.own,
            input_scale=root.input_scale / self.inner,
            input_shift=(root.input_shift - self.shift) / self.inner,
            output_shift=self.scale * root.output_shift - self.offset,
            output_scale=root.output_scale / self.scale,
        )


_TWINS = {
    "sigmoid": _Twin("tanh", "sigmoid", 0.5, 0.0, 0.5, 0.5),
    "cos": _Twin("sin", "cos", 1.0, math.pi / 2, 1.0, 0.0),
}


def _steepest(spec: ActSpec) -> float:
    """max |φ̂′| over |u| ≤ 12, beyond which only square's |φ′| grows by more than 1e-5."""
    u = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    steepest = spec.row.d1(u, spec.negative_slope).abs().max().item()
    return abs(spec.input_scale * spec.output_scale) * steepest


def _spread(spec: ActSpec) -> float:
    """E[φ̂″²]² / E[φ̂″⁴], 1 where φ̂″ = 0."""
    at = Local.of(spec.row, spec.input_scale, spec.input_shift, spec.negative_slope)
    square = at.d2**2
    fourth = float(at.w @ square**2)
    return 1.0 if fourth == 0 else float(at.w @ square) ** 2 / fourth


def _hidden(spec: ActSpec) -> float:
    """Σ jump² · density over the corners of φ̂."""
    corners = corners_of(spec)
    return spec.output_scale**2 * sum(jump**2 * normal_pdf(x) for x, jump in corners)


def _floor(value: float) -> str:
    """`value` to four digits, rounded down, so that it can be passed back."""
    digits = 4 - math.ceil(math.log10(abs(value)))
    return f"{math.floor(value * 10**digits) / 10**digits:.{max(digits, 0)}f}"
