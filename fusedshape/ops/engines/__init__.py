"""Who can compute a layer: the table of engines, and of the backends that come with them.

A new engine is a file beside this one with a `LayerEngine`, and a line below. What may be named in
a call, what "auto" and tuning consider on a device, and what `fusedshape.explain` shows follow.
"""

from __future__ import annotations

from fusedshape.native import forget_plans
from fusedshape.ops.engines.aten import Aten
from fusedshape.ops.engines.cudnn import Cudnn
from fusedshape.ops.engines.native import Native
from fusedshape.ops.engines.protocol import LayerEngine
from fusedshape.ops.engines.triton import Triton
from fusedshape.ops.passes import REFERENCE, Kernels

#: All engines, by name.
ENGINES: dict[str, LayerEngine] = {}
#: The engines beside "aten" that "auto" and tuning consider, by the type of the tensors' device.
RIVALS: dict[str, tuple[LayerEngine, ...]] = {}
#: All backends, by name: the reference, and the engines' own passes.
BACKENDS: dict[str, Kernels] = {REFERENCE.name: REFERENCE}
#: The backend that "auto" takes where it is available, by the type of the tensors' device.
PASSES: dict[str, Kernels] = {}


def register(engine: LayerEngine) -> None:
    """Add an engine to the tables.

    Raises:
        ValueError: there is an engine of that name already, or the name is "auto".
    """
    if engine.name in ENGINES or engine.name == "auto":
        raise ValueError(f"register: there is an engine {engine.name!r} already; name it otherwise")
    ENGINES[engine.name] = engine
    for device in engine.devices:
        RIVALS[device] = (*RIVALS.get(device, ()), engine)
    if engine.backend is not None:
        BACKENDS[engine.backend.name] = engine.backend
        for device in engine.backend.devices:
            PASSES.setdefault(device, engine.backend)
    forget_plans()  # which may have another engine now


for _engine in (Aten(), Triton(), Native(), Cudnn()):
    register(_engine)

ATEN = ENGINES["aten"]
