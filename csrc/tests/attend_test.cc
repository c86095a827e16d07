// `attend` and `merge` against a double reference, on every instruction set this machine has.
//
// Arenas are full of NaN but for the tokens a call may read, tables full of wild slots but for the pages it needs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "paged.h"

namespace tandem {
namespace {

// What one call is about, before there are numbers.
struct Shape {
  DType kv_dtype, q_dtype;
  Packing packing;
  int64_t num_kv_heads, group_size, q_len, head_dim, page_size;
  bool causal;
  std::vector<int64_t> kv_start, kv_len;

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
        v(k.size()),
        pages({nullptr, nullptr, s.kv_dtype, s.packing, s.num_seqs() * s.num_kv_heads * num_pages, s.num_kv_heads,
               s.page_size, s.head_dim}) {
    std::mt19937 random(7);
    fill(*this, random);
    store_queries();
    store_pages(random);
  }

  int64_t q_at(int64_t seq, int64_t head, int64_t i) const {
    return ((seq * shape.num_q_heads() + head) * shape.q_len + i) * shape.head_dim;
  }
  int64_t kv_at(int64_t seq, int64_t head, int64_t token) const {
    return ((seq * shape.num_kv_heads + head) * num_tokens + token) * shape.head_dim;
  }
  int32_t& slot(int64_t seq, int64_t head, int64_t page) {
    return slots[(seq * shape.num_kv_heads + head) * num_pages + page];
  }
  // Query i of a sequence sees tokens [kv_start, visible_end).
  int64_t visible_end(int64_t seq, int64_t i) const {
    return shape.causal ? shape.kv_len[seq] - shape.q_len + 1 + i : shape.kv_len[seq];
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
        for (int64_t token = shape.kv_start[seq]; token < shape.kv_len[seq]; ++token) store_token(seq, head, token);
        for (int64_t page = 0; page < num_pages; ++page) {
          const bool used = page * shape.page_size < shape.kv_len[seq] &&
                            (page + 1) * shape.page_size > shape.kv_start[seq] &&
                            shape.kv_start[seq] < shape.kv_len[seq];
          if (!used) slot(seq, head, page) = kWildSlots[random() % 3];
        }
      }
    }
    for (float& value : k) value = rounded(shape.kv_dtype, value);
    for (float& value : v) value = rounded(shape.kv_dtype, value);
  }

  void store_token(int64_t seq, int64_t head, int64_t token) {
    const Arena& arena = pages.arena;
    const int64_t at = arena.offset(slot(seq, head, token / shape.page_size), head);
    for (int64_t d = 0; d < arena.stored_dim(); ++d) {
      const bool pad = d >= shape.head_dim;
      const int64_t from = kv_at(seq, head, token) + d, in_page = token % shape.page_size;
      store_element(arena.k + at + k_offset(arena, in_page, d), arena.dtype, pad ? 0.0f : k[from]);
      store_element(arena.v + at + v_offset(arena, in_page, d), arena.dtype, pad ? 0.0f : v[from]);
    }
  }
};

void fill_normal(Problem& p, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (auto* values : {&p.q, &p.k, &p.v}) {
    for (float& value : *values) value = normal(random);
  }
}

struct Result {
  Status status;
  std::vector<float> out, lse;
};

AttendArgs args_of(const Problem& p) {
  const Shape& s = p.shape;
  const int64_t stride_head = s.q_len * p.q_row;
  const Queries q{p.q_stored.data(), s.q_dtype, s.num_q_heads() * stride_head, stride_head, p.q_row, s.num_seqs(),
                  s.num_q_heads(),   s.q_len};
  const PageTable table{p.slots.data(), s.num_kv_heads * p.num_pages, p.num_pages};
  const Run kv{p.pages.arena, table, s.num_seqs(), p.num_pages, s.kv_start.data(), s.kv_len.data()};
  return {q, kv, p.scale, s.causal};
}

