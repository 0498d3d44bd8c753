"""`fusedshape train`: run a configuration, the demo, or the evidence sweep."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path

from fusedshape.shell import Commands, as_field
from fusedshape.theory import TARGETS, TAT
from fusedshape.train.config import TrainConfig
from fusedshape.train.demo import ARMS, DEPTHS, SEEDS, Demo, Sweep, run_demo, run_sweep, summary
from fusedshape.train.loop import run


def declare(commands: Commands) -> None:
    """Declare `fusedshape train run|demo|sweep`."""
    about = "train a configuration of yours, the demo, or the evidence sweep"
    train = commands.group("train", about, usual="run")

    parser = train.add("run", _run, "train what a JSON file describes; go on if interrupted")
    parser.add_argument("config", metavar="FILE", help="JSON file of a TrainConfig")
    _add_out(parser)
    names = {field.name: field.name for field in fields(TrainConfig)}
    parser.set_defaults(spelling=names, write=as_field)

    parser = train.add("demo", _demo, "train one deep vanilla network twice: by TAT, and with ReLU")
    _add_out(parser)
    parser.add_argument(
        "--depth",
        type=int,
        default=DEPTHS[0],
        metavar="LAYERS",
        help="nonlinear layers (default 300)",
    )
    parser.add_argument(
        "--width", type=int, default=32, metavar="CHANNELS", help="channels of a layer (default 32)"
    )
    parser.add_argument(
        "--epochs", type=int, default=20, help="passes of TAT over the data (default 20)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and of the order of data (default 0)"
    )
    parser.add_argument(
        "--threads", type=int, help="number of CPU threads (default: torch's setting)"
    )
    parser.add_argument(
        "--eta",
        type=float,
        metavar="NUMBER",
        help=f"{TARGETS['eta'].about}, for TAT (default {TAT().eta:g})",
    )
    parser.add_argument(
        "--clamp",
        action="store_true",
        help="take the nearest eta that can be reached where the wanted one cannot, as in shallow "
        "networks",
    )

    about = "train every arm at every depth with several seeds; go on if interrupted"
    parser = train.add("sweep", _sweep, about)
    _add_out(parser)
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="PROCESSES", help="processes at a time (default 2)"
    )
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=DEPTHS,
        metavar="LAYERS",
        help=f"depths to train, in this order (default {' '.join(map(str, DEPTHS))})",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=tuple(ARMS),
        metavar="ARM",
        help=f"arms to train (default all: {', '.join(map(repr, ARMS))})",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=SEEDS,
        metavar="SEED",
        help=f"seeds of the full runs (default {' '.join(map(str, SEEDS))})",
    )
    parser.add_argument(
        "--epochs", type=int, default=20, help="passes of the full runs over the data (default 20)"
    )
    parser.add_argument(
        "--clamp",
        action="store_true",
        help="take the nearest targets that can be reached where the methods' own cannot, as in "
        "shallow networks",
    )
    parser.set_defaults(spelling={"depth": "--depths", "seed": "--seeds", "eta": "eta"})


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="folder of the results (default runs)",
    )


def _run(args: argparse.Namespace) -> None:
    if not os.path.lexists(args.config):
        raise ValueError(f"train {args.config}: no such file; give demo, sweep, or a JSON file")
    result = run(TrainConfig.load(args.config), args.out)
    epochs, place = len(result["epochs"]), args.out / "result.json"
    if result["status"] == "diverged":
        raise RuntimeError(f"the loss of epoch {epochs} is not finite; lower lr. See {place}")
    print(
        f"{epochs} epochs, {result['seconds']:.0f} s: training loss "
        f"{result['final_train_loss']:.4f}, test accuracy {result['final_accuracy']:.1%} "
        f"(best {result['best_accuracy']:.1%})\nwritten to {place}"
    )


def _demo(args: argparse.Namespace) -> None:
    run_demo(args.out, Demo(**{field.name: getattr(args, field.name) for field in fields(Demo)}))


def _sweep(args: argparse.Namespace) -> None:
    names = ("depths", "arms", "seeds", "epochs", "clamp")
    plan = Sweep(**{name: getattr(args, name) for name in names})
    print(summary(run_sweep(args.out / "sweep.json", plan, jobs=args.jobs)))
