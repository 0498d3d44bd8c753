"""Gaussian expectations, Q and C maps, network maps; recipes, and the solvers that meet them."""

from __future__ import annotations

from fusedshape.theory.maps import c_curve, c_map, c_slope, q_map, q_slope
from fusedshape.theory.network import Node, SubnetMax, UnreadableError, Wiring, chain, resnet
from fusedshape.theory.recipes import DKS, EOC, METHODS, TARGETS, TAT, Recipe, Unreachable
from fusedshape.theory.solve import EdgeOfChaos, dks, eoc, solve, tat
from fusedshape.theory.trace import trace_wiring

__all__ = [
    "DKS",
    "EOC",
    "METHODS",
    "TARGETS",
    "TAT",
    "EdgeOfChaos",
    "Node",
    "Recipe",
    "SubnetMax",
    "Unreachable",
    "UnreadableError",
    "Wiring",
    "c_curve",
    "c_map",
    "c_slope",
    "chain",
    "dks",
    "eoc",
    "q_map",
    "q_slope",
    "resnet",
    "solve",
    "tat",
    "trace_wiring",
]
