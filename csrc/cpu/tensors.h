// What the ops share: torch's tensors on the stable ABI, and checks of arguments.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "phi.h"
#include "rows.h"

namespace fusedshape {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& x) {
  std::string text = "(";
  for (const int64_t size : x.sizes()) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + ")";
}

// Calls of ops by name look them up each time; this one costs half as much. Not the macro's twin
// STABLE_TORCH_ERROR_CODE_CHECK, which torch 2.11 does not have.
inline Tensor empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle y;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      ndim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &y));
  return Tensor(y);
}

inline void check_activation(const char* op, int64_t activation) {
  STD_TORCH_CHECK(0 <= activation && activation < kActivations, op, ": activation=", activation,
                  " is not known; ids run from 0 to ", kActivations - 1);
}

template <class A>
Constants<A> constants_of(double slope, double input_scale, double input_shift,
                          double output_shift, double output_scale) {
  return {A(slope), A(input_scale), A(input_shift), A(output_shift), A(output_scale)};
}

}  // namespace fusedshape
