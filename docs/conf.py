"""Sphinx: the pages in docs/, and the API from the docstrings. Built by `make docs`."""

from __future__ import annotations

import argparse
from functools import partial

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import fusedshape
from fusedshape.cli import commands

project = "fusedshape"
author = "the fusedshape authors"
version = release = fusedshape.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"fusedshape {version}"
html_copy_source = False

# Docstrings mark code with single backticks, as Markdown does; the name of something documented
# becomes a link.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # "Attributes:" of a NamedTuple would be declared twice otherwise
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3


class Commands(SphinxDirective):
    """The help of every command, as the command line prints it."""

    def run(self) -> list[nodes.Node]:
        """A section for each command."""
        found: list[nodes.Node] = []
        for parser in commands().parsers():
            parser.formatter_class = partial(argparse.HelpFormatter, width=88)
            text = parser.format_help()
            block = nodes.literal_block(text, text, language="text")
            title = nodes.title(text=parser.prog)
            found.append(nodes.section("", title, block, ids=[nodes.make_id(parser.prog)]))
        return found


def setup(app: Sphinx) -> None:
    """Add the directive."""
    app.add_directive("commands", Commands)
