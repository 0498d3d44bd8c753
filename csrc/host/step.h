// A step: one layer or pass without its tensors, and how torch's and our kernels compute it.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace fusedshape {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using IntList = at::IntArrayRef;

// The constants of an activation, as the operators take them.
struct Constants {
  int64_t activation;
  double slope, input_scale, input_shift, output_shift, output_scale;
};

// The operators of fusedshape/ops/schema.py. They are called through torch's dispatcher, so that
// profilers see them, and looked up once.
class Operators {
  template <class Signature>
  static c10::TypedOperatorHandle<Signature> named(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  }

 public:
  using BiasAct = Tensor(const Tensor&, const MaybeTensor&, int64_t, int64_t, double, double,
                         double, double, double);
  using BiasActInPlace = void(const Tensor&, const MaybeTensor&, int64_t, int64_t, double, double,
                              double, double, double);
  using ActGrad = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const MaybeTensor&,
                                             int64_t, int64_t, double, double, double, double,
                                             double, bool, bool);
  using Conv = Tensor(const Tensor&, const Tensor&, IntList, IntList, IntList);
  using ConvAct = Tensor(const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                         double, IntList, IntList, IntList, int64_t, double, double, double, double,
                         double);
  using ConvDgrad = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const MaybeTensor&,
                                               const MaybeTensor&, c10::SymIntArrayRef, IntList,
                                               IntList, IntList, int64_t, double, double, double,
                                               double, double, bool, bool);
  using ConvWgrad = Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, IntList, IntList,
                           IntList);

  c10::TypedOperatorHandle<BiasAct> bias_act = named<BiasAct>("fusedshape::native_bias_act");
  c10::TypedOperatorHandle<BiasActInPlace> bias_act_ =
      named<BiasActInPlace>("fusedshape::native_bias_act_");
  c10::TypedOperatorHandle<ActGrad> act_grad = named<ActGrad>("fusedshape::native_act_grad");
  c10::TypedOperatorHandle<Conv> conv = named<Conv>("fusedshape::native_conv");
  c10::TypedOperatorHandle<ConvAct> conv_act = named<ConvAct>("fusedshape::native_conv_act");
  c10::TypedOperatorHandle<ConvDgrad> dgrad = named<ConvDgrad>("fusedshape::native_conv_dgrad");
  c10::TypedOperatorHandle<ConvWgrad> wgrad = named<ConvWgrad>("fusedshape::native_conv_wgrad");

  static const Operators& all() {
    static const Operators found;
    return found;
  }
};

// What a step computes, and so which operands it has.
enum class Kind : int64_t { pass, linear, conv };

// The engine of one direction; the numbers are those of fusedshape/ops/plans.py.
enum class Engine : int64_t { aten, native };

// The gradients of a step's operands; undefined where none is wanted.
struct Grads {
  Tensor x, weight, bias;
};

struct Step {
  Kind kind;
  Constants act;
  bool from_output;  // backward works from the output
  bool has_bias;
  at::ScalarType bias_type;  // read where there is a bias
  int64_t dim;       // of the channels, for a pass
  Ints stride, padding, dilation;
  int64_t groups;
  Engine fprop, dgrad, wgrad;

  int64_t channel_dim(const Tensor& y) const {
    return kind == Kind::pass ? dim : kind == Kind::conv ? 1 : y.dim() - 1;
  }

  // x ⋆ W, without bias.
  Tensor product(const Tensor& x, const Tensor& weight) const {
    if (fprop == Engine::native) {
      return like_input(
          Operators::all().conv.call(dense(x), weight, stride, padding, dilation), x);
    }
    return kind == Kind::linear
               ? at::linear(x, weight)
               : at::convolution(x, weight, {}, stride, padding, dilation, false, zeros(), groups);
  }

