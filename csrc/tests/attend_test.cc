// `attend` over one run against a double reference, on every instruction set this machine has.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "expected.h"
#include "problem.h"

namespace tandem {
namespace {

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
          if (q != kv && (group_size + page_size / 16) % 2 == 0) continue;  // two types take every second shape
          // The two tails take turns over the shapes: three causal queries, or one that sees all.
          const bool causal = (group_size + head_dim / 8 + page_size / 16) % 2 == 0;
          const Shape shape{kv, q, packing, 2, group_size, causal ? 3 : 1, head_dim, page_size, causal, kStarts, kLens};
          check_on_every_isa(Problem(shape, fill_normal));
        }
      }
    }
  });
}

// Every head_dim up to three blocks of dims, odd ones too, and rows of V that are wider or narrower than those of K.
void every_head_dim() {
  for (const DType dtype : kDTypes) {
    for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
      for (int64_t dim = 1; dim <= 49; ++dim) {
        check_on_every_isa(Problem({dtype, dtype, packing, 1, 3, 2, dim, 16, true, {0, 3}, {37, 20}}, fill_normal));
      }
      for (const auto& [k_dim, v_dim] :
           std::vector<std::pair<int64_t, int64_t>>{{192, 128}, {1, 256}, {255, 1}, {64, 80}, {33, 17}, {253, 255}}) {
        const Shape shape{dtype, dtype, packing, 2, 5, 1, k_dim, 48, false, {0, 17}, {100, 31}, v_dim};
        check_on_every_isa(Problem(shape, fill_normal));
      }
    }
  }
}

// Query heads per KV head beyond what one item holds (Falcon-7B has 71, StarCoder 48).
void large_groups() {
  for_each_storage([](DType kv, DType q, Packing packing) {
    for (const int64_t group_size : {17, 48, 71}) {
      check_on_every_isa(Problem({kv, q, packing, 2, group_size, 2, 24, 16, true, {0}, {40}}, fill_normal));
    }
  });
}

// Windows that begin in front of the sequence, in its padding, inside blocks and pages, and behind whole chunks.
void windows() {
  for_each_storage([](DType kv, DType q, Packing packing) {
    for (const int64_t window : {1, 2, 16, 17, 63, 64, 100, 1000}) {
      for (const int64_t q_len : {1, 5}) {
        const Shape shape{kv, q, packing, 2, 3, q_len, 24, 16, true, kStarts, kLens, 0, 0.0f, window};
        check_on_every_isa(Problem(shape, fill_normal));
      }
    }
  });
  const DType bf16 = DType::kBFloat16;
  for (const int64_t window : {1, 15, 8000}) {  // several chunks, and queries that see nothing of the first
    const Shape shape{bf16, bf16, Packing::kPanels, 2, 2, 20, 64, 64, true, {0, 50}, {9000, 3500}, 0, 0.0f, window};
    check_on_every_isa(Problem(shape, fill_normal));
  }
}

// Scores far below, around and far above the cap.
void soft_caps() {
  for_each_storage([](DType kv, DType q, Packing packing) {
    for (const float softcap : {0.5f, 3.0f, 50.0f, 1e6f}) {
      const Shape shape{kv, q, packing, 2, 3, 3, 40, 16, true, {0, 7}, {70, 40}, 0, softcap};
      check_on_every_isa(Problem(shape, fill_normal));
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
void long_sequences() {
  for (const DType kv : kDTypes) {
    for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
      const Shape shape{kv, kv, packing, 8, 4, 1, 256, 64, false, {0, 77}, {700, 1030}};
      check_on_every_isa(Problem(shape, fill_normal));
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
          p.k[p.k_at(seq, head, token) + d] = sign * q[d] + static_cast<float>(static_cast<int>(random() % 3) - 1);
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
    const Shape capped{kv, q, packing, 2, 2, 1, 64, 16, false, {0, 3}, {150, 100}, 0, 30.0f};
    check_on_every_isa(Problem(capped, fill_huge), true);
  });
}

// Scores of one sign in one block and far higher ones later: what was gathered first shrinks to nothing.
void rising_maximum() {
  const auto fill = [](Problem& p, std::mt19937& random) {
    fill_normal(p, random);
    for (int64_t token = 0; token < p.num_tokens; ++token) {
      for (int64_t d = 0; d < p.shape.head_dim; ++d) p.k[p.k_at(0, 0, token) + d] *= 0.1f * static_cast<float>(token);
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

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  using namespace tandem;
  return run_tests({{"chosen instruction set", chosen_instruction_set},
                    {"every shape", every_shape},
                    {"every head_dim", every_head_dim},
                    {"large groups", large_groups},
                    {"many queries", many_queries},
                    {"windows", windows},
                    {"soft caps", soft_caps},
                    {"long sequences", long_sequences},
                    {"huge logits", huge_logits},
                    {"rising maximum", rising_maximum},
                    {"no sequences and no tokens", no_sequences_and_no_tokens},
                    {"NaN in the query", nan_in_query},
                    {"a wild slot in use", wild_slot_in_use}},
                   argc, argv);
}
