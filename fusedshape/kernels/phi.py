"""φ and φ′ in Triton, the twins of the rows in `fusedshape.activations`.

`value`, `d1` and `d1_from_output` take the row's id as a constexpr, so that a kernel contains the
one function it uses. They serve float32 and float64. Triton's interpreter and its compilers do not
share tanh, expm1, log1p, atan and others, so these are built here from functions that they do
share. The relative error stays small near zeros and in the tails, NaN propagates, and no
intermediate overflows where the result is finite.

The speed of pointwise passes and of other kernels' epilogues depends on how few instructions φ
takes. In float32, φ is therefore made of polynomials and of functions that are one instruction
each (exp2, rsqrt, sqrt): Triton's exp takes 5 instructions, a division 8, a logarithm 25.

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
LOG2E = tl.constexpr(math.log2(math.e))
SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2 / math.pi))
INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
TWO_OVER_SQRT_PI = tl.constexpr(2 / math.sqrt(math.pi))

# Coefficients of polynomials, the constant first. The float32 ones are minimax fits, in which each
# coefficient was rounded before the next ones were fitted. The figure after each range is the
# largest relative error, for float32 and, where a second one follows, for float64.
# (exp(x) - 1)/x for -7/16 ≤ x ≤ 0: 4.6e-8. float64 has the Taylor series.
EXPM1_32 = tl.constexpr((1.0, 0.499996811, 0.166596547, 0.0411812775, 0.00698150229))
EXPM1_64 = tl.constexpr(tuple(1 / math.factorial(k + 1) for k in range(13)))
# log(1 + t)/t for 0 ≤ t ≤ 1: 3.3e-8, 4e-17.
LOG1P_32 = tl.constexpr(
    (
        *(1.0, -0.499996483, 0.3332133, -0.248572171, 0.191538483),
        *(-0.13754189, 0.0792088881, -0.030068377, 0.00536545413),
    )
)
LOG1P_64 = tl.constexpr(
    (
        *(1.0, -0.4999999999999908, 0.33333333333197523, -0.24999999992009522),
        *(0.19999999749856523, -0.16666661848248537, 0.14285651975275926, -0.12499427063514382),
        *(0.11107211585299538, -0.09979768096586568, 0.09009095815198633, -0.08070954578430206),
        *(0.07015296236526472, -0.05718978534193906, 0.041925709853904154, -0.026398779480743217),
        *(0.013598778090617254, -0.0054217339910016095, 0.0015535244034334333),
        *(-0.0002827421139374107, 2.4437973948580947e-05),
    )
)
# log(1 + m)/m for -1/4 ≤ m ≤ 1/2: 2.8e-8.
LOG_32 = tl.constexpr(
    (
        *(1.0, -0.500000596, 0.333335459, -0.249934912, 0.199772075),
        *(-0.168223098, 0.149822742, -0.120672189, 0.0541502424),
    )
)
# atan(t)/t as a polynomial in t², for |t| ≤ 1: 1.7e-8, 4e-17.
ATAN_32 = tl.constexpr(
    (
        *(1.0, -0.333331525, 0.199937671, -0.14211002, 0.106657684),
        *(-0.0755165592, 0.0432046354, -0.0163631029, 0.00291939313),
    )
)
ATAN_64 = tl.constexpr(
    (
        *(1.0, -0.3333333333333286, 0.19999999999929946, -0.14285714281592693),
        *(0.11111110982087126, -0.09090906605656898, 0.0769227555520563, -0.06666371187721098),
        *(0.05880342002401543, -0.052527255573225747, 0.04719723992321112, -0.042125723963855326),
        *(0.03651081352721035, -0.02970071773623423, 0.021740213830758134, -0.013674139288399478),
        *(0.007038646202989813, -0.0028047655531701315, 0.0008033604181626027),
        *(-0.00014617088163625013, 1.2631178430477426e-05),
    )
)
# sin(t)/t as a polynomial in t², for |t| ≤ π/2: 6.2e-9. float64 has the Taylor series.
SIN_32 = tl.constexpr((1.0, -0.166666597, 0.00833306927, -0.000198097769, 2.60609568e-06))
SIN_64 = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(12)))
# tanh(t)/t as a polynomial in t², for |t| ≤ 9/16: 4.6e-8.
TANH_32 = tl.constexpr((1.0, -0.333328754, 0.133190557, -0.0525636114, 0.0162300691))
# erf(t)/t as a polynomial in t², for |t| ≤ 3/4: 7.4e-8. log2(1 - erf(t)) for t ≥ 3/4: the error
# of erf(t) is 5.9e-8.
ERF_32 = tl.constexpr((1.12837911, -0.376119792, 0.112740532, -0.0263677556, 0.00416473532))
ERFC_32 = tl.constexpr(
    (-0.00139739818, -1.62107909, -0.931457698, -0.136760592, 0.0243357979, -0.00205811369)
)
# exp(a²/2) Φ(-a), where Φ is the normal distribution function. float32: a polynomial in 1/(a + 3)
# for 0 ≤ a ≤ 14; the error is 9e-8, plus a²/4 times that. float64: a + 4 times it is a polynomial
# in (a - 4)/(a + 4) for all a ≥ 0; the error is 1.2e-16.
TAIL_32 = tl.constexpr(
    (
        *(-9.7322998e-05, 0.404618561, 1.05857706, 5.02592039),
        *(-7.233078, 79.2219391, -161.984543, 102.661324),
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
def _exp(u, SCALE: tl.constexpr):
    """exp(SCALE · u)."""
    return tl.exp(u * SCALE) if u.dtype == tl.float64 else tl.exp2(u * (SCALE * LOG2E))


@triton.jit
def _over(x, w):
    """x/w for w ≥ 1."""
    if w.dtype == tl.float64:
        return x / w
    else:
        r = tl.rsqrt(w)
        return x * r * r


@triton.jit
def _inverse(w):
    """1/w for w ≥ 1, more exact than `_over`; 0 where the square of w overflows float32."""
    return 1.0 / w if w.dtype == tl.float64 else tl.rsqrt(w * w)


@triton.jit
def _with_sign(r, u):
    """|r| with the sign of u."""
    if u.dtype == tl.float64:
        sign = u.to(tl.int64, bitcast=True) & -0x8000000000000000
        return (tl.abs(r).to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    else:
        sign = u.to(tl.int32, bitcast=True) & -0x80000000
        return (tl.abs(r).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x ≤ 0."""
    r = _horner(x, EXPM1_64, 13) if x.dtype == tl.float64 else _horner(x, EXPM1_32, 5)
    return tl.where(x > -0.4375, x * r, _exp(x, 1.0) - 1.0)


