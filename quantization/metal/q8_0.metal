// Q8_0: d (float16), 32 signed bytes; weight = q * d.
struct Q8_0 {
  enum { WEIGHTS = 32, BLOCK_BYTES = 34, LANES = 4 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const float d = float16_at<READ>(block);
    device const uchar* quants = block + 2 + 4 * lane;
    write(out, 4 * lane, signed_bytes(READ::word(quants)) * d);
    write(out, 4 * lane + 16, signed_bytes(READ::word(quants + 16)) * d);
  }
};

KERNELS(Q8_0, 2)
