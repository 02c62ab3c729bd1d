// Decoding of one-byte weights with scales: what fp8 and int8 share.
//
// A format is a struct with values(word), the four numbers of the bytes of a word. A weight is number * scale, rounded
// once in float32, then once to T. scales is a grid of scale_columns columns, one scale for row_side x column_side
// weights; a thread decodes four weights of a row, so column_side is a multiple of four.
inline float scale_value(float scale) { return scale; }
// An E8M0 exponent. Code 0 is a subnormal, which a GPU may take for zero; 255 is NaN.
inline float scale_value(uchar code) {
  const uint bits = code == 0 ? 0x00400000u : code == 255 ? 0x7FC00000u : uint(code) << 23;
  return as_type<float>(bits);
}

// columns, row_side, column_side, scale_columns of the matrix.
struct Layout {
  long columns, row_side, column_side, scale_columns;
};

template <typename FORMAT, typename READ, typename T, typename SCALE>
inline void decode_four(
    device const uchar* codes, device T* weights, device const SCALE* scales, constant Layout& layout,
    ulong row, ulong out_row, uint four) {
  const uint column = 4 * four;
  const ulong block_row = ulong(uint(row) / uint(layout.row_side));
  const float scale = scale_value(
      scales[block_row * ulong(layout.scale_columns) + column / uint(layout.column_side)]);
  const uint word = READ::word(codes + row * ulong(layout.columns) + column);
  write(weights + out_row * ulong(layout.columns), column, FORMAT::values(word) * scale);
}

// A whole matrix. Grid: (columns / 4, rows).
template <typename FORMAT, typename T, typename SCALE, int ALIGNMENT>
[[kernel]] void scaled(
    device const uchar* codes [[buffer(0)]],
    device T* weights [[buffer(1)]],
    device const SCALE* scales [[buffer(2)]],
    constant Layout& layout [[buffer(3)]],
    uint2 index [[thread_position_in_grid]]) {
  decode_four<FORMAT, Read<ALIGNMENT>>(codes, weights, scales, layout, index.y, index.y, index.x);
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
  const long row = long(rows[index.y]);
  if (row < 0 || row >= row_count) {
    write(weights + index.y * ulong(layout.columns), 4 * index.x, float4(0.0f));
    return;
  }
  decode_four<FORMAT, Read<ALIGNMENT>>(codes, weights, scales, layout, ulong(row), index.y, index.x);
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
