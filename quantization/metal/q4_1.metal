// Q4_1: d, m (float16), 16 bytes with weight i in the low nibble and weight i + 16 in the high one; weight = q * d + m.
struct Q4_1 {
  enum { WEIGHTS = 32, BLOCK_BYTES = 20, LANES = 4 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const float d = float16_at<READ>(block);
    const float m = float16_at<READ>(block + 2);
    const uint word = READ::word(block + 4 + 4 * lane);
    const float4 low = unsigned_bytes(word & 0x0F0F0F0F) * d;
    const float4 high = unsigned_bytes((word >> 4) & 0x0F0F0F0F) * d;
    write(out, 4 * lane, low + m);
    write(out, 4 * lane + 16, high + m);
  }
};

KERNELS(Q4_1, 4)
