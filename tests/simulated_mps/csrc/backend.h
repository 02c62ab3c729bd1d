// Registration of the device with torch, and its settings that are not counters.
#pragma once

#include <ATen/core/Generator.h>

#include <utility>

namespace simulated_mps {

void install_backend();
void set_macos_version(unsigned major, unsigned minor);
std::pair<unsigned, unsigned> macos_version();
void set_memory_fraction(double ratio);  // of the recommended working set; 0 = no ceiling

const at::Generator& default_generator();
at::Generator cpu_generator(const at::Generator& generator);  // the CPU generator behind a device generator

}  // namespace simulated_mps
