"""Sphinx: the pages in docs/, and the API from the docstrings. Built by `make docs`."""

from __future__ import annotations

import fusedshape

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
