"""haar: the distribution against SciPy's and closed forms, the reflections, and its precision."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Generator, Tensor

from fusedshape.haar import haar

# Chances below this reject; above, the seeds are fixed, so that a test passes always or never.
UNLIKELY = 1e-3


def draws(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=Generator().manual_seed(seed))


def phases(matrices: Tensor) -> np.ndarray:
    """The angles of the eigenvalues in the upper half plane, of all matrices."""
    angles = torch.linalg.eigvals(matrices).angle().flatten()
    return angles[angles >= 0].numpy()


def test_eigenphases_are_those_of_scipys_orthogonal_group() -> None:
    n, count = 4, 4000
    theirs = torch.from_numpy(stats.ortho_group.rvs(n, size=count, random_state=1))
    expected = phases(theirs)
    assert stats.ks_2samp(phases(haar(draws(count, n, n))), expected).pvalue > UNLIKELY
    # LAPACK's own Q, without signs, is told apart.
    lapack = torch.linalg.qr(draws(count, n, n)).Q
    assert stats.ks_2samp(phases(lapack), expected).pvalue < UNLIKELY**2


@pytest.mark.parametrize(("m", "n"), [(4, 4), (7, 2), (5, 5), (3, 1)])
def test_every_entry_is_distributed_as_on_the_sphere(m: int, n: int) -> None:
    """The square of an entry of a random unit vector is Beta(1/2, (m − 1)/2), its sign is even."""
    q = haar(draws(3000, m, n, seed=m))
    chances = [
        stats.kstest(q[:, i, j].square().numpy(), stats.beta(0.5, (m - 1) / 2).cdf).pvalue
        for i in range(m)
        for j in range(n)
    ]
    assert min(chances) > UNLIKELY / (m * n)
    assert (q.sign().mean(0)).abs().max() < 5 / 3000**0.5


def test_moments_of_the_trace() -> None:
    """E[tr Q], E[(tr Q)²] and E[(tr Q)⁴] are 0, 1 and 3, and determinants are even."""
    q = haar(draws(20_000, 5, 5))
    trace = q.diagonal(dim1=1, dim2=2).sum(1)
    for power, moment in ((1, 0.0), (2, 1.0), (4, 3.0)):
        values = trace**power
        assert abs(values.mean().item() - moment) < 5 * values.std().item() / 20_000**0.5
    assert abs(torch.linalg.det(q).mean().item()) < 5 / 20_000**0.5


@pytest.mark.parametrize(("m", "n"), [(5, 3), (300, 290), (700, 140), (257, 257)])
def test_blocks_apply_the_same_reflections_as_lapack(m: int, n: int) -> None:
    x = draws(m, n).tril()
    first = x.diagonal().clone()
    beta = -torch.copysign(torch.linalg.vector_norm(x, dim=0), first)
    product = torch.linalg.householder_product(x / (first - beta), (beta - first) / beta)
    torch.testing.assert_close(haar(draws(m, n)), product * beta.sign(), atol=1e-13, rtol=0)


def test_matrices_of_a_batch_are_those_of_their_draws() -> None:
    batch = haar(draws(3, 2, 6, 4))
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(batch[i, j], haar(draws(3, 2, 6, 4)[i, j]))


def test_zero_draws_give_orthonormal_columns() -> None:
    """Numbers of 24 bits are zero once in a while, and a depthwise layer has thousands of them."""
    assert haar(torch.zeros(3, 1, 1)).abs().eq(1).all()
    q = haar(torch.zeros(4, 2, dtype=torch.float64))
    torch.testing.assert_close(q.T @ q, torch.eye(2, dtype=torch.float64))


@pytest.fixture
def low_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("low_precision")
def test_low_precision_of_products_does_not_reach_it(dtype: torch.dtype) -> None:
    q = haar(draws(400, 200, dtype=dtype))
    assert q.dtype == dtype
    error = (q.double().T @ q.double() - torch.eye(200)).abs().max().item()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("m", "n"), [(1500, 1500), (6000, 300)])
def test_columns_of_large_matrices_are_orthonormal(m: int, n: int) -> None:
    q = haar(draws(m, n, dtype=torch.float32)).double()
    error = (q.T @ q - torch.eye(n)).abs().max().item()
    assert error < 16 * torch.finfo(torch.float32).eps
