// Whole tensors and single rows of blocks.

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

#define KERNELS_OF_OUTPUT(FORMAT, T, ALIGNMENT, suffix)                                            \
  KERNEL("dequantize_" #T suffix, dequantize, FORMAT, T, ALIGNMENT)                                \
  KERNEL("dequantize_rows_int_" #T suffix, dequantize_rows, FORMAT, T, int, ALIGNMENT)             \
  KERNEL("dequantize_rows_long_" #T suffix, dequantize_rows, FORMAT, T, long, ALIGNMENT)

#define KERNELS_OF_ALIGNMENT(FORMAT, ALIGNMENT, suffix)            \
  KERNELS_OF_OUTPUT(FORMAT, float, ALIGNMENT, suffix)              \
  KERNELS_OF_OUTPUT(FORMAT, half, ALIGNMENT, suffix)               \
  IF_BFLOAT(KERNELS_OF_OUTPUT(FORMAT, bfloat, ALIGNMENT, suffix))

// ALIGNMENT: the largest of 4, 2 and 1 that divides BLOCK_BYTES and the offset of every field that is read as a word.
// The kernels for tensors that begin at another multiple end in _unaligned.
#define KERNELS(FORMAT, ALIGNMENT)             \
  KERNELS_OF_ALIGNMENT(FORMAT, ALIGNMENT, "")  \
  KERNELS_OF_ALIGNMENT(FORMAT, 1, "_unaligned")
