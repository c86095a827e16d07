// The few vector operations that the kernel is written in, for the instruction set this file is compiled for.
//
// Arithmetic uses GCC's vector types, so one text serves every width; intrinsics appear only where an instruction
// has no such spelling (bf16 dot products). Included by kernel.cc alone, inside its namespace per
// instruction set: nothing here may be shared between objects compiled with different flags.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attend.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && !defined(TANDEM_PORTABLE)  // every aarch64 has NEON; portable is the text without it
#define TANDEM_NEON
#include <arm_neon.h>
#endif

#if defined(__AMX_BF16__)
#define TANDEM_ISA amx_bf16
#define TANDEM_LANES 16
#define TANDEM_MAX_TILE_ROWS 6
#elif defined(__AVX512BF16__)
#define TANDEM_ISA avx512_bf16
#define TANDEM_LANES 16
#define TANDEM_MAX_TILE_ROWS 6
#elif defined(__AVX512VNNI__)
#define TANDEM_ISA avx512_vnni
#define TANDEM_LANES 16
#define TANDEM_MAX_TILE_ROWS 4
#elif defined(__AVX512F__)
#define TANDEM_ISA avx512
#define TANDEM_LANES 16
#define TANDEM_MAX_TILE_ROWS 4
#elif defined(__AVX2__)
#define TANDEM_ISA avx2
#define TANDEM_LANES 8
#define TANDEM_MAX_TILE_ROWS 3
#elif defined(TANDEM_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define TANDEM_ISA neon_bf16
#define TANDEM_LANES 4
#define TANDEM_MAX_TILE_ROWS 5  // 32 registers: g++ 12 spills 2 of 72 instructions in the loop over k, with 6 rows 18
#elif defined(TANDEM_NEON)
#define TANDEM_ISA neon
#define TANDEM_LANES 4
#define TANDEM_MAX_TILE_ROWS 4  // a panel row is widened to 8 registers: none spilled, with 5 rows 10
#else
#define TANDEM_ISA portable
#define TANDEM_LANES 4
#define TANDEM_MAX_TILE_ROWS 2
#endif

namespace tandem::TANDEM_ISA {

constexpr int kLanes = TANDEM_LANES;
constexpr int kVecsPerBlock = 16 / kLanes;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
// A cast between the two, `(Vec)ivec`, keeps the bits.

inline Vec splat(float x) { return x - Vec{}; }
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(void* p, Vec v) { std::memcpy(p, &v, sizeof v); }
// Around the caches, to a whole line that nobody here reads soon; p is aligned. `drain` before others are told of it.
inline void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
inline void drain() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
// a > b ? a : b, so b where one is a NaN; g++ 12 makes two instructions of that.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Folds halves onto each other: log2(kLanes) steps, not kLanes.
inline float reduce_max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(TANDEM_NEON)
  return vmaxvq_f32((float32x4_t)v);
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
  }
  return lanes[0];
#endif
}
inline float reduce_add(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(TANDEM_NEON)
  return vaddvq_f32((float32x4_t)v);
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
#endif
}

struct Sum4 {
  static Vec of(Vec a, Vec b) { return a + b; }
  static float all(Vec v) { return reduce_add(v); }
};
struct Max4 {
  static Vec of(Vec a, Vec b) { return max(a, b); }
  static float all(Vec v) { return reduce_max(v); }
};
// The same of 4 vectors at once, to[4]: with 16 lanes in 8 shuffles, where one by one takes 16.
template <class Fold>
inline void reduce4(const Vec* v, float* to) {
#if defined(__AVX512F__)
  const auto fold_pairs = [](Vec a, Vec b) {
    const __m512 x = (__m512)a, y = (__m512)b;
    return (__m512d)Fold::of((Vec)_mm512_unpacklo_ps(x, y), (Vec)_mm512_unpackhi_ps(x, y));
  };
  const __m512d x = fold_pairs(v[0], v[1]), y = fold_pairs(v[2], v[3]);
  Vec all = Fold::of((Vec)_mm512_unpacklo_pd(x, y), (Vec)_mm512_unpackhi_pd(x, y));  // every quarter: all 4
  all = Fold::of(all, (Vec)_mm512_shuffle_f32x4((__m512)all, (__m512)all, 0x4E));
  all = Fold::of(all, (Vec)_mm512_shuffle_f32x4((__m512)all, (__m512)all, 0xB1));
  _mm_storeu_ps(to, _mm512_castps512_ps128((__m512)all));
#else
  for (int i = 0; i < 4; ++i) to[i] = Fold::all(v[i]);
#endif
}

