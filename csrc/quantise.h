// Rows <-> codes of quantised pages (attend.h, SliceOfK), for the instruction set this file is compiled for; included
// by kernel.cc alone, like simd.h. A block of 16 tokens at a time, as float32 rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attend.h"
#include "panels.h"
#include "round.h"
#include "simd.h"

namespace tandem::TANDEM_ISA {
namespace {

// [16 tokens][dims], kMaxHeadDim apart; zeros behind the last dim, up to a multiple of 16.
struct alignas(64) BlockRows {
  float x[kBlockTokens][kMaxHeadDim];
};

inline float bf16_at(const char* numbers, int64_t i) {
  return as_float(static_cast<uint32_t>(reinterpret_cast<const Half*>(numbers)[i]) << 16);
}
// Of a number that is one.
inline void put_bf16(char* numbers, int64_t i, float x) {
  reinterpret_cast<Half*>(numbers)[i] = static_cast<uint16_t>(bits_of(x) >> 16);
}
// The nearest bf16 numbers that are not less, or not more; the largest ones where there is none.
inline float bf16_above(float x) {
  const uint32_t bits = (bits_of(x) + (x > 0.0f ? 0xFFFF : 0)) & 0xFFFF0000u;
  return as_float(bits == 0x7F800000u ? 0x7F7F0000u : bits);
}
inline float bf16_below(float x) { return -bf16_above(-x); }

// One row of a dtype -> float32.
inline void widen_row(DType dtype, const char* row, int64_t dim, float* to) {
  const Half* const halves = reinterpret_cast<const Half*>(row);
  if (dtype == DType::kFloat32) {
    std::memcpy(to, row, dim * 4);
  } else if (dtype == DType::kBFloat16) {
    for (int64_t d = 0; d < dim; ++d) to[d] = as_float(static_cast<uint32_t>(halves[d]) << 16);
  } else {
    alignas(64) uint16_t padded_row[kMaxHeadDim] = {};
    std::memcpy(padded_row, row, dim * 2);
    for (int64_t d = 0; d < dim; d += kLanes) store(to + d, widen_half(padded_row + d));
  }
  for (int64_t d = dim; d < padded(dim); ++d) to[d] = 0.0f;
}

inline void narrow_row(DType dtype, const float* row, int64_t dim, char* to) {
  Half* const halves = reinterpret_cast<Half*>(to);
  if (dtype == DType::kFloat32) {
    std::memcpy(to, row, dim * 4);
  } else if (dtype == DType::kBFloat16) {
    for (int64_t d = 0; d < dim; ++d) halves[d] = to_bf16(row[d]);
  } else {
    for (int64_t d = 0; d < dim; ++d) halves[d] = to_float16(row[d]);
  }
}

inline void widen_block(DType dtype, const char* rows, int64_t stride, int64_t dim, BlockRows& to) {
  for (int64_t t = 0; t < kBlockTokens; ++t, rows += stride) widen_row(dtype, rows, dim, to.x[t]);
}

// The first of 16 rows with a number that is not finite; 16 for none.
inline int64_t first_not_finite(const BlockRows& rows, int64_t dim) {
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    Vec sum{};
    for (int64_t d = 0; d < dim; d += kLanes) sum += load(rows.x[t] + d) * 0.0f;
    if (reduce_add(sum) != 0.0f) return t;
  }
  return kBlockTokens;
}

// How numbers become codes: round((x - zero) * inverse), in int8 with 128 added.
struct Steps16 {
  float scale, inverse, zero;
};

// Of numbers in [low, high]. int8: of both signs around 0. Not below 2^-126, of which there is no inverse.
inline Steps16 steps_of(bool is_int4, float low, float high) {
  constexpr float kLeast = 1.17549435e-38f;
  const auto larger = [](float a, float b) { return a > b ? a : b; };  // std::fmax is a call: 4 % of a move
  if (is_int4) {
    const float zero = bf16_below(low), range = high - zero;
    const float scale = bf16_above(range > 0.0f ? larger(range / 15.0f, kLeast) : 0.0f);
    return {scale, scale > 0.0f ? 1.0f / scale : 0.0f, zero};
  }
  const float most = larger(high, -low), scale = bf16_above(most > 0.0f ? larger(most / 127.0f, kLeast) : 0.0f);
  return {scale, scale > 0.0f ? 1.0f / scale : 0.0f, 0.0f};
}

// kLanes codes.
template <bool kIsInt4>
inline void put_codes(Vec x, Vec inverse, Vec zero, uint8_t* to) {
  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits.
  IVec code = (IVec)((x - zero) * inverse + 12582912.0f) - 0x4B400000;
  if constexpr (kIsInt4) {
    code = code < 0 ? IVec{} : code;
    code = code > 15 ? IVec{} + 15 : code;
  } else {
    code += 128;
  }
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Bytes bytes = __builtin_convertvector(code, Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
}

// The smallest and the largest of [num] numbers.
struct Range {
  float low, high;
};

inline Range range_of(const float* x, int64_t num) {
  Range range{x[0], x[0]};
  int64_t i = 0;
  if (num >= kLanes) {
    Vec high = load(x), low = -high;
    for (; i + kLanes <= num; i += kLanes) {
      high = max(load(x + i), high);
      low = max(-load(x + i), low);
    }
    range = {-reduce_max(low), reduce_max(high)};
  }
  for (; i < num; ++i) {
    range.low = x[i] < range.low ? x[i] : range.low;
    range.high = x[i] > range.high ? x[i] : range.high;
  }
  return range;
}

// ---- K -------------------------------------------------------------------------------------------------------------

// What is known of the channels of a page while it is quantised.
struct ChannelsOfPage {
  float low[kMaxHeadDim], high[kMaxHeadDim], square[kMaxHeadDim];  // of every channel
  int64_t kept[kMaxHeadDim];                                       // channel i of the slice
  alignas(64) float inverse[kMaxHeadDim], zero[kMaxHeadDim];       // of channel i of the slice
};

// The `num` highest of `scores`, in rising order of their places.
inline void highest(float* scores, int64_t num_scores, int64_t num, int64_t* places) {
  bool is_taken[kMaxHeadDim] = {};
  for (int64_t i = 0; i < num; ++i) {
    int64_t best = -1;
    for (int64_t d = 0; d < num_scores; ++d) {
      if (!is_taken[d] && (best < 0 || scores[d] > scores[best])) best = d;
    }
    is_taken[best] = true;
  }
  for (int64_t d = 0, i = 0; d < num_scores; ++d) {
    if (is_taken[d]) places[i++] = d;
  }
}

// Ranges of all channels, and the first token that is not finite or lies too far from another; -1 for none.
inline int64_t measure_k(const Arena& arena, const TokenRun& from, ChannelsOfPage& page) {
  BlockRows rows;
  const int64_t dim = arena.head_dim;
  for (int64_t token = 0; token < arena.page_size; token += kBlockTokens) {
    widen_block(arena.dtype, from.k + token * from.k_stride, from.k_stride, dim, rows);
    const int64_t bad = first_not_finite(rows, dim);
    if (bad < kBlockTokens) return token + bad;
    if (token == 0) {
      for (int64_t d = 0; d < dim; ++d) page.low[d] = page.high[d] = rows.x[0][d], page.square[d] = 0.0f;
    }
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      for (int64_t d = 0; d < dim; ++d) {
        const float x = rows.x[t][d];
        page.low[d] = x < page.low[d] ? x : page.low[d];
        page.high[d] = x > page.high[d] ? x : page.high[d];
        page.square[d] += x * x;
      }
    }
  }
  for (int64_t d = 0; d < dim; ++d) {
    if (!(page.high[d] - bf16_below(page.low[d]) < INFINITY)) return 0;
  }
  return -1;
}

// Which channels stay, and their steps, into the slice.
inline void put_channels(const Arena& arena, const SliceOfK& k, char* slice, const float* channel_weights,
                         ChannelsOfPage& page) {
  const int64_t dim = arena.head_dim, num_kept = arena.num_channels == 0 ? dim : arena.num_channels;
  const bool is_int4 = k.bits == 4;
  float scores[kMaxHeadDim];
  int64_t exact[kMaxHeadDim] = {};
  for (int64_t d = 0; d < dim; ++d) page.kept[d] = d;
  if (arena.num_channels != 0) {
    for (int64_t d = 0; d < dim; ++d) {
      scores[d] = page.square[d] * (channel_weights == nullptr ? 1.0f : channel_weights[d]);
    }
    highest(scores, dim, num_kept, page.kept);
    for (int64_t i = 0; i < k.num_channels; ++i)
      slice[k.index + i] = static_cast<char>(i < num_kept ? page.kept[i] : 0);
  }
  for (int64_t i = 0; i < num_kept; ++i) scores[i] = page.high[page.kept[i]] - page.low[page.kept[i]];
  const int64_t num_exact = min64(k.num_exact, num_kept);
  highest(scores, num_kept, num_exact, exact);
  for (int64_t i = 0; i < k.num_channels; ++i) {
    bool is_exact = false;
    for (int64_t e = 0; e < num_exact; ++e) is_exact = is_exact || exact[e] == i;
    const bool has_steps = i < num_kept && !is_exact;
    const Steps16 steps = has_steps ? steps_of(is_int4, page.low[page.kept[i]], page.high[page.kept[i]]) : Steps16{};
    page.inverse[i] = steps.inverse;
    page.zero[i] = steps.zero;
    put_bf16(slice + k.scales, i, steps.scale);
    if (is_int4) put_bf16(slice + k.zeros, i, steps.zero);
  }
  for (int64_t e = 0; e < k.num_exact; ++e) {
    slice[k.exact_index + e] = static_cast<char>(page.kept[exact[e < num_exact ? e : 0]]);
  }
}

// Codes of a block of rows whose channels are gathered.
template <bool kIsInt4>
inline void put_k_codes(const SliceOfK& k, const ChannelsOfPage& page, const BlockRows& rows, char* to) {
  alignas(64) uint8_t codes[kBlockTokens][kMaxHeadDim];
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    for (int64_t i = 0; i < k.num_channels; i += kLanes) {
      put_codes<kIsInt4>(load(rows.x[t] + i), load(page.inverse + i), load(page.zero + i), codes[t] + i);
    }
    for (int64_t i = 0; kIsInt4 && i < k.num_channels; i += 8) {  // 8 channels -> their 4 bytes, in place
      uint32_t first, last;
      std::memcpy(&first, codes[t] + i, 4);
      std::memcpy(&last, codes[t] + i + 4, 4);
      const uint32_t word = first | last << 4;
      std::memcpy(codes[t] + i / 2, &word, 4);
    }
  }
  Word* const words = reinterpret_cast<Word*>(to);
  for (int64_t w = 0; w < k.num_channels * k.bits / 32; ++w) {
    for (int64_t t = 0; t < kBlockTokens; ++t) std::memcpy(words + w * kBlockTokens + t, codes[t] + w * 4, 4);
  }
}

