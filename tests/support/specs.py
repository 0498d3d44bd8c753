"""Specs of every activation, with all five constants at work."""

from __future__ import annotations

from fusedshape import ACTIVATIONS, ActSpec


def shaped(name: str) -> ActSpec:
    """A spec of the kind the solvers give: all five constants at work."""
    slope = 0.37 if ACTIVATIONS[name].has_slope else 0.0
    return ActSpec(name, 0.7, 0.2, -0.35, 1.9, slope)


SPECS = [shaped(name) for name in ACTIVATIONS]
