// Q4_0: d (float16), 16 bytes with weight i in the low nibble and weight i + 16 in the high one; weight = (q - 8) * d.
struct Q4_0 {
  enum { WEIGHTS = 32, BLOCK_BYTES = 18, LANES = 4 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const float d = float16_at<READ>(block);
    const uint word = READ::word(block + 2 + 4 * lane);
    write(out, 4 * lane, (unsigned_bytes(word & 0x0F0F0F0F) - 8.0f) * d);
    write(out, 4 * lane + 16, (unsigned_bytes((word >> 4) & 0x0F0F0F0F) - 8.0f) * d);
  }
};

KERNELS(Q4_0, 2)
