// Scores of far blocks from int8 codes (attend.h), 16 words of 4 codes at a time. Included by kernel.cc alone, like
// simd.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attend.h"
#include "panels.h"
#include "quantise.h"
#include "simd.h"

namespace tandem::TANDEM_ISA {
namespace {

constexpr int64_t kLineWords = kLineBytes / 4;

// How far ahead codes are asked for: from memory, the hardware's own prefetch alone reads them at half the speed.
constexpr int64_t kCodesAhead = 4096;

// A number for each word of a line.
struct alignas(kLineBytes) LineSum {
  int32_t words[kLineWords];
};

// sum[row].words[lane] = codes[line][lane] . weights[row][line][lane], over all lines.
template <int kRows>
inline void dot_lines(const uint8_t* codes, int64_t num_lines, const int8_t* weights, int64_t row_bytes, LineSum* sum) {
#if defined(__AVX512VNNI__)
  __m512i acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_si512();
  for (int64_t line = 0; line < num_lines; ++line) {
    __builtin_prefetch(codes + line * kLineBytes + kCodesAhead);
    const __m512i x = _mm512_loadu_si512(codes + line * kLineBytes);
    for (int r = 0; r < kRows; ++r) {
      acc[r] = _mm512_dpbusd_epi32(acc[r], x, _mm512_loadu_si512(weights + r * row_bytes + line * kLineBytes));
    }
  }
  for (int r = 0; r < kRows; ++r) _mm512_store_si512(sum + r, acc[r]);
#elif defined(__AVX2__)
  // Even and odd codes as 16-bit numbers, of which an instruction adds neighbouring products.
  constexpr int kHalves = kLineBytes / 32;
  const __m256i low = _mm256_set1_epi16(0xFF);
  __m256i acc[kRows][kHalves];
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < kHalves; ++half) acc[r][half] = _mm256_setzero_si256();
  }
  for (int64_t line = 0; line < num_lines; ++line) {
    __builtin_prefetch(codes + line * kLineBytes + kCodesAhead);
    for (int half = 0; half < kHalves; ++half) {
      const int64_t at = line * kLineBytes + half * 32;
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at));
      const __m256i even = _mm256_and_si256(x, low), odd = _mm256_srli_epi16(x, 8);
      for (int r = 0; r < kRows; ++r) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + r * row_bytes + at));
        const __m256i even_w = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd_w = _mm256_srai_epi16(w, 8);
        acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_madd_epi16(even, even_w));
        acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_madd_epi16(odd, odd_w));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) std::memcpy(sum + r, acc[r], sizeof acc[r]);
#else
  for (int r = 0; r < kRows; ++r) {
    LineSum acc{};
    for (int64_t line = 0; line < num_lines; ++line) {
      const uint8_t* const x = codes + line * kLineBytes;
      const int8_t* const w = weights + r * row_bytes + line * kLineBytes;
      for (int64_t lane = 0; lane < kLineWords; ++lane) {
        int32_t word = 0;
        for (int64_t i = 0; i < 4; ++i) word += static_cast<int32_t>(x[lane * 4 + i]) * w[lane * 4 + i];
        acc.words[lane] += word;
      }
    }
    sum[r] = acc;
  }
#endif
}

using DotLines = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, LineSum*);

// For 1, 2, 3 and 4 rows.
inline const DotLines* dots() {
  static constexpr DotLines kDots[] = {dot_lines<1>, dot_lines<2>, dot_lines<3>, dot_lines<4>};
  return kDots;
}

// The same for any number of rows, of which `visit(row, sum)` sees one after the other.
template <class Visit>
inline void for_each_row(const DotLines* dot, const uint8_t* codes, const CodeQueries& q, int64_t first_row,
                         const Visit& visit) {
  LineSum sum[4];
  const int64_t num_lines = q.num_lines, row_bytes = num_lines * kLineBytes;
  for (int64_t row = first_row; row < first_row + q.rows_per_head; row += 4) {
    const int64_t num = min64(4, first_row + q.rows_per_head - row);
    const int8_t* const weights = q.weights + row * row_bytes;
    dot[num - 1](codes, num_lines, weights, row_bytes, sum);
    for (int64_t r = 0; r < num; ++r) visit(row + r, sum[r]);
  }
}

