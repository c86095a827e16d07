// Rows <-> panels (attend.h), for the instruction set this file is compiled for; included by kernel.cc alone, like
// simd.h.
//
// Everything works on one block of 16 tokens. A K block is [word][16 tokens], a V block is [16 / kPair tokens][dim], of
// 4-byte words that hold `kPair` neighbours: two dims of K, or one dim of two tokens of V; or one float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "attend.h"
#include "simd.h"

namespace tandem::TANDEM_ISA {
namespace {

// What lies in memory as bf16 or float32 is moved as bits, wherever a model's strides put it.
typedef uint16_t Half __attribute__((may_alias, aligned(1)));
typedef uint32_t Word __attribute__((may_alias, aligned(1)));

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

// Where one head's tokens go to or come from: `dim` elements of a row, `stored` with the padding of panels.
struct BlockShape {
  int64_t dim, stored, item_bytes;

  explicit BlockShape(const Arena& arena)
      : dim(arena.head_dim), stored(padded(arena.head_dim)), item_bytes(tandem::item_bytes(arena.dtype)) {}
  int64_t row_bytes() const { return dim * item_bytes; }
  int64_t block_bytes() const { return kBlockTokens * stored * item_bytes; }
  int64_t words() const { return stored * item_bytes / 4; }  // of a token in a K block
};

// Tokens [begin, end) of a K block <- rows, of which the first is token `begin`. Other tokens are not touched.
inline void put_k(const BlockShape& shape, const char* rows, int64_t stride, int64_t begin, int64_t end, char* panel) {
  const int64_t row_words = shape.row_bytes() / 4;
  int64_t w = 0;
  if (end - begin == kBlockTokens) {
    for (; w + 16 <= row_words; w += 16) transpose16(rows + w * 4, stride, panel + w * 64, 64);
  }
  Word* const out = reinterpret_cast<Word*>(panel);
  for (int64_t t = begin; t < end; ++t, rows += stride) {
    const Word* const row = reinterpret_cast<const Word*>(rows);
    for (int64_t i = w; i < row_words; ++i) out[i * 16 + t] = row[i];
    for (int64_t i = max64(w, row_words); i < shape.words(); ++i) out[i * 16 + t] = 0;
  }
}

inline void get_k(const BlockShape& shape, const char* panel, int64_t begin, int64_t end, char* rows, int64_t stride) {
  const int64_t row_words = shape.row_bytes() / 4;
  int64_t w = 0;
  if (end - begin == kBlockTokens) {
    for (; w + 16 <= row_words; w += 16) transpose16(panel + w * 64, 64, rows + w * 4, stride);
  }
  const Word* const in = reinterpret_cast<const Word*>(panel);
  for (int64_t t = begin; t < end; ++t, rows += stride) {
    Word* const row = reinterpret_cast<Word*>(rows);
    for (int64_t i = w; i < row_words; ++i) row[i] = in[i * 16 + t];
  }
}

// The same for a V block.
template <int kPair>
void put_v(const BlockShape& shape, const char* rows, int64_t stride, int64_t begin, int64_t end, char* panel) {
  for (int64_t t = begin; t < end; ++t, rows += stride) {
    Word* const words = reinterpret_cast<Word*>(panel) + t / kPair * shape.stored;
    if constexpr (kPair == 1) {
      std::memcpy(words, rows, shape.row_bytes());
      std::memset(words + shape.dim, 0, (shape.stored - shape.dim) * 4);
    } else if (t % 2 == 0 && t + 1 < end) {
      const Half *const even = reinterpret_cast<const Half*>(rows), *const odd = even + stride / 2;
      for (int64_t d = 0; d < shape.dim; ++d) words[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
      std::memset(words + shape.dim, 0, (shape.stored - shape.dim) * 4);
      ++t;
      rows += stride;
    } else {
      const Half* const row = reinterpret_cast<const Half*>(rows);
      Half* const halves = reinterpret_cast<Half*>(words) + t % 2;
      for (int64_t d = 0; d < shape.stored; ++d) halves[2 * d] = d < shape.dim ? row[d] : Half{0};
    }
  }
}

template <int kPair>
void get_v(const BlockShape& shape, const char* panel, int64_t begin, int64_t end, char* rows, int64_t stride) {
  for (int64_t t = begin; t < end; ++t, rows += stride) {
    const Word* const words = reinterpret_cast<const Word*>(panel) + t / kPair * shape.stored;
    if constexpr (kPair == 1) {
      std::memcpy(rows, words, shape.row_bytes());
    } else {
      const int shift = t % 2 * 16;
      Half* const row = reinterpret_cast<Half*>(rows);
      for (int64_t d = 0; d < shape.dim; ++d) row[d] = static_cast<Half>(words[d] >> shift);
    }
  }
}

// A copy of a block in which tokens outside [begin, end) are zeros: a zero weight does not silence a NaN in V.
template <int kPair>
void copy_block(const BlockShape& shape, HeadSlice from, int64_t begin, int64_t end, HeadSlice to) {
  Word keep[kBlockTokens];
  for (int64_t t = 0; t < kBlockTokens; ++t) keep[t] = t >= begin && t < end ? ~Word{0} : Word{0};
  const Word *const k = reinterpret_cast<const Word*>(from.k), *const v = reinterpret_cast<const Word*>(from.v);
  Word *const to_k = reinterpret_cast<Word*>(to.k), *const to_v = reinterpret_cast<Word*>(to.v);
  for (int64_t w = 0; w < shape.words(); ++w) {
    for (int64_t t = 0; t < kBlockTokens; ++t) to_k[w * 16 + t] = k[w * 16 + t] & keep[t];
  }
  for (int64_t p = 0; p < kBlockTokens / kPair; ++p) {
    const Word kept = kPair == 1 ? keep[p] : (keep[2 * p] & 0xFFFFu) | (keep[2 * p + 1] & 0xFFFF0000u);
    for (int64_t d = 0; d < shape.stored; ++d) to_v[p * shape.stored + d] = v[p * shape.stored + d] & kept;
  }
}

// Calls visit(offset of the block in the slice, first token in the block, last, tokens before them in the run).
template <class Visit>
void for_each_block(const BlockShape& shape, int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t block = begin / kBlockTokens; block * kBlockTokens < end; ++block) {
    const int64_t first = max64(begin, block * kBlockTokens), last = min64(end, (block + 1) * kBlockTokens);
    visit(block * shape.block_bytes(), first - block * kBlockTokens, last - block * kBlockTokens, first - begin);
  }
}

template <int kPair>
void pack_as(const Arena& arena, HeadSlice to, int64_t begin, int64_t end, const TokenRun& from) {
  const BlockShape shape(arena);
  for_each_block(shape, begin, end, [&](int64_t at, int64_t first, int64_t last, int64_t run) {
    put_k(shape, from.k + run * from.k_stride, from.k_stride, first, last, to.k + at);
    put_v<kPair>(shape, from.v + run * from.v_stride, from.v_stride, first, last, to.v + at);
  });
}

template <int kPair>
void unpack_as(const Arena& arena, HeadSlice from, int64_t begin, int64_t end, const TokenRun& to) {
  const BlockShape shape(arena);
  for_each_block(shape, begin, end, [&](int64_t at, int64_t first, int64_t last, int64_t run) {
    get_k(shape, from.k + at, first, last, to.k + run * to.k_stride, to.k_stride);
    get_v<kPair>(shape, from.v + at, first, last, to.v + run * to.v_stride, to.v_stride);
  });
}

void pack(const Arena& arena, HeadSlice to, int64_t begin, int64_t end, const TokenRun& from) {
  arena.dtype == DType::kFloat32 ? pack_as<1>(arena, to, begin, end, from) : pack_as<2>(arena, to, begin, end, from);
}

void unpack(const Arena& arena, HeadSlice from, int64_t begin, int64_t end, const TokenRun& to) {
  arena.dtype == DType::kFloat32 ? unpack_as<1>(arena, from, begin, end, to)
                                 : unpack_as<2>(arena, from, begin, end, to);
}

}  // namespace
}  // namespace tandem::TANDEM_ISA
