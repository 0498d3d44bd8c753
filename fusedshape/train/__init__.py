"""Training: configuration, data in memory, a loop that resumes, plots, the demo and the sweep."""

from __future__ import annotations

from fusedshape.train.config import TrainConfig
from fusedshape.train.data import Data
from fusedshape.train.loop import run

__all__ = ["Data", "TrainConfig", "run"]
