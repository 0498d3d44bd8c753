// The pointwise passes on raw memory. Tensors are dense, and results do not depend on the number of
// threads.
#pragma once

#include <cstdint>

#include "rows.h"
#include "storage.h"

namespace fusedshape {

// Dense memory as a sequence of channels, `inner` numbers each: the number at i belongs to channel
// (i / inner) % channels. No size is 0.
struct Layout {
  int64_t numel, channels, inner;
};

// What the forward pass reads and writes. y may be the same memory as x; bias may be null.
template <class T>
struct Forward {
  using A = typename Opmath<T>::type;
  const T* x;
  const A* bias;
  T* y;
};

// What the backward pass reads and writes. dx may be the same memory as grad; bias and sums may be
// null.
template <class T>
struct Backward {
  using A = typename Opmath<T>::type;
  const T* grad;
  const T* saved;  // the output if `from_output`, else the input
  const A* bias;
  T* dx;
  A* sums;
};

// y = γ(φ(α(x + b) + β) + δ).
template <class T>
void bias_act(const Forward<T>& tensors, const Layout& layout, const Activation& activation);

// dx = grad · γα φ′, and its sum for each channel.
template <class T>
void act_grad(const Backward<T>& tensors, const Layout& layout, const Activation& activation,
              bool from_output);

}  // namespace fusedshape
