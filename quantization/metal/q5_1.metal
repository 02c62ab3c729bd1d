// Q5_1: d, m (float16), 32 fifth bits, nibbles as in Q4_1; weight = q * d + m.
struct Q5_1 {
  enum { WEIGHTS = 32, BLOCK_BYTES = 24, LANES = 4 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const float d = float16_at<READ>(block);
    const float m = float16_at<READ>(block + 2);
    const uint mask = READ::word(block + 4);
    const uint word = READ::word(block + 8 + 4 * lane);
    const float4 low = unsigned_bytes((word & 0x0F0F0F0F) | fifth_bits(mask, 4 * lane)) * d;
    const float4 high = unsigned_bytes(((word >> 4) & 0x0F0F0F0F) | fifth_bits(mask, 4 * lane + 16)) * d;
    write(out, 4 * lane, low + m);
    write(out, 4 * lane + 16, high + m);
  }
};

KERNELS(Q5_1, 4)
