// Metal's keywords, types and functions for clang's C++17, in place of <metal_stdlib>.
//
// With METAL_ADDRESS_SPACES, `device`, `constant` and `threadgroup` are address spaces that clang checks as Metal does
// (the object file is of no use: the CPU has one address space). Without it they mean nothing and the code runs.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifndef METAL_ADDRESS_SPACES
#include "threads.h"
#endif

#ifdef METAL_ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif
#define thread
#define kernel

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

#define METAL_VECTORS(T)                                  \
  typedef T T##2 __attribute__((ext_vector_type(2)));     \
  typedef T T##3 __attribute__((ext_vector_type(3)));     \
  typedef T T##4 __attribute__((ext_vector_type(4)));
METAL_VECTORS(char)
METAL_VECTORS(uchar)
METAL_VECTORS(short)
METAL_VECTORS(ushort)
METAL_VECTORS(int)
METAL_VECTORS(uint)
METAL_VECTORS(long)
METAL_VECTORS(ulong)
METAL_VECTORS(float)
METAL_VECTORS(half)
METAL_VECTORS(bfloat)

namespace metal_on_cpu {

template <typename V>
struct Shape {
  typedef V Element;
  static constexpr int size = 1;
};
template <typename T, int N>
struct Shape<T __attribute__((ext_vector_type(N)))> {
  typedef T Element;
  static constexpr int size = N;
};

template <typename V>
inline void append(V&, int&) {}
template <typename V, typename First, typename... Rest>
inline void append(V& result, int& at, First first, Rest... rest) {
  typedef typename Shape<V>::Element Element;
  if constexpr (Shape<First>::size == 1) {
    result[at++] = Element(first);
  } else {
    for (int i = 0; i < Shape<First>::size; ++i) result[at++] = Element(first[i]);
  }
  append(result, at, rest...);
}

// A vector's constructor: from one scalar for all components, or from scalars and vectors that fill them in order.
template <typename V, typename... Arguments>
inline V make(Arguments... arguments) {
  V result = {};
  int at = 0;
  append(result, at, arguments...);
  if (at == 1) {
    for (int i = 1; i < Shape<V>::size; ++i) result[i] = result[0];
  }
  return result;
}

// Arguments of a kernel, from the launcher's addresses.
struct Pointer {
  void* address;
  template <typename T>
  operator T*() const { return static_cast<T*>(address); }
};
struct Reference {
  void* address;
  template <typename T>
  operator T&() const { return *static_cast<T*>(address); }
};

}  // namespace metal_on_cpu

#define char4(...) metal_on_cpu::make<char4>(__VA_ARGS__)
#define uchar4(...) metal_on_cpu::make<uchar4>(__VA_ARGS__)
#define ushort4(...) metal_on_cpu::make<ushort4>(__VA_ARGS__)
#define int4(...) metal_on_cpu::make<int4>(__VA_ARGS__)
#define uint2(...) metal_on_cpu::make<uint2>(__VA_ARGS__)
#define uint4(...) metal_on_cpu::make<uint4>(__VA_ARGS__)
#define ulong2(...) metal_on_cpu::make<ulong2>(__VA_ARGS__)
#define float2(...) metal_on_cpu::make<float2>(__VA_ARGS__)
#define float4(...) metal_on_cpu::make<float4>(__VA_ARGS__)

template <typename To, typename From>
inline To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, value);
}

namespace metal {

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <typename A, typename B>
constexpr bool is_same_v = __is_same(A, B);

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

template <typename T>
inline T fma(T a, T b, T c) { return __builtin_elementwise_fma(a, b, c); }
template <typename T>
inline T min(T a, T b) { return b < a ? b : a; }
template <typename T>
inline T max(T a, T b) { return a < b ? b : a; }
template <typename T>
inline T select(T no, T yes, bool condition) { return condition ? yes : no; }

}  // namespace metal

#include "simdgroup.h"
