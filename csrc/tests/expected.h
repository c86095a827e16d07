// What attention must give, in double, and how far float32 may be from it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "problem.h"

namespace tandem {

// The attention of one query row in double, and how far float32 may be from it.
//
// The tolerance is the worst case, in units of u = 2^-24 (the relative error of one float32 operation):
//   score     a dot product of head_dim terms, each rounded at most twice as a product and a sum and twice more where
//             a weight has two parts, then times scale: (4 head_dim + 1) u sum|q k| scale. Where q is float32 and K
//             bfloat16, q is a high and a low bf16 part, each right to 2^-9 of what is left: 2^-17 covers both.
//             BFDOT has steps of up to 2 u, but two of them for a pair of terms (head_dim + 2 for each part): no more.
//             It takes subnormal numbers for 0, which costs 2^-126 a term: nothing beside the exponent's 8 u.
//             A soft cap passes errors on at most as they are, divides, multiplies and has a tanh right to 8 u: 10 u of
//             the capped score.
//   exponent  score - maximum, and the differences of running maxima, which add up to at most twice the largest
//             |score|, as do those of the parts' lse: 8 u (largest + log tokens + 1).
//   weight    exp is right to 2 ulp = 4 u; one more for the product, at every tile that raises the maximum, and a tile
//             holds at least 16 tokens: 5 u (tokens / 16 + 2).
//   sum       tokens terms, above and below the fraction line: 2 tokens u each, and a few for merge and division;
//             in bfloat16 V the weights are two bf16 parts: 2^-17. BFDOT: (tokens / 2 + 1) 2 u for each part, the same.
// An error e in every exponent changes a normalised weight by at most the factor exp(2 e).
struct Expected {
  std::vector<double> out, out_tolerance;
  double lse, lse_tolerance;
};

struct Scores {
  std::vector<double> score;
  double largest = 0.0, rounding = 0.0;
};

inline Scores scores_of(const Problem& p, int64_t seq, int64_t head, int64_t i, bool exact_scores = false) {
  const Shape& s = p.shape;
  const bool split = s.kv_dtype == DType::kBFloat16 && s.q_dtype != DType::kBFloat16;
  const double u = std::ldexp(1.0, -24);
  const double per_term = exact_scores ? 0.0 : (4 * s.head_dim + 1) * u + (split ? std::ldexp(1.0, -17) : 0.0);
  Scores found;
  for (int64_t token = p.visible_begin(seq, i); token < p.visible_end(seq, i); ++token) {
    const float* q = &p.q[p.q_at(seq, head, i)];
    const float* k = &p.k[p.k_at(seq, head / s.group_size, token)];
    double dot = 0.0, magnitude = 0.0;
    for (int64_t d = 0; d < s.head_dim; ++d) {
      dot += static_cast<double>(q[d]) * k[d];
      magnitude += std::abs(static_cast<double>(q[d]) * k[d]);
    }
    double score = dot * p.scale, rounding = per_term * magnitude * p.scale;
    if (s.softcap != 0.0f) {
      score = s.softcap * std::tanh(score / s.softcap);
      rounding += 10 * u * std::abs(score);
    }
    found.score.push_back(score);
    found.largest = std::max(found.largest, std::abs(score));
    found.rounding = std::max(found.rounding, rounding);
  }
  return found;
}

inline Expected reference_row(const Problem& p, int64_t seq, int64_t head, int64_t i, bool exact_scores) {
  const Shape& s = p.shape;
  const std::vector<double> zeros(s.v_head_dim(), 0.0);
  Expected row{zeros, zeros, -INFINITY, 0.0};
  const Scores scores = scores_of(p, seq, head, i, exact_scores);
  if (scores.score.empty()) return row;
  const double highest = *std::max_element(scores.score.begin(), scores.score.end());
  double total = 0.0;
  for (const double score : scores.score) total += std::exp(score - highest);
  for (size_t t = 0; t < scores.score.size(); ++t) {
    const double weight = std::exp(scores.score[t] - highest) / total;
    const float* v = &p.v[p.v_at(seq, head / s.group_size, p.visible_begin(seq, i) + static_cast<int64_t>(t))];
    for (int64_t d = 0; d < s.v_head_dim(); ++d) {
      row.out[d] += weight * v[d];
      row.out_tolerance[d] += weight * std::abs(v[d]);
    }
  }
  const double u = std::ldexp(1.0, -24), num = static_cast<double>(scores.score.size());
  const double exponent = scores.rounding + 8 * u * (scores.largest + std::log(num) + 1);
  const double weight = exponent + 5 * u * (num / 16 + 2);
  const double split = s.kv_dtype == DType::kBFloat16 ? std::ldexp(1.0, -17) : 0.0;
  for (double& tolerance : row.out_tolerance) tolerance *= std::expm1(2 * weight) + (4 * num + 16) * u + split;
  row.lse = highest + std::log(total);
  row.lse_tolerance = weight + (2 * num + 16) * u;
  return row;
}

inline std::vector<Expected> reference(const Problem& p, bool exact_scores = false) {
  std::vector<Expected> rows;
  for (int64_t seq = 0; seq < p.shape.num_seqs(); ++seq) {
    for (int64_t head = 0; head < p.shape.num_q_heads(); ++head) {
      for (int64_t i = 0; i < p.shape.q_len; ++i) rows.push_back(reference_row(p, seq, head, i, exact_scores));
    }
  }
  return rows;
}

inline void check_close(const Result& result, const std::vector<Expected>& expected) {
  CHECK(result.status == Status::kOk, static_cast<int>(result.status));
  const size_t dim = result.out.size() / result.lse.size();
  for (size_t row = 0; row < expected.size(); ++row) {
    const Expected& e = expected[row];
    if (e.lse == -INFINITY) {
      CHECK(result.lse[row] == -INFINITY, "row", row, result.lse[row]);
    } else {
      CHECK(std::abs(result.lse[row] - e.lse) <= e.lse_tolerance, "row", row, result.lse[row], e.lse, e.lse_tolerance);
    }
    for (size_t d = 0; d < dim; ++d) {
      const float out = result.out[row * dim + d];
      CHECK(std::abs(out - e.out[d]) <= e.out_tolerance[d], "row", row, "dim", d, out, e.out[d], e.out_tolerance[d]);
    }
  }
}

inline void check_on_every_isa(const Problem& p, bool exact_scores = false) {
  WorkerPool pool(2);
  const std::vector<Expected> expected = reference(p, exact_scores);
  for (const KernelTable* kernels : available_kernels()) {
    current_case() = case_name(*kernels, p);
    check_close(run_attend(pool, *kernels, p), expected);
  }
}

// Calls body(kv_dtype, q_dtype, packing) for all of them.
template <class Body>
void for_each_storage(const Body& body) {
  for (const DType kv : kDTypes) {
    for (const DType q : kDTypes) {
      for (const Packing packing : {Packing::kRows, Packing::kPanels}) body(kv, q, packing);
    }
  }
}

}  // namespace tandem
