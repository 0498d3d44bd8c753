// What all ops need: torch's tensors on the stable ABI, and checks of arguments.
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

// Through the C API, which costs half as much as calling the op, as that is looked up by name each
// time. The macro's twin STABLE_TORCH_ERROR_CODE_CHECK does not exist in torch 2.11.
inline Tensor empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides,
                            int32_t dtype) {
  AtenTensorHandle y;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      ndim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &y));
  return Tensor(y);
}

// The activation that an op's arguments describe, checked.
inline Activation checked(const char* op, const Activation& activation) {
  STD_TORCH_CHECK(0 <= activation.id && activation.id < kActivations, op,
                  ": activation=", activation.id, " is not known; ids run from 0 to ",
                  kActivations - 1);
  return activation;
}

}  // namespace fusedshape