inline void quantise_k(const Arena& arena, const TokenRun& from, ChannelsOfPage& page, char* slice) {
  const SliceOfK k = arena.slice_of_k();
  const int64_t num_kept = arena.num_channels == 0 ? arena.head_dim : arena.num_channels;
  const int64_t item = item_bytes(arena.dtype);
  put_channels(arena, k, slice, from.channel_weights, page);
  BlockRows rows, gathered{};
  for (int64_t token = 0; token < arena.page_size; token += kBlockTokens) {
    const char* const at = from.k + token * from.k_stride;
    widen_block(arena.dtype, at, from.k_stride, arena.head_dim, rows);
    if (num_kept < arena.head_dim) {
      for (int64_t t = 0; t < kBlockTokens; ++t) {
        for (int64_t i = 0; i < num_kept; ++i) gathered.x[t][i] = rows.x[t][page.kept[i]];
      }
    }
    const BlockRows& kept = num_kept < arena.head_dim ? gathered : rows;
    char* const to = slice + token / kBlockTokens * k.block_bytes();
    k.bits == 4 ? put_k_codes<true>(k, page, kept, to) : put_k_codes<false>(k, page, kept, to);
    for (int64_t e = 0; e < k.num_exact; ++e) {
      const int64_t channel = static_cast<uint8_t>(slice[k.exact_index + e]);
      for (int64_t t = 0; t < kBlockTokens; ++t) {
        std::memcpy(slice + k.exact + (e * arena.page_size + token + t) * item, at + t * from.k_stride + channel * item,
                    item);
      }
    }
  }
}

