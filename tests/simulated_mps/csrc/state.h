// What the simulated device knows about itself: the op table of the chosen torch version, the limits of the
// simulated Mac, counters, the allocator's books and the timeline of allocations. One instance per process.
#pragma once

#include <c10/core/ScalarType.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace simulated_mps {

struct OpCount {
  int64_t calls = 0;
  int64_t bytes = 0;    // inputs and outputs
  int64_t largest = 0;  // elements of the largest tensor involved
};

struct CopyCount {
  int64_t copies = 0;
  int64_t bytes = 0;
};

struct Counters {
  std::unordered_map<std::string, OpCount> ops;
  std::unordered_map<std::string, int64_t> fell_back;
  std::unordered_map<std::string, int64_t> float64_ops;
  CopyCount host_to_device, device_to_host, device_to_device;
  int64_t syncs = 0;
  int64_t allocations = 0;
  int64_t dry_computed = 0;  // ops that dry mode had to run because they have no meta kernel
};

// Behaviour of one torch version's MPS backend.
struct OpTable {
  std::unordered_set<std::string> missing;       // "op.overload" without an MPS kernel
  std::unordered_set<std::string> always_on_cpu;  // MPS kernels that are themselves a copy to the CPU and back
  std::unordered_set<int> uncastable;            // ScalarTypes that MPS can hold but not convert
  bool prefill_attention = true;                 // 2.13: attention over long sequences without a score matrix
  bool vector_attention = true;                  // 2.8: the same for at most 8 queries
  bool cpu_fallback_allowed = false;             // PYTORCH_ENABLE_MPS_FALLBACK=1
};

struct Limits {
  size_t ceiling = 0;  // bytes, 0 = none: the high watermark
  size_t max_buffer = 0;
  size_t recommended = size_t(48) << 30;
};

// One live buffer's entry in the books.
struct Block {
  size_t bytes = 0;         // what was asked for
  size_t driver_bytes = 0;  // what the driver holds for it: whole pages, or a larger buffer taken from the cache
  int32_t label = 0;
};

struct TimelineEvent {
  int32_t label;
  int64_t bytes;  // negative when freed
};

// Accounts for buffers the way MPSAllocator does: freed buffers stay with the driver until empty_cache, or until a
// request would pass the ceiling.
class Memory {
 public:
  Block acquire(size_t bytes);  // raises what MPS raises: buffer too large, out of memory
  void release(const Block& block);
  void empty_cache();
  void reset_peak();
  void record(bool on);  // starts or stops the timeline; starting forgets the previous one

  size_t live() const { return live_; }
  size_t peak() const { return peak_; }
  size_t driver() const { return driver_live_ + cached_; }
  std::vector<std::pair<std::string, std::string>> labels() const;  // (operation, module) by label number
  std::vector<TimelineEvent> events() const;
  size_t recorded_from() const { return recorded_from_; }

 private:
  int32_t current_label();

  mutable std::mutex mutex_;
  size_t live_ = 0, peak_ = 0, driver_live_ = 0, cached_ = 0;
  std::multiset<size_t> cache_;
  bool recording_ = false, asked_environment_ = false;
  size_t recorded_from_ = 0;
  std::vector<std::pair<std::string, std::string>> labels_{{"", ""}};
  std::map<std::pair<std::string, std::string>, int32_t> label_numbers_;
  std::vector<TimelineEvent> events_;
};

struct State {
  std::mutex mutex;
  OpTable table;
  Limits limits;
  Counters counters;
  Memory memory;
  std::string module;              // innermost module of the timeline's context
  int64_t dry_above = 0;           // elements; 0 = dry mode off
  bool poison_empty = false;       // fresh memory holds NaN
  bool scalar_offset_ignored = false;  // 0-dim CPU views are read from their storage's start
  bool fallback_pending = false;   // a CPU fallback ran since the last synchronisation
  std::unordered_set<std::string> intercepted;  // names (no overload) of the ops that a rule looks at

  bool dry() const { return dry_above > 0; }
  bool dry(int64_t elements) const { return dry_above > 0 && elements > dry_above; }
  void count(const std::string& op, int64_t bytes, int64_t largest);
  void count_copy(CopyCount Counters::* direction, int64_t bytes);
  void count_sync();
  void reset();
};

State& state();

// The outermost torch operation that runs on this thread ("linear", "to"), "" outside of any.
const std::string& current_operation();
void watch_operations();

// Raises MPS's TypeError for float64 and counts the attempt.
void refuse_float64(c10::ScalarType type);

}  // namespace simulated_mps
