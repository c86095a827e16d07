// Rows <-> panels (attend.h), for the instruction set this file is compiled for; included by kernel.cc alone, like
// simd.h.
//
// Everything works on one block of 16 tokens of K or of V. Panels are made of words that hold the `kPair` neighbours of
// a Format: a K block is [word][16 tokens], a V block is [16 / kPair tokens][dim].
#pragma once

#include <cstdint>
#include <cstring>

#include "attend.h"
#include "simd.h"

namespace tandem::TANDEM_ISA {
namespace {

// Numbers are moved as bits, wherever a model's strides put them.
typedef uint16_t Half __attribute__((may_alias, aligned(1)));
typedef uint32_t Word __attribute__((may_alias, aligned(1)));

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

template <DType kDType>
struct Format {
  static constexpr int64_t kPair = pair_of(kDType), kItemBytes = item_bytes(kDType), kWordBytes = kPair * kItemBytes;
};

// What T a word is.
template <int64_t kWordBytes>
struct WordOf {
  using T = Word;
};
template <>
struct WordOf<2> {
  using T = Half;
};

// One head's rows of K or of V: `dim` elements of a row, `stored` with the padding of panels.
template <DType kDType>
struct BlockShape : Format<kDType> {
  using F = Format<kDType>;
  int64_t dim, stored;