// K of one block of a page, with zeros for channels that were left out.
inline void dequantise_k(const Arena& arena, const char* slice, int64_t token, BlockRows& rows) {
  const SliceOfK k = arena.slice_of_k();
  const bool is_int4 = k.bits == 4, keeps_all = arena.num_channels == 0;
  const int64_t num_kept = keeps_all ? arena.head_dim : arena.num_channels;
  const uint8_t* const codes = reinterpret_cast<const uint8_t*>(slice) + token / kBlockTokens * k.block_bytes();
  if (!keeps_all) std::memset(&rows, 0, sizeof rows);
  for (int64_t i = 0; i < num_kept; ++i) {
    const float scale = bf16_at(slice + k.scales, i), zero = is_int4 ? bf16_at(slice + k.zeros, i) : -128.0f * scale;
    const int64_t d = keeps_all ? i : static_cast<uint8_t>(slice[k.index + i]);
    const int64_t byte = is_int4 ? i / 8 * 64 + i % 4 : i / 4 * 64 + i % 4;
    const int shift = is_int4 && i % 8 >= 4 ? 4 : 0, mask = is_int4 ? 15 : 255;
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      const int code = codes[byte + t * 4] >> shift & mask;
      rows.x[t][d] = is_int4 ? scale * static_cast<float>(code) + zero : scale * static_cast<float>(code - 128);
    }
  }
  for (int64_t e = 0; e < k.num_exact; ++e) {
    const int64_t channel = static_cast<uint8_t>(slice[k.exact_index + e]);
    alignas(64) float exact[kBlockTokens];
    widen_row(arena.dtype, slice + k.exact + (e * arena.page_size + token) * item_bytes(arena.dtype), kBlockTokens,
              exact);
    for (int64_t t = 0; t < kBlockTokens; ++t) rows.x[t][channel] = exact[t];
  }
}

