// What limits attention on this machine, measured: reading, and multiply-adds of the products' instruction. For the
// instruction set this file is compiled for; included by kernel.cc alone, like simd.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "product.h"
#include "simd.h"

namespace tandem::TANDEM_ISA {
namespace {

uint64_t read(const char* data, int64_t num_bytes, int64_t prefetch_bytes) {
  IVec sum[4] = {};
  constexpr int64_t kStep = 4 * sizeof(IVec);
  for (int64_t i = 0; i + kStep <= num_bytes; i += kStep) {
    if (prefetch_bytes != 0) {
      for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(data + i + line + prefetch_bytes);
    }
    for (int n = 0; n < 4; ++n) {
      IVec x;
      std::memcpy(&x, data + i + n * sizeof x, sizeof x);
      sum[n] ^= x;
    }
  }
  const IVec all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  uint64_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits ^= static_cast<uint32_t>(all[i]);
  return bits;
}

#if defined(TANDEM_BF16_DOT) && !defined(__AMX_BF16__)
using VectorElement = Bf16Dot<false>;
constexpr int64_t kWeightParts = 2;  // of p; a bf16 q is one
#else
using VectorElement = Bf16Wide;
constexpr int64_t kWeightParts = 1;
#endif

int64_t multiply_adds(int64_t head_rows) {
#if defined(__AMX_BF16__)
  if (head_rows >= kMinDotRows) return 0;
#endif
  return head_rows * (1 + kWeightParts);
}

int64_t dot(int64_t num_steps) {
  constexpr int kChains = kMaxTileRows > 3 ? 24 : 12;  // more than latency times rate, no more than registers hold
  alignas(64) uint32_t ones[16];
  for (uint32_t& pair : ones) pair = 0x3F803F80;
  asm volatile("" : : "r"(ones) : "memory");  // g++ 12 for Arm writes a constant bf16 1 that its assembler refuses
  auto panel = VectorElement::panel(reinterpret_cast<const char*>(ones));
  const auto weight = VectorElement::weight(ones, 0, 1);
  Vec sum[kChains] = {};
  for (int64_t step = 0; step < num_steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) {
      hide(panel);  // or equal sums would be computed once, and products that do not change
      sum[i] = VectorElement::mac(sum[i], panel, weight);
    }
  }
  Vec all{};
  for (int i = 0; i < kChains; ++i) all += sum[i];
  volatile float keep = reduce_add(all);  // so that the sums are computed
  (void)keep;
  return num_steps * kChains * kLanes * pair_of(VectorElement::kDType);
}

}  // namespace
}  // namespace tandem::TANDEM_ISA
