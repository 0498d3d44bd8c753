"""Plots of training: loss and accuracy by epoch, accuracy by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from fusedshape.files import save_figure

Result = Mapping[str, Any]

# The palette of Okabe and Ito, which colour-blind readers can tell apart, and two greys.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.45", "0.15")


def plot_curves(results: Mapping[str, Sequence[Result]], path: str | Path, title: str = "") -> None:
    """Plot training loss and test accuracy by epoch, with a line per run and a colour per label.

    The loss axis ends at twice the first loss of the middle run, so spikes are cut off.

    Args:
        results: label → results of `fusedshape.train.run`, for example one per seed.
        path: file; its suffix determines the format.
        title: title of the figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class, percent = _matplotlib()
    figure = figure_class(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    losses, accuracies = figure.subplots(1, 2)
    for number, (label, runs) in enumerate(results.items()):
        for i, run in enumerate(runs):
            epochs = run["epochs"]
            x = range(1, len(epochs) + 1)
            style = {"color": f"C{number}", "label": None if i else label}
            for axes, key in ((losses, "train_loss"), (accuracies, "test_accuracy")):
                y = [float("nan") if e[key] is None else e[key] for e in epochs]
                axes.plot(x, y, marker="." if len(epochs) < 3 else "", **style)
    firsts = [
        e["train_loss"] for runs in results.values() for run in runs for e in run["epochs"][:1]
    ]
    firsts = [loss for loss in firsts if loss is not None]
    losses.set(xlabel="epoch", ylabel="training loss")
    losses.set_ylim(0, 2 * median(firsts) if firsts else None)
    losses.grid(alpha=0.3)
    _accuracy_axis(accuracies, percent)
    accuracies.set(xlabel="epoch")
    accuracies.legend()
    save_figure(figure, path, dpi=150)


def plot_depths(
    accuracy: Mapping[str, Mapping[int, Sequence[float]]],
    path: str | Path,
    title: str = "",
    source: str = "",
) -> None:
    """Final test accuracy by depth: a line through the means with its label at the end, and a dot
    for every seed.

    Args:
        accuracy: label → depth → accuracies (0 … 1).
        path: file; its suffix decides the format.
        title: over the figure.
        source: under the figure, and in the file's metadata: where the numbers come from.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class, percent = _matplotlib()
    figure = figure_class(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    depths = sorted({depth for by_depth in accuracy.values() for depth in by_depth})
    ends = []
    for number, (label, by_depth) in enumerate(accuracy.items()):
        x = [depth for depth in depths if by_depth.get(depth)]
        y = [mean(by_depth[depth]) for depth in x]
        color = _COLORS[number % len(_COLORS)]
        axes.plot(x, y, color=color, linewidth=2)
        for depth in x:
            dots = by_depth[depth]
            axes.plot([depth] * len(dots), dots, "o", markersize=4, color=color)
        if x:
            ends.append((y[-1], x[-1], label, color))
    ends.sort(key=lambda end: -end[0])
    for (_, x_end, label, color), y_label in zip(
        ends, labels_apart([e[0] for e in ends]), strict=True
    ):
        place = {"xytext": (10, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (x_end, y_label), color=color, fontsize=12, **place)
    axes.set(xscale="log", xlabel="layers with an activation")
    axes.set_title(title, loc="left", fontsize=13)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    _accuracy_axis(axes, percent)
    figure.supxlabel(source, fontsize=8, color="0.4")
    save_figure(figure, path, dpi=150, metadata={"Description": source})


def labels_apart(heights: Sequence[float], gap: float = 0.06) -> list[float]:
    """Heights of labels, given from the top down, moved until they are `gap` apart."""
    found: list[float] = []
    for height in heights:
        found.append(min(height, found[-1] - gap) if found else height)
    for i in range(len(found) - 1, -1, -1):  # labels at the bottom push the others up
        found[i] = max(found[i], found[i + 1] + gap if i + 1 < len(found) else 0.02)
    return found


def _accuracy_axis(axes: Any, percent: Any) -> None:
    axes.set_ylabel("test accuracy")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(percent(1.0))
    axes.grid(alpha=0.3)


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib; install it with: pip install 'fusedshape[plot]'"
        ) from error
    return Figure, PercentFormatter