  Tensor activated(const Tensor& z, const MaybeTensor& bias) const {
    return Operators::all().bias_act.call(z, bias, channel_dim(z), act.activation, act.slope,
                                          act.input_scale, act.input_shift, act.output_shift,
                                          act.output_scale);
  }

  // The output, without keeping anything else.
  Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) const {
    if (kind == Kind::pass) {
      return activated(x, bias);
    }
    if (fprop == Engine::native) {
      return like_input(
          Operators::all().conv_act.call(dense(x), weight, bias, {}, 0.0, stride, padding, dilation,
                                         act.activation, act.slope, act.input_scale,
                                         act.input_shift, act.output_shift, act.output_scale),
          x);
    }
    Tensor y = product(x, weight);
    Operators::all().bias_act_.call(y, bias, channel_dim(y), act.activation, act.slope,
                                    act.input_scale, act.input_shift, act.output_shift,
                                    act.output_scale);
    return y;
  }

  // The gradient of the pre-activation, and its sums where `sums`.
  std::tuple<Tensor, Tensor> through(const Tensor& grad, const Tensor& saved,
                                     const MaybeTensor& bias, bool sums) const {
    return Operators::all().act_grad.call(grad, saved, bias, channel_dim(saved), act.activation,
                                          act.slope, act.input_scale, act.input_shift,
                                          act.output_shift, act.output_scale, from_output, sums);
  }

  // The gradients of x and the weight from that of their product.
  std::tuple<Tensor, Tensor> product_grads(const Tensor& dz, const Tensor& x, const Tensor& weight,
                                           bool want_x, bool want_weight) const {
    Tensor dx, dweight;
    if (kind == Kind::conv) {
      const bool torch_x = want_x && dgrad == Engine::aten;
      const bool torch_weight = want_weight && wgrad == Engine::aten;
      if (torch_x || torch_weight) {
        std::tie(dx, dweight, std::ignore) =
            at::convolution_backward(dz, x, weight, {}, stride, padding, dilation, false, zeros(),
                                     groups, {torch_x, torch_weight, false});
      }
    } else {
      if (want_x && dgrad == Engine::aten) {
        dx = at::matmul(dz, weight);
      }
      if (want_weight && wgrad == Engine::aten) {
        dweight = at::mm(rows(dz).t(), rows(x));
      }
    }
    if (want_x && dgrad == Engine::native) {
      const Tensor dense_dz = dense(dz);
      const Ints sizes = kind == Kind::conv ? x.sizes().vec()
                                            : Ints{dense_dz.size(0), weight.size(1)};
      // The operator takes the constants of the layer before, of which there is none.
      dx = std::get<0>(Operators::all().dgrad.call(
          dense_dz, weight, {}, {}, c10::fromIntArrayRefSlow(sizes), stride, padding, dilation, 0,
          0.0, 1.0, 0.0, 0.0, 1.0, true, false));
      dx = dx.view(x.sizes());
    }
    if (want_weight && wgrad == Engine::native) {
      dweight = Operators::all().wgrad.call(dense(dz), dense(x),
                                            c10::fromIntArrayRefSlow(weight.sizes()), stride,
                                            padding, dilation);
    }
    return {dx, dweight};
  }

 private:
  Ints zeros() const { return Ints(stride.size(), 0); }

  static Tensor rows(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

  // The same numbers as our convolutions take them: channels innermost, or a matrix.
  Tensor dense(const Tensor& x) const {
    return kind == Kind::linear ? rows(x).contiguous()
                                : x.movedim(1, -1).contiguous().movedim(-1, 1);
  }

  // A linear layer's output with the input's leading dimensions; no view, because autograd rejects
  // writing in place on a view that a function returned.
  Tensor like_input(const Tensor& y, const Tensor& x) const {
    if (y.dim() == x.dim()) {
      return y;
    }
    Ints sizes = x.sizes().vec();
    sizes.back() = y.size(-1);
    return at::_unsafe_view(y, sizes);
  }
};

}  // namespace fusedshape
