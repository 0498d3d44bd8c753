"""Plans are made, in processes too; with cuDNN installed, for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedshape import ACTIVATIONS
from fusedshape.ops.engines.cudnn import building, library
from fusedshape.ops.engines.cudnn.building import NoPlanError, build, build_all
from fusedshape.ops.engines.cudnn.graph import Operation

#: A 3×3 layer of the middle of a network.
LAYER = {
    "image": (32, 128, 28, 28), "weight": (128, 128, 3, 3),
    "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1),
}  # fmt: skip
NOBODY = json.dumps({"cudaDeviceId": 0})


def operation(kind: str, dtype: str = "bfloat16", **how: object) -> Operation:
    return Operation(**{"kind": kind, "dtype": dtype, **LAYER, **how})  # type: ignore[arg-type]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pretended cuDNN, as a module that other processes find too."""
    (tmp_path / "cudnn.py").write_text(
        "from tests.support.fake_cudnn import *\nfrom tests.support.fake_cudnn import __version__\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cudnn", raising=False)
    library.forget()
    yield
    sys.modules.pop("cudnn", None)
    library.forget()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("most", [1, 2])
def test_all_are_made_whoever_makes_them(most: int) -> None:
    wanted = [operation("fprop_act", activation="relu"), operation("wgrad"), operation("dgrad")]
    bad = operation("fprop_act", activation="no such")
    found = dict(build_all([*wanted, bad], NOBODY, most))
    assert set(found) == {*wanted, bad}
    for one in wanted:
        plan = found[one]
        assert isinstance(plan, bytes)
        assert json.loads(plan)["fake"] == 1
    assert isinstance(found[bad], NoPlanError)
    assert "cuDNN has no tensor-core plan for it: KeyError" in str(found[bad])


@pytest.mark.usefixtures("fake")
def test_a_process_that_dies_costs_a_plan_and_no_more() -> None:
    wanted = [operation("fprop"), operation("wgrad")]
    found = dict(building.build_all(wanted, '{"cudaDeviceId": "exit"}', 2))
    assert all(isinstance(plan, NoPlanError) for plan in found.values())
    assert "no plan could be made" in str(found[wanted[0]])


INSTALLED = importlib.util.find_spec("cudnn") is not None
#: What cuDNN must know of a GPU: an A100, an H100 and a B200.
GPUS = {
    80: (108, 167_936, "NVIDIA A100-SXM4-80GB"),
    90: (132, 233_472, "NVIDIA H100 80GB HBM3"),
    100: (148, 233_472, "NVIDIA B200"),
}
DTYPES = ("float16", "bfloat16")


def described(arch: int) -> str:
    multiprocessors, shared, name = GPUS[arch]
    return json.dumps({
        "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64],
        "regsPerBlock": 65536, "multiProcessorCount": multiprocessors, "warpSize": 32,
        "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": shared - 1024,
        "reservedSharedMemoryPerBlock": 1024, "oversizedSharedMemoryPerBlock": 0,
        "maxSharedMemoryPerSM": shared, "maxRegistersPerSM": 65536, "maxCtasPerSM": 32,
        "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "pciDeviceId": 8704,
        "isTccDriver": 0, "supportCoopLaunch": 1, "totalGlobalMem": 80 << 30,
        "smClockRateKHz": 1980000, "memClockRateKHz": 2619000, "memoryBusWidth": 5120,
        "l2CacheSize": 50 << 20, "cudaDeviceId": 0, "deviceVer": 10 * arch, "driverVer": 13000,
        "deviceName": name,
    })  # fmt: skip


@pytest.fixture(scope="module")
def cudnn() -> None:
    if not INSTALLED:
        pytest.skip("nvidia-cudnn-frontend is not installed; CONTRIBUTING.md says how to run this")
    library.forget()
    reason = library.why_not()
    if reason is not None:
        pytest.skip(reason)


def made(operation: Operation, arch: int) -> bytes:
    return build(operation, described(arch))


READABLE = [name for name, row in ACTIVATIONS.items() if row.saves == "output"]


@pytest.mark.usefixtures("cudnn")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_plans(activation: str, arch: int, dtype: str) -> None:
    for residual in (False, True):
        made(operation("fprop_act", dtype, activation=activation, residual=residual), arch)


@pytest.mark.usefixtures("cudnn")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*DTYPES, "float32"])
@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("activation", READABLE)
def test_dgrad_plans(activation: str, arch: int, dtype: str) -> None:
    made(operation("dgrad_act", dtype, activation=activation), arch)


SIZES = {
    "products": operation("fprop"),
    "dgrad": operation("dgrad"),
    "wgrad": operation("wgrad"),
    "sums": operation("dgrad_act", activation="relu", sums=True),
    "tf32": operation("fprop_act", "float32", activation="tanh"),
    "strided": operation("dgrad_act", activation="relu", stride=(2, 2)),
    "groups": operation("fprop_act", activation="relu", weight=(128, 32, 3, 3)),
    "1×1": operation("fprop_act", activation="relu", weight=(128, 128, 1, 1), padding=(0, 0)),
    "stem": operation(
        "fprop_act", activation="relu", image=(32, 3, 224, 224), weight=(64, 3, 7, 7),
        stride=(2, 2), padding=(3, 3),
    ),
    "3d": operation(
        "fprop_act", activation="relu", image=(4, 64, 8, 16, 16), weight=(64, 64, 3, 3, 3),
        stride=(1, 1, 1), padding=(1, 1, 1), dilation=(1, 1, 1),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("size", SIZES)
def test_plans_of_other_layers(size: str, arch: int) -> None:
    plan = made(SIZES[size], arch)
    assert len(plan) > 100


IMPOSSIBLE = {
    "depthwise": operation("fprop_act", activation="relu", weight=(128, 1, 3, 3)),
    "channels that do not match": operation("fprop_act", activation="relu", image=(2, 100, 9, 9)),
    "a kernel larger than its image": operation(
        "fprop_act", activation="relu", image=(2, 128, 2, 2), padding=(0, 0)
    ),
    "no images": operation("fprop_act", activation="relu", image=(0, 128, 9, 9)),
    "four dimensions": operation(
        "fprop_act", activation="relu", image=(2, 64, 4, 4, 4, 4), weight=(64, 64, 1, 1, 1, 1),
        stride=(1,) * 4, padding=(0,) * 4, dilation=(1,) * 4,
    ),
}  # fmt: skip


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_is_impossible_is_refused(case: str, arch: int) -> None:
    with pytest.raises(NoPlanError, match="cuDNN has no tensor-core plan for it"):
        made(IMPOSSIBLE[case], arch)
