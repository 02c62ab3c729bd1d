// Products of a few rows with a quantised matrix: y = x W^T + bias, for x [rows, columns] and W [features, columns].
//
// W is decoded where it is used, by the formats' own decode functions and rounded to the type of x as the decoded
// matrix would be; products are summed in float32 and rounded once. columns is a multiple of 8 and of a block.
//
// matmul_few, for as many rows of x as it is compiled for: one simdgroup per row of W, of which every thread takes the
// parts that follow each other 32 apart, multiplies them as they come out of the decoder and adds to its own sums.
// Nothing is stored in between.
//
// matmul_tiles, for more: a threadgroup decodes some rows of W into threadgroup memory, and its simdgroups, each with
// eight of those rows, multiply them by up to 32 rows of x as 8 x 8 matrices. The memory holds
//   weights   FEATURES rows of W, STEP columns: a multiple of a block, 16 KB for the super-blocks of 256 weights
//   inputs    32 rows of x, 64 columns: 4 KB of half, 8 KB of float
//   results   an 8 x 8 matrix for each simdgroup
// and stays below 32 KB, the most that Metal permits, which is why float takes half as many rows of W. Rows are 16 bytes
// longer than their columns, which spreads the eight rows of a matrix over the memory's banks. What lies below the last
// row of x or of W is computed from that row again and not written.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

// Arrays of sums stay in registers if every index is known.
#define UNROLL _Pragma("clang loop unroll(full)")

// What Python passes: numbers of rows and columns of x, of rows of W, and whether there is a bias.
struct Sizes {
  long rows, columns, features, biased;
};

template <typename T>
inline float4 four_numbers(device const T* from) { return float4(*(device const vec<T, 4>*)(from)); }

// ---- where decoded weights go, besides memory of the device

// The rows of x that they are multiplied by; `+` and `write` as for a pointer.
template <typename T, int ROWS>
struct Products {
  device const T* x;
  ulong columns;
  uint last;
  thread float4* sums;

  Products operator+(uint weights) const {
    Products moved = *this;
    moved.x += weights;
    return moved;
  }
};

template <typename T, int ROWS>
inline void write(Products<T, ROWS> out, uint at, float4 weights) {
  float4 rounded;
  rounded.x = float(T(weights.x));
  rounded.y = float(T(weights.y));
  rounded.z = float(T(weights.z));
  rounded.w = float(T(weights.w));
  UNROLL for (uint row = 0; row < uint(ROWS); ++row) {
    const float4 inputs = four_numbers(out.x + min(row, out.last) * out.columns + at);
    out.sums[row] = fma(rounded, inputs, out.sums[row]);
  }
}

template <typename T>
struct Tile {
  threadgroup T* weights;

  Tile operator+(uint count) const {
    Tile moved = *this;
    moved.weights += count;
    return moved;
  }
};

template <typename T>
inline void write(Tile<T> out, uint at, float4 weights) {
  vec<T, 4> rounded;
  rounded.x = T(weights.x);
  rounded.y = T(weights.y);
  rounded.z = T(weights.z);
  rounded.w = T(weights.w);
  *(threadgroup vec<T, 4>*)(out.weights + at) = rounded;
}

// ---- where they come from: SHARE weights per call of decode on the average, STEP columns of W per tile

template <typename FORMAT, int ALIGNMENT>
struct Blocks {
  enum { SHARE = FORMAT::WEIGHTS / FORMAT::LANES, STEP = FORMAT::WEIGHTS < 64 ? 64 : FORMAT::WEIGHTS };
  device const uchar* blocks;
  ulong columns;

  // Part `part` of the columns from `column` on, the start of a block; `out` is that column's place.
  template <typename OUT>
  void decode(ulong row, uint column, uint part, OUT out) const {
    const uint block = part / FORMAT::LANES;
    const ulong first = (row * columns + column) / FORMAT::WEIGHTS;
    FORMAT::template decode<Read<ALIGNMENT>>(
        blocks + (first + block) * FORMAT::BLOCK_BYTES, part % FORMAT::LANES, out + block * FORMAT::WEIGHTS);
  }
};

