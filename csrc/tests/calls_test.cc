// Whole calls: several runs, merges, sinks, outputs of other types and strides, any number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "expected.h"
#include "problem.h"
#include "round.h"

namespace tandem {
namespace {

// The same bits on any number of threads; run under ThreadSanitizer too, by its name.
void same_bits_on_any_threads() {
  for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
    const DType bf16 = DType::kBFloat16;
    const Problem p({bf16, bf16, packing, 8, 4, 1, 256, 64, false, {0, 77}, {700, 1030}}, fill_normal);
    for (const KernelTable* kernels : available_kernels()) {
      current_case() = case_name(*kernels, p);
      WorkerPool caller(1);
      const Result once = run_attend(caller, *kernels, p);
      for (const int num_threads : {2, 3}) {
        WorkerPool pool(num_threads);
        for (int run = 0; run < 3; ++run) {
          const Result again = run_attend(pool, *kernels, p);
          CHECK(again.status == once.status && again.out == once.out && again.lse == once.lse, num_threads, run);
        }
      }
    }
  }
}

// Attention over three pieces of a sequence, merged, is attention over all of it; empty pieces change no bit.
void merge_of_pieces_on_threads() {
  WorkerPool pool(3);
  const Shape whole{DType::kFloat32, DType::kFloat32, Packing::kPanels, 2, 4, 1, 80, 16, false, {3, 0}, {150, 20}};
  const std::vector<Expected> expected = reference(Problem(whole, fill_normal));
  for (const KernelTable* kernels : available_kernels()) {
    std::vector<Result> pieces;
    for (const auto& [begin, end] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 37}, {37, 38}, {38, 150}, {150, 150}}) {
      Problem piece(whole, fill_normal);
      for (int64_t seq = 0; seq < 2; ++seq) {
        piece.shape.kv_start[seq] = std::min(std::max(begin, whole.kv_start[seq]), whole.kv_len[seq]);
        piece.shape.kv_len[seq] = std::min(end, whole.kv_len[seq]);
      }
      current_case() = case_name(*kernels, piece);
      pieces.push_back(run_attend(pool, *kernels, piece));
    }
    Result merged{Status::kOk, std::vector<float>(pieces[0].out.size(), kNan),
                  std::vector<float>(pieces[0].lse.size(), kNan)};
    Partials parts{{}, {}, static_cast<int64_t>(merged.lse.size()), whole.head_dim, whole.num_q_heads(), whole.q_len};
    for (const Result& piece : pieces) {
      parts.out.push_back(piece.out.data());
      parts.lse.push_back(piece.lse.data());
    }
    merge(pool, parts, nullptr, merged.out.data(), merged.lse.data());
    check_close(merged, expected);

    Result alone = merged;
    Partials with_empty = parts;
    with_empty.out = {parts.out[3], parts.out[0]};
    with_empty.lse = {parts.lse[3], parts.lse[0]};
    merge(pool, with_empty, nullptr, alone.out.data(), alone.lse.data());
    CHECK(alone.out == pieces[0].out && alone.lse == pieces[0].lse);
  }
}

// One call over pieces that lie in different arenas is attention over all of them; the causal tail is in the last.
void several_runs() {
  WorkerPool pool(2);
  const Shape whole{DType::kBFloat16, DType::kFloat32, Packing::kRows, 2, 4, 3, 64, 16, true, {3, 0}, {150, 90}};
  for (const KernelTable* kernels : available_kernels()) {
    const Problem all(whole, fill_normal);
    const std::vector<Expected> expected = reference(all);
    std::vector<std::unique_ptr<Problem>> pieces;
    std::vector<AttendArgs> runs;
    for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{0, 32}, {32, 32}, {32, 70}, {70, 150}}) {
      Shape shape = whole;
      shape.packing = begin == 32 ? Packing::kPanels : Packing::kRows;
      pieces.push_back(std::make_unique<Problem>(shape, fill_normal));
      for (int64_t seq = 0; seq < 2; ++seq) {
        pieces.back()->shape.kv_start[seq] = std::max(begin, whole.kv_start[seq]);
        pieces.back()->shape.kv_len[seq] = std::min(end, whole.kv_len[seq]);
      }
      runs.push_back(args_of(*pieces.back()));
      runs.back().q = args_of(all).q;
      runs.back().causal = end == 150;
    }
    current_case() = case_name(*kernels, all);
    check_close(run_attend(pool, *kernels, all, runs), expected);
    runs.pop_back();
    const Result without_tail = run_attend(pool, *kernels, all, runs);
    CHECK(without_tail.out != run_attend(pool, *kernels, all).out);
  }
}

