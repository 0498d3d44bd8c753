"""diagnose: compares predicted and measured kernels layer by layer, and names what is wrong.

`tape` records a forward pass as steps (`operation` describes a recorded call), and `measure`
measures their values. `predict` computes what theory expects, with the maps of `layers`. `verdict`
judges the difference, and `report` holds and shows the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusedshape.diagnose.kept import kept
from fusedshape.diagnose.layers import Affine
from fusedshape.diagnose.measure import Stats, parted, sample
from fusedshape.diagnose.predict import (
    Contract,
    Forecast,
    contract,
    measured,
    offsets,
    predict,
    summary,
)
from fusedshape.diagnose.reach import reach
from fusedshape.diagnose.report import Diagnosis, Finding, Layer
from fusedshape.diagnose.tape import Step, Tape
from fusedshape.diagnose.verdict import CAUSES, Case, findings
from fusedshape.guard import unwatched
from fusedshape.ops.apart import apart
from fusedshape.validate import real

__all__ = ["CAUSES", "Diagnosis", "Finding", "Layer", "diagnose"]

_NUDGED = 8  # at most so many inputs get a neighbour, and at most a quarter of them
_SHOWN = ("input", "affine", "nonlinear", "sum", "concat", "norm", "pool", "dropout", "unknown")


def diagnose(
    model: nn.Module,
    data: Tensor | Iterable[Any],
    *,
    batches: int = 4,
    sigma_w: float | None = None,
    sigma_b: float | None = None,
) -> Diagnosis:
    r"""Compare a model with theory, layer by layer, and name what is wrong.

    Two numbers are measured at every location: the mean square q over channels, and the cosine c of
    pairs of inputs. Both are predicted from the q and c of the network's input: layers with weights
    keep them (times σ_w², plus σ_b²), activations apply their own Q and C maps at any q, sums and
    concatenations mix them, and convolutions mix locations as their taps do. After pooling,
    normalisation, attention and other steps without a known map, prediction starts again from the
    measurement, and the row says so.

    Each step is judged given the measurement just before it. It is off if it differs from theory by
    more than 6 standard deviations of the chance that its width explains. They follow from random
    weights of its shape (Gaussian, or orthogonal if its weights are) and, for an activation, from
    Var[φ²] given the mean square before it (3/width of ln q for He's ReLU, and 2/width more for
    Gaussian weights). If a layer or pool skips positions, one backward pass of a few inputs tells
    how much of the input the output still depends on. Weights are also judged by themselves: by
    their scale, of each layer and in total, by their rank, and by whether layers share them.

    The model runs in its own mode, without gradients. Afterwards the model and the random number
    generators are restored, even after an error or Ctrl-C: parameters, buffers, gradients,
    requires_grad, mode, hooks, and attributes with the containers, tensors, arrays and objects in
    them. For that, buffers and arrays are copied, and those parameters that the forward writes to.
    `Diagnosis.notes` lists what could not be restored. State in classes, extension types or files
    is not restored.

    Args:
        model: the model, initialised and not trained yet.
        data: a batch of at least 2 inputs (N, ...), or an iterable of batches. A batch may be a
            tuple whose first element is the inputs (as from a DataLoader), or a dict of keyword
            arguments. Floating tensors go to the device and dtype of the model's first parameter.
        batches: the most batches to use.
        sigma_w: σ_w, the standard deviation of weights times √fan_in. By default 1 if the
            activations keep q = 1, as those of DKS and TAT do, else that of the weights.
        sigma_b: σ_b, the standard deviation of biases; by default 0, or that of the biases.

    Returns:
        The diagnosis; print it, or see `Diagnosis.save` and `Diagnosis.plot`.

    Raises:
        TypeError: model is no nn.Module, or data contain no tensors.
        ValueError: data are empty, the model does not take them, a batch has fewer than 2 inputs,
            or parameters have no memory.

    Source: Q and C maps after Martens et al. 2021, arXiv 2110.01765.

    Example:
        >>> import fusedshape
        >>> layers = [m for _ in range(30) for m in (nn.Linear(128, 128), nn.ReLU())]
        >>> net, x = nn.Sequential(*layers), torch.randn(64, 128)
        >>> fusedshape.diagnose(net, x).cause
        'plain activation'
        >>> report = fusedshape.convert(net)
        >>> fusedshape.diagnose(net, x).verdict
        'theory and measurement agree'
    """
    _check(model, batches, sigma_w=sigma_w, sigma_b=sigma_b)
    sigma_w, sigma_b = (None if s is None else float(s) for s in (sigma_w, sigma_b))
    known: dict[Any, Affine] = {}
    runs: list[_Run] = []
    notes: dict[str, None] = {}
    total = 0
    with kept(model) as lost, torch.no_grad():
        for number, (args, kwargs, size) in enumerate(_batches(data, batches)):
            args, kwargs = _moved(model, args), _moved(model, kwargs)
            tape = _run(model, args, kwargs, size, sample, known)
            if runs and [s.key for s in tape.steps] != [s.key for s in runs[0].steps]:
                where = _parting(runs[0].steps, tape.steps)
                notes[f"batch {number} takes another way than batch 0 at {where!r}; left out"] = (
                    None
                )
                continue
            if not runs:
                with unwatched():
                    weights = contract(tape.steps, sigma_w, sigma_b)
                partings = _partings(model, args, kwargs, size, tape, known)
                runs.append(_Run(tape, weights, partings))
                if any(s.reads < 1 for s in tape.steps):
                    try:
                        runs[0].reached = reach(model, args, kwargs, size, tape.input_dims)
                    except Exception as error:
                        notes[f"how much of the input the output sees is not known: {error}"] = None
            with unwatched():
                runs[0].add(tape.steps)
            total += size
    if not runs:
        raise ValueError("diagnose: data hold no batch")
    notes |= dict.fromkeys(f"not as it was before: {what}" for what in lost)
    return runs[0].diagnosis(tuple(notes), total)


class _Run:
    """All batches whose forward passes had the same steps."""

    def __init__(self, tape: Tape, weights: Contract, partings: list[float]) -> None:
        self.steps = steps = tape.steps
        self.outputs = tape.outputs
        self.weights = weights
        self.partings = partings
        self.stats = [Stats() for _ in steps]
        self.reached: tuple[int, int] | None = None
        self.rows: list[list[tuple[float, ...]]] = []

    def add(self, steps: list[Step]) -> None:
        """Add a batch's measurements, and free them."""
        forecasts = predict(steps, self.weights, self.partings)
        self.rows.append([_numbers(s, f) for s, f in zip(steps, forecasts, strict=True)])
        for stats, step in zip(self.stats, steps, strict=True):
            if step.value is not None:
                stats.add(step.value)
            step.value = None

    def _alive(self) -> set[int]:
        """The steps that the outputs depend on."""
        found, stack = set(self.outputs), list(self.outputs)
        while stack:
            more = set(self.steps[stack.pop()].inputs) - found
            found |= more
            stack += more
        return found

    def diagnosis(self, notes: tuple[str, ...], inputs: int) -> Diagnosis:
        """Average over batches, and judge."""
        mean = torch.tensor(self.rows, dtype=torch.float64).mean(0).tolist()
        rows = [
            _layer(step, stats, numbers, parting)
            for step, stats, numbers, parting in zip(
                self.steps, self.stats, mean, self.partings, strict=True
            )
        ]
        distant, far = [m[-6] for m in mean], [m[-5] for m in mean]
        drifts = [(m[-4], m[-3], m[-2], m[-1]) for m in mean]
        case = Case(self.steps, rows, self.stats, distant, far, drifts, self.weights, self.reached)
        shown = [
            row
            for row, step in zip(rows, self.steps, strict=True)
            if row.op in _SHOWN and step.name != "bias" and not math.isnan(row.q_measured)
        ]
        alive = self._alive()
        unread = [
            f"nothing is predicted of {s.path!r}: {s.note}"
            for i, s in enumerate(self.steps)
            if s.note and i in alive
        ]
        if len(unread) > 3:
            unread[3:] = [f"nor of {len(unread) - 3} more"]
        if not any(s.phi is not None and not s.phi.is_linear for s in self.steps):
            unread.append("no nonlinear layer was seen")
        if self.weights.read:
            unread.append(
                f"no activation keeps q = 1, so the weights' own scale was taken: σ_w = "
                f"{math.sqrt(self.weights.gain):.4g}, σ_b = {math.sqrt(self.weights.bias):.4g}"
            )
        return Diagnosis(
            tuple(shown),
            findings(case),
            (*notes, *dict.fromkeys(unread)),
            math.sqrt(self.weights.gain),
            math.sqrt(self.weights.bias),
            inputs,
        )


