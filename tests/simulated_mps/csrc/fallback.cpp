#include "fallback.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>

#include "backend.h"
#include "interception.h"
#include "state.h"
#include "tensors.h"

namespace simulated_mps {

namespace {

using torch::jit::Stack;

std::string full_name(const c10::OperatorName& name) {
  std::string text = name.name.rfind("aten::", 0) == 0 ? name.name.substr(6) : name.name;
  return name.overload_name.empty() ? text : text + "." + name.overload_name;
}

// "expm1_.out" -> "expm1": what counters and rules call it, whatever the variant.
std::string base_name(const std::string& full) {
  std::string base = full.substr(0, full.find('.'));
  if (base.size() > 1 && base.back() == '_' && base[base.size() - 2] != '_') base.pop_back();
  return base;
}

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

// Operations whose result's shape depends on the data: the host has to wait for it.
bool waits_for_data(const std::string& name) {
  static const std::unordered_set<std::string> names{"_local_scalar_dense", "nonzero", "masked_select", "_unique2",
                                                     "unique_dim", "unique_consecutive", "equal", "is_nonzero"};
  return names.count(name) > 0;
}

// Whether the operation runs on the CPU in this torch version; raises MPS's error where it does not run at all.
bool runs_on_cpu(const c10::OperatorName& operation, const std::string& name) {
  const OpTable& table = state().table;
  if (table.always_on_cpu.count(name)) return true;
  if (!table.missing.count(name)) return false;
  TORCH_CHECK_NOT_IMPLEMENTED(
      table.cpu_fallback_allowed, "The operator '", operation.name, operation.overload_name.empty() ? "" : ".",
      operation.overload_name,
      "' is not currently implemented for the MPS device. If you want this op to be considered for addition please "
      "comment on https://github.com/pytorch/pytorch/issues/141287 and mention use-case, that resulted in missing op "
      "as well as commit hash. As a temporary fix, you can set the environment variable "
      "`PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback for this op. WARNING: this will be slower than "
      "running natively on MPS.");
  return true;
}

// One call on its way through the fallback.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op),
        schema_(op.schema()),
        stack_(stack),
        name_(full_name(schema_.operator_name())),
        base_(base_name(name_)),
        count_(schema_.arguments().size()),
        originals_(stack->end() - static_cast<std::ptrdiff_t>(count_), stack->end()) {}

  void run() {
    on_cpu_ = runs_on_cpu(schema_.operator_name(), name_);
    const bool rules_apply = intercepted(base_);
    inspect_arguments();
    if (state().dry() && run_dry(rules_apply)) return;
    take_arguments_to_cpu();
    std::optional<Interception> rules;
    if (rules_apply) {
      NamedValues named = named_arguments([this](size_t i) { return (*stack_)[first() + i]; });
      rules.emplace(base_, named);
      for (size_t i = 0; i < count_; i++) (*stack_)[first() + i] = named[i].second;
    }
    op_.callBoxed(stack_);
    if (rules) rules->finish(result_tensors(*stack_));
    bring_results_back();
    count();
  }

 private:
  size_t first() const { return stack_->size() - count_; }

