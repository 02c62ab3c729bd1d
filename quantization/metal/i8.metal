// int8.
struct I8 {
  static float4 values(uint word) { return signed_bytes(word); }
};

SCALED_KERNELS(I8)
