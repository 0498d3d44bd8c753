// One row of the kernels: up to kWidth numbers side by side in memory, as float or double.
#pragma once

#include <cstdint>

namespace fusedshape {

// Small enough that a row and its operands stay in the first-level cache.
constexpr int64_t kWidth = 1024;

template <class A>
struct Constants {
  A slope, input_scale, input_shift, output_shift, output_scale;

  template <class B>
  Constants<B> as() const {
    return {B(slope), B(input_scale), B(input_shift), B(output_shift), B(output_scale)};
  }
};

// An activation with its constants, as the ops receive it; `id` is in [0, kActivations).
struct Activation {
  int64_t id;
  Constants<double> constants;
};

// The numbers of a row belong to one channel, with the bias b[0] and the sum sums[0], or each to a
// channel of its own, with b[i] and sums[i].
enum class Along { run, channels };

// y = γ(φ(α(x + b) + β) + δ); y may be the same memory as x.
template <class A>
using ValueRow = void (*)(const A* x, const A* b, A* y, int64_t n, const Constants<A>& c);

// dx = grad · γα φ′, which is added to `sums` too; dx may be the same memory as grad.
template <class A>
using GradRow = void (*)(const A* grad, const A* saved, const A* b, A* dx, A* sums, int64_t n,
                         const Constants<A>& c);

// The loop of an activation.
template <class A>
ValueRow<A> value_row(int64_t activation, Along along);

// The loop of its gradient; null where φ′ is not known as a function of φ.
template <class A>
GradRow<A> grad_row(int64_t activation, bool from_output, Along along);

}  // namespace fusedshape
