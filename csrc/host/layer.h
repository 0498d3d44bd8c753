// A step as an autograd node, with one saved activation.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>

#include "step.h"

namespace fusedshape {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Whether a tensor is plain numbers on the CPU: not of a class that dispatches itself, batched,
// conjugated, sparse or on another device.
inline bool is_plain(const Tensor& x) {
  constexpr c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                       c10::DispatchKey::ADInplaceOrView,
                                       c10::DispatchKey::AutocastCPU});
  return x.defined() && (x.key_set() | plain) == plain;
}

// Whether nothing watches or changes what torch's operators do in this thread: no mode, transform
// or tracer.
inline bool undisturbed() {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included | c10::default_included_set) == c10::default_included_set;
}

// A step as its nodes know it. It lives as long as the process, because nodes keep its address.
struct Known {
  Step step;
  PyObject* again;  // computes backward where it is differentiated again or transformed
};

[[noreturn]] inline void throw_python_error() {
  python_error error;
  error.persist();  // as the stack may be unwound without Python's lock
  throw error;
}

class PythonLock {
 public:
  PythonLock() : state_(PyGILState_Ensure()) {}
  ~PythonLock() { PyGILState_Release(state_); }
  PythonLock(const PythonLock&) = delete;
  PythonLock& operator=(const PythonLock&) = delete;

 private:
  PyGILState_STATE state_;
};

// What Python's formula makes of backward: again(grad, x, weight, saved, bias, wanted).
inline Grads again(PyObject* formula, const Tensor& grad, const variable_list& saved,
                   const std::array<bool, 3>& wanted) {
  const PythonLock lock;
  const THPObjectPtr result(PyObject_CallFunction(
      formula, "NNNNN(iii)", THPVariable_Wrap(grad), THPVariable_Wrap(saved[0]),
      THPVariable_Wrap(saved[1]), THPVariable_Wrap(saved[2]), THPVariable_Wrap(saved[3]),
      int{wanted[0]}, int{wanted[1]}, int{wanted[2]}));
  if (!result) {
    throw_python_error();
  }
  TORCH_CHECK(PyTuple_Check(result.get()) && PyTuple_GET_SIZE(result.get()) == 3,
              "a step's formula must return three gradients");
  const auto at = [&](Py_ssize_t i) {
    PyObject* one = PyTuple_GET_ITEM(result.get(), i);
    return one == Py_None ? Tensor() : THPVariable_Unpack(one);
  };
  return {at(0), at(1), at(2)};
}

class LayerAct : public torch::autograd::Function<LayerAct> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x,
                          const std::optional<Variable>& weight,
                          const std::optional<Variable>& bias, const Known* known) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Step& step = known->step;
    const Tensor w = weight.value_or(Tensor()), b = bias.value_or(Tensor());
    ctx->saved_data["step"] = reinterpret_cast<int64_t>(known);
    const Tensor input = step.kind == Kind::pass ? Tensor() : x;
    if (step.from_output) {
      Tensor y = step.forward(x, w, bias);
      ctx->save_for_backward({input, w, y, Tensor()});
      return y;
    }
    const Tensor z = step.kind == Kind::pass ? x : step.product(x, w);
    Tensor y = step.activated(z, bias);
    ctx->save_for_backward({input, w, z, b});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto* known = reinterpret_cast<const Known*>(ctx->saved_data["step"].toInt());
    const Step& step = known->step;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = grads[0], &x = saved[0], &weight = saved[1], &kept = saved[2];
    // Edges are counted without operands that there are not.
    const bool pass = step.kind == Kind::pass;
    const size_t edge = pass ? 1 : 2;
    const bool has_bias = step.has_bias;
    const std::array<bool, 3> wanted = {ctx->needs_input_grad(0),
                                        !pass && ctx->needs_input_grad(1),
                                        has_bias && ctx->needs_input_grad(edge)};
    Grads found;
    if (at::GradMode::is_enabled() || !undisturbed() || !is_plain(grad) || !is_plain(kept)) {
      found = again(known->again, grad, saved, wanted);
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      const MaybeTensor bias = saved[3].defined() ? MaybeTensor(saved[3]) : MaybeTensor();
      auto [dz, sums] = step.through(grad, kept, bias, wanted[2]);
      if (wanted[2]) {
        found.bias = sums.to(step.bias_type);
      }
      if (pass) {
        found.x = wanted[0] ? dz : Tensor();
      } else {
        std::tie(found.x, found.weight) =
            step.product_grads(dz, x, weight, wanted[0], wanted[1]);
      }
    }
    return {found.x, found.weight, found.bias, Tensor()};
  }
};

}  // namespace fusedshape
