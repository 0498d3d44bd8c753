"""The command `fusedshape`: constants, convert, diagnose, train, bench, tune, build, info.

Exit codes: 0 done, 1 the request cannot be met (one line on stderr says why), 2 wrong usage,
130 interrupted, 141 whoever reads the output closed it, 143 terminated.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fusedshape import convert, native, theory
from fusedshape.activations import ACTIVATIONS
from fusedshape.bench import command as bench
from fusedshape.diagnose import command as diagnosis
from fusedshape.interrupts import Terminated, terminable
from fusedshape.machine import find_device, machine, version
from fusedshape.train import demo, run
from fusedshape.train.config import TARGETS, TrainConfig, load_object, make, strange_targets
from fusedshape.tuning import command as tuning

#: What `constants --model` takes where nothing is named.
_OF_A_MODEL = {"method": "TAT", "activation": "leaky_relu"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.

    Example:
        >>> main(["constants", "TAT", "leaky_relu", "--depth", "16"])  # doctest: +ELLIPSIS
        method         TAT
        activation     leaky_relu
        ...
        0
    """
    # What a terminal cannot show is no reason to lose what has been computed.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        with terminable():
            args.run(args)
            sys.stdout.flush()
    except Terminated:
        print("fusedshape: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("fusedshape: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes once more at its end, into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        print(f"fusedshape: error: {_said(error)}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    whole, commands = _declare()
    if argv and argv[0] in commands:
        # Options may stand before, between and behind files: bench compare --suite cpu A B.
        return commands[argv[0]].parse_intermixed_args(argv[1:])
    return whole.parse_args(argv)


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    return _declare()[0]


def _declare() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    about = "Deep vanilla networks: shaped activations, fused with the layers before them."
    whole = argparse.ArgumentParser(prog="fusedshape", description=about)
    whole.add_argument("--version", action="version", version=f"fusedshape {version()}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    found: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str) -> Any:
        found[name] = commands.add_parser(name, help=about, description=about)
        found[name].set_defaults(run=run, command=name)
        return found[name]

    constants = add("constants", _constants, "compute the constants of a shaped activation")
    constants.add_argument("method", nargs="?", help="DKS, TAT or EOC")
    constants.add_argument("activation", nargs="?", help=", ".join(ACTIVATIONS))
    for name, default in _OF_A_MODEL.items():
        about = f"with --model; default {default}"
        constants.add_argument(f"--{name}", dest=f"its_{name}", metavar=name.upper(), help=about)
    constants.add_argument("--model", help="pkg.module:factory, whose wiring to solve for")
    constants.add_argument("--strip-batchnorm", action="store_true", help="read past BatchNorm")
    constants.set_defaults(wrong_usage=constants.error)
    _add_targets(constants)

    model = add("convert", _convert, "say what convert() would do to a model; changes nothing")
    model.add_argument("model", help="pkg.module:factory, called without arguments")
    model.add_argument("--method", default="TAT", help="DKS, TAT or EOC (default TAT)")
    model.add_argument("--activation", default="leaky_relu", help="default leaky_relu")
    model.add_argument("--strip-batchnorm", action="store_true", help="remove BatchNorm layers")
    _add_targets(model)

    about = "compare a model with what theory says of it, layer by layer, and name what is wrong"
    diagnosis.add_arguments(add("diagnose", _diagnose, about))

    train = add("train", _train, "train the demo, the evidence sweep, or a configuration of yours")
    train.add_argument("what", nargs="?", default="demo", help="demo, sweep, or a JSON file")
    train.add_argument("--out", type=Path, default=Path("runs"), help="folder (default runs)")
    train.add_argument("--depth", type=int, help="of the demo's network (default 300)")
    train.add_argument("--epochs", type=int, help="of the demo (default 20)")
    train.add_argument("--seed", type=int, help="of the demo (default 0)")
    train.add_argument("--threads", type=int, help="CPU threads of the demo")
    train.add_argument("--jobs", type=int, help="processes of the sweep (default 2)")

    about = "measure speed, memory and accuracy; show, compare and plot what was measured"
    bench.add_arguments(add("bench", bench.main, about))

    about = "measure which engine computes each fused layer of a model fastest, and keep it"
    tuning.add_arguments(add("tune", _tune, about))

    build = add("build", _build, "compile the CPU kernels for this machine")
    build.add_argument("--force", action="store_true", help="compile even what is up to date")
    build.add_argument(
        "--optional", action="store_true", help="without a compiler, say so and go on"
    )
    build.add_argument("--verbose", action="store_true", help="show the compiler's command")

    info = add("info", _info, "say what is installed, built and chosen on this machine")
    info.add_argument("--json", action="store_true", help="as JSON")
    return whole, found


def _add_targets(command: argparse.ArgumentParser) -> None:
    command.add_argument("--depth", type=int, help="nonlinear layers of a plain chain")
    command.add_argument("--subnet-max", help="pkg.module:function, called with (x, r)")
    command.add_argument("--zeta", type=float, help="DKS: largest slope of the network's C map")
    command.add_argument("--eta", type=float, help="TAT of leaky_relu: C_f(0) of the network")
    command.add_argument("--tau", type=float, help="TAT: curvature of the network's C map at 1")
    command.add_argument("--sigma-b", type=float, help="EOC: standard deviation of biases")
    command.add_argument("--clamp", action="store_true", help="take the nearest reachable target")
    command.add_argument("--json", action="store_true", help="as JSON")


def _targets(args: argparse.Namespace) -> dict[str, Any]:
    given = {n: getattr(args, n) for n in ("depth", *TARGETS) if getattr(args, n) is not None}
    strange = strange_targets(args.method, args.activation, given)
    if strange:
        raise ValueError(f"{strange}; drop what is not its own")
    if args.subnet_max is not None:
        given["subnet_max"] = load_object(args.subnet_max)
    if args.clamp:
        given["clamp"] = True
    return given


def _constants(args: argparse.Namespace) -> None:
    row: dict[str, Any]
    for name, default in _OF_A_MODEL.items():
        here, there = getattr(args, name), getattr(args, f"its_{name}")
        if here and there:
            args.wrong_usage(f"{name} is given twice, as {here} and as {there}")
        setattr(args, name, here or there or (args.model and default))
    if not (args.method and args.activation):
        args.wrong_usage("give a method and an activation, or --model")
    targets = _targets(args)
    wiring = None
    if args.model is not None:
        if targets.keys() & {"depth", "subnet_max"} or args.method.upper() == "EOC":
            raise ValueError("--model tells the depth; drop --depth and --subnet-max, and EOC")
        wiring = theory.trace_wiring(_model(args.model), strip_batchnorm=args.strip_batchnorm)
        targets["subnet_max"] = wiring
    if args.method.upper() == "EOC":
        sigma_b = targets.pop("sigma_b", None)
        if targets:
            raise ValueError(f"EOC takes --sigma-b only, got {sorted(targets)}")
        edge = theory.eoc(args.activation, sigma_b=sigma_b)
        row = {"method": "EOC", "activation": args.activation}
        row |= {"sigma_w": edge.sigma_w, "sigma_b": edge.sigma_b, "q": edge.q}
    else:
        spec = theory.solve(args.method, args.activation, **targets)
        row = {"method": args.method.upper(), **spec.to_dict()}
        if wiring is not None:
            row |= {"depth": wiring.depth, "notes": list(wiring.notes)}
    if args.json:
        print(json.dumps(row))
    else:
        for key, value in row.items():
            print(f"{key:<14} {value!r}" if isinstance(value, float) else f"{key:<14} {value}")


def _model(name: str) -> nn.Module:
    """What a user's pkg.module:factory makes."""
    model = make(name)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} returned {type(model).__name__}, not an nn.Module")
    return model


def _convert(args: argparse.Namespace) -> None:
    report = convert(
        _model(args.model),
        method=args.method,
        activation=args.activation,
        strip_batchnorm=args.strip_batchnorm,
        dry_run=True,
        **_targets(args),
    )
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)


def _diagnose(args: argparse.Namespace) -> None:
    diagnosis.run(_model(args.model), args, load_object)


def _train(args: argparse.Namespace) -> None:
    takes = {"demo": ("depth", "epochs", "seed", "threads"), "sweep": ("jobs",)}
    names = takes.get(args.what, ())
    given = {n: getattr(args, n) for own in takes.values() for n in own}
    given = {name: value for name, value in given.items() if value is not None}
    strange = ", ".join(f"--{name}" for name in given if name not in names)
    if strange:
        way = "it decides all of a run" if args.what not in takes else "leave it out"
        raise ValueError(f"train {args.what} takes no {strange}; {way}")
    if args.what == "demo":
        demo.run_demo(args.out, **given)
    elif args.what == "sweep":
        demo.run_sweep(args.out / "sweep.json", **given)
    else:
        _train_file(args.what, args.out)


def _train_file(path: str, out: Path) -> None:
    if not os.path.lexists(path):
        raise ValueError(f"train {path}: no such file; give demo, sweep, or a JSON file")
    result = run(TrainConfig.load(path), out)
    epochs, place = len(result["epochs"]), out / "result.json"
    if result["status"] == "diverged":
        raise RuntimeError(f"the loss of epoch {epochs} is not finite; lower lr. See {place}")
    print(
        f"{epochs} epochs, {result['seconds']:.0f} s: training loss "
        f"{result['final_train_loss']:.4f}, test accuracy {result['final_accuracy']:.1%} "
        f"(best {result['best_accuracy']:.1%})\nwritten to {place}"
    )


def _tune(args: argparse.Namespace) -> None:
    tuning.run(_model(args.model), args, find_device(args.device))


def _build(args: argparse.Namespace) -> None:
    try:
        path = native.build(verbose=args.verbose, force=args.force)
    except RuntimeError as error:
        if not args.optional:
            raise
        print(f"fusedshape build: {error}\nGoing on without; CPU tensors take the reference.")
    else:
        print(f"built {path}")


def _info(args: argparse.Namespace) -> None:
    row = machine()
    if args.json:
        print(json.dumps(row))
    else:
        for key, value in row.items():
            print(f"{key:<14} {', '.join(value) or 'none' if isinstance(value, list) else value}")