Result run_attend(WorkerPool& pool, const KernelTable& kernels, const Problem& p, const std::vector<AttendArgs>& runs) {
  const size_t num_rows = p.q.size() / p.shape.head_dim;
  Result result{Status::kOk, std::vector<float>(p.q.size(), kNan), std::vector<float>(num_rows, kNan)};
  const Queries& q = runs[0].q;
  const int64_t stride_head = q.q_len * p.shape.head_dim;
  result.status = attend(pool, kernels, runs,
                         {result.out.data(), DType::kFloat32, q.num_heads * stride_head, stride_head, p.shape.head_dim,
                          result.lse.data()});
  return result;
}

Result run_attend(WorkerPool& pool, const KernelTable& kernels, const Problem& p) {
  return run_attend(pool, kernels, p, {args_of(p)});
}

// The attention of one query row in double, and how far float32 may be from it.
//
// The tolerance is the worst case, in units of u = 2^-24 (the relative error of one float32 operation):
//   score     a dot product of head_dim terms, each rounded at most twice as a product and a sum and twice more where
//             a weight has two parts, then times scale: (4 head_dim + 1) u sum|q k| scale. Where q is float32 and K
//             bfloat16, q is a high and a low bf16 part, each right to 2^-9 of what is left: 2^-17 covers both.
//             BFDOT has steps of up to 2 u, but two of them for a pair of terms (head_dim + 2 for each part): no more.
//             It takes subnormal numbers for 0, which costs 2^-126 a term: nothing beside the exponent's 8 u.
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

Scores scores_of(const Problem& p, int64_t seq, int64_t head, int64_t i, bool exact_scores) {
  const Shape& s = p.shape;
  const bool split = s.kv_dtype == DType::kBFloat16 && s.q_dtype == DType::kFloat32;
  const double u = std::ldexp(1.0, -24);
  const double per_term = exact_scores ? 0.0 : (4 * s.head_dim + 1) * u + (split ? std::ldexp(1.0, -17) : 0.0);
  Scores found;
  for (int64_t token = s.kv_start[seq]; token < p.visible_end(seq, i); ++token) {
    const float* q = &p.q[p.q_at(seq, head, i)];
    const float* k = &p.k[p.kv_at(seq, head / s.group_size, token)];
    double dot = 0.0, magnitude = 0.0;
    for (int64_t d = 0; d < s.head_dim; ++d) {
      dot += static_cast<double>(q[d]) * k[d];
      magnitude += std::abs(static_cast<double>(q[d]) * k[d]);
    }
    found.score.push_back(dot * p.scale);
    found.largest = std::max(found.largest, std::abs(dot * p.scale));
    found.rounding = std::max(found.rounding, per_term * magnitude * p.scale);
  }
  return found;
}

