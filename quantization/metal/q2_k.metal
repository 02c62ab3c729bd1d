// Q2_K: 16 bytes of scale (low nibble) and minimum (high), 64 bytes of quants, d, dmin (float16).
// The bits 2j of quants 32n .. 32n + 31 are weights 128n + 32j .. + 31; 16 weights share a scale.
// weight = d * scale * q - dmin * minimum.
struct Q2_K {
  enum { WEIGHTS = 256, BLOCK_BYTES = 84, LANES = 16 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const uint n = lane / 8;
    const uint column = 4 * (lane % 8);
    const float d = float16_at<READ>(block + 80);
    const float dmin = float16_at<READ>(block + 82);
    const uint word = READ::word(block + 16 + 4 * lane);
    device const uchar* scales = block + 8 * n + column / 16;
    for (uint j = 0; j < 4; ++j) {
      const uchar scale = scales[2 * j];
      const float factor = d * float(scale & 0xF);
      const float minimum = dmin * float(scale >> 4);
      const float4 scaled = unsigned_bytes((word >> (2 * j)) & 0x03030303) * factor;
      write(out, 128 * n + 32 * j + column, scaled - minimum);
    }
  }
};

KERNELS(Q2_K, 4)
