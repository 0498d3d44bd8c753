"""The demo, which trains a deep net with and without shaping, and the sweep over many nets."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from fusedshape.files import (
    CHECKSUM,
    ContentError,
    expect,
    read_json,
    remove_leftovers,
    with_checksum,
    without_checksum,
    write_json,
)
from fusedshape.machine import headline, provenance
from fusedshape.train.checkpoint import EPOCH, Result
from fusedshape.train.config import TrainConfig
from fusedshape.train.loop import demand_one_process, fit
from fusedshape.train.plot import plot_curves, plot_depths
from fusedshape.validate import integer

logger = logging.getLogger("fusedshape.train")

Say = Callable[[str], None]

#: The fields of TrainConfig that an arm sets. A gain of √2 is the edge of chaos of ReLU.
ARMS: dict[str, dict[str, Any]] = {
    "TAT leaky_relu": {"method": "TAT", "activation": "leaky_relu"},
    "DKS softplus": {"method": "DKS", "activation": "softplus"},
    "DKS tanh": {"method": "DKS", "activation": "tanh"},
    "EOC tanh": {"method": "EOC", "activation": "tanh"},
    "ReLU orthogonal": {"method": None, "activation": "relu", "gain": math.sqrt(2)},
    "ReLU He": {"method": None, "activation": "relu", "gain": math.sqrt(2), "init": "gaussian"},
}
DEMO_ARMS = ("TAT leaky_relu", "ReLU orthogonal")
DEMO_RATE = 1e-4
#: How both the demo and the sweep train.
TRAINING: dict[str, Any] = {"label_smoothing": 0.1}
DEPTHS = (300, 100, 30)
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
SEEDS = (0, 1, 2)

#: A row of a sweep. The columns depth, lr and seed repeat fields of the configuration.
_ROW = {
    "arm": tuple(ARMS),
    "purpose": ("rate", "full"),
    "depth": int,
    "lr": float,
    "seed": int,
    "diverged": bool,
    "config": dict,
    "status": ("done", "diverged"),
    "epochs": [EPOCH, ...],
    **dict.fromkeys(("final_accuracy", "best_accuracy", "final_train_loss"), (float, None)),
    "seconds": float,
    "header": int,
}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo trains.

    Attributes:
        depth: nonlinear layers.
        width: channels.
        epochs: passes over the data for TAT.
        seed: determines weights and the order of examples.
        threads: CPU threads; None leaves torch's setting.
        eta: target of TAT; None takes the method's default.
        clamp: take the nearest eta that can be reached where that one cannot.
    """

    depth: int = DEPTHS[0]
    width: int = 32
    epochs: int = 20
    seed: int = 0
    threads: int | None = None
    eta: float | None = None
    clamp: bool = False

    def configs(self) -> dict[str, TrainConfig]:
        """The configuration of each arm: TAT, and ReLU for a quarter of the epochs.

        Raises:
            ValueError, TypeError: as `TrainConfig`.
        """
        base = TrainConfig(
            depth=self.depth,
            width=self.width,
            epochs=self.epochs,
            lr=DEMO_RATE,
            seed=self.seed,
            threads=self.threads,
            **TRAINING,
        )
        tat, relu = DEMO_ARMS
        few = max(self.epochs // 4, 1)
        return {
            tat: replace(base, **ARMS[tat], eta=self.eta, clamp=self.clamp),
            relu: replace(base, **ARMS[relu], eta=None, epochs=few),
        }


def run_demo(
    out_dir: str | Path, demo: Demo = Demo(), *, progress: Say | None = None
) -> dict[str, Any]:
    """Train a deep vanilla convolutional net on digits twice: with TAT, and with ReLU.

    Both nets have the same layers, data, optimiser and learning rate. The ReLU net starts from
    orthogonal weights times √2, the best initialisation known for it, and trains for a quarter of
    the epochs. Writes `demo.json` and `demo.png`.

    Args:
        out_dir: folder, made if missing.
        demo: what to train.
        progress: what to do with a line of text; None prints it.

    Returns:
        The content of `demo.json`: header and rows.

    Raises:
        ValueError: a value out of its range, or a network in which TAT cannot reach eta.
        ImportError: scikit-learn or matplotlib is missing.
    """
    say = progress or _print
    demand_one_process()
    configs = demo.configs()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    header = provenance()
    say(
        f"{demo.depth} layers of {demo.width} channels, no normalisation, no skip connections, on "
        "8×8 digits"
    )
    say(headline(header))
    say(f"{'arm':<16} {'epochs':>6} {'train loss':>10} {'test accuracy':>13} {'seconds':>7}")
    rows: list[Result] = []
    for arm, config in configs.items():
        row = _row(arm, "demo", fit(config, bar=sys.stderr.isatty()))
        rows.append(row)
        say(_table_line(row))
        write_json(out / "demo.json", with_checksum({"header": header, "rows": rows}))
    title = f"{demo.depth} layers without normalisation or skip connections, digits"
    plot_curves({row["arm"]: [row] for row in rows}, out / "demo.png", title)
    say(f"wrote {out / 'demo.json'} and {out / 'demo.png'}")
    return {"header": header, "rows": rows}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep trains: every arm at every depth, with several seeds, at its best rate.

    Attributes:
        depths: nonlinear layers, in this order.
        arms: keys of `ARMS`.
        learning_rates: candidates.
        seeds: seeds of the full runs; the first one also chooses the rate.
        epochs: passes of the full runs over the data.
        width: channels.
        clamp: take the nearest target that can be reached where a method's own cannot.

    Raises:
        ValueError: an unknown arm, or no rates or seeds.
    """

    depths: Sequence[int] = DEPTHS
    arms: Sequence[str] = tuple(ARMS)
    learning_rates: Sequence[float] = LEARNING_RATES
    seeds: Sequence[int] = SEEDS
    epochs: int = 20
    width: int = 32
    clamp: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown:
            raise ValueError(f"Sweep: unknown arms {unknown}; known: {sorted(ARMS)}")
        if not (self.learning_rates and self.seeds):
            raise ValueError(
                f"Sweep: needs at least one learning rate and one seed, got "
                f"{len(self.learning_rates)} and {len(self.seeds)}"
            )

    def config(self, arm: str, depth: int, lr: float, seed: int) -> TrainConfig:
        """A full run of one arm."""
        config = TrainConfig(
            depth=depth,
            width=self.width,
            epochs=self.epochs,
            lr=lr,
            seed=seed,
            threads=1,
            **TRAINING,
            **ARMS[arm],
        )
        return replace(config, clamp=self.clamp and hasattr(config.recipe, "clamp"))


def run_sweep(
    out_path: str | Path, plan: Sweep = Sweep(), *, jobs: int = 2, progress: Say | None = None
) -> dict[str, Any]:
    """Train every arm at every depth with several seeds, each at the best of a few learning rates.

    The learning rate of each arm and depth is chosen on the first seed, by the lowest final
    training loss: runs of a quarter of the epochs select the best two rates, and full runs decide
    between them. The other seeds use that rate. A run is added to the file when it ends, and runs
    that are in the file are not repeated, so that an interrupted sweep resumes. Worker processes
    have one thread each. Plots are written beside the file, one for each depth and one of accuracy
    by depth.

    Args:
        out_path: JSON file.
        plan: what to train.
        jobs: processes; 1 trains in this one.
        progress: what to do with a line of text; None prints it.

    Returns:
        The content of the file: headers, and rows of purpose "rate" or "full".

    Raises:
        ValueError: no process, or a file that holds something else.
        ImportError: scikit-learn is missing.
    """
    say = progress or _print
    path = Path(out_path)
    integer("train sweep", "jobs", jobs, 1)
    demand_one_process()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    data = _read_sweep(path)
    rows: list[Result] = data["rows"]
    data["headers"].append(provenance() | {"jobs": jobs})
    header = len(data["headers"]) - 1
    say(headline(data["headers"][-1]))

    def train(purpose: str, wanted: Mapping[TrainConfig, str]) -> dict[str, list[Result]]:
        """The rows of these configurations by arm, trained or found in the file."""
        done = [TrainConfig.from_dict(row["config"]) for row in rows if row["purpose"] == purpose]
        for config, result in _train_all([c for c in wanted if c not in done], jobs):
            row = _row(wanted[config], purpose, result) | {"header": header}
            rows.append(row)
            write_json(path, with_checksum(data))
            say(f"{purpose:<4} {config.depth:>5} {config.lr:.0e} {config.seed} {_table_line(row)}")
        found: dict[str, list[Result]] = {arm: [] for arm in plan.arms}
        for row in rows:
            if row["purpose"] == purpose and TrainConfig.from_dict(row["config"]) in wanted:
                found[row["arm"]].append(row)
        return found

    first, *seeds = plan.seeds
    for depth in plan.depths:
        short: dict[TrainConfig, str] = {}
        for arm in plan.arms:
            for lr in plan.learning_rates:
                config = plan.config(arm, depth, lr, first)
                short[replace(config, epochs=max(config.epochs // 4, 1))] = arm
        tried = train("rate", short)
        finals = train(
            "full",
            {
                plan.config(arm, depth, lr, first): arm
                for arm in plan.arms
                for lr in best_rates(tried[arm])[:2]
            },
        )
        train(
            "full",
            {
                plan.config(arm, depth, best_rates(finals[arm])[0], seed): arm
                for seed in seeds
                for arm in plan.arms
            },
        )
        plot_sweep(data, path)
    return data


def best_rates(rows: Sequence[Result]) -> list[float]:
    """Learning rates sorted by final training loss; those of diverged runs come last."""

    def loss(row: Result) -> float:
        return math.inf if row["final_train_loss"] is None else row["final_train_loss"]

    return [row["lr"] for row in sorted(rows, key=lambda row: (loss(row), row["lr"]))]


def final_runs(data: Mapping[str, Any]) -> dict[int, dict[str, list[Result]]]:
    """The full runs of a sweep, by depth and arm, at the learning rate that was chosen.

    Args:
        data: what `run_sweep` returns.
    """
    groups: dict[int, dict[str, list[Result]]] = {}
    for row in data["rows"]:
        if row["purpose"] == "full":
            groups.setdefault(row["depth"], {}).setdefault(row["arm"], []).append(row)
    for arms in groups.values():
        for arm, rows in arms.items():
            first = [row for row in rows if row["seed"] == rows[0]["seed"]]
            arms[arm] = [row for row in rows if row["lr"] == best_rates(first)[0]]
    return groups


def plot_sweep(data: Mapping[str, Any], path: str | Path) -> None:
    """Draw the plots of a sweep: training curves for each depth, and accuracy by depth.

    Args:
        data: what `run_sweep` returns.
        path: the sweep's JSON file; the plots take its name.

    Raises:
        ImportError: matplotlib is missing.
    """
    path = Path(path)
    runs = final_runs(data)
    accuracy: dict[str, dict[int, list[float]]] = {}
    for depth, arms in sorted(runs.items()):
        plot_curves(arms, path.with_name(f"{path.stem}-{depth}.png"), f"{depth} layers, digits")
        for arm, rows in arms.items():
            values = [row["final_accuracy"] or 0.0 for row in rows]
            accuracy.setdefault(arm, {})[depth] = values
    if runs:
        title = "Test accuracy after training, without normalisation or skip connections"
        seeds = len({row["seed"] for row in data["rows"]})
        source = (
            f"scikit-learn's digits; means of {seeds} seeds, dots are single runs; chance is 10%\n"
            f"{headline(data['headers'][-1])}"
        )
        plot_depths(accuracy, path.with_suffix(".png"), title, source)


def summary(data: Mapping[str, Any]) -> str:
    """A table of the full runs: mean and range of the final test accuracy over seeds.

    Args:
        data: what `run_sweep` returns.

    Returns:
        Lines of text.
    """
    lines = [
        f"{'depth':>5} {'arm':<16} {'lr':>6} {'seeds':>5} {'mean':>6} {'lowest':>7} {'highest':>8}"
    ]
    for depth, arms in final_runs(data).items():
        for arm, rows in arms.items():
            values = [row["final_accuracy"] or 0.0 for row in rows]
            lines.append(
                f"{depth:>5} {arm:<16} {rows[0]['lr']:>6.0e} {len(rows):>5} {mean(values):>6.1%} "
                f"{min(values):>7.1%} {max(values):>8.1%}"
            )
    return "\n".join(lines)


def _train_all(configs: Sequence[TrainConfig], jobs: int) -> Iterator[tuple[TrainConfig, Result]]:
    """Train, and yield each result as soon as it is there."""
    if jobs == 1 or len(configs) < 2:
        for config in configs:
            yield config, fit(config)
        return
    # "spawn", because a forked child of a process with OpenMP threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_die_on_interrupt)
    try:
        futures = {pool.submit(fit, config): config for config in configs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    pool.shutdown()


def _die_on_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _row(arm: str, purpose: str, result: Result) -> Result:
    config = result["config"]
    return {
        "arm": arm,
        "purpose": purpose,
        **{key: config[key] for key in ("depth", "lr", "seed")},
        "diverged": result["status"] == "diverged",
        **result,
    }


def _read_sweep(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {"headers": [], "rows": []}
    data: dict[str, Any] = read_json(path)
    try:
        expect(data, dict, "its content")
        if CHECKSUM in data:
            data = without_checksum(data, "its content")
        else:
            logger.warning("%s has no checksum: an older version wrote it", path)
        expect(data, {"headers": [dict, ...], "rows": [_ROW, ...]}, "its content")
        for i, row in enumerate(data["rows"]):
            config = TrainConfig.from_dict(row["config"])
            if any(row[key] != getattr(config, key) for key in ("depth", "lr", "seed")):
                raise ContentError(f"its content.rows[{i}] is not of its own config")
            if not 0 <= row["header"] < len(data["headers"]) or not row["epochs"]:
                raise ContentError(f"its content.rows[{i}] has no header, or no epochs")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no sweep's file ({error}); choose another name") from None
    return data


def _table_line(row: Result) -> str:
    loss, accuracy = row["final_train_loss"], row["final_accuracy"]
    return (
        f"{row['arm']:<16} {len(row['epochs']):>6} "
        f"{'diverged' if loss is None else format(loss, '.4f'):>10} "
        f"{'' if accuracy is None else format(accuracy, '.1%'):>13} {row['seconds']:>7.0f}"
    )


def _print(line: str) -> None:
    print(line, flush=True)
