"""Predicts the kernel of every step of a tape, from the input on and from the step before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fusedshape.diagnose.measure import Sample
from fusedshape.diagnose.tape import Step

# After these steps prediction starts again from the measurement.
RESTARTS = ("input", "norm", "pool", "dropout", "unknown")
# A step is off beyond so many standard deviations of the chance from finite width, but never below
# these differences, which have other causes too: few inputs, few locations, rounding.
SIGMAS = 6.0
LEAST_LN_Q = 0.1
LEAST_C = 0.03


@dataclass(frozen=True)
class Contract:
    """What the weights should be: N(0, σ_w²/fan_in) or σ_w · orthogonal; biases N(0, σ_b²).

    Attributes:
        gain: σ_w².
        bias: σ_b².
        read: whether the two were taken from the weights, for want of another source.
        keeping: whether the activations should keep q = 1, as most of them do.
    """

    gain: float = 1.0
    bias: float = 0.0
    read: bool = False
    keeping: bool = True


def contract(
    steps: Sequence[Step], sigma_w: float | None = None, sigma_b: float | None = None
) -> Contract:
    """Decide what the weights of a model should be.

    Activations that keep q = 1, as those of DKS, TAT and SELU do, need weights that keep q. For
    others no single scale is right, and the median of the model's layers is taken.
    """
    phis = [s.phi for s in steps if s.phi is not None and not s.phi.is_linear]
    keeping = [phi for phi in phis if phi.keeps_q]
    affine = [s.affine for s in steps if s.affine is not None]
    gains = [a.gain for a in affine if a.has_weights and a.gain > 0]
    # The bias of a fused layer is a separate step.
    biases = [a.bias for a in affine if a.bias or not a.has_weights]
    others = len(keeping) * 2 < len(phis)
    read = others and bool(gains)
    gain = median(gains) if read else 1.0
    bias = median(biases) if read and biases else 0.0
    return Contract(
        gain if sigma_w is None else sigma_w**2,
        bias if sigma_b is None else sigma_b**2,
        read and sigma_w is None,
        not others,
    )


def offsets(
    actual: tuple[float, float], theory: tuple[float, float], spread: tuple[float, float]
) -> tuple[float, float]:
    """Measured minus predicted ln q and c, in standard deviations; nan where unknown."""
    (q, c), (q_theory, c_theory) = actual, theory
    ln_q = math.log(q / q_theory) if q > 0 and q_theory > 0 else math.nan
    return (
        ln_q / math.hypot(spread[0], LEAST_LN_Q / SIGMAS),
        (c - c_theory) / math.hypot(spread[1], LEAST_C / SIGMAS),
    )


@dataclass
class Forecast:
    """The prediction for one step of one batch.

    Attributes:
        kernel: the kernel predicted from the input on; see `fusedshape.diagnose.layers`.
        near: the kernel predicted from the step before; None where prediction starts again.
        spread: standard deviations of ln q and of c in `kernel` that finite width explains.
        near_spread: the same for `near`.
        slope: C′(1) of a nonlinear step.
        parting: distance of two close inputs, relative to their distance at the network's input.
        distant: kernel of two inputs whose c was 0.
        drift: what weights, biases and activations of wrong scale have added to ln q since the
            input.
        drift_spread: standard deviation of the drift for random weights of the right scale.
    """

    kernel: Tensor | None = None
    near: Tensor | None = None
    spread: tuple[float, float] = (0.0, 0.0)
    near_spread: tuple[float, float] = (0.0, 0.0)
    slope: float = math.nan
    parting: float = 1.0
    distant: Tensor | None = None
    drift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    drift_spread: float = 0.0


def summary(kernel: Tensor | None) -> tuple[float, float]:
    """Mean q and mean c of a kernel; c where it is defined."""
    if kernel is None:
        return math.nan, math.nan
    q, other, k = kernel
    return float(kernel[:2].mean()), float((k / (q * other).sqrt()).nanmean())


def measured(step: Step) -> Tensor | None:
    """The kernel measured at a step, in float64 on the CPU."""
    value = step.value
    return value.kernel.double().cpu() if isinstance(value, Sample) else None


def predict(steps: Sequence[Step], weights: Contract, partings: Sequence[float]) -> list[Forecast]:
    """Predict every step of a tape.

    Args:
        steps: the tape's steps.
        weights: what the weights should be.
        partings: the measured parting of every step, used where prediction starts again.
    """
    found: list[Forecast] = []
    actual: list[Tensor | None] = []
    for number, step in enumerate(steps):
        before = [found[i] for i in step.inputs]
        here = measured(step)
        made = None
        if step.op not in RESTARTS:
            made = apply(step, [f.kernel for f in before], weights)
        if made is None or not _fits(made, here):
            parting = math.nan if step.op == "dropout" else partings[number]
            found.append(_restarted(step, before, here, parting))
            actual.append(here)
            continue
        taken = [_Taken(found[i], actual[i], steps[i].value is not None) for i in step.inputs]
        f = _continued(step, taken, made, weights)
        found.append(f)
        actual.append(f.near if here is None else here)
    return found


class _Taken(NamedTuple):
    """What is known about an input of a step."""

    forecast: Forecast
    actual: Tensor | None  # its kernel as measured, else as predicted from the step before
    is_measured: bool


def _restarted(
    step: Step, before: Sequence[Forecast], here: Tensor | None, parting: float
) -> Forecast:
    """The forecast of a step at which prediction starts again."""
    if math.isnan(parting):
        parting = _mean([f.parting for f in before], 1.0)
    f = Forecast(here, parting=parting, distant=_distant(before, here))
    if step.op not in ("input", "norm") and before:
        f.drift, f.drift_spread = _mixed(before, [1 / len(before)] * len(before))
    return f


def _continued(step: Step, taken: Sequence[_Taken], made: Tensor, weights: Contract) -> Forecast:
    """The forecast of a step whose kernel follows from its inputs' kernels."""
    before, actual = [t.forecast for t in taken], [t.actual for t in taken]
    kernels = [f.kernel for f in before]
    f = Forecast(made, apply(step, actual, weights))
    f.distant = apply(step, [g.distant for g in before], weights, only_mean=True)
    f.spread = _spread(step, [g.spread for g in before], kernels, made)
    unseen = [(0.0, 0.0) if t.is_measured else t.forecast.near_spread for t in taken]
    f.near_spread = _spread(step, unseen, actual, f.near)
    f.parting = before[0].parting
    if step.phi is not None:
        f.slope = step.phi.slope(summary(kernels[0])[0])
        f.parting *= f.slope
    elif step.affine is not None and step.affine.bias and weights.bias:
        # A constant that both inputs share raises their cosine.
        f.parting *= 1 - weights.bias / summary(made)[0]
    elif len(before) > 1:
        shares = _shares(step, kernels)
        f.parting = sum(s * g.parting for s, g in zip(shares, before, strict=True))
    f.drift, f.drift_spread = _drift(step, before, kernels, summary(made)[0], weights)
    return f