// ---- V -------------------------------------------------------------------------------------------------------------

// Codes of 16 rows: [16][dims], then 4 (or 8) tokens of a dim side by side.
template <bool kIsInt4>
inline void put_v_codes(const SliceOfV& v, const uint8_t (*codes)[kMaxHeadDim], char* to) {
  constexpr int64_t kStep = kIsInt4 ? 8 : 4;
  for (int64_t t = 0; t < kBlockTokens; t += kStep, to += v.num_dims * 4) {
    Word* const words = reinterpret_cast<Word*>(to);
    for (int64_t d = 0; d < v.num_dims; ++d) {
      uint32_t word =
          codes[t][d] | codes[t + 1][d] << 8 | codes[t + 2][d] << 16 | static_cast<uint32_t>(codes[t + 3][d]) << 24;
      if constexpr (kIsInt4) {
        word |= codes[t + 4][d] << 4 | codes[t + 5][d] << 12 | codes[t + 6][d] << 20 |
                static_cast<uint32_t>(codes[t + 7][d]) << 28;
      }
      words[d] = word;
    }
  }
}

template <bool kIsInt4>
void quantise_v(const Arena& arena, const TokenRun& from, char* slice) {
  const SliceOfV v = arena.slice_of_v();
  const int64_t group_dims = kIsInt4 ? kGroupDims : v.num_dims;
  BlockRows rows;
  alignas(64) uint8_t codes[kBlockTokens][kMaxHeadDim];
  for (int64_t token = 0; token < arena.page_size; token += kBlockTokens) {
    widen_block(arena.dtype, from.v + token * from.v_stride, from.v_stride, arena.v_head_dim, rows);
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      for (int64_t group = 0, d = 0; group < v.num_groups; ++group) {
        const int64_t end = min64(d + group_dims, v.num_dims), last = min64(end, arena.v_head_dim);
        const Range range = range_of(rows.x[t] + d, last - d);
        const Steps16 steps = steps_of(kIsInt4, range.low, range.high);
        put_bf16(slice + v.scales, group * arena.page_size + token + t, steps.scale);
        if (kIsInt4) put_bf16(slice + v.zeros, group * arena.page_size + token + t, steps.zero);
        for (; d < end; d += kLanes) {
          put_codes<kIsInt4>(load(rows.x[t] + d), splat(steps.inverse), splat(steps.zero), codes[t] + d);
        }
      }
    }
    put_v_codes<kIsInt4>(v, codes, slice + token / kBlockTokens * v.block_bytes());
  }
}

