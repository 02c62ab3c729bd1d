// The twelve bytes of 6-bit scales and minimums of Q4_K and Q5_K, in three words A, B, C of four bytes each.
// Scales 0-3 are the low six bits of A, scales 4-7 the low nibbles of C below the top two bits of A; minimums likewise
// with B and the high nibbles of C.
struct ScalesAndMinimums {
  uint a, b, c;

  template <typename READ>
  static ScalesAndMinimums read(device const uchar* from) {
    ScalesAndMinimums fields;
    fields.a = READ::word(from);
    fields.b = READ::word(from + 4);
    fields.c = READ::word(from + 8);
    return fields;
  }

  static float six_bits(uint first, uint rest, uint i, uint nibble) {
    const uint shift = 8 * (i % 4);
    const uint direct = (first >> shift) & 0x3F;
    const uint split = ((rest >> (shift + nibble)) & 0xF) | ((first >> (shift + 6)) & 3) << 4;
    return float(i < 4 ? direct : split);
  }

  float scale(uint i) const { return six_bits(a, c, i, 0); }
  float minimum(uint i) const { return six_bits(b, c, i, 4); }
};
