"""`fusedshape diagnose`: compare a model with theory, as text, JSON and figure."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedshape.diagnose import diagnose
from fusedshape.kinds import features, kind_of
from fusedshape.loading import load_object, make_model
from fusedshape.nn import PerLocationNorm
from fusedshape.shell import Commands, add_model, shape


def declare(commands: Commands) -> None:
    """Declare `fusedshape diagnose`."""
    about = "compare a model with what theory says of it, layer by layer, and name what is wrong"
    parser = commands.add("diagnose", _run, about)
    add_model(parser, "diagnose")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        metavar="PKG.MODULE:NAME",
        help="take the data from here: a tensor, an iterable of batches, or a function that "
        "returns one (default: normal random numbers that fit the model's first layer)",
    )
    source.add_argument(
        "--input",
        type=shape,
        metavar="N,C,H,W",
        help="take normal random numbers of this shape as data",
    )
    parser.add_argument(
        "--batches", type=int, default=4, help="number of batches to take (default 4)"
    )
    parser.add_argument(
        "--sigma-w",
        type=float,
        metavar="NUMBER",
        help="σ_w that the weights should have (default: as they are)",
    )
    parser.add_argument(
        "--sigma-b",
        type=float,
        metavar="NUMBER",
        help="σ_b that the biases should have (default: as they are)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything to this file as JSON"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure in this file")
    parser.add_argument(
        "--all", action="store_true", help="show every layer of a deep model, not some of them"
    )


def _run(args: argparse.Namespace) -> None:
    model = make_model(args.model)
    data = _data(model, args)
    found = diagnose(model, data, batches=args.batches, sigma_w=args.sigma_w, sigma_b=args.sigma_b)
    if args.json is not None:
        found.save(args.json)
    if args.plot is not None:
        found.plot(args.plot, f"{args.model}: {found.verdict}")
    if args.all:
        print(found.table() + "\n")
    print(found)


def _data(model: nn.Module, args: argparse.Namespace) -> Tensor | Iterable[Any]:
    if args.data is not None:
        found: Any = load_object(args.data)
        return found() if callable(found) else found
    size = args.input or _fitting(model)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _fitting(model: nn.Module) -> tuple[int, ...]:
    """A shape that fits the first layer with weights."""
    appended = 0
    for module in model.modules():
        if isinstance(module, PerLocationNorm):
            appended = module.added_channels
        kind = kind_of(module)
        if kind is not None:
            inputs, n = features(module)[0] - appended, kind.dimensions
            return (16, inputs, *[(64, 32, 8)[n - 1]] * n) if n else (64, inputs)
    raise ValueError(
        "diagnose: the model has no linear or convolution layer to tell the shape of its input; "
        "pass --input or --data"
    )