// ---- the two ways to multiply

template <typename T>
inline void put(device T* y, device const T* bias, constant Sizes& sizes, uint row, uint feature, float sum) {
  if (sizes.biased) sum += float(bias[feature]);
  y[row * ulong(sizes.features) + feature] = T(sum);
}

template <int ROWS, typename SOURCE, typename T>
inline void matmul_few(
    SOURCE source, device const T* x, device T* y, device const T* bias, constant Sizes& sizes, uint feature,
    uint lane) {
  if (feature >= uint(sizes.features)) return;
  const uint columns = uint(sizes.columns), rows = uint(sizes.rows);
  float4 sums[ROWS];
  UNROLL for (uint row = 0; row < uint(ROWS); ++row) sums[row] = float4(0.0f);
  Products<T, ROWS> out;
  out.x = x;
  out.columns = columns;
  out.last = rows - 1;
  out.sums = sums;
  for (uint part = lane; part < columns / SOURCE::SHARE; part += 32) source.decode(feature, 0, part, out);
  UNROLL for (uint row = 0; row < uint(ROWS); ++row) {
    const float sum = simd_sum((sums[row].x + sums[row].y) + (sums[row].z + sums[row].w));
    if (lane == 0 && row < rows) put(y, bias, sizes, row, feature, sum);
  }
}

template <typename SOURCE, typename T>
struct TileShape {
  enum {
    ROWS = 32,
    FEATURES = 64 / int(sizeof(T)),
    SIMDGROUPS = FEATURES / 8,
    THREADS = 32 * SIMDGROUPS,
    INPUTS = 64,
    PAD = 16 / int(sizeof(T)),
    WEIGHT_STRIDE = SOURCE::STEP + PAD,
    INPUT_STRIDE = INPUTS + PAD,
    WEIGHT_FOURS = FEATURES * WEIGHT_STRIDE / 4,
    INPUT_FOURS = ROWS * INPUT_STRIDE / 4,
    RESULTS = 64 * SIMDGROUPS,
  };
};

struct Place {
  uint2 group;
  uint index, simdgroup, lane;
};

