"""Which engine computes a layer, in each direction: found by measurement, kept on disk.

The engine "aten" is torch's convolution and one fused pass after it. Another engine takes its place
where it has been measured to be faster on this device, with these versions, for this layer. Modes
(`mode`, or the environment variable FUSEDSHAPE_TUNING):

* "off": nothing is looked up; "auto" means the pinned choice, and kernels take the configuration
  that their model picks.
* "cached", the default: what has been measured is used, nothing is measured.
* "full": what has not been measured yet is measured when it is first met. Never while
  torch.compile traces or a CUDA graph is captured.

Measurements come from ``fusedshape tune``, or from a run in mode "full"; ``fusedshape tune
--dry-run`` says who computes what, and why nobody else can. They depend on the layer's
shapes, dtype and layout, and on torch's switches for cuDNN; the batch (of a linear layer: the rows)
counts by its bucket, the next power of two, so that 33 to 64 images are one case.

They lie below ``$FUSEDSHAPE_CACHE``, else ``fusedshape`` in the user's cache directory
(``$XDG_CACHE_HOME`` or ``~/.cache``), one file each, in a directory for each device and set of
versions. All of it can be deleted at any time. The path must be absolute, and nobody but you and
root may be able to write there (`chmod go-w`): else nothing is read or kept, and the log and
``fusedshape info`` say why.
"""

from __future__ import annotations

from fusedshape.tuning.cache import cache_directory
from fusedshape.tuning.chooser import choose, current_mode, mode, status
from fusedshape.tuning.contest import MARGIN
from fusedshape.tuning.layers import Layer, fused_layers
from fusedshape.tuning.measuring import Result, measure

__all__ = [
    "MARGIN",
    "Layer",
    "Result",
    "cache_directory",
    "choose",
    "current_mode",
    "fused_layers",
    "measure",
    "mode",
    "status",
]
