// Pages of codes on every instruction set: what attention over them gives against plain loops over what they stand for,
// in arenas exactly as large as they must be. tests/kernels/test_quantised.py holds bytes and bounds.
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "paged.h"
#include "pages.h"

namespace tandem {
namespace {

constexpr int64_t kNumHeads = 2, kNumPages = 4;

struct QuantisedShape {
  Packing packing;
  int64_t page_size, head_dim, v_head_dim, group_size, num_channels;

  Arena arena(Packing packing_of_it) const {
    return {nullptr,   nullptr,   DType::kFloat32, packing_of_it, kNumPages,
            kNumHeads, page_size, head_dim,        v_head_dim,    packing_of_it == Packing::kRows ? 0 : num_channels};
  }
  std::string name(const KernelTable& kernels) const {
    return std::string(kernels.name) + (packing == Packing::kInt8 ? " int8" : " int4") + " page_size " +
           std::to_string(page_size) + " head_dim " + std::to_string(head_dim) + ", " + std::to_string(v_head_dim) +
           " group_size " + std::to_string(group_size) + " channels " + std::to_string(num_channels);
  }
};

// Pages of codes made of random rows, and the numbers that they stand for, [head][token][dim].
struct QuantisedPages {
  OwnedArena rows;
  std::vector<char> k_codes, v_codes;
  Arena arena;
  std::vector<int32_t> slots{0, 1, 2, 3};
  std::vector<float> k, v;

  QuantisedPages(const QuantisedShape& shape, const KernelTable& kernels, float spoilt = 0.0f)
      : rows(shape.arena(Packing::kRows)), arena(shape.arena(shape.packing)) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (std::vector<char>* half : {&rows.k, &rows.v}) {
      float* const numbers = reinterpret_cast<float*>(half->data());
      for (size_t i = 0; i < half->size() / 4; ++i) numbers[i] = normal(random) + static_cast<float>(i % 5);
    }
    if (spoilt != 0.0f) reinterpret_cast<float*>(rows.v.data())[shape.v_head_dim * (shape.page_size + 5)] = spoilt;
    k_codes.assign(arena.k_slice_bytes() * kNumPages * kNumHeads, '\xFF');
    v_codes.assign(arena.v_slice_bytes() * kNumPages * kNumHeads, '\xFF');
    arena.k = k_codes.data();
    arena.v = v_codes.data();
    WorkerPool pool(2);
    Refused refused;
    CHECK(move_pages(pool, kernels, rows.arena, arena, {slots, slots}, refused) == Status::kOk);
    CHECK(refused.pages == (spoilt == 0.0f ? std::vector<int64_t>{} : std::vector<int64_t>{0}));
    CHECK(refused.tokens == (spoilt == 0.0f ? std::vector<int64_t>{} : std::vector<int64_t>{5}));
    if (spoilt == 0.0f) gather(pool, kernels);
  }

  void gather(WorkerPool& pool, const KernelTable& kernels) {
    const int64_t num_tokens = kNumPages * arena.page_size, k_row = arena.head_dim * 4, v_row = arena.v_head_dim * 4;
    k.assign(kNumHeads * num_tokens * arena.head_dim, kNan);
    v.assign(kNumHeads * num_tokens * arena.v_head_dim, kNan);
    const TokenRows to{reinterpret_cast<char*>(k.data()),
                       reinterpret_cast<char*>(v.data()),
                       0,
                       num_tokens * k_row,
                       k_row,
                       0,
                       num_tokens * v_row,
                       v_row};
    const TokenRange all{{slots.data(), 0, 0}, 1, 0, num_tokens};
    CHECK(copy_tokens(pool, kernels, arena, all, to, Direction::kGather) == Status::kOk);
  }
};

// out [dim] and lse of one query row over tokens [begin, end) of a head.
double attend_plainly(const QuantisedPages& pages, const float* q, float scale, int64_t head, int64_t begin,
                      int64_t end, std::vector<double>& out) {
  const int64_t num_tokens = kNumPages * pages.arena.page_size, dim = pages.arena.head_dim,
                v_dim = pages.arena.v_head_dim;
  double sum = 0.0, top = -INFINITY;
  std::vector<double> scores(num_tokens);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t d = 0; d < dim; ++d)
      scores[t] += static_cast<double>(q[d]) * pages.k[(head * num_tokens + t) * dim + d];
    scores[t] *= scale;
    top = std::max(top, scores[t]);
  }
  out.assign(v_dim, 0.0);
  for (int64_t t = begin; t < end; ++t) {
    const double p = std::exp(scores[t] - top);
    sum += p;
    for (int64_t d = 0; d < v_dim; ++d) out[d] += p * pages.v[(head * num_tokens + t) * v_dim + d];
  }
  for (double& x : out) x /= sum;
  return top + std::log(sum);
}

