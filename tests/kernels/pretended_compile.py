"""torch.compile of layers on CUDA, traced whole; test_pretend_gpu.py runs this file.

Tensors are torch's fakes: what is compiled is looked at, not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedshape import tuning
from fusedshape.ops import ChainLayer, bias_act, conv_act, conv_chain, linear_act
from fusedshape.ops.problem import problem_of
from fusedshape.tuning import chooser
from fusedshape.tuning.cache import Record
from tests.support.layers import layer_of
from tests.support.specs import shaped

# Without a shift the output is saved in half precision too.
LEAKY, SWISH = replace(shaped("leaky_relu"), output_shift=0.0), shaped("swish")
Form = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FUSEDSHAPE_CACHE", str(tmp_path))
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), tuning.mode("cached"):
        yield
    torch._dynamo.reset()


def leaf(*shape: int) -> Tensor:
    t = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    if t.ndim == 4:
        t = t.to(memory_format=torch.channels_last)
    return t.requires_grad_()


def ops_of(f: Form, *leaves: Tensor, dynamic: bool = False) -> tuple[Counter[str], Counter[str]]:
    """The library's ops, and torch's convolutions, of the compiled forward and backward."""
    found: list[Counter[str]] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        kept = [n.split(".")[1] for n in names if n.startswith(("fusedshape.", "aten.conv"))]
        found.append(Counter(kept))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    y = torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)(*leaves)
    assert y.device == leaves[0].device
    for t, grad in zip(leaves, torch.autograd.grad(y, leaves, torch.empty_like(y)), strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (t.shape, t.dtype, t.device)
    forward, backward = found
    return forward, backward


X, W, B = (2, 16, 6, 5), (16, 16, 3, 3), (16,)


def conv(engine: str, **how: Any) -> Form:
    return lambda x, w, b, *r: conv_act(
        *(x, w, b, LEAKY), padding=1, engine=engine, **how, residual=r[0] if r else None
    )


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layers(dynamic: bool) -> None:
    forward, backward = ops_of(conv("triton"), leaf(*X), leaf(*W), leaf(*B), dynamic=dynamic)
    assert forward == {"triton_conv_act": 1}
    assert backward == {"triton_act_grad": 1, "triton_conv_dgrad": 1, "triton_conv_wgrad": 1}
    forward, backward = ops_of(
        lambda x, w, b: linear_act(x, w, b, SWISH, engine="triton"),
        *(leaf(7, 16), leaf(24, 16), leaf(24)),
        dynamic=dynamic,
    )
    # The product takes the bias before it is rounded.
    assert forward == {"triton_conv_act": 1, "triton_bias_act": 1}
    assert backward == {"triton_act_grad": 1, "triton_conv_dgrad": 1, "triton_conv_wgrad": 1}


def test_a_pass_of_its_own() -> None:
    forward, backward = ops_of(lambda x, b: bias_act(x, b, SWISH), leaf(*X), leaf(*B))
    assert (forward, backward) == ({"triton_bias_act": 1}, {"triton_act_grad": 1})


def test_residual() -> None:
    f = conv("triton", residual_weight=0.6)
    forward, backward = ops_of(f, leaf(*X), leaf(*W), leaf(*B), leaf(*X))
    assert forward == {"triton_conv_act": 1}
    assert backward["triton_conv_dgrad"] == backward["triton_conv_wgrad"] == 1


@pytest.mark.parametrize("engine", ["auto", "triton"])
def test_chain(engine: str) -> None:
    def f(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        how: dict[str, Any] = {"engine": engine}
        return conv_chain(x, [ChainLayer(w, b, LEAKY, 1, 1, **how), ChainLayer(v, b, LEAKY, **how)])

    forward, backward = ops_of(f, leaf(*X), leaf(*W), leaf(*B), leaf(16, 16, 1, 1))
    if engine == "triton":
        assert forward == {"triton_conv_act": 2}
        assert backward == {"triton_act_grad": 1, "triton_conv_dgrad": 2, "triton_conv_wgrad": 2}
    else:
        assert forward["convolution"] == backward["convolution_backward"] == 2


def test_what_was_measured_is_taken() -> None:
    x, w, b = leaf(*X), leaf(*W), leaf(*B)
    geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    problem = problem_of(x, layer_of(w, LEAKY, geometry))
    assert problem.capability == torch.cuda.get_device_capability()
    record = Record("triton", None, 2, base_seconds=2.0, seconds=1.0)
    for direction in ("fprop", "wgrad"):
        chooser.keep(direction, problem, torch.device("cuda", 0), record)
    tuning.mode("cached")
    forward, backward = ops_of(conv("auto"), x, w, b)
    assert forward == {"triton_conv_act": 1}
    assert backward == {"triton_act_grad": 1, "convolution_backward": 1, "triton_conv_wgrad": 1}
