// BF16, four at a time: each is the upper half of a float32.
struct BF16 {
  enum { WEIGHTS = 4, BLOCK_BYTES = 8, LANES = 1 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint, OUT out) {
    const uint words[2] = {READ::word(block), READ::word(block + 4)};
    float4 weights;
    weights.x = as_type<float>(words[0] << 16);
    weights.y = as_type<float>(words[0] & 0xFFFF0000);
    weights.z = as_type<float>(words[1] << 16);
    weights.w = as_type<float>(words[1] & 0xFFFF0000);
    write(out, 0, weights);
  }
};

KERNELS(BF16, 4)
