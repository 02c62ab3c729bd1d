#include "interception.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "python_handler.h"
#include "state.h"

namespace py = pybind11;

namespace simulated_mps {

namespace {

py::object* handler = nullptr;  // called as handler(op, {name: value}); returns None or an object with finish(results)

py::object to_python(const c10::IValue& value) {
  if (value.isTensor()) return value.toTensor().defined() ? py::cast(value.toTensor()) : py::none();
  if (value.isTensorList()) return py::cast(value.toTensorVector());
  if (value.isInt()) return py::cast(value.toInt());
  if (value.isDouble()) return py::cast(value.toDouble());
  if (value.isBool()) return py::cast(value.toBool());
  if (value.isIntList()) return py::cast(value.toIntVector());
  if (value.isDoubleList()) return py::cast(value.toDoubleVector());
  if (value.isString()) return py::cast(value.toStringRef());
  return py::none();
}

}  // namespace

void set_handler(py::object callable) {
  delete handler;
  handler = callable.is_none() ? nullptr : new py::object(std::move(callable));
}

bool intercepted(const std::string& op) { return handler && state().intercepted.count(op); }

Interception::Interception(const std::string& op, NamedValues& arguments) {
  py::gil_scoped_acquire gil;
  py::dict named;
  for (const auto& [name, value] : arguments) named[py::str(name)] = to_python(value);
  const py::dict before = named.attr("copy")();
  py::object call = (*handler)(op, named);
  for (auto& [name, value] : arguments) {
    const py::object now = named[py::str(name)];
    if (!now.is(before[py::str(name)])) value = py::cast<at::Tensor>(now);
  }
  if (!call.is_none()) call_ = call.release().ptr();
}

void Interception::finish(const std::vector<at::Tensor>& results) {
  if (!call_) return;
  py::gil_scoped_acquire gil;
  py::handle(static_cast<PyObject*>(call_)).attr("finish")(py::cast(results));
}

Interception::~Interception() {
  if (!call_) return;
  py::gil_scoped_acquire gil;
  py::handle(static_cast<PyObject*>(call_)).dec_ref();
}

}  // namespace simulated_mps
