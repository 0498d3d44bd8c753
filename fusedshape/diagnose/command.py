"""`fusedshape diagnose`: theory against measurement of a model, as text, JSON and figure."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedshape.diagnose import diagnose
from fusedshape.kinds import features, kind_of
from fusedshape.nn import PerLocationNorm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fusedshape diagnose`."""
    parser.add_argument("model", help="pkg.module:factory, called without arguments")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        help="pkg.module:name of a tensor, of an iterable of batches, or of a function that makes "
        "one; default normal random numbers that fit the model's first layer",
    )
    source.add_argument(
        "--input", type=_shape, metavar="N,C,H,W", help="shape of normal random numbers"
    )
    parser.add_argument("--batches", type=int, default=4, help="batches to take (default 4)")
    parser.add_argument("--sigma-w", type=float, help="σ_w that the weights should have")
    parser.add_argument("--sigma-b", type=float, help="σ_b that the biases should have")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure")
    parser.add_argument("--all", action="store_true", help="show every layer of a deep model")


def run(model: nn.Module, args: argparse.Namespace, load: Callable[[str], Any]) -> None:
    """Diagnose, print, and write what was asked for.

    Args:
        model: what `args.model` made.
        args: as declared by `add_arguments`.
        load: finds ``pkg.module:name``.
    """
    data = _data(model, args, load)
    found = diagnose(model, data, batches=args.batches, sigma_w=args.sigma_w, sigma_b=args.sigma_b)
    if args.json is not None:
        found.save(args.json)
    if args.plot is not None:
        found.plot(args.plot, f"{args.model}: {found.verdict}")
    if args.all:
        print(found.table() + "\n")
    print(found)


def _data(
    model: nn.Module, args: argparse.Namespace, load: Callable[[str], Any]
) -> Tensor | Iterable[Any]:
    if args.data is not None:
        found: Any = load(args.data)
        return found() if callable(found) else found
    shape = args.input or _fitting(model)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _fitting(model: nn.Module) -> tuple[int, ...]:
    """A shape that the first layer with weights takes."""
    appended = 0
    for module in model.modules():
        if isinstance(module, PerLocationNorm):
            appended = int(module.homog_mode != "off")
        kind = kind_of(module)
        if kind is not None:
            inputs, n = features(module)[0] - appended, kind.dimensions
            return (16, inputs, *[(64, 32, 8)[n - 1]] * n) if n else (64, inputs)
    raise ValueError(
        "diagnose: the model has no linear or convolution layer to tell the shape of its input; "
        "pass --input or --data"
    )


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive integers like 32,3,8,8")
    return shape