inline float larger(float a, float b) { return b > a ? b : a; }

// K of one block of panels.
template <DType kDType>
void widen_panel(const Arena& arena, const char* panel, BlockRows& to) {
  const BlockShape<kDType> shape(arena.head_dim);
  alignas(64) char rows[kBlockTokens * kMaxHeadDim * 4];
  get_k(shape, panel, 0, kBlockTokens, rows, shape.row_bytes());
  widen_block(kDType, rows, shape.row_bytes(), arena.head_dim, to);
}

// Codes of one block among the 4 that share lines, and its step; rounded outward, so that the box that they describe
// holds every key.
void put_bounds(const BlockRows& rows, int64_t dim, int64_t lane, uint8_t* codes, float* step) {
  float low[kMaxHeadDim], high[kMaxHeadDim], most = 0.0f, sum = 0.0f;
  for (int64_t d = 0; d < dim; ++d) low[d] = high[d] = rows.x[0][d];
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    for (int64_t d = 0; d < dim; ++d) {
      const float x = rows.x[t][d];
      sum += x * 0.0f;  // NaN where a key is no number
      low[d] = x < low[d] ? x : low[d];
      high[d] = x > high[d] ? x : high[d];
    }
  }
  for (int64_t d = 0; d < dim; ++d) most = larger(most, larger(high[d], -low[d]));
  // 126, not 127: a quotient that rounding pushes up still has a code. Not below 2^-126, of which there is no inverse.
  const float size = most > 0.0f && sum == 0.0f ? larger(most / 126.0f, 1.17549435e-38f) : 1.0f, inverse = 1.0f / size;
  *step = sum == 0.0f ? (most > 0.0f ? size : 0.0f) : NAN;
  const int64_t words = (dim + 3) / 4;
  for (int64_t d = 0; d < dim; ++d) {
    const float least = sum == 0.0f ? low[d] : 0.0f, top = sum == 0.0f ? high[d] : 0.0f;
    int32_t floor = static_cast<int32_t>(std::floor(least * inverse)),
            ceil = static_cast<int32_t>(std::ceil(top * inverse));
    // Products round; neither may cut a corner off.
    floor -= static_cast<float>(floor) * size > least;
    ceil += static_cast<float>(ceil) * size < top;
    const int64_t at = d / 4, in_word = lane * 4 + d % 4;
    codes[at / 4 * kLineBytes + at % 4 * 16 + in_word] = static_cast<uint8_t>(floor + 128);
    codes[(words + at) / 4 * kLineBytes + (words + at) % 4 * 16 + in_word] = static_cast<uint8_t>(ceil + 128);
  }
}

void make_bounds(const Arena& arena, HeadSlice slice, int64_t token, int64_t lane, uint8_t* codes, float* step) {
  BlockRows rows;
  if (arena.is_quantised()) {
    dequantise_k(arena, slice.k, token, rows);
  } else {
    const char* const panel = slice.k + token * arena.k_token_bytes();
    switch (arena.dtype) {
      case DType::kFloat32: widen_panel<DType::kFloat32>(arena, panel, rows); break;
      case DType::kBFloat16: widen_panel<DType::kBFloat16>(arena, panel, rows); break;
      case DType::kFloat16: widen_panel<DType::kFloat16>(arena, panel, rows); break;
    }
  }
  put_bounds(rows, arena.head_dim, lane, codes, step);
}

typedef float Blocks __attribute__((vector_size(kLaneBlocks * 4)));
typedef int32_t IBlocks __attribute__((vector_size(kLaneBlocks * 4)));

