// Attention over codes (attend.h, SliceOfK): both products in whole numbers, for the instruction set this file is
// compiled for; included by kernel.cc alone, like simd.h.
//
// A key is scale * code + zero, so that q . k = sum_d (q_d scale_d) code_d + sum_d q_d zero_d: the scales of a page go
// into the weights, once for all its tokens. Weights become whole numbers of 16 bits times a unit, their largest being
// 32639, so that they are off by at most 2^-16 of the largest; products of codes with them are summed exactly in 32
// bits. In p . v it is the same, with the scales of tokens. A code then costs a byte (or half) of memory and, with
// VNNI, a 32nd of an instruction for each row, without being widened to a float.
#pragma once

#include <cstdint>
#include <cstring>

#include "attend.h"
#include "product.h"
#include "quantise.h"
#include "simd.h"

namespace tandem::TANDEM_ISA {
namespace {

// 127 * 256 + 127: two digits of 8 bits with a sign each.
constexpr float kMostWeight = 32639.0f;
// What is smaller counts as nothing: of its inverse there would be none.
constexpr float kLeastWeight = 1e-30f;

#if defined(__AVX512VNNI__)
#define TANDEM_VNNI
#endif

// kLanes x 4 codes, and the sums of their products with 4 weights that all lanes share. Two words make 4 weights:
// with VNNI the high digits and the low ones, without it weights 0 and 2 and weights 1 and 3, of 16 bits each.
#if defined(TANDEM_VNNI)
struct FourCodes {
  explicit FourCodes(IVec x) : bytes((__m512i)x) {}
  __m512i bytes;
};
struct Sum {
  __m512i high, low;
  static Sum of(int32_t high, int32_t low) { return {_mm512_set1_epi32(high), _mm512_set1_epi32(low)}; }
  // Spelled out: of the intrinsic g++ 12 makes a move for every product, and spills.
  static void multiply(__m512i& sum, __m512i codes, uint32_t weights) {
    const __m512i w = _mm512_set1_epi32(static_cast<int32_t>(weights));
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(w));
  }
  void add(FourCodes x, uint32_t first, uint32_t second) {
    multiply(high, x.bytes, first);
    multiply(low, x.bytes, second);
  }
  Vec value() const { return (Vec)_mm512_cvtepi32_ps(high) * 256.0f + (Vec)_mm512_cvtepi32_ps(low); }
};
#else
struct FourCodes {
#if defined(__AVX2__)
  explicit FourCodes(IVec x) : even(x & 0x00FF00FF), odd(IVec((UVec)x >> 8) & 0x00FF00FF) {}
  IVec even, odd;
#else
  explicit FourCodes(IVec x) : bytes(x) {}
  IVec bytes;
#endif
};
struct Sum {
  IVec sum;
  // Of digits as VNNI has them; together at most 128 * 256 * 32639, less than 2^30.
  static Sum of(int32_t high, int32_t low) { return {IVec{} + (high * 256 + low)}; }
  void add(FourCodes x, uint32_t first, uint32_t second) {
#if defined(__AVX512F__)
    const __m512i w02 = _mm512_set1_epi32(static_cast<int32_t>(first)),
                  w13 = _mm512_set1_epi32(static_cast<int32_t>(second));
    sum += (IVec)_mm512_madd_epi16((__m512i)x.even, w02) + (IVec)_mm512_madd_epi16((__m512i)x.odd, w13);
#elif defined(__AVX2__)
    const __m256i w02 = _mm256_set1_epi32(static_cast<int32_t>(first)),
                  w13 = _mm256_set1_epi32(static_cast<int32_t>(second));
    sum += (IVec)_mm256_madd_epi16((__m256i)x.even, w02) + (IVec)_mm256_madd_epi16((__m256i)x.odd, w13);
#else
    sum += (x.bytes & 255) * static_cast<int16_t>(first) + (x.bytes >> 8 & 255) * static_cast<int16_t>(second) +
           (x.bytes >> 16 & 255) * static_cast<int16_t>(first >> 16) +
           (x.bytes >> 24 & 255) * static_cast<int16_t>(second >> 16);
#endif
  }
  Vec value() const { return __builtin_convertvector(sum, Vec); }
};
#endif

// One row of weights as whole numbers: x = unit * (256 high + low). start: what sums begin with where codes count from
// -128.
struct WholeRow {
  uint32_t words[2][kMaxHeadDim / 4];
  float unit, shift;  // shift: what is added to every product
  int32_t start_high, start_low;
};

inline int32_t sum_of(IVec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
  return total;
#endif
}

// x [num] -> row; num is a multiple of 16.
template <bool kFrom128>
inline void put_whole(const float* x, int64_t num, WholeRow& row) {
  Vec largest{};
  for (int64_t i = 0; i < num; i += kLanes) {
    const Vec v = load(x + i);
    largest = max(max(v, -v), largest);
  }
  const float most = reduce_max(largest), inverse = most > kLeastWeight ? kMostWeight / most : 0.0f;
  row.unit = most < INFINITY ? most / kMostWeight : NAN;
  IVec high_sum{}, low_sum{};
  for (int64_t i = 0; i < num; i += kLanes) {
    // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits.
    const IVec w = (IVec)(load(x + i) * inverse + 12582912.0f) - 0x4B400000, high = (w + 128) >> 8;
    if (kFrom128) {
      high_sum += high;
      low_sum += w - (high << 8);
    }
#if defined(TANDEM_VNNI)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row.words[0] + i / 4), _mm512_cvtepi32_epi8((__m512i)high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row.words[1] + i / 4), _mm512_cvtepi32_epi8((__m512i)w));
#else
    int32_t whole[kLanes];
    std::memcpy(whole, &w, sizeof whole);
    for (int n = 0; n < kLanes; n += 4) {
      row.words[0][(i + n) / 4] = (whole[n] & 0xFFFF) | static_cast<uint32_t>(whole[n + 2]) << 16;
      row.words[1][(i + n) / 4] = (whole[n + 1] & 0xFFFF) | static_cast<uint32_t>(whole[n + 3]) << 16;
    }
#endif
  }
  row.start_high = kFrom128 ? -128 * sum_of(high_sum) : 0;
  row.start_low = kFrom128 ? -128 * sum_of(low_sum) : 0;
}

// How many rows, and blocks of 16 lanes, are multiplied at once: their sums stay in registers.
#if TANDEM_LANES == 16
constexpr int kWholeRows = 4, kWholeBlocks = 2;
#elif TANDEM_LANES == 8
constexpr int kWholeRows = 3, kWholeBlocks = 1;
#else
constexpr int kWholeRows = 2, kWholeBlocks = 1;
#endif

// put(row, lane of the panel, products with unit and shift) for kRows rows and kBlocks blocks of a panel of codes.
template <int kBits, int kRows, int kBlocks, class Put>
TANDEM_INLINE void whole_product(const Panel& panel, int64_t block, const WholeRow* rows, Ahead& ahead,
                                 const Put& put) {
  constexpr int kVecs = kBlocks * kVecsPerBlock;
  Sum sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) sum[r][n] = Sum::of(rows[r].start_high, rows[r].start_low);
  }
  Steps steps(ahead, panel.num_weights(), panel.at[0]);
  for (int64_t part = 0, word = 0; part < panel.num_parts; ++part) {
    const char* row[kBlocks];
    for (int b = 0; b < kBlocks; ++b) row[b] = panel.place(part, block + b);
    for (int64_t k = 0; k < panel.num_k; ++k, word += 8 / kBits) {
      steps.ask();
      IVec x[kVecs];
      for (int n = 0; n < kVecs; ++n) {
        std::memcpy(&x[n], row[n / kVecsPerBlock] + k * panel.k_stride + n % kVecsPerBlock * kLanes * 4, sizeof x[n]);
      }
      for (int half = 0; half < 8 / kBits; ++half) {
        for (int n = 0; n < kVecs; ++n) {
          const FourCodes codes(kBits == 8 ? x[n] : (half == 0 ? x[n] : x[n] >> 4) & 0x0F0F0F0F);
          for (int r = 0; r < kRows; ++r)
            sum[r][n].add(codes, rows[r].words[0][word + half], rows[r].words[1][word + half]);
        }
      }
    }
  }
  steps.give_back(ahead);
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) put(r, block * 16 + n * kLanes, sum[r][n].value() * rows[r].unit + rows[r].shift);
  }
}

