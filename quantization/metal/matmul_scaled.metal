// Products of a few rows with a matrix of one-byte weights, as matmul.metal has them.

template <typename FORMAT, int ALIGNMENT, typename SCALE>
struct Codes {
  enum { SHARE = 4, STEP = 64 };
  device const uchar* codes;
  device const SCALE* scales;
  constant Layout* layout;

  template <typename OUT>
  void decode(ulong row, uint column, uint part, OUT out) const {
    write(out, 4 * part, four_weights<FORMAT, Read<ALIGNMENT>>(codes, scales, *layout, row, column / 4 + part));
  }
};

template <typename FORMAT, int ALIGNMENT, typename SCALE, typename T, int ROWS>
[[kernel]] void matmul_few_scaled(
    device const uchar* codes [[buffer(0)]],
    device const T* x [[buffer(1)]],
    device T* y [[buffer(2)]],
    device const T* bias [[buffer(3)]],
    constant Sizes& sizes [[buffer(4)]],
    device const SCALE* scales [[buffer(5)]],
    constant Layout& layout [[buffer(6)]],
    uint index [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  Codes<FORMAT, ALIGNMENT, SCALE> source;
  source.codes = codes;
  source.scales = scales;
  source.layout = &layout;
  matmul_few<ROWS>(source, x, y, bias, sizes, index / 32, lane);
}

template <typename FORMAT, int ALIGNMENT, typename SCALE, typename T>
[[kernel]] void matmul_tiles_scaled(
    device const uchar* codes [[buffer(0)]],
    device const T* x [[buffer(1)]],
    device T* y [[buffer(2)]],
    device const T* bias [[buffer(3)]],
    constant Sizes& sizes [[buffer(4)]],
    device const SCALE* scales [[buffer(5)]],
    constant Layout& layout [[buffer(6)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  typedef Codes<FORMAT, ALIGNMENT, SCALE> Source;
  typedef TileShape<Source, T> Shape;
  threadgroup vec<T, 4> weights[Shape::WEIGHT_FOURS];
  threadgroup vec<T, 4> inputs[Shape::INPUT_FOURS];
  threadgroup float results[Shape::RESULTS];
  Source source;
  source.codes = codes;
  source.scales = scales;
  source.layout = &layout;
  Place at;
  at.group = group;
  at.index = index;
  at.simdgroup = simdgroup;
  at.lane = lane;
  matmul_tile(
      source, x, y, bias, sizes, at, (threadgroup T*)(weights), (threadgroup T*)(inputs), (threadgroup float*)(results));
}

#define SCALED_KERNELS_OF_SCALE(FORMAT, SCALE, ALIGNMENT, suffix)                                                \
  KERNEL("matmul_1_" #SCALE suffix, matmul_few_scaled, FORMAT, ALIGNMENT, SCALE, ACTIVATION, 1)              \
  KERNEL("matmul_4_" #SCALE suffix, matmul_few_scaled, FORMAT, ALIGNMENT, SCALE, ACTIVATION, 4)              \
  KERNEL("matmul_tiles_" #SCALE suffix, matmul_tiles_scaled, FORMAT, ALIGNMENT, SCALE, ACTIVATION)

#define SCALED_KERNELS(FORMAT)                              \
  SCALED_KERNELS_OF_SCALE(FORMAT, float, 4, "")             \
  SCALED_KERNELS_OF_SCALE(FORMAT, float, 1, "_unaligned")   \
  SCALED_KERNELS_OF_SCALE(FORMAT, uchar, 4, "")             \
  SCALED_KERNELS_OF_SCALE(FORMAT, uchar, 1, "_unaligned")
