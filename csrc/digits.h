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
// Spelled out: of the intrinsic g++ 12 makes a move for every product, and spills.
inline void multiply_bytes(__m512i& sum, __m512i codes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
}
struct Sum {
  __m512i high, low;
  static Sum of(int32_t start) { return {__m512i{}, _mm512_set1_epi32(start)}; }
  void add(FourCodes x, uint32_t first, uint32_t second) {
    multiply_bytes(high, x.bytes, _mm512_set1_epi32(static_cast<int32_t>(first)));
    multiply_bytes(low, x.bytes, _mm512_set1_epi32(static_cast<int32_t>(second)));
  }
  Vec value() const { return (Vec)_mm512_cvtepi32_ps((__m512i)(((IVec)high << 8) + (IVec)low)); }
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
  static Sum of(int32_t start) { return {IVec{} + start}; }
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

// One row of weights as whole numbers, in units. Sums stay below 2^31: kMaxHeadDim codes of 255, times 32639.
struct WholeRow {
  alignas(64) uint32_t words[2][kMaxHeadDim / 4];
  float unit, shift;  // shift: what is added to every product
  int32_t start;      // what sums begin with where codes count from -128
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

// Weights [0, num) of a row, x(i) for i and the lanes behind it -> its words; num is a multiple of 16. 128 times their
// sum.
template <bool kSums, class X>
TANDEM_INLINE int32_t put_words(int64_t num, const X& x, WholeRow& row) {
  IVec sum{};
#if defined(TANDEM_VNNI)
  // Packing works in quarters of a register: 4 vectors of numbers, and what came of them is put in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i byte = _mm512_set1_epi16(255), half = _mm512_set1_epi16(128), all128 = _mm512_set1_epi8(-128);
  __m512i high_sum{}, low_sum{};
  for (int64_t i = 0; i < num; i += 64) {
    __m512i w[4] = {};
    for (int n = 0; n < 4 && i + n * 16 < num; ++n) w[n] = _mm512_cvtps_epi32((__m512)x(i + n * 16));
    const __m512i first = _mm512_packs_epi32(w[0], w[1]), second = _mm512_packs_epi32(w[2], w[3]);
    const __m512i high = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(first, half), 8),
                                            _mm512_srai_epi16(_mm512_add_epi16(second, half), 8));
    const __m512i low = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte));
    _mm512_store_si512(row.words[0] + i / 4, _mm512_permutexvar_epi32(order, high));
    _mm512_store_si512(row.words[1] + i / 4, _mm512_permutexvar_epi32(order, low));
    if (kSums) {
      multiply_bytes(high_sum, all128, high);
      multiply_bytes(low_sum, all128, low);
    }
  }
  if (kSums) sum = ((IVec)high_sum << 8) + (IVec)low_sum;
#else
  for (int64_t i = 0; i < num; i += kLanes) {
    // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits.
    const IVec w = (IVec)(x(i) + 12582912.0f) - 0x4B400000;
    if (kSums) sum += w << 7;
    int32_t whole[kLanes];
    std::memcpy(whole, &w, sizeof whole);
    for (int n = 0; n < kLanes; n += 4) {
      row.words[0][(i + n) / 4] = (whole[n] & 0xFFFF) | static_cast<uint32_t>(whole[n + 2]) << 16;
      row.words[1][(i + n) / 4] = (whole[n + 1] & 0xFFFF) | static_cast<uint32_t>(whole[n + 3]) << 16;
    }
  }
#endif
  return kSums ? sum_of(sum) : 0;
}

// Rows of numbers, and what every number is multiplied by: the scale of the codes that it meets; their zeros add up.
struct Scaled {
  const float* x;  // rows, `stride` apart
  int64_t stride, num;
  const float *scales, *zeros;
};

