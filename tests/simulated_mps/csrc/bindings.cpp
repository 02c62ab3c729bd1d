// What the Python side of the simulated device calls.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "backend.h"
#include "fallback.h"
#include "python_handler.h"
#include "state.h"

namespace py = pybind11;

namespace simulated_mps {

namespace {

// Composites of a CPU build that have a kernel on MPS in some torch versions: fused ones, and those that make a trip to
// the CPU. They get the fallback as their kernel when the chosen version has it.
void register_own_kernels(const std::vector<std::string>& names) {
  static auto* library = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::MPS, __FILE__, __LINE__);
  for (const std::string& name : names) {
    library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

void configure(const py::dict& table) {
  OpTable& t = state().table;
  t.missing = table["missing"].cast<std::unordered_set<std::string>>();
  t.always_on_cpu = table["always_on_cpu"].cast<std::unordered_set<std::string>>();
  t.uncastable = table["uncastable"].cast<std::unordered_set<int>>();
  t.prefill_attention = table["prefill_attention"].cast<bool>();
  t.vector_attention = table["vector_attention"].cast<bool>();
  t.cpu_fallback_allowed = table["cpu_fallback_allowed"].cast<bool>();
  register_own_kernels(table["own_kernels"].cast<std::vector<std::string>>());
}

py::dict stats() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  const Counters& c = s.counters;
  py::dict ops, result;
  for (const auto& [name, op] : c.ops) ops[py::str(name)] = py::make_tuple(op.calls, op.bytes, op.largest);
  result["ops"] = ops;
  result["fell_back"] = c.fell_back;
  result["float64_ops"] = c.float64_ops;
  result["live"] = s.memory.live();
  result["peak"] = s.memory.peak();
  result["host_to_device"] = py::make_tuple(c.host_to_device.copies, c.host_to_device.bytes);
  result["device_to_host"] = py::make_tuple(c.device_to_host.copies, c.device_to_host.bytes);
  result["device_to_device"] = py::make_tuple(c.device_to_device.copies, c.device_to_device.bytes);
  result["syncs"] = c.syncs;
  result["allocations"] = c.allocations;
  result["dry_computed"] = c.dry_computed;
  return result;
}

py::tuple timeline() {
  const Memory& memory = state().memory;
  py::list events;
  for (const TimelineEvent& event : memory.events()) events.append(py::make_tuple(event.label, event.bytes));
  return py::make_tuple(memory.recorded_from(), memory.labels(), events);
}

void set_limits(size_t ceiling, size_t max_buffer, size_t recommended) {
  state().limits = Limits{ceiling, max_buffer, recommended};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  install_backend();
  m.def("configure", &configure);
  m.def("set_macos_version", &set_macos_version);
  m.def("set_limits", &set_limits);
  m.def("set_max_buffer", [](size_t bytes) { state().limits.max_buffer = bytes; });
  m.def("max_buffer", [] { return state().limits.max_buffer; });
  m.def("recommended", [] { return state().limits.recommended; });
  m.def("set_memory_fraction", &set_memory_fraction);
  m.def("set_prefill_attention", [](bool on) { state().table.prefill_attention = on; });
  m.def("set_poison_empty", [](bool on) { state().poison_empty = on; });
  m.def("set_scalar_offset_ignored", [](bool on) { state().scalar_offset_ignored = on; });
  m.def("set_dry", [](int64_t above) { state().dry_above = above; });
  m.def("dry", [] { return state().dry(); });
  m.def("set_module", [](const std::string& name) { state().module = name; });
  m.def("intercept", [](std::unordered_set<std::string> ops) { state().intercepted = std::move(ops); });
  m.def("set_handler", &set_handler);
  m.def("record", [](bool on) { state().memory.record(on); });
  m.def("timeline", &timeline);
  m.def("stats", &stats);
  m.def("reset", [] { state().reset(); });
  m.def("synchronize", [] { state().count_sync(); });
  m.def("empty_cache", [] { state().memory.empty_cache(); });
  m.def("driver_allocated", [] { return state().memory.driver(); });
  m.def("default_generator", []() -> py::object {
    return py::reinterpret_steal<py::object>(THPGenerator_initDefaultGenerator(default_generator()));
  });
}

}  // namespace simulated_mps
