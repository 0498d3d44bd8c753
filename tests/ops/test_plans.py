"""Layers by csrc/host: the numbers are those of Python, which serves wherever it must."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedshape import ActSpec, ShapedConv2d, native
from fusedshape.ops import bias_act, conv_act, linear_act, plans, shaped_act

pytestmark = pytest.mark.skipif(native.host() is None, reason=f"csrc/host: {native.why_no_host()}")

SPECS = {
    "output saved": ActSpec("leaky_relu", negative_slope=0.3, output_scale=1.3),
    "input saved": ActSpec("swish", input_scale=0.9, output_shift=0.2),
}


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    shapes = {
        "x": (3, 4),
        "rows": (2, 3, 4),
        "matrix": (5, 4),
        "bias4": (4,),
        "bias": (5,),
        "image": (2, 4, 5, 6),
        "weight": (6, 2, 3, 3),
        "bias6": (6,),
        "wide": (2, 32, 40, 40),
        "kernel": (32, 32, 1, 1),
        "bias32": (32,),
    }
    found = {k: torch.randn(s, generator=made, dtype=dtype) for k, s in shapes.items()}
    found["wide"] = found["wide"].contiguous(memory_format=torch.channels_last)
    return {k: t.requires_grad_() for k, t in found.items()}


Call = tuple[Callable[..., Tensor], tuple[str, ...], dict[str, Any]]
CALLS: dict[str, Call] = {
    "shaped_act": (lambda x, spec: shaped_act(x, spec), ("x",), {}),
    "bias_act": (bias_act, ("x", "bias4"), {}),
    "linear": (linear_act, ("x", "matrix", "bias"), {}),
    "linear of rows": (linear_act, ("rows", "matrix", "bias"), {}),
    "conv": (conv_act, ("image", "weight", "bias6"), {"groups": 2, "stride": (2, 1), "padding": 1}),
    "native": (conv_act, ("wide", "kernel", "bias32"), {"engine": "native"}),
}
both = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "run", lambda *args: None)


def by_host(y: Tensor) -> bool:
    return y.grad_fn is not None and "CppNode" in y.grad_fn.name()


@both
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_are_those_of_python(
    call: Call, spec: ActSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, names, how = call
    if how.get("engine") == "native" and dtype == torch.float64:
        pytest.skip("the engine is for float32")
    tensors = [operands(dtype)[name] for name in names]

    def results() -> tuple[Tensor, ...]:
        y = op(*tensors, spec, **how)
        with torch.no_grad():
            assert torch.equal(y, op(*tensors, spec, **how))
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    got = results()
    assert by_host(got[0])
    python(monkeypatch)
    want = results()
    assert not by_host(want[0])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@both
@every
def test_only_what_is_wanted(call: Call, spec: ActSpec) -> None:
    op, names, how = call
    for wanted in names:
        tensors = [operands()[name].requires_grad_(name == wanted) for name in names]
        y = op(*tensors, spec, **how)
        assert by_host(y)
        (grad,) = torch.autograd.grad(y.sum(), [t for t in tensors if t.requires_grad])
        assert grad.any()
    frozen = [operands()[name].detach() for name in names]
    assert not op(*frozen, spec, **how).requires_grad


@both
@pytest.mark.parametrize("call", [c for k, c in CALLS.items() if k != "native"])
def test_second_derivatives(call: Call, spec: ActSpec) -> None:
    op, names, how = call
    tensors = [operands(torch.float64)[name] for name in names[:3]]
    small = [t.detach()[:2].requires_grad_() if t is tensors[0] else t for t in tensors]
    assert by_host(op(*small, spec, **how))
    assert torch.autograd.gradgradcheck(lambda *ts: op(*ts, spec, **how), small)


def test_python_serves_what_watches() -> None:
    t, spec = operands(), SPECS["input saved"]
    x, matrix, bias = t["x"], t["matrix"], t["bias"]
    assert by_host(linear_act(x, matrix, bias, spec))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not by_host(linear_act(x, matrix, bias, spec))
    half = [s.detach().bfloat16().requires_grad_() for s in (x, matrix, bias)]
    assert not by_host(linear_act(*half, spec))
    tangent = torch.func.jvp(lambda x: linear_act(x, matrix, bias, spec), (x,), (x,))[1]
    assert tangent.shape == (3, 5)
    batched = torch.func.vmap(lambda x: linear_act(x, matrix, bias, spec))(x)
    torch.testing.assert_close(batched, linear_act(x, matrix, bias, spec))

    class Mine(Tensor):
        pass

    assert isinstance(linear_act(x.detach().as_subclass(Mine), matrix, bias, spec), Mine)


def test_what_is_wrong_is_said_as_before() -> None:
    t, spec = operands(), SPECS["output saved"]
    for _ in range(2):  # nothing of a call that raised is remembered
        with pytest.raises(ValueError, match="bias has shape"):
            linear_act(t["x"], t["matrix"], t["bias4"], spec)
        with pytest.raises(TypeError, match="spec must be an ActSpec"):
            linear_act(t["x"], t["matrix"], t["bias"], None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="stride"):
            conv_act(t["image"], t["weight"], None, spec, groups=2, stride=1.5)  # type: ignore[arg-type]
        conv_act(t["image"], t["weight"], None, spec, groups=2, stride=1)
        with pytest.raises(ValueError, match="stride"):
            conv_act(t["image"], t["weight"], None, spec, groups=2, stride=True)


def test_backward_twice_and_changed_tensors_are_errors() -> None:
    t, spec = operands(), SPECS["output saved"]
    y = bias_act(t["x"], t["bias4"], spec)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    y = bias_act(t["x"], t["bias4"], spec)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_checkpoints_and_copies() -> None:
    spec = SPECS["output saved"]
    layer = ShapedConv2d(4, 5, 3, spec=spec)
    image = operands()["image"]
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(image)
    assert by_host(y)
    assert len(packed) == 3
    (want,) = torch.autograd.grad(y.sum(), image)
    (again,) = torch.autograd.grad(checkpoint(layer, image, use_reentrant=False).sum(), image)
    assert torch.equal(want, again)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        got = other(image)
        assert by_host(got)
        assert torch.equal(got, y)


def test_several_gradients_at_once() -> None:
    t, spec = operands(), SPECS["input saved"]
    y = linear_act(t["x"], t["matrix"], t["bias"], spec)
    assert by_host(y)
    ways = torch.stack([torch.ones_like(y), 2 * torch.ones_like(y)])
    (many,) = torch.autograd.grad(y, t["matrix"], ways, retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(y, t["matrix"], ways[0])
    torch.testing.assert_close(many[0], one)
    torch.testing.assert_close(many[1], 2 * one)
