"""Pictures of a record: speed-up, roofline, memory, accuracy, growth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from fusedshape.bench.records import Record, Row
from fusedshape.bench.text import OTHERS, is_ours
from fusedshape.files import save_figure
from fusedshape.machine import headline

#: The candidates that are drawn, with the colour of each in every picture.
COLOURS = {
    "bare": "black",
    "fused": "C0",
    "fused chain": "C9",
    "eager": "C1",
    "folded": "C2",
    "inplace": "C3",
    "compiled": "C4",
    "compiled max-autotune": "C6",
    "dks": "C5",
}
#: Groups of cases that run layers or networks.
LAYERS = ("conv_act", "linear_act", "chain", "net")
#: Height in inches of a line of text, and of everything around the lines.
_LINE, _FRAME = 0.2, 0.9

#: Low, middle and high value of each candidate.
Points = dict[str, tuple[float, float, float]]


class _Chart(NamedTuple):
    title: str
    lines: dict[str, Points]


def plot(record: Record, folder: Path) -> list[Path]:
    """Draw what the record has data for, one PNG each.

    Machine and commit are written into the picture and into the file's description.

    Args:
        record: as `records.load` returns it.
        folder: made if missing; gets speedup.png (layers and networks), pointwise.png (speed-up of
            the activations by themselves), roofline.png, memory.png, accuracy.png and scaling.png.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the record has nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib; install it with: pip install 'fusedshape[plot]'"
        ) from error
    written = []
    for name, draw in _PLOTS.items():
        figure = Figure(layout="constrained")
        if draw(figure, record):
            figure.suptitle(f"{name}: {headline(record)}", fontsize=9)
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{name}.png")
            about = {"Description": headline(record)}
            save_figure(figure, written[-1], dpi=110, metadata=about)
    if not written:
        raise ValueError(
            "plot: the record has no layer, network or series that is ok, so nothing to draw"
        )
    return written


def _speedup(figure: Any, record: Record) -> bool:
    """Time of others divided by ours for each layer and network, with 20th and 80th percentile."""
    return _stack(figure, _charts(_by_group(record, *LAYERS), _gains), _GAIN, equal=1)


def _pointwise(figure: Any, record: Record) -> bool:
    """Time of others divided by ours for each activation, with 20th and 80th percentile."""
    return _stack(figure, _charts(_by_activation(record), _gains), _GAIN, equal=1)


def _memory(figure: Any, record: Record) -> bool:
    """Bytes that autograd saves for backward, and the peak where the device counts it."""
    charts = [
        _Chart(f"{chart.title}: {what}", chart.lines)
        for key, what in (("saved_bytes", "saved for backward"), ("peak_bytes", "at the peak"))
        for chart in _charts(_by_group(record, "chain", "net"), partial(_megabytes, key))
    ]
    return _stack(figure, charts, "MB", log=False)


def _accuracy(figure: Any, record: Record) -> bool:
    """Largest relative error of a row's tensors, against float64."""
    pointwise = [rows for rows in _by_activation(record) if rows[0]["case"].endswith("/step")]
    charts = _charts([*pointwise, *_by_group(record, *LAYERS)], _errors)
    return _stack(figure, charts, "relative error against float64, largest of value and gradients")


_GAIN = "time ÷ ours (right of 1 is our gain)"


def _gains(row: Row) -> Points:
    found = {}
    for other in OTHERS:
        ratio = row["ratios"].get(f"{other}/fused")
        if ratio is not None and other in COLOURS:
            low, middle, high = ratio
            # Old records have the median alone.
            found[other] = middle if low is None else low, middle, middle if high is None else high
    return found


def _megabytes(key: str, row: Row) -> Points:
    sizes = {name: result[key] / 1e6 for name, result in row["candidates"].items() if key in result}
    return {name: (size, size, size) for name, size in sizes.items() if name in COLOURS}


def _errors(row: Row) -> Points:
    worst = {
        name: max(result.get("error", {}).values(), default=0.0)
        for name, result in row["candidates"].items()
    }
    # An error of zero cannot be drawn on a logarithmic axis.
    return {name: (e, e, e) for name, e in worst.items() if e and name in COLOURS}


def _by_group(record: Record, *groups: str) -> list[list[Row]]:
    return [
        [row for row in record["rows"] if row["case"].partition("/")[0] == group]
        for group in groups
    ]


def _by_activation(record: Record) -> list[list[Row]]:
    """Groups of two or more pointwise rows that differ in the activation only."""
    alike: dict[str, list[Row]] = {}
    for row in _by_group(record, "pointwise")[0]:
        alike.setdefault(row["case"].split("/", 2)[2], []).append(row)
    return [rows for rows in alike.values() if len(rows) > 1]


def _charts(groups: Iterable[Sequence[Row]], values: Callable[[Row], Points]) -> list[_Chart]:
    """A chart for each group, whose lines are labelled by the parts of the names that differ."""
    charts = []
    for rows in groups:
        lines = {row["case"]: points for row in rows if (points := values(row))}
        if not lines:
            continue
        names = [case.split("/") for case in lines]
        alike = [len(set(column)) == 1 for column in zip_longest(*names)]
        if len(names) == 1:
            alike = [True] + [False] * len(names[0])
        title = " · ".join(part for part, same in zip(names[0], alike, strict=False) if same)
        labels = (
            "/".join(part for part, same in zip(name, alike, strict=False) if not same)
            for name in names
        )
        charts.append(_Chart(title, dict(zip(labels, lines.values(), strict=True))))
    return charts


