"""Plots of training: loss and accuracy by epoch, accuracy by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from fusedshape.files import save_figure

Result = Mapping[str, Any]


def plot_curves(results: Mapping[str, Sequence[Result]], path: str | Path, title: str = "") -> None:
    """Training loss and test accuracy by epoch; a line per run, a colour per label.

    The loss axis ends at twice the middle run's first loss: a spike leaves the picture.

    Args:
        results: label → results of `fusedshape.train.run`, for example one per seed.
        path: file; its suffix decides the format.
        title: over the figure.

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
    accuracy: Mapping[str, Mapping[int, Sequence[float]]], path: str | Path, title: str = ""
) -> None:
    """Final test accuracy by depth; a line per label through the means, a dot per seed.

    Args:
        accuracy: label → depth → accuracies (0 … 1).
        path: file; its suffix decides the format.
        title: over the figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class, percent = _matplotlib()
    figure = figure_class(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    depths = sorted({depth for by_depth in accuracy.values() for depth in by_depth})
    for number, (label, by_depth) in enumerate(accuracy.items()):
        x = [depth for depth in depths if by_depth.get(depth)]
        axes.plot(x, [mean(by_depth[depth]) for depth in x], color=f"C{number}", label=label)
        for depth in x:
            dots = by_depth[depth]
            axes.plot([depth] * len(dots), dots, ".", color=f"C{number}")
    axes.set(xscale="log", xlabel="nonlinear layers", title=title)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    _accuracy_axis(axes, percent)
    axes.legend()
    save_figure(figure, path, dpi=150)


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