template <int kBits, int kRows, class Put>
void whole_rows(const Panel& panel, const WholeRow* rows, Ahead& ahead, const Put& put) {
  int64_t block = 0;
  for (; block + kWholeBlocks <= panel.num_blocks; block += kWholeBlocks) {
    whole_product<kBits, kRows, kWholeBlocks>(panel, block, rows, ahead, put);
  }
  for (; block < panel.num_blocks; ++block) whole_product<kBits, kRows, 1>(panel, block, rows, ahead, put);
}

// All rows, while some `ahead_bytes` are asked for.
template <int kBits, class Put>
void whole_products(const Panel& panel, const WholeRow* rows, int64_t num_rows, int64_t ahead_bytes, Ahead& ahead,
                    const Put& put) {
  const int64_t num_passes = (num_rows + kWholeRows - 1) / kWholeRows;
  const int64_t num_panels = panel.num_blocks / kWholeBlocks + panel.num_blocks % kWholeBlocks;
  ahead.pace(ahead_bytes, num_passes * num_panels * panel.num_weights());
  for (int64_t pass = 0, r = 0; pass < num_passes; ++pass) {
    const int64_t num = (num_rows - r + num_passes - pass - 1) / (num_passes - pass);
    const auto put_row = [&](int row, int64_t lane, Vec x) { put(r + row, lane, x); };
    switch (num) {
      case 1: whole_rows<kBits, 1>(panel, rows + r, ahead, put_row); break;
      case 2: whole_rows<kBits, 2>(panel, rows + r, ahead, put_row); break;
#if TANDEM_LANES >= 8
      case 3: whole_rows<kBits, 3>(panel, rows + r, ahead, put_row); break;
#endif
#if TANDEM_LANES >= 16
      case 4: whole_rows<kBits, 4>(panel, rows + r, ahead, put_row); break;
#endif
    }
    r += num;
  }
}