void check_attention(const QuantisedShape& shape, const KernelTable& kernels) {
  current_case() = shape.name(kernels);
  const QuantisedPages pages(shape, kernels);
  const int64_t num_rows = kNumHeads * shape.group_size, begin = 3, end = kNumPages * shape.page_size - 5;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> q(num_rows * shape.head_dim), out(num_rows * shape.v_head_dim, kNan), lse(num_rows, kNan);
  for (float& x : q) x = normal(random);
  const float scale = 0.3f / std::sqrt(static_cast<float>(shape.head_dim));
  const Queries queries{q.data(), DType::kFloat32, 0, shape.head_dim, shape.head_dim, 1, num_rows, 1};
  const Run run{pages.arena, {pages.slots.data(), 0, 0}, 1, kNumPages, &begin, &end};
  WorkerPool pool(2);
  CHECK(attend(pool, kernels, {{queries, run, {scale, 0.0f, kNoWindow}, false}},
               {out.data(), DType::kFloat32, 0, shape.v_head_dim, shape.v_head_dim, lse.data(), nullptr}) ==
        Status::kOk);
  std::vector<double> expected;
  for (int64_t row = 0; row < num_rows; ++row) {
    const double truth =
        attend_plainly(pages, &q[row * shape.head_dim], scale, row / shape.group_size, begin, end, expected);
    CHECK(std::abs(lse[row] - truth) < 1e-3, lse[row], truth);
    for (int64_t d = 0; d < shape.v_head_dim; ++d) {
      CHECK(std::abs(out[row * shape.v_head_dim + d] - expected[d]) < 2e-3, out[row * shape.v_head_dim + d],
            expected[d]);
    }
  }
}

void attention() {
  for (const KernelTable* kernels : available_kernels()) {
    for (const int64_t group_size : {1, 2, 4, 7, 16, 19}) {
      for (const int64_t page_size : {16, 48, 64, 160}) {
        check_attention({Packing::kInt8, page_size, 128, 64, group_size, 0}, *kernels);
        check_attention({Packing::kInt4, page_size, 64, 128, group_size, 0}, *kernels);
      }
    }
    for (const int64_t num_channels : {16, 48, 128}) {
      check_attention({Packing::kInt8, 64, 128, 128, 3, num_channels}, *kernels);
      check_attention({Packing::kInt4, 64, 128, 128, 3, num_channels}, *kernels);
    }
    for (const int64_t dim : {1, 17, 80, 255, 256})
      check_attention({Packing::kInt8, 32, dim, 257 - dim, 2, 0}, *kernels);
    check_attention({Packing::kInt4, 64, 256, 192, 5, 0}, *kernels);
  }
}

// Token 5 of the first page's second head.
void refused_pages() {
  for (const KernelTable* kernels : available_kernels()) {
    for (const Packing packing : {Packing::kInt8, Packing::kInt4}) {
      const QuantisedShape shape{packing, 32, 64, 64, 1, 0};
      current_case() = shape.name(*kernels);
      const QuantisedPages pages(shape, *kernels, INFINITY);
      const int64_t slice = pages.arena.v_slice_bytes();
      for (int64_t i = 0; i < slice; ++i) CHECK(pages.v_codes[slice + i] == '\xFF', i);
    }
  }
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  return tandem::run_tests({{"attention over codes", tandem::attention}, {"refused pages", tandem::refused_pages}},
                           argc, argv);
}