@triton.jit
def _log1p(t):
    """log(1 + t) for t ≥ 0."""
    w = 1.0 + t
    if t.dtype == tl.float64:
        lost = tl.where(t < 2.0, (t - (w - 1.0)) / w, 0.0)
        return tl.log(w) + lost
    else:
        # 1 + t = 2ᵏ (1 + m) with -1/4 ≤ m < 1/2; k stays in the exponent's bits. For k = 0 m is t,
        # so that small t lose no digits.
        k = (w.to(tl.int32, bitcast=True) - 0x3F400000) & -0x800000
        k = tl.minimum(k, 126 << 23)  # so that infinity does not become negative
        shrink = (0x3F800000 - k).to(tl.float32, bitcast=True)
        m = t * shrink + (shrink - 1.0)
        return m * _horner(m, LOG_32, 9) + k.to(tl.float32) * (LN2 / (1 << 23))


@triton.jit
def _hypot1(u):
    """√(1 + u²)."""
    a = tl.abs(u)
    return tl.where(a > 1e9, a, tl.sqrt(1.0 + a * a))


@triton.jit
def _hypot1_minus_1(u):
    h = _hypot1(u)
    return tl.where(tl.abs(u) > 1.0, h - 1.0, _over(u * u, 1.0 + h))


@triton.jit
def _tanh(u):
    if u.dtype == tl.float64:
        e = _expm1(-2.0 * tl.abs(u))
        r = e / (2.0 + e)
    else:
        r = 1.0 - 2.0 * _inverse(1.0 + _exp(tl.abs(u), 2.0))
        r = tl.where(tl.abs(u) < 0.5625, u * _horner(u * u, TANH_32, 5), r)
    return _with_sign(r, u)


@triton.jit
def _atan(u):
    a = tl.abs(u)
    steep = a > 1.0
    t = tl.where(steep, -tl.rsqrt(u * u), a)
    p = _horner(t * t, ATAN_64, 21) if u.dtype == tl.float64 else _horner(t * t, ATAN_32, 9)
    quarter = tl.full((), 1.5707963267948966, u.dtype)
    return _with_sign(t * p + tl.where(steep, quarter, 0.0), u)


@triton.jit
def _cos2(v):
    """cos²(v) for |v| ≤ π/2, without cancellation."""
    if v.dtype == tl.float64:
        t = (1.5707963267948966 - tl.abs(v)) + 6.123233995736766e-17
        c = t * _horner(t * t, SIN_64, 12)
    else:
        t = (1.57079637050628662 - tl.abs(v)) - 4.37113900018624283e-8
        c = t * _horner(t * t, SIN_32, 5)
    return c * c


@triton.jit
def _asinh(u):
    a = tl.abs(u)
    huge = a > 1e9  # where asinh(a) = log(2 a) = 11 log(2) + log(a/1024)
    t = a + _over(a * a, 1.0 + tl.sqrt(1.0 + a * a))
    t = tl.where(huge, a * 0.0009765625, t)
    r = _log1p(t) + huge.to(u.dtype) * (11.0 * LN2)
    return _with_sign(r, u)


@triton.jit
def _erf(u):
    if u.dtype == tl.float64:
        return tl.erf(u)
    else:
        a = tl.abs(u)
        r = 1.0 - tl.exp2(_horner(a, ERFC_32, 6))
        r = tl.where(a < 0.75, u * _horner(u * u, ERF_32, 5), r)
        return _with_sign(r, u)


@triton.jit
def _sigmoid(u):
    """1/(1 + exp(-u)), accurate in both tails."""
    return _over(1.0, 1.0 + _exp(u, -1.0))


