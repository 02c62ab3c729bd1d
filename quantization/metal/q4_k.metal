// Q4_K: d, dmin (float16), 12 bytes of scales and minimums, 128 bytes of quants: the low nibbles of bytes
// 32c .. 32c + 31 are weights 64c .. + 31, the high ones the next 32. weight = d * scale * q - dmin * minimum.
struct Q4_K {
  enum { WEIGHTS = 256, BLOCK_BYTES = 144, LANES = 32 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const uint chunk = lane / 8;
    const float d = float16_at<READ>(block);
    const float dmin = float16_at<READ>(block + 2);
    const ScalesAndMinimums fields = ScalesAndMinimums::read<READ>(block + 4);
    const uint word = READ::word(block + 16 + 4 * lane);
    for (uint high = 0; high < 2; ++high) {
      const uint i = 2 * chunk + high;
      const float factor = d * fields.scale(i);
      const float minimum = dmin * fields.minimum(i);
      const float4 scaled = unsigned_bytes((word >> (4 * high)) & 0x0F0F0F0F) * factor;
      write(out, 32 * i + 4 * (lane % 8), scaled - minimum);
    }
  }
};

KERNELS(Q4_K, 4)
