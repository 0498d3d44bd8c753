// The pointwise passes as torch's ops: native_bias_act and native_act_grad, for CPU tensors.
//
// Checks the arguments, finds how the tensors lie in memory and allocates the results.
#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace fusedshape {
namespace {

// Whether the elements fill one stretch of memory without gaps or overlaps.
bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) {
    return true;
  }
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) {
      dims.emplace_back(strides[d], sizes[d]);
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// Whether two tensors of one shape have the same strides.
bool same_order(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && x[d] != y[d]) {
      return false;
    }
  }
  return true;
}

// As torch.empty_like, which the fakes call and so promise its strides.
Tensor empty_like(const Tensor& x, bool dense) {
  if (!dense || x.numel() == 0) {
    return torch::stable::empty_like(x);
  }
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty_strided(x.dim(), x.sizes().data(), x.strides().data(), dtype);
}

// A copy of x with the strides of empty_like(shape). Made without autograd: where x requires a
// gradient, copy_ would pass that on as if this op were the identity.
Tensor copy_like(const Tensor& x, const Tensor& shape, bool dense) {
  const Tensor y = empty_like(shape, dense);
  const bool grad_mode = aoti_torch_grad_mode_is_enabled();
  aoti_torch_grad_mode_set_enabled(false);
  const AOTITorchError error = aoti_torch_copy_(y.get(), x.get(), 0);
  aoti_torch_grad_mode_set_enabled(grad_mode);
  TORCH_ERROR_CODE_CHECK(error);
  return y;
}

void check_x(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), op, ": ", name, " must be a CPU tensor");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::BFloat16 || type == ScalarType::Half,
                  op, ": ", name, " has dtype ", toString(type),
                  "; supported are Float, Double, BFloat16 and Half");
}

// Where the channels of x lie. If neither a bias nor sums need them, x counts as one channel.
Layout layout_of(const char* op, const Tensor& x, const MaybeTensor& bias, int64_t dim,
                 bool channels) {
  if (!bias && !channels) {
    return {x.numel(), 1, x.numel()};
  }
  const int64_t ndim = x.dim();
  STD_TORCH_CHECK(-ndim <= dim && dim < ndim, op, ": dim=", dim,
                  " is out of range for a tensor of shape ", shape_of(x));
  dim += dim < 0 ? ndim : 0;
  const int64_t size = x.size(dim);
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu(), op, ": bias must be a CPU tensor");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == size, op, ": bias has shape ",
                    shape_of(*bias), "; must be (", size, ",) for x of shape ", shape_of(x),
                    " and dim=", dim);
    const ScalarType type = bias->scalar_type();
    STD_TORCH_CHECK(type == x.scalar_type() || type == ScalarType::Float, op, ": bias has dtype ",
                    toString(type), ", x ", toString(x.scalar_type()),
                    "; must be the same or Float");
  }
  return {x.numel(), size, size == 1 ? x.numel() : x.stride(dim)};
}

// The numbers of a vector as A: in place if they can be read there, else converted into `memory`.
template <class T, class A>
const A* numbers_of(const Tensor& x, std::vector<A>& memory) {
  const T* data = static_cast<const T*>(x.const_data_ptr());
  const int64_t n = x.numel(), stride = x.stride(0);
  if constexpr (std::is_same_v<T, A>) {
    if (stride == 1) {
      return data;
    }
  }
  memory.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, A>) {
      memory[i] = data[i * stride];
    } else {
      load(data + i * stride, &memory[i], 1);
    }
  }
  return memory.data();
}

// The numbers of a bias, which has x's dtype or float32; null where there is no bias.
template <class T>
class Bias {
 public:
  using A = typename Opmath<T>::type;

  explicit Bias(const MaybeTensor& x) {
    if (x) {
      data_ = x->scalar_type() == ScalarType::Float ? numbers_of<float>(*x, memory_)
                                                    : numbers_of<T>(*x, memory_);
    }
  }

  const A* data() const { return data_; }

 private:
  std::vector<A> memory_;
  const A* data_ = nullptr;
};

// Calls f(T{}) with the C++ type of a dtype that passed check_x.
template <class F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: return f(Float16{});
  }
}

// Where an op's bias lies along its input, and which activation it applies.
struct Pass {
  const char* op;
  const MaybeTensor& bias;
  int64_t dim;
  const Activation& activation;
};

// x and y have the same strides.
void run_bias_act(const Pass& pass, const Tensor& x, const Tensor& y) {
  const Layout layout = layout_of(pass.op, y, pass.bias, pass.dim, false);
  if (layout.numel == 0) {
    return;
  }
  with_type(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Bias<T> bias(pass.bias);
    bias_act<T>({static_cast<const T*>(x.const_data_ptr()), bias.data(),
                 static_cast<T*>(y.mutable_data_ptr())},
                layout, pass.activation);
  });
}

Tensor native_bias_act(Tensor x, MaybeTensor bias, int64_t dim, int64_t activation, double slope,
                       double input_scale, double input_shift, double output_shift,
                       double output_scale) {
  const char* op = "native_bias_act";
  check_x(op, "x", x);
  const Activation act = checked(
      op, {activation, {slope, input_scale, input_shift, output_shift, output_scale}});
  const bool dense = is_dense(x);
  const Tensor y = dense ? empty_like(x, true) : copy_like(x, x, false);
  run_bias_act({op, bias, dim, act}, dense ? x : y, y);
  return y;
}