def apply(
    step: Step, kernels: Sequence[Tensor | None], weights: Contract, only_mean: bool = False
) -> Tensor | None:
    """The kernel after a step; None where no map is known.

    Args:
        step: the step.
        kernels: the kernels of its inputs.
        weights: what the weights should be.
        only_mean: whether the kernels are means over all locations.
    """
    whole = [k for k in kernels if k is not None]
    if not whole or len(whole) < len(kernels):
        return None
    first = whole[0]
    if step.phi is not None:
        return step.phi.map(first)
    if step.affine is not None:
        moved = first if only_mean or step.move is None else step.move(first)
        gain = weights.gain if step.affine.has_weights else 1.0
        return moved * gain + (weights.bias if step.affine.bias else 0.0)
    if step.op in ("sum", "concat"):
        if any(k.numel() != first.numel() for k in whole):
            return None
        shares = [w * w for w in step.weights]
        if step.op == "concat":
            shares = [w / sum(step.weights) for w in step.weights]
        total = torch.zeros_like(first)
        for share, k in zip(shares, whole, strict=True):
            total += share * k.reshape(first.shape)
        return total
    if only_mean:
        return first
    return None if step.move is None else step.move(first)


def _fits(made: Tensor, here: Tensor | None) -> bool:
    return here is None or made.numel() == here.numel()


