// Q5_K: d, dmin (float16), 12 bytes of scales and minimums, 32 bytes of fifth bits (bit i for weights 32i .. + 31),
// 128 bytes of nibbles as in Q4_K. weight = d * scale * q - dmin * minimum.
struct Q5_K {
  enum { WEIGHTS = 256, BLOCK_BYTES = 176, LANES = 8 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const float d = float16_at<READ>(block);
    const float dmin = float16_at<READ>(block + 2);
    const ScalesAndMinimums fields = ScalesAndMinimums::read<READ>(block + 4);
    const uint fifth = READ::word(block + 16 + 4 * lane);
    for (uint chunk = 0; chunk < 4; ++chunk) {
      const uint word = READ::word(block + 48 + 32 * chunk + 4 * lane);
      for (uint high = 0; high < 2; ++high) {
        const uint i = 2 * chunk + high;
        const float factor = d * fields.scale(i);
        const float minimum = dmin * fields.minimum(i);
        const uint quants = ((word >> (4 * high)) & 0x0F0F0F0F) | ((fifth >> i) & 0x01010101) << 4;
        const float4 scaled = unsigned_bytes(quants) * factor;
        write(out, 32 * i + 4 * lane, scaled - minimum);
      }
    }
  }
};

KERNELS(Q5_K, 4)
