// Scores of far blocks from int8 codes (attend.h), 16 words of 4 codes at a time. Included by kernel.cc alone, like
// simd.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "attend.h"
#include "panels.h"
#include "simd.h"

namespace tandem::TANDEM_ISA {
namespace {

constexpr int64_t kLineWords = kLineBytes / 4;

// sum[row][lane] = codes[line][lane] . weights[row][line][lane], over all lines.
template <int kRows>
inline void dot_lines(const uint8_t* codes, int64_t num_lines, const int8_t* weights, int64_t row_bytes,
                      int32_t (*sum)[kLineWords]) {
#if defined(__AVX512VNNI__)
  __m512i acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = _mm512_setzero_si512();
  for (int64_t line = 0; line < num_lines; ++line) {
    const __m512i x = _mm512_loadu_si512(codes + line * kLineBytes);
    for (int r = 0; r < kRows; ++r) {
      acc[r] = _mm512_dpbusd_epi32(acc[r], x, _mm512_loadu_si512(weights + r * row_bytes + line * kLineBytes));
    }
  }
  for (int r = 0; r < kRows; ++r) _mm512_storeu_si512(sum[r], acc[r]);
#else
  for (int r = 0; r < kRows; ++r) {
    int32_t acc[kLineWords] = {};
    for (int64_t line = 0; line < num_lines; ++line) {
      const uint8_t* const x = codes + line * kLineBytes;
      const int8_t* const w = weights + r * row_bytes + line * kLineBytes;
      for (int64_t lane = 0; lane < kLineWords; ++lane) {
        int32_t word = 0;
        for (int64_t i = 0; i < 4; ++i) word += static_cast<int32_t>(x[lane * 4 + i]) * w[lane * 4 + i];
        acc[lane] += word;
      }
    }
    std::memcpy(sum[r], acc, sizeof acc);
  }
#endif
}

// The same for any number of rows, of which `visit(row, sum)` sees one after the other.
template <class Visit>
inline void for_each_row(const uint8_t* codes, const CodeQueries& q, int64_t first_row, const Visit& visit) {
  int32_t sum[4][kLineWords];
  const int64_t num_lines = q.num_lines, row_bytes = num_lines * kLineBytes;
  for (int64_t row = first_row; row < first_row + q.rows_per_head; row += 4) {
    const int64_t num = min64(4, first_row + q.rows_per_head - row);
    const int8_t* const weights = q.weights + row * row_bytes;
    switch (num) {
      case 1: dot_lines<1>(codes, num_lines, weights, row_bytes, sum); break;
      case 2: dot_lines<2>(codes, num_lines, weights, row_bytes, sum); break;
      case 3: dot_lines<3>(codes, num_lines, weights, row_bytes, sum); break;
      default: dot_lines<4>(codes, num_lines, weights, row_bytes, sum); break;
    }
    for (int64_t r = 0; r < num; ++r) visit(row + r, sum[r]);
  }
}

inline float larger(float a, float b) { return b > a ? b : a; }

void score_bounds(const CodeQueries& q, const uint8_t* codes, const float* steps, int64_t first_row, int64_t num_blocks,
                  float* scores) {
  for (int64_t block = 0; block < num_blocks; block += kLaneBlocks) {
    float best[kLaneBlocks] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    for_each_row(codes, q, first_row, [&](int64_t row, const int32_t* sum) {
      for (int64_t i = 0; i < kLaneBlocks; ++i) {
        const int32_t dot = sum[i] + sum[4 + i] + sum[8 + i] + sum[12 + i] - q.offsets[row];
        best[i] = larger(best[i], static_cast<float>(dot) * q.scales[row]);
      }
    });
    for (int64_t i = 0; i < min64(kLaneBlocks, num_blocks - block); ++i) scores[block + i] = best[i] * steps[block + i];
    codes += q.num_lines * kLineBytes;
  }
}

void score_columns(const CodeQueries& q, const uint8_t* codes, const float*, int64_t first_row, int64_t num_blocks,
                   float* scores) {
  for (int64_t block = 0; block < num_blocks; ++block, codes += q.num_lines * kLineBytes) {
    scores[block] = -INFINITY;
    for_each_row(codes, q, first_row, [&](int64_t row, const int32_t* sum) {
      int32_t most = sum[0];
      for (int64_t lane = 1; lane < kLineWords; ++lane) most = sum[lane] > most ? sum[lane] : most;
      scores[block] = larger(scores[block], static_cast<float>(most - q.offsets[row]) * q.scales[row]);
    });
  }
}

}  // namespace
}  // namespace tandem::TANDEM_ISA