// Of the next tile's lines, what is asked for in each step of this one, in percent; p . v asks for the rest. They
// follow from what each step takes (from L2, 4 rows): asked for in the products alone, as with panels, a call from
// memory was 12 % slower, because codes leave less time for each line.
constexpr int64_t kWeighPercent = 12, kScorePercent = 28, kSoftmaxPercent = 15;

// Of some percent of these bytes, the lines of each of num_asks.
inline int lines_each(int64_t num_bytes, int64_t percent, int64_t num_asks) {
  return static_cast<int>(min64(16, (num_bytes * percent / 100 / 64 + num_asks / 2) / num_asks));
}

// bf16 numbers [num] -> float32; num is a multiple of 16.
inline void widen_steps(const char* steps, int64_t num, float* to) {
  typedef uint16_t Steps __attribute__((vector_size(kLanes * 2)));
  for (int64_t i = 0; i < num; i += kLanes) {
    Steps x;
    std::memcpy(&x, steps + 2 * i, sizeof x);
    store(to + i, (Vec)(__builtin_convertvector(x, IVec) << 16));
  }
}

// Room for the products of a tile.
struct alignas(64) WholeScratch {
  float scales[kMaxHeadDim], zeros[kMaxHeadDim];  // of the channels of a page
  float token_scales[kMaxHeadDim / kGroupDims][64], token_zeros[kMaxHeadDim / kGroupDims][64];  // of V, of a tile
  float exact[kMaxHeadDim / kGroupDims][64];  // channels of K as they are
  float x[kMaxHeadDim];
  WholeRow rows[kMaxHeadRows];
};

