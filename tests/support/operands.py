"""Tensors and cases for the ops."""

from __future__ import annotations

from tests.support.specs import shaped

LEAKY = shaped("leaky_relu")