TokenRows rows_from(Problem& p, int64_t token) {
  const int64_t k_row = p.shape.head_dim * 4, v_row = p.shape.v_head_dim() * 4, heads = p.shape.num_kv_heads;
  return {reinterpret_cast<char*>(&p.k[p.k_at(0, 0, token)]),
          reinterpret_cast<char*>(&p.v[p.v_at(0, 0, token)]),
          heads * p.num_tokens * k_row,
          p.num_tokens * k_row,
          k_row,
          heads * p.num_tokens * v_row,
          p.num_tokens * v_row,
          v_row};
}

// The queries' own tokens are written behind the others, then everything is attended: as where they were there before.
// Where the lengths cannot be right, nothing is written.
void appended_and_attended() {
  WorkerPool pool(2);
  const DType f32 = DType::kFloat32;
  for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
    const Shape shape{f32, f32, packing, 2, 3, 3, 24, 16, true, {0, 5}, {66, 66}, 40};
    for (const KernelTable* kernels : available_kernels()) {
      Problem p(shape, fill_normal);
      current_case() = case_name(*kernels, p);
      const Result before = run_attend(pool, *kernels, p);
      const AttendArgs args = args_of(p);
      const int64_t first = shape.kv_len[0] - shape.q_len;
      const TokenRange own{args.kv.table, shape.num_seqs(), first, shape.kv_len[0]};
      Problem unknown(shape, [](Problem& q, std::mt19937&) {
        for (auto* values : {&q.q, &q.k, &q.v}) std::fill(values->begin(), values->end(), kNan);
      });
      CHECK(copy_tokens(pool, *kernels, p.pages.arena, own, rows_from(unknown, 0), Direction::kAppend) == Status::kOk);
      CHECK(std::isnan(run_attend(pool, *kernels, p).out[0]));

      Result found{Status::kOk, std::vector<float>(before.out.size(), kNan),
                   std::vector<float>(before.lse.size(), kNan)};
      const int64_t dim = shape.v_head_dim(), head = shape.q_len * dim;
      const Output to{found.out.data(), f32, shape.num_q_heads() * head, head, dim, found.lse.data(), nullptr};
      for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{66, 65}, {2, 2}, {9000, 9000}}) {
        AttendArgs wrong = args;
        wrong.kv.kv_len = lengths.data();
        const Status status = append_and_attend(pool, *kernels, {wrong}, rows_from(p, first), to);
        CHECK(status == Status::kOutsideTable, lengths[0], lengths[1]);
      }
      CHECK(std::isnan(run_attend(pool, *kernels, p).out[0]) && std::isnan(found.out[0]));
      CHECK(append_and_attend(pool, *kernels, {args}, rows_from(p, first), to) == Status::kOk);
      CHECK(found.out == before.out && found.lse == before.lse);
    }
  }
}

