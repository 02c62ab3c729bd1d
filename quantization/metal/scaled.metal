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

// Weights 4 * four .. + 3 of a row.
template <typename FORMAT, typename READ, typename SCALE>
inline float4 four_weights(
    device const uchar* codes, device const SCALE* scales, constant Layout& layout, ulong row, uint four) {
  const uint column = 4 * four;
  const ulong block_row = ulong(uint(row) / uint(layout.row_side));
  const float scale = scale_value(
      scales[block_row * ulong(layout.scale_columns) + column / uint(layout.column_side)]);
  const uint word = READ::word(codes + row * ulong(layout.columns) + column);
  return FORMAT::values(word) * scale;
}
