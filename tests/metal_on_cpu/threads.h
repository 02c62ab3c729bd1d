// How kernels run on the CPU, and how they are caught doing what is undefined on a GPU.
//
// Every thread of a threadgroup that may wait for others is a fibre. One runs until it waits or ends; when all threads
// of a simdgroup wait at the same simdgroup function they go on, and when all of the threadgroup wait at the same
// barrier they go on. The compiler calls access() before each load and store (its coverage instrumentation), which
// knows the buffers of the launch, the threadgroup arrays, the thread's own stack and the library's constants.
#pragma once
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#ifdef __APPLE__
#include <mach-o/ldsyms.h>
#define METAL_MODULE_BEGIN (reinterpret_cast<uintptr_t>(&_mh_dylib_header))
#define METAL_MODULE_BYTES (uintptr_t(1) << 24)
#else
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[];
extern "C" __attribute__((visibility("hidden"))) char _end[];
#define METAL_MODULE_BEGIN (reinterpret_cast<uintptr_t>(__ehdr_start))
#define METAL_MODULE_BYTES (uintptr_t(_end - __ehdr_start))
#endif

#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)

namespace metal_on_cpu {

enum Fault { NONE, ALIGNMENT, BOUNDS, BARRIER, SIMDGROUP, RACE, MEMORY };  // library.py has the words
enum Waiting { READY, AT_SIMDGROUP, AT_BARRIER, DONE, ABSENT };

constexpr int LANES = 32, MAX_THREADS = 1024, MAX_BUFFERS = 31;
constexpr uintptr_t STACK_BYTES = 64 << 10, ARENA_BYTES = 1 << 18, RED_ZONE = 256, THREADGROUP_BYTES = 32768;

struct Fibre {
  ucontext_t start;
  jmp_buf place;  // where it goes on; much quicker than another ucontext, which asks the kernel for signal masks
  bool started;
  Waiting waiting;
  int site;           // the line at which it waits
  bool orders;        // whether what it waits for orders accesses to threadgroup memory
  uint32_t exchange;  // 0 or 1: which of two places its next simdgroup exchange uses
  uint64_t trace;     // of the simdgroup matrix functions that it called, with their lines and addresses
};

struct Range {
  uintptr_t begin, bytes;
};

// Who touched a byte of threadgroup memory since the last barrier.
struct Touched {
  uint32_t write_epoch, read_epoch;
  uint32_t write_simd_epoch, read_simd_epoch;
  int16_t writer, reader;  // threads; a reader below zero stands for several: of simdgroup -1 - reader, or of more
};
constexpr int16_t MANY = -1000;

// A threadgroup array: where it lies in the arena.
struct Array {
  uintptr_t at, bytes;
  uint64_t group;
};

struct Position {
  uint32_t position[3], local[3], group[3], grid[3], size[3], groups[3], index, lane, simdgroup, simdgroups;
};

struct State {
  int fault;
  bool running, abandoned;
  Range buffers[MAX_BUFFERS];
  void* addresses[MAX_BUFFERS];
  int buffer_count, hit;
  Position here;
  void (*thread_function)();
  jmp_buf host;
  int current;
  uint64_t group;
  uintptr_t arena_used, group_bytes;
  uint32_t epoch, simd_epoch[MAX_THREADS / LANES];
  Fibre fibres[MAX_THREADS];
  uint64_t exchanged[2][MAX_THREADS];
};

static State state;
static char* stacks;
alignas(256) static char arena[ARENA_BYTES];
static uint8_t allotted[ARENA_BYTES];  // whether a byte of the arena belongs to an array
static Touched touched[ARENA_BYTES];

inline void note(Fault fault) {
  if (state.fault == NONE) state.fault = fault;
}

// The launch ends here: what would follow cannot be run.
[[noreturn]] inline void abandon(Fault fault) {
  note(fault);
  state.abandoned = true;
  state.running = false;
  _longjmp(state.host, 1);
}

// ---- accesses

inline bool same_simdgroup(int a, int b) { return a / LANES == b / LANES; }

inline bool touch(Touched& byte, bool write) {
  const int me = state.current, group = me / LANES;
  const uint32_t epoch = state.epoch, simd_epoch = state.simd_epoch[group];
  bool race = byte.write_epoch == epoch && byte.writer != me &&
              !(same_simdgroup(byte.writer, me) && byte.write_simd_epoch < simd_epoch);
  const bool read = byte.read_epoch == epoch;
  if (write) {
    const bool mine = byte.reader == me;
    const bool group_s = byte.reader == -1 - group || (byte.reader >= 0 && same_simdgroup(byte.reader, me));
    race |= read && !mine && !(group_s && byte.read_simd_epoch < simd_epoch);
    byte.write_epoch = epoch, byte.write_simd_epoch = simd_epoch, byte.writer = int16_t(me);
    return race;
  }
  if (!read) {
    byte.reader = int16_t(me);
  } else if (byte.reader != me) {
    const bool group_s = byte.reader == -1 - group || (byte.reader >= 0 && same_simdgroup(byte.reader, me));
    byte.reader = group_s ? int16_t(-1 - group) : MANY;
  }
  byte.read_epoch = epoch, byte.read_simd_epoch = simd_epoch;
  return race;
}

inline void access(const void* address, uintptr_t bytes, bool write) {
  if (!state.running) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const uintptr_t in_arena = at - reinterpret_cast<uintptr_t>(arena);
  if (in_arena < ARENA_BYTES) {
    for (uintptr_t i = in_arena; i < in_arena + bytes; ++i) {
      if (!allotted[i]) abandon(BOUNDS);
      if (touch(touched[i], write)) note(RACE);
    }
    return;
  }
  const Range& last = state.buffers[state.hit];
  if (at - last.begin < last.bytes && at - last.begin + bytes <= last.bytes) return;
  if (at - reinterpret_cast<uintptr_t>(stacks + state.current * STACK_BYTES) < STACK_BYTES) return;
  if (at - METAL_MODULE_BEGIN < METAL_MODULE_BYTES) return;
  for (int i = 0; i < state.buffer_count; ++i) {
    const Range& range = state.buffers[i];
    if (at - range.begin < range.bytes && at - range.begin + bytes <= range.bytes) {
      state.hit = i;
      return;
    }
  }
  abandon(BOUNDS);
}

// A threadgroup array's place, filled with ones (NaN in every float type) for each threadgroup anew. It is aligned as
// its type asks and no better.
inline void* allot(Array& array, uintptr_t bytes, uintptr_t alignment) {
  if (array.bytes == 0) {
    uintptr_t at = state.arena_used + RED_ZONE;
    at += (3 * alignment - at % (2 * alignment)) % (2 * alignment);
    if (at + bytes + RED_ZONE > ARENA_BYTES) abandon(MEMORY);
    array.at = at, array.bytes = bytes;
    state.arena_used = at + bytes;
  }
  if (array.group != state.group) {
    array.group = state.group;
    state.group_bytes += bytes;
    if (state.group_bytes > THREADGROUP_BYTES) abandon(MEMORY);
    memset(arena + array.at, 0xFF, bytes);
    memset(allotted + array.at, 1, bytes);
  }
  return arena + array.at;
}

// ---- waiting

inline Fibre& me() { return state.fibres[state.current]; }

inline void wait(Waiting kind, int site, bool orders) {
  Fibre& fibre = me();
  fibre.waiting = kind;
  fibre.site = site;
  fibre.orders = orders;
  state.running = false;
  if (_setjmp(fibre.place) == 0) _longjmp(state.host, 1);
}

[[noreturn]] inline void end() {
  me().waiting = DONE;
  state.running = false;
  _longjmp(state.host, 1);
}

inline void prepare(int index, void (*function)()) {
  Fibre& fibre = state.fibres[index];
  getcontext(&fibre.start);
  fibre.start.uc_stack.ss_sp = stacks + index * STACK_BYTES;
  fibre.start.uc_stack.ss_size = STACK_BYTES;
  fibre.start.uc_link = nullptr;
  fibre.started = false;
  fibre.waiting = READY;
  fibre.exchange = 0;
  fibre.trace = 0;
  makecontext(&fibre.start, function, 0);
}

inline void place(uint32_t index) {
  Position& here = state.here;
  here.local[0] = index % here.size[0];
  here.local[1] = index / here.size[0] % here.size[1];
  here.local[2] = index / (here.size[0] * here.size[1]);
  here.index = index, here.lane = index % LANES, here.simdgroup = index / LANES;
  for (int axis = 0; axis < 3; ++axis) here.position[axis] = here.group[axis] * here.size[axis] + here.local[axis];
}

inline bool inside() {
  const Position& here = state.here;
  return here.position[0] < here.grid[0] && here.position[1] < here.grid[1] && here.position[2] < here.grid[2];
}

inline void resume(int index) {
  place(index);
  state.current = index;
  state.running = true;
  if (_setjmp(state.host) != 0) return;
  Fibre& fibre = state.fibres[index];
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  setcontext(&fibre.start);
}

// Whether all threads from `first` to `end` wait for the same: for one thing, at one line.
inline bool together(int first, int end) {
  const Fibre* one = nullptr;
  for (int i = first; i < end; ++i) {
    const Fibre& fibre = state.fibres[i];
    if (fibre.waiting == ABSENT) continue;
    if (one == nullptr) one = &fibre;
    if (fibre.waiting != one->waiting || (fibre.waiting != DONE && fibre.site != one->site)) return false;
  }
  return true;
}

inline bool same_matrix_functions(int first, int end) {
  for (int i = first; i < end; ++i) {
    if (state.fibres[i].waiting != ABSENT && state.fibres[i].trace != state.fibres[first].trace) return false;
  }
  return true;
}

inline bool any(int first, int end, Waiting kind) {
  for (int i = first; i < end; ++i) {
    if (state.fibres[i].waiting == kind) return true;
  }
  return false;
}

inline void release(int first, int end) {
  for (int i = first; i < end; ++i) {
    if (state.fibres[i].waiting != ABSENT) state.fibres[i].waiting = READY;
  }
}

// Runs a simdgroup until its threads wait at a barrier or have ended.
inline bool run_simdgroup(int first, int end) {
  for (;;) {
    for (int i = first; i < end; ++i) {
      if (state.fibres[i].waiting == READY) resume(i);
      if (state.abandoned) return false;
    }
    const bool exchange = any(first, end, AT_SIMDGROUP);
    if (!same_matrix_functions(first, end) || (exchange && !together(first, end))) {
      note(SIMDGROUP);
      return false;
    }
    if (!exchange) return true;
    state.simd_epoch[first / LANES] += state.fibres[first].orders;
    release(first, end);
  }
}

inline bool run_group(int threads) {
  for (;;) {
    for (int first = 0; first < threads; first += LANES) {
      if (!run_simdgroup(first, first + LANES < threads ? first + LANES : threads)) return false;
    }
    if (!any(0, threads, AT_BARRIER)) return true;
    if (!together(0, threads)) {
      note(BARRIER);
      return false;
    }
    state.epoch += state.fibres[0].orders;
    release(0, threads);
  }
}

// ---- launching

inline uint32_t group_threads() { return state.here.size[0] * state.here.size[1] * state.here.size[2]; }

static void one_thread() {
  state.thread_function();
  end();
}

// Threads that never wait, one after another.
static void independent_threads() {
  for (uint32_t index = 0; index < group_threads(); ++index) {
    place(index);
    if (inside()) state.thread_function();
  }
  end();
}

inline bool next_group(bool cooperative) {
  ++state.epoch;
  ++state.group;
  state.group_bytes = 0;
  if (!cooperative) {
    prepare(0, independent_threads);
    resume(0);
    return !state.abandoned;
  }
  const int threads = int(group_threads());
  for (int i = 0; i < threads; ++i) {
    place(i);
    prepare(i, one_thread);
    if (!inside()) state.fibres[i].waiting = ABSENT;
  }
  return run_group(threads);
}

// Runs a kernel over its grid; returns the fault, or NONE.
static int launch(
    void (*thread_function)(), void** buffers, const uint64_t* bytes, int count, const uint64_t* grid,
    const uint64_t* size, bool cooperative) {
  if (stacks == nullptr) stacks = static_cast<char*>(malloc(MAX_THREADS * STACK_BYTES));
  state.fault = NONE;
  state.abandoned = false;
  state.thread_function = thread_function;
  state.buffer_count = count, state.hit = 0;
  for (int i = 0; i < count; ++i) {
    state.addresses[i] = buffers[i];
    state.buffers[i] = {reinterpret_cast<uintptr_t>(buffers[i]), uintptr_t(bytes[i])};
  }
  Position& here = state.here;
  for (int axis = 0; axis < 3; ++axis) {
    here.grid[axis] = uint32_t(grid[axis]), here.size[axis] = uint32_t(size[axis]);
    here.groups[axis] = (here.grid[axis] + here.size[axis] - 1) / here.size[axis];
  }
  here.simdgroups = (group_threads() + LANES - 1) / LANES;
  for (here.group[2] = 0; here.group[2] < here.groups[2]; ++here.group[2]) {
    for (here.group[1] = 0; here.group[1] < here.groups[1]; ++here.group[1]) {
      for (here.group[0] = 0; here.group[0] < here.groups[0]; ++here.group[0]) {
        if (!next_group(cooperative)) return state.fault;
      }
    }
  }
  return state.fault;
}

}  // namespace metal_on_cpu

// The compiler calls these: before each load and store, for an address that the type's alignment does not permit (a GPU
// would access other bytes), for an index outside an array, and to round to bfloat16 (to nearest, ties to even), which
// not every runtime library can.
#define METAL_ACCESSES(BYTES)                                                                                  \
  extern "C" void __sanitizer_cov_load##BYTES(void* at) { metal_on_cpu::access(at, BYTES, false); } \
  extern "C" void __sanitizer_cov_store##BYTES(void* at) { metal_on_cpu::access(at, BYTES, true); }
METAL_ACCESSES(1)
METAL_ACCESSES(2)
METAL_ACCESSES(4)
METAL_ACCESSES(8)
METAL_ACCESSES(16)
extern "C" void __ubsan_handle_type_mismatch_v1(void*, uintptr_t) { metal_on_cpu::note(metal_on_cpu::ALIGNMENT); }
extern "C" void __ubsan_handle_out_of_bounds(void*, uintptr_t) { metal_on_cpu::abandon(metal_on_cpu::BOUNDS); }
extern "C" __attribute__((weak)) __bf16 __truncsfbf2(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = value != value ? bits | 0x400000 : bits + 0x7FFF + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, uint16_t(rounded >> 16));
}

#pragma clang attribute pop
