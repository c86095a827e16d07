// Arenas for tests, written and read element by element: the specification of both packings.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace tandem {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int32_t kWildSlots[] = {INT32_MAX, INT32_MIN, -1};

inline float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// As its definition says: 2^-14 and more have 11 significant bits, smaller ones are multiples of 2^-24.
inline float float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                             : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 31) size = fraction == 0 ? INFINITY : kNan;
  return bits >> 15 == 0 ? size : -size;
}

// The nearest number of a format with exponents up to `highest` and `fraction_bits` behind the leading one, ties to
// even; a NaN stays one. From a power of 2 to the next, and below the lowest, are equally many steps: the bits count
// them.
inline uint16_t sixteen_bits(float value, int fraction_bits, int highest) {
  const int lowest = 1 - highest, steps_of_one = 1 << fraction_bits, infinite = (2 * highest + 1) * steps_of_one;
  if (value != value) return static_cast<uint16_t>(infinite + steps_of_one / 2);
  const double size = std::abs(static_cast<double>(value));
  int bits = infinite;
  if (size < std::ldexp(1.0, highest + 1)) {
    const int exponent = size < std::ldexp(1.0, lowest) ? lowest : std::ilogb(size);
    const double steps = std::nearbyint(std::ldexp(size, fraction_bits - exponent));
    bits = (exponent - lowest) * steps_of_one + static_cast<int>(steps);
  }
  return static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
}

inline uint16_t bf16_bits(float value) { return sixteen_bits(value, 7, 127); }
inline uint16_t float16_bits(float value) { return sixteen_bits(value, 10, 15); }

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

inline std::string dtype_name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

inline void store_element(char* at, DType dtype, float value) {
  if (dtype == DType::kFloat32) {
    std::memcpy(at, &value, sizeof value);
  } else {
    const uint16_t bits = dtype == DType::kBFloat16 ? bf16_bits(value) : float16_bits(value);
    std::memcpy(at, &bits, sizeof bits);
  }
}

// What an element of this dtype holds after `value` was stored in it.
inline float rounded(DType dtype, float value) {
  if (dtype == DType::kFloat32) return value;
  return dtype == DType::kBFloat16 ? bf16_value(bf16_bits(value)) : float16_value(float16_bits(value));
}

// Byte offset of one element inside a head's slice (attend.h, Packing).
inline int64_t k_offset(const Arena& arena, int64_t token, int64_t d) {
  const int64_t bytes = item_bytes(arena.dtype), pair = arena.dtype == DType::kBFloat16 ? 2 : 1;
  if (arena.packing == Packing::kRows) return (token * arena.head_dim + d) * bytes;
  const int64_t block = token / 16 * 16 * arena.stored(arena.head_dim);
  return (block + (d / pair * 16 + token % 16) * pair + d % pair) * bytes;
}

inline int64_t v_offset(const Arena& arena, int64_t token, int64_t d) {
  const int64_t bytes = item_bytes(arena.dtype), pair = arena.dtype == DType::kBFloat16 ? 2 : 1;
  if (arena.packing == Packing::kRows) return (token * arena.v_head_dim + d) * bytes;
  return ((token / pair * arena.stored(arena.v_head_dim) + d) * pair + token % pair) * bytes;
}

// An arena and its memory, exactly as large as it must be, every element a NaN.
struct OwnedArena {
  std::vector<char> k, v;
  Arena arena;

  explicit OwnedArena(const Arena& shape) : arena(shape) {
    const int64_t num_tokens = arena.num_slots * arena.num_kv_heads * arena.page_size, bytes = item_bytes(arena.dtype);
    k.resize(num_tokens * arena.k_token_bytes());
    v.resize(num_tokens * arena.v_token_bytes());
    for (size_t i = 0; i < k.size(); i += bytes) store_element(&k[i], arena.dtype, kNan);
    for (size_t i = 0; i < v.size(); i += bytes) store_element(&v[i], arena.dtype, kNan);
    arena.k = k.data();
    arena.v = v.data();
  }
  OwnedArena(const OwnedArena&) = delete;
  OwnedArena& operator=(const OwnedArena&) = delete;
};

// Slots of `num_rows` rows of `num_pages`, all different and in random order: the table of as many sequences and heads.
inline std::vector<int32_t> shuffled_slots(int64_t num_slots, std::mt19937& random) {
  std::vector<int32_t> slots(num_slots);
  for (int64_t i = 0; i < num_slots; ++i) slots[i] = static_cast<int32_t>(i);
  std::shuffle(slots.begin(), slots.end(), random);
  return slots;
}

inline std::string shape_name(const KernelTable& kernels, const Arena& arena) {
  return std::string(kernels.name) + " " + dtype_name(arena.dtype) +
         (arena.packing == Packing::kRows ? " rows" : " panels") + " head_dim " + std::to_string(arena.head_dim) +
         ", " + std::to_string(arena.v_head_dim) + " page_size " + std::to_string(arena.page_size);
}

// The instruction sets this machine has.
inline std::vector<const KernelTable*> available_kernels() {
  std::vector<const KernelTable*> found;
  for (const Isa& isa : isas()) {
    if (isa.missing.empty()) found.push_back(isa.kernels);
  }
  return found;
}

}  // namespace tandem
