// The values that the four nibbles of a word (masked with 0x0F0F0F0F) stand for.
inline float4 look_up(constant char* values, uint nibbles) {
  const uchar4 index = as_type<uchar4>(nibbles);
  float4 result;
  result.x = float(values[index.x]);
  result.y = float(values[index.y]);
  result.z = float(values[index.z]);
  result.w = float(values[index.w]);
  return result;
}
