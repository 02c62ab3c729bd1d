// Threadgroup arrays, barriers, and what the threads of a simdgroup do together. Metal_stdlib.h includes this file.
//
// A simdgroup matrix is held by the first thread of its simdgroup, which does the work for all; the others' calls are
// only compared with it, function by function and address by address. So threads see a matrix through simdgroup_store
// alone, and memory that they wrote is in it only after a barrier, which the accesses are checked for.
#pragma once

#ifdef METAL_ADDRESS_SPACES
#define METAL_THREADGROUP_ARRAY(name, length, ...) static threadgroup __VA_ARGS__ name[length]
#define METAL_BODY(...) ;
#else
#define METAL_THREADGROUP_ARRAY(name, length, ...)                                                    \
  static metal_on_cpu::Array name##_place;                                                            \
  typedef __VA_ARGS__ name##_element;                                                                 \
  name##_element(&name)[length] = *static_cast<name##_element(*)[length]>(metal_on_cpu::allot(        \
      name##_place, sizeof(name##_element) * (length), alignof(name##_element)))
#define METAL_BODY(...) { __VA_ARGS__ }
#endif

#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)

#ifndef METAL_ADDRESS_SPACES
namespace metal_on_cpu {

// Gives `value` to the simdgroup; returns all threads' values, of which the present ones count.
template <typename T>
inline uint64_t* exchange(T value, int site) {
  static_assert(sizeof(T) <= 8, "simdgroup functions exchange at most eight bytes");
  Fibre& fibre = me();
  fibre.exchange ^= 1;
  uint64_t* values = state.exchanged[fibre.exchange];
  memcpy(&values[state.current], &value, sizeof(T));
  wait(AT_SIMDGROUP, site, false);
  return values;
}

template <typename T>
inline T exchanged(uint64_t* values, int thread_index) {
  T value;
  memcpy(&value, &values[thread_index], sizeof(T));
  return value;
}

inline int first_lane() { return state.current / LANES * LANES; }

template <typename T>
inline T from_lane(T value, uint lane, int site) {
  uint64_t* values = exchange(value, site);
  return exchanged<T>(values, first_lane() + int(lane % LANES));
}

// Whether this thread holds the simdgroup's matrices; all threads note the call.
inline bool holds_matrices(int site, const void* address = nullptr) {
  Fibre& fibre = me();
  fibre.trace = (fibre.trace ^ (uint64_t(site) << 48) ^ reinterpret_cast<uintptr_t>(address)) * 0x9E3779B97F4A7C15u;
  return state.current == first_lane();
}

template <typename T>
inline T* element(T* from, ulong row_length, ulong2 origin, bool transpose, int row, int column) {
  const ulong down = transpose ? column : row, across = transpose ? row : column;
  return from + (origin.y + down) * row_length + origin.x + across;
}

}  // namespace metal_on_cpu
#endif

