"""Derives findings from steps, forecasts and measurements: what is wrong, where, what to do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fusedshape.diagnose.layers import Affine, Phi
from fusedshape.diagnose.measure import Stats
from fusedshape.diagnose.predict import SIGMAS, Contract
from fusedshape.diagnose.report import Finding, Layer
from fusedshape.diagnose.tape import Step

#: All causes that a `Finding` may have.
CAUSES = {
    "non-finite": "values that are inf or nan",
    "input data": "inputs that are not normalised, or all alike",
    "no PLN": "locations of the input with q = 0, or of very different q",
    "init layout": "weights drawn with in and out channels swapped",
    "weight scale": "weights of another scale than theory wants",
    "biases": "biases that are not zero",
    "BatchNorm": "a normalisation over inputs or locations",
    "un-normalised sum": "x + f(x) whose squared weights do not add up to 1",
    "correlated branches": "a sum of branches that are not independent",
    "activated sum": "activations that take others' outputs with no layer in between",
    "plain activation": "an activation that was not transformed",
    "wrong depth": "constants that were solved for another depth",
    "saturated": "an activation that is flat where its inputs are",
    "dead": "a layer whose output does not depend on the input",
    "width": "too few channels for this depth, or for this layer",
    "lost positions": "positions of the input that the output does not depend on",
    "low rank": "weights that act on fewer directions than random ones of their shape",
    "shared weights": "one weight in several layers, which theory takes to be independent",
    "dropout": "random numbers in the forward pass: dropout, stochastic depth, noise",
    "weights not random": "weights that depend on the data, as after training",
}

_ALIKE = 0.97  # above this c inputs cannot be told apart
_CHAOTIC = 30.0  # above this product of C′(1) close inputs become unrelated
_DRIFT = math.log(10)  # above this standard deviation of ln q chance determines q
_FLAT = 0.3  # how much more of an activation's inputs may be on its flat parts than at q = 1
_LEAST_GAIN = 2 * math.log(1.06)  # tolerated factor on the scale of one layer's weights
_LEAST_DRIFT = math.log(1.5)  # factor on q that all layers together must not reach
_SEEN = 0.75  # borders do not explain a share of positions below this
_REPEATS = 4  # uses of one module at most, with at most twice the chance of independent layers
# Consequences of other causes.
_SYMPTOMS = ("weights not random", "wrong depth")
# Causes whose text says how they change q.
_SCALES = {"weight scale", "init layout", "biases", "plain activation", "un-normalised sum"}
_CARRIERS = ("reshape", "pool", "dropout")


@dataclass(frozen=True)
class Case:
    """What is judged, one entry for each step.

    Attributes:
        steps: the steps of the first batch.
        rows: the `Layer` of each step.
        stats: measurements over all batches.
        distant: predicted c of two inputs whose c was 0.
        far: ln of measured q over q predicted from the input on, in standard deviations.
        drifts: `Forecast.drift` and its standard deviation.
        weights: what the weights should be.
        reached: the positions of the input that the output depends on, and all; None if not
            measured.
    """

    steps: Sequence[Step]
    rows: Sequence[Layer]
    stats: Sequence[Stats]
    distant: Sequence[float]
    far: Sequence[float]
    drifts: Sequence[tuple[float, float, float, float]]
    weights: Contract
    reached: tuple[int, int] | None = None

    def users(self, i: int) -> Iterator[Step]:
        """The users of each step, looking through steps that only move values."""
        for j in range(i + 1, len(self.steps)):
            if i in self.steps[j].inputs:
                if self.steps[j].op in _CARRIERS:
                    yield from self.users(j)
                else:
                    yield self.steps[j]

    @property
    def unmixed(self) -> list[int]:
        """Nonlinear steps that follow another one without a layer in between."""
        carries: list[bool] = []
        found = []
        for i, step in enumerate(self.steps):
            takes = any(carries[j] for j in step.inputs)
            nonlinear = step.phi is not None and not step.phi.is_linear
            found += [i] * (takes and nonlinear)
            mixes = step.op in ("norm", "unknown") or bool(step.affine and step.affine.has_weights)
            carries.append(nonlinear or (takes and not mixes))
        return found

    @property
    def homogeneous(self) -> bool:
        """Whether all nonlinear layers are homogeneous, so that the scale of q does not matter."""
        return all(s.phi.slopes is not None for s in self.steps if s.phi is not None)


def findings(case: Case) -> tuple[Finding, ...]:
    """All findings, the earliest first, one for each cause."""
    found: dict[str, list[tuple[int, str]]] = {}
    unmixed = case.unmixed
    judged = [_local(case, unmixed), _activated_sums(case, unmixed), _shared(case), _lost(case)]
    judged.append(_global(case))
    for i, cause, text in itertools.chain(*judged):
        found.setdefault(cause, []).append((i, text))
    if not found.keys() & _SCALES:
        for i, cause, text in _added_up(case):
            found.setdefault(cause, []).append((i, text))
    if not found:
        for i, cause, text in _drift(case):
            found.setdefault(cause, []).append((i, text))
    order = sorted(found.items(), key=lambda item: min(item[1])[0])
    if order[1:] and order[0][0] not in _SYMPTOMS:
        order = [item for item in order if item[0] not in _SYMPTOMS]
    made = []
    for cause, places in order:
        places.sort()
        paths = dict.fromkeys(case.rows[i].path for i, _ in places)
        made.append(Finding(cause, tuple(paths), places[0][1]))
    return tuple(made)


_Found = Iterator[tuple[int, str, str]]


def _local(case: Case, unmixed: Sequence[int]) -> _Found:
    for i, (step, row) in enumerate(zip(case.steps, case.rows, strict=True)):
        if math.isinf(row.q_measured) or (case.stats[i].q_means and math.isnan(row.q_measured)):
            where = "look at the data" if step.op == "input" else "look at the step before"
            yield i, "non-finite", f"it holds inf or nan; {where}"
            return
        if step.op in ("input", "norm") and any(u.op != "norm" for u in case.users(i)):
            yield from _start(case, i)
        if step.op == "norm" and ("batch" in step.name or "group" in step.name):
            yield (
                i,
                "BatchNorm",
                f"{step.name} undoes what shaped activations set up; build the model without it "
                "(convert(..., strip_batchnorm=True) takes BatchNorm out)",
            )
        if step.op == "dropout":
            q_before = case.rows[step.inputs[0]].q_measured if step.inputs else math.nan
            # The step before may be a view, which has no measurement.
            moved = f"q went from {q_before:.3g} to" if math.isfinite(q_before) else "q is"
            yield (
                i,
                "dropout",
                f"it draws random numbers ({step.name}), and {moved} {row.q_measured:.3g}; theory "
                "knows of none, so call model.eval() first, or build the model without it",
            )
        if step.affine is not None:
            yield from _weights(case, i, step.affine)
        if step.op == "sum":
            yield from _sum(case, i)
        if step.phi is not None and not step.phi.is_linear:
            yield from _activation(case, i, i in unmixed)


def _activated_sums(case: Case, unmixed: Sequence[int]) -> _Found:
    """The joint effect on q of activations that follow others, if all act in one direction."""
    rows = [case.rows[i] for i in unmixed if math.isfinite(case.rows[i].q_off)]
    off = sum(row.q_off for row in rows) / math.sqrt(max(1, len(rows)))
    if abs(off) > SIGMAS or any(map(_is_off, rows)):
        change = math.exp(math.fsum(math.log(row.q_measured / row.q_near) for row in rows))
        yield (
            unmixed[0],
            "activated sum",
            "it takes the output of an activation with no linear or convolution layer in between, "
            "as residual blocks do that activate the sum (v1), so that its inputs are no Gaussians "
            f"of mean 0 as theory assumes; {len(rows)} such step(s) changed q by a factor of "
            f"{change:.3g}; activate before the branch instead (v2)",
        )


def _start(case: Case, i: int) -> _Found:
    """The first values that layers take as input."""
    row, stats = case.rows[i], case.stats[i]
    foreign = row.op == "norm" and row.name != "PerLocationNorm"
    if not stats.q_means or foreign:
        return
    low, high = row.q_quantiles[0], row.q_quantiles[-1]
    advice = "put fusedshape.nn.PerLocationNorm first in the model"
    if stats.empty > 0:
        share = f"{100 * stats.empty:.3g} % of its locations are zero in all channels"
        yield i, "no PLN", f"{share}, so that their q is 0 and their c undefined; {advice}"
    elif not case.homogeneous and high > 100 * low:
        yield i, "no PLN", f"q lies between {low:.3g} and {high:.3g} over locations; {advice}"
    q = row.q_measured
    limit = 10.0 if case.homogeneous else 2.0
    if not 1 / limit <= q <= limit:
        yield (
            i,
            "input data",
            f"its mean square q is {q:.3g}, not 1; standardise the inputs, or {advice}",
        )
    elif row.c_quantiles[0] > 1 - 1e-6 and not stats.empty:
        yield i, "input data", "its inputs are all the same; pass different ones"
    elif row.c_measured > _ALIKE and not stats.empty:
        yield (
            i,
            "input data",
            f"its inputs are nearly the same, c = {row.c_measured:.3f}, and "
            f"{100 * stats.offset:.0f} % of q is the channels' mean; subtract the mean",
        )


def _weights(case: Case, i: int, affine: Affine) -> _Found:
    """Findings about weights by themselves, and about their effect on q."""
    want, off = case.weights.gain, 0.0
    if affine.has_weights:
        if affine.gain == 0:
            yield i, "dead", "all its weights are zero; initialise them (fusedshape.init.suo_)"
            return
        if affine.flaw:
            yield (
                i,
                "low rank",
                f"{affine.flaw}; draw them anew (fusedshape.init.suo_), or diagnose the model as "
                "it is initialised",
            )
        off = math.log(affine.gain / want) if want > 0 else math.inf
        if abs(off) > _LEAST_GAIN + SIGMAS * affine.spread:
            yield i, *_scale(affine, case.weights)
            return
    step, row = case.steps[i], case.rows[i]
    q_before = case.rows[step.inputs[0]].q_measured if step.inputs else math.nan
    excess = affine.bias - case.weights.bias
    if not case.weights.read and excess > 0.05 * max(want * q_before, affine.bias):
        yield (
            i,
            "biases",
            f"its biases have mean square {affine.bias:.3g}, against {case.weights.bias:.3g} in "
            "theory; set them to zero at the start (fusedshape.init.init_module_)",
        )
        return
    row = _at_own_scale(row, off)
    if affine.has_weights and not affine.flaw and _is_off(row):
        yield (
            i,
            "weights not random",
            f"q went from {q_before:.3g} to {row.q_measured:.3g} with weights whose own scale is "
            f"right ({_deviation(row)}): they fit these inputs, as trained weights do; diagnose "
            "the model as it is initialised",
        )


def _scale(affine: Affine, weights: Contract) -> tuple[str, str]:
    """The mistake that explains the scale of weights."""
    gain, want = affine.gain, weights.gain
    seen = f"its weights multiply q by {gain:.3g}"
    in_channels, out_channels = affine.fan
    swapped = want * in_channels / out_channels
    mistakes = [1 / 3]
    mistakes += [2.0] if want == 1 else []
    mistakes += [swapped] if in_channels != out_channels else []
    nearest = min(mistakes, key=lambda value: abs(math.log(gain / value)))
    is_like = abs(math.log(gain / nearest)) < 0.02 + SIGMAS * affine.spread
    advice = "use fusedshape.init.suo_, or convert(..., init='suo')"
    if is_like and nearest == swapped:
        how = "were drawn as if they were [in, out], as mode='fan_out' and the dks package do"
        if affine.is_orthogonal and in_channels < out_channels:
            how = f"keep norms, not q, as delta_orthogonal does, or {how}"
        return (
            "init layout",
            f"{seen}, which is {in_channels}/{out_channels} of what it should be: weights "
            f"[out, in] {how}; {advice}",
        )
    if is_like and nearest == 1 / 3:
        return "weight scale", f"{seen}, not by {want:.3g}: PyTorch's default weights; {advice}"
    if is_like and nearest == 2:
        return (
            "weight scale",
            f"{seen}, not by 1: He's initialisation, for a plain ReLU; {advice}",
        )
    return (
        "weight scale",
        f"{seen}, not by {want:.3g} (gain {math.sqrt(gain / want):.3g}); {advice}",
    )


def _sum(case: Case, i: int) -> _Found:
    step, row = case.steps[i], case.rows[i]
    total = math.fsum(w * w for w in step.weights)
    if abs(total - 1) > 0.01 and len(step.inputs) > 1:
        shown = ", ".join(f"{w:.4g}" for w in step.weights)
        yield (
            i,
            "un-normalised sum",
            f"its weights ({shown}) have squares that add up to {total:.4g}, so that q grows by as "
            "much; use fusedshape.NormalizedSum, or "
            "fusedshape.shortcuts.reweight_shortcuts(model, shortcut_weight)",
        )
    elif len(step.inputs) > 1 and _is_off(row):
        yield (
            i,
            "correlated branches",
            f"q is {row.q_measured:.3g} where independent branches would give "
            f"{row.q_near:.3g}; let every branch end in a layer "
            "with weights of its own",
        )


def _activation(case: Case, i: int, is_unmixed: bool) -> _Found:
    step, row, stats = case.steps[i], case.rows[i], case.stats[i]
    phi = step.phi
    assert phi is not None
    q = case.rows[step.inputs[0]].q_measured
    if stats.q_means and (row.q_measured == 0 or stats.still > 0.99):
        yield (
            i,
            "dead",
            f"{100 * stats.still:.0f} % of its channels have the same value whatever the input; "
            "look at the weights and biases before it",
        )
        return
    inner = any(u.op in ("affine", "sum") for u in case.users(i))
    if inner and case.weights.keeping and not phi.keeps_q:
        yield (
            i,
            "plain activation",
            f"{step.name} turns q = 1 into {phi.q(1.0):.3g}: it is not transformed; convert it too",
        )
    if q > 0 and phi.idle(q) - phi.idle(1.0) > _FLAT:
        yield (
            i,
            "saturated",
            f"{100 * phi.idle(q):.0f} % of its inputs (q = {q:.3g}) lie where {step.name} is flat, "
            f"{100 * phi.idle(1.0):.0f} % at q = 1; bring q back to 1 before it",
        )
    elif _is_off(row) and not is_unmixed:
        yield (
            i,
            "weights not random",
            f"its inputs are not Gaussian over channels ({_deviation(row)}), as trained weights or "
            "too few channels before it make them; diagnose the model as it is initialised",
        )


def _global(case: Case) -> _Found:
    """Findings that follow from theory alone."""
    phis = {i: s.phi for i, s in enumerate(case.steps) if s.phi and not s.phi.is_linear}
    if not phis:
        return
    yield from _too_deep(case, phis)
    names = _names(case, phis)
    ends = [i for i in phis if math.isfinite(case.rows[i].q) and case.rows[i].q >= 0]
    lost = [i for i in ends if not 1e-3 < case.rows[i].q < 1e3]
    if case.weights.read and lost:
        i = lost[0]
        needed = f"{1 / phis[i].q(1.0):.3g}" if phis[i].slopes else "that of fusedshape.theory.eoc"
        yield (
            i,
            "weight scale",
            f"q is {case.rows[i].q:.3g} in theory too: the weights have σ_w² = "
            f"{case.weights.gain:.3g}, and {names} needs {needed}",
        )
    wild = [i for i in range(len(case.rows)) if case.rows[i].q_spread > _DRIFT]
    if wild:
        i = wild[0]
        yield (
            i,
            "width",
            f"with {case.rows[i].channels} channels, chance alone changes q by a factor of "
            f"{math.exp(case.rows[i].q_spread):.3g} up to here (one standard deviation); use more "
            "channels, or fewer layers",
        )


def _names(case: Case, phis: Mapping[int, Phi]) -> str:
    return ", ".join(dict.fromkeys(case.steps[i].name for i in phis))


def _too_deep(case: Case, phis: Mapping[int, Phi]) -> _Found:
    """Activations that make all inputs alike, or close ones unrelated."""
    plain = [phi for phi in phis.values() if not phi.keeps_q]
    is_plain = 2 * len(plain) >= len(phis)
    cause = "plain activation" if is_plain else "wrong depth"
    advice = (
        "transform the activations: fusedshape.convert(model)"
        if is_plain
        else "solve for the depth that the network has: fusedshape.convert(model)"
    )
    names, last = _names(case, phis), list(phis)[-1]
    alike = [i for i in phis if case.distant[i] > _ALIKE]
    if alike and case.distant[last] > _ALIKE:
        yield (
            alike[0],
            cause,
            f"from here on {names} leaves all inputs alike: two that had c = 0 have "
            f"{case.distant[alike[0]]:.3f} here and {case.distant[last]:.3f} at the last layer; "
            f"{advice}",
        )
    apart = [i for i in phis if case.rows[i].sensitivity > _CHAOTIC]
    if apart and not alike:
        yield (
            apart[0],
            cause,
            f"from here on {names} tears apart what is close: the product of C'(1) is "
            f"{case.rows[apart[0]].sensitivity:.3g} here and {case.rows[last].sensitivity:.3g} at "
            f"the last layer; {advice}",
        )


def _shared(case: Case) -> _Found:
    """Weights that a value passes more than once."""
    uses: dict[tuple[int, int, int], list[int]] = {}
    behind: list[int] = []  # for each step a bit set of the steps it depends on
    for i, step in enumerate(case.steps):
        behind.append(0)
        for j in step.inputs:
            behind[i] |= behind[j] | 1 << j
        if step.weight is not None:
            places = uses.setdefault(step.weight, [])
            # Parallel uses, as for several inputs, count as one layer.
            if not places or behind[i] >> places[-1] & 1:
                places.append(i)
    for places in uses.values():
        paths = dict.fromkeys(case.rows[i].path for i in places)
        if len(places) > (1 if len(paths) > 1 else _REPEATS):
            others = f", as at {next(iter(paths))!r}" if len(paths) > 1 else ""
            for i in places[1:]:
                yield (
                    i,
                    "shared weights",
                    f"it has the weight of a layer before it{others}, {len(places)} times in all; "
                    "theory takes layers to be independent, so what chance does to one adds up; "
                    "give each layer a weight of its own",
                )


def _lost(case: Case) -> _Found:
    """Layers that skip positions, if the output misses much of the input for it."""
    seen, total = case.reached or (0, 0)
    if not seen < _SEEN * total:
        return
    for i, step in enumerate(case.steps):
        if step.reads < 1:
            taps = step.affine.taps if step.affine is not None else None
            why = "its windows skip the others"
            if taps is not None and int(taps.count_nonzero()) < taps.numel():
                why = (
                    f"all but {int(taps.count_nonzero())} of its {taps.numel()} taps are zero, as "
                    "in Delta initialisations, which are made for stride 1"
                )
            yield (
                i,
                "lost positions",
                f"{seen} of {total} positions of the input reach the output; this layer reads "
                f"{100 * step.reads:.3g} % of its input ({why}); fill all taps of strided layers "
                "(init='suo_full'), or let stride 1 and an average pool take its place",
            )


def _added_up(case: Case) -> _Found:
    """Scales that are each within tolerance, but deviate in one direction."""
    for i, (*parts, spread) in enumerate(case.drifts):
        total = math.fsum(parts)
        if not abs(total) > _LEAST_DRIFT + SIGMAS * spread:
            continue
        kinds = ("weights", "biases", "activations")
        largest = max(range(3), key=lambda k: abs(parts[k]))
        affine = [s.affine for s in case.steps[: i + 1] if s.affine and s.affine.has_weights]
        gains = [a.gain for a in affine if a.gain > 0]
        detail = ""
        if largest == 0 and gains and case.weights.gain > 0:
            logs = [math.log(g / case.weights.gain) for g in gains]
            detail = f" (gain {math.exp(0.5 * math.fsum(logs) / len(logs)):.3g} on average)"
        yield (
            i,
            ("weight scale", "biases", "plain activation")[largest],
            f"small differences in scale add up: up to here, {kinds[largest]}{detail} alone "
            f"multiply q by {math.exp(total):.3g}; "
            + (
                "use fusedshape.init.suo_",
                "set the biases to zero at the start (fusedshape.init.init_module_)",
                "transform the activations: fusedshape.convert(model)",
            )[largest],
        )
        return


def _drift(case: Case) -> _Found:
    """Deviations that are small at every step, but add up."""
    for i, far in enumerate(case.far):
        if abs(far) > SIGMAS:
            row = case.rows[i]
            yield (
                i,
                "weight scale",
                f"q is {row.q_measured:.3g}, {row.q:.3g} in theory: many small differences in "
                "scale add up; use fusedshape.init.suo_",
            )
            return


def _at_own_scale(row: Layer, off: float) -> Layer:
    """The forecast corrected for the deviation of ln of the weights' gain."""
    whole = math.log(row.q_measured / row.q_near) if row.q_measured > 0 < row.q_near else 0.0
    return replace(row, q_off=row.q_off * (whole - off) / whole) if whole else row


def _is_off(row: Layer) -> bool:
    return abs(row.q_off) > SIGMAS or abs(row.c_off) > SIGMAS


def _deviation(row: Layer) -> str:
    what, off = ("q", row.q_off) if abs(row.q_off) > abs(row.c_off) else ("c", row.c_off)
    return f"{what} is {abs(off):.1f} standard deviations off"
