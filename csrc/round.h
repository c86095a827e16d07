// float32 -> the 16-bit formats: to the nearest, ties to even; overflow is infinite and a NaN stays one.
#pragma once

#include <cstdint>
#include <cstring>

namespace tandem {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  return x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_float16(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, size = bits_of(x) & 0x7FFFFFFF;
  uint32_t half;
  if (size > 0x7F800000) {
    half = 0x7E00;
  } else if (size >= 0x477FF000) {  // 65520 lies between the largest number and the next, which is none
    half = 0x7C00;
  } else if (size >= 0x38800000) {  // 2^-14, the smallest normal number: another bias, 13 bits fewer
    half = (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
  } else {  // whole multiples of 2^-24, which is the distance of float32 numbers behind 0.5
    half = bits_of((x < 0.0f ? -x : x) + 0.5f) - bits_of(0.5f);
  }
  return static_cast<uint16_t>(sign | half);
}

}  // namespace tandem
