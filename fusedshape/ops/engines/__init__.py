"""Who can compute a layer: the table of engines."""

from __future__ import annotations

from fusedshape.ops import schema
from fusedshape.ops.engines.aten import Aten
from fusedshape.ops.engines.kernel_engine import KernelEngine
from fusedshape.ops.engines.protocol import LayerEngine

ATEN: LayerEngine = Aten()
REGISTRY: dict[str, LayerEngine] = {
    "aten": ATEN,
    **{name: KernelEngine(name) for name in schema.KERNEL_BACKENDS},
}
