"""Reads the forward of one nn.Module as torch.fx graphs, in which its children are leaves."""

from fusedshape.tracing.example import Attribute, leaves_of, read_call, ways_of
from fusedshape.tracing.forwards import Reading, read, trace
from fusedshape.tracing.graphs import (
    is_plain,
    memory_roots,
    required,
    take_over,
    tensor_args,
    write_out_of_place,
)
from fusedshape.tracing.norms import behind_norm
from fusedshape.tracing.source import reachable_code, reached_by
from fusedshape.tracing.tracer import Slot

__all__ = [
    "Attribute",
    "Reading",
    "Slot",
    "behind_norm",
    "is_plain",
    "leaves_of",
    "memory_roots",
    "reachable_code",
    "reached_by",
    "read",
    "read_call",
    "required",
    "take_over",
    "tensor_args",
    "trace",
    "ways_of",
    "write_out_of_place",
]