@triton.jit
def _logistic(u):
    """1/(1 + exp(-u)) and 1/(1 + exp(u)), each accurate in its tail."""
    e = _exp(tl.abs(u), -1.0)
    large = _inverse(1.0 + e)
    small = e * large
    return tl.where(u < 0, small, large), tl.where(u < 0, large, small)


@triton.jit
def _sech2(u):
    e = _exp(tl.abs(u), -2.0)
    r = _inverse(1.0 + e)
    return 4.0 * e * r * r


@triton.jit
def _tail(u):
    """Return |u|, exp(-u²/2) and Φ(-|u|)/exp(-u²/2), where Φ is the normal distribution function.

    |u| is clamped where Φ(-|u|) is 0, so that infinities do not become NaN.
    """
    if u.dtype == tl.float64:
        a = tl.where(tl.abs(u) > 40.0, 40.0, tl.abs(u))
        d = 1.0 / (a + 4.0)
        ratio = d * _horner(1.0 - 8.0 * d, TAIL_64, 24)
    else:
        a = tl.where(tl.abs(u) > 14.0, 14.0, tl.abs(u))
        ratio = _horner(_inverse(a + 3.0), TAIL_32, 8)
    return a, _exp(a * a, -0.5), ratio


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
        e = _exp(tl.abs(u), -1.0)
        r = _horner(e, LOG1P_64, 21) if u.dtype == tl.float64 else _horner(e, LOG1P_32, 9)
        return e * r + tl.where(u <= 0, 0.0, u)
    elif ID == ELU:
        return tl.where(u > 0, u, _expm1(u))
    elif ID == SELU:
        return SELU_SCALE * tl.where(u > 0, u, SELU_ALPHA * _expm1(u))
    elif ID == SOFTSIGN:
        return _over(u, 1.0 + tl.abs(u))
    elif ID == ATAN:
        return _atan(u)
    elif ID == ASINH:
        return _asinh(u)
    elif ID == SWISH:
        return _over(u, 1.0 + _exp(u, -1.0))
    elif ID == GELU:
        e = _exp(u * (1.0 + GELU_CUBIC * (u * u)), -2.0 * SQRT_2_OVER_PI)
        return _over(u, 1.0 + e)
    elif ID == GELU_EXACT:
        a, e, ratio = _tail(u)
        return tl.where(u <= 0, u - u, u) - e * (a * ratio)
    elif ID == ERF:
        return _erf(u)
    elif ID == BENTID:
        return tl.where(u < -1e18, 0.5 * u, 0.5 * _hypot1_minus_1(u) + u)
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
    """φ′(u); at a kink, the left derivative.

    u - u is 0, and NaN at ±inf: it is added where torch's own backward computes inf·0 there.
    """
    if ID == RELU:
        return 1.0 - (u <= 0).to(u.dtype)
    elif ID == LEAKY_RELU:
        return tl.where(u > 0, 1.0, slope)
    elif ID == TANH:
        return _sech2(u)
    elif ID == SIGMOID:
        return 0.25 * _sech2(0.5 * u)
    elif ID == SOFTPLUS:
        return _sigmoid(u)
    elif ID == ELU:
        return _exp(tl.where(u <= 0, u, 0.0), 1.0)
    elif ID == SELU:
        return SELU_SCALE * tl.where(u <= 0, SELU_ALPHA * _exp(u, 1.0), 1.0)
    elif ID == SOFTSIGN:
        r = _over(1.0, 1.0 + tl.abs(u))
        return r * r + (u - u)
    elif ID == ATAN:
        return _over(1.0, 1.0 + u * u)
    elif ID == ASINH:
        return _over(1.0, _hypot1(u))
    elif ID == SWISH:
        s, c = _logistic(u)
        return s * (1.0 + u * c)
    elif ID == GELU:
        u2 = u * u
        s, c = _logistic(u * (2.0 * SQRT_2_OVER_PI) * (1.0 + GELU_CUBIC * u2))
        inner = (1.0 + u2 * (3.0 * GELU_CUBIC)) * (2.0 * SQRT_2_OVER_PI)
        return s + tl.where(tl.abs(u) > 40.0, u - u, u * s * c * inner)
    elif ID == GELU_EXACT:
        a, e, ratio = _tail(u)
        t = e * (ratio - a * INV_SQRT_2PI)
        return tl.where(u < 0, t, 1.0 - t) + (u - u)
    elif ID == ERF:
        return TWO_OVER_SQRT_PI * _exp(u * u, -1.0)
    elif ID == BENTID:
        r = 0.5 * _over(u, _hypot1(u)) + 1.0
        return tl.where(u > 1e18, 1.5, tl.where(u < -1e18, 0.5, r))
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

    `right` says that u > 0 or, for all but leaky_relu, that u is NaN. It is an argument of its own
    because v was recovered from the rounded output: where φ is flat (relu), rounding could put v on
    either side of 0.
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
        e = _exp(tl.abs(v), -1.0)
        return 2.0 * e * _inverse(1.0 + e * e)
    else:
        tl.static_assert(False, "phi.d1_from_output lacks this activation")