// kRows rows as whole numbers: one, or 4, whose chains of dependent instructions overlap. Asks for `row_lines` lines
// with each.
template <int kBits, int kRows>
TANDEM_INLINE void put_whole(const Scaled& from, int row_lines, Ahead& ahead, WholeRow* rows) {
  Vec largest[kRows] = {}, shift[kRows] = {};
  for (int64_t i = 0; i < from.num; i += kLanes) {
    const Vec scale = load(from.scales + i);
    for (int r = 0; r < kRows; ++r) {
      const Vec x = load(from.x + r * from.stride + i), weight = x * scale;
      largest[r] = max(max(weight, -weight), largest[r]);
      if (kBits == 4) shift[r] += x * load(from.zeros + i);
    }
  }
  float most[kRows], shifts[kRows] = {};
  if constexpr (kRows == 4) {
    reduce4<Max4>(largest, most);
    if (kBits == 4) reduce4<Sum4>(shift, shifts);
  } else {
    for (int r = 0; r < kRows; ++r) {
      most[r] = reduce_max(largest[r]);
      if (kBits == 4) shifts[r] = reduce_add(shift[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    ahead.ask(row_lines);
    const float inverse = most[r] > kLeastWeight ? kMostWeight / most[r] : 0.0f;
    const float* const x = from.x + r * from.stride;
    const auto weight = [&](int64_t i) { return load(x + i) * load(from.scales + i) * inverse; };
    const int32_t sum = put_words<kBits == 8>(from.num, weight, rows[r]);
    rows[r].start = -sum;
    rows[r].unit = most[r] < INFINITY ? most[r] / kMostWeight : NAN;
    rows[r].shift = shifts[r];
  }
}

template <int kBits>
inline void put_rows(const Scaled& from, int64_t num_rows, int row_lines, Ahead& ahead, WholeRow* rows) {
  int64_t r = 0;
  const auto rest = [&] { return Scaled{from.x + r * from.stride, from.stride, from.num, from.scales, from.zeros}; };
  for (; r + 4 <= num_rows; r += 4) put_whole<kBits, 4>(rest(), row_lines, ahead, rows + r);
  for (; r < num_rows; ++r) put_whole<kBits, 1>(rest(), row_lines, ahead, rows + r);
}

// How many rows, and blocks of 16 lanes, are multiplied at once: their sums stay in registers.
#if TANDEM_LANES == 16
constexpr int kWholeRows = 4, kWholeBlocks = 2;
#elif TANDEM_LANES == 8
constexpr int kWholeRows = 3, kWholeBlocks = 1;
#else
constexpr int kWholeRows = 2, kWholeBlocks = 1;
#endif

// acc_R[block * 16 ...] += products of kBlocks blocks of a panel of codes with kRows rows.
template <int kBits, int kRows, int kBlocks, class Acc>
TANDEM_INLINE void whole_product(const Panel& panel, int64_t block, const WholeRow* rows, Acc acc, Ahead& ahead) {
  constexpr int kVecs = kBlocks * kVecsPerBlock;
  Sum sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) sum[r][n] = Sum::of(rows[r].start);
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
    float* const first = acc.data + r * acc.stride + block * 16;
    const float unit = rows[r].unit, shift = rows[r].shift;
    for (int n = 0; n < kVecs; ++n) {
      const Vec x = sum[r][n].value() * unit + shift;
      store(first + n * kLanes, Acc::kIsEmpty ? x : load(first + n * kLanes) + x);
    }
  }
}

template <int kBits, int kRows, class Acc>
void whole_rows(const Panel& panel, const WholeRow* rows, Acc acc, Ahead& ahead) {
  int64_t block = 0;
  for (; block + kWholeBlocks <= panel.num_blocks; block += kWholeBlocks) {
    whole_product<kBits, kRows, kWholeBlocks>(panel, block, rows, acc, ahead);
  }
  for (; block < panel.num_blocks; ++block) whole_product<kBits, kRows, 1>(panel, block, rows, acc, ahead);
}

// All rows, while some `ahead_bytes` are asked for.
template <int kBits, class Acc>
void whole_products(const Panel& panel, const WholeRow* rows, int64_t num_rows, Acc acc, int64_t ahead_bytes,
                    Ahead& ahead) {
  const int64_t num_passes = (num_rows + kWholeRows - 1) / kWholeRows;
  const int64_t num_panels = panel.num_blocks / kWholeBlocks + panel.num_blocks % kWholeBlocks;
  ahead.pace(ahead_bytes, num_passes * num_panels * panel.num_weights());
  for (int64_t pass = 0, r = 0; pass < num_passes; ++pass) {
    const int64_t num = (num_rows - r + num_passes - pass - 1) / (num_passes - pass);
    const Acc a{acc.data + r * acc.stride, acc.stride};
    switch (num) {
      case 1: whole_rows<kBits, 1>(panel, rows + r, a, ahead); break;
      case 2: whole_rows<kBits, 2>(panel, rows + r, a, ahead); break;
#if TANDEM_LANES >= 8
      case 3: whole_rows<kBits, 3>(panel, rows + r, a, ahead); break;
#endif
#if TANDEM_LANES >= 16
      case 4: whole_rows<kBits, 4>(panel, rows + r, a, ahead); break;
#endif
    }
    r += num;
  }
}

// Of the next tile's lines, what is asked for in each step of this one, in percent; p . v asks for the rest. They
// follow from what each step takes (from L2, 4 rows): asked for in the products alone, as with panels, a call from
// memory was 12 % slower, because codes leave less time for each line.
constexpr int64_t kWeighPercent = 6, kScorePercent = 30, kSoftmaxPercent = 14;

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
  float kept[kMaxHeadRows][kMaxHeadDim];      // of the queries, the channels that a page keeps
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
  widen_steps(page.slice + k.scales, k.num_channels, s.scales);
  if (kBits == 4) widen_steps(page.slice + k.zeros, k.num_channels, s.zeros);
  Scaled from{q, q_stride, k.num_channels, s.scales, s.zeros};
  if (page.arena.num_channels != 0) {
    const uint8_t* const index = reinterpret_cast<const uint8_t*>(page.slice) + k.index;
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t i = 0; i < k.num_channels; ++i) s.kept[r][i] = q[r * q_stride + index[i]];
    }
    from.x = s.kept[0];
    from.stride = kMaxHeadDim;
  }
  put_rows<kBits>(from, num_rows, row_lines, ahead, s.rows);
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
  whole_products<kBits>(panel, s.rows, num_rows, Accumulators<true>{score_RT, 64}, ahead_bytes * kScorePercent / 100,
                        ahead);
  add_exact(page, k, q, q_stride, num_rows, score_RT, s);
}

}  // namespace
}  // namespace tandem::TANDEM_ISA
