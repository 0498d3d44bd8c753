"""Initialisers: q through real modules, orthogonality, the Haar distribution, refusals."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Generator, Tensor, nn

from fusedshape.init import delta_orthogonal_, gaussian_, init_module_, suo_, suo_full_

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 64-256": (lambda: nn.Linear(64, 256), (64,)),
    "linear 256-64": (lambda: nn.Linear(256, 64), (256,)),
    "stem 3-64": (lambda: nn.Conv2d(3, 64, 3, padding=1), (3, 6, 6)),
    "conv 64-48": (lambda: nn.Conv2d(64, 48, 3, padding=1), (64, 6, 6)),
    "strided": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), (8, 7, 7)),
    "dilated": (lambda: nn.Conv2d(16, 16, 3, dilation=2, padding=2), (16, 6, 6)),
    "depthwise 64": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64), (64, 5, 5)),
    "grouped 32-16": (lambda: nn.Conv2d(32, 16, 3, padding=1, groups=4), (32, 5, 5)),
    "grouped 16-32": (lambda: nn.Conv2d(16, 32, 3, padding=1, groups=2), (16, 5, 5)),
    "1d": (lambda: nn.Conv1d(12, 20, 5, padding=2), (12, 9)),
    "3d": (lambda: nn.Conv3d(12, 6, 3, padding=1), (12, 4, 4, 4)),
    "1x1": (lambda: nn.Conv2d(12, 20, 1), (12, 4, 4)),
    "rectangular": (lambda: nn.Conv2d(12, 20, (1, 7), padding=(0, 3)), (12, 4, 9)),
    "transposed 8-32": (lambda: nn.ConvTranspose2d(8, 32, 3, padding=1), (8, 5, 5)),
    "transposed 32-8": (lambda: nn.ConvTranspose2d(32, 8, 3, padding=1), (32, 5, 5)),
    "transposed grouped": (lambda: nn.ConvTranspose1d(32, 8, 3, padding=1, groups=4), (32, 9)),
    "transposed k2 s2": (lambda: nn.ConvTranspose2d(8, 16, 2, stride=2), (8, 5, 5)),
    "transposed k4 s2": (lambda: nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1), (16, 5, 5)),
    "transposed k3 s2": (
        lambda: nn.ConvTranspose3d(8, 8, 3, stride=2, padding=1, output_padding=1),
        (8, 3, 3, 3),
    ),
}


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def q(x: Tensor) -> Tensor:
    """Mean square over channels, at every location of one example."""
    return x.square().mean(0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gain", [1.0, 1.7])
def test_q_passes_every_location_of_real_modules(case: str, gain: float) -> None:
    make, shape = CASES[case]
    gen = generator(1)
    with torch.device("cpu"):
        layer = make().double()
    x = torch.randn(shape, dtype=torch.float64, generator=gen)
    # One input vector everywhere, so that q is the same number at all locations.
    x = x[(slice(None), *[slice(0, 1)] * (x.ndim - 1))].expand(shape)
    draws = 400
    ratios = []
    for _ in range(draws):
        init_module_(layer, gain=gain, generator=gen)
        out = q(layer(x[None])[0])
        assert out.min() > 0
        # Delta form with one matrix: no location may differ from another.
        torch.testing.assert_close(out, out.mean().expand_as(out), rtol=1e-12, atol=0)
        ratios.append(out.mean() / q(x).mean())
    # The group's ratio is (in/out) · (share of |x|² in a random out-dimensional subspace): a Beta
    # variable of mean 1 and variance 2(in − out)/(out(in + 2)), or exactly 1 where out ≥ in.
    groups = getattr(layer, "groups", 1)
    fan_in, out_dim = shape[0] // groups, out_features(layer) // groups
    variance = max(2 * (fan_in - out_dim) / (out_dim * (fan_in + 2)), 0.0)
    energy = x[(slice(None), *[0] * (x.ndim - 1))].reshape(groups, -1).square().sum(1)
    error = math.sqrt(variance * (energy / energy.sum()).square().sum().item() / draws)
    got = torch.stack(ratios).mean().item() / gain**2
    assert abs(got - 1) <= 5 * error + 1e-12, f"q_out/q_in = {got}, standard error {error:.2g}"


def out_features(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]


def dks_sampler() -> ModuleType:
    """Load one file of dks, without the imports (absl) of the rest."""
    package = importlib.util.find_spec("dks")
    if package is None or package.origin is None:
        pytest.skip("needs the dks package")
    path = Path(package.origin).parent / "pytorch" / "parameter_sampling_functions.py"
    spec = importlib.util.spec_from_file_location("dks_sampler", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("n_in", "n_out", "ratio"), [(64, 256, 0.25), (256, 64, 4.0)], ids=["64-256", "256-64"]
)
def test_dks_package_reads_weights_the_other_way_round(n_in: int, n_out: int, ratio: float) -> None:
    """Shows what docs/constants.md says of dks 0.1.2: it takes [out, in] for [in, out]."""
    dks = dks_sampler()
    layer = nn.Linear(n_in, n_out, bias=False)
    x = torch.randn(20_000, n_in, generator=generator())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dks.scaled_uniform_orthogonal_(layer.weight)
    with torch.no_grad():
        theirs = layer(x).square().mean() / x.square().mean()
        init_module_(layer, generator=generator(1))  # independent of x
        ours = layer(x).square().mean() / x.square().mean()
    # Averaged over isotropic x: relative standard error √(2/(examples · min(in, out))) ≈ 0.13 %.
    assert theirs.item() == pytest.approx(ratio, rel=5 * 0.0013)
    assert ours.item() == pytest.approx(1, rel=5 * 0.0013)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (6, 4, 3, 3), (2, 7, 5), (64, 64), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_orthogonal_up_to_the_weights_own_rounding(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    w = suo_(torch.full(shape, math.nan, dtype=dtype), generator=generator()).double()
    centre = w[(..., *[k // 2 for k in shape[2:]])]
    assert w.count_nonzero() == centre.count_nonzero()
    out, n = centre.shape
    small = centre @ centre.T if out <= n else centre.T @ centre / (out / n)
    eps = torch.finfo(dtype).eps
    error = (small - torch.eye(min(out, n), dtype=torch.float64)).abs().max().item()
    assert error <= 4 * max(out, n) ** 0.5 * eps


def test_haar_is_uniform() -> None:
    """Invariance under rotation, which QR without the sign fix lacks."""
    gen = generator()
    draws = torch.stack([suo_(torch.empty(3, 3).double(), generator=gen) for _ in range(6000)])
    # E[Q_ij] = 0, E[Q_ij²] = 1/n, and E[(tr Q)²] = 1 for Haar; LAPACK's own Q has a negative mean.
    error = 5 / math.sqrt(len(draws))
    assert draws.mean(0).abs().max() <= error * math.sqrt(1 / 3)
    assert (draws.square().mean(0) - 1 / 3).abs().max() <= error * math.sqrt(4 / 45)
    trace = draws.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(trace.square().mean().item() - 1) <= error * trace.square().std().item()
    # Both components of O(3), half and half.
    assert abs(torch.linalg.det(draws).mean().item()) <= error


def test_groups_are_drawn_independently() -> None:
    w = suo_(torch.empty(8, 4, 1, 1), groups=2, generator=generator()).flatten(1)
    assert not torch.equal(w[:4], w[4:])
    for part in w.split(4):
        torch.testing.assert_close(part @ part.T, torch.eye(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [(8, 4), (4, 8), (4, 64)])
def test_full_form_is_orthogonal_over_taps(kernel: int, channels: tuple[int, int]) -> None:
    n, out = channels
    w = suo_full_(torch.empty(out, n, kernel, kernel).double(), generator=generator()).flatten(1)
    fan_in = n * kernel**2
    small = w @ w.T if out <= fan_in else w.T @ w * (fan_in / out)
    eye = torch.eye(min(out, fan_in), dtype=torch.float64)
    torch.testing.assert_close(small, eye, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (4, 2), (5, 3), (3, 1)])
@pytest.mark.parametrize("method", ["suo_full", "gaussian"])
def test_every_phase_of_a_transposed_convolution_gets_its_q(
    kernel: int, stride: int, method: str
) -> None:
    layer = nn.ConvTranspose1d(24, 12, kernel, stride=stride, bias=False).double()
    gen = generator()
    draws = 300
    total = torch.zeros(stride, dtype=torch.float64)
    for _ in range(draws):
        init_module_(layer, method, generator=gen)  # type: ignore[arg-type]
        x = torch.randn(1, 24, 4 * kernel, dtype=torch.float64, generator=gen)
        x = x / x.square().mean(1, keepdim=True).sqrt()  # q = 1 everywhere
        inner = q(layer(x)[0])[kernel * stride : -kernel * stride]
        inner = inner[: len(inner) // stride * stride]
        total += inner.reshape(-1, stride).mean(0)
    # Each location's q is a mean of 12 squares of variance 2 at most; 300 draws, several locations
    # each, counted as one because they share a matrix.
    assert (total / draws - 1).abs().max() <= 5 * math.sqrt(2 / 12 / draws)


def test_strided_transposed_delta_is_nearest_upsampling() -> None:
    layer = nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1).double()
    init_module_(layer, generator=generator())
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, generator=generator(1))
    w = layer.weight.detach()[:, :, 1, 1].T
    expected = torch.einsum("oi,nihw->nohw", w, x).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(x), expected)


def test_delta_orthogonal_keeps_the_norm_and_not_q() -> None:
    conv = nn.Conv2d(4, 16, 3, padding=1).double()
    init_module_(conv, "delta_orthogonal", gain=math.sqrt(2), generator=generator())
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64, generator=generator(1))
    torch.testing.assert_close(conv(x).square().sum(), 2 * x.square().sum())


def test_gaussian_variance_is_gain_squared_over_fan_in() -> None:
    w = gaussian_(torch.empty(128, 32, 3, 3), groups=4, gain=2.0, generator=generator())
    expected = 4 / (32 * 9)
    assert w.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / w.numel()))
    assert abs(w.mean().item()) <= 5 * math.sqrt(expected / w.numel())


def test_bias() -> None:
    layer = nn.Linear(2, 10_000)
    init_module_(layer, bias_std=0.2, generator=generator())
    assert layer.bias.std().item() == pytest.approx(0.2, rel=5 * math.sqrt(0.5 / 10_000))
    init_module_(layer)
    assert layer.bias.count_nonzero() == 0


def test_generator_decides_and_global_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    layers = [nn.Conv2d(3, 4, 3, device="meta").to_empty(device="cpu") for _ in range(3)]
    for layer, seed in zip(layers, (5, 5, 6), strict=True):
        init_module_(layer, bias_std=0.1, generator=generator(seed))
    for name in ("weight", "bias"):
        a, b, c = (getattr(layer, name) for layer in layers)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        a = suo_(torch.empty(4, 4))
        torch.manual_seed(3)
        assert torch.equal(a, suo_(torch.empty(4, 4)))


def test_strides_of_the_weight_do_not_matter() -> None:
    plain = suo_(torch.empty(6, 4, 3, 3), generator=generator())
    last = torch.empty(6, 4, 3, 3).to(memory_format=torch.channels_last)
    assert torch.equal(suo_(last, generator=generator()), plain)
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("fill", [suo_, suo_full_, delta_orthogonal_, gaussian_])
def test_empty_weights_are_left_alone(fill: Callable[..., Tensor]) -> None:
    for shape in ((0, 3), (3, 0), (0, 0, 3)):
        assert fill(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("fill", [suo_, suo_full_, delta_orthogonal_, gaussian_])
@pytest.mark.parametrize(
    ("weight", "kwargs", "error", "match"),
    [
        (torch.empty(3, 3, device="meta"), {}, ValueError, "meta device.*to_empty"),
        (torch.empty(3, 3, dtype=torch.int64), {}, TypeError, "int64"),
        (torch.empty(3, 3, dtype=torch.complex64), {}, TypeError, "complex64"),
        (torch.empty(3), {}, ValueError, r"shape \(3,\)"),
        (torch.empty(4, 3, 1), {"groups": 3}, ValueError, "groups=3 does not divide the 4"),
        (torch.empty(4, 3), {"gain": math.nan}, ValueError, "gain=nan"),
        ([[1.0]], {}, TypeError, "got list"),
    ],
)
def test_refusals(
    fill: Callable[..., Tensor],
    weight: Tensor,
    kwargs: dict[str, float],
    error: type[Exception],
    match: str,
) -> None:
    with pytest.raises(error, match=match):
        fill(weight, **kwargs)


def test_refusals_of_kernels_and_modules() -> None:
    with pytest.raises(ValueError, match=r"kernel \(3, 2\) has no centre tap.*suo_full_"):
        suo_(torch.empty(4, 4, 3, 2))
    with pytest.raises(ValueError, match=r"no centre tap"):
        delta_orthogonal_(torch.empty(4, 4, 2))
    with pytest.raises(ValueError, match="leaves outputs that no input reaches"):
        init_module_(nn.ConvTranspose1d(4, 4, 1, stride=2))
    with pytest.raises(ValueError, match="stride 1 or dilation 1"):
        init_module_(nn.ConvTranspose1d(4, 4, 3, stride=2, dilation=2))
    with pytest.raises(TypeError, match="BatchNorm2d"):
        init_module_(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="unknown method 'xavier'; known: suo"):
        init_module_(nn.Linear(2, 2), "xavier")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bias_std=-1"):
        init_module_(nn.Linear(2, 2), bias_std=-1)
    with pytest.raises(ValueError, match="parametrisation"):
        init_module_(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="run the model once"):
        init_module_(nn.LazyLinear(2))


def test_subclasses_and_no_bias() -> None:
    class Mine(nn.Conv2d):
        pass

    conv = Mine(4, 4, 3, bias=False)
    init_module_(conv, generator=generator())
    centre = conv.weight[:, :, 1, 1]
    torch.testing.assert_close(centre @ centre.T, torch.eye(4), atol=1e-6, rtol=0)
    assert all(
        conv.weight[:, :, i, j].count_nonzero() == 0
        for i, j in itertools.product(range(3), repeat=2)
        if (i, j) != (1, 1)
    )
