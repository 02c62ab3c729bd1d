#include "state.h"

#include <ATen/record_function.h>
#include <c10/util/Exception.h>

#include <cstdio>
#include <cstdlib>

namespace simulated_mps {

namespace {

constexpr size_t kPage = 16384;  // Apple Silicon's page

thread_local std::string operation;
thread_local int operation_depth = 0;

std::string size_text(size_t bytes, double unit, const char* name) {
  char text[64];
  std::snprintf(text, sizeof text, "%.2f %s", static_cast<double>(bytes) / unit, name);
  return text;
}

std::string gib(size_t bytes) { return size_text(bytes, 1073741824.0, "GiB"); }

// The watermark ratios as MPSAllocator reads them, at the first allocation. Unset means no ceiling here, because the
// real default of 1.7 times the working set says nothing about the machine that simulates.
void ceiling_from_environment(Limits& limits) {
  const char* high_text = std::getenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO");
  const char* low_text = std::getenv("PYTORCH_MPS_LOW_WATERMARK_RATIO");
  if (!high_text && !low_text) return;
  const double high = high_text ? std::atof(high_text) : 1.7;
  const double low = low_text ? std::atof(low_text) : 1.4;
  TORCH_CHECK(high >= 0.0 && high <= 2.0, "invalid high watermark ratio ", high);
  TORCH_CHECK(low >= 0.0 && low <= (high == 0.0 ? 2.0 : high), "invalid low watermark ratio ", low);
  if (limits.ceiling == 0) limits.ceiling = static_cast<size_t>(high * static_cast<double>(limits.recommended));
}

std::unique_ptr<at::ObserverContext> operation_starts(const at::RecordFunction& function) {
  if (operation_depth++ == 0) {
    const std::string name = function.name();
    operation = name.rfind("aten::", 0) == 0 ? name.substr(6) : name;
  }
  return nullptr;
}

void operation_ends(const at::RecordFunction&, at::ObserverContext*) {
  if (--operation_depth == 0) operation.clear();
}

}  // namespace

State& state() {
  static State* instance = new State;  // never destroyed: tensors may outlive every static
  return *instance;
}

const std::string& current_operation() { return operation; }

void watch_operations() {
  at::addGlobalCallback(
      at::RecordFunctionCallback(operation_starts, operation_ends).scopes({at::RecordScope::FUNCTION}));
}

void refuse_float64(c10::ScalarType type) {
  if (type != c10::kDouble && type != c10::kComplexDouble) return;
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().counters.float64_ops[operation.empty() ? "unknown" : operation]++;
  }
  TORCH_CHECK_TYPE(false,
                   "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                   "Please use float32 instead.");
}

// ---- allocator's books

Block Memory::acquire(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  Limits& limits = state().limits;
  if (!asked_environment_) {
    asked_environment_ = true;
    ceiling_from_environment(limits);
  }
  TORCH_CHECK(limits.max_buffer == 0 || bytes <= limits.max_buffer, "Invalid buffer size: ", gib(bytes));
  Block block{bytes, (bytes + kPage - 1) / kPage * kPage, 0};
  const auto cached = cache_.lower_bound(block.driver_bytes);
  if (cached != cache_.end() && *cached <= 2 * block.driver_bytes) {
    block.driver_bytes = *cached;
    cached_ -= *cached;
    cache_.erase(cached);
  }
  if (limits.ceiling && driver_live_ + cached_ + block.driver_bytes > limits.ceiling) {
    cache_.clear();
    cached_ = 0;
  }
  if (limits.ceiling && live_ + bytes > limits.ceiling) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "MPS backend out of memory (MPS allocated: ", gib(live_),
                     ", other allocations: 0 bytes, max allowed: ", gib(limits.ceiling), "). Tried to allocate ",
                     size_text(bytes, 1048576.0, "MiB"),
                     " on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory "
                     "allocations (may cause system failure).");
  }
  live_ += bytes;
  driver_live_ += block.driver_bytes;
  peak_ = std::max(peak_, live_);
  state().counters.allocations++;
  if (recording_) {
    block.label = current_label();
    events_.push_back({block.label, static_cast<int64_t>(bytes)});
  }
  return block;
}

void Memory::release(const Block& block) {
  std::lock_guard<std::mutex> lock(mutex_);
  live_ -= block.bytes;
  driver_live_ -= block.driver_bytes;
  cached_ += block.driver_bytes;
  cache_.insert(block.driver_bytes);
  if (recording_) events_.push_back({block.label, -static_cast<int64_t>(block.bytes)});
}

void Memory::empty_cache() {
  std::lock_guard<std::mutex> lock(mutex_);
  cache_.clear();
  cached_ = 0;
}

void Memory::reset_peak() {
  std::lock_guard<std::mutex> lock(mutex_);
  peak_ = live_;
  recorded_from_ = live_;
  events_.clear();
}

void Memory::record(bool on) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (on && !recording_) {
    events_.clear();
    recorded_from_ = live_;
  }
  recording_ = on;
}

int32_t Memory::current_label() {
  const auto key = std::make_pair(operation, state().module);
  const auto [entry, added] = label_numbers_.emplace(key, static_cast<int32_t>(labels_.size()));
  if (added) labels_.push_back(key);
  return entry->second;
}

std::vector<std::pair<std::string, std::string>> Memory::labels() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return labels_;
}

std::vector<TimelineEvent> Memory::events() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return events_;
}

// ---- counters

void State::count(const std::string& op, int64_t bytes, int64_t largest) {
  std::lock_guard<std::mutex> lock(mutex);
  OpCount& entry = counters.ops[op];
  entry.calls++;
  entry.bytes += bytes;
  entry.largest = std::max(entry.largest, largest);
}

void State::count_copy(CopyCount Counters::* direction, int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  CopyCount& copies = counters.*direction;
  copies.copies++;
  copies.bytes += bytes;
}

void State::count_sync() {
  std::lock_guard<std::mutex> lock(mutex);
  counters.syncs++;
  fallback_pending = false;
}

void State::reset() {
  memory.reset_peak();
  std::lock_guard<std::mutex> lock(mutex);
  counters = Counters();
}

}  // namespace simulated_mps
