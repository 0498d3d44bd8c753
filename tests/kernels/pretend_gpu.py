"""GPUs that are not there: torch and Triton believe in three, and the host's code for CUDA runs.

``python tests/kernels/pretend_gpu.py -m MODULE ARGUMENTS`` runs a module before such GPUs: an H100,
an A100 and a B200. Real are all of torch/cuda/*.py, autograd's threads and streams, and Triton's
JIT and driver. Pretended is what lies below: the functions that a CUDA build of torch has in C
(pretend_gpu.cpp and `_FUNCTIONS`), Triton's two modules in C, and the memory, which is the CPU's.

With TRITON_INTERPRET=1 kernels compute, in Triton's interpreter. Without, they are compiled for the
GPU they are launched on, each launch is held against what that GPU takes and kept in `LAUNCHES`,
and what they would have written stays as it was.

As on a GPU, tensors of two devices do not mix, a graph that is captured does not wait for its
numbers, and memory ends: after `MEMORY` bytes of tensors.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple


def _believe() -> None:
    """Register the devices with libtorch, which looks for them once, when torch is imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    assert "torch" not in sys.modules, "start with: python tests/kernels/pretend_gpu.py -m MODULE"
    home = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "pretend_gpu.so"
        source = Path(__file__).with_suffix(".cpp")
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", source]
        command += ["-o", library, f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(home / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


_believe()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._C import DispatchKey, DispatchKeySet  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten  # noqa: E402

#: Bytes of tensors that fit on a device.
MEMORY = 80 << 30


class Properties(NamedTuple):
    """Those of torch's `_CudaDeviceProperties` that are asked for; `shared` is Triton's."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    L2_cache_size: int
    shared: int
    total_memory: int = MEMORY
    warp_size: int = 32


GPUS = (
    Properties("Pretended H100", 9, 0, 132, 1 << 20, 232_448),
    Properties("Pretended A100", 8, 0, 108, 1 << 20, 166_912),
    Properties("Pretended B200", 10, 0, 148, 1 << 20, 232_448),
)


class _Memory:
    """Bytes of one storage, counted as long as a tensor is in it."""

    now: ClassVar[list[int]] = [0] * len(GPUS)
    peak: ClassVar[list[int]] = [0] * len(GPUS)
    _known: ClassVar[weakref.WeakValueDictionary[int, _Memory]] = weakref.WeakValueDictionary()

    def __init__(self, size: int, device: int) -> None:
        self.size, self.device = 0, device
        if self.now[device] + size > MEMORY:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        self.size = size
        self.now[device] += size
        self.peak[device] = max(self.peak[device], self.now[device])

    def __del__(self) -> None:
        self.now[self.device] -= self.size

    @classmethod
    def of(cls, t: Tensor, device: int) -> _Memory:
        storage = t.untyped_storage()
        found = cls._known.get(storage._cdata)
        if found is None:
            found = cls._known[storage._cdata] = cls(storage.nbytes(), device)
        return found


class OnGpu(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    # Ops give kernels no tensors of other people's classes.
    __module__ = "torch._subclasses.pretended"

    @staticmethod
    def __new__(cls: type[OnGpu], host: Tensor, device: torch.device) -> OnGpu:
        t = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )
        t.host = host
        t._memory = _Memory.of(host, device.index)
        return t

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.host!r} on {self.device}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                memo[id(self)] = type(self)(self.host.clone(), self.device)
            if isinstance(self, torch.nn.Parameter):
                memo[id(self)] = torch.nn.Parameter(memo[id(self)])
            memo[id(self)].requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, proto: Any) -> Any:
        # What is loaded is on the CPU.
        return self.host.__reduce_ex__(proto)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusedshape":
            # What is registered for CUDA.
            return func.redispatch(DispatchKeySet(DispatchKey.CUDA), *args, **(kwargs or {}))
        return _compute(func, *args, **(kwargs or {}))


# Operations that take tensors of two devices, and those whose result depends on numbers.
_BETWEEN = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What a GPU would do; the answer to a question for its numbers is the host's."""
    leaves, spec = tree_flatten((args, kwargs))
    given = [t for t in leaves if isinstance(t, OnGpu)]
    name = func.name().partition("::")[2].partition(".")[0]
    places = {t.device for t in given}
    if name not in _BETWEEN:
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        strangers = [t for t in tensors if not isinstance(t, OnGpu) and t.ndim]
        if len(places) > 1 or (places and strangers):
            found = {*places, *(t.device for t in strangers)}
            raise RuntimeError(f"{func}: expected all tensors on the same device, got {found}")
    home = kwargs.get("device") or (args[0].device if name == "copy_" else next(iter(places)))
    if home.index is None and home.type == "cuda":
        home = torch.device("cuda", torch.cuda.current_device())
    if home.type == "cpu" or name in _WAITS:
        _wait()

    def to_host(t: Any) -> Any:
        if isinstance(t, OnGpu):
            return t.host
        return torch.device("cpu") if isinstance(t, torch.device) else t

    host_args, host_kwargs = tree_unflatten([to_host(t) for t in leaves], spec)

    def call() -> Any:
        return func(*host_args, **host_kwargs)

    out = call()
    if _Graph.capturing is not None:
        _Graph.capturing.record(call, out)
    if home.type == "cpu":
        return out
    own = {id(t.host): t for t in given}

    def from_host(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return own[id(t)] if id(t) in own else OnGpu(t, home)

    return tree_map(from_host, out)


_library = torch.library.Library("_", "IMPL")
_library.fallback(_compute, "CUDA")


class _Stream(torch.Stream):
    cuda_stream = property(lambda self: self.stream_id)


class _Event:
    def __new__(cls, **how: bool) -> Any:
        self = super().__new__(cls)
        self.cuda_event, self._timed = 0, how["enable_timing"]
        return self

    def record(self, stream: torch.Stream) -> None:
        self.cuda_event = time.perf_counter_ns()

    def wait(self, stream: torch.Stream) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait()

    def elapsed_time(self, end: Any) -> float:
        assert self._timed
        assert end._timed
        assert self.cuda_event
        assert end.cuda_event
        return max(end.cuda_event - self.cuda_event, 1000) / 1e6


class _Graph:
    """Runs again what it recorded, in the same memory."""

    capturing: ClassVar[_Graph | None] = None

    def __new__(cls, keep_graph: bool = False) -> Any:
        self = super().__new__(cls)
        self._calls = []
        return self

    def capture_begin(self, *args: Any, **how: Any) -> None:
        assert torch.cuda.current_stream().stream_id, "capture needs a stream that is not default"
        assert _Graph.capturing is None
        _Graph.capturing = self

    def capture_end(self) -> None:
        _Graph.capturing = None

    def record(self, call: Callable[[], Any], out: Any) -> None:
        self._calls.append((call, out))

    def replay(self) -> None:
        assert self._calls, "nothing was captured"
        for call, out in self._calls:
            new, old = (
                [t for t in tree_flatten(x)[0] if isinstance(t, Tensor)] for x in (call(), out)
            )
            for n, o in zip(new, old, strict=True):
                if n.data_ptr() != o.data_ptr():
                    o.copy_(n)

    def reset(self) -> None:
        self._calls.clear()


def _stream_of(device: int) -> tuple[int, int, int]:
    stream = torch._C._accelerator_getStream(device)
    return stream.stream_id, stream.device_index, stream.device_type


def _set_stream(stream_id: int, device_index: int, device_type: int) -> None:
    torch._C._accelerator_setStream(torch.Stream(stream_id, device_index, device_type))


def _wait() -> None:
    if _Graph.capturing is not None:
        raise RuntimeError("operation not permitted when stream is capturing")


def _memory_stats(device: int) -> dict[str, Any]:
    found = {"current": _Memory.now[device], "peak": _Memory.peak[device]}
    return {"allocated_bytes": {"all": found}}


def _reset_peak(device: int) -> None:
    _Memory.peak[device] = _Memory.now[device]


#: What torch._C has as `_cuda_` and the name, in a CUDA build.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getDeviceCount": lambda: len(GPUS),
    "getDevice": torch._C._accelerator_getDeviceIndex,
    "setDevice": torch._C._accelerator_setDeviceIndex,
    "exchangeDevice": torch._C._accelerator_exchangeDevice,
    "maybeExchangeDevice": torch._C._accelerator_maybeExchangeDevice,
    "getCurrentStream": _stream_of,
    "getCurrentRawStream": lambda device: _stream_of(device)[0],
    "getDefaultStream": lambda device: (0, *_stream_of(device)[1:]),
    "setStream": _set_stream,
    "synchronize": _wait,
    "emptyCache": lambda: None,
    "isCurrentStreamCapturing": lambda: _Graph.capturing is not None,
    "memoryStats": _memory_stats,
    "resetPeakMemoryStats": _reset_peak,
    "CUDAAllocator_AllocatorState": object,
}


def _pretend_torch() -> None:
    own = torch._C
    for name, function in _FUNCTIONS.items():
        setattr(own, f"_cuda_{name}", function)
    own._CudaStreamBase, own._CudaEventBase, own._CUDAGraph = _Stream, _Event, _Graph
    own._has_cuda, own._host_emptyCache = True, lambda: None
    importlib.reload(torch.cuda.streams)
    importlib.reload(torch.cuda.graphs)
    for module in (torch.cuda.streams, torch.cuda.graphs):
        for name in module.__all__ if hasattr(module, "__all__") else ("Stream", "Event"):
            setattr(torch.cuda, name, getattr(module, name))
    torch.cuda._exchange_device = _FUNCTIONS["exchangeDevice"]
    torch.cuda._maybe_exchange_device = _FUNCTIONS["maybeExchangeDevice"]
    torch.cuda._get_device_properties = lambda device: GPUS[device]
    torch.cuda.default_generators = tuple(torch.Generator() for _ in GPUS)
    torch.cuda._initialized = True
    torch.version.cuda = "12.8"
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **how: Any) -> Tensor:
        # What makes it in C++ goes past `OnGpu`.
        made = make(data, **how)
        return (made if device is None else made.to(device)).requires_grad_(requires_grad)

    torch.tensor = tensor
    # A Parameter whose data were exchanged would not be an `OnGpu`.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    assert torch.cuda.is_available()


class Launch(NamedTuple):
    """One kernel that was launched.

    Attributes:
        kernel: its name.
        arch: of the GPU, 80 for 8.0.
        grid: programs.
        stream: id of the stream.
        shared: bytes of shared memory.
        arguments: as the launcher in C takes them.
    """

    kernel: str
    arch: int
    grid: tuple[int, int, int]
    stream: int
    shared: int
    arguments: tuple[Any, ...]


LAUNCHES: list[Launch] = []


class Descriptor(NamedTuple):
    """A tensor and its tiles, as the tensor memory accelerator knows them."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


def _describe(
    address: int,
    swizzle: int,
    itemsize: int,
    kind: int,
    block: list[int],
    shape: list[int],
    strides: list[int],
    padding: int,
) -> Descriptor:
    """The demands of cuTensorMapEncodeTiled, from the CUDA driver API's documentation."""
    assert torch.cuda.get_device_capability()[0] >= 9
    assert address
    assert address % 16 == 0
    assert len(block) == len(shape) == len(strides) <= 5
    assert all(0 < n <= 2**32 for n in shape)
    assert all(s * itemsize % 16 == 0 and s * itemsize < 2**40 for s in strides[:-1])
    assert strides[-1] == 1
    assert all(0 < n <= 256 for n in block)
    inner = block[-1] * itemsize
    assert inner % 16 == 0
    span = {0: None, 1: 32, 2: 64, 3: 128}[swizzle]
    assert span is None or inner <= span
    return Descriptor(address, tuple(shape), tuple(strides), tuple(block))


def _load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
    assert binary[:4] == b"\x7fELF"
    assert shared <= GPUS[device].shared
    return object(), name, 0, 0, 1024


def _taken_apart(codes: Iterator[str], values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The arguments of a launch beside their codes, in tuples too, as PyArg_ParseTuple has them."""
    left = iter(values)
    for code in codes:
        if code == ")":
            break
        value = next(left)
        if code == "(":
            yield from _taken_apart(codes, value)
        else:
            yield code, value
    assert not list(left)


def _launch(form: str, *args: Any) -> None:
    """Hold a launch against its format and the device's limits."""
    x, y, z, stream, function, _, _, scratch, _, packed, _, _, _, *values = args
    own = list(_taken_apart(iter(form), values))
    device = torch.cuda.current_device()
    assert 0 < x < 2**31
    assert 0 < y < 2**16
    assert 0 < z < 2**16
    assert stream == torch.cuda.current_stream().stream_id
    assert scratch is None, "scratch needs triton.set_allocator"
    for code, value in own:
        if code in "ilL":
            bits = 31 if code == "i" else 63
            assert isinstance(value, int)
            assert -(2**bits) <= value < 2**bits, f"{value} does not fit into {bits + 1} bits"
        elif code in "df":
            float(value)
        elif isinstance(value, Tensor):
            assert value.get_device() == device, f"a tensor of {value.device} on device {device}"
        else:
            assert code == "O", (code, value)
    gpu = GPUS[device]
    arch = 10 * gpu.major + gpu.minor
    LAUNCHES.append(Launch(function, arch, (x, y, z), stream, packed[2], tuple(v for _, v in own)))


def _compiled_module(src: str, name: str, **how: Any) -> Any:
    """Stands in for what Triton's driver compiles with a C compiler."""
    if name == "cuda_utils":
        return SimpleNamespace(
            PyCUtensorMap=Descriptor,
            load_binary=_load_binary,
            get_device_properties=lambda i: {"max_shared_mem": GPUS[i].shared},
            cuOccupancyMaxActiveClusters=None,
            set_printf_fifo_size=None,
            fill_tma_descriptor=_describe,
        )
    form = re.search(r'PyArg_ParseTuple\(args, "iiiKKppOOOOOO([\w()]*)"', src)
    assert form is not None
    return SimpleNamespace(launch=functools.partial(_launch, form[1]))


def _pretend_triton() -> None:
    from triton import knobs
    from triton.backends.nvidia import driver
    from triton.runtime import interpreter

    driver.compile_module_from_src = _compiled_module
    driver.library_dirs = list
    if knobs.runtime.interpret:
        run = interpreter.GridExecutor.__call__

        def to_host(t: Any) -> Any:
            return t.host if isinstance(t, OnGpu) else t

        def execute(self: Any, *args: Any, **kwargs: Any) -> None:
            def call() -> None:
                # NumPy warns where hardware returns inf or NaN without a word.
                with np.errstate(all="ignore"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run(self, *args, **kwargs)

            call()
            if _Graph.capturing is not None:
                _Graph.capturing.record(call, ())

        interpreter._unwrap_tensor = to_host
        interpreter.GridExecutor.__call__ = execute


_pretend_torch()
_pretend_triton()


def main() -> None:
    """Run the module that the command line names."""
    if sys.argv[1:2] != ["-m"]:
        sys.exit("usage: python tests/kernels/pretend_gpu.py -m MODULE [ARGUMENTS]")
    # Known by its own name, to whoever imports it.
    sys.modules["pretend_gpu"] = sys.modules["__main__"]
    sys.path[0] = ""
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
