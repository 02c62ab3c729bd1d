// float8_e5m2: the upper byte of a half.
struct F8_E5M2 {
  static float4 values(uint word) {
    float4 numbers;
    numbers.x = float(as_type<half>(ushort(word << 8)));
    numbers.y = float(as_type<half>(ushort(word & 0xFF00)));
    numbers.z = float(as_type<half>(ushort((word >> 8) & 0xFF00)));
    numbers.w = float(as_type<half>(ushort((word >> 16) & 0xFF00)));
    return numbers;
  }
};

SCALED_KERNELS(F8_E5M2)