// Blocks [first, first + num_blocks) of a tile that lie in one page: their scores, [row][64] from the first one's on.
struct ScoresOfPage {
  const Part& arena;
  const char* slice;      // of K
  const char* const* at;  // codes of each block
  int64_t token;          // of the page, where the first block starts
  int64_t num_blocks;
};

// The queries as weights of one page's codes.
template <int kBits>
inline void weigh_channels(const ScoresOfPage& page, const SliceOfK& k, const float* q, int64_t q_stride,
                           int64_t num_rows, Ahead& ahead, int row_lines, WholeScratch& s) {
  constexpr bool kIsInt4 = kBits == 4;
  const bool keeps_all = page.arena.num_channels == 0;
  widen_steps(page.slice + k.scales, k.num_channels, s.scales);
  if (kIsInt4) widen_steps(page.slice + k.zeros, k.num_channels, s.zeros);
  const uint8_t* const index = reinterpret_cast<const uint8_t*>(page.slice) + k.index;
  for (int64_t r = 0; r < num_rows; ++r) {
    ahead.ask(row_lines);
    const float* from = q + r * q_stride;
    float gathered[kMaxHeadDim];
    if (!keeps_all) {
      for (int64_t i = 0; i < k.num_channels; ++i) gathered[i] = from[index[i]];
      from = gathered;
    }
    Vec shift{};
    for (int64_t i = 0; i < k.num_channels; i += kLanes) {
      const Vec x = load(from + i);
      store(s.x + i, x * load(s.scales + i));
      if (kIsInt4) shift += x * load(s.zeros + i);
    }
    put_whole<!kIsInt4>(s.x, k.num_channels, s.rows[r]);
    s.rows[r].shift = kIsInt4 ? reduce_add(shift) : 0.0f;
  }
}

// score_RT += what channels that are kept as they are add.
inline void add_exact(const ScoresOfPage& page, const SliceOfK& k, const float* q, int64_t q_stride, int64_t num_rows,
                      float* score_RT, WholeScratch& s) {
  const int64_t num_tokens = page.num_blocks * kBlockTokens, item = item_bytes(page.arena.dtype);
  for (int64_t e = 0; e < k.num_exact; ++e) {
    const char* const from = page.slice + k.exact + (e * page.arena.page_size + page.token) * item;
    widen_row(page.arena.dtype, from, num_tokens, s.exact[e]);
    const int64_t channel = static_cast<uint8_t>(page.slice[k.exact_index + e]);
    for (int64_t r = 0; r < num_rows; ++r) {
      const float x = q[r * q_stride + channel];
      float* const score = score_RT + r * 64;
      for (int64_t t = 0; t < num_tokens; t += kLanes) store(score + t, load(score + t) + load(s.exact[e] + t) * x);
    }
  }
}

// q . k of the blocks of one page.
template <int kBits>
void score_page(const ScoresOfPage& page, const float* q, int64_t q_stride, int64_t num_rows, int64_t ahead_bytes,
                float* score_RT, Ahead& ahead, WholeScratch& s) {
  const SliceOfK& k = page.arena.of_k;
  weigh_channels<kBits>(page, k, q, q_stride, num_rows, ahead, lines_each(ahead_bytes, kWeighPercent, num_rows), s);
  Panel panel{{}, 64, k.num_channels * kBits / 32, page.num_blocks, 0, 1};
  for (int64_t i = 0; i < page.num_blocks; ++i) panel.at[i] = page.at[i];
  whole_products<kBits>(panel, s.rows, num_rows, ahead_bytes * kScorePercent / 100, ahead,
                        [&](int64_t r, int64_t lane, Vec x) { store(score_RT + r * 64 + lane, x); });
  add_exact(page, k, q, q_stride, num_rows, score_RT, s);
}

}  // namespace
}  // namespace tandem::TANDEM_ISA
