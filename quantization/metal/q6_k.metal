// Q6_K: 128 bytes of low nibbles, 64 bytes of high bits, 16 signed scales, d (float16). In half n, low byte 64n + l has
// weights l and l + 64, byte 64n + 32 + l weights l + 32 and l + 96, and high byte 32n + l two bits for each of the four
// in ascending order. weight = d * scale * (q - 32); 16 weights share a scale.
struct Q6_K {
  enum { WEIGHTS = 256, BLOCK_BYTES = 210, LANES = 16 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const uint n = lane / 8;
    const uint column = 4 * (lane % 8);
    const float d = float16_at<READ>(block + 208);
    const uint low[2] = {READ::word(block + 64 * n + column), READ::word(block + 64 * n + 32 + column)};
    const uint high = READ::word(block + 128 + 4 * lane);
    device const uchar* scales = block + 192 + 8 * n + column / 16;
    for (uint j = 0; j < 4; ++j) {
      const float factor = d * float(char(scales[2 * j]));
      const uint nibbles = (low[j % 2] >> (4 * (j / 2))) & 0x0F0F0F0F;
      const uint quants = nibbles | ((high >> (2 * j)) & 0x03030303) << 4;
      write(out, 128 * n + 32 * j + column, (unsigned_bytes(quants) - 32.0f) * factor);
    }
  }
};

KERNELS(Q6_K, 2)
