// Q3_K: 32 bytes of third bits, 64 bytes of quants as in Q2_K, 12 bytes of 6-bit scales, d (float16).
// Bit 4n + j of the third bits belongs to weights 128n + 32j .. + 31. Scale i has its low nibble in byte i % 8 of the
// twelve (low half for i < 8) and its top two bits in byte 8 + i % 4, from bit 2 (i / 4) on.
// weight = d * (scale - 32) * (q - 4), of which the third bit adds the 4.
struct Q3_K {
  enum { WEIGHTS = 256, BLOCK_BYTES = 110, LANES = 8 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const uint column = 4 * lane;
    const float d = float16_at<READ>(block + 108);
    const uint third = READ::word(block + column);
    const uint scales[3] = {READ::word(block + 96), READ::word(block + 100), READ::word(block + 104)};
    for (uint n = 0; n < 2; ++n) {
      const uint word = READ::word(block + 32 + 32 * n + column);
      for (uint j = 0; j < 4; ++j) {
        const uint i = 8 * n + 2 * j + lane / 4;
        const uint low = (scales[(i / 4) % 2] >> (8 * (i % 4) + 4 * n)) & 0xF;
        const uint high = (scales[2] >> (8 * (i % 4) + 2 * (i / 4))) & 3;
        const float factor = d * (float(low | high << 4) - 32.0f);
        const uint quants = ((word >> (2 * j)) & 0x03030303) | ((third >> (4 * n + j)) & 0x01010101) << 2;
        write(out, 128 * n + 32 * j + column, (unsigned_bytes(quants) - 4.0f) * factor);
      }
    }
  }
};

KERNELS(Q3_K, 2)
