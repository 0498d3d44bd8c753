"""What tests in Triton's interpreter need of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def ieee_products(*products: Any) -> Iterator[None]:
    """Multiply float32 as such, not in tf32, in these settings of torch.backends."""
    before = [settings.fp32_precision for settings in products]
    for settings in products:
        settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        for settings, precision in zip(products, before, strict=True):
            settings.fp32_precision = precision


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