def _numbers(step: Step, f: Forecast) -> tuple[float, ...]:
    """The numbers that are averaged over batches; see `_layer`."""
    actual, theory, near = summary(measured(step)), summary(f.kernel), summary(f.near)
    off = offsets(actual, near, f.near_spread)
    far = offsets(actual, theory, f.spread)[0] if f.near is not None else math.nan
    distant = summary(f.distant)[1]
    return (
        *(*theory, *near, *f.spread, *off, f.slope, f.parting, distant, far),
        *(*f.drift, f.drift_spread),
    )


def _layer(step: Step, stats: Stats, numbers: list[float], parting: float) -> Layer:
    q, c, q_near, _, q_spread, c_spread, q_off, c_off, slope, sensitivity, *_ = numbers
    return Layer(
        path=step.path,
        op=step.op,
        name=step.name,
        channels=step.channels,
        q=q,
        q_near=q_near,
        q_spread=q_spread,
        q_measured=stats.q_mean,
        q_quantiles=stats.quantiles("q"),
        q_channels=stats.quantiles("channels"),
        c=c,
        c_spread=c_spread,
        c_measured=stats.c_mean,
        c_quantiles=stats.quantiles("c"),
        slope=slope,
        sensitivity=sensitivity,
        sensitivity_measured=parting,
        q_off=q_off,
        c_off=c_off,
        note=step.note,
    )


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    measure: Callable[[Tensor, int], Any],
    known: dict[Any, Affine],
) -> Tape:
    tape = Tape(model, size, measure, known)
    try:
        with apart():  # a fused kernel's pre-activation cannot be measured
            tape.run(*args, **kwargs)
    except Exception as error:
        shapes = [tuple(t.shape) for t in _tensors((args, kwargs))]
        raise ValueError(
            f"diagnose: the model fails on data of shape {', '.join(map(str, shapes))}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return tape


def _partings(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    tape: Tape,
    known: dict[Any, Affine],
) -> list[float]:
    """Measured sensitivity of each step to a small change of some inputs; nan if unknown."""
    few = min(max(size // 4, 1), _NUDGED)
    nowhere = [math.nan] * len(tape.steps)
    if any(s.op == "dropout" for s in tape.steps):
        return nowhere  # the masks of neighbours would differ
    # Not a user's seed: noise equal to the data would not change their direction.
    generator = torch.Generator().manual_seed(0x5EED_0FD1)

    def doubled(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.ndim or len(t) != size:
            return t
        t = t[:few]
        if not t.is_floating_point():
            return torch.cat((t, t))
        # Far above rounding errors, and small enough for the C map to be linear.
        width = max(1e-2, 16 * torch.finfo(t.dtype).eps) * float(t.double().square().mean().sqrt())
        noise = torch.randn(t.shape, generator=generator).to(t.device) * width
        return torch.cat((t, (t + noise).to(t.dtype)))

    args, kwargs = pytree.tree_map(doubled, (args, kwargs))
    other = _run(model, args, kwargs, 2 * few, parted, known)
    if [s.key for s in other.steps] != [s.key for s in tape.steps]:
        return nowhere
    found = [math.nan if s.value is None else float(s.value) for s in other.steps]
    start = next((p for p, s in zip(found, other.steps, strict=True) if s.op == "input"), 0.0)
    return [p / start for p in found] if start > 0 else nowhere


def _check(model: nn.Module, batches: int, **sigmas: float | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"diagnose: model must be an nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and (nn.parameter.is_lazy(t) or t.is_meta):
                raise ValueError(
                    f"diagnose: {path!r} has a parameter without memory (lazy, or on the meta "
                    "device); run the model once, or call model.to_empty(device=...), first"
                )
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ValueError(f"diagnose: batches must be a positive int, got {batches!r}")
    for name, sigma in sigmas.items():
        if sigma is not None and not 0 <= real("diagnose", name, sigma) < math.inf:
            raise ValueError(f"diagnose: {name}={sigma} must be finite and not negative")
    if sigmas.get("sigma_w") == 0:
        raise ValueError("diagnose: sigma_w=0 would leave nothing of the input; pass it positive")


def _batches(
    data: Tensor | Iterable[Any], most: int
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], int]]:
    """Arguments, keyword arguments and number of inputs of each batch."""
    if not isinstance(data, Tensor) and (
        not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping))
    ):
        raise TypeError(
            f"diagnose: data must be a tensor or an iterable of batches, got {type(data).__name__}"
        )
    for number, batch in enumerate([data] if isinstance(data, Tensor) else data):
        if number == most:
            return
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        kwargs = dict(first) if isinstance(first, Mapping) else {}
        tensors = _tensors(kwargs or first)
        if not tensors or not (kwargs or isinstance(first, Tensor)):
            raise TypeError(
                f"diagnose: batch {number} must be a tensor, a tuple that begins with one, or a "
                f"dict of them, got {type(first).__name__}"
            )
        size = len(tensors[0]) if tensors[0].ndim else 0
        if size < 2:
            raise ValueError(
                f"diagnose: batch {number} has shape {tuple(tensors[0].shape)}; needs at least 2 "
                "inputs, (N, ...), to compare"
            )
        yield () if kwargs else (first,), kwargs, size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _moved(model: nn.Module, tree: Any) -> Any:
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return tree

    def move(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.to(like.device, like.dtype if t.is_floating_point() else t.dtype)

    return pytree.tree_map(move, tree)


def _parting(first: list[Step], second: list[Step]) -> str:
    for a, b in zip(first, second, strict=False):
        if a.key != b.key:
            return b.path
    return (first + second)[-1].path
