// The Python module: plans are looked up, made by Python where there are none, and run.
#include <Python.h>

#include <unordered_map>

#include "key.h"
#include "layer.h"

namespace fusedshape {
namespace {

constexpr const char* kCapsule = "fusedshape.step";
constexpr size_t kPlans = 4096;

// The step of each call that has been planned; null where Python computes it.
std::unordered_map<Key, const Known*, Key::Hash>& plans() {
  static auto* found = new std::unordered_map<Key, const Known*, Key::Hash>;
  return *found;
}

class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// Whether torch's operators in this thread do what they always do.
bool ordinary() {
  return undisturbed() && !at::impl::torch_function_mode_enabled() &&
         !at::autocast::is_autocast_enabled(at::kCPU) &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

Tensor run_step(const Known* known, const Tensor& x, const MaybeTensor& weight,
                const MaybeTensor& bias) {
  const auto wants = [](const MaybeTensor& t) { return t && t->requires_grad(); };
  if (at::GradMode::is_enabled() && (x.requires_grad() || wants(weight) || wants(bias))) {
    return LayerAct::apply(x, weight, bias, known);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return known->step.forward(x, weight.value_or(Tensor()), bias);
}

MaybeTensor operand(PyObject* object) {
  return object == Py_None ? MaybeTensor() : THPVariable_Unpack(object);
}

// The step of a call; null where Python computes it. An error of the planner is thrown.
const Known* planned(PyObject* planner, PyObject* const* args, Py_ssize_t count) {
  Key key;
  bool fits = key.add_object(planner);
  for (Py_ssize_t i = 0; fits && i < count; ++i) {
    fits = i < 3 ? key.add_tensor(args[i]) : key.add_argument(args[i]);
  }
  if (!fits) {
    return nullptr;
  }
  const auto found = plans().find(key);
  if (found != plans().end()) {
    return found->second;
  }
  THPObjectPtr capsule(PyObject_Vectorcall(planner, args, count, nullptr));
  if (!capsule) {
    throw_python_error();
  }
  const Known* known = nullptr;
  if (capsule.get() != Py_None) {
    known = static_cast<const Known*>(PyCapsule_GetPointer(capsule, kCapsule));
    if (!known) {
      throw_python_error();
    }
  }
  if (plans().size() >= kPlans) {
    plans().clear();
  }
  plans().emplace(std::move(key), known);
  return known;
}

// run(planner, x, weight, bias, *arguments): the result, or None where Python must compute it.
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count >= 4, "run: takes a planner, x, weight, bias and the other arguments");
  if (!ordinary() || args[1] == Py_None) {
    Py_RETURN_NONE;
  }
  const Known* known = planned(args[0], args + 1, count - 1);
  if (!known) {
    Py_RETURN_NONE;
  }
  const Tensor x = THPVariable_Unpack(args[1]);
  const MaybeTensor weight = operand(args[2]), bias = operand(args[3]);
  Tensor y;
  {
    const Unlocked unlocked;
    y = run_step(known, x, weight, bias);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

bool read_ints(PyObject* list, Ints& to) {
  const THPObjectPtr fast(PySequence_Fast(list, "a step's sizes must be a list"));
  if (!fast) {
    return false;
  }
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.get()); ++i) {
    to.push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(fast.get(), i)));
  }
  return !PyErr_Occurred();
}

// step(kind, constants, from_output, dim, (stride, padding, dilation), groups, engines, has_bias,
// wide_bias, again): a capsule of the step, which lives as long as the process.
PyObject* step(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  long long kind, dim, groups, fprop, dgrad, wgrad, activation;
  int from_output, has_bias, wide_bias;
  double constants[5];
  PyObject *stride, *padding, *dilation, *formula;
  if (!PyArg_ParseTuple(args, "L(Lddddd)pL(OOO)L(LLL)ppO", &kind, &activation, &constants[0],
                        &constants[1], &constants[2], &constants[3], &constants[4], &from_output,
                        &dim, &stride, &padding, &dilation, &groups, &fprop, &dgrad, &wgrad,
                        &has_bias, &wide_bias, &formula)) {
    return nullptr;
  }
  Step made{static_cast<Kind>(kind),
            {activation, constants[0], constants[1], constants[2], constants[3], constants[4]},
            from_output != 0,
            has_bias != 0,
            wide_bias != 0 ? at::kDouble : at::kFloat,
            dim,
            {},
            {},
            {},
            groups,
            static_cast<Engine>(fprop),
            static_cast<Engine>(dgrad),
            static_cast<Engine>(wgrad)};
  if (!read_ints(stride, made.stride) || !read_ints(padding, made.padding) ||
      !read_ints(dilation, made.dilation)) {
    return nullptr;
  }
  Operators::all();  // an operator that is missing raises its error here
  Py_INCREF(formula);
  return PyCapsule_New(new Known{std::move(made), formula}, kCapsule, nullptr);
  END_HANDLE_TH_ERRORS
}

PyObject* forget(PyObject*, PyObject*) {
  plans().clear();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run)), METH_FASTCALL, nullptr},
    {"step", step, METH_VARARGS, nullptr},
    {"forget", forget, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fusedshape_host", nullptr, -1, methods};

}  // namespace
}  // namespace fusedshape

PyMODINIT_FUNC PyInit_fusedshape_host() { return PyModule_Create(&fusedshape::definition); }
