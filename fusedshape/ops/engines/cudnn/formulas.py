"""The table of formulas: each activation in cuDNN's pointwise operations, and φ′ from φ.

cuDNN's own activations are not used where they take constants, which would be compiled into the
plan, nor where a formula of primitives is needed to say what happens at large numbers. At NaN and
±inf all give what the table of activations does. min and max may return either operand if one is
NaN; no formula relies on them there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from fusedshape.activations import GELU_CUBIC, SELU_ALPHA, SELU_SCALE
from fusedshape.ops.engines.cudnn.terms import Term, where

#: φ, or φ′ from v = φ(u): of the term and of leaky_relu's negative slope.
Rule = Callable[[Term, Term], Term]


class Formula(NamedTuple):
    """One activation for cuDNN.

    Attributes:
        value: φ(u, negative_slope).
        d1_from_output: φ′ as a function of φ(u); None if it is none.
    """

    value: Rule
    d1_from_output: Rule | None = None


#: Where 1 + u² equals u² in float32, and u² does not overflow.
_FAR = 2.0**60
_LARGEST = 3.4028234663852886e38  # of float32

# arctan(x)/x for |x| ≤ 1 to 2e-8, in powers of x²; Abramowitz and Stegun, 4.4.49.
_ARCTAN = (
    *(1.0, -0.3333314528, 0.1999355085, -0.1420889944, 0.1065626393),
    *(-0.0752896400, 0.0429096138, -0.0161657367, 0.0028662257),
)


def _softplus(u: Term, a: Term) -> Term:
    return u.at_least(0.0) + (1.0 + (-abs(u)).exp()).log()


def _elu(u: Term) -> Term:
    return where(u <= 0.0, u.exp() - 1.0, u)


def _gelu(u: Term, a: Term) -> Term:
    k = math.sqrt(2 / math.pi)
    inner = (k * u) * (1.0 + GELU_CUBIC * (u * u))
    return (0.5 * u) * (1.0 + inner.tanh())


def _bentid(u: Term, a: Term) -> Term:
    s = abs(u).at_most(_FAR)
    root = (s * s + 1.0).sqrt()
    # (√(u² + 1) − 1)/2 without cancellation; −inf must not meet inf.
    return u + (0.5 * abs(u).at_most(_LARGEST)) * (s / (1.0 + root))


def _atan(u: Term, a: Term) -> Term:
    s = abs(u)
    far = s > 1.0
    x = s.at_most(1.0) / s.at_least(1.0)
    square = x * x
    sum_ = square.recorder.lift(_ARCTAN[-1])
    for coefficient in reversed(_ARCTAN[:-1]):
        sum_ = sum_ * square + coefficient
    near = x * sum_
    positive = where(far, math.pi / 2 - near, near)
    # The sum brings NaN back, which min and max may have lost.
    return where(u <= 0.0, -positive, positive) + _nothing(u)


def _nothing(u: Term) -> Term:
    """0, or NaN if u is that."""
    return where(abs(u) <= math.inf, 0.0, u)


def _asinh(u: Term, a: Term) -> Term:
    s = abs(u)
    t = s.at_most(_FAR)
    # log(s + √(s² + 1)); beyond `_FAR`, where the square may overflow, in two parts.
    size = (t + (t * t + 1.0).sqrt()).log() + (s / t.at_least(1.0)).at_least(1.0).log()
    return where(u <= 0.0, -size, size) + _nothing(u)


def _not_negative(v: Term) -> Term:
    return where(v <= 0.0, 0.0, v)


def _minus_expm1(v: Term) -> Term:
    """1 − exp(−v), to a relative error near 0, too."""
    t = (0.5 * v).tanh()
    return (2.0 * t) / (1.0 + t)


def _square(v: Term) -> Term:
    return v * v


def _reciprocal_cosh(v: Term) -> Term:
    """1/cosh(v), where no exponential overflows."""
    decay = (-abs(v)).exp()
    return (2.0 * decay) / (1.0 + decay * decay)


FORMULAS: dict[str, Formula] = {
    "relu": Formula(
        lambda u, a: where(u <= 0.0, 0.0, u),
        lambda v, a: where(v <= 0.0, 0.0, 1.0),
    ),
    "leaky_relu": Formula(
        lambda u, a: where(u > 0.0, u, u * a),
        lambda v, a: where(v > 0.0, 1.0, a),
    ),
    "tanh": Formula(
        lambda u, a: u.tanh(),
        lambda v, a: _not_negative(1.0 - v * v),
    ),
    "sigmoid": Formula(
        lambda u, a: u.sigmoid(),
        lambda v, a: _not_negative(v * (1.0 - v)),
    ),
    "softplus": Formula(
        _softplus,
        lambda v, a: _minus_expm1(_not_negative(v)),
    ),
    "elu": Formula(
        lambda u, a: _elu(u),
        lambda v, a: where(v <= 0.0, _not_negative(v + 1.0), 1.0),
    ),
    "selu": Formula(
        lambda u, a: SELU_SCALE * where(u <= 0.0, SELU_ALPHA * (u.exp() - 1.0), u),
        lambda v, a: where(v <= 0.0, _not_negative(v + SELU_SCALE * SELU_ALPHA), SELU_SCALE),
    ),
    "softsign": Formula(
        lambda u, a: u / (1.0 + abs(u)),
        lambda v, a: _square(1.0 - abs(v)),
    ),
    "atan": Formula(
        _atan,
        lambda v, a: _square(v.cos()),
    ),
    "asinh": Formula(
        _asinh,
        lambda v, a: _reciprocal_cosh(v),
    ),
    "swish": Formula(lambda u, a: u * u.sigmoid()),
    "gelu": Formula(_gelu),
    "gelu_exact": Formula(lambda u, a: (0.5 * u) * (1.0 + (math.sqrt(0.5) * u).erf())),
    "erf": Formula(lambda u, a: u.erf()),
    "bentid": Formula(_bentid),
    "square": Formula(lambda u, a: u * u),
    "sin": Formula(lambda u, a: u.sin()),
    "cos": Formula(lambda u, a: u.cos()),
}
