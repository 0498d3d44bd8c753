"""`fusedshape convert`: say what `convert` would do to a model."""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from typing import get_args

import torch

from fusedshape.convert import convert
from fusedshape.init import Method
from fusedshape.loading import load_object, make_model
from fusedshape.shell import Commands, add_model, as_option, message, shape
from fusedshape.theory.command import add_network, add_recipe, network_of, recipe_of


def declare(commands: Commands) -> None:
    """Declare `fusedshape convert`."""
    about = "say what convert() would do to a model; nothing is changed"
    parser = commands.add("convert", _run, about)
    add_model(parser, "look at")
    add_recipe(parser)
    add_network(parser)
    parser.add_argument(
        "--replace",
        action="append",
        metavar="PKG.MODULE:CLASS",
        help="class of activations to replace, such as torch.nn:SiLU; may be given several times "
        "'all' for all but gates (default torch.nn:ReLU)",
    )
    parser.add_argument(
        "--keep",
        action="append",
        metavar="PATTERN",
        help="leave activations alone whose qualified names match this, such as 'head.*'; may be "
        "given several times",
    )
    known = (*get_args(Method), "none")
    parser.add_argument(
        "--init",
        choices=known,
        default="suo",
        metavar="METHOD",
        help=f"initialiser of all layers: {', '.join(known)} to keep the weights (default suo)",
    )
    parser.add_argument(
        "--chain",
        type=_chain,
        default=False,
        metavar="LAYERS",
        help="join fused layers in a row into chains of this many layers at most, or of 'all'",
    )
    parser.add_argument(
        "--no-fuse",
        dest="fuse",
        action="store_false",
        help="leave layers and their activations apart",
    )
    parser.add_argument(
        "--strip-batchnorm", action="store_true", help="take BatchNorm layers out of the model"
    )
    parser.add_argument(
        "--normalisation",
        choices=("strip",),
        metavar="WHAT",
        help="strip: take normalisation of every kind out of the model",
    )
    parser.add_argument(
        "--add-biases",
        action=argparse.BooleanOptionalAction,
        help="give layers that lose their normalisation a bias (default with --normalisation)",
    )
    parser.add_argument(
        "--on-untraceable",
        choices=("error", "report"),
        default="error",
        metavar="WHAT",
        help="what to do about activations in code that cannot be traced: error, or report them "
        "and leave them alone (default error)",
    )
    parser.add_argument(
        "--input",
        dest="example",
        type=shape,
        metavar="N,C,H,W",
        help="shape of an input on which to compare the traced model with the model itself "
        "(default: small shapes that fit its first layers)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(
        spelling={"example": "--input", "fuse": "--no-fuse", "filter_fn": "--keep"}, write=_write
    )


def _run(args: argparse.Namespace) -> None:
    model = make_model(args.model)
    given = network_of(args)
    if args.replace == ["all"]:
        given["replace"] = "all"
    elif args.replace is not None:
        given["replace"] = tuple(map(load_object, args.replace))
    if args.keep is not None:
        given["filter_fn"] = lambda name, _: not any(fnmatchcase(name, p) for p in args.keep)
    if args.example is not None:
        generator = torch.Generator().manual_seed(0)
        given["example"] = torch.randn(args.example, generator=generator)
    report = convert(
        model,
        recipe_of(args),
        init=None if args.init == "none" else args.init,
        chain=args.chain,
        fuse=args.fuse,
        normalisation=args.normalisation,
        strip_batchnorm=args.strip_batchnorm,
        add_biases=args.add_biases,
        on_untraceable=args.on_untraceable,
        dry_run=True,
        **given,
    )
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print(message(str(report), args))


def _chain(text: str) -> bool | int:
    """The layers of a chain at most; True for all."""
    if text == "all":
        return True
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer, nor 'all'")
    return int(text)


def _write(name: str, value: str | None) -> str:
    """An option and its value; --replace takes one class at a time."""
    if name != "--replace" or value is None:
        return as_option(name, value)
    if "all" in value:
        return "--replace all"
    classes = [wanted.removeprefix("nn.") for wanted in value.strip("[]").split(", ")]
    return " ".join(f"--replace torch.nn:{wanted}" for wanted in classes)