def _distant(before: Sequence[Forecast], here: Tensor | None) -> Tensor:
    """The measured q with the c predicted so far, which is 0 at the start."""
    q = summary(here)[0]
    q = q if math.isfinite(q) else 1.0
    c = [summary(f.distant)[1] for f in before if f.distant is not None]
    return torch.tensor([[q], [q], [q * _mean(c, 0.0)]], dtype=torch.float64)


def _shares(step: Step, kernels: Sequence[Tensor | None]) -> list[float]:
    """The share of each input in the q of a sum or concat."""
    sizes = [w * w if step.op == "sum" else w for w in step.weights]
    parts = [w * summary(k)[0] for w, k in zip(sizes, kernels, strict=True)]
    total = sum(parts)
    return [p / total if total > 0 else 1 / len(parts) for p in parts]


def _spread(
    step: Step,
    before: Sequence[tuple[float, float]],
    kernels: Sequence[Tensor | None],
    after: Tensor | None,
) -> tuple[float, float]:
    """Standard deviations of ln q and of c after a step: those before it, and its own."""
    q_in, c_in = summary(kernels[0])
    ln_q, c = before[0]
    own = (0.0, 0.0)
    width = max(step.channels, 1)
    _, c_out = summary(after)
    if step.phi is not None:
        if not (q_in > 0 and math.isfinite(c_in)):
            return before[0]
        growth = step.phi.growth(q_in, c_in)
        ln_q, c = ln_q * growth[0], c * growth[1]
        noise = step.phi.noise(q_in, c_in)
        own = noise[0] / width, noise[1] / width
    elif step.affine is not None:
        chance = step.affine.chance
        own = chance, 0.5 * chance * (1 - c_in * c_in) ** 2
    elif len(before) > 1:
        shares = _shares(step, kernels)
        # The branches may have drifted in the same direction.
        ln_q = sum(s * b[0] for s, b in zip(shares, before, strict=True))
        c = sum(s * b[1] for s, b in zip(shares, before, strict=True))
        if step.op == "sum":
            cross = sum(4 * a * b for a, b in itertools.combinations(shares, 2)) / width
            own = cross, cross * (1 - min(1.0, c_out * c_out))
    return math.hypot(ln_q, math.sqrt(own[0])), math.hypot(c, math.sqrt(own[1]))


def _drift(
    step: Step,
    before: Sequence[Forecast],
    kernels: Sequence[Tensor | None],
    q: float,
    weights: Contract,
) -> tuple[tuple[float, float, float], float]:
    """The drift up to a step, and its standard deviation; see `Forecast`."""
    shares = _shares(step, kernels) if len(before) > 1 else [1.0]
    (of_weights, of_biases, of_phis), spread = _mixed(before, shares)
    if step.phi is not None:
        before_q, c = summary(kernels[0])
        growth = step.phi.growth(before_q, c)[0] if before_q > 0 and math.isfinite(c) else 1.0
        own = math.log(step.phi.q(1.0)) if weights.keeping and step.phi.keeps_q else 0.0
        return (of_weights * growth, of_biases * growth, of_phis * growth + own), spread * growth
    if step.affine is not None:
        gain, want = step.affine.gain, weights.gain
        if step.affine.has_weights and 0 < gain < math.inf and want > 0:
            of_weights += math.log(gain / want)
            spread = math.hypot(spread, step.affine.spread)
        if step.affine.bias and not weights.read and q > 0:
            of_biases += math.log(max(1 + (step.affine.bias - weights.bias) / q, 1e-3))
            own = weights.bias / q * math.sqrt(2 / max(step.channels, 1))
            spread = math.hypot(spread, own)
    return (of_weights, of_biases, of_phis), spread


def _mixed(
    before: Sequence[Forecast], shares: Sequence[float]
) -> tuple[tuple[float, float, float], float]:
    """The drift of a sum whose parts have these shares of q."""
    parts = [
        math.fsum(s * f.drift[i] for s, f in zip(shares, before, strict=True)) for i in range(3)
    ]
    spread = math.fsum(s * f.drift_spread for s, f in zip(shares, before, strict=True))
    return (parts[0], parts[1], parts[2]), spread


def _mean(values: Sequence[float], default: float) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else default
