"""Backends of the pointwise passes, those that this machine has not as cases to skip."""

from __future__ import annotations

import os

import pytest

from fusedshape import native

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = pytest.mark.skipif(not native.available(), reason=f"native: {native.why_not()}")
# Triton's interpreter comes before csrc where it is asked to serve CPU tensors.
NATIVE_SERVES = pytest.mark.skipif(
    INTERPRET or not native.available(), reason=f"no csrc for CPU tensors: {native.why_not()}"
)
TRITON = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
BACKENDS = ["reference", pytest.param("native", marks=NATIVE), pytest.param("triton", marks=TRITON)]