namespace metal {

inline void threadgroup_barrier(mem_flags flags, int site = __builtin_LINE())
    METAL_BODY(metal_on_cpu::wait(metal_on_cpu::AT_BARRIER, site, uint(flags) & uint(mem_flags::mem_threadgroup));)
inline void simdgroup_barrier(mem_flags flags, int site = __builtin_LINE())
    METAL_BODY(metal_on_cpu::wait(metal_on_cpu::AT_SIMDGROUP, site, uint(flags) & uint(mem_flags::mem_threadgroup));)

template <typename T>
inline T simd_shuffle(T value, ushort lane, int site = __builtin_LINE())
    METAL_BODY(return metal_on_cpu::from_lane(value, lane, site);)
template <typename T>
inline T simd_broadcast(T value, ushort lane, int site = __builtin_LINE())
    METAL_BODY(return metal_on_cpu::from_lane(value, lane, site);)
template <typename T>
inline T simd_shuffle_xor(T value, ushort mask, int site = __builtin_LINE())
    METAL_BODY(return metal_on_cpu::from_lane(value, uint(metal_on_cpu::state.current) ^ mask, site);)
template <typename T>
inline T simd_sum(T value, int site = __builtin_LINE()) METAL_BODY(
    uint64_t* values = metal_on_cpu::exchange(value, site); T sum = T(0);
    for (int i = metal_on_cpu::first_lane(), end = i + metal_on_cpu::LANES; i < end; ++i) {
      if (metal_on_cpu::state.fibres[i].waiting != metal_on_cpu::ABSENT) {
        sum += metal_on_cpu::exchanged<T>(values, i);
      }
    } return sum;)

template <typename T, int COLUMNS, int ROWS>
struct simdgroup_matrix {
  static_assert(COLUMNS == 8 && ROWS == 8, "simdgroup matrices are 8 x 8");
  T elements[8][8];
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename T, int COLUMNS, int ROWS = COLUMNS>
__attribute__((noinline)) simdgroup_matrix<T, COLUMNS, ROWS> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, COLUMNS, ROWS> matrix;
  for (auto& row : matrix.elements) {
    for (T& element : row) element = value;
  }
  return matrix;
}

#define METAL_SIMDGROUP_LOAD(SPACE)                                                                               \
  template <typename T>                                                                                           \
  __attribute__((noinline)) void simdgroup_load(                                                                  \
      thread simdgroup_matrix<T, 8, 8>& matrix, SPACE const T* from, ulong row_length = 8, ulong2 origin = 0,     \
      bool transpose = false, int site = __builtin_LINE()) METAL_BODY(                                            \
      if (!metal_on_cpu::holds_matrices(site, from)) return; for (int row = 0; row < 8; ++row) {                  \
        for (int column = 0; column < 8; ++column) {                                                              \
          const T* at = metal_on_cpu::element(from, row_length, origin, transpose, row, column);                  \
          metal_on_cpu::access(at, sizeof(T), false);                                                             \
          matrix.elements[row][column] = *at;                                                                     \
        }                                                                                                         \
      })
#define METAL_SIMDGROUP_STORE(SPACE)                                                                              \
  template <typename T>                                                                                           \
  __attribute__((noinline)) void simdgroup_store(                                                                 \
      simdgroup_matrix<T, 8, 8> matrix, SPACE T* to, ulong row_length = 8, ulong2 origin = 0,                     \
      bool transpose = false, int site = __builtin_LINE()) METAL_BODY(                                            \
      if (!metal_on_cpu::holds_matrices(site, to)) return; for (int row = 0; row < 8; ++row) {                    \
        for (int column = 0; column < 8; ++column) {                                                              \
          T* at = metal_on_cpu::element(to, row_length, origin, transpose, row, column);                          \
          metal_on_cpu::access(at, sizeof(T), true);                                                              \
          *at = matrix.elements[row][column];                                                                     \
        }                                                                                                         \
      })
METAL_SIMDGROUP_LOAD(threadgroup)
METAL_SIMDGROUP_STORE(threadgroup)
#ifdef METAL_ADDRESS_SPACES
METAL_SIMDGROUP_LOAD(device)
METAL_SIMDGROUP_STORE(device)
#endif

// d = a b + c, in the order of the columns of a: Metal does not say in which order, nor whether it rounds in between.
template <typename D, typename A, typename B>
__attribute__((noinline)) void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a, thread simdgroup_matrix<B, 8, 8>& b,
    thread simdgroup_matrix<D, 8, 8>& c, int site = __builtin_LINE()) METAL_BODY(
    if (!metal_on_cpu::holds_matrices(site)) return; simdgroup_matrix<D, 8, 8> result;
    for (int row = 0; row < 8; ++row) {
      float sums[8];
      for (int column = 0; column < 8; ++column) sums[column] = float(c.elements[row][column]);
      for (int k = 0; k < 8; ++k) {
        const float factor = float(a.elements[row][k]);
        for (int column = 0; column < 8; ++column) sums[column] += factor * float(b.elements[k][column]);
      }
      for (int column = 0; column < 8; ++column) result.elements[row][column] = D(sums[column]);
    } d = result;)

}  // namespace metal

using metal::mem_flags;

#pragma clang attribute pop
