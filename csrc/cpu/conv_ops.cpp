// The convolutions as torch's ops: native_conv, native_conv_act, native_conv_dgrad and
// native_conv_wgrad.
//
// Checks the arguments and allocates the results. Tensors are float32 of shape (N, C, *spatial) with
// the channels innermost in memory; those of a linear layer are matrices (M, C).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "conv.h"
#include "tensors.h"

namespace fusedshape {
namespace {

using Ints = std::vector<int64_t>;

// The largest size, stride, padding or dilation, so that products of two do not overflow.
constexpr int64_t kMost = int64_t{1} << 31;

bool in_range(int64_t value, int64_t least) { return least <= value && value <= kMost; }

void check_float(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), op, ": ", name, " must be a CPU tensor");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": ", name, " has dtype ",
                  toString(x.scalar_type()), "; must be Float");
}

std::string text(const Ints& sizes) {
  std::string s = "(";
  for (const int64_t size : sizes) {
    s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return s + ")";
}

// Raises an error if a tensor of these sizes, none negative, is too large to be addressed.
void check_count(const char* op, const char* name, const Ints& sizes) {
  int64_t total = 1;
  bool fits = true;
  for (const int64_t size : sizes) {
    fits = fits && !__builtin_mul_overflow(total, std::max<int64_t>(1, size), &total);
  }
  STD_TORCH_CHECK(fits && total <= INT64_MAX / int64_t{sizeof(float)}, op, ": ", name, " of ",
                  text(sizes), " has more numbers than can be addressed");
}

// The strides of (N, C, *spatial) with channels innermost.
Ints channels_last(const Ints& sizes) {
  Ints strides(sizes.size());
  int64_t stride = 1;
  strides[1] = stride;
  stride *= sizes[1];
  for (size_t d = sizes.size() - 1; d >= 2; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);  // torch, too, counts a size of 0 as 1
  }
  strides[0] = stride;
  return strides;
}

Tensor empty(const Ints& sizes, const Ints& strides) {
  return empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                       aoti_torch_dtype_float32());
}

void check_operand(const char* op, const char* name, const Tensor& x, const Ints& sizes) {
  check_float(op, name, x);
  const Ints given(x.sizes().begin(), x.sizes().end());
  STD_TORCH_CHECK(given == sizes, op, ": ", name, " has shape ", text(given), "; must be ",
                  text(sizes));
  const Ints strides = channels_last(sizes);
  for (size_t d = 0; d < sizes.size() && x.numel() > 0; ++d) {
    STD_TORCH_CHECK(sizes[d] == 1 || x.stride(d) == strides[d], op, ": ", name,
                    " must lie in memory with its channels innermost, without gaps");
  }
}

