// Loops over torch's threads.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace fusedshape {

constexpr int64_t kGrain = 16384;  // numbers from which on a thread of their own pays

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(i) for all i in [0, count), each as much work as `size` numbers.
template <class F>
void parallel(int64_t count, int64_t size, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / size);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i);
    }
  };
  if (count <= grain) {
    run(0, count);  // on this thread
  } else {
    torch::stable::parallel_for(0, count, grain, run);
  }
}

}  // namespace fusedshape
