"""Time and memory of callables: interleaved samples, clocks for CPU and CUDA, measured ceilings.

Tests run the CUDA clocks on a pretended GPU (tests/kernels/pretend_gpu.py); they have not run on a
real one yet.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Candidate:
    """One way to compute what a case asks for.

    Attributes:
        run: the timed part; takes what `prepare` returned.
        prepare: the part before every call, which is not timed.
        check: makes tensors by name, which are compared with the float64 truth; None if there is
            nothing to check, or if the candidate computes something else on purpose.
        graph: runs forward and returns the output with its graph, so that hooks see what is saved;
            None if hooks cannot see it.
        yardstick: whether errors of the others are compared with its error.
        claims: whether it runs this library, so that its speed-up is reported.
        compiled: whether torch.compile makes it; these are checked after all others.
        self_timed: whether `run` returns its own seconds.
        most: maximum number of samples.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = _nothing
    check: Callable[[], dict[str, Tensor]] | None = None
    graph: Callable[[], object] | None = None
    yardstick: bool = False
    claims: bool = False
    compiled: bool = False
    self_timed: bool = False
    most: int | None = None


class Clock(Protocol):
    """Measures the seconds of one call as the mean of `repeats` calls in a row."""

    #: Samples shorter than this many seconds are dominated by the clock itself.
    least: float

    def seconds(self, candidate: Candidate, repeats: int) -> float:
        """Prepare, then time."""


class HostClock:
    """Wall time on the host, with the caches as the previous call left them."""

    least = 2e-4

    def seconds(self, candidate: Candidate, repeats: int) -> float:
        """Prepare, then time."""
        if candidate.self_timed:
            return float(candidate.run(candidate.prepare()))
        states = [candidate.prepare() for _ in range(repeats)]
        start = time.perf_counter()
        for state in states:
            candidate.run(state)
        return (time.perf_counter() - start) / repeats