const float* data(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
float* mutable_data(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// How the kernel moves over its input, one number for each spatial dimension.
struct Geometry {
  const Ints &stride, &padding, &dilation;
};

// A convolution whose sizes fit together, and the shapes of its input and output.
struct Problem {
  Conv conv;
  Ints x, y;

  Problem(const char* op, const Ints& x, const Ints& weight, const Geometry& geometry) : x(x) {
    const auto& [stride, padding, dilation] = geometry;
    const size_t ndim = weight.size();
    STD_TORCH_CHECK(2 <= ndim && ndim <= 2 + kSpatial && x.size() == ndim, op, ": input ", text(x),
                    " and weight ", text(weight), " must have the same 2 to ", 2 + kSpatial,
                    " dimensions");
    check_count(op, "an input", x);
    check_count(op, "a weight", weight);
    const size_t n = ndim - 2;
    STD_TORCH_CHECK(stride.size() == n && padding.size() == n && dilation.size() == n, op,
                    ": stride, padding and dilation need ", n, " numbers each");
    STD_TORCH_CHECK(x[1] == weight[1], op, ": weight has ", weight[1], " input channels, input ",
                    x[1]);
    for (const int64_t channels : {weight[0], weight[1]}) {
      STD_TORCH_CHECK(channels > 0 && channels % kChannels == 0, op, ": ", channels,
                      " channels; must be a multiple of ", kChannels);
    }
    conv = {x[0], weight[1], weight[0], {1, 1, 1}, {1, 1, 1}, {1, 1, 1},
            {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
    y = {x[0], weight[0]};
    Ints padded = {x[0], x[1]};
    for (size_t d = 0; d < n; ++d) {
      const size_t to = kSpatial - n + d;
      STD_TORCH_CHECK(in_range(stride[d], 1) && in_range(padding[d], 0) && in_range(dilation[d], 1),
                      op, ": stride ", text(stride), ", padding ", text(padding), " or dilation ",
                      text(dilation), " is out of range; they are at most ", kMost);
      STD_TORCH_CHECK(in_range(x[2 + d], 0) && in_range(weight[2 + d], 1), op, ": input ", text(x),
                      " or weight ", text(weight), " is out of range; sizes are at most ", kMost);
      const int64_t extent = x[2 + d] + 2 * padding[d];
      const int64_t reach = dilation[d] * (weight[2 + d] - 1) + 1;
      STD_TORCH_CHECK(extent >= reach, op, ": a kernel of ", weight[2 + d], " with dilation ",
                      dilation[d], " reaches over ", reach, ", the padded input has ", extent);
      conv.in[to] = x[2 + d];
      conv.kernel[to] = weight[2 + d];
      conv.stride[to] = stride[d];
      conv.padding[to] = padding[d];
      conv.dilation[to] = dilation[d];
      conv.out[to] = (extent - reach) / stride[d] + 1;
      y.push_back(conv.out[to]);
      padded.push_back(extent);
    }
    check_count(op, "an input padded", padded);
    check_count(op, "an output", y);
  }

  Weight weight(float* data, const Ints& strides) const {
    Weight w = {data, strides[0], strides[1], {0, 0, 0}};
    for (size_t d = 2; d < strides.size(); ++d) {
      w.tap[kSpatial - strides.size() + d] = strides[d];
    }
    return w;
  }

  Weight weight(const Tensor& w) const {
    return weight(const_cast<float*>(data(w)), Ints(w.strides().begin(), w.strides().end()));
  }
};

Ints shape(const Tensor& x) { return Ints(x.sizes().begin(), x.sizes().end()); }

// The biases side by side in memory; zeros where there is no bias.
class Bias {
 public:
  Bias(const char* op, const MaybeTensor& bias, int64_t channels) : own_(bias ? 0 : channels) {
    if (!bias) {
      data_ = own_.data();
      return;
    }
    check_float(op, "bias", *bias);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, op, ": bias has shape ",
                    shape_of(*bias), "; must be (", channels, ",)");
    if (bias->stride(0) == 1) {
      data_ = data(*bias);
      return;
    }
    own_.resize(channels);
    for (int64_t i = 0; i < channels; ++i) {
      own_[i] = data(*bias)[i * bias->stride(0)];
    }
    data_ = own_.data();
  }

  const float* get() const { return data_; }

 private:
  std::vector<float> own_;
  const float* data_;
};

Tensor forward(const char* op, const Tensor& x, const Tensor& weight, const MaybeTensor& residual,
               const Geometry& geometry, Finish finish) {
  check_float(op, "weight", weight);
  const Problem problem(op, shape(x), shape(weight), geometry);
  check_operand(op, "x", x, problem.x);
  if (residual) {
    check_operand(op, "residual", *residual, problem.y);
    finish.residual = data(*residual);
  }
  const Tensor y = empty(problem.y, channels_last(problem.y));
  conv_forward(problem.conv, data(x), problem.weight(weight), mutable_data(y), finish);
  return y;
}

Tensor native_conv(Tensor x, Tensor weight, Ints stride, Ints padding, Ints dilation) {
  return forward("native_conv", x, weight, {}, {stride, padding, dilation}, {});
}

Tensor native_conv_act(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor residual,
                       double residual_weight, Ints stride, Ints padding, Ints dilation,
                       int64_t activation, double slope, double input_scale, double input_shift,
                       double output_shift, double output_scale) {
  const char* op = "native_conv_act";
  Activation act = checked(
      op, {activation, {slope, input_scale, input_shift, output_shift, output_scale}});
  const Bias vector(op, bias, weight.dim() == 0 ? 0 : weight.size(0));
  Finish finish;
  if (residual) {
    STD_TORCH_CHECK(std::abs(residual_weight) < 1, op, ": residual_weight=", residual_weight,
                    " must lie between -1 and 1");
    // α(√(1 − w²)(y + b) + w r) = α√(1 − w²)(y + w/√(1 − w²) r + b)
    const double own_weight = std::sqrt((1 - residual_weight) * (1 + residual_weight));
    finish.share = static_cast<float>(residual_weight / own_weight);
    act.constants.input_scale *= own_weight;
  }
  finish.value = value_row<float>(act.id, Along::channels);
  finish.constants = act.constants.as<float>();
  finish.bias = vector.get();
  return forward(op, x, weight, residual, {stride, padding, dilation}, finish);
}

std::tuple<Tensor, Tensor> native_conv_dgrad(Tensor dz, Tensor weight, MaybeTensor saved,
                                             MaybeTensor bias, Ints input_size, Ints stride,
                                             Ints padding, Ints dilation, int64_t activation,
                                             double slope, double input_scale, double input_shift,
                                             double output_shift, double output_scale,
                                             bool save_output, bool bias_grad) {
  const char* op = "native_conv_dgrad";
  check_float(op, "weight", weight);
  const Problem problem(op, input_size, shape(weight), {stride, padding, dilation});
  check_operand(op, "dz", dz, problem.y);
  const Ints channels = {bias_grad ? problem.conv.in_channels : 0};
  const Tensor sums = empty(channels, {1});
  const Bias vector(op, save_output ? MaybeTensor() : bias, problem.conv.in_channels);
  Finish finish;
  if (saved) {
    const Activation act = checked(
        op, {activation, {slope, input_scale, input_shift, output_shift, output_scale}});
    check_operand(op, "saved", *saved, problem.x);
    finish.grad = grad_row<float>(act.id, save_output, Along::channels);
    STD_TORCH_CHECK(finish.grad != nullptr, op, ": activation=", activation,
                    " has no derivative from its output; save the input");
    finish.constants = act.constants.as<float>();
    finish.bias = vector.get();
    finish.saved = data(*saved);
  }
  STD_TORCH_CHECK(saved || !bias_grad, op, ": bias_grad needs what the layer before saved");
  finish.sums = bias_grad ? mutable_data(sums) : nullptr;
  const Tensor dx = empty(problem.x, channels_last(problem.x));
  conv_dgrad(problem.conv, data(dz), problem.weight(weight), mutable_data(dx), finish);
  return {dx, sums};
}

Tensor native_conv_wgrad(Tensor dz, Tensor x, Ints weight_size, Ints stride, Ints padding,
                         Ints dilation) {
  const char* op = "native_conv_wgrad";
  const Problem problem(op, shape(x), weight_size, {stride, padding, dilation});
  check_operand(op, "x", x, problem.x);
  check_operand(op, "dz", dz, problem.y);
  const Ints strides = channels_last(weight_size);
  const Tensor dw = empty(weight_size, strides);
  conv_wgrad(problem.conv, data(dz), data(x), problem.weight(mutable_data(dw), strides));
  return dw;
}

}  // namespace
}  // namespace fusedshape

STABLE_TORCH_LIBRARY_IMPL(fusedshape, CPU, m) {
  m.impl("native_conv", TORCH_BOX(&fusedshape::native_conv));
  m.impl("native_conv_act", TORCH_BOX(&fusedshape::native_conv_act));
  m.impl("native_conv_dgrad", TORCH_BOX(&fusedshape::native_conv_dgrad));
  m.impl("native_conv_wgrad", TORCH_BOX(&fusedshape::native_conv_wgrad));
}
