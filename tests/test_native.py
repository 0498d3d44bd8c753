"""The CPU kernels of csrc: accuracy, layouts, edges, determinism; building and loading."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedshape import ACTIVATIONS, ActSpec, native, reference
from fusedshape.activations import Activation
from fusedshape.ops import schema  # defines the ops
from fusedshape.spec import saves_output
from tests.support.specs import SPECS
from tests.support.tolerance import assert_as_good_as

pytestmark = pytest.mark.usefixtures("one_thread")
COMPILER = (os.environ.get("CXX") or "g++").split()[0]
OPS = torch.ops.fusedshape
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps
assert schema.DEFINED


@pytest.fixture(scope="session", autouse=True)
def library() -> Path:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler {COMPILER!r}")
    path = native.build()
    native.load()
    assert native.available(), native.why_not()
    return path


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) * 2).to(dtype)


# A layout: the channel dimension and a tensor of normal numbers.
LAYOUTS: dict[str, Callable[[torch.dtype], tuple[Tensor, int]]] = {
    "nchw": lambda t: (draw(3, 5, 9, 7, dtype=t), 1),
    "nchw, short runs": lambda t: (draw(3, 65, 2, 3, dtype=t), 1),
    "nchw, wide period": lambda t: (draw(2, 181, 5, 3, dtype=t), 1),
    "nchw, several pieces": lambda t: (draw(2, 3, 91, 97, dtype=t), 1),
    "channels_last": lambda t: (
        draw(2, 7, 6, 5, dtype=t).to(memory_format=torch.channels_last),
        1,
    ),
    "channels_last, wide": lambda t: (
        draw(2, 1031, 3, 3, dtype=t).to(memory_format=torch.channels_last),
        1,
    ),
    "ncdhw channels_last": lambda t: (
        draw(2, 3, 4, 5, 6, dtype=t).to(memory_format=torch.channels_last_3d),
        1,
    ),
    "features last": lambda t: (draw(37, 19, dtype=t), -1),
    "many rows": lambda t: (draw(4000, 17, dtype=t), 1),
    "transposed": lambda t: (draw(33, 41, dtype=t).t(), 1),
    "permuted": lambda t: (draw(5, 4, 3, 7, dtype=t).permute(2, 0, 3, 1), 2),
    "one channel": lambda t: (draw(4, 1, 3, 5, dtype=t), 1),
    "one pixel": lambda t: (draw(6, 13, 1, 1, dtype=t), 1),
    "vector": lambda t: (draw(11, dtype=t), 0),
    "sliced": lambda t: (draw(4, 6, 8, 10, dtype=t)[:, 1:4, ::2, 3:], 1),
    "expanded": lambda t: (draw(3, 1, 7, dtype=t).expand(3, 5, 7), 1),
    "offset": lambda t: (draw(7 * 9 + 1, dtype=t)[1:].view(7, 9), 1),
}


def truth_of(x: Tensor, bias: Tensor, spec: ActSpec, dim: int) -> tuple[Tensor, Tensor]:
    """y and dy/dx in float64, from the input."""
    y = reference.bias_act(x.double(), bias.double(), spec, dim)
    one = torch.ones_like(y)
    return y, reference.act_grad(one, x.double(), bias.double(), saving_input(spec), dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_every_activation_in_every_dtype(spec: ActSpec, dtype: torch.dtype) -> None:
    x, dim = LAYOUTS["nchw, several pieces"](dtype)
    bias = draw(3, seed=1)
    y, slope = truth_of(x, bias, spec, dim)
    check(
        OPS.native_bias_act(x, bias, dim, *spec.kernel_args),
        reference.bias_act(x, bias, spec, dim),
        y,
    )
    grad = draw(*x.shape, dtype=dtype, seed=2)
    got, sums = OPS.native_act_grad(grad, x, bias, dim, *spec.kernel_args, False, True)
    from_input = saving_input(spec)
    want = slope * grad.double()
    check(got, reference.act_grad(grad, x, bias, from_input, dim), want)
    args = (dim, *spec.kernel_args, False, False)
    check_sums(sums, OPS.native_act_grad(op(grad), op(x), bias, *args)[0], dim)


def saving_input(spec: ActSpec) -> ActSpec:
    """The same constants, with backward from the input."""
    copy = ActSpec.from_dict(spec.to_dict())
    object.__setattr__(copy, "readable", False)
    return copy


def check(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """`assert_as_good_as`, with room for the errors of the truth itself where it is no better."""
    if got.dtype == torch.float64:
        room = 16 * torch.finfo(torch.float64).eps * truth.abs().amax()
        assert (got - truth).abs().amax() <= room
    else:
        assert_as_good_as(got, plain, truth)


def check_sums(sums: Tensor, terms: Tensor, dim: int) -> None:
    """Compare with the exact sums of the terms, which are dx before it is rounded to half."""
    assert sums.dtype == terms.dtype
    error = (sums - reference.channel_sum(terms.double(), dim)).abs()
    size = reference.channel_sum(terms.double().abs(), dim)
    assert (error <= 4 * torch.finfo(sums.dtype).eps * size).all()


def op(x: Tensor) -> Tensor:
    """The tensor in the type it is computed in."""
    return x.to(reference.opmath_dtype(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["tanh", "swish"])
def test_layouts(name: str, layout: str, dtype: torch.dtype) -> None:
    spec = next(s for s in SPECS if s.activation == name)
    x, dim = LAYOUTS[layout](dtype)
    bias = draw(x.shape[dim], dtype=dtype, seed=1)
    y, _ = truth_of(x, bias, spec, dim)
    got = OPS.native_bias_act(x, bias, dim, *spec.kernel_args)
    assert got.stride() == torch.empty_like(x).stride()
    check(got, reference.bias_act(x, bias, spec, dim), y)

    from_output = saves_output(spec, dtype)
    saved = got if from_output else x
    for grad in (
        draw(*x.shape, dtype=dtype, seed=2),
        torch.empty_like(x).copy_(draw(*x.shape, dtype=dtype, seed=3)),
        torch.ones((), dtype=dtype).expand(x.shape),
        draw(*x.shape, 2, dtype=dtype, seed=4)[..., 1],
    ):
        plain = reference.act_grad(grad, saved, bias, spec, dim)
        exact = reference.act_grad(
            grad.double(), saved.double(), bias.double(), spec, dim, from_output
        )
        dx, sums = OPS.native_act_grad(grad, saved, bias, dim, *spec.kernel_args, from_output, True)
        assert dx.stride() == torch.empty_like(saved).stride()
        check(dx, plain, exact)
        args = (dim, *spec.kernel_args, from_output, False)
        check_sums(sums, OPS.native_act_grad(op(grad), op(saved), op(bias), *args)[0], dim)
        alone, none = OPS.native_act_grad(
            grad, saved, bias, dim, *spec.kernel_args, from_output, False
        )
        assert none.shape == (0,)
        assert torch.equal(alone, dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.activation)
def test_in_place_and_alone_are_the_same(spec: ActSpec, dtype: torch.dtype) -> None:
    x, dim = LAYOUTS["channels_last"](dtype)
    bias = draw(x.shape[dim], dtype=dtype, seed=1)
    y = OPS.native_bias_act(x, bias, dim, *spec.kernel_args)
    z = x.clone()
    assert OPS.native_bias_act_(z, bias, dim, *spec.kernel_args) is None
    assert torch.equal(y, z)
    # the same number gives the same result wherever it lies in a row
    flat = x.permute(0, 2, 3, 1).reshape(-1, x.shape[dim])
    single = [OPS.native_bias_act(row, bias, 0, *spec.kernel_args) for row in flat]
    assert torch.equal(torch.stack(single), y.permute(0, 2, 3, 1).reshape(flat.shape))


# Where φ or φ′ itself multiplies errors of float32's u in the tail, and where the float64 table
# cancels, a relative bound is not to be had; these are the others.
RELATIVE = [n for n in ACTIVATIONS if n not in ("gelu", "swish", "gelu_exact", "bentid")]


@pytest.mark.parametrize("name", RELATIVE)
def test_relative_error(name: str) -> None:
    row = ACTIVATIONS[name]
    tiny = torch.logspace(-30, 0, 4001, dtype=torch.float64)
    large = torch.logspace(0, 38, 4001, dtype=torch.float64)
    u = torch.cat([tiny, -tiny, large, -large, torch.linspace(-30, 30, 40001)]).float()
    slope = 0.3 if row.has_slope else 0.0
    got = OPS.native_bias_act(u, None, 0, row.id, slope, 1.0, 0.0, 0.0, 1.0).double()
    want = row.value(u.double(), slope)
    keep = want.abs() <= torch.finfo(torch.float32).max
    # 1e-45 is half the smallest denormal
    assert ((got - want).abs()[keep] <= (4 * EPS * want.abs() + 1e-45)[keep]).all()
    assert torch.equal(got[~keep].abs(), torch.full_like(got[~keep], math.inf))


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in RELATIVE])
def test_relative_error_where_phi_is_ill_conditioned(name: str) -> None:
    row = ACTIVATIONS[name]
    u = torch.cat([torch.linspace(-4, 20, 40001), torch.logspace(-30, 0, 4001)]).float()
    u = torch.cat([u, -u[-4001:]])
    got = OPS.native_bias_act(u, None, 0, row.id, 0.0, 1.0, 0.0, 0.0, 1.0).double()
    v = u.double()
    want = v * (1 + v / (1 + (1 + v * v).sqrt()) / 2) if name == "bentid" else row.value(v, 0.0)
    condition = (v * row.d1(v, 0.0)).abs()
    assert ((got - want).abs() <= EPS * (4 * want.abs() + condition) + 1e-45).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", ACTIVATIONS.values(), ids=lambda r: r.name)
def test_kinks_infinities_and_nan(row: Activation, dtype: torch.dtype) -> None:
    slope = 0.25 if row.has_slope else 0.0
    args = (row.id, slope, 1.0, 0.0, 0.0, 1.0)
    # seventeen of each, so that full vectors and tails both see them
    u = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype).repeat(17)
    cases = [
        (OPS.native_bias_act(u, None, 0, *args), row.value),
        (grad_of(u, args, False), row.d1),
    ]
    if row.d1_from_output:
        cases.append((grad_of(u, args, True), row.d1_from_output))
    for got, f in cases:
        want = f(u.double(), slope)
        torch.testing.assert_close(
            got.double(),
            want.to(dtype).double(),
            equal_nan=True,
            rtol=4 * torch.finfo(dtype).eps,
            atol=4 * torch.finfo(dtype).eps,
        )


def grad_of(saved: Tensor, args: tuple[float, ...], save_output: bool) -> Tensor:
    return OPS.native_act_grad(torch.ones_like(saved), saved, None, 0, *args, save_output, False)[0]


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_large_angles(name: str) -> None:
    row = ACTIVATIONS[name]
    u = torch.cat([torch.logspace(3, 38, 3000), draw(1000)]).float()
    for got, f in (
        (OPS.native_bias_act(u, None, 0, row.id, 0.0, 1.0, 0.0, 0.0, 1.0), row.value),
        (grad_of(u, (row.id, 0.0, 1.0, 0.0, 0.0, 1.0), False), row.d1),
    ):
        want = f(u.double(), 0.0)
        assert ((got - want).abs() <= 4 * EPS * want.abs()).all()


def test_rounding_to_half_is_to_nearest_even() -> None:
    relu = ACTIVATIONS["relu"].id
    for dtype in (torch.bfloat16, torch.float16):
        # every finite number of the format, moved by a float32 factor near 1
        every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        for scale in (1.0, 1.00390625, 1.001953125, 1 + 2**-11, 0.3):
            got = OPS.native_bias_act(every, None, 0, relu, 0.0, 1.0, 0.0, 0.0, scale)
            want = (every.float() * scale).to(dtype)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_one_thread_and_two(layout: str, dtype: torch.dtype) -> None:
    shape = (300, 1001) if layout == "linear" else (6, 50, 31, 33)
    x, grad = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    if layout == "channels_last":
        x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    args = next(s for s in SPECS if s.activation == "gelu").kernel_args
    bias = draw(shape[1], seed=2)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        dx, sums = OPS.native_act_grad(grad, x, bias, 1, *args, False, True)
        results.append((OPS.native_bias_act(x, bias, 1, *args), dx, sums))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 1000, 1000), (10**6, 1), (10**6 // 8, 8)], ids=str)
def test_bias_gradient_of_a_million_numbers(shape: tuple[int, ...]) -> None:
    # Half of the terms cancel, so that a sum in a single float32 would lose digits.
    x = torch.ones(shape)
    grad = draw(*shape) + 0.01
    relu = (ACTIVATIONS["relu"].id, 0.0, 1.0, 0.0, 0.0, 1.0)
    _, sums = OPS.native_act_grad(grad, x, None, 1, *relu, True, True)
    exact = reference.channel_sum(grad.double(), 1)
    # one rounding of the result, and those of 32 (1024 in a run, by 16 or fewer lanes) terms at a
    # time, which add up like a random walk
    allowed = EPS * exact.abs() + 8 * EPS * grad.double().square().sum().sqrt()
    assert ((sums - exact).abs() <= allowed).all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (2, 3, 0)], ids=str)
def test_no_elements(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    args = (2, 0.0, 1.0, 0.0, 0.0, 1.0)
    bias = torch.ones(shape[1])
    assert OPS.native_bias_act(x, bias, 1, *args).shape == shape
    OPS.native_bias_act_(x, bias, 1, *args)
    dx, sums = OPS.native_act_grad(x, x, bias, 1, *args, True, True)
    assert dx.shape == shape
    assert torch.equal(sums, torch.zeros(shape[1]))


def test_scalars_need_no_channel() -> None:
    x = torch.tensor(0.5)
    args = (2, 0.0, 1.0, 0.0, 0.0, 1.0)
    y = OPS.native_bias_act(x, None, 0, *args)
    torch.testing.assert_close(y, x.tanh())
    dx, _ = OPS.native_act_grad(torch.tensor(2.0), y, None, 0, *args, True, False)
    torch.testing.assert_close(dx, 2 * (1 - y * y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases_of_other_types_and_strides(dtype: torch.dtype) -> None:
    args = (0, 0.0, 1.0, 0.0, 0.0, 1.0)
    x = torch.zeros(2, 4, 3, dtype=dtype)
    wide = torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0, 4.0, 9.0])
    for bias in (wide[::2], wide[::2].to(dtype), torch.ones(1).expand(4)):
        got = OPS.native_bias_act(x, bias, 1, *args)
        assert torch.equal(got, bias.to(dtype).view(4, 1).expand(2, 4, 3))


def test_outputs_are_written_everywhere() -> None:
    tanh = (2, 0.0, 1.0, 0.0, 0.0, 1.0)
    for n in (1, 15, 17, 1023, 1025, 4097, 70001):
        for shape in ((n, 1), (1, n), (3, n)):
            poison = torch.full(shape, math.nan)
            x = torch.zeros(shape)
            y = OPS.native_bias_act(x, torch.ones(shape[1]), 1, *tanh)
            del poison
            assert y.isfinite().all()
            assert (y == y.flatten()[0]).all()
            dx, sums = OPS.native_act_grad(x + 1, x, None, 1, *tanh, True, True)
            assert torch.equal(dx, torch.ones(shape))
            assert torch.equal(sums, torch.full((shape[1],), float(shape[0])))


def test_inputs_are_left_alone() -> None:
    x, grad, bias = draw(5, 6), draw(6, 5).t(), draw(6)
    before = [t.clone() for t in (x, grad, bias)]
    args = (10, 0.0, 1.0, 0.0, 0.0, 1.0)
    OPS.native_bias_act(x, bias, 1, *args)
    OPS.native_act_grad(grad, x, bias, 1, *args, False, True)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, grad, bias), strict=True))


def test_no_false_gradient_through_a_copy() -> None:
    x = draw(4, 6)[:, ::2].requires_grad_()
    y = OPS.native_bias_act(x, None, 0, 2, 0.0, 1.0, 0.0, 0.0, 1.0)
    assert y.grad_fn.name().endswith("WarnNotImplemented")


X = torch.ones(2, 3)
ONE = (0, 0.0, 1.0, 0.0, 0.0, 1.0)
BAD: list[tuple[str, Callable[[], object]]] = [
    ("dtype Long", lambda: OPS.native_bias_act(X.long(), None, 0, *ONE)),
    ("activation=18 is not known", lambda: OPS.native_bias_act(X, None, 0, 18, *ONE[1:])),
    ("activation=-1 is not known", lambda: OPS.native_bias_act_(X, None, 0, -1, *ONE[1:])),
    ("dim=2 is out of range", lambda: OPS.native_bias_act(X, torch.ones(3), 2, *ONE)),
    ("dim=0 is out of range", lambda: OPS.native_bias_act(X[0, 0], torch.ones(1), 0, *ONE)),
    (r"shape \(2\); must be \(3,\)", lambda: OPS.native_bias_act(X, torch.ones(2), 1, *ONE)),
    ("dtype Double, x Float", lambda: OPS.native_bias_act(X, torch.ones(3).double(), 1, *ONE)),
    ("gaps or overlaps", lambda: OPS.native_bias_act_(X[:, ::2], None, 0, *ONE)),
    (
        r"grad has shape \(3, 2\), saved \(2, 3\)",
        lambda: OPS.native_act_grad(X.t(), X, None, 1, *ONE, True, False),
    ),
    (
        "grad has dtype Double, saved Float",
        lambda: OPS.native_act_grad(X.double(), X, None, 1, *ONE, True, False),
    ),
    (
        "activation=10 has no derivative from its output",
        lambda: OPS.native_act_grad(X, X, None, 1, 10, *ONE[1:], True, False),
    ),
    (
        "dim=-3 is out of range",
        lambda: OPS.native_act_grad(X, X, None, -3, *ONE, True, True),
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda c: c[0])
def test_bad_arguments(case: tuple[str, Callable[[], object]]) -> None:
    message, call = case
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that has loaded nothing, and keeps its libraries in `tmp_path`."""
    monkeypatch.setattr(native, "_directories", lambda: (tmp_path / "_native", tmp_path / "cache"))
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setattr(native, "_reason", "")
    return tmp_path