class EventClock:
    """CUDA events around one call with a cold L2. Launches are included, as they are for a user.

    Writing the flush buffer also keeps the device busy while the host queues the call.
    """

    least = 0.0

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * size, 1 << 28), dtype=torch.int8, device=device)

    def seconds(self, candidate: Candidate, repeats: int) -> float:
        """Prepare, then time."""
        total = 0.0
        for _ in range(repeats):
            total += self._one(partial(candidate.run, candidate.prepare()))
        return total / repeats

    def _one(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class GraphClock(EventClock):
    """Replay of a CUDA graph of the call with a cold L2, which leaves out the launches."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._graphs: dict[int, tuple[Candidate, torch.cuda.CUDAGraph, object]] = {}

    def seconds(self, candidate: Candidate, repeats: int) -> float:
        """Capture at the first call, then time replays."""
        if id(candidate) not in self._graphs:
            self._graphs[id(candidate)] = (candidate, *self._capture(candidate))
        graph = self._graphs[id(candidate)][1]
        return statistics.fmean(self._one(graph.replay) for _ in range(repeats))

    def clear(self) -> None:
        """Free the memory of all graphs."""
        self._graphs.clear()

    def _capture(self, candidate: Candidate) -> tuple[torch.cuda.CUDAGraph, object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                candidate.run(candidate.prepare())
            # Tensors that the graph reads must live as long as the graph: what was prepared, and
            # the saved tensors, which backward frees.
            kept: list[object] = []
            with torch.autograd.graph.saved_tensors_hooks(partial(_keep, kept), lambda t: t):
                state = candidate.prepare()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = candidate.run(state)
        return graph, (kept, state, out)


def _keep(kept: list[object], t: Tensor) -> Tensor:
    kept.append(t)
    return t


def clock_for(device: torch.device) -> Clock:
    """Events on a GPU, wall time on a CPU."""
    return EventClock(device) if device.type == "cuda" else HostClock()


def interleaved(
    candidates: Mapping[str, Candidate],
    clock: Clock,
    *,
    budget: float,
    least: int = 5,
    most: int = 30,
) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round, in an order drawn anew for each.

    The speed of a machine drifts, so only times of the same round are compared with one another.
    What a candidate leaves in caches and in the allocator affects the next one. Therefore the order
    changes (in the same way in every run), and each turn begins with a call that is not timed, as
    in a training loop each step follows one of its own kind.

    Args:
        candidates: the candidates by name.
        clock: clock of the device.
        budget: seconds of wall time to spend, without the warm-up.
        least: minimum number of rounds, whatever they cost.
        most: maximum number of rounds.

    Returns:
        Samples by name; shorter lists for candidates with a `most` of their own.
    """
    names = list(candidates)
    cost, call = {}, {}
    for name in names:
        if candidates[name].most is None:
            clock.seconds(candidates[name], 1)
        start = time.perf_counter()
        call[name] = clock.seconds(candidates[name], 1)
        cost[name] = time.perf_counter() - start
    shortest = max(min(call.values(), default=1.0), 1e-9)
    repeats = min(10_000, max(1, math.ceil(clock.least / shortest)))
    bounded = {name for name in names if candidates[name].most is not None}
    one_round = (repeats + 1) * sum(c for name, c in cost.items() if name not in bounded)
    rounds = max(least, min(most, int(budget / max(one_round, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in names}
    # The first sample of a costly candidate is the pilot call.
    for name in bounded:
        times[name].append(call[name])
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            limit = candidates[name].most
            if limit is None or len(times[name]) < limit:
                if limit is None:
                    clock.seconds(candidates[name], 1)
                times[name].append(clock.seconds(candidates[name], repeats))
    return times


def percentiles(values: Iterable[float]) -> list[float]:
    """20th, 50th and 80th percentile, by linear interpolation.

    Example:
        >>> percentiles([5.0, 1.0, 2.0, 3.0, 4.0])
        [1.8, 3.0, 4.2]
    """
    ordered = sorted(values)

    def at(p: float) -> float:
        low = math.floor(p * (len(ordered) - 1))
        high = min(low + 1, len(ordered) - 1)
        part = p * (len(ordered) - 1) - low
        return ordered[low] + part * (ordered[high] - ordered[low])

    return [at(p) for p in (0.2, 0.5, 0.8)]


def paired_ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """The ratios of / to, round by round, for the rounds that both have."""
    return [a / b for a, b in zip(of, to, strict=False)]


def saved_bytes(run: Callable[[], object], leaves: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward after `run`; each storage counts once, leaves do not.

    Args:
        run: builds a graph and returns it.
        leaves: inputs and parameters, which exist anyway.
    """
    known = {t.untyped_storage().data_ptr() for t in leaves}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        graph = run()
    del graph
    return sum(found.values())


def peak_bytes(candidate: Candidate, device: torch.device) -> int | None:
    """Peak of allocated bytes while preparing and running, above those before; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()  # garbage that is freed during the run would be subtracted from its peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    candidate.run(candidate.prepare())
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    *,
    copied: int | None = None,
    product: int | None = None,
) -> dict[str, float]:
    """The best rates of this machine: GB/s of a copy, TFLOP/s of a matrix product by dtype.

    Each is the best of a few runs. On a CPU the product is computed as a matrix product and as a
    1×1 convolution, and the faster one counts. Bytes read and bytes written both count.

    Args:
        device: device to measure.
        dtypes: dtypes of the products.
        copied: bytes to copy; None takes 2³⁰ on a GPU, 2²⁶ on a CPU.
        product: rows and columns of the factors; None takes 8192 on a GPU, 1024 on a CPU.
    """
    clock = clock_for(device)
    gpu = device.type == "cuda"
    bytes_copied = copied or (1 << 30 if gpu else 1 << 26)
    source = torch.zeros(bytes_copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def best(call: Callable[[], object]) -> float:
        candidate = Candidate(lambda _: call())
        clock.seconds(candidate, 1)
        samples: list[float] = []
        # Long enough to find the machine undisturbed at least once.
        end = time.monotonic() + 0.3
        while len(samples) < 7 or time.monotonic() < end:
            samples.append(clock.seconds(candidate, 1))
        return min(samples)

    found = {"copy GB/s": 2 * source.numel() / best(lambda: target.copy_(source)) / 1e9}
    n = product or (8192 if gpu else 1024)
    for dtype in dtypes:
        a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
        products: list[Callable[[], Tensor]] = [partial(torch.mm, a, b)]
        if not gpu:
            # oneDNN computes the product as a 1×1 convolution. On CPUs of AMD it is twice as fast
            # as MKL, which computes torch.mm. There are 16 images because torch passes fewer of
            # them to MKL if it has one thread.
            images, weight = math.gcd(n, 16), b.view(n, n, 1, 1)
            pixels = a.view(images, n // images, 1, n).movedim(-1, 1)
            products.append(partial(torch.conv2d, pixels, weight))
        seconds = []
        for product_of in products:
            with suppress(RuntimeError):  # no product for this dtype here
                seconds.append(best(product_of))
        if seconds:
            found[f"matmul {str(dtype)[6:]} TFLOP/s"] = 2 * n**3 / min(seconds) / 1e12
    return found
