// Whole matrices and single rows of one-byte weights.

// A whole matrix. Grid: (columns / 4, rows).
template <typename FORMAT, typename T, typename SCALE, int ALIGNMENT>
[[kernel]] void scaled(
    device const uchar* codes [[buffer(0)]],
    device T* weights [[buffer(1)]],
    device const SCALE* scales [[buffer(2)]],
    constant Layout& layout [[buffer(3)]],
    uint2 index [[thread_position_in_grid]]) {
  device T* out = weights + index.y * ulong(layout.columns);
  write(out, 4 * index.x, four_weights<FORMAT, Read<ALIGNMENT>>(codes, scales, layout, index.y, index.x));
}

// The rows that `rows` names, and zeros for a row outside the matrix. Grid: (columns / 4, number of rows).
template <typename FORMAT, typename T, typename SCALE, typename ROW, int ALIGNMENT>
[[kernel]] void scaled_rows(
    device const uchar* codes [[buffer(0)]],
    device T* weights [[buffer(1)]],
    device const SCALE* scales [[buffer(2)]],
    constant Layout& layout [[buffer(3)]],
    device const ROW* rows [[buffer(4)]],
    constant long& row_count [[buffer(5)]],
    uint2 index [[thread_position_in_grid]]) {
  device T* out = weights + index.y * ulong(layout.columns);
  const long row = long(rows[index.y]);
  if (row < 0 || row >= row_count) {
    write(out, 4 * index.x, float4(0.0f));
    return;
  }
  write(out, 4 * index.x, four_weights<FORMAT, Read<ALIGNMENT>>(codes, scales, layout, ulong(row), index.x));
}

#define SCALED_KERNELS_OF_SCALE(FORMAT, T, SCALE, ALIGNMENT, suffix)                                      \
  KERNEL("scaled_" #SCALE "_" #T suffix, scaled, FORMAT, T, SCALE, ALIGNMENT)                             \
  KERNEL("scaled_rows_int_" #SCALE "_" #T suffix, scaled_rows, FORMAT, T, SCALE, int, ALIGNMENT)          \
  KERNEL("scaled_rows_long_" #SCALE "_" #T suffix, scaled_rows, FORMAT, T, SCALE, long, ALIGNMENT)

#define SCALED_KERNELS_OF_OUTPUT(FORMAT, T)                         \
  SCALED_KERNELS_OF_SCALE(FORMAT, T, float, 4, "")                  \
  SCALED_KERNELS_OF_SCALE(FORMAT, T, float, 1, "_unaligned")        \
  SCALED_KERNELS_OF_SCALE(FORMAT, T, uchar, 4, "")                  \
  SCALED_KERNELS_OF_SCALE(FORMAT, T, uchar, 1, "_unaligned")

#define SCALED_KERNELS(FORMAT)                        \
  SCALED_KERNELS_OF_OUTPUT(FORMAT, float)             \
  SCALED_KERNELS_OF_OUTPUT(FORMAT, half)              \
  IF_BFLOAT(SCALED_KERNELS_OF_OUTPUT(FORMAT, bfloat))