void native_bias_act_(Tensor x, MaybeTensor bias, int64_t dim, int64_t activation, double slope,
                      double input_scale, double input_shift, double output_shift,
                      double output_scale) {
  const char* op = "native_bias_act_";
  check_x(op, "x", x);
  const Activation act = checked(
      op, {activation, {slope, input_scale, input_shift, output_shift, output_scale}});
  STD_TORCH_CHECK(is_dense(x), op, ": x of shape ", shape_of(x),
                  " has gaps or overlaps in memory; use native_bias_act");
  run_bias_act({op, bias, dim, act}, x, x);
}

void check_act_grad(const char* op, const Tensor& grad, const Tensor& saved,
                    const Activation& activation, bool save_output) {
  check_x(op, "saved", saved);
  check_x(op, "grad", grad);
  checked(op, activation);
  const ScalarType type = saved.scalar_type();
  STD_TORCH_CHECK(grad.scalar_type() == type, op, ": grad has dtype ",
                  toString(grad.scalar_type()), ", saved ", toString(type), "; must be the same");
  const auto a = grad.sizes(), b = saved.sizes();
  STD_TORCH_CHECK(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), op,
                  ": grad has shape ", shape_of(grad), ", saved ", shape_of(saved),
                  "; must be the same");
  STD_TORCH_CHECK(!save_output || grad_row<float>(activation.id, true, Along::run) != nullptr, op,
                  ": activation=", activation.id,
                  " has no derivative from its output; save the input");
}

// Writes dx and returns its sums. grad, saved and dx have the same strides; grad and dx may be one
// tensor.
Tensor run_act_grad(const Pass& pass, const Tensor& grad, const Tensor& saved, const Tensor& dx,
                    bool save_output, bool bias_grad) {
  const ScalarType type = saved.scalar_type();
  const MaybeTensor bias = save_output ? MaybeTensor() : pass.bias;
  const Layout layout = layout_of(pass.op, saved, bias, pass.dim, bias_grad);
  const int64_t channels = bias_grad ? layout.channels : 0;
  const int64_t one = 1;
  const Tensor sums = empty_strided(
      1, &channels, &one,
      type == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  if (layout.numel == 0) {
    torch::stable::fill_(sums, 0);
    return sums;
  }
  with_type(type, [&](auto number) {
    using T = decltype(number);
    using A = typename Opmath<T>::type;
    const Bias<T> vector(bias);
    act_grad<T>({static_cast<const T*>(grad.const_data_ptr()),
                 static_cast<const T*>(saved.const_data_ptr()), vector.data(),
                 static_cast<T*>(dx.mutable_data_ptr()),
                 bias_grad ? static_cast<A*>(sums.mutable_data_ptr()) : nullptr},
                layout, pass.activation, save_output);
  });
  return sums;
}

std::tuple<Tensor, Tensor> native_act_grad(Tensor grad, Tensor saved, MaybeTensor bias,
                                           int64_t dim, int64_t activation, double slope,
                                           double input_scale, double input_shift,
                                           double output_shift, double output_scale,
                                           bool save_output, bool bias_grad) {
  const char* op = "native_act_grad";
  const Activation act = {activation,
                          {slope, input_scale, input_shift, output_shift, output_scale}};
  check_act_grad(op, grad, saved, act, save_output);
  if (!is_dense(saved)) {
    saved = copy_like(saved, saved, false);
  }
  const bool alike = same_order(grad, saved);
  const Tensor dx = alike ? empty_like(saved, true) : copy_like(grad, saved, true);
  const Tensor sums =
      run_act_grad({op, bias, dim, act}, alike ? grad : dx, saved, dx, save_output, bias_grad);
  return {dx, sums};
}

Tensor native_act_grad_(Tensor grad, Tensor saved, MaybeTensor bias, int64_t dim,
                        int64_t activation, double slope, double input_scale, double input_shift,
                        double output_shift, double output_scale, bool save_output,
                        bool bias_grad) {
  const char* op = "native_act_grad_";
  const Activation act = {activation,
                          {slope, input_scale, input_shift, output_shift, output_scale}};
  check_act_grad(op, grad, saved, act, save_output);
  STD_TORCH_CHECK(is_dense(saved) && same_order(grad, saved), op,
                  ": grad and saved of shape ", shape_of(grad),
                  " must lie in memory alike, without gaps or overlaps; use native_act_grad");
  return run_act_grad({op, bias, dim, act}, grad, saved, grad, save_output, bias_grad);
}

}  // namespace
}  // namespace fusedshape

STABLE_TORCH_LIBRARY_IMPL(fusedshape, CPU, m) {
  m.impl("native_bias_act", TORCH_BOX(&fusedshape::native_bias_act));
  m.impl("native_bias_act_", TORCH_BOX(&fusedshape::native_bias_act_));
  m.impl("native_act_grad", TORCH_BOX(&fusedshape::native_act_grad));
  m.impl("native_act_grad_", TORCH_BOX(&fusedshape::native_act_grad_));
}
