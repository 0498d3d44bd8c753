"""The figure of a diagnosis: q, c and sensitivity over depth, predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedshape.files import save_figure

if TYPE_CHECKING:
    from fusedshape.diagnose.report import Diagnosis, Layer

_NAMED = 25  # names of layers that fit on the axis
_LONG = 24  # characters of a name that are shown


def plot(diagnosis: Diagnosis, path: str | Path, title: str = "") -> None:
    """Write the figure; see `Diagnosis.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib; install it with: pip install 'fusedshape[plot]'"
        ) from error
    rows = diagnosis.layers
    figure: Any = Figure(figsize=(9, 9), layout="constrained")
    figure.suptitle(title or diagnosis.verdict, fontsize=10, wrap=True)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    _draw_q(top, rows)
    _draw_c(middle, rows)
    _draw_sensitivity(bottom, rows)
    _name_layers(bottom, rows)
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
        for number, finding in enumerate(diagnosis.findings[:3]):
            at = next((i for i, r in enumerate(rows) if r.path == finding.paths[0]), None)
            if at is not None:
                label = f"{number + 1}. {finding.cause} at {finding.paths[0]!r}"
                axes.axvline(at, color="C3", lw=1, ls="--", label=label)
    top.legend(fontsize=8)
    bottom.legend(fontsize=8)
    save_figure(figure, path, dpi=150)


def _draw_q(axes: Any, rows: Sequence[Layer]) -> None:
    x = range(len(rows))
    _band(axes, x, [r.q_quantiles for r in rows])
    axes.plot(x, [r.q_measured for r in rows], color="C0", label="measured, 5…95 % and mean")
    _theory(axes, x, [_known(r.q, r.op) for r in rows])
    width = [
        (r.q * math.exp(-2 * r.q_spread), r.q * math.exp(2 * r.q_spread))
        if r.q_spread > 0
        else (math.nan, math.nan)
        for r in rows
    ]
    for side, label in ((0, "theory ± 2σ of finite width"), (1, None)):
        axes.plot(x, [w[side] for w in width], color="k", lw=0.8, ls=":", label=label)
    axes.set(yscale="log", ylabel="q, mean square over channels")
    shown = [q for r in rows for q in (*r.q_quantiles, r.q)]
    _limit(axes, [*shown, *(q for pair in width for q in pair)], 1.5)


def _draw_c(axes: Any, rows: Sequence[Layer]) -> None:
    x = range(len(rows))
    _band(axes, x, [r.c_quantiles for r in rows])
    axes.plot(x, [r.c_measured for r in rows], color="C0")
    _theory(axes, x, [_known(r.c, r.op) for r in rows])
    axes.set(ylabel="c, cosine of two inputs", ylim=(-1.05 if _negative(rows) else -0.05, 1.05))


def _draw_sensitivity(axes: Any, rows: Sequence[Layer]) -> None:
    x = range(len(rows))
    axes.plot(x, [r.sensitivity_measured for r in rows], color="C0", label="measured")
    _theory(axes, x, [r.sensitivity for r in rows], "theory, product of C'(1)")
    nonlinear = [i for i, r in enumerate(rows) if not math.isnan(r.slope)]
    slopes = [rows[i].slope for i in nonlinear]
    axes.plot(nonlinear, slopes, ".", color="C1", ms=4, label="C'(1) of the layer")
    axes.set(yscale="log", ylabel="sensitivity")
    _limit(axes, [s for r in rows for s in (r.sensitivity, r.sensitivity_measured, r.slope)], 3)


def _limit(axes: Any, values: Sequence[float], margin: float) -> None:
    """Let a logarithmic axis show the positive values, those within reason."""
    shown = [value for value in values if value > 0]
    if shown:
        axes.set_ylim(max(min(shown), 1e-12) / margin, min(max(shown), 1e12) * margin)


def _name_layers(axes: Any, rows: Sequence[Layer]) -> None:
    """Number the layers with weights from 1, and name them, or an even selection of them."""
    layers = [i for i, r in enumerate(rows) if r.op == "affine"]
    shown = list(enumerate(layers, 1))[:: math.ceil(len(layers) / _NAMED) or 1]
    axes.set_xticks([i for _, i in shown])
    axes.set_xticklabels(
        [f"{number}: {_short(rows[i].path)}" for number, i in shown],
        rotation=60,
        ha="right",
        rotation_mode="anchor",
        fontsize=7,
    )
    axes.set_xlabel("layer with weights")


def _short(path: str) -> str:
    """Shorten a path to its end, which distinguishes layers best."""
    return path if len(path) <= _LONG else "…" + path[1 - _LONG :]


def _known(value: float, op: str) -> float:
    return math.nan if op == "input" else value


def _negative(rows: Any) -> bool:
    return any(r.c_quantiles[0] < -0.05 for r in rows)


def _band(axes: Any, x: Sequence[int], quantiles: list[tuple[float, ...]]) -> None:
    for low, high, alpha in ((0, -1, 0.15), (1, -2, 0.25)):
        axes.fill_between(
            x,
            [q[low] for q in quantiles],
            [q[high] for q in quantiles],
            color="C0",
            alpha=alpha,
            lw=0,
        )


def _theory(axes: Any, x: Sequence[int], y: list[float], label: str = "theory") -> None:
    axes.plot(x, y, color="k", lw=1.2, ls="--", label=label)
