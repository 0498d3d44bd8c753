// The twins of the rows of fusedshape/activations.py: φ, φ′ and φ′ from the output.
//
// Scalar and free of branches, so that the compiler can vectorise the loops over them. A is float or
// double; `a` is negative_slope.
#pragma once

#include "math.h"

namespace fusedshape {

// The rows' names in their order, which makes an activation's number its id. `fusedshape build` takes
// them from the table and passes them to the compiler.
#ifndef FS_ACTIVATIONS
#error "compile with `fusedshape build --verbose`, which defines FS_ACTIVATIONS"
#endif
enum class Id : int { FS_ACTIVATIONS, count };

constexpr int kActivations = static_cast<int>(Id::count);

template <Id id>
struct Phi {
  static_assert(id == Id::count, "csrc/cpu/phi.h lacks FS_PHI of this row of activations.py");
};

struct Defaults {
  static constexpr bool from_output = false;      // has d1_from_output
  static constexpr bool periodic = false;         // value and d1 take |u| ≤ kPeriodicLimit in float
  static constexpr bool periodic_output = false;  // d1_from_output does
};

struct FromOutput : Defaults {
  static constexpr bool from_output = true;
};

#define FS_PHI(name, base) \
  template <>              \
  struct Phi<Id::name> : base
#define FS_VALUE template <class A> static FS_INLINE A value(A u, [[maybe_unused]] A a)
#define FS_D1 template <class A> static FS_INLINE A d1(A u, [[maybe_unused]] A a)
#define FS_D1_FROM_OUTPUT \
  template <class A> static FS_INLINE A d1_from_output(A v, [[maybe_unused]] A a)

// Moves u to where φ or φ′ has reached its limit, and nothing overflows yet.
template <class A>
FS_INLINE A clamp(A u, A limit) {
  return math::at_most(math::at_least(u, -limit), limit);
}

// 0, but NaN at ±inf, where torch's own backward computes inf·0.
template <class A>
FS_INLINE A undefined(A u) {
  return u - u;
}

FS_PHI(relu, FromOutput) {
  FS_VALUE { return math::at_least(u, A(0)); }
  FS_D1 { return u <= 0 ? A(0) : A(1); }  // 1 at NaN, as in torch; so are elu and selu
  FS_D1_FROM_OUTPUT { return v <= 0 ? A(0) : A(1); }
};

FS_PHI(leaky_relu, FromOutput) {
  FS_VALUE { return u > 0 ? u : a * u; }
  FS_D1 { return u > 0 ? A(1) : a; }
  FS_D1_FROM_OUTPUT { return v > 0 ? A(1) : a; }
};

FS_PHI(tanh, FromOutput) {
  FS_VALUE { return math::tanh(u); }
  FS_D1 {
    // sech² is computed from exp, because 1 - tanh² cancels in the tails.
    const A e = math::exp_neg(-2 * math::abs(u));
    const A r = 1 / (1 + e);
    return 4 * e * r * r;
  }
  FS_D1_FROM_OUTPUT { return math::at_least((1 - v) * (1 + v), A(0)); }
};

template <class A>
FS_INLINE A logistic(A u) {
  const A e = math::exp_neg(-math::abs(u));
  return (u < 0 ? e : A(1)) / (1 + e);
}

// The logistic function of u and of -u, each exact in its tail.
template <class A>
struct Logistic {
  A positive, negative;
};

template <class A>
FS_INLINE Logistic<A> logistic_pair(A u) {
  const A e = math::exp_neg(-math::abs(u));
  const A large = 1 / (1 + e);
  const A small = e * large;
  return {u < 0 ? small : large, u < 0 ? large : small};
}

FS_PHI(sigmoid, FromOutput) {
  FS_VALUE { return logistic(u); }
  FS_D1 {
    const auto s = logistic_pair(u);
    return s.positive * s.negative;
  }
  FS_D1_FROM_OUTPUT { return math::at_least(v * (1 - v), A(0)); }
};

FS_PHI(softplus, FromOutput) {
  FS_VALUE { return math::at_least(u, A(0)) + math::log1p_pos(math::exp_neg(-math::abs(u))); }
  FS_D1 { return logistic(u); }
  FS_D1_FROM_OUTPUT { return -math::expm1_neg(-math::at_least(v, A(0))); }
};

FS_PHI(elu, FromOutput) {
  FS_VALUE { return u > 0 ? u : math::expm1_neg(math::at_most(u, A(0))); }
  FS_D1 { return u <= 0 ? math::exp_neg(math::at_most(u, A(0))) : A(1); }
  FS_D1_FROM_OUTPUT { return v <= 0 ? math::at_least(v + 1, A(0)) : A(1); }
};

FS_PHI(selu, FromOutput) {
  static constexpr double scale = 1.0507009873554804934193349852946;
  static constexpr double alpha = 1.6732632423543772848170429916717;
  FS_VALUE {
    const A m = math::expm1_neg(math::at_most(u, A(0)));
    return u > 0 ? A(scale) * u : A(scale * alpha) * m;
  }
  FS_D1 {
    const A e = math::exp_neg(math::at_most(u, A(0)));
    return u <= 0 ? A(scale * alpha) * e : A(scale);
  }
  FS_D1_FROM_OUTPUT {
    return v <= 0 ? math::at_least(v + A(scale * alpha), A(0)) : A(scale);
  }
};

FS_PHI(softsign, FromOutput) {
  FS_VALUE { return u / (1 + math::abs(u)); }
  FS_D1 {
    const A r = 1 / (1 + math::abs(u));
    return r * r + undefined(u);
  }
  FS_D1_FROM_OUTPUT {
    const A r = 1 - math::abs(v);
    return r * r;
  }
};

FS_PHI(atan, FromOutput) {
  static constexpr bool periodic_output = true;
  FS_VALUE { return math::atan(u); }
  FS_D1 { return 1 / (1 + u * u); }
  FS_D1_FROM_OUTPUT {
    const A c = math::cos(v);
    return c * c;
  }
};

FS_PHI(asinh, FromOutput) {
  FS_VALUE { return math::asinh(u); }
  FS_D1 { return 1 / math::sqrt(1 + u * u); }
  FS_D1_FROM_OUTPUT {
    const A e = math::exp_neg(-math::abs(v));
    return 2 * e / (1 + e * e);
  }
};

FS_PHI(swish, Defaults) {
  FS_VALUE { return u * logistic(u); }
  FS_D1 {
    const auto s = logistic_pair(u);
    return s.positive * (1 + u * s.negative);
  }
};

// (1 + tanh w)/2 is written as the logistic function of 2w, which does not cancel for negative u.
FS_PHI(gelu, Defaults) {
  static constexpr double k = 1.5957691216057307117597842397375;  // 2 √(2/π)
  static constexpr double cubic = 0.044715;
  FS_VALUE {
    const A twice_w = u * (A(k) + A(k * cubic) * (u * u));
    return u * logistic(twice_w);
  }
  FS_D1 {
    const A w = clamp(u, A(64));
    const A w2 = w * w;
    const auto s = logistic_pair(w * (A(k) + A(k * cubic) * w2));
    const A twice_w1 = A(k) + A(3 * k * cubic) * w2;
    return s.positive * (1 + w * s.negative * twice_w1) + undefined(u);
  }
};

FS_PHI(gelu_exact, Defaults) {
  FS_VALUE {
    const A w = math::at_least(u, A(-64));
    return u * math::normal_cdf(w, math::exp_neg_square(w, A(0.5)));
  }
  FS_D1 {
    const A w = clamp(u, A(64));
    const A e = math::exp_neg_square(w, A(0.5));
    return math::normal_cdf(w, e) + w * (A(0.39894228040143267793994605993438) * e) + undefined(u);
  }
};

FS_PHI(erf, Defaults) {
  FS_VALUE { return math::erf(u); }
  FS_D1 { return A(1.1283791670955125738961589031215) * math::exp_neg_square(u, A(1)); }
};

// (√(u² + 1) - 1)/2 is written as u²/(1 + √(u² + 1))/2, which keeps its digits for small u.
FS_PHI(bentid, Defaults) {
  FS_VALUE {
    const A w = clamp(u, A(0x1p60));
    return u * (1 + A(0.5) * (w / (1 + math::sqrt(1 + w * w))));
  }
  FS_D1 {
    const A w = clamp(u, A(0x1p60));
    return 1 + A(0.5) * (w / math::sqrt(1 + w * w));
  }
};

FS_PHI(square, Defaults) {
  FS_VALUE { return u * u; }
  FS_D1 { return 2 * u; }
};

FS_PHI(sin, Defaults) {
  static constexpr bool periodic = true;
  FS_VALUE { return math::sin(u); }
  FS_D1 { return math::cos(u); }
};

FS_PHI(cos, Defaults) {
  static constexpr bool periodic = true;
  FS_VALUE { return math::cos(u); }
  FS_D1 { return -math::sin(u); }
};

}  // namespace fusedshape
