// IQ4_XS: d (float16), the top two bits of eight 6-bit scales (16 bits), their low nibbles (4 bytes), then eight groups
// of 16 bytes of nibbles as in IQ4_NL; weight = d * (scale - 32) * value.
struct IQ4_XS {
  enum { WEIGHTS = 256, BLOCK_BYTES = 136, LANES = 32 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const uint group = lane / 4;
    const uint first = 32 * group + 4 * (lane % 4);
    const uint low = (READ::word(block + 4) >> (4 * group)) & 0xF;
    const uint high = (uint(READ::half_word(block + 2)) >> (2 * group)) & 3;
    const float factor = float16_at<READ>(block) * (float(low | high << 4) - 32.0f);
    const uint word = READ::word(block + 8 + 4 * lane);
    write(out, first, look_up(IQ4_VALUES, word & 0x0F0F0F0F) * factor);
    write(out, first + 16, look_up(IQ4_VALUES, (word >> 4) & 0x0F0F0F0F) * factor);
  }
};

KERNELS(IQ4_XS, 4)