def _stack(
    figure: Any,
    charts: Sequence[_Chart],
    label: str,
    log: bool = True,
    equal: float | None = None,
) -> bool:
    """Charts on top of each other that share a scale, with a point for each candidate."""
    if not charts:
        return False
    heights = [_FRAME + _LINE * len(chart.lines) for chart in charts]
    figure.set_size_inches(9, 0.5 + sum(heights))
    shape = {"height_ratios": heights, "squeeze": False}
    grid = figure.subplots(len(charts), 1, sharex=True, **shape)[:, 0]
    drawn: dict[str, Any] = {}
    for axes, chart in zip(grid, charts, strict=True):
        for i, points in enumerate(chart.lines.values()):
            for number, (name, (low, middle, high)) in enumerate(points.items()):
                y = i + (number - (len(points) - 1) / 2) * 0.7 / len(points)
                axes.plot([low, high], [y, y], color=COLOURS[name], linewidth=1, alpha=0.5)
                drawn[name] = axes.plot([middle], [y], "o", color=COLOURS[name], markersize=3)[0]
        axes.set_yticks(range(len(chart.lines)), list(chart.lines))
        axes.set_ylim(len(chart.lines) - 0.4, -0.6)
        axes.set_title(chart.title, fontsize=8, loc="left")
        axes.grid(alpha=0.3)
        if equal is not None:
            axes.axvline(equal, color="black", linewidth=0.8)
        if log:
            axes.set_xscale("log")
        axes.tick_params(which="both", labelsize=7, labelbottom=True)
        if equal is not None:
            axes.xaxis.set_major_formatter("{x:g}")
            # Labels at all nine ticks of a decade would overlap.
            axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    if not log:
        grid[-1].set_xlim(left=0)
    grid[-1].set_xlabel(label, fontsize=8)
    names = [name for name in COLOURS if name in drawn]
    handles = [drawn[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    return True


def _roofline(figure: Any, record: Record) -> bool:
    """TFLOP/s against FLOP per byte, below the measured roofs of the machine."""
    points: dict[str, list[tuple[float, float]]] = {}
    for rows in _by_group(record, *LAYERS):
        for row in rows:
            if not row.get("flops") or not row.get("bytes"):
                continue
            for name, result in row["candidates"].items():
                if "TFLOP/s" in result and name in COLOURS:
                    pair = (row["flops"] / row["bytes"], result["TFLOP/s"])
                    points.setdefault(name, []).append(pair)
    copy = record["ceilings"].get("copy GB/s")
    if not points or not copy:
        return False
    figure.set_size_inches(8, 5)
    axes = figure.subplots()
    for name in sorted(points, key=is_ours):  # draw ours on top
        x, y = zip(*points[name], strict=True)
        axes.plot(x, y, "o", color=COLOURS[name], markersize=4, label=name)
    xs = [x for pairs in points.values() for x, _ in pairs]
    low, high = min(xs) / 2, max(xs) * 2
    roofs = {k: v for k, v in record["ceilings"].items() if k.startswith("matmul")}
    for name, flat in roofs.items():
        ridge = 1e3 * flat / copy
        ends = sorted({low, min(max(ridge, low), high), high})
        axes.plot(ends, [min(flat, v * copy / 1e3) for v in ends], color="black", linewidth=0.8)
        axes.annotate(f"{name}: {flat:.3g}", (high, flat), fontsize=8, ha="right", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return True


def _scaling(figure: Any, record: Record) -> bool:
    """Each series against its size, with proportional growth for comparison."""
    kinds: dict[str, list[Any]] = {}
    for fit in record["fits"]:
        if fit["candidate"] in COLOURS:
            kinds.setdefault(fit["series"].partition(" ")[0], []).append(fit)
    if not kinds:
        return False
    down = -(-len(kinds) // 2)
    figure.set_size_inches(10, 3.8 * down)
    for axes, fits in zip(
        figure.subplots(down, 2, squeeze=False).flat, kinds.values(), strict=False
    ):
        series = {fit["series"] for fit in fits}
        for number, fit in enumerate(fits):
            name = fit["candidate"] if len(series) == 1 else fit["series"]
            colour = COLOURS.get(name, f"C{number}")
            label = f"{name}: ∝ n^{fit['exponent']:.2f}"
            axes.plot(fit["sizes"], fit["values"], ".-", color=colour, label=label)
        top = max(fits, key=lambda fit: fit["values"][-1])
        ends = top["sizes"][0], top["sizes"][-1]
        line = [top["values"][-1] * end / ends[1] for end in ends]
        axes.plot(ends, line, ":", color="black", linewidth=0.8, label="∝ n")
        what, _, by = fits[0]["series"].partition(" by ")
        axes.set_title(what if len(series) == 1 else what.partition(" ")[0], fontsize=9)
        axes.set(xscale="log", yscale="log", xlabel=by or "layers")
        axes.set_ylabel("ms" if fits[0]["metric"] == "ms" else "bytes saved for backward")
        axes.set_xticks(top["sizes"], [f"{size:,.0f}" for size in top["sizes"]])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return True


_PLOTS: dict[str, Callable[[Any, Record], bool]] = {
    "speedup": _speedup,
    "pointwise": _pointwise,
    "roofline": _roofline,
    "memory": _memory,
    "accuracy": _accuracy,
    "scaling": _scaling,
}
