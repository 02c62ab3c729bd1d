// Bits first .. first + 3 of a mask as the fifth bits (16) of the four bytes of a word.
inline uint fifth_bits(uint mask, uint first) {
  const uint bits = mask >> first;
  return (bits & 1) << 4 | (bits & 2) << 11 | (bits & 4) << 18 | (bits & 8) << 25;
}
