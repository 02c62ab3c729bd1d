// Moves between the three faces of a tensor: on the simulated device, as a CPU tensor over the same memory (so that
// CPU kernels can work on it), and as a meta tensor (for dry mode).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

namespace simulated_mps {

inline const c10::Device kDevice(c10::DeviceType::MPS, 0);
inline const c10::DispatchKeySet kKeys(c10::DispatchKey::MPS);

at::Allocator* allocator();

// A CPU tensor over the memory of a device tensor; sizes, strides and offset are the same.
at::Tensor cpu_alias(const at::Tensor& tensor);

// Turns a fresh CPU tensor into a device tensor without a copy.
at::Tensor adopt(const at::Tensor& tensor);

// A device tensor over the storage of ``base`` with the geometry of ``view`` (a CPU view of it).
at::Tensor device_view(const at::Tensor& base, const at::Tensor& view);

at::Tensor meta_like(const at::Tensor& tensor);

// A device tensor of a meta tensor's geometry; its memory is reserved, never touched.
at::Tensor reserve_like(const at::Tensor& meta);

}  // namespace simulated_mps
