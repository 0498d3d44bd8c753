"""Haar-uniform matrices with orthonormal columns, made of normal draws by random reflections."""

from __future__ import annotations

import torch
from torch import Tensor

# How many reflections are applied by one product.
_BLOCK = 128


def haar(draws: Tensor) -> Tensor:
    r"""Turn draws from N(0, 1) into Haar-uniform matrices with orthonormal columns.

    The Q of a QR decomposition of the draws, with a positive diagonal of R, is a product of
    Householder reflections with signs. The k-th one is determined by the last m − k entries of a
    column that the reflections before it have rotated. Rotated normal draws are normal draws again,
    so the entries can be drawn directly. That takes half the work of a decomposition, and Q has
    exactly the same distribution. The product of the reflections I − 2uuᵀ/uᵀu of the columns of U
    is I − U T Uᵀ, where T⁻¹ is the upper triangle of UᵀU with half its diagonal, so that nearly all
    work is products of matrices.

    Args:
        draws: float32 or float64, (…, m, n) with m ≥ n ≥ 1. Its numbers may be overwritten.
            Columns that are dense in memory save a copy.

    Returns:
        Matrices of the shape and dtype of the draws.

    Source: Stewart 1980, "The efficient generation of random orthogonal matrices with an
    application to condition estimators"; T⁻¹: Puglisi 1992, "Modification of the Householder method
    based on the compact WY representation".

    Example:
        >>> q = haar(torch.randn(2, 5, 3, dtype=torch.float64))
        >>> torch.allclose(q.mT @ q, torch.eye(3).double())
        True
    """
    with torch.autocast(draws.device.type, enabled=False):
        if draws.dtype == torch.float32 and not _multiplies_in_float32(draws.device):
            return _reflected(draws.double()).float()
        return _reflected(draws)


def _reflected(draws: Tensor) -> Tensor:
    shape = draws.shape
    # With columns dense in memory the sums of their squares are precise, and products fast.
    u = draws.reshape(-1, *shape[-2:]).mT.contiguous().mT.tril_()
    first = u.diagonal(dim1=-2, dim2=-1)
    signs = torch.copysign(torch.ones_like(first), first)
    lengths = torch.linalg.vector_norm(u, dim=-2)
    first += signs * lengths
    # The draw of a column's only entry may be zero.
    first.masked_fill_(lengths == 0, 1.0)
    halves = (lengths / first.abs()).clamp_(min=0.5)  # uᵀu/2, once the first entry of u is 1
    u /= first.unsqueeze(-2).clone()
    q = torch.zeros_like(u)
    q.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    # From the last block to the first: a reflection changes no column before its own.
    for start in reversed(range(0, shape[-1], _BLOCK)):
        block = u[..., start:, start : start + _BLOCK]
        rest = q[..., start:, start:]
        inverse = (block.mT @ block).triu_()
        inverse.diagonal(dim1=-2, dim2=-1).copy_(halves[:, start : start + _BLOCK])
        coefficients = torch.linalg.solve_triangular(inverse, block.mT @ rest, upper=True)
        rest.baddbmm_(block, coefficients, alpha=-1)
    return q.mul_(-signs.unsqueeze(-2)).reshape(shape)


def _multiplies_in_float32(device: torch.device) -> bool:
    """Whether products of float32 matrices are not rounded to TF32 or bfloat16 on the way."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")
