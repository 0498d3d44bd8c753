"""``python -m fusedshape``: the command line."""

from __future__ import annotations

import sys

from fusedshape.cli import main

sys.exit(main())