inline void dequantise_v(const Arena& arena, const char* slice, int64_t token, BlockRows& rows) {
  const SliceOfV v = arena.slice_of_v();
  const bool is_int4 = v.bits == 4;
  const int64_t step = is_int4 ? 8 : 4, group_dims = is_int4 ? kGroupDims : v.num_dims;
  const char* const codes = slice + token / kBlockTokens * v.block_bytes();
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    const Word* const words = reinterpret_cast<const Word*>(codes + t / step * v.num_dims * 4);
    const int shift = static_cast<int>(t % 4 * 8 + (t % step >= 4 ? 4 : 0)), mask = is_int4 ? 15 : 255;
    for (int64_t d = 0; d < arena.v_head_dim; ++d) {
      const int64_t at = d / group_dims * arena.page_size + token + t;
      const float scale = bf16_at(slice + v.scales, at);
      const int code = static_cast<int>(words[d] >> shift & mask);
      rows.x[t][d] = is_int4 ? scale * static_cast<float>(code) + bf16_at(slice + v.zeros, at)
                             : scale * static_cast<float>(code - 128);
    }
  }
}

// The first token whose V is not finite, or in int4 a group of it too wide for a scale; -1 for none.
inline int64_t measure_v(const Arena& arena, const TokenRun& from) {
  BlockRows rows;
  const SliceOfV v = arena.slice_of_v();
  for (int64_t token = 0; token < arena.page_size; token += kBlockTokens) {
    widen_block(arena.dtype, from.v + token * from.v_stride, from.v_stride, arena.v_head_dim, rows);
    const int64_t bad = first_not_finite(rows, arena.v_head_dim);
    for (int64_t t = 0; v.bits == 4 && t < bad; ++t) {
      for (int64_t d = 0; d < arena.v_head_dim; d += kGroupDims) {
        const Range range = range_of(rows.x[t] + d, min64(kGroupDims, arena.v_head_dim - d));
        if (!(range.high - bf16_below(range.low) < INFINITY)) return token + t;
      }
    }
    if (bad < kBlockTokens) return token + bad;
  }
  return -1;
}

// ---- Pages ---------------------------------------------------------------------------------------------------------

// A whole page of one head; nothing is written, and the token told, where one is not finite. Else -1.
int64_t quantise(const Arena& arena, HeadSlice to, const TokenRun& from) {
  ChannelsOfPage page;
  const int64_t bad_k = measure_k(arena, from, page), bad_v = measure_v(arena, from);
  if (bad_k >= 0 || bad_v >= 0) return bad_k >= 0 && (bad_v < 0 || bad_k < bad_v) ? bad_k : bad_v;
  quantise_k(arena, from, page, to.k);
  arena.packing == Packing::kInt4 ? quantise_v<true>(arena, from, to.v) : quantise_v<false>(arena, from, to.v);
  return -1;
}

// Tokens [begin, end) of one head's slice -> rows, rounded to their dtype.
void dequantise(const Arena& arena, HeadSlice from, int64_t begin, int64_t end, const TokenRun& to) {
  BlockRows k, v;
  for_each_block(begin, end, [&](int64_t block, int64_t first, int64_t last, int64_t run) {
    dequantise_k(arena, from.k, block * kBlockTokens, k);
    dequantise_v(arena, from.v, block * kBlockTokens, v);
    for (int64_t t = first; t < last; ++t, ++run) {
      narrow_row(arena.dtype, k.x[t], arena.head_dim, to.k + run * to.k_stride);
      narrow_row(arena.dtype, v.x[t], arena.v_head_dim, to.v + run * to.v_stride);
    }
  });
}

// ---- Any packing but rows
// --------------------------------------------------------------------------------------------

int64_t pack(const Arena& arena, HeadSlice to, int64_t begin, int64_t end, const TokenRun& from) {
  if (arena.is_quantised()) return quantise(arena, to, from);
  switch (arena.dtype) {
    case DType::kFloat32: pack_as<DType::kFloat32>(arena, to, begin, end, from); break;
    case DType::kBFloat16: pack_as<DType::kBFloat16>(arena, to, begin, end, from); break;
    case DType::kFloat16: pack_as<DType::kFloat16>(arena, to, begin, end, from); break;
  }
  return -1;
}

void unpack(const Arena& arena, HeadSlice from, int64_t begin, int64_t end, const TokenRun& to) {
  if (arena.is_quantised()) return dequantise(arena, from, begin, end, to);
  switch (arena.dtype) {
    case DType::kFloat32: return unpack_as<DType::kFloat32>(arena, from, begin, end, to);
    case DType::kBFloat16: return unpack_as<DType::kBFloat16>(arena, from, begin, end, to);
    case DType::kFloat16: return unpack_as<DType::kFloat16>(arena, from, begin, end, to);
  }
}

}  // namespace
}  // namespace tandem::TANDEM_ISA
