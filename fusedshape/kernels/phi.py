"""φ and φ′ in Triton, the twins of the rows in `fusedshape.activations`.

`value`, `d1` and `d1_from_output` take the row's id as a constexpr, so that a kernel contains the
one function it uses. They serve float32 and float64. Everything Triton's interpreter and its
compilers do not share (tanh, expm1, log1p, atan, …) is built here from what they do share; relative
accuracy is kept near zeros and in tails, NaN propagates, and nothing finite overflows on the way to
a finite result.

In a jitted function a Python float keeps its 53 bits only as a direct operand beside a float64
tensor: assigned to a name, or given to `tl.where`, it becomes float32. Hence the literals in place,
and only short binary fractions inside `where` and comparisons.
"""

# ruff: noqa: RET503, RET505 (a branch on a constexpr that is not taken is not compiled)
from __future__ import annotations

import math

import triton
import triton.language as tl

from fusedshape import activations
from fusedshape.activations import ACTIVATIONS

RELU = tl.constexpr(ACTIVATIONS["relu"].id)
LEAKY_RELU = tl.constexpr(ACTIVATIONS["leaky_relu"].id)
TANH = tl.constexpr(ACTIVATIONS["tanh"].id)
SIGMOID = tl.constexpr(ACTIVATIONS["sigmoid"].id)
SOFTPLUS = tl.constexpr(ACTIVATIONS["softplus"].id)
ELU = tl.constexpr(ACTIVATIONS["elu"].id)
SELU = tl.constexpr(ACTIVATIONS["selu"].id)
SOFTSIGN = tl.constexpr(ACTIVATIONS["softsign"].id)
ATAN = tl.constexpr(ACTIVATIONS["atan"].id)
ASINH = tl.constexpr(ACTIVATIONS["asinh"].id)
SWISH = tl.constexpr(ACTIVATIONS["swish"].id)
GELU = tl.constexpr(ACTIVATIONS["gelu"].id)
GELU_EXACT = tl.constexpr(ACTIVATIONS["gelu_exact"].id)
ERF = tl.constexpr(ACTIVATIONS["erf"].id)
BENTID = tl.constexpr(ACTIVATIONS["bentid"].id)
SQUARE = tl.constexpr(ACTIVATIONS["square"].id)
SIN = tl.constexpr(ACTIVATIONS["sin"].id)
COS = tl.constexpr(ACTIVATIONS["cos"].id)

SELU_SCALE = tl.constexpr(activations.SELU_SCALE)
SELU_ALPHA = tl.constexpr(activations.SELU_ALPHA)
GELU_CUBIC = tl.constexpr(activations.GELU_CUBIC)

LN2 = tl.constexpr(math.log(2))
SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2 / math.pi))
INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
TWO_OVER_SQRT_PI = tl.constexpr(2 / math.sqrt(math.pi))

# Taylor: (exp(x) - 1)/x for |x| < 0.35; in t², atanh(t)/t for |t| ≤ 1/3, atan(t)/t for
# |t| ≤ tan(π/8), and sin(t)/t for |t| ≤ π/2.
EXPM1_32 = tl.constexpr(tuple(1 / math.factorial(k + 1) for k in range(7)))
EXPM1_64 = tl.constexpr(tuple(1 / math.factorial(k + 1) for k in range(13)))
ATANH_32 = tl.constexpr(tuple(1 / (2 * k + 1) for k in range(7)))
ATANH_64 = tl.constexpr(tuple(1 / (2 * k + 1) for k in range(16)))
ATAN_32 = tl.constexpr(tuple((-1) ** k / (2 * k + 1) for k in range(9)))
ATAN_64 = tl.constexpr(tuple((-1) ** k / (2 * k + 1) for k in range(21)))
SIN_32 = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(7)))
SIN_64 = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(12)))

# Chebyshev, as powers of s = (a - 4)/(a + 4): (a + 4) exp(a²/2) Φ(-a) for a ≥ 0, Φ the normal
# distribution function; relative errors 6e-8 and 1.2e-16.
TAIL_32 = tl.constexpr(
    (
        *(0.7552851271, -0.6078964038, 0.3871375629, -0.1865267109, 0.06039529587),
        *(-0.007512231382, -0.003476167895, 0.001563786899, 0.0001293256813, -0.0001573205696),
    )
)
TAIL_64 = tl.constexpr(
    (
        *(0.7552851304157514, -0.6078966419718923, 0.3871374007422266, -0.1865218579596366),
        *(0.06039657489036092, -0.007540188967386312, -0.0034796923566515025),
        *(0.0016308184674099085, 0.00013334420916014778, -0.00023109501736277426),
        *(-1.907676030719098e-06, 3.514511190283765e-05, 7.146021531267462e-07),
        *(-5.921611045923978e-06, -6.249551077565178e-07, 1.0247851016552774e-06),
        *(2.647337281979868e-07, -1.597739614223922e-07, -7.878360342693638e-08),
        *(1.7844927772981415e-08, 1.6067386957329404e-08, -5.873626764987191e-10),
        *(-1.6886576966786735e-09, -1.1997782031253095e-10),
    )
)


