"""The engine "cudnn": convolutions by graphs of cuDNN's, activation included.

`engine` says which layers it takes; `calls` gives tensors to plans; `plans` keeps these, and
`building` makes them, from what `graph` writes with the table of `formulas`; `library` is cuDNN.
"""

from __future__ import annotations

from fusedshape.ops.engines.cudnn.engine import Cudnn

__all__ = ["Cudnn"]
