"""Puts compiled CPU libraries into a wheel where FUSEDSHAPE_LIBRARIES=1 asks for it: `make wheel`.

Any other wheel is pure Python with csrc in it, for `fusedshape build`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Libraries(BuildHookInterface[Any]):
    """Compiles with the torch of this environment, hence without build isolation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries, and say which platform they are for."""
        if version == "editable" or os.environ.get("FUSEDSHAPE_LIBRARIES") != "1":
            return
        sys.path.insert(0, self.root)
        from fusedshape import portable

        for library in portable.build(Path(self.root, "build", "libraries")):
            build_data["force_include"][str(library)] = f"fusedshape/_native/{library.name}"
        build_data["pure_python"] = False
        # The libraries are no extension modules of Python: torch loads them.
        build_data["tag"] = f"py3-none-{portable.PLATFORM}"
