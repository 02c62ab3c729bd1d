#pragma once

#include <torch/csrc/utils/pybind.h>

namespace simulated_mps {

void set_handler(pybind11::object callable);

}  // namespace simulated_mps
