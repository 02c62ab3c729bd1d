// The kernel of every operation that has none of its own: runs the CPU kernel over the device's memory.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace simulated_mps {

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// Raises MPS's TypeError for a type that the chosen torch version can hold on the device but not convert (float8).
void refuse_cast(c10::ScalarType type);

}  // namespace simulated_mps
