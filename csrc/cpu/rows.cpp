// The loops over φ, φ′ and φ′ from the output, one for each activation and type.
#include "rows.h"

#include <array>
#include <type_traits>
#include <utility>

#include "phi.h"

namespace fusedshape {
namespace {

// f(u), in double where u is too large for the range reduction in float.
template <class F>
float anywhere(float u, F f) {
  const bool near = math::abs(u) <= math::kPeriodicLimit;
  return near ? f(u) : static_cast<float>(f(static_cast<double>(u)));
}

// Whether any of n arguments is so large.
template <class F>
bool any_far(int64_t n, F argument) {
  int far = 0;
#pragma omp simd reduction(| : far)
  for (int64_t i = 0; i < n; ++i) {
    far |= math::abs(argument(i)) > math::kPeriodicLimit;
  }
  return far;
}

// Calls loop(phi) with phi(i) = f(argument(i)). If f is periodic, large arguments go by `anywhere`.
template <bool periodic, class A, class Argument, class F, class Loop>
FS_INLINE void with_phi(int64_t n, Argument argument, F f, Loop loop) {
  if constexpr (periodic && std::is_same_v<A, float>) {
    if (any_far(n, argument)) {
      loop([=](int64_t i) { return anywhere(argument(i), f); });
      return;
    }
  }
  loop([=](int64_t i) { return f(argument(i)); });
}

template <class P, Along along, class A>
void value(const A* x, const A* b, A* y, int64_t n, const Constants<A>& constants) {
  const Constants<A> c = constants;
  const A b0 = b[0];
  with_phi<P::periodic, A>(
      n,
      [=](int64_t i) {
        return c.input_scale * (x[i] + (along == Along::run ? b0 : b[i])) + c.input_shift;
      },
      [=](auto u) { return P::value(u, static_cast<decltype(u)>(c.slope)); },
      [=](auto phi) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          y[i] = c.output_scale * (phi(i) + c.output_shift);
        }
      });
}

// dx[i] = grad[i] · chain · slope(i), which is added to the sums too; slope(i) is φ′.
template <Along along, class A, class Slope>
FS_INLINE void write_grad(const A* grad, A* dx, A* sums, int64_t n, A chain, Slope slope) {
  if constexpr (along == Along::run) {
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) {
      const A d = slope(i) * chain * grad[i];
      dx[i] = d;
      total += d;
    }
    sums[0] += total;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A d = slope(i) * chain * grad[i];
      dx[i] = d;
      sums[i] += d;
    }
  }
}

template <class P, Along along, class A>
void grad_from_input(const A* grad, const A* x, const A* b, A* dx, A* sums, int64_t n,
                     const Constants<A>& constants) {
  const Constants<A> c = constants;
  const A b0 = b[0];
  with_phi<P::periodic, A>(
      n,
      [=](int64_t i) {
        return c.input_scale * (x[i] + (along == Along::run ? b0 : b[i])) + c.input_shift;
      },
      [=](auto u) { return P::d1(u, static_cast<decltype(u)>(c.slope)); },
      [=](auto slope) {
        write_grad<along>(grad, dx, sums, n, c.input_scale * c.output_scale, slope);
      });
}

template <class P, Along along, class A>
void grad_from_output(const A* grad, const A* y, const A*, A* dx, A* sums, int64_t n,
                      const Constants<A>& constants) {
  const Constants<A> c = constants;
  const A unscale = 1 / c.output_scale;
  with_phi<P::periodic_output, A>(
      n, [=](int64_t i) { return y[i] * unscale - c.output_shift; },
      [=](auto v) { return P::d1_from_output(v, static_cast<decltype(v)>(c.slope)); },
      [=](auto slope) {
        write_grad<along>(grad, dx, sums, n, c.input_scale * c.output_scale, slope);
      });
}

template <class P, Along along, class A>
constexpr GradRow<A> output_row() {
  if constexpr (P::from_output) {
    return grad_from_output<P, along, A>;
  } else {
    return nullptr;
  }
}

template <class A>
struct Table {
  std::array<ValueRow<A>, kActivations> value;
  std::array<GradRow<A>, kActivations> from_input, from_output;
};

template <class A, Along along, int... id>
constexpr Table<A> make_table(std::integer_sequence<int, id...>) {
  return {{value<Phi<Id(id)>, along, A>...},
          {grad_from_input<Phi<Id(id)>, along, A>...},
          {output_row<Phi<Id(id)>, along, A>()...}};
}

template <class A, Along along>
constexpr Table<A> kTable = make_table<A, along>(std::make_integer_sequence<int, kActivations>());

template <class A>
constexpr const Table<A>& table(Along along) {
  return along == Along::run ? kTable<A, Along::run> : kTable<A, Along::channels>;
}

}  // namespace

template <class A>
ValueRow<A> value_row(int64_t activation, Along along) {
  return table<A>(along).value[activation];
}

template <class A>
GradRow<A> grad_row(int64_t activation, bool from_output, Along along) {
  return (from_output ? table<A>(along).from_output : table<A>(along).from_input)[activation];
}

template ValueRow<float> value_row<float>(int64_t, Along);
template ValueRow<double> value_row<double>(int64_t, Along);
template GradRow<float> grad_row<float>(int64_t, bool, Along);
template GradRow<double> grad_row<double>(int64_t, bool, Along);

}  // namespace fusedshape
