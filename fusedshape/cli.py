"""The command `fusedshape`: its subcommands, its messages and its exit codes.

Each command is declared beside what it runs, in a `command.py`. Messages of the library name
arguments of Python; they are written as options here, in one place.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Sequence

import torch

import fusedshape
from fusedshape import native, theory, train
from fusedshape.bench import command as bench
from fusedshape.convert import command as conversion
from fusedshape.diagnose import command as diagnosis
from fusedshape.interrupts import Terminated, terminable
from fusedshape.loading import FactoryError, make_model
from fusedshape.machine import machine, version
from fusedshape.shell import EXIT_CODES, Commands, message, shape
from fusedshape.theory import command as constants
from fusedshape.train import command as training
from fusedshape.tuning import command as tuning


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 done, 1 it cannot be done or what was run has failed (one line on stderr
        says why), 2 wrong usage, 130 interrupted, 141 the reader of the output went away, 143
        terminated.

    Example:
        >>> main(["constants", "TAT", "leaky_relu", "--depth", "16"])  # doctest: +ELLIPSIS
        method         TAT
        activation     leaky_relu
        ...
        0
    """
    # A character that the terminal cannot show must not cost the result.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    args = commands().parse(sys.argv[1:] if argv is None else argv)
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
        # Python flushes once more when it exits, and must find somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        print(f"fusedshape: error: {_said(error, args)}", file=sys.stderr)
        return 1
    return 0


def commands() -> Commands:
    """All commands and their options."""
    about = "Deep vanilla networks: shaped activations, fused with the layers before them."
    parser = argparse.ArgumentParser(prog="fusedshape", description=about, epilog=EXIT_CODES)
    parser.add_argument(
        "--version",
        action="version",
        version=f"fusedshape {version()}",
        help="show the version and exit",
    )
    found = Commands(parser)
    for module in (constants, conversion, diagnosis, training, bench, tuning):
        module.declare(found)
    _declare_build(found)
    _declare_info(found)
    return found


def _said(error: Exception, args: argparse.Namespace) -> str:
    """What an error says, with the command's options in place of Python's arguments."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, FactoryError):
        return str(error)
    # Messages begin with a function or class of Python, which a user of the shell does not know.
    names = {*fusedshape.__all__, *theory.__all__, *train.__all__, "Sweep"} - {*theory.METHODS}
    names.discard(args.parser.prog.split()[-1])
    text = re.sub(rf"(^|: )(?:{'|'.join(names)}): ", r"\1", str(error))
    return message(text, args)


def _declare_build(commands: Commands) -> None:
    parser = commands.add("build", _build, "compile the CPU kernels for this machine")
    parser.add_argument("--force", action="store_true", help="compile even what is up to date")
    parser.add_argument(
        "--optional", action="store_true", help="without a compiler, say so and exit with 0"
    )
    parser.add_argument("--verbose", action="store_true", help="show the compiler's command")


def _build(args: argparse.Namespace) -> None:
    try:
        path = native.build(verbose=args.verbose, force=args.force)
    except RuntimeError as error:
        if not args.optional:
            raise
        print(f"fusedshape build: {error}\nGoing on without; CPU tensors take the reference.")
        return
    print(f"built {path}")
    try:
        print(f"built {native.build_host(verbose=args.verbose, force=args.force)}")
    except RuntimeError as error:
        print(f"fusedshape build: {error}\nGoing on without; layers are called through Python.")


def _declare_info(commands: Commands) -> None:
    about = "say what is installed, built and chosen on this machine"
    parser = commands.add("info", _info, about)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="say which engine computes each fused layer of pkg.module:factory, and why",
    )
    parser.add_argument(
        "--input",
        type=shape,
        metavar="N,C,H,W",
        help="shape of the model's input, in channels_last layout where it has 4 dimensions",
    )


def _info(args: argparse.Namespace) -> None:
    if (args.model is None) != (args.input is None):
        args.parser.error("--model and --input belong together; give both, or neither")
    if args.model is not None:
        model, x = make_model(args.model), torch.zeros(args.input)
        if x.ndim == 4:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            x = x.to(memory_format=torch.channels_last)
        found = fusedshape.explain(model, x)
        print(json.dumps(found.to_dict()) if args.json else found)
        return
    row = machine()
    if args.json:
        print(json.dumps(row))
    else:
        for key, value in row.items():
            print(f"{key:<14} {', '.join(value) or 'none' if isinstance(value, list) else value}")
