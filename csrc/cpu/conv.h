// Convolutions and linear layers in float32 that apply the activation to a result while it is in the
// cache.
//
// In memory tensors are (batch, *spatial, channels). A linear layer is a convolution over one position.
#pragma once

#include <array>
#include <cstdint>

#include "rows.h"

namespace fusedshape {

constexpr int kSpatial = 3;
constexpr int64_t kChannels = 16;  // divides the channels of every convolution
using Sizes = std::array<int64_t, kSpatial>;

// W, and its strides: of output channels (rows), of input channels (columns) and of taps in each
// dimension.
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

  // The same convolution as a linear layer if it treats each position by itself, else unchanged.
  Conv flat() const {
    const Sizes ones = {1, 1, 1}, none = {0, 0, 0};
    if (taps() > 1 || stride != ones || padding != none) {
      return *this;
    }
    return {in_rows(), in_channels, out_channels, ones, ones, ones, ones, none, ones};
  }
};

// What is done to a row of results. With `value`, y = γ(φ(α(y + share · residual + b) + β) + δ). With
// `grad`, dx = dx · γα φ′, and `sums` receives its sum for each channel. With neither, nothing.
struct Finish {
  ValueRow<float> value = nullptr;
  GradRow<float> grad = nullptr;
  Constants<float> constants = {};
  const float* bias = nullptr;      // set with `value` and `grad`
  const float* saved = nullptr;     // set with `grad`, in the result's layout
  float* sums = nullptr;            // null if nobody needs them
  const float* residual = nullptr;  // null if there is none; in the result's layout
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
