// Scalar functions for float without branches, calls or tables, so that the compiler can vectorise
// the loops that call them.
//
// Errors are a few units in the last place of the result, near zeros and in tails too. NaN gives NaN.
// The overloads for double call libm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define FS_INLINE inline __attribute__((always_inline))

namespace fusedshape::math {

FS_INLINE int32_t bits(float x) {
  int32_t i;
  std::memcpy(&i, &x, sizeof i);
  return i;
}

FS_INLINE float from_bits(int32_t i) {
  float x;
  std::memcpy(&x, &i, sizeof x);
  return x;
}

FS_INLINE float pow2(int32_t n) { return from_bits((n + 127) << 23); }

FS_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// max(x, low) and min(x, high), compared so that a NaN x is returned.
template <class A>
FS_INLINE A at_least(A x, A low) { return x < low ? low : x; }
template <class A>
FS_INLINE A at_most(A x, A high) { return x > high ? high : x; }

template <class A>
FS_INLINE A abs(A x) { return std::fabs(x); }
template <class A>
FS_INLINE A sqrt(A x) { return std::sqrt(x); }

FS_INLINE float polynomial(float, float c) { return c; }
template <class... C>
FS_INLINE float polynomial(float x, float c, C... rest) {
  return polynomial(x, rest...) * x + c;
}

// Adding 1.5·2²³ rounds a float to an integer, which is then in its low bits.
constexpr float kRound = 0x1.8p23f;

// n and q of exp(x) = 2ⁿ(1 + q), for x ≤ 0.
struct Exp {
  int32_t n;
  float q;
};

FS_INLINE Exp reduce_exp(float x) {
  const float z = x * 0x1.715476p0f + kRound;
  const float n = z - kRound;
  float r = x - n * 0x1.62e4p-1f;  // ln 2 is subtracted in two parts, the first of which is exact
  r = r - n * 0x1.7f7d1cp-20f;
  const float p = polynomial(r, 0.5f, 0x1.555556p-3f, 0x1.5554f6p-5f, 0x1.111004p-7f,
                             0x1.6d3cecp-10f, 0x1.a242f6p-13f);
  return {bits(z) - bits(kRound), r + r * r * p};
}

// exp(x) for x ≤ 0, down to denormal results.
FS_INLINE float exp_neg(float x) {
  const Exp e = reduce_exp(at_least(x, -104.0f));
  const int32_t half = e.n >> 1;
  const float s = pow2(half);
  return (s * e.q + s) * pow2(e.n - half);
}

// exp(x) - 1 for x ≤ 0.
FS_INLINE float expm1_neg(float x) {
  const Exp e = reduce_exp(at_least(x, -17.5f));  // below, the result rounds to -1
  const float s = pow2(e.n);
  return s * e.q + (s - 1.0f);
}

// log(1 + a) for 0 ≤ a ≤ 2⁶¹, as k ln 2 + log(1 + f) with 1 + a = 2ᵏ(1 + f). f is computed from a, not
// from the rounded 1 + a, so that a small a keeps its digits.
FS_INLINE float log1p_pos(float a) {
  const int32_t k = (bits(1.0f + a) - bits(0.75f)) >> 23;
  const float s = pow2(-k);
  const float f = a * s + (s - 1.0f);  // in [-1/4, 1/2]
  const float t = f / (2.0f + f);
  const float z = t * t;
  const float p = z * polynomial(z, 0x1.555554p-1f, 0x1.999c10p-2f, 0x1.23dff0p-2f, 0x1.ee95c4p-3f);
  const float n = static_cast<float>(k);
  return n * 0x1.62e4p-1f + (n * 0x1.7f7d1cp-20f + (f - t * (f - p)));
}

FS_INLINE float tanh(float x) {
  const float e = expm1_neg(-2.0f * abs(x));
  return std::copysign(e / (2.0f + e), x);
}

FS_INLINE float asinh(float x) {
  const float ax = abs(x);
  const float x2 = ax * ax;
  const bool huge = ax > 0x1p60f;
  const float a = huge ? ax * 0x1p-30f : ax + x2 / (1.0f + sqrt(1.0f + x2));
  const float y = log1p_pos(a) + (huge ? 0x1.57cd0ep4f : 0.0f);  // 31 ln 2
  return std::copysign(ax > 0x1.fffffep127f ? ax : y, x);
}

FS_INLINE float atan(float x) {
  const float ax = abs(x);
  const bool inverted = ax > 1.0f;
  const float t = inverted ? -1.0f / ax : ax;
  const float z = t * t;
  const float p = z * polynomial(z, -0x1.555540p-2f, 0x1.99926ap-3f, -0x1.24267ap-3f,
                                 0x1.c0cd8cp-4f, -0x1.58ce66p-4f, 0x1.dce018p-5f, -0x1.01822cp-5f,
                                 0x1.6a3072p-7f, -0x1.de582ep-10f);
  const float low = inverted ? -0x1.777a5cp-25f : 0.0f;
  const float high = inverted ? 0x1.921fb6p0f : 0.0f;
  return std::copysign(high + (t + (t * p + low)), x);
}

// exp(-c·u²). The rounding error of u² is taken into account; in the tail it would cost every digit.
FS_INLINE float exp_neg_square(float u, float c) {
  const float a = at_most(abs(u), 20.0f);
  const float square = a * a;
  const float error = fma(a, a, -square);
  return exp_neg(-c * square) * (1.0f - c * error);
}

// erfc(z) for z ≥ 0, given exp(-z²). A polynomial in (z - 4)/(z + 4) stands for
// (1 + 2z) exp(z²) erfc(z).
FS_INLINE float erfc_pos(float z, float exp_neg_z2) {
  z = at_most(z, 11.0f);
  const float t = (z - 4.0f) / (z + 4.0f);
  const float p = polynomial(t, 0x1.3ba592p0f, -0x1.1df1aep-3f, 0x1.f7d708p-7f, 0x1.16ea4ep-4f,
                             -0x1.9d9808p-4f, 0x1.8050e0p-4f, -0x1.111756p-4f, 0x1.29e5a4p-5f,
                             -0x1.0596a2p-6f, 0x1.c6d232p-8f, 0x1.bc62a8p-11f);
  return exp_neg_z2 * (p / (1.0f + 2.0f * z));
}

FS_INLINE float erf(float x) {
  const float ax = abs(x);
  const float z = x * x;
  const float p = polynomial(z, 0x1.06eba8p-3f, -0x1.812728p-2f, 0x1.ce25d6p-4f, -0x1.b73cf8p-6f,
                             0x1.4ba4a2p-8f, -0x1.4dab22p-11f);
  const float large = std::copysign(1.0f - erfc_pos(ax, exp_neg_square(x, 1.0f)), x);
  return ax < 0.85f ? x + x * p : large;
}

// P(X ≤ u) of the standard normal distribution, given exp(-u²/2).
FS_INLINE float normal_cdf(float u, float exp_neg_half_u2) {
  const float tail = 0.5f * erfc_pos(0x1.6a09e6p-1f * abs(u), exp_neg_half_u2);
  return u > 0.0f ? 1.0f - tail : tail;
}

// For larger arguments the three parts of π/2 in sin_shifted are not exact enough.
constexpr float kPeriodicLimit = 0x1p16f;

// sin(x + quarter·π/2) for |x| ≤ kPeriodicLimit.
FS_INLINE float sin_shifted(float x, int32_t quarter) {
  const float z = x * 0x1.45f306p-1f + kRound;
  const float n = z - kRound;
  float r = fma(-n, 0x1.921fb6p0f, x);
  r = fma(-n, -0x1.777a5cp-25f, r);
  r = fma(-n, -0x1.ee59dap-50f, r);
  const float q = r * r;
  const float s = r + r * (q * polynomial(q, -0x1.555540p-3f, 0x1.110534p-7f, -0x1.98963cp-13f));
  const float c =
      1.0f + q * (-0.5f + q * polynomial(q, 0x1.555548p-5f, -0x1.6c0ad4p-10f, 0x1.998210p-16f));
  const int32_t i = bits(z) + quarter;
  return from_bits(bits(i & 1 ? c : s) ^ ((i & 2) << 30));
}

FS_INLINE float sin(float x) { return sin_shifted(x, 0); }
FS_INLINE float cos(float x) { return sin_shifted(x, 1); }

FS_INLINE double exp_neg(double x) { return std::exp(x); }
FS_INLINE double expm1_neg(double x) { return std::expm1(x); }
FS_INLINE double log1p_pos(double x) { return std::log1p(x); }
FS_INLINE double tanh(double x) { return std::tanh(x); }
FS_INLINE double asinh(double x) { return std::asinh(x); }
FS_INLINE double atan(double x) { return std::atan(x); }
FS_INLINE double exp_neg_square(double u, double c) { return std::exp(-c * u * u); }
FS_INLINE double erf(double x) { return std::erf(x); }
FS_INLINE double normal_cdf(double u, double) { return 0.5 * std::erfc(-M_SQRT1_2 * u); }
FS_INLINE double sin(double x) { return std::sin(x); }
FS_INLINE double cos(double x) { return std::cos(x); }

}  // namespace fusedshape::math
