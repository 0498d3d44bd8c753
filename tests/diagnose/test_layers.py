"""diagnose's maps at any q, and what finite width explains, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import (
    ACTIVATIONS,
    ActSpec,
    theory,
)
from fusedshape.diagnose.layers import Affine, Phi, convolution, matrix
from fusedshape.diagnose.measure import sample
from fusedshape.diagnose.tape import Tape
from fusedshape.init import delta_orthogonal_, gaussian_, init_module_, suo_, suo_full_
from tests.support.specs import shaped


def phi_of(spec: ActSpec) -> Phi:
    phi = Phi.of(("spec", spec))
    assert phi is not None
    return phi


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_maps_at_q_1_are_those_of_the_theory(name: str) -> None:
    spec = shaped(name)
    phi = phi_of(spec)
    assert phi.q(1.0) == pytest.approx(theory.q_map(spec, 1.0), rel=1e-3)
    assert phi.slope(1.0) == pytest.approx(theory.c_slope(spec), rel=2e-3)
    for c in (-0.9, 0.0, 0.3, 0.95, 1.0):
        assert phi.c(c) == pytest.approx(theory.c_map(spec, c), abs=2e-3)
    of_q, of_c = phi.growth(1.0, 0.3)
    assert of_q == pytest.approx(theory.q_slope(spec) / phi.q(1.0), rel=1e-2, abs=1e-3)
    assert of_c == pytest.approx(theory.c_slope(spec, 0.3), rel=1e-2)


@pytest.mark.parametrize(("q", "other"), [(1.0, 1.0), (0.03, 2.0), (7.3, 40.0)])
def test_maps_of_erf_at_any_q(q: float, other: float) -> None:
    # The arcsine kernel, E[erf(x) erf(y)] = 2/π · asin(2k / √((1 + 2q)(1 + 2q′))).
    def kernel(a: float, b: float, k: float) -> float:
        return 2 / math.pi * math.asin(2 * k / math.sqrt((1 + 2 * a) * (1 + 2 * b)))

    phi = phi_of(ActSpec("erf"))
    for c in (-0.8, 0.1, 0.9, 0.999):
        k = c * math.sqrt(q * other)
        given = torch.tensor([q, other, k]).double().reshape(3, 1, 1)
        got = phi.map(given).flatten().tolist()
        want = [kernel(q, q, q), kernel(other, other, other), kernel(q, other, k)]
        assert got == pytest.approx(want, rel=3e-3)


@pytest.mark.parametrize("q", [1e-4, 0.3, 5.0, 1e4])
def test_maps_of_relu_at_any_q(q: float) -> None:
    phi = phi_of(ActSpec("leaky_relu", negative_slope=0.2, output_scale=1.7))
    assert phi.q(q) == pytest.approx(theory.q_map(ActSpec("leaky_relu", 1, 0, 0, 1.7, 0.2), q))
    assert phi.slope(q) == pytest.approx(1.0)
    assert phi.growth(q, 0.4) == pytest.approx((1.0, theory.c_slope(phi.spec, 0.4)))
    assert phi.c(0.4, q) == pytest.approx(theory.c_map(ActSpec("leaky_relu", 1, 0, 0, 1, 0.2), 0.4))


def test_functions_written_by_hand_have_maps_too() -> None:
    by_hand = Phi.of(
        (
            "f",
            torch.ops.aten.mul.Tensor,
            (("x",), ("f", torch.ops.aten.sigmoid.default, (("x",),), ())),
            (),
        )
    )
    assert by_hand is not None
    swish = phi_of(ActSpec("swish"))
    assert by_hand.q(0.7) == pytest.approx(swish.q(0.7), rel=1e-9)
    assert by_hand.name == "sigmoid"
    linear = Phi.of(("scale", ("x",), 3.0))
    assert linear is not None
    assert linear.is_linear
    assert not swish.is_linear


def test_noise_of_relu_is_five_over_width() -> None:
    # Var[ln q] of one layer of He's ReLU: 2/n from Gaussian weights, 3/n from the activation.
    relu = phi_of(ActSpec("relu"))
    n = 400
    weights = gaussian_(torch.empty(n, n), gain=2**0.5)
    assert relu.noise(1.0, 0.5)[0] == pytest.approx(3.0, rel=0.05)
    assert matrix(weights.T, None).chance == pytest.approx(2 / n, rel=0.1)


def test_noise_of_one_layer_simulated() -> None:
    spec = theory.solve("TAT", "leaky_relu", depth=30)
    phi, n, c = phi_of(spec), 64, 0.4
    x = torch.randn(2, n, dtype=torch.float64)
    x[0] /= x[0].square().mean().sqrt()
    x[1] -= x[0] * (x[0] @ x[1]) / n
    x[1] /= x[1].square().mean().sqrt()
    x[1] = c * x[0] + math.sqrt(1 - c * c) * x[1]
    ln_q, cosines = [], []
    for _ in range(600):
        y = phi(x @ suo_(torch.empty(n, n, dtype=torch.float64)).T)
        q, other, k = (y[0] @ y[0]).item(), (y[1] @ y[1]).item(), (y[0] @ y[1]).item()
        ln_q.append(math.log(q / n))
        cosines.append(k / math.sqrt(q * other))
    noise_q, noise_c = phi.noise(1.0, c)
    # The standard error of a variance from 600 samples is 6 %.
    assert n * np.var(ln_q) == pytest.approx(noise_q, rel=0.3)
    assert n * np.var(cosines) == pytest.approx(noise_c, rel=0.3)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (160, 256), (256, 160)])
@pytest.mark.parametrize("fill", [suo_, gaussian_, delta_orthogonal_])
def test_chance_of_weights_simulated(fill: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    w = fill(torch.empty(shape, dtype=torch.float64))
    affine = matrix(w.T, None)
    x = torch.randn(4000, shape[1], dtype=torch.float64)
    x /= x.square().mean(1, keepdim=True).sqrt()
    q = (x @ w.T).square().mean(1)
    assert q.mean().item() == pytest.approx(affine.gain, rel=0.02)
    assert q.log().var().item() == pytest.approx(affine.chance, rel=0.25, abs=0.003)


def test_convolution_mixes_locations_as_its_taps_do() -> None:
    n = 512
    weight = suo_full_(torch.empty(n, 8, 3, 3))
    affine = convolution(weight, None, [2, 1], [1, 0], [1, 2], False, [0, 0], 1)
    x = torch.randn(2, 8, 7, 9) * torch.rand(2, 1, 7, 9)
    kernel = sample(x, 1).kernel.double()
    got = affine.over((7, 9))(kernel) * affine.gain
    want = sample(F.conv2d(x, weight, None, [2, 1], [1, 0], [1, 2]), 1).kernel
    assert got.shape == want.shape
    assert affine.gain == pytest.approx(1.0)
    # Products of different taps average out over channels, as 1/√n.
    assert (got - want).abs().max() < 8 / math.sqrt(n)
    delta = convolution(
        suo_(torch.empty(8, 8, 3, 3)), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    )
    assert torch.allclose(delta.over((7, 9))(kernel), kernel)


def test_transposed_and_grouped_weights_keep_q() -> None:
    for layer in (
        nn.ConvTranspose2d(8, 32, 4, stride=2, padding=1),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.Conv2d(16, 16, 3, groups=16),
    ):
        init_module_(layer, "suo" if layer.kernel_size == (3, 3) else "suo_full")
        tape = Tape(layer, 4, sample)
        with torch.no_grad():
            tape.run(torch.randn(4, layer.in_channels, 6, 6))
        (affine,) = (s.affine for s in tape.steps if s.affine is not None)
        assert affine.gain == pytest.approx(1.0, rel=1e-5)


def test_affine_says_what_it_knows() -> None:
    assert Affine(bias=1.0).has_weights is False
    assert matrix(torch.eye(3), torch.ones(3)).bias == 1.0