  explicit BlockShape(int64_t dim) : dim(dim), stored(padded(dim)) {}
  int64_t row_bytes() const { return dim * F::kItemBytes; }
  int64_t block_bytes() const { return kBlockTokens * stored * F::kItemBytes; }
  int64_t words() const { return stored / F::kPair; }     // of a token in a K block
  int64_t whole_words() const { return dim / F::kPair; }  // of them, those that a row fills
};

// 64 bytes of each of 16 rows <-> as many words of a K block, which take 1024 bytes together.
template <int64_t kWordBytes>
void put_16_rows(const char* rows, int64_t stride, char* panel) {
  transpose16(rows, stride, panel, 64);
  if constexpr (kWordBytes == 2) {  // [pair of dims][token][2] -> [dim][token]
    for (int64_t pair = 0; pair < 16; ++pair, panel += 64) {
      uint32_t pairs[16];
      std::memcpy(pairs, panel, sizeof pairs);
      Half* const dims = reinterpret_cast<Half*>(panel);
      for (int64_t t = 0; t < 16; ++t) dims[t] = static_cast<uint16_t>(pairs[t]);
      for (int64_t t = 0; t < 16; ++t) dims[16 + t] = static_cast<uint16_t>(pairs[t] >> 16);
    }
  }
}

template <int64_t kWordBytes>
void get_16_rows(const char* panel, char* rows, int64_t stride) {
  if constexpr (kWordBytes == 4) {
    transpose16(panel, 64, rows, stride);
  } else {
    uint32_t pairs[16 * 16];
    const Half* dims = reinterpret_cast<const Half*>(panel);
    for (int64_t pair = 0; pair < 16; ++pair, dims += 32) {
      for (int64_t t = 0; t < 16; ++t) pairs[pair * 16 + t] = dims[t] | static_cast<uint32_t>(dims[16 + t]) << 16;
    }
    transpose16(reinterpret_cast<const char*>(pairs), 64, rows, stride);
  }
}

// Tokens [begin, end) of a K block <- rows, of which the first is token `begin`. Other tokens are not touched, and a
// row is not read past its end, which for an odd dim of bf16 lies inside a word.
template <DType kDType>
void put_k(const BlockShape<kDType>& shape, const char* rows, int64_t stride, int64_t begin, int64_t end, char* panel) {
  using F = Format<kDType>;
  using T = typename WordOf<F::kWordBytes>::T;
  constexpr int64_t kStep = 64 / F::kWordBytes;
  const int64_t whole = shape.whole_words();
  int64_t w = 0;
  if (end - begin == kBlockTokens) {
    for (; w + kStep <= whole; w += kStep) {
      put_16_rows<F::kWordBytes>(rows + w * F::kWordBytes, stride, panel + w * 16 * F::kWordBytes);
    }
  }
  T* const out = reinterpret_cast<T*>(panel);
  for (int64_t t = begin; t < end; ++t, rows += stride) {
    const T* const row = reinterpret_cast<const T*>(rows);
    for (int64_t i = w; i < whole; ++i) out[i * 16 + t] = row[i];
    for (int64_t i = whole; i < shape.words(); ++i) out[i * 16 + t] = 0;
    if (shape.dim % F::kPair != 0) out[whole * 16 + t] = reinterpret_cast<const Half*>(rows)[shape.dim - 1];
  }
}

template <DType kDType>
void get_k(const BlockShape<kDType>& shape, const char* panel, int64_t begin, int64_t end, char* rows, int64_t stride) {
  using F = Format<kDType>;
  using T = typename WordOf<F::kWordBytes>::T;
  constexpr int64_t kStep = 64 / F::kWordBytes;
  const int64_t whole = shape.whole_words();
  int64_t w = 0;
  if (end - begin == kBlockTokens) {
    for (; w + kStep <= whole; w += kStep) {
      get_16_rows<F::kWordBytes>(panel + w * 16 * F::kWordBytes, rows + w * F::kWordBytes, stride);
    }
  }
  const T* const in = reinterpret_cast<const T*>(panel);
  for (int64_t t = begin; t < end; ++t, rows += stride) {
    T* const row = reinterpret_cast<T*>(rows);
    for (int64_t i = w; i < whole; ++i) row[i] = in[i * 16 + t];
    if (shape.dim % F::kPair != 0) reinterpret_cast<Half*>(rows)[shape.dim - 1] = static_cast<Half>(in[whole * 16 + t]);
  }
}

// The same for a V block.
template <DType kDType>
void put_v(const BlockShape<kDType>& shape, const char* rows, int64_t stride, int64_t begin, int64_t end, char* panel) {
  using F = Format<kDType>;
  for (int64_t t = begin; t < end; ++t, rows += stride) {
    char* const to = panel + t / F::kPair * shape.stored * F::kWordBytes;
    if constexpr (F::kPair == 1) {
      std::memcpy(to, rows, shape.row_bytes());
      std::memset(to + shape.row_bytes(), 0, (shape.stored - shape.dim) * F::kItemBytes);
    } else if (t % 2 == 0 && t + 1 < end) {
      Word* const words = reinterpret_cast<Word*>(to);
      const Half *const even = reinterpret_cast<const Half*>(rows), *const odd = even + stride / 2;
      for (int64_t d = 0; d < shape.dim; ++d) words[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
      std::memset(words + shape.dim, 0, (shape.stored - shape.dim) * F::kWordBytes);
      ++t;
      rows += stride;
    } else {
      const Half* const row = reinterpret_cast<const Half*>(rows);
      Half* const halves = reinterpret_cast<Half*>(to) + t % 2;
      for (int64_t d = 0; d < shape.stored; ++d) halves[2 * d] = d < shape.dim ? row[d] : Half{0};
    }
  }
}

template <DType kDType>
void get_v(const BlockShape<kDType>& shape, const char* panel, int64_t begin, int64_t end, char* rows, int64_t stride) {
  using F = Format<kDType>;
  for (int64_t t = begin; t < end; ++t, rows += stride) {
    const char* const from = panel + t / F::kPair * shape.stored * F::kWordBytes;
    if constexpr (F::kPair == 1) {
      std::memcpy(rows, from, shape.row_bytes());
    } else {
      const Word* const words = reinterpret_cast<const Word*>(from);
      const int shift = t % 2 * 16;
      Half* const row = reinterpret_cast<Half*>(rows);
      for (int64_t d = 0; d < shape.dim; ++d) row[d] = static_cast<Half>(words[d] >> shift);
    }
  }
}

// A copy of a block in which tokens outside [begin, end) are zeros: a zero weight does not silence a NaN in V.
template <DType kDType>
void copy_k(const BlockShape<kDType>& shape, const char* from, int64_t begin, int64_t end, char* to) {
  using T = typename WordOf<Format<kDType>::kWordBytes>::T;
  T keep[kBlockTokens];
  for (int64_t t = 0; t < kBlockTokens; ++t) keep[t] = t >= begin && t < end ? static_cast<T>(~T{0}) : T{0};
  const T* const in = reinterpret_cast<const T*>(from);
  T* const out = reinterpret_cast<T*>(to);
  for (int64_t w = 0; w < shape.words(); ++w) {
    for (int64_t t = 0; t < kBlockTokens; ++t) out[w * 16 + t] = in[w * 16 + t] & keep[t];
  }
}

template <DType kDType>
void copy_v(const BlockShape<kDType>& shape, const char* from, int64_t begin, int64_t end, char* to) {
  using F = Format<kDType>;
  using T = typename WordOf<F::kWordBytes>::T;
  const T* const in = reinterpret_cast<const T*>(from);
  T* const out = reinterpret_cast<T*>(to);
  for (int64_t w = 0, t = 0; t < kBlockTokens; ++w, t += F::kPair) {
    const Word first = t >= begin && t < end ? ~Word{0} : 0, last = t + 1 >= begin && t + 1 < end ? ~Word{0} : 0;
    const T kept = F::kPair == 1 ? static_cast<T>(first) : static_cast<T>((first & 0xFFFFu) | (last & 0xFFFF0000u));
    for (int64_t d = 0; d < shape.stored; ++d) out[w * shape.stored + d] = in[w * shape.stored + d] & kept;
  }
}

// Calls visit(block, first token in the block, last, tokens before them in the run).
template <class Visit>
void for_each_block(int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t block = begin / kBlockTokens; block * kBlockTokens < end; ++block) {
    const int64_t first = max64(begin, block * kBlockTokens), last = min64(end, (block + 1) * kBlockTokens);
    visit(block, first - block * kBlockTokens, last - block * kBlockTokens, first - begin);
  }
}

template <DType kDType>
void pack_as(const Arena& arena, HeadSlice to, int64_t begin, int64_t end, const TokenRun& from) {
  const BlockShape<kDType> k(arena.head_dim), v(arena.v_head_dim);
  for_each_block(begin, end, [&](int64_t block, int64_t first, int64_t last, int64_t run) {
    put_k(k, from.k + run * from.k_stride, from.k_stride, first, last, to.k + block * k.block_bytes());
    put_v(v, from.v + run * from.v_stride, from.v_stride, first, last, to.v + block * v.block_bytes());
  });
}

template <DType kDType>
void unpack_as(const Arena& arena, HeadSlice from, int64_t begin, int64_t end, const TokenRun& to) {
  const BlockShape<kDType> k(arena.head_dim), v(arena.v_head_dim);
  for_each_block(begin, end, [&](int64_t block, int64_t first, int64_t last, int64_t run) {
    get_k(k, from.k + block * k.block_bytes(), first, last, to.k + run * to.k_stride, to.k_stride);
    get_v(v, from.v + block * v.block_bytes(), first, last, to.v + run * to.v_stride, to.v_stride);
  });
}

}  // namespace
}  // namespace tandem::TANDEM_ISA
