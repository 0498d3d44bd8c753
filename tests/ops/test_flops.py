"""torch's FlopCounterMode counts the kernels' products as it counts torch's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fusedshape import ActSpec, native, ops
from fusedshape.ops import ChainLayer, schema

BENT = ActSpec("leaky_relu", negative_slope=0.3)
WAVED = ActSpec("swish")
needs_native = pytest.mark.skipif(not native.available(), reason="csrc is not built")


def count(f: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return int(counter.get_total_flops())


def images(*shape: int) -> Tensor:
    """A batch with channels innermost."""
    return torch.randn(shape).movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()


def weights(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


Run = Callable[[Any, ActSpec], Tensor]
X, W = images(2, 32, 9, 8), weights(16, 32, 3, 2)
LINE = images(2, 32, 9)
SAME = images(2, 16, 8, 7)
B = weights(16)
ROWS, MATRIX = weights(20, 32), weights(16, 32)


def chain(engine: Any, spec: ActSpec) -> Tensor:
    layers = [ChainLayer(W, B, spec, engine=engine, padding=1)]
    layers += [ChainLayer(weights(16, 16, 3, 3), B, spec, engine=engine) for _ in range(2)]
    return ops.conv_chain(X, layers)


CASES: dict[str, Run] = {
    "conv2d": lambda e, s: ops.conv_act(X, W, B, s, engine=e),
    "sizes": lambda e, s: ops.conv_act(
        X,
        W,
        B,
        s,
        stride=2,
        padding=(2, 1),
        dilation=(1, 2),
        engine=e,
    ),
    "no input": lambda e, s: ops.conv_act(X.detach(), W, B, s, engine=e),
    "no weight": lambda e, s: ops.conv_act(X, W.detach(), B, s, engine=e),
    "conv1d": lambda e, s: ops.conv_act(
        LINE,
        W[..., 0],
        B,
        s,
        padding=1,
        engine=e,
    ),
    "linear": lambda e, s: ops.linear_act(ROWS, MATRIX, B, s, engine=e),
    "linear of rows": lambda e, s: ops.linear_act(
        ROWS.view(4, 5, 32),
        MATRIX,
        None,
        s,
        engine=e,
    ),
    "conv residual": lambda e, s: ops.conv_act(
        X,
        W,
        B,
        s,
        residual=SAME[:, :, :7],
        residual_weight=0.6,
        engine=e,
    ),
    "linear residual": lambda e, s: ops.linear_act(
        ROWS,
        MATRIX,
        B,
        s,
        residual=ROWS[:, :16],
        residual_weight=0.6,
        engine=e,
    ),
    "chain": chain,
}


@needs_native
@pytest.mark.parametrize("spec", [BENT, WAVED], ids=["from y", "from x"])
@pytest.mark.parametrize("case", CASES)
def test_native_counts_as_aten_does(case: str, spec: ActSpec) -> None:
    forward = {e: count(lambda e=e: CASES[case](e, spec)) for e in ("aten", "native")}
    both = {e: count(lambda e=e: CASES[case](e, spec).sum().backward()) for e in forward}
    assert forward["native"] == forward["aten"] > 0
    assert both["native"] == both["aten"] > forward["aten"]


GEOMETRIES = {
    "conv1d": ((2, 8, 9), (6, 8, 3), [2], [1], [1], 1),
    "conv2d": ((2, 8, 9, 8), (6, 8, 3, 2), [1, 2], [1, 0], [2, 1], 1),
    "grouped": ((2, 8, 9, 8), (6, 4, 3, 2), [1, 2], [1, 0], [1, 1], 2),
}


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("case", GEOMETRIES)
def test_every_op_counts_as_torchs(case: str, backend: str) -> None:
    x_shape, w_shape, *sizes, groups = GEOMETRIES[case]
    own = {
        name: getattr(torch.ops.fusedshape, f"{backend}_{name}")
        for name in ("conv", "conv_act", "conv_dgrad", "conv_wgrad")
    }
    none = [0] * len(sizes[0])
    constants = (0, 0.0, 1.0, 0.0, 0.0, 1.0)
    with FakeTensorMode():
        x, w = torch.empty(x_shape), torch.empty(w_shape)
        dz = torch.convolution(x, w, None, *sizes, False, none, groups)
        backward = torch.ops.aten.convolution_backward.default
        geometry = (*sizes, False, none, groups)
        dgrad = count(lambda: backward(dz, x, w, None, *geometry, [True, False, False]))
        wgrad = count(lambda: backward(dz, x, w, None, *geometry, [False, True, False]))
        product = count(lambda: torch.convolution(x, w, None, *geometry))
        assert count(lambda: own["conv"](x, w, *sizes)) == product
        assert count(lambda: own["conv_act"](x, w, None, None, 0.0, *sizes, *constants)) == product
        rest = (None, None, x_shape, *sizes, *constants, True, False)
        assert count(lambda: own["conv_dgrad"](dz, w, *rest)) == dgrad
        assert count(lambda: own["conv_wgrad"](dz, x, w_shape, *sizes)) == wgrad


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_matrices_count_as_torchs(backend: str) -> None:
    own = torch.ops.fusedshape
    with FakeTensorMode():
        x, w, dz = torch.empty(20, 8), torch.empty(6, 8), torch.empty(20, 6)
        product = count(lambda: F.linear(x, w))
        assert count(lambda: getattr(own, f"{backend}_conv")(x, w, [], [], [])) == product
        wgrad = getattr(own, f"{backend}_conv_wgrad")
        assert count(lambda: wgrad(dz, x, [6, 8], [], [], [])) == product
        rest = (None, None, [20, 8], [], [], [], 0, 0.0, 1.0, 0.0, 0.0, 1.0, True, False)
        assert count(lambda: getattr(own, f"{backend}_conv_dgrad")(dz, w, *rest)) == product


@needs_native
def test_compiled_layers_count_alike() -> None:
    def f(x: Tensor) -> Tensor:
        return ops.conv_act(x, W, B, BENT, engine="native")

    want = count(lambda: f(X).sum().backward())
    torch.compiler.reset()
    compiled = torch.compile(f, backend="aot_eager")
    for _ in range(2):  # compiles, and runs what was compiled
        assert count(lambda: compiled(X).sum().backward()) == want


@pytest.mark.parametrize("first", ["fusedshape", "torch.utils.flop_counter"])
def test_formulas_are_registered_whichever_is_imported_first(first: str) -> None:
    code = (
        f"import sys, {first}; held = list(sys.meta_path); import fusedshape, torch; "
        "before = 'torch.utils.flop_counter' in sys.modules; "
        "from torch.utils.flop_counter import flop_registry as known; "
        "print(before, sum('fusedshape' in str(op) for op in known), "
        "[f for f in sys.meta_path if type(f).__module__.startswith('fusedshape')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == f"{first != 'fusedshape'} {4 * len(schema.DEFINED)} []"