void score_bounds(const CodeQueries& q, const uint8_t* codes, const float* steps, int64_t first_row, int64_t num_blocks,
                  float* scores) {
  const DotLines* const dot = dots();
  for (int64_t block = 0; block < num_blocks; block += kLaneBlocks, codes += q.num_lines * kLineBytes) {
    Blocks best = Blocks{} - INFINITY, step;
    for_each_row(dot, codes, q, first_row, [&](int64_t row, const LineSum& sum) {
      IBlocks words[kLineWords / kLaneBlocks];  // of all four blocks
      std::memcpy(words, &sum, sizeof words);
      const IBlocks product = words[0] + words[1] + words[2] + words[3] - q.offsets[row];
      const Blocks x = __builtin_convertvector(product, Blocks) * q.scales[row];
      best = x > best ? x : best;
    });
    std::memcpy(&step, steps + block, sizeof step);  // whole units have one
    best *= step;
    std::memcpy(scores + block, &best, min64(kLaneBlocks, num_blocks - block) * sizeof(float));
  }
}

void score_columns(const CodeQueries& q, const uint8_t* codes, const float*, int64_t first_row, int64_t num_blocks,
                   float* scores) {
  const DotLines* const dot = dots();
  for (int64_t block = 0; block < num_blocks; ++block, codes += q.num_lines * kLineBytes) {
    Vec best = splat(-INFINITY);
    for_each_row(dot, codes, q, first_row, [&](int64_t row, const LineSum& sum) {
      for (int64_t token = 0; token < kBlockTokens; token += kLanes) {
        IVec product;
        std::memcpy(&product, sum.words + token, sizeof product);
        best = max(__builtin_convertvector(product - q.offsets[row], Vec) * q.scales[row], best);
      }
    });
    scores[block] = reduce_max(best);
  }
}

// ---- The highest ----

inline IVec rank_of(Vec score) {
  const IVec bits = (IVec)(score + 0.0f);  // zeros of either sign are equal
  const IVec rank = bits ^ ((bits >> 31) & INT32_MAX);
  return score != score ? IVec{} + INT32_MAX : score == splat(-INFINITY) ? IVec{} + INT32_MIN : rank;
}

// How many of `num` ranks, a multiple of kLanes, are at least so high.
inline int64_t num_at_least(const int32_t* ranks, int64_t num, int32_t least) {
  IVec count{};
  for (int64_t i = 0; i < num; i += kLanes) {
    IVec rank;
    std::memcpy(&rank, ranks + i, sizeof rank);
    count -= rank >= least;
  }
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
  return total;
}

// By halving the range in which the cut lies: up to 32 passes of compares, a tenth of the time of counting in bins.
Cut cut(const float* scores, int64_t num, int64_t num_wanted, int32_t* ranks) {
  const auto put = [&](int64_t i, Vec score) {
    const IVec rank = rank_of(score);
    std::memcpy(ranks + i, &rank, sizeof rank);
  };
  int64_t num_ranks = 0;
  for (; num_ranks + kLanes <= num; num_ranks += kLanes) put(num_ranks, load(scores + num_ranks));
  if (num_ranks < num) {
    Vec rest = splat(-INFINITY);
    std::memcpy(&rest, scores + num_ranks, (num - num_ranks) * sizeof(float));
    put(num_ranks, rest);
    num_ranks += kLanes;
  }
  int64_t low = INT32_MIN, high = INT32_MAX;  // the cut is in between
  while (low < high) {
    const int64_t middle = (low + high + 1) >> 1;
    if (num_at_least(ranks, num_ranks, static_cast<int32_t>(middle)) >= num_wanted) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  if (low == INT32_MIN) return {INT32_MIN, 0};  // all that may be taken are
  if (low == INT32_MAX) return {INT32_MAX, num_wanted};
  return {static_cast<int32_t>(low), num_wanted - num_at_least(ranks, num_ranks, static_cast<int32_t>(low) + 1)};
}

}  // namespace
}  // namespace tandem::TANDEM_ISA