@triton.jit
def _horner(z, COEFFICIENTS: tl.constexpr, N: tl.constexpr):
    """Polynomial of N coefficients, constant first."""
    p = z * COEFFICIENTS[N - 1] + COEFFICIENTS[N - 2]
    for k in tl.static_range(N - 2):
        p = p * z + COEFFICIENTS[N - 3 - k]
    return p


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x ≤ 0."""
    r = _horner(x, EXPM1_64, 13) if x.dtype == tl.float64 else _horner(x, EXPM1_32, 7)
    return tl.where(x > -0.34375, x * r, tl.exp(x) - 1.0)


@triton.jit
def _log1p_unit(t):
    """log(1 + t) for 0 ≤ t ≤ 1, as 2 atanh(t/(2 + t))."""
    s = t / (2.0 + t)
    z = s * s
    r = _horner(z, ATANH_64, 16) if t.dtype == tl.float64 else _horner(z, ATANH_32, 7)
    return 2.0 * s * r


@triton.jit
def _log1p(t):
    """log(1 + t) for t ≥ 0."""
    w = 1.0 + t
    lost = tl.where(t < 2.0, (t - (w - 1.0)) / w, 0.0)
    return tl.log(w) + lost


@triton.jit
def _hypot1(u):
    """√(1 + u²)."""
    a = tl.abs(u)
    return tl.where(a > 1e9, a, tl.sqrt(1.0 + a * a))


@triton.jit
def _hypot1_minus_1(u):
    h = _hypot1(u)
    return tl.where(tl.abs(u) > 1.0, h - 1.0, u * u / (1.0 + h))


@triton.jit
def _tanh(u):
    e = _expm1(-2.0 * tl.abs(u))
    t = -e / (2.0 + e)
    return tl.where(u < 0, -t, t)


@triton.jit
def _atan(u):
    a = tl.abs(u)
    steep = a > 2.4140625
    middle = a > 0.4140625
    t = tl.where(steep, -1.0, tl.where(middle, a - 1.0, a))
    t = t / tl.where(steep, a, tl.where(middle, a + 1.0, 1.0))
    quarters = steep.to(u.dtype) + middle.to(u.dtype)
    p = _horner(t * t, ATAN_64, 21) if u.dtype == tl.float64 else _horner(t * t, ATAN_32, 9)
    r = quarters * 0.7853981633974483 + t * p
    return tl.where(u < 0, -r, r)


@triton.jit
def _cos2(v):
    """cos²(v) for v between ±π/2, where it loses nothing to cancellation."""
    if v.dtype == tl.float64:
        t = (1.5707963267948966 - tl.abs(v)) + 6.123233995736766e-17
        c = t * _horner(t * t, SIN_64, 12)
    else:
        t = (1.57079637050628662 - tl.abs(v)) - 4.37113900018624283e-8
        c = t * _horner(t * t, SIN_32, 7)
    return c * c


@triton.jit
def _asinh(u):
    a = tl.abs(u)
    huge = a > 1e9
    t = a + a * a / (1.0 + tl.sqrt(1.0 + a * a))
    r = _log1p(tl.where(huge, a, t)) + huge.to(u.dtype) * LN2
    return tl.where(u < 0, -r, r)


@triton.jit
def _sigmoid(u):
    """1/(1 + exp(-u)), accurate in both tails."""
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def _logistic(u):
    """1/(1 + exp(-u)) and 1/(1 + exp(u)), each accurate in its tail."""
    e = tl.exp(-tl.abs(u))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(u < 0, small, large), tl.where(u < 0, large, small)


@triton.jit
def _sech2(u):
    e = tl.exp(-2.0 * tl.abs(u))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _tail(a):
    """exp(-a²/2) and Φ(-a) over it for a ≥ 0, Φ the normal distribution's function."""
    d = 1.0 / (a + 4.0)
    if a.dtype == tl.float64:
        p = _horner(1.0 - 8.0 * d, TAIL_64, 24)
    else:
        p = _horner(1.0 - 8.0 * d, TAIL_32, 10)
    return tl.exp(-0.5 * a * a), d * p


