// Attention problems for tests: queries, keys and values as plain floats, and stored behind poisoned pages.
//
// Arenas are full of NaN but for the tokens a call may read, tables full of wild slots but for the pages it needs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"
#include "paged.h"

namespace tandem {

// What one call is about, before there are numbers.
struct Shape {
  DType kv_dtype, q_dtype;
  Packing packing;
  int64_t num_kv_heads, group_size, q_len, head_dim, page_size;
  bool causal;
  std::vector<int64_t> kv_start, kv_len;
  int64_t v_dim = 0;  // 0: as head_dim
  float softcap = 0.0f;
  int64_t window = kNoWindow;

  int64_t v_head_dim() const { return v_dim == 0 ? head_dim : v_dim; }
  int64_t num_seqs() const { return static_cast<int64_t>(kv_len.size()); }
  int64_t num_q_heads() const { return num_kv_heads * group_size; }
};

// Queries, keys and values of a shape, twice: plain floats for the reference, and what `attend` is given.
struct Problem {
  Shape shape;
  float scale;
  int64_t num_pages, num_tokens;  // of every table, one page more than any sequence needs
  int64_t q_row;                  // elements from one query row to the next
  std::vector<float> q;           // [seq][q_head][query][dim]
  std::vector<float> k, v;        // [seq][kv_head][token][dim]
  std::vector<char> q_stored;
  OwnedArena pages;
  std::vector<int32_t> slots;  // [seq][kv_head][num_pages]

  using Fill = std::function<void(Problem&, std::mt19937&)>;

  Problem(const Shape& s, const Fill& fill)
      : shape(s),
        scale(1.0f / std::sqrt(static_cast<float>(s.head_dim))),
        num_pages(*std::max_element(s.kv_len.begin(), s.kv_len.end()) / s.page_size + 2),
        num_tokens(num_pages * s.page_size),
        q_row(s.head_dim + 3),
        q(s.num_seqs() * s.num_q_heads() * s.q_len * s.head_dim),
        k(s.num_seqs() * s.num_kv_heads * num_tokens * s.head_dim),
        v(s.num_seqs() * s.num_kv_heads * num_tokens * s.v_head_dim()),
        pages({nullptr, nullptr, s.kv_dtype, s.packing, s.num_seqs() * s.num_kv_heads * num_pages, s.num_kv_heads,
               s.page_size, s.head_dim, s.v_head_dim()}) {
    std::mt19937 random(7);
    fill(*this, random);
    store_queries();
    store_pages(random);
  }

  int64_t q_at(int64_t seq, int64_t head, int64_t i) const {
    return ((seq * shape.num_q_heads() + head) * shape.q_len + i) * shape.head_dim;
  }
  int64_t token_at(int64_t seq, int64_t head, int64_t token) const {
    return (seq * shape.num_kv_heads + head) * num_tokens + token;
  }
  int64_t k_at(int64_t seq, int64_t head, int64_t token) const { return token_at(seq, head, token) * shape.head_dim; }
  int64_t v_at(int64_t seq, int64_t head, int64_t token) const {
    return token_at(seq, head, token) * shape.v_head_dim();
  }
  int32_t& slot(int64_t seq, int64_t head, int64_t page) {
    return slots[(seq * shape.num_kv_heads + head) * num_pages + page];
  }
  // Query i of a sequence sees tokens [visible_begin, visible_end).
  int64_t visible_end(int64_t seq, int64_t i) const {
    return shape.causal ? shape.kv_len[seq] - shape.q_len + 1 + i : shape.kv_len[seq];
  }
  int64_t visible_begin(int64_t seq, int64_t i) const {
    return std::max(shape.kv_start[seq], visible_end(seq, i) - shape.window);
  }