// Lanes outside [begin, end) become -inf, whatever they held (NaN included).
inline Vec keep_lanes(Vec v, int64_t begin, int64_t end) {
  IVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const int32_t first = begin < 0 ? 0 : begin > kLanes ? kLanes : static_cast<int32_t>(begin);
  const int32_t last = end < 0 ? 0 : end > kLanes ? kLanes : static_cast<int32_t>(end);
  return lane >= first && lane < last ? v : splat(-INFINITY);
}

// exp for x <= 0 to about 1 ulp: x = n ln2 + r, then 2^n, put together as bits, times a polynomial of r (minimax of
// degree 6: 2^-28.9). Below -87.7 (and for -inf) exactly 0; a NaN stays: `max` gives its second operand for it.
inline Vec exp_nonpositive(Vec x) {
  const Vec clamped = max(splat(-88.0f), x);
  // 1.5 * 2^23 + 127: adding it rounds to an integer in the low mantissa bits, which become the exponent of 2^n.
  const Vec magic = splat(12583039.0f), shifted = clamped * 1.44269504088896341f + magic, n = shifted - magic;
  const Vec r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = r * 1.3843644e-3f + 8.374164e-3f;
  p = p * r + 4.1668e-2f;
  p = p * r + 1.6666432e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Vec)((IVec)shifted << 23);
}

// tanh to a relative error of 8 * 2^-24: near 0, where 1 - exp would cancel, Cephes' tanhf polynomial.
inline Vec tanh(Vec x) {
  const Vec size = max(x, -x), square = x * x;
  const Vec e = exp_nonpositive(size * -2.0f);
  const Vec far = (1.0f - e) / (1.0f + e);
  Vec p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  p = p * square * x + x;
  return size < 0.625f ? p : (x < 0.0f ? -far : far);
}

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// kLanes numbers of float16, exactly: subnormal ones, infinities and NaN too.
inline Vec widen_half(const void* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#elif defined(TANDEM_NEON)
  float16x4_t halves;
  std::memcpy(&halves, p, sizeof halves);
  return (Vec)vcvt_f32_f16(halves);
#else
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  const IVec bits = __builtin_convertvector(halves, IVec), size = bits & 0x7FFF;
  const Vec subnormal = __builtin_convertvector(size, Vec) * 5.9604644775390625e-8f;  // 2^-24
  const IVec rebias = size >= 0x7C00 ? (IVec{} + (224 << 23)) : (IVec{} + (112 << 23));
  const IVec normal = (size << 13) + rebias;
  return (Vec)((size < 0x400 ? (IVec)subnormal : normal) | (bits & 0x8000) << 16);
#endif
}

// ---- Elements: how a panel of K or V is multiplied ---------------------------------------------------------------
// A panel row holds 16 lanes of the kPair neighbours of kDType. `mac` adds to each lane the dot product of its
// neighbours with a weight of as many numbers, broadcast. Scores: lanes are tokens, weights are q. Output: lanes are
// dims, weights are probabilities. `put` stores numbers [i, i + kLanes) of a row of n weights; n is a multiple of 16.

