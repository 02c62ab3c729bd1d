// Lets the rules, which are written in Python, see an operation before and after it runs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <string>
#include <utility>
#include <vector>

namespace simulated_mps {

using NamedValues = std::vector<std::pair<std::string, c10::IValue>>;

// One intercepted call. Tensors reach Python as CPU tensors over the device's memory (in dry mode: as meta tensors).
// The constructor may replace tensors in ``arguments`` and may raise what the rule raises; finish() lets the rules
// change the results in place. Operations that a rule itself runs are CPU operations: they count nowhere.
class Interception {
 public:
  Interception(const std::string& op, NamedValues& arguments);
  Interception(const Interception&) = delete;
  Interception& operator=(const Interception&) = delete;
  ~Interception();
  void finish(const std::vector<at::Tensor>& results);

 private:
  void* call_ = nullptr;  // a Python object, kept out of this header
};

bool intercepted(const std::string& op);

}  // namespace simulated_mps