  // Rows lie apart, with NaN between them.
  void store_queries() {
    const int64_t bytes = item_bytes(shape.q_dtype), num_rows = q.size() / shape.head_dim;
    q_stored.resize(num_rows * q_row * bytes);
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int64_t d = 0; d < q_row; ++d) {
        const float value = d < shape.head_dim ? q[row * shape.head_dim + d] : kNan;
        store_element(&q_stored[(row * q_row + d) * bytes], shape.q_dtype, value);
      }
    }
    for (float& value : q) value = rounded(shape.q_dtype, value);
  }

  void store_pages(std::mt19937& random) {
    slots = shuffled_slots(pages.arena.num_slots, random);
    for (int64_t seq = 0; seq < shape.num_seqs(); ++seq) {
      for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
        const int64_t first = visible_begin(seq, 0);  // what no query sees stays poisoned
        for (int64_t token = first; token < shape.kv_len[seq]; ++token) store_token(seq, head, token);
        for (int64_t page = 0; page < num_pages; ++page) {
          const bool used = page * shape.page_size < shape.kv_len[seq] && (page + 1) * shape.page_size > first &&
                            first < shape.kv_len[seq];
          if (!used) slot(seq, head, page) = kWildSlots[random() % 3];
        }
      }
    }
    for (float& value : k) value = rounded(shape.kv_dtype, value);
    for (float& value : v) value = rounded(shape.kv_dtype, value);
  }

  void store_token(int64_t seq, int64_t head, int64_t token) {
    const Arena& arena = pages.arena;
    const HeadSlice slice = arena.slice(slot(seq, head, token / shape.page_size), head);
    const int64_t in_page = token % shape.page_size;
    for (int64_t d = 0; d < arena.stored(arena.head_dim); ++d) {
      const float value = d < arena.head_dim ? k[k_at(seq, head, token) + d] : 0.0f;
      store_element(slice.k + k_offset(arena, in_page, d), arena.dtype, value);
    }
    for (int64_t d = 0; d < arena.stored(arena.v_head_dim); ++d) {
      const float value = d < arena.v_head_dim ? v[v_at(seq, head, token) + d] : 0.0f;
      store_element(slice.v + v_offset(arena, in_page, d), arena.dtype, value);
    }
  }
};

inline void fill_normal(Problem& p, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (auto* values : {&p.q, &p.k, &p.v}) {
    for (float& value : *values) value = normal(random);
  }
}

struct Result {
  Status status;
  std::vector<float> out, lse;
};

inline AttendArgs args_of(const Problem& p) {
  const Shape& s = p.shape;
  const int64_t stride_head = s.q_len * p.q_row;
  const Queries q{p.q_stored.data(), s.q_dtype, s.num_q_heads() * stride_head, stride_head, p.q_row, s.num_seqs(),
                  s.num_q_heads(),   s.q_len};
  const PageTable table{p.slots.data(), s.num_kv_heads * p.num_pages, p.num_pages};
  const Run kv{p.pages.arena, table, s.num_seqs(), p.num_pages, s.kv_start.data(), s.kv_len.data()};
  return {q, kv, {p.scale, s.softcap, s.window}, s.causal};
}

inline Result run_attend(WorkerPool& pool, const KernelTable& kernels, const Problem& p,
                         const std::vector<AttendArgs>& runs, const float* sink_logit = nullptr) {
  const int64_t num_rows = static_cast<int64_t>(p.q.size()) / p.shape.head_dim, dim = p.shape.v_head_dim();
  Result result{Status::kOk, std::vector<float>(num_rows * dim, kNan), std::vector<float>(num_rows, kNan)};
  const Queries& q = runs[0].q;
  const int64_t stride_head = q.q_len * dim;
  result.status = attend(
      pool, kernels, runs,
      {result.out.data(), DType::kFloat32, q.num_heads * stride_head, stride_head, dim, result.lse.data(), sink_logit});
  return result;
}

inline Result run_attend(WorkerPool& pool, const KernelTable& kernels, const Problem& p) {
  return run_attend(pool, kernels, p, {args_of(p)});
}

inline std::string case_name(const KernelTable& kernels, const Problem& p) {
  const Shape& s = p.shape;
  return shape_name(kernels, p.pages.arena) + " q " + dtype_name(s.q_dtype) + " kv_heads " +
         std::to_string(s.num_kv_heads) + " group_size " + std::to_string(s.group_size) + " q_len " +
         std::to_string(s.q_len) + (s.causal ? " causal" : "") + " softcap " + std::to_string(s.softcap) +
         (s.window == kNoWindow ? "" : " window " + std::to_string(s.window));
}

}  // namespace tandem