struct Float32 {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr bool kIsDot = false;
  using Panel = Vec;
  using Weight = Vec;
  static void put(Vec w, int64_t i, int64_t, uint32_t* out) { store(out + i, w); }
  static Panel panel(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static Weight weight(const uint32_t* w, int64_t k, int64_t) { return splat(as_float(w[k])); }
  static Vec mac(Vec acc, Panel m, Weight w) { return acc + m * w; }
};

struct Float16 : Float32 {
  static constexpr DType kDType = DType::kFloat16;
  static Panel panel(const char* p) { return widen_half(p); }
};

// Without dot-product instructions: a bf16 is the upper half of a float32, so a pair becomes two vectors by a shift
// and a mask, and two multiply-adds in float32 follow.
struct Bf16Wide {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr bool kIsDot = false;
  struct Panel {
    Vec even, odd;
  };
  using Weight = Panel;
  static void put(Vec w, int64_t i, int64_t, uint32_t* out) { store(out + i, w); }
  static Panel panel(const char* p) {
    IVec pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return {(Vec)(pairs << 16), (Vec)(pairs & static_cast<int32_t>(0xFFFF0000u))};
  }
  static Weight weight(const uint32_t* w, int64_t k, int64_t) {
    return {splat(as_float(w[2 * k])), splat(as_float(w[2 * k + 1]))};
  }
  static Vec mac(Vec acc, Panel m, Weight w) { return acc + m.even * w.even + m.odd * w.odd; }
};

#if defined(__AVX512BF16__)
#define TANDEM_BF16_DOT
// A weight is a high and a low bf16 part, so that rounding it costs 2^-17, not 2^-9: q rounded once would put an
// error of 0.1 on scores of sigma 11. The low parts of p take a fifth of a tile's time; where they are all zero
// (a bf16 q), kSplit = false leaves the second instruction out.
template <bool kSplit>
struct Bf16Dot {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr bool kIsDot = true, kIsSplit = kSplit;
  using Panel = __m512bh;
  struct Weight {
    __m512bh high, low;
  };
  // n / 2 words of high pairs, then n / 2 of low ones.
  static void put(Vec w, int64_t i, int64_t n, uint32_t* out) {
    uint16_t* const high = reinterpret_cast<uint16_t*>(out) + i;
    const __m256bh h = _mm512_cvtneps_pbh((__m512)w);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), (__m256i)h);
    if constexpr (kSplit) {
      const Vec rounded = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + n), (__m256i)_mm512_cvtneps_pbh((__m512)(w - rounded)));
    }
  }
  static Panel panel(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Weight weight(const uint32_t* w, int64_t k, int64_t num_k) {
    return {(__m512bh)_mm512_set1_epi32(w[k]), kSplit ? (__m512bh)_mm512_set1_epi32(w[num_k + k]) : __m512bh{}};
  }
  static Vec mac(Vec acc, Panel m, Weight w) {
    __m512 sum = _mm512_dpbf16_ps((__m512)acc, m, w.high);
    if constexpr (kSplit) sum = _mm512_dpbf16_ps(sum, m, w.low);
    return (Vec)sum;
  }
};
#elif defined(TANDEM_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define TANDEM_BF16_DOT
// The same with BFDOT, which adds the two products, and their sum to the accumulator, each time rounding to odd: an
// error below one unit in the last place (2^-23), of either sign alike, where a multiply-add has half of one.
// Subnormal numbers count as zero.
template <bool kSplit>
struct Bf16Dot {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr bool kIsDot = true, kIsSplit = kSplit;
  using Panel = bfloat16x8_t;
  struct Weight {
    bfloat16x8_t high, low;
  };
  static void put(Vec w, int64_t i, int64_t n, uint32_t* out) {
    char* const high = reinterpret_cast<char*>(out) + 2 * i;
    const bfloat16x4_t h = vcvt_bf16_f32((float32x4_t)w);
    std::memcpy(high, &h, sizeof h);
    if constexpr (kSplit) {
      const bfloat16x4_t l = vcvt_bf16_f32((float32x4_t)w - vcvt_f32_bf16(h));
      std::memcpy(high + 2 * n, &l, sizeof l);
    }
  }
  static Panel panel(const char* p) {
    Panel pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return pairs;
  }
  static bfloat16x8_t pair(uint32_t bits) { return vreinterpretq_bf16_u32(vdupq_n_u32(bits)); }
  static Weight weight(const uint32_t* w, int64_t k, int64_t num_k) {
    return {pair(w[k]), kSplit ? pair(w[num_k + k]) : bfloat16x8_t{}};
  }
  static Vec mac(Vec acc, Panel m, Weight w) {
    float32x4_t sum = vbfdotq_f32((float32x4_t)acc, m, w.high);
    if constexpr (kSplit) sum = vbfdotq_f32(sum, m, w.low);
    return (Vec)sum;
  }
};
#endif

