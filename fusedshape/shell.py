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


def respell(text: str, names: Mapping[str, str]) -> str:
    """Write the Python arguments in a library's message as the options of a command.

    Args:
        text: the message.
        names: from the argument to the option. A word that may be plain English, as `depth`, is
            taken for the argument only where a value follows.

    Example:
        >>> names = {"depth": "--depth", "clamp": "--clamp", "sigma_b": "--sigma-b"}
        >>> respell("depth=5 is too small; pass clamp=True or drop sigma_b", names)
        '--depth 5 is too small; pass --clamp or drop --sigma-b'
    """
    if not names:
        return text

    def option(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if not match["equals"] and "_" not in name:
            return match[0]
        spelled = names[name]
        if value in (None, "", "True") or spelled.startswith("--no-"):
            return spelled
        value = value.strip("'\"")
        return f"{spelled} {'none' if value == 'None' else value}"

    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    value = r"'[^']*'|\[[^]]*\]|[^\s,;:()'\[\]]*[^\s,;:()'\[\].]"
    return re.sub(
        rf"(?<![\w.-])(?P<name>{known})\b(?!\()(?:(?P<equals>=|(?= [<>]=))(?P<value>{value})?)?",
        option,
        text,
    )


def spelling(args: argparse.Namespace) -> dict[str, str]:
    """The options of a command by the names of the arguments that they become.

    An option has its argument's name, but for what the command sets as the default `spelling`.
    """
    options = {name: "--" + name.replace("_", "-") for name in vars(args)}
    return options | getattr(args, "spelling", {})
