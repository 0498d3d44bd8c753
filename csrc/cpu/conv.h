// Convolutions and linear layers in float32, whose results are finished while they are in the cache.
//
// Tensors lie as (batch, *spatial, channels). A linear layer is a convolution over one position.
#pragma once

#include <array>
#include <cstdint>

#include "rows.h"

namespace fusedshape {

constexpr int kSpatial = 3;
constexpr int64_t kChannels = 16;  // divides the channels of every convolution
using Sizes = std::array<int64_t, kSpatial>;

// W; distances in memory of output channels, input channels and, in each dimension, taps.
struct Weight {
  float* data;
  int64_t row, column;
  Sizes tap;
};

struct Conv {
  int64_t batch, in_channels, out_channels;
  Sizes in, out, kernel, stride, padding, dilation;

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t in_rows() const { return batch * in[0] * in[1] * in[2]; }
  int64_t out_rows() const { return batch * out[0] * out[1] * out[2]; }

  // The same as a linear layer, where positions do not matter.
  Conv flat() const {
    const Sizes ones = {1, 1, 1}, none = {0, 0, 0};
    if (taps() > 1 || stride != ones || padding != none) {
      return *this;
    }
    return {in_rows(), in_channels, out_channels, ones, ones, ones, ones, none, ones};
  }
};

// What becomes of a row of results: y = γ(φ(α(y + share · residual + b) + β) + δ) where `value` is
// given, or dx = dx · γα φ′ where `grad` is, and `sums` gets its sum for each channel.
struct Finish {
  ValueRow<float> value = nullptr;
  GradRow<float> grad = nullptr;
  Constants<float> constants = {};
  const float* bias = nullptr;   // never null with value or grad
  const float* saved = nullptr;  // lies as the result
  float* sums = nullptr;         // may be null
  const float* residual = nullptr;  // lies as the result; may be null
  float share = 0;
};

// y = x ⋆ W.
void conv_forward(const Conv& conv, const float* x, const Weight& w, float* y,
                  const Finish& finish);

// dx = the gradient of x ⋆ W for x.
void conv_dgrad(const Conv& conv, const float* dz, const Weight& w, float* dx,
                const Finish& finish);

// dw = the gradient of x ⋆ W for W.
void conv_wgrad(const Conv& conv, const float* dz, const float* x, const Weight& dw);

}  // namespace fusedshape
