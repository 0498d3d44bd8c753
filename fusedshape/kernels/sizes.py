"""Sizes of tiles and grids, on the host: Triton's own functions take microseconds a call there."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """A / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n, for n ≥ 1."""
    return 1 << (n - 1).bit_length()
