"""Making a plan: cuDNN chooses kernels for a graph, compiles them, and writes them as bytes.

No device is used: cuDNN is told what the device is like. It holds Python's lock for the seconds
that a plan takes, so several plans are made in processes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

from fusedshape.ops.engines.cudnn import library
from fusedshape.ops.engines.cudnn.graph import Operation, draw, graph_of

#: Makes a plan for an operation and a device, which is described in JSON.
Build = Callable[[Operation, str], bytes]


class NoPlanError(RuntimeError):
    """cuDNN has no plan for an operation, or it does not serve."""


def build(operation: Operation, device: str) -> bytes:
    """Make a plan.

    Only plans of tensor cores are taken, and none that sums in an order that changes, unless the
    operation has sums.

    Args:
        operation: what is to be computed.
        device: its properties, as `library.device_properties` writes them.

    Returns:
        The plan, as cuDNN writes it.

    Raises:
        NoPlanError: there is none.
    """
    cudnn = library.module()
    float32, note = cudnn.data_type.FLOAT, cudnn.numerical_note
    try:
        graph = cudnn.pygraph(
            io_data_type=float32,
            intermediate_data_type=float32,
            compute_data_type=float32,
            device_property=cudnn.create_device_properties(device),
        )
        draw(graph_of(operation), graph, cudnn)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.select_numeric_notes([note.TENSOR_CORE])
        if not operation.sums:
            graph.deselect_numeric_notes([note.NONDETERMINISTIC])
        # `check_support` would ask a device, and building asks the same.
        graph.build_plans(cudnn.build_plan_policy.HEURISTICS_CHOICE)
        return bytes(graph.serialize(as_bytes=True))
    # cuDNN raises what it likes, of classes of its own.
    except Exception as error:
        raise NoPlanError(f"cuDNN has no tensor-core plan for it: {_short(error)}") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def build_all(
    operations: Sequence[Operation], device: str, most: int | None = None
) -> Iterator[tuple[Operation, bytes | NoPlanError]]:
    """Make several plans in processes, and yield each when it is made.

    Args:
        operations: what is to be computed.
        device: as for `build`.
        most: processes at most; None for one for each core of this process.
    """
    if most is None:
        most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(len(operations), most or 1)
    if count <= 1:
        for operation in operations:
            yield operation, _attempt(operation, device)
        return
    # A fork would carry CUDA's context along, which is not allowed.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        futures: dict[Future[bytes | NoPlanError], Operation] = {
            pool.submit(_attempt, operation, device): operation for operation in operations
        }
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None:  # a process died
                    yield futures[future], NoPlanError(f"no plan could be made: {error}")
                else:
                    yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _attempt(operation: Operation, device: str) -> bytes | NoPlanError:
    try:
        return build(operation, device)
    except NoPlanError as error:
        return NoPlanError(str(error))  # without its cause, which no pickle takes
