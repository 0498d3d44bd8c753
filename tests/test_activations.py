"""The table against autograd and against torch's own functions; ActSpec's promises."""

from __future__ import annotations

import ast
import copy
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fusedshape import ACTIVATIONS, ActSpec, native
from fusedshape.activations import TORCH_NAMES, Activation
from fusedshape.ops import shaped_act
from fusedshape.spec import from_torch, saves_output
from tests.support.backends import BACKENDS
from tests.support.places import ROOT
from tests.support.specs import SPECS

ROWS = list(ACTIVATIONS.values())
SLOPE = 0.37
TORCH = {
    "relu": F.relu,
    "leaky_relu": lambda u: F.leaky_relu(u, SLOPE),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "selu": F.selu,
    "softsign": F.softsign,
    "swish": F.silu,
    "gelu": lambda u: F.gelu(u, approximate="tanh"),
    "gelu_exact": F.gelu,
    "erf": torch.erf,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "square": torch.square,
    "sin": torch.sin,
    "cos": torch.cos,
}


def points(row: Activation) -> Tensor:
    """Away from the kinks, where both sides are smooth."""
    u = torch.linspace(-6, 6, 241, dtype=torch.float64) + 0.0123
    assert all((u - kink).abs().min() > 1e-3 for kink in row.kinks)
    return u.requires_grad_()


def in_torch(name: str) -> Callable[..., Tensor]:
    """The function of torch that goes by a name."""
    homes = (F, torch, torch.special)
    name = name.removeprefix("special_")
    return next(getattr(home, name) for home in homes if hasattr(home, name))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_derivatives_are_those_of_autograd(row: Activation) -> None:
    u = points(row)
    (d1,) = torch.autograd.grad(row.value(u, SLOPE).sum(), u)
    torch.testing.assert_close(row.d1(u, SLOPE), d1, rtol=1e-12, atol=1e-13)
    slope = row.d1(u, SLOPE)
    d2 = torch.zeros_like(u)
    if slope.requires_grad:
        (d2,) = torch.autograd.grad(slope.sum(), u)
    torch.testing.assert_close(row.d2(u, SLOPE), d2, rtol=1e-11, atol=1e-12)
    if row.d1_from_output is not None:
        v = row.value(u, SLOPE)
        torch.testing.assert_close(row.d1_from_output(v, SLOPE), d1, rtol=1e-9, atol=1e-12)
    assert (row.saves == "output") == (row.d1_from_output is not None)


@pytest.mark.parametrize("name", TORCH)
def test_values_are_torchs(name: str) -> None:
    row = ACTIVATIONS[name]
    u = points(row).detach()
    torch.testing.assert_close(row.value(u, SLOPE), TORCH[name](u), rtol=1e-13, atol=1e-14)