// Into 16-bit rows that lie apart, tokens outside heads, as a model wants them: the same numbers, rounded once.
void check_rounded_out(WorkerPool& pool, const KernelTable& kernels, const Problem& p, DType dtype) {
  const Shape& shape = p.shape;
  const Result plain = run_attend(pool, kernels, p);
  const int64_t heads = shape.num_q_heads(), dim = shape.v_head_dim(), row = dim + 3, token = heads * row;
  std::vector<uint16_t> out(shape.num_seqs() * shape.q_len * token, 0xABCD);
  const Output to{out.data(), dtype, shape.q_len * token, row, token, nullptr, nullptr};
  CHECK(attend(pool, kernels, {args_of(p)}, to) == Status::kOk);
  for (int64_t seq = 0; seq < shape.num_seqs(); ++seq) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t i = 0; i < shape.q_len; ++i) {
        const uint16_t* found = &out[seq * to.stride_seq + head * row + i * token];
        const float* right = &plain.out[((seq * heads + head) * shape.q_len + i) * dim];
        for (int64_t d = 0; d < row; ++d) {
          if (d >= dim) {
            CHECK(found[d] == 0xABCD, seq, head, i, d);
          } else {
            CHECK(found[d] == (dtype == DType::kBFloat16 ? bf16_bits(right[d]) : float16_bits(right[d])), seq, head, i,
                  d);
          }
        }
      }
    }
  }
}

void out_in_other_strides() {
  WorkerPool pool(2);
  const Problem p({DType::kBFloat16, DType::kBFloat16, Packing::kPanels, 2, 4, 3, 24, 16, true, {0, 5}, {40, 70}, 33},
                  fill_normal);
  for (const KernelTable* kernels : available_kernels()) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      current_case() = case_name(*kernels, p) + " out " + dtype_name(dtype);
      check_rounded_out(pool, *kernels, p, dtype);
    }
  }
}

// Every float16 and bf16 number, those around the middle between two, and random floats.
void rounding_to_sixteen_bits() {
  const auto check = [](float x) {
    CHECK(to_float16(x) == float16_bits(x) || (x != x && (to_float16(x) & 0x7FFF) == 0x7E00), x);
    CHECK(to_bf16(x) == bf16_bits(x), x);
  };
  for (const auto value_of : {float16_value, bf16_value}) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const float x = value_of(static_cast<uint16_t>(bits)), next = value_of(static_cast<uint16_t>(bits + 1));
      const float middle = 0.5f * x + 0.5f * next;
      for (const float y : {x, middle, std::nextafter(middle, -INFINITY), std::nextafter(middle, INFINITY)}) check(y);
    }
  }
  std::mt19937 random(11);
  for (int i = 0; i < 1000000; ++i) {
    const uint32_t bits = random();
    float x;
    std::memcpy(&x, &bits, sizeof x);
    check(x);
  }
  for (const float x : {65504.0f, 65519.99f, 65520.0f, 1e30f, INFINITY, -INFINITY, 1e-40f}) check(x);
}

// A sink's logit is one more term of the denominator, in `attend` over several runs and in `merge` alike.
void sinks() {
  WorkerPool pool(2);
  const Shape shape{DType::kFloat32, DType::kFloat32, Packing::kPanels, 2, 2, 3, 16, 16, true, {0, 40}, {50, 40}};
  const Problem p(shape, fill_normal);
  const std::vector<float> sink = {1.5f, -INFINITY, 1e4f, -20.0f};
  std::vector<Expected> expected = reference(p);
  for (size_t row = 0; row < expected.size(); ++row) {
    Expected& e = expected[row];
    const double logit = sink[row / shape.q_len % sink.size()], top = std::max(e.lse, logit);
    const double with = top == -INFINITY ? top : top + std::log(std::exp(e.lse - top) + std::exp(logit - top));
    const double u = std::ldexp(1.0, -24), rounding = 4 * u * (std::abs(std::max(logit, -1e4)) + std::abs(top) + 4);
    for (double& out : e.out) out *= with == -INFINITY ? 0.0 : std::exp(e.lse - with);
    for (double& allowed : e.out_tolerance) allowed += rounding;
    e.lse = with;
    e.lse_tolerance += std::isfinite(with) ? rounding : 0.0;
  }
  for (const KernelTable* kernels : available_kernels()) {
    current_case() = case_name(*kernels, p);
    check_close(run_attend(pool, *kernels, p, {args_of(p)}, sink.data()), expected);
    const Result plain = run_attend(pool, *kernels, p);
    Result merged = plain;
    const Partials parts{{plain.out.data()}, {plain.lse.data()}, static_cast<int64_t>(plain.lse.size()), 16, 4, 3};
    merge(pool, parts, sink.data(), merged.out.data(), merged.lse.data());
    check_close(merged, expected);
  }
}

