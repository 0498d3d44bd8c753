"""Which challenger computes the same as a base, but faster: interleaved, paired measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedshape.timing import Candidate, Clock, interleaved, paired_ratios

#: Part of the base's time that a challenger must save to be chosen.
MARGIN = 0.02
#: Wall seconds of either of the two rounds, warm-up aside.
BUDGET = 0.2
_BASE = ""

Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Verdict:
    """How a contest ended.

    Attributes:
        winner: name of the challenger to take; None to keep the base.
        base_seconds: median of the base.
        seconds: median of the winner, or of the base without one.
        wrong: challengers whose results differ from the base's, and by how much.
        failed: challengers that could not run, and why.
    """

    winner: str | None
    base_seconds: float
    seconds: float
    wrong: dict[str, str]
    failed: dict[str, str]


def contest(
    base: Call,
    challengers: Mapping[str, Call],
    *,
    clock: Clock,
    terms: int,
    tf32: bool = False,
    budget: float = BUDGET,
    margin: float = MARGIN,
) -> Verdict:
    """Compare challengers with a base.

    All are run once and compared with the base's result; those left are timed in rounds, and the
    one with the best median of paired ratios meets the base again. That second meeting decides,
    for the best of many is partly luck: it must save `margin` of the base's time.

    Args:
        base: the call to beat; it returns new tensors.
        challengers: the same, by name.
        clock: of the device.
        terms: numbers added up for each element of the results, for the tolerance.
        tf32: whether products of float32 may be rounded to tf32.
        budget: wall seconds of either round.
        margin: part of the base's time to be saved.

    Example:
        >>> from fusedshape.timing import HostClock
        >>> x = torch.ones(4)
        >>> contest(lambda: [x + 1], {"bad": lambda: [x]}, clock=HostClock(), terms=1).wrong
        {'bad': 'result 0: off by 1 of a root mean square of 2'}
    """
    truth = [t.detach() for t in base()]
    wrong: dict[str, str] = {}
    failed: dict[str, str] = {}
    able: dict[str, Candidate] = {}
    for name, call in challengers.items():
        try:
            difference = difference_of(call(), truth, terms, tf32)
        # A configuration that cannot be compiled or launched, for whatever reason, is out.
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if difference is not None:
            wrong[name] = difference
        else:
            able[name] = _candidate(call)
    base_candidate = _candidate(base)
    pairs = {_BASE: base_candidate, **able}
    if len(able) > 1:
        times = interleaved(pairs, clock, budget=budget)
        best = min(able, key=lambda name: _ratio(times[name], times[_BASE]))
        pairs = {_BASE: base_candidate, best: able[best]}
    times = interleaved(pairs, clock, budget=budget)
    base_seconds = statistics.median(times[_BASE])
    for name in pairs:
        if name != _BASE and _ratio(times[name], times[_BASE]) <= 1 - margin:
            seconds = statistics.median(times[name])
            return Verdict(name, base_seconds, seconds, wrong, failed)
    return Verdict(None, base_seconds, base_seconds, wrong, failed)


def _candidate(call: Call) -> Candidate:
    return Candidate(lambda _: call())


def _ratio(of: Sequence[float], to: Sequence[float]) -> float:
    return statistics.median(paired_ratios(of, to))


def difference_of(
    got: Sequence[Tensor], truth: Sequence[Tensor], terms: int, tf32: bool
) -> str | None:
    r"""Say where two results differ by more than rounding; None if they do not.

    Both sum `terms` products in float32, in some order, and round to the results' dtype, one of
    them perhaps twice. With u the unit roundoff of the coarsest dtype of the results (of tf32 where
    that is coarser) and v that of float32, the error of an element is at most about 2u + 4v√terms
    of the results' root mean square, the 4 for fast algorithms such as Winograd's; four times that
    is let pass on average, and sixteen times for one element, whose value may be far from the mean.

    Args:
        got: results.
        truth: results to be met.
        terms: numbers added up for each element.
        tf32: whether products may be rounded to tf32.
    """
    if len(got) != len(truth):
        return f"{len(got)} results instead of {len(truth)}"
    unit = max((torch.finfo(t.dtype).eps / 2 for t in truth), default=0.0)
    unit = 2 * max(unit, 2.0**-11 if tf32 else 0.0) + 4 * 2.0**-24 * math.sqrt(terms)
    for i, (a, b) in enumerate(zip(got, truth, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            want = f"{tuple(b.shape)} {b.dtype}"
            return f"result {i}: {tuple(a.shape)} {a.dtype} instead of {want}"
        if not b.numel():
            continue
        error, scale = (a.float() - b.float()), _rms(b)
        mean, most = _rms(error), error.abs().max().item()
        # Written so that NaN fails.
        if not (mean <= 4 * unit * scale and most <= 16 * unit * max(scale, _largest(b) / 8)):
            return f"result {i}: off by {most:.3g} of a root mean square of {scale:.3g}"
    return None


def _rms(t: Tensor) -> float:
    return t.float().square().mean().sqrt().item()


def _largest(t: Tensor) -> float:
    return t.float().abs().max().item()