def test_the_table_is_in_order() -> None:
    assert [row.id for row in ROWS] == list(range(len(ROWS)))
    assert all(ACTIVATIONS[row.name] is row for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_has_its_twins_in_triton(row: Activation) -> None:
    functions = {
        node.name: {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        for node in ast.parse((ROOT / "fusedshape/kernels/phi.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    wanted = ["value", "d1", *(["d1_from_output"] if row.saves == "output" else [])]
    for function in wanted:
        assert row.name.upper() in functions[function], (
            f"fusedshape/kernels/phi.py: {function} has no branch for {row.name.upper()}"
        )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_has_its_twin_in_csrc(row: Activation) -> None:
    text = (ROOT / "csrc/cpu/phi.h").read_text()
    twins = dict(re.findall(r"^FS_PHI\((\w+), (\w+)\)", text, re.MULTILINE))
    assert row.name in twins, f"csrc/cpu/phi.h has no FS_PHI({row.name}, …)"
    base = "FromOutput" if row.saves == "output" else "Defaults"
    assert twins[row.name] == base, f"csrc/cpu/phi.h: FS_PHI({row.name}, …) must be a {base}"
    assert set(twins) <= set(ACTIVATIONS), "csrc/cpu/phi.h has a twin of no row"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_has_a_form_without_this_library(row: Activation) -> None:
    assert row.function is not None, (
        f"fusedshape/activations.py: the row {row.name} has no `function`, so fold cannot write it "
        "and the benchmarks have nothing to compare it with"
    )
    u = points(row).detach()
    wanted = row.value(u, SLOPE)
    # F.softplus is linear beyond its threshold; a root less 1 cancels.
    loose = row.name in ("softplus", "bentid")
    tolerance = {"rtol": 1e-13, "atol": 1e-8 if loose else 1e-14}
    torch.testing.assert_close(row.function(u, SLOPE), wanted, **tolerance)
    if row.module is not None:
        torch.testing.assert_close(row.module(SLOPE)(u), wanted, rtol=1e-13, atol=1e-14)
        assert type(row.module(SLOPE)) in {known.module for known in row.names}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_knows_its_names_in_torch(row: Activation) -> None:
    names = {known.name for known in row.names}
    for home in (torch, F):
        assert not hasattr(home, row.name) or row.name in names, (
            f"fusedshape/activations.py: the row {row.name} lacks TorchName({row.name!r}), which "
            f"{home.__name__} has: trace, convert and diagnose do not know it there"
        )
    u = points(row).detach()
    of_rows = {known for other in ROWS for known in other.names}
    for known in TORCH_NAMES:
        if known in of_rows or not known.fixed or known.name == "threshold":  # that takes numbers
            continue
        found = in_torch(known.name)(u)
        assert not torch.allclose(found, row.value(u, SLOPE), rtol=1e-9), (
            f"fusedshape/activations.py: torch's {known.name} is {row.name}; move its TorchName to "
            "that row"
        )


def test_the_names_of_torch_are_unique() -> None:
    known = Counter((name.name, name.module) for name in TORCH_NAMES)
    assert [key for key, count in known.items() if count > 1] == [("gelu", nn.GELU)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_names_are_read_as_the_function_they_name(row: Activation) -> None:
    u = torch.linspace(-3, 3, 61, dtype=torch.float64) + 0.0123
    for known in row.names:
        options: dict[str, Any] = dict(known.options)
        if known.name == "prelu":
            options["weight"] = torch.tensor([0.25], dtype=torch.float64)
        for scale in (1.0, 2.0):
            options |= {k: scale for k, v in options.items() if isinstance(v, float)}
            spec = from_torch(known.name, options)
            if spec is None:  # elu of another alpha
                assert (known.name, scale) == ("elu", 2.0)
                continue
            wanted = in_torch(known.name)(u, **options)
            torch.testing.assert_close(shaped_act(u, spec), wanted, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("page", ["docs/constants.md", "docs/performance.md"])
def test_the_pages_list_all_rows(page: str) -> None:
    from bench.tables import written

    text = (ROOT / page).read_text()
    assert written(text, page) == text, f"{page} is out of date; run: python -m bench.tables"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_a_spec_survives_every_journey(spec: ActSpec) -> None:
    for other in (
        ActSpec.from_json(spec.to_json()),
        ActSpec.from_dict(spec.to_dict()),
        copy.deepcopy(spec),
        pickle.loads(pickle.dumps(spec)),
    ):
        assert other == spec
        assert hash(other) == hash(spec)
        assert other.kernel_args == spec.kernel_args
        assert other.saves_output == spec.saves_output


def test_a_pickle_keeps_the_constants_and_nothing_that_follows_from_them() -> None:
    spec = ActSpec("tanh", 1.5, origin="a")
    state = {**vars(spec), "kernel_args": (99, 0.0), "readable": False}
    other = ActSpec.__new__(ActSpec)
    other.__setstate__(state)
    assert vars(other) == vars(spec)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=4, max_size=4))
def test_json_keeps_every_bit(numbers: list[float]) -> None:
    names = ("input_shift", "output_shift", "input_scale", "output_scale")
    given_ = dict(zip(names, numbers, strict=True))
    if given_["input_scale"] == 0 or given_["output_scale"] == 0:
        with pytest.raises(ValueError, match="must not be 0"):
            ActSpec("tanh", **given_)
        return
    spec = ActSpec("tanh", **given_)
    assert ActSpec.from_json(spec.to_json()).kernel_args == spec.kernel_args


def test_origin_takes_no_part_in_comparison() -> None:
    assert ActSpec("tanh", origin="a") == ActSpec("tanh", origin="b")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "unknown activation 'rlu'", {"activation": "rlu"}),
        (ValueError, "takes no negative_slope", {"activation": "tanh", "negative_slope": 0.1}),
        (ValueError, "input_scale must be finite", {"activation": "tanh", "input_scale": math.nan}),
        (TypeError, "output_scale must be a number", {"activation": "tanh", "output_scale": "2"}),
        (TypeError, "input_shift must be a number", {"activation": "tanh", "input_shift": True}),
    ],
)
def test_bad_constants_are_refused(
    error: type[Exception], message: str, arguments: dict[str, object]
) -> None:
    with pytest.raises(error, match=message):
        ActSpec(**arguments)  # type: ignore[arg-type]


def test_bad_json_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown field"):
        ActSpec.from_json('{"activation": "tanh", "gain": 1}')
    with pytest.raises(ValueError, match="expected a JSON object"):
        ActSpec.from_json("[1]")


def test_what_can_be_read_off_the_output() -> None:
    assert ActSpec("leaky_relu", negative_slope=0.1, output_shift=0.5).saves_output
    assert ActSpec("relu").saves_output
    assert not ActSpec("relu", output_shift=0.5).saves_output, "a dead branch at γδ is rounding"
    assert not ActSpec("leaky_relu", output_shift=0.5).saves_output
    assert not ActSpec("leaky_relu", negative_slope=-0.1).saves_output, "it has no inverse"
    assert not ActSpec("swish").saves_output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_can_be_read_off_a_rounded_output(dtype: torch.dtype) -> None:
    leaky = ActSpec("leaky_relu", 1.3, 0.2, negative_slope=0.1, output_scale=-2.0)
    assert saves_output(leaky, dtype)
    assert saves_output(ActSpec("relu"), dtype)
    for spec in (*SPECS, *map(ActSpec, ACTIVATIONS)):
        piecewise = spec.activation in ("relu", "leaky_relu") and spec.output_shift == 0
        assert saves_output(spec, dtype) == (piecewise and spec.saves_output)
        assert saves_output(spec, torch.float32) == spec.saves_output
    # Why: the side of every number that the output can hold is that of the argument.
    u = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    u = torch.cat([u, 2.0**-12 * u])
    y = shaped_act(u, leaky).double() / leaky.output_scale
    assert torch.equal(y > 0, leaky.input_scale * u.double() + leaky.input_shift > 0)


def extremes(dtype: torch.dtype) -> Tensor:
    """Infinities, NaN, zeros, and the largest, smallest normal and denormal numbers."""
    info = torch.finfo(dtype)
    finite = [0.0, info.max, info.max / 4, info.tiny, info.tiny / 4, 1.0]
    both = [sign * u for u in (*finite, math.inf) for sign in (1, -1)]
    return torch.tensor([*both, math.nan], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_extremes_have_one_answer(row: Activation, dtype: torch.dtype) -> None:
    """For every backend and transform: torch's own result, except where torch's overflows."""
    u = extremes(dtype)
    spec = ActSpec(row.name, negative_slope=SLOPE if row.has_slope else 0.0)
    truth = u.double().requires_grad_()
    value = TORCH.get(row.name, lambda u: row.value(u, SLOPE))(truth)
    (slope,) = torch.autograd.grad(value.sum(), truth)
    wide = u.double()
    if row.name == "gelu":  # torch works out 0·u³, whose power overflows
        slope = torch.where(wide.isfinite() & (wide.abs() > 64), (wide > 0).double(), slope)
    close = partial(
        torch.testing.assert_close,
        rtol=4 * torch.finfo(dtype).eps,
        atol=8 * torch.finfo(dtype).eps,
        equal_nan=True,
    )
    if row.name == "bentid":
        assert slope[-3:-1].tolist() == [1.5, 0.5]
    # What float32 and float16 cannot hold of 2u and u² is inf.
    value, slope = value.detach().to(dtype), slope.to(dtype)

    def check(f: Callable[[Tensor], Tensor]) -> None:
        x = u.clone().requires_grad_()
        y = f(x)
        close(y.detach(), value)
        for again in (False, True):
            (dx,) = torch.autograd.grad(y.sum(), x, create_graph=again, retain_graph=True)
            close(dx.detach(), slope)

    for backend in BACKENDS[: 2 if native.available() else 1]:
        name = backend if isinstance(backend, str) else backend.values[0]
        check(partial(shaped_act, spec=spec, backend=name))
    plain = partial(shaped_act, spec=spec)
    _, tangent = torch.func.jvp(plain, (u,), (torch.ones_like(u),))
    close(tangent, slope)
    close(torch.func.grad(lambda x: plain(x).sum())(u), slope)