// A run that reaches behind its table is refused before anything is read.
void outside_the_table() {
  WorkerPool pool(2);
  const Problem p({DType::kFloat32, DType::kFloat32, Packing::kRows, 1, 1, 1, 8, 16, false, {0}, {40}}, fill_normal);
  for (const auto& [start, len] :
       std::vector<std::pair<int64_t, int64_t>>{{-1, 40}, {0, -1}, {0, p.num_pages * 16 + 1}}) {
    AttendArgs args = args_of(p);
    args.kv.kv_start = &start;
    args.kv.kv_len = &len;
    CHECK(run_attend(pool, *available_kernels().front(), p, {args}).status == Status::kOutsideTable, start, len);
  }
}

// Parts of random weight, huge ones and empty ones, against a merge in double. An lse near 1e4 is known to 1e4 u, and
// so is the difference of two: 4 u (largest + 1) in every exponent, and 4 u for each part and operation.
void merge_against_double() {
  constexpr int64_t kNumRows = 150, kDim = 24, kNumParts = 5;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> outs(kNumParts), lses(kNumParts);
  Partials parts{{}, {}, kNumRows, kDim, kNumRows, 1};
  for (int64_t i = 0; i < kNumParts; ++i) {
    for (int64_t row = 0; row < kNumRows; ++row) {
      const bool empty = row % 10 == 0 || (row + i) % 4 == 0;
      const float offset = row % 3 == 0 ? 1e4f : row % 3 == 1 ? -1e4f : 0.0f;
      lses[i].push_back(empty ? -INFINITY : offset + 3 * normal(random));
      for (int64_t d = 0; d < kDim; ++d) outs[i].push_back(empty ? 0.0f : normal(random));
    }
    parts.out.push_back(outs[i].data());
    parts.lse.push_back(lses[i].data());
  }
  Result merged{Status::kOk, std::vector<float>(kNumRows * kDim, kNan), std::vector<float>(kNumRows, kNan)};
  WorkerPool pool(2);
  merge(pool, parts, nullptr, merged.out.data(), merged.lse.data());

  const double u = std::ldexp(1.0, -24);
  std::vector<Expected> expected;
  for (int64_t row = 0; row < kNumRows; ++row) {
    double largest = 0.0, highest = -INFINITY, total = 0.0;
    for (int64_t i = 0; i < kNumParts; ++i) highest = std::max<double>(highest, lses[i][row]);
    Expected e{std::vector<double>(kDim, 0.0), std::vector<double>(kDim, 0.0), highest, 0.0};
    for (int64_t i = 0; i < kNumParts && highest > -INFINITY; ++i) {
      if (lses[i][row] == -INFINITY) continue;
      largest = std::max<double>(largest, std::abs(lses[i][row]));
      total += std::exp(lses[i][row] - highest);
    }
    const double exponent = 4 * u * (largest + 1);
    for (int64_t i = 0; i < kNumParts && total > 0.0; ++i) {
      for (int64_t d = 0; d < kDim; ++d) {
        const double share = std::exp(lses[i][row] - highest) / total * outs[i][row * kDim + d];
        e.out[d] += share;
        e.out_tolerance[d] += std::abs(share) * (std::expm1(2 * exponent) + 4 * (kNumParts + 4) * u);
      }
    }
    if (total > 0.0) e.lse += std::log(total);
    e.lse_tolerance = exponent + 4 * (kNumParts + 4) * u;
    expected.push_back(e);
  }
  check_close(merged, expected);
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  using namespace tandem;
  return run_tests({{"same bits on any threads", same_bits_on_any_threads},
                    {"merge of pieces, on threads", merge_of_pieces_on_threads},
                    {"merge against double", merge_against_double},
                    {"several runs", several_runs},
                    {"appended and attended", appended_and_attended},
                    {"sinks", sinks},
                    {"out in other strides", out_in_other_strides},
                    {"rounding to sixteen bits", rounding_to_sixteen_bits},
                    {"outside the table", outside_the_table}},
                   argc, argv);
}