@triton.jit
def value(u, slope, ID: tl.constexpr):
    """φ(u)."""
    if ID == RELU:
        return tl.where(u <= 0, 0.0, u)
    elif ID == LEAKY_RELU:
        return tl.where(u > 0, u, slope * u)
    elif ID == TANH:
        return _tanh(u)
    elif ID == SIGMOID:
        return _sigmoid(u)
    elif ID == SOFTPLUS:
        return tl.where(u <= 0, 0.0, u) + _log1p_unit(tl.exp(-tl.abs(u)))
    elif ID == ELU:
        return tl.where(u > 0, u, _expm1(tl.where(u > 0, 0.0, u)))
    elif ID == SELU:
        return SELU_SCALE * tl.where(u > 0, u, SELU_ALPHA * _expm1(tl.where(u > 0, 0.0, u)))
    elif ID == SOFTSIGN:
        return u / (1.0 + tl.abs(u))
    elif ID == ATAN:
        return _atan(u)
    elif ID == ASINH:
        return _asinh(u)
    elif ID == SWISH:
        return u * _sigmoid(u)
    elif ID == GELU:
        return u * _sigmoid(2.0 * SQRT_2_OVER_PI * u * (1.0 + GELU_CUBIC * u * u))
    elif ID == GELU_EXACT:
        e, ratio = _tail(tl.abs(u))
        return u * tl.where(u < 0, e * ratio, 1.0 - e * ratio)
    elif ID == ERF:
        return tl.erf(u)
    elif ID == BENTID:
        return 0.5 * _hypot1_minus_1(u) + u
    elif ID == SQUARE:
        return u * u
    elif ID == SIN:
        return tl.sin(u)
    elif ID == COS:
        return tl.cos(u)
    else:
        tl.static_assert(False, "phi.value lacks this activation")


@triton.jit
def d1(u, slope, ID: tl.constexpr):
    """φ′(u); at a kink, the left derivative."""
    if ID == RELU:
        return (u > 0).to(u.dtype)
    elif ID == LEAKY_RELU:
        return tl.where(u > 0, 1.0, slope)
    elif ID == TANH:
        return _sech2(u)
    elif ID == SIGMOID:
        return 0.25 * _sech2(0.5 * u)
    elif ID == SOFTPLUS:
        return _sigmoid(u)
    elif ID == ELU:
        return tl.exp(tl.where(u > 0, 0.0, u))
    elif ID == SELU:
        return SELU_SCALE * tl.where(u > 0, 1.0, SELU_ALPHA * tl.exp(tl.where(u > 0, 0.0, u)))
    elif ID == SOFTSIGN:
        r = 1.0 / (1.0 + tl.abs(u))
        return r * r
    elif ID == ATAN:
        return 1.0 / (1.0 + u * u)
    elif ID == ASINH:
        return 1.0 / _hypot1(u)
    elif ID == SWISH:
        s, c = _logistic(u)
        return s * (1.0 + u * c)
    elif ID == GELU:
        u2 = u * u
        s, c = _logistic(2.0 * SQRT_2_OVER_PI * u * (1.0 + GELU_CUBIC * u2))
        inner = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * u2)
        return s + tl.where(tl.abs(u) > 40.0, 0.0, u * s * c * inner)
    elif ID == GELU_EXACT:
        a = tl.abs(u)
        e, ratio = _tail(a)
        t = e * (ratio - a * INV_SQRT_2PI)
        return tl.where(u < 0, t, 1.0 - t)
    elif ID == ERF:
        return TWO_OVER_SQRT_PI * tl.exp(-u * u)
    elif ID == BENTID:
        return 0.5 * (u / _hypot1(u)) + 1.0
    elif ID == SQUARE:
        return 2.0 * u
    elif ID == SIN:
        return tl.cos(u)
    elif ID == COS:
        return -tl.sin(u)
    else:
        tl.static_assert(False, "phi.d1 lacks this activation")


@triton.jit
def d1_from_output(v, right, slope, ID: tl.constexpr):
    """φ′(u) from v = φ(u), for the activations that save their output.

    `right` says that u > 0. It is asked for apart, because v has gone through the affine output
    and back: where φ is flat (relu), rounding would put v on either side of 0.
    """
    if ID == RELU:
        return right.to(v.dtype)
    elif ID == LEAKY_RELU:
        return tl.where(right, 1.0, slope)
    elif ID == TANH:
        d = 1.0 - v * v
        return tl.where(d < 0, 0.0, d)
    elif ID == SIGMOID:
        d = v * (1.0 - v)
        return tl.where(d < 0, 0.0, d)
    elif ID == SOFTPLUS:
        return -_expm1(tl.where(v < 0, 0.0, -v))
    elif ID == ELU:
        d = v + 1.0
        return tl.where(right, 1.0, tl.where(d < 0, 0.0, d))
    elif ID == SELU:
        d = v * (1.0 / SELU_SCALE) + SELU_ALPHA
        return SELU_SCALE * tl.where(right, 1.0, tl.where(d < 0, 0.0, d))
    elif ID == SOFTSIGN:
        d = 1.0 - tl.abs(v)
        return d * d
    elif ID == ATAN:
        return _cos2(v)
    elif ID == ASINH:
        e = tl.exp(-tl.abs(v))
        return 2.0 * e / (1.0 + e * e)
    else:
        tl.static_assert(False, "phi.d1_from_output lacks this activation")
