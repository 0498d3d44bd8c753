"""Pictures of a record: speed-up per case, roofline, memory, accuracy, growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusedshape.bench.records import Record, Row
from fusedshape.machine import headline


def plot(record: Record, folder: Path) -> list[Path]:
    """Draw what the record has data for, one PNG each.

    Args:
        record: as `records.load` returns it.
        folder: made if missing; gets speedup.png, roofline.png, memory.png, accuracy.png and
            scaling.png.

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
            figure.suptitle(f"{name}: {headline(record)}", fontsize=8)
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=150)
    if not written:
        raise ValueError(
            "plot: the record has no layer, network or series that is ok, so nothing to draw"
        )
    return written


def _speedup(figure: Any, record: Record) -> bool:
    """Other ÷ ours for each layer, with the 20th to 80th percentile."""
    rows = [row for row in record["rows"] if _layer(row) and row["ratios"]]
    pairs = sorted({r for row in rows for r in row["ratios"] if r.endswith("/fused")})
    if not pairs:
        return False
    axes = _tall(figure, len(rows))
    step = 0.8 / len(pairs)
    for number, pair in enumerate(pairs):
        points = [(i, row["ratios"][pair]) for i, row in enumerate(rows) if pair in row["ratios"]]
        y = [i + (number - (len(pairs) - 1) / 2) * step for i, _ in points]
        x = [middle for _, (_, middle, _) in points]
        # A record may know the median alone.
        sides = [
            [0.0 if end is None else abs(end - ratio[1]) for ratio in ratios for end in [ratio[i]]]
            for i, ratios in ((i, [ratio for _, ratio in points]) for i in (0, 2))
        ]
        label = pair.replace("/", " ÷ ")
        axes.errorbar(x, y, xerr=sides, fmt=".", color=f"C{number}", label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time ÷ ours (right of 1 is our gain)")
    axes.xaxis.set_major_formatter("{x:g}")
    # All nine of a decade would run into one another.
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    _names(axes, rows)
    return True


def _roofline(figure: Any, record: Record) -> bool:
    """TFLOP/s by FLOP per byte, under the machine's own measured roofs."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in record["rows"]:
        if not row.get("flops") or not row.get("bytes"):
            continue
        for name, result in row["candidates"].items():
            if "TFLOP/s" in result:
                pair = (row["flops"] / row["bytes"], result["TFLOP/s"])
                points.setdefault(name, []).append(pair)
    copy = record["ceilings"].get("copy GB/s")
    if not points or not copy:
        return False
    axes = figure.subplots()
    for name, pairs in points.items():
        axes.plot(*zip(*pairs, strict=True), ".", label=name)
    xs = [x for pairs in points.values() for x, _ in pairs]
    low, high = min(xs) / 2, max(xs) * 2
    roofs = {k: v for k, v in record["ceilings"].items() if k.startswith("matmul")}
    for name, flat in roofs.items():
        ridge = 1e3 * flat / copy
        x = sorted({low, min(max(ridge, low), high), high})
        axes.plot(x, [min(flat, v * copy / 1e3) for v in x], color="black", linewidth=0.8)
        axes.annotate(name, (high, flat), fontsize=6, ha="right", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    axes.legend(fontsize=7)
    return True


def _memory(figure: Any, record: Record) -> bool:
    """What autograd saves, as a multiple of what ours saves."""
    return _multiples(
        figure,
        [row for row in record["rows"] if "series" not in row["parameters"]],
        lambda result: result.get("saved_bytes"),
        "saved for backward ÷ ours",
    )


def _accuracy(figure: Any, record: Record) -> bool:
    """Largest relative error of a row's tensors, against float64."""
    rows = [row for row in record["rows"] if _layer(row)]
    return _multiples(
        figure,
        rows,
        lambda result: max(result.get("error", {}).values(), default=None),
        "relative error against float64, largest of value and gradients",
        absolute=True,
    )


def _scaling(figure: Any, record: Record) -> bool:
    """Each series by size, with its fitted exponent."""
    fits = record["fits"]
    if not fits:
        return False
    metrics = list(dict.fromkeys(fit["metric"] for fit in fits))
    figure.set_size_inches(6 * len(metrics), 4.5)
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for fit in fits:
            if fit["metric"] == metric:
                label = f"{fit['series']}, {fit['candidate']}: ∝ n^{fit['exponent']:.2f}"
                axes.plot(fit["sizes"], fit["values"], ".-", label=label)
        axes.set(xscale="log", yscale="log", xlabel="size", ylabel=metric)
        axes.legend(fontsize=6)
    return True


_PLOTS: dict[str, Callable[[Any, Record], bool]] = {
    "speedup": _speedup,
    "roofline": _roofline,
    "memory": _memory,
    "accuracy": _accuracy,
    "scaling": _scaling,
}


def _multiples(
    figure: Any,
    rows: Sequence[Row],
    value: Callable[[dict[str, Any]], float | None],
    label: str,
    absolute: bool = False,
) -> bool:
    found: dict[str, list[tuple[int, float]]] = {}
    kept: list[Row] = []
    for row in rows:
        values = {name: value(result) for name, result in row["candidates"].items()}
        own = values.get("fused")
        if not own:
            continue
        for name, v in values.items():
            if v is not None and (absolute or name != "fused"):
                found.setdefault(name, []).append((len(kept), v if absolute else v / own))
        kept.append(row)
    if not found:
        return False
    axes = _tall(figure, len(kept))
    for name, points in found.items():
        axes.plot([v for _, v in points], [i for i, _ in points], ".", label=name)
    if absolute:
        axes.set_xscale("log")
    else:
        axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    _names(axes, kept)
    return True


def _layer(row: Row) -> bool:
    return row["case"].partition("/")[0] in ("pointwise", "conv_act", "linear_act", "chain", "net")


def _tall(figure: Any, count: int) -> Any:
    figure.set_size_inches(9, 2 + 0.16 * count)
    return figure.subplots()


def _names(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=5)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
