// float8_e4m3fn: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, NaN where the lower seven bits are
// ones. Moved into a half's fields the number is 2^-8 of its value, subnormals included.
struct F8_E4M3 {
  static float value(uchar code) {
    const ushort bits = ushort(uint(code & 0x80) << 8 | uint(code & 0x7F) << 7);
    const float number = float(as_type<half>(bits)) * 256.0f;
    return (code & 0x7F) == 0x7F ? as_type<float>(0x7FC00000u) : number;
  }

  static float4 values(uint word) {
    const uchar4 codes = as_type<uchar4>(word);
    float4 numbers;
    numbers.x = value(codes.x);
    numbers.y = value(codes.y);
    numbers.z = value(codes.z);
    numbers.w = value(codes.w);
    return numbers;
  }
};

SCALED_KERNELS(F8_E4M3)