Expected reference_row(const Problem& p, int64_t seq, int64_t head, int64_t i, bool exact_scores) {
  const Shape& s = p.shape;
  Expected row{std::vector<double>(s.head_dim, 0.0), std::vector<double>(s.head_dim, 0.0), -INFINITY, 0.0};
  const Scores scores = scores_of(p, seq, head, i, exact_scores);
  if (scores.score.empty()) return row;
  const double highest = *std::max_element(scores.score.begin(), scores.score.end());
  double total = 0.0;
  for (const double score : scores.score) total += std::exp(score - highest);
  for (size_t t = 0; t < scores.score.size(); ++t) {
    const double weight = std::exp(scores.score[t] - highest) / total;
    const float* v = &p.v[p.kv_at(seq, head / s.group_size, s.kv_start[seq] + t)];
    for (int64_t d = 0; d < s.head_dim; ++d) {
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

std::vector<Expected> reference(const Problem& p, bool exact_scores = false) {
  std::vector<Expected> rows;
  for (int64_t seq = 0; seq < p.shape.num_seqs(); ++seq) {
    for (int64_t head = 0; head < p.shape.num_q_heads(); ++head) {
      for (int64_t i = 0; i < p.shape.q_len; ++i) rows.push_back(reference_row(p, seq, head, i, exact_scores));
    }
  }
  return rows;
}

void check_close(const Result& result, const std::vector<Expected>& expected) {
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

std::string case_name(const KernelTable& kernels, const Problem& p) {
  const Shape& s = p.shape;
  return shape_name(kernels, p.pages.arena) + " q " + (s.q_dtype == DType::kFloat32 ? "float32" : "bfloat16") +
         " kv_heads " + std::to_string(s.num_kv_heads) + " group_size " + std::to_string(s.group_size) + " q_len " +
         std::to_string(s.q_len) + (s.causal ? " causal" : "");
}

void check_on_every_isa(const Problem& p, bool exact_scores = false) {
  WorkerPool pool(2);
  const std::vector<Expected> expected = reference(p, exact_scores);
  for (const KernelTable* kernels : available_kernels()) {
    current_case() = case_name(*kernels, p);
    check_close(run_attend(pool, *kernels, p), expected);
  }
}

// Calls body(kv_dtype, q_dtype, packing) for all eight.
template <class Body>
void for_each_storage(const Body& body) {
  for (const DType kv : {DType::kFloat32, DType::kBFloat16}) {
    for (const DType q : {DType::kFloat32, DType::kBFloat16}) {
      for (const Packing packing : {Packing::kRows, Packing::kPanels}) body(kv, q, packing);
    }
  }
}

// The fastest instruction set is the one that the caller says this processor has, so that none is left out unseen.
void chosen_instruction_set() {
  const char* expected = std::getenv("TANDEM_EXPECT_ISA");
  if (expected != nullptr) CHECK(available_kernels().front()->name == std::string(expected), expected);
}

// Ragged lengths: empty, one token, shorter than q_len, ends and starts inside blocks and pages, and on their edges.
const std::vector<int64_t> kStarts = {0, 0, 1, 5, 70, 64, 33}, kLens = {0, 1, 3, 6, 131, 192, 33};

void every_shape() {
  for_each_storage([](DType kv, DType q, Packing packing) {
    for (const int64_t group_size : {1, 4, 7, 16}) {
      for (const int64_t head_dim : {8, 64, 80, 128, 256}) {
        for (const int64_t page_size : {16, 48, 64}) {
          // The two tails take turns over the shapes: three causal queries, or one that sees all.
          const bool causal = (group_size + head_dim / 8 + page_size / 16) % 2 == 0;
          const Shape shape{kv, q, packing, 2, group_size, causal ? 3 : 1, head_dim, page_size, causal, kStarts, kLens};
          check_on_every_isa(Problem(shape, fill_normal));
        }
      }
    }
  });
}

// Rows beyond one item, q_len > 1 without a mask, and a small head_dim that is no multiple of 16.
void many_queries() {
  for_each_storage([](DType kv, DType q, Packing packing) {
    for (const bool causal : {false, true}) {
      check_on_every_isa(Problem({kv, q, packing, 3, 5, 9, 24, 32, causal, {0, 17, 0}, {40, 99, 4}}, fill_normal));
      check_on_every_isa(Problem({kv, q, packing, 9, 16, 1, 2, 16, causal, {0}, {35}}, fill_normal));
    }
  });
}

// Several chunks of one sequence (2 MiB of K and V each), merged.
Shape long_shape(DType kv, Packing packing) { return {kv, kv, packing, 8, 4, 1, 256, 64, false, {0, 77}, {700, 1030}}; }

void long_sequences() {
  for (const DType kv : {DType::kFloat32, DType::kBFloat16}) {
    for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
      check_on_every_isa(Problem(long_shape(kv, packing), fill_normal));
    }
  }
}

// Keys of +-8 q, two dims in three moved by one: integers, so that scores near +-1e4 are exact in every summation
// order and only softmax is judged. Sequence 0 has both signs, 1 only negative ones.
void fill_huge(Problem& p, std::mt19937& random) {
  const Shape& s = p.shape;
  std::normal_distribution<float> normal;
  for (float& value : p.v) value = normal(random);
  for (float& value : p.q) value = static_cast<float>(static_cast<int>(random() % 31) - 15);
  double magnitude = 0.0;
  for (int64_t d = 0; d < s.head_dim; ++d) magnitude += 8.0 * p.q[d] * p.q[d];
  p.scale = static_cast<float>(std::exp2(std::round(std::log2(1e4 / magnitude))));
  for (int64_t seq = 0; seq < s.num_seqs(); ++seq) {
    for (int64_t head = 0; head < s.num_kv_heads; ++head) {
      const float* q = &p.q[p.q_at(seq, head * s.group_size, 0)];
      for (int64_t token = 0; token < p.num_tokens; ++token) {
        const float sign = seq == 1 || random() % 2 == 0 ? -8.0f : 8.0f;
        for (int64_t d = 0; d < s.head_dim; ++d) {
          p.k[p.kv_at(seq, head, token) + d] = sign * q[d] + static_cast<float>(static_cast<int>(random() % 3) - 1);
        }
      }
    }
  }
}

void huge_logits() {
  for_each_storage([](DType kv, DType q, Packing packing) {
    const Problem p({kv, q, packing, 2, 2, 1, 64, 16, false, {0, 3}, {150, 100}}, fill_huge);
    const Scores scores = scores_of(p, 0, 0, 0, true);
    CHECK(scores.largest > 5e3, scores.largest);
    check_on_every_isa(p, true);
  });
}

// Scores of one sign in one block and far higher ones later: what was gathered first shrinks to nothing.
void rising_maximum() {
  const auto fill = [](Problem& p, std::mt19937& random) {
    fill_normal(p, random);
    for (int64_t token = 0; token < p.num_tokens; ++token) {
      for (int64_t d = 0; d < p.shape.head_dim; ++d) p.k[p.kv_at(0, 0, token) + d] *= 0.1f * static_cast<float>(token);
    }
  };
  for_each_storage([&](DType kv, DType q, Packing packing) {
    check_on_every_isa(Problem({kv, q, packing, 1, 4, 1, 64, 16, false, {0}, {300}}, fill));
  });
}

void no_sequences_and_no_tokens() {
  WorkerPool pool(2);
  for (const KernelTable* kernels : available_kernels()) {
    const Problem p(
        {DType::kBFloat16, DType::kFloat32, Packing::kPanels, 2, 4, 2, 64, 16, true, {0, 20, 20}, {0, 20, 3}},
        fill_normal);
    current_case() = case_name(*kernels, p);
    const Result result = run_attend(pool, *kernels, p);
    CHECK(result.status == Status::kOk);
    for (const float out : result.out) CHECK(out == 0.0f, out);
    for (const float lse : result.lse) CHECK(lse == -INFINITY, lse);
    AttendArgs nothing = args_of(p);
    nothing.q.num_seqs = nothing.kv.num_seqs = 0;
    CHECK(attend(pool, *kernels, {nothing}, Output{}) == Status::kOk);
  }
}

// A NaN anywhere in q is told, also where its sequence is empty.
void nan_in_query() {
  WorkerPool pool(2);
  for_each_storage([&](DType kv, DType q, Packing packing) {
    for (const KernelTable* kernels : available_kernels()) {
      for (const int64_t at : {int64_t{0}, int64_t{8 * 3 * 40 - 1}, int64_t{2 * 8 * 3 * 40 - 40}}) {
        const Problem p({kv, q, packing, 2, 4, 3, 40, 16, true, {0, 0}, {70, 0}},
                        [&](Problem& p, std::mt19937& random) {
                          fill_normal(p, random);
                          p.q[at] = kNan;
                        });
        current_case() = case_name(*kernels, p);
        const Result result = run_attend(pool, *kernels, p);
        CHECK(result.status == Status::kNanInQuery, at, static_cast<int>(result.status));
      }
    }
  });
}

// A wild slot in use is told, and nothing is read through it.
void wild_slot_in_use() {
  WorkerPool pool(2);
  for (const KernelTable* kernels : available_kernels()) {
    for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
      Problem p({DType::kBFloat16, DType::kBFloat16, packing, 2, 4, 1, 64, 16, false, {0, 17}, {70, 40}}, fill_normal);
      current_case() = case_name(*kernels, p);
      const std::vector<int32_t> good = p.slots;
      for (const int32_t wild : {kWildSlots[0], kWildSlots[1], kWildSlots[2], static_cast<int32_t>(good.size())}) {
        for (const int64_t page : {1, 2}) {  // the first and the last of sequence 1
          p.slots = good;
          p.slot(1, 1, page) = wild;
          const Result result = run_attend(pool, *kernels, p);
          CHECK(result.status == Status::kSlotOutOfRange, wild, page, static_cast<int>(result.status));
        }
      }
    }
  }
}

// The same bits on any number of threads; run under ThreadSanitizer too, by its name.
void same_bits_on_any_threads() {
  for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
    const Problem p(long_shape(DType::kBFloat16, packing), fill_normal);
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
    Partials parts{{}, {}, static_cast<int64_t>(merged.lse.size()), whole.head_dim};
    for (const Result& piece : pieces) {
      parts.out.push_back(piece.out.data());
      parts.lse.push_back(piece.lse.data());
    }
    merge(pool, parts, merged.out.data(), merged.lse.data());
    check_close(merged, expected);

    Result alone = merged;
    Partials with_empty{{parts.out[3], parts.out[0]}, {parts.lse[3], parts.lse[0]}, parts.num_rows, parts.dim};
    merge(pool, with_empty, alone.out.data(), alone.lse.data());
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

// Into bf16 rows that lie apart, tokens outside heads, as a model wants them: the same numbers, rounded once.
void out_in_other_strides() {
  WorkerPool pool(2);
  const Shape shape{DType::kBFloat16, DType::kBFloat16, Packing::kPanels, 2, 4, 3, 24, 16, true, {0, 5}, {40, 70}};
  const Problem p(shape, fill_normal);
  for (const KernelTable* kernels : available_kernels()) {
    current_case() = case_name(*kernels, p);
    const Result plain = run_attend(pool, *kernels, p);
    const int64_t heads = shape.num_q_heads(), row = shape.head_dim + 3, token = heads * row;
    std::vector<uint16_t> out(shape.num_seqs() * shape.q_len * token, 0xABCD);
    const Output to{out.data(), DType::kBFloat16, shape.q_len * token, row, token, nullptr};
    CHECK(attend(pool, *kernels, {args_of(p)}, to) == Status::kOk);
    for (int64_t seq = 0; seq < shape.num_seqs(); ++seq) {
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t i = 0; i < shape.q_len; ++i) {
          const uint16_t* found = &out[seq * to.stride_seq + head * row + i * token];
          const float* right = &plain.out[((seq * heads + head) * shape.q_len + i) * shape.head_dim];
          for (int64_t d = 0; d < row; ++d) {
            CHECK(found[d] == (d < shape.head_dim ? bf16_bits(right[d]) : 0xABCD), seq, head, i, d);
          }
        }
      }
    }
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
  Partials parts{{}, {}, kNumRows, kDim};
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
  merge(pool, parts, merged.out.data(), merged.lse.data());

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
  return run_tests({{"chosen instruction set", chosen_instruction_set},
                    {"every shape", every_shape},
                    {"many queries", many_queries},
                    {"long sequences", long_sequences},
                    {"huge logits", huge_logits},
                    {"rising maximum", rising_maximum},
                    {"no sequences and no tokens", no_sequences_and_no_tokens},
                    {"NaN in the query", nan_in_query},
                    {"a wild slot in use", wild_slot_in_use},
                    {"same bits on any threads", same_bits_on_any_threads},
                    {"merge of pieces, on threads", merge_of_pieces_on_threads},
                    {"merge against double", merge_against_double},
                    {"several runs", several_runs},
                    {"out in other strides", out_in_other_strides},
                    {"outside the table", outside_the_table}},
                   argc, argv);
}
