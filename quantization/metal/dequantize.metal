// Decoding of ggml blocks: what all formats share. metal_kernels.py compiles this file followed by one format's.
//
// A format is a struct with
//   WEIGHTS       weights in a block
//   BLOCK_BYTES   bytes of a block
//   LANES         threads that share a block
//   decode<READ, T>(block, lane, out): thread `lane` of a block writes its WEIGHTS / LANES weights to `out`, the place of
//                 the block's first weight; READ loads from the block.
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

// All blocks of a tensor. Grid: LANES threads per block.
template <typename FORMAT, typename T, int ALIGNMENT>
[[kernel]] void dequantize(
    device const uchar* blocks [[buffer(0)]],
    device T* weights [[buffer(1)]],
    uint index [[thread_position_in_grid]]) {
  const ulong block = index / FORMAT::LANES;
  FORMAT::template decode<Read<ALIGNMENT>>(
      blocks + block * FORMAT::BLOCK_BYTES, index % FORMAT::LANES, weights + block * FORMAT::WEIGHTS);
}

// The rows of a matrix that `rows` names, and zeros for a row outside the matrix.
// Grid: (LANES threads per block of a row, rows).
template <typename FORMAT, typename T, typename ROW, int ALIGNMENT>
[[kernel]] void dequantize_rows(
    device const uchar* blocks [[buffer(0)]],
    device T* weights [[buffer(1)]],
    device const ROW* rows [[buffer(2)]],
    constant long& blocks_per_row [[buffer(3)]],
    constant long& row_count [[buffer(4)]],
    uint2 index [[thread_position_in_grid]]) {
  const ulong block = index.x / FORMAT::LANES;
  const uint lane = index.x % FORMAT::LANES;
  device T* out = weights + (index.y * ulong(blocks_per_row) + block) * FORMAT::WEIGHTS;
  const long row = long(rows[index.y]);
  if (row < 0 || row >= row_count) {
    const uint share = FORMAT::WEIGHTS / FORMAT::LANES;
    for (uint at = lane * share; at < (lane + 1) * share; at += 4) write(out, at, float4(0.0f));
    return;
  }
  FORMAT::template decode<Read<ALIGNMENT>>(
      blocks + (ulong(row) * ulong(blocks_per_row) + block) * FORMAT::BLOCK_BYTES, lane, out);
}

#define KERNEL(name, function, ...) \
  template [[host_name(name)]] [[kernel]] decltype(function<__VA_ARGS__>) function<__VA_ARGS__>;

#define KERNELS_OF_OUTPUT(FORMAT, T, ALIGNMENT, suffix)                                            \
  KERNEL("dequantize_" #T suffix, dequantize, FORMAT, T, ALIGNMENT)                                \
  KERNEL("dequantize_rows_int_" #T suffix, dequantize_rows, FORMAT, T, int, ALIGNMENT)             \
  KERNEL("dequantize_rows_long_" #T suffix, dequantize_rows, FORMAT, T, long, ALIGNMENT)

// Metal 3.0 (macOS 13) has no bfloat.
#if __METAL_VERSION__ >= 310
#define IF_BFLOAT(...) __VA_ARGS__
#else
#define IF_BFLOAT(...)
#endif

#define KERNELS_OF_ALIGNMENT(FORMAT, ALIGNMENT, suffix)            \
  KERNELS_OF_OUTPUT(FORMAT, float, ALIGNMENT, suffix)              \
  KERNELS_OF_OUTPUT(FORMAT, half, ALIGNMENT, suffix)               \
  IF_BFLOAT(KERNELS_OF_OUTPUT(FORMAT, bfloat, ALIGNMENT, suffix))

// ALIGNMENT: the largest of 4, 2 and 1 that divides BLOCK_BYTES and the offset of every field that is read as a word.
// The kernels for tensors that begin at another multiple end in _unaligned.
#define KERNELS(FORMAT, ALIGNMENT)             \
  KERNELS_OF_ALIGNMENT(FORMAT, ALIGNMENT, "")  \
  KERNELS_OF_ALIGNMENT(FORMAT, 1, "_unaligned")