// For all that the compiler knows, the register holds other numbers from here on.
template <class Register>
inline void hide(Register& x) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(x));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#else
  asm volatile("" : "+m"(x));
#endif
}
inline void hide(Bf16Wide::Panel& panel) {
  hide(panel.even);
  hide(panel.odd);
}

// ---- Moves ---------------------------------------------------------------------------------------------------------

// Words x and y in turn, of the lower (kUpper = 0) or upper half of each quarter of a vector: four lanes. A word is
// kWord lanes. Like `pick_quarters`, one instruction wherever vectors have 4, 8 or 16 lanes.
template <int kWord, int kUpper>
inline IVec interleave(IVec x, IVec y) {
  IVec from;  // of the lanes of x and then y
  for (int lane = 0; lane < kLanes; ++lane) {
    const int word = lane % 4 / kWord, in_x = word / 2 * kWord + lane % kWord + kUpper * 2;
    from[lane] = lane / 4 * 4 + in_x + word % 2 * kLanes;
  }
  return __builtin_shuffle(x, y, from);
}

// Every second quarter of x and then y, from the first (kOdd = 0) or the second on.
template <int kOdd>
inline IVec pick_quarters(IVec x, IVec y) {
  IVec from;
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = (lane / 4 * 2 + kOdd) * 4 + lane % 4;
  return __builtin_shuffle(x, y, from);
}

// Transposes a tile of kLanes x kLanes 4-byte words; strides in bytes.
inline void transpose_lanes(const char* src, int64_t src_stride, char* dst, int64_t dst_stride) {
  IVec a[kLanes], b[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(&a[i], src + i * src_stride, sizeof a[i]);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2) {
    b[i] = interleave<1, 0>(a[i], a[i + 1]);
    b[i + 1] = interleave<1, 1>(a[i], a[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 4) {
    a[i] = interleave<2, 0>(b[i], b[i + 2]);
    a[i + 1] = interleave<2, 1>(b[i], b[i + 2]);
    a[i + 2] = interleave<2, 0>(b[i + 1], b[i + 3]);
    a[i + 3] = interleave<2, 1>(b[i + 1], b[i + 3]);
  }
  // Quarter q of a[i + c] holds column 4 q + c of rows [i, i + 4): what is left is a transpose of whole quarters.
  for (int num_quarters = kLanes / 4; num_quarters > 1; num_quarters /= 2) {
    for (int i = 0; i < kLanes; ++i) b[i] = a[i];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      const int first = i / 4 * 8 + i % 4;
      a[i] = pick_quarters<0>(b[first], b[first + 4]);
      a[kLanes / 2 + i] = pick_quarters<1>(b[first], b[first + 4]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(dst + i * dst_stride, &a[i], sizeof a[i]);
}

// The same of 16 x 16 words.
inline void transpose16(const char* src, int64_t src_stride, char* dst, int64_t dst_stride) {
  for (int i = 0; i < 16; i += kLanes) {
    for (int j = 0; j < 16; j += kLanes) {
      transpose_lanes(src + i * src_stride + j * 4, src_stride, dst + j * dst_stride + i * 4, dst_stride);
    }
  }
}

}  // namespace tandem::TANDEM_ISA
