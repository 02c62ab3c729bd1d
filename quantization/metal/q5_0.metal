// Q5_0: d (float16), 32 fifth bits, nibbles as in Q4_0; weight = (q - 16) * d.
struct Q5_0 {
  enum { WEIGHTS = 32, BLOCK_BYTES = 22, LANES = 4 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const float d = float16_at<READ>(block);
    const uint mask = READ::word(block + 2);
    const uint word = READ::word(block + 6 + 4 * lane);
    const uint low = (word & 0x0F0F0F0F) | fifth_bits(mask, 4 * lane);
    const uint high = ((word >> 4) & 0x0F0F0F0F) | fifth_bits(mask, 4 * lane + 16);
    write(out, 4 * lane, (unsigned_bytes(low) - 16.0f) * d);
    write(out, 4 * lane + 16, (unsigned_bytes(high) - 16.0f) * d);
  }
};

KERNELS(Q5_0, 2)
