"""Backends of the pointwise passes, those that this machine has not as cases to skip."""

from __future__ import annotations

import os

import pytest

from fusedshape import native

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not native.available(), reason=f"native: {native.why_not()}"),
    ),
    pytest.param(
        "triton", marks=pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
    ),
]
