"""Training: a configuration, in-memory data, a loop that resumes, plots, and the demo."""

from __future__ import annotations

from fusedshape.train.config import TrainConfig
from fusedshape.train.data import Data
from fusedshape.train.loop import run

__all__ = ["Data", "TrainConfig", "run"]
