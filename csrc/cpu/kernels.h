// The kernel contract on raw memory: dense tensors, in parallel, the same for any number of threads.
#pragma once

#include <cstdint>

#include "rows.h"
#include "storage.h"

namespace fusedshape {

// Dense memory as a sequence of channels, `inner` numbers each: channel of i = (i / inner) % channels.
// No size is 0.
struct Layout {
  int64_t numel, channels, inner;
};

// y = γ(φ(α(x + b) + β) + δ); y may be x, bias null for none.
template <class T, class A = typename Opmath<T>::type>
void bias_act(const T* x, const A* bias, T* y, const Layout& layout, int64_t activation,
              const Constants<A>& constants);

// dx = grad · γα φ′ and, unless `sums` is null, its sum for each channel; dx may be grad. `saved` is
// the output if `from_output`, else the input.
template <class T, class A = typename Opmath<T>::type>
void act_grad(const T* grad, const T* saved, const A* bias, T* dx, A* sums, const Layout& layout,
              int64_t activation, bool from_output, const Constants<A>& constants);

}  // namespace fusedshape
