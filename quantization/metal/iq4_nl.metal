// IQ4_NL: d (float16), nibbles as in Q4_0, each the index of a value; weight = value * d.
struct IQ4_NL {
  enum { WEIGHTS = 32, BLOCK_BYTES = 18, LANES = 4 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const float d = float16_at<READ>(block);
    const uint word = READ::word(block + 2 + 4 * lane);
    write(out, 4 * lane, look_up(IQ4_VALUES, word & 0x0F0F0F0F) * d);
    write(out, 4 * lane + 16, look_up(IQ4_VALUES, (word >> 4) & 0x0F0F0F0F) * d);
  }
};

KERNELS(IQ4_NL, 2)
