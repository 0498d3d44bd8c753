// One row of the kernels: up to kWidth numbers that lie together, as float or double.
#pragma once

#include <cstdint>

namespace fusedshape {

constexpr int64_t kWidth = 1024;  // a row and all that goes with it stay in the first-level cache

template <class A>
struct Constants {
  A slope, input_scale, input_shift, output_shift, output_scale;
};

// What a row runs along: a run of one channel, with one bias b[0] and one sum sums[0], or channels,
// with b[i] and sums[i] for every number.
enum class Along { run, channels };

// y = γ(φ(α(x + b) + β) + δ); y may be x.
template <class A>
using ValueRow = void (*)(const A* x, const A* b, A* y, int64_t n, const Constants<A>& c);

// dx = grad · γα φ′, added to `sums` as well; dx may be grad.
template <class A>
using GradRow = void (*)(const A* grad, const A* saved, const A* b, A* dx, A* sums, int64_t n,
                         const Constants<A>& c);

// `activation` must be in [0, kActivations).
template <class A>
ValueRow<A> value_row(int64_t activation, Along along);

// Null where φ′ is not known as a function of φ.
template <class A>
GradRow<A> grad_row(int64_t activation, bool from_output, Along along);

}  // namespace fusedshape