  template <typename Function>
  static void each_tensor(const c10::IValue& value, const Function& function) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) function(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) function(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector()) {
        if (tensor && tensor->defined()) function(*tensor);
      }
    }
  }

  template <typename Function>
  static c10::IValue map_tensors(const c10::IValue& value, const Function& function) {
    if (value.isTensor()) return value.toTensor().defined() ? c10::IValue(function(value.toTensor())) : value;
    if (value.isTensorList()) {
      c10::List<at::Tensor> mapped;
      for (const at::Tensor& tensor : value.toTensorVector()) mapped.push_back(function(tensor));
      return mapped;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> mapped;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        mapped.push_back(tensor && tensor->defined() ? std::optional<at::Tensor>(function(*tensor)) : std::nullopt);
      }
      return mapped;
    }
    return value;
  }

  template <typename Function>
  NamedValues named_arguments(const Function& value_at) const {
    NamedValues named;
    for (size_t i = 0; i < count_; i++) named.emplace_back(schema_.arguments()[i].name(), value_at(i));
    return named;
  }

  std::vector<at::Tensor> result_tensors(const Stack& stack) const {
    std::vector<at::Tensor> tensors;
    for (size_t i = stack.size() - schema_.returns().size(); i < stack.size(); i++) {
      each_tensor(stack[i], [&](const at::Tensor& tensor) { tensors.push_back(tensor); });
    }
    return tensors;
  }

  void note(const at::Tensor& tensor) {
    bytes_ += tensor.numel() * static_cast<int64_t>(tensor.element_size());
    largest_ = std::max<int64_t>(largest_, tensor.numel());
  }

  // ---- what MPS refuses

  void inspect_arguments() {
    for (size_t i = 0; i < count_; i++) {
      const c10::IValue& value = originals_[i];
      const std::string& argument = schema_.arguments()[i].name();
      each_tensor(value, [this](const at::Tensor& tensor) { inspect(tensor); });
      if (value.isInt() && argument == "dtype") refuse_float64(static_cast<c10::ScalarType>(value.toInt()));
      if (value.isGenerator() && value.toGenerator().defined()) {
        const c10::Device device = value.toGenerator().device();
        TORCH_CHECK(device.is_mps(), "Expected a 'mps' device type for generator but found '", device.type(), "'");
      }
    }
  }

  void inspect(const at::Tensor& tensor) {
    if (tensor.device().is_mps()) {
      if (name_ != "equal") refuse_cast(tensor.scalar_type());
      note(tensor);
      return;
    }
    // 0-dim CPU tensors act as numbers, and indices may lie on the CPU.
    const bool index = starts_with(name_, "index") || starts_with(name_, "_index_put") ||
                       starts_with(name_, "_unsafe_index");
    const bool allowed = tensor.dim() == 0 || (index && !starts_with(name_, "index_select")) || !tensor.is_cpu();
    const bool graph = base_ == "index_select" || base_ == "linear" || base_ == "mm" || base_ == "bmm" || base_ == "addmm";
    TORCH_CHECK(allowed || !graph, "Placeholder storage has not been allocated on MPS device!");
    TORCH_CHECK(allowed, "Expected all tensors to be on the same device, but found at least two devices, mps:0 and ",
                tensor.device(), "! (when checking argument in method ", schema_.operator_name().name, ")");
  }

  // ---- the way to the CPU kernel and back

  at::Tensor alias(const at::Tensor& tensor) {
    if (!tensor.device().is_mps()) return host_scalar(tensor);
    for (const auto& [device, cpu] : aliases_) {
      if (device.is_same(tensor)) return cpu;
    }
    aliases_.emplace_back(tensor, cpu_alias(tensor));
    return aliases_.back().second;
  }

  static at::Tensor host_scalar(const at::Tensor& tensor) {
    const bool misread = state().scalar_offset_ignored && tensor.dim() == 0 && tensor.storage_offset() != 0;
    return misread ? tensor.as_strided({}, {}, 0) : tensor;
  }

  void take_arguments_to_cpu() {
    for (size_t i = 0; i < count_; i++) {
      c10::IValue& value = (*stack_)[first() + i];
      if (value.isDevice() && value.toDevice().is_mps()) {
        value = c10::Device(c10::DeviceType::CPU);
      } else if (value.isGenerator() && value.toGenerator().defined()) {
        value = cpu_generator(value.toGenerator());
      } else if (value.isNone() && schema_.arguments()[i].name() == "generator") {
        value = cpu_generator(default_generator());
      } else {
        value = map_tensors(value, [this](const at::Tensor& tensor) { return alias(tensor); });
      }
    }
  }

  void bring_results_back() {
    const auto& returns = schema_.returns();
    const size_t start = stack_->size() - returns.size();
    for (size_t i = 0; i < returns.size(); i++) {
      const c10::AliasInfo* written = returns[i].alias_info();
      if (written && !written->isWrite()) written = nullptr;
      c10::IValue& value = (*stack_)[start + i];
      if (written && value.isTensor()) {
        const at::Tensor result = value.toTensor();
        value = written_argument(*written, result);
      } else {
        value = map_tensors(value, [this](const at::Tensor& tensor) { return device_result(tensor); });
      }
    }
  }

  // The argument that an in-place or out= variant returns. The CPU kernel may have resized its alias.
  at::Tensor written_argument(const c10::AliasInfo& written, const at::Tensor& result) {
    for (size_t i = 0; i < count_; i++) {
      const c10::AliasInfo* info = schema_.arguments()[i].alias_info();
      if (!info || !(*info == written) || !originals_[i].isTensor()) continue;
      at::Tensor original = originals_[i].toTensor();
      if (!original.device().is_mps()) return original;
      const at::Tensor cpu = alias(original);
      if (!cpu.sizes().equals(original.sizes())) original.resize_(cpu.sizes());
      if (cpu.storage().data() != original.storage().data()) cpu_alias(original).copy_(cpu);
      return original;
    }
    return device_result(result);
  }

  at::Tensor device_result(const at::Tensor& result) {
    if (!result.device().is_cpu()) return result;
    for (const auto& [device, cpu] : aliases_) {
      if (cpu.is_same(result)) return device;
      if (result.storage().data() && result.storage().data() == device.storage().data()) {
        return device_view(device, result);
      }
    }
    note(result);
    return adopt(result);
  }

  void count() {
    State& s = state();
    s.count(base_, bytes_, largest_);
    if (base_ == "_local_scalar_dense") s.count_copy(&Counters::device_to_host, bytes_);
    if (on_cpu_) {
      int64_t inputs = 0;
      for (const auto& [device, cpu] : aliases_) inputs += static_cast<int64_t>(cpu.nbytes());
      s.count_copy(&Counters::device_to_host, inputs);
      s.count_copy(&Counters::host_to_device, bytes_ - inputs);
    }
    if (on_cpu_ || waits_for_data(base_)) s.count_sync();
    if (on_cpu_) {  // after the wait, which does not cover what follows
      std::lock_guard<std::mutex> lock(s.mutex);
      s.counters.fell_back[base_]++;
      s.fallback_pending = true;
    }
  }

  // ---- dry mode

  // Whether the call was served by its meta kernel. Views run for real, since they touch no data, and so does
  // everything small and everything without a meta kernel.
  bool run_dry(bool rules_apply) {
    for (const auto& result : schema_.returns()) {
      if (result.alias_info() && !result.alias_info()->isWrite()) return false;
    }
    if (schema_.returns().empty() || name_ == "_local_scalar_dense") return false;
    Stack meta;
    for (const c10::IValue& value : originals_) {
      if (value.isDevice()) {
        meta.emplace_back(c10::Device(c10::kMeta));
      } else if (value.isGenerator()) {
        meta.emplace_back();
      } else {
        meta.push_back(map_tensors(value, [](const at::Tensor& tensor) {
          return tensor.device().is_mps() || tensor.dim() ? meta_like(tensor) : tensor;
        }));
      }
    }
    const Stack inputs = meta;
    try {
      op_.callBoxed(&meta);
    } catch (const std::exception&) {  // no meta kernel, or a refusal that the real call below repeats
      if (largest_ > state().dry_above) state().counters.dry_computed++;
      return false;
    }
    int64_t largest = largest_;
    for (const at::Tensor& tensor : result_tensors(meta)) largest = std::max<int64_t>(largest, tensor.numel());
    if (!state().dry(largest)) return false;
    if (rules_apply) {
      NamedValues named = named_arguments([&](size_t i) { return inputs[i]; });
      Interception(base_, named).finish(result_tensors(meta));
    }
    reserve_results(meta);
    count();
    return true;
  }

  void reserve_results(const Stack& meta) {
    const auto& returns = schema_.returns();
    stack_->erase(stack_->end() - static_cast<std::ptrdiff_t>(count_), stack_->end());
    for (size_t i = 0; i < returns.size(); i++) {
      const c10::AliasInfo* written = returns[i].alias_info();
      if (written && meta[i].isTensor() && push_written(*written, meta[i].toTensor())) continue;
      stack_->push_back(map_tensors(meta[i], [this](const at::Tensor& tensor) {
        const at::Tensor reserved = reserve_like(tensor);
        note(reserved);
        return reserved;
      }));
    }
  }

  bool push_written(const c10::AliasInfo& written, const at::Tensor& result) {
    for (size_t i = 0; i < count_; i++) {
      const c10::AliasInfo* info = schema_.arguments()[i].alias_info();
      if (!info || !(*info == written) || !originals_[i].isTensor()) continue;
      const at::Tensor original = originals_[i].toTensor();
      if (!result.sizes().equals(original.sizes())) original.resize_(result.sizes());
      stack_->emplace_back(original);
      return true;
    }
    return false;
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  Stack* stack_;
  const std::string name_;  // "mm.out"
  const std::string base_;  // "mm"
  const size_t count_;
  const std::vector<c10::IValue> originals_;
  std::vector<std::pair<at::Tensor, at::Tensor>> aliases_;  // device tensor, its CPU face
  int64_t bytes_ = 0, largest_ = 0;
  bool on_cpu_ = false;
};

}  // namespace

void fallback(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(); }

void refuse_cast(c10::ScalarType type) {
  TORCH_CHECK_TYPE(!state().table.uncastable.count(static_cast<int>(type)), "Trying to convert ", type,
                   " to the MPS backend but it does not have support for that dtype.");
}

}  // namespace simulated_mps