template <typename SOURCE, typename T>
inline void matmul_tile(
    SOURCE source, device const T* x, device T* y, device const T* bias, constant Sizes& sizes, Place at,
    threadgroup T* weights, threadgroup T* inputs, threadgroup float* results) {
  typedef TileShape<SOURCE, T> Shape;
  const uint columns = uint(sizes.columns);
  const uint first_feature = at.group.x * Shape::FEATURES, last_feature = uint(sizes.features) - 1;
  const uint first_row = at.group.y * Shape::ROWS, last_row = uint(sizes.rows) - 1;
  const uint parts = SOURCE::STEP / SOURCE::SHARE;
  const uint matrices = min(uint(Shape::ROWS), last_row - first_row + 1 + 7) / 8;

  simdgroup_matrix<float, 8, 8> sums[4];
  UNROLL for (uint i = 0; i < 4; ++i) sums[i] = make_filled_simdgroup_matrix<float, 8>(0.0f);

  for (uint column = 0; column < columns; column += SOURCE::STEP) {
    const uint depth = min(uint(SOURCE::STEP), columns - column);
    for (uint i = at.index; i < Shape::FEATURES * parts; i += Shape::THREADS) {
      const uint feature = i / parts, part = i % parts;
      if (part * SOURCE::SHARE >= depth) continue;
      Tile<T> out;
      out.weights = weights + feature * Shape::WEIGHT_STRIDE;
      source.decode(min(first_feature + feature, last_feature), column, part, out);
    }
    for (uint start = 0; start < depth; start += Shape::INPUTS) {
      const uint width = min(uint(Shape::INPUTS), depth - start);
      for (uint i = at.index; i < matrices * 8 * (Shape::INPUTS / 4); i += Shape::THREADS) {
        const uint row = i / (Shape::INPUTS / 4), offset = 4 * (i % (Shape::INPUTS / 4));
        if (offset >= width) continue;
        device const T* from = x + min(first_row + row, last_row) * ulong(columns) + column + start + offset;
        *(threadgroup vec<T, 4>*)(inputs + row * Shape::INPUT_STRIDE + offset) = *(device const vec<T, 4>*)(from);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint k = 0; k < width; k += 8) {
        simdgroup_matrix<T, 8, 8> right, left;
        threadgroup const T* decoded = weights + at.simdgroup * 8 * Shape::WEIGHT_STRIDE + start + k;
        simdgroup_load(right, decoded, Shape::WEIGHT_STRIDE, ulong2(0), true);
        UNROLL for (uint i = 0; i < 4; ++i) {
          if (i >= matrices) continue;
          threadgroup const T* eight = inputs + i * 8 * Shape::INPUT_STRIDE + k;
          simdgroup_load(left, eight, Shape::INPUT_STRIDE);
          simdgroup_multiply_accumulate(sums[i], left, right, sums[i]);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  threadgroup float* result = results + 64 * at.simdgroup;
  UNROLL for (uint i = 0; i < 4; ++i) {
    if (i >= matrices) continue;
    simdgroup_store(sums[i], result, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint element = at.lane; element < 64; element += 32) {
      const uint row = first_row + 8 * i + element / 8, feature = first_feature + 8 * at.simdgroup + element % 8;
      if (row <= last_row && feature <= last_feature) put(y, bias, sizes, row, feature, result[element]);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// ---- kernels of block formats

// Grid: 32 threads per row of W; sizes.rows <= ROWS.
template <typename FORMAT, int ALIGNMENT, typename T, int ROWS>
[[kernel]] void matmul_few_kernel(
    device const uchar* blocks [[buffer(0)]],
    device const T* x [[buffer(1)]],
    device T* y [[buffer(2)]],
    device const T* bias [[buffer(3)]],
    constant Sizes& sizes [[buffer(4)]],
    uint index [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  Blocks<FORMAT, ALIGNMENT> source;
  source.blocks = blocks;
  source.columns = ulong(sizes.columns);
  matmul_few<ROWS>(source, x, y, bias, sizes, index / 32, lane);
}

// Grid: groups of (THREADS, 1) threads, one for each tile of (FEATURES rows of W, ROWS rows of x).
template <typename FORMAT, int ALIGNMENT, typename T>
[[kernel]] void matmul_tiles_kernel(
    device const uchar* blocks [[buffer(0)]],
    device const T* x [[buffer(1)]],
    device T* y [[buffer(2)]],
    device const T* bias [[buffer(3)]],
    constant Sizes& sizes [[buffer(4)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  typedef Blocks<FORMAT, ALIGNMENT> Source;
  typedef TileShape<Source, T> Shape;
  threadgroup vec<T, 4> weights[Shape::WEIGHT_FOURS];
  threadgroup vec<T, 4> inputs[Shape::INPUT_FOURS];
  threadgroup float results[Shape::RESULTS];
  Source source;
  source.blocks = blocks;
  source.columns = ulong(sizes.columns);
  Place at;
  at.group = group;
  at.index = index;
  at.simdgroup = simdgroup;
  at.lane = lane;
  matmul_tile(
      source, x, y, bias, sizes, at, (threadgroup T*)(weights), (threadgroup T*)(inputs), (threadgroup float*)(results));
}

// ACTIVATION, the type of x, y and bias, is defined before this file.
#define KERNELS_OF_ALIGNMENT(FORMAT, ALIGNMENT, suffix)                                        \
  KERNEL("matmul_1" suffix, matmul_few_kernel, FORMAT, ALIGNMENT, ACTIVATION, 1)           \
  KERNEL("matmul_4" suffix, matmul_few_kernel, FORMAT, ALIGNMENT, ACTIVATION, 4)           \
  KERNEL("matmul_tiles" suffix, matmul_tiles_kernel, FORMAT, ALIGNMENT, ACTIVATION)

#define KERNELS(FORMAT, ALIGNMENT)             \
  KERNELS_OF_ALIGNMENT(FORMAT, ALIGNMENT, "")  \
  KERNELS_OF_ALIGNMENT(FORMAT, 1, "_unaligned")