def test_nothing_built_is_no_error(elsewhere: Path) -> None:
    native.load()
    assert not native.available()
    assert "not built yet" in native.why_not()
    assert "fusedshape build" in native.why_not()


def test_a_library_of_other_sources_is_out_of_date(elsewhere: Path, library: Path) -> None:
    (elsewhere / "_native").mkdir()
    other = elsewhere / "_native/cpu-0123456789abcdef.so"
    other.write_bytes(library.read_bytes())
    native.load()
    assert not native.available()
    assert f"{other} is out of date" in native.why_not()
    assert "fusedshape build" in native.why_not()
    shutil.copy(library, elsewhere / "_native" / library.name)
    native.load()
    assert native.available()


def test_damaged_libraries_are_reported(elsewhere: Path, library: Path) -> None:
    content = library.read_bytes()
    path = native.library_path()
    path.parent.mkdir()
    for bad in (b"", b"not a library", content[: len(content) // 2], content[:-1] + b"?"):
        path.write_bytes(bad)
        native.load()
        assert not native.available()
        assert "damaged" in native.why_not()
    path.write_bytes(content)
    native.load()
    assert native.available()
    assert native.why_not() == ""


def test_compiler_errors_say_what_to_do(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"'no-such-compiler' .* set CXX"):
        native.build()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="exit status 1"):
        native.build()
    assert not list((elsewhere / "_native").iterdir())


def test_name_follows_sources_and_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    name = native._file_name.__wrapped__()
    monkeypatch.setattr(native, "_cpu_flags", lambda: "another machine")
    assert native._file_name.__wrapped__() != name
    monkeypatch.undo()
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-O1"))
    assert native._file_name.__wrapped__() != name


def test_the_cache_directory_serves_where_the_package_is_read_only(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert native.library_path().parent == elsewhere / "cache"
