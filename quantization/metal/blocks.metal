// Decoding of ggml blocks: what all formats and all kernels share. What is compiled is this file, the kernels
// (dequantize.metal or matmul.metal) and one format's file, which ends with the instances it needs: KERNELS(...).
//
// A format is a struct with
//   WEIGHTS       weights in a block
//   BLOCK_BYTES   bytes of a block
//   LANES         threads that share a block
//   decode<READ>(block, lane, out): thread `lane` of a block gives its WEIGHTS / LANES weights to `out`, the place of
//                 the block's first weight, by write(out, at, four weights); READ loads from the block.
//
// Every byte of quants is read by one thread and every weight written by one thread. Threads that follow each other
// read words that follow each other and write groups of four weights that follow each other. Only a block's scales
// (in Q5_0 and Q5_1 its fifth bits too) are read by several of its threads, at one address in one instruction. There
// is neither threadgroup memory nor a barrier.
//
// Results equal ggml's to the last bit: float32 arithmetic in its order, then one rounding to T. Products of a
// float16 scale, a sub-block's scale and a quant have at most 11 + 6 + 5 bits (Q6_K: 11 + 7 + 5), so they are exact in
// float32 and even a compiler that ignores the pragma below and contracts would change nothing.
#include <metal_stdlib>
using namespace metal;
#pragma METAL fp contract(off)

// Loads from memory of which only the given alignment is known.
template <int ALIGNMENT>
struct Read;

template <>
struct Read<4> {
  static uint word(device const uchar* from) { return *(device const uint*)(from); }
  static ushort half_word(device const uchar* from) { return *(device const ushort*)(from); }
};

template <>
struct Read<2> {
  static ushort half_word(device const uchar* from) { return *(device const ushort*)(from); }
  static uint word(device const uchar* from) { return uint(half_word(from)) | uint(half_word(from + 2)) << 16; }
};

template <>
struct Read<1> {
  static ushort half_word(device const uchar* from) { return ushort(uint(from[0]) | uint(from[1]) << 8); }
  static uint word(device const uchar* from) { return uint(half_word(from)) | uint(half_word(from + 2)) << 16; }
};

template <typename READ>
inline float float16_at(device const uchar* from) {
  return float(as_type<half>(READ::half_word(from)));
}

// The four bytes of a word as numbers.
inline float4 unsigned_bytes(uint word) { return float4(as_type<uchar4>(word)); }
inline float4 signed_bytes(uint word) { return float4(as_type<char4>(word)); }

// Four weights in one store; `out + at` is a multiple of four weights from the start of the output.
template <typename T>
inline void write(device T* out, uint at, float4 weights) {
  vec<T, 4> rounded;
  rounded.x = T(weights.x);
  rounded.y = T(weights.y);
  rounded.z = T(weights.z);
  rounded.w = T(weights.w);
  *(device vec<T, 4>*)(out + at) = rounded;
}

#define KERNEL(name, function, ...) \
  template [[host_name(name)]] [[kernel]] decltype(function<__VA_ARGS__>) function<__VA_ARGS__>;

// Metal 3.0 (macOS 13) has no bfloat.
#if __METAL_VERSION__ >= 310
#define IF_BFLOAT(...) __VA_ARGS__
#else
#define IF_BFLOAT(...)
#endif
