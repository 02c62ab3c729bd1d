// MXFP4: an E8M0 exponent, nibbles as in Q4_0, each an E2M1 number; weight = 2^(e - 127) * number. The numbers are
// stored doubled and the power halved. Exponents 0 and 1 give subnormals, which a GPU may take for zero.
constant char E2M1_DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct MXFP4 {
  enum { WEIGHTS = 32, BLOCK_BYTES = 17, LANES = 4 };

  template <typename READ, typename OUT>
  static void decode(device const uchar* block, uint lane, OUT out) {
    const uint exponent = block[0];
    const float power = as_type<float>(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
    const uint word = READ::word(block + 1 + 4 * lane);
    write(out, 4 * lane, look_up(E2M1_DOUBLED, word & 0x0F0F0F0F) * power);
    write(out, 4 * lane + 16, look_up(E2M1_DOUBLED, (word >> 4) & 0x0F0F0F0F) * power);
  }
};

KERNELS_OF_ALIGNMENT(MXFP4, 1, "_unaligned")
