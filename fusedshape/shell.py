"""What all commands share: subcommands, exit codes, types of options, and the words of messages."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

EXIT_CODES = (
    "exit codes: 0 done; 1 it cannot be done, or what was run has failed, and stderr says why; "
    "2 wrong usage; 130 interrupted; 141 the reader of the output went away; 143 terminated"
)

Run = Callable[[argparse.Namespace], None]


class Commands:
    """A command that has subcommands, each with options of its own.

    Args:
        parser: of the command.
        usual: the subcommand that is meant where none is named: ``bench --suite cpu`` is short for
            ``bench run --suite cpu``.
    """

    def __init__(self, parser: argparse.ArgumentParser, usual: str | None = None) -> None:
        self._parser = parser
        self._usual = usual
        self._subparsers = parser.add_subparsers(required=True, metavar="command")
        self._children: dict[str, Commands | argparse.ArgumentParser] = {}

    def add(self, name: str, run: Run, about: str) -> argparse.ArgumentParser:
        """Add a subcommand that does something.

        Args:
            name: of the subcommand.
            run: called with the parsed arguments; the attribute `parser` is the returned parser.
            about: one line of help.
        """
        parser = self._make(name, about)
        parser.set_defaults(run=run, parser=parser)
        self._children[name] = parser
        return parser

    def group(self, name: str, about: str, usual: str | None = None) -> Commands:
        """Add a subcommand that has subcommands itself."""
        short = f"; without a command, {usual!r} is meant" if usual else ""
        group = Commands(self._make(name, about, short), usual)
        self._children[name] = group
        return group

    def parsers(self) -> Iterator[argparse.ArgumentParser]:
        """Parsers of this command and of all below it."""
        yield self._parser
        for child in self._children.values():
            if isinstance(child, Commands):
                yield from child.parsers()
            else:
                yield child

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse arguments; options may stand before, between and behind files.

        Raises:
            SystemExit: 2, wrong usage; 0, help or the version was asked for.
        """
        first, *rest = argv or [""]
        child = self._children.get(first)
        if child is None and self._usual and first not in ("-h", "--help") and not first.isalpha():
            child, rest = self._children[self._usual], list(argv)
        if isinstance(child, Commands):
            return child.parse(rest)
        # argparse does not let a parser with subparsers do this.
        return child.parse_intermixed_args(rest) if child else self._parser.parse_args(argv)

    def _make(self, name: str, about: str, more: str = "") -> argparse.ArgumentParser:
        return self._subparsers.add_parser(
            name, help=about, description=about + more, epilog=EXIT_CODES
        )


def add_model(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the argument MODEL, which `fusedshape.loading.make_model` takes.

    Args:
        parser: of the command.
        verb: what the command does to the model.
    """
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"model to {verb}: pkg.module:factory, called without arguments",
    )


def shape(text: str) -> tuple[int, ...]:
    """The type of an option that takes the shape of a tensor.

    Example:
        >>> shape("32,3,224,224")
        (32, 3, 224, 224)
    """
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive integers like 32,3,8,8")
    return sizes


def message(text: str, args: argparse.Namespace) -> str:
    """What the library says, in the words of a command.

    Options are named as their arguments in Python. What differs is set by the command as defaults:
    `spelling`, options by the arguments' names, and `write`, as `respell` takes it.
    """
    options = {name: "--" + name.replace("_", "-") for name in vars(args)}
    options |= getattr(args, "spelling", {})
    return respell(text, options, getattr(args, "write", as_option))


def as_option(name: str, value: str | None) -> str:
    """An option and its value; those that switch something have none."""
    if value in (None, "True") or name.startswith("--no-"):
        return name
    return f"{name} {'none' if value == 'None' else value}"


def as_field(name: str, value: str | None) -> str:
    """A field of a JSON file and its value."""
    if value is None:
        return f'"{name}"'
    words = {"True": "true", "False": "false", "None": "null"}
    number = re.fullmatch(r"[-+.\de]+", value)
    return f'"{name}": ' + words.get(value, value if number else f'"{value}"')


def respell(
    text: str, names: Mapping[str, str], write: Callable[[str, str | None], str] = as_option
) -> str:
    """Write the arguments of Python that a text names in another way.

    Args:
        text: a message of the library.
        names: from the argument to its other name. A word that may be plain English, as `depth`,
            is taken for the argument only where a value or a limit follows.
        write: how to write the other name and the value, which is None where the text has none.

    Example:
        >>> names = {"depth": "--depth", "clamp": "--clamp", "sigma_b": "--sigma-b"}
        >>> respell("depth=5 is too small; pass clamp=True or drop sigma_b", names)
        '--depth 5 is too small; pass --clamp or drop --sigma-b'
        >>> respell("depth=5 is too small; pass clamp=True", {"clamp": "clamp"}, as_field)
        'depth=5 is too small; pass "clamp": true'
    """

    def other(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if match["call"]:
            return "f(" if "_" in name else match[0]
        if not match["equals"] and not match["must"] and "_" not in name:
            return match[0]
        return write(names[name], value and value.strip("'\"")) + (match["must"] or "")

    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    value = r"'[^']*'|\[[^]]*\]|[^\s,;:()'\[\]]*[^\s,;:()'\[\].]"
    after = rf"(?P<equals>=)(?P<value>{value})?|(?P<must> [<>]=| must be)|(?P<call>\()"
    return re.sub(rf"(?<![\w.\"-])(?P<name>{known})\b(?:{after})?", other, text)
