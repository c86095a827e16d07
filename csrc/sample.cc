#include "sample.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace tandem {
namespace {

// SplitMix64 (Steele, Lea and Flood, 2014): a stream for every seed.
struct Random {
  uint64_t state;

  uint64_t next() {
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }

  // In [0, n), by a product, not a division (Lemire, 1805.10941): one is more frequent than another by n / 2^32 at
  // most.
  int64_t below(int64_t n) { return static_cast<int64_t>((next() >> 32) * static_cast<uint64_t>(n) >> 32); }
};

void shuffle_row(const Left& left, const PageTable& slots, int64_t row, uint64_t seed, int32_t* to) {
  const int64_t seq = row / left.num_kv_heads, head = row % left.num_kv_heads;
  const int64_t num_chosen = left.chosen_tokens[row] / kBlockTokens, first = left.kv_start[seq] / kBlockTokens;
  const int32_t* const chosen = left.chosen + row * left.capacity;
  int64_t num = 0;
  for (int64_t block = first, next = 0; block < left.num_blocks; ++block) {
    if (next < num_chosen && chosen[next] == block) {
      ++next;
      continue;
    }
    const int64_t slot = slots.slot(seq, head, block / left.page_blocks);
    to[num++] = static_cast<int32_t>(slot * left.num_kv_heads * left.page_blocks + block % left.page_blocks);
  }
  Random random{seed};
  random.state = random.next() + static_cast<uint64_t>(row);
  random.state = random.next();  // streams of neighbouring rows would be one, a number further
  for (int64_t i = num - 1; i > 0; --i) std::swap(to[i], to[random.below(i + 1)]);
  std::fill(to + num, to + left.num_blocks, 0);
}

// Residuals of one row about their mean, [dim][num_groups]: groups side by side, so that products of one group with
// all others are a vector's.
void put_residuals(const Groups& groups, int64_t seq, int64_t row, const float* whole_out, float whole_lse,
                   std::vector<float>& residuals) {
  for (int64_t j = 0; j < groups.num_groups; ++j) {
    const int64_t at = (seq * groups.num_groups + j) * groups.num_rows + row;
    // A group of nothing has no residual, nor has one of a row of padding, whose whole is nothing too.
    const float weight = groups.lse[at] == -INFINITY ? 0.0f : std::exp(groups.lse[at] - whole_lse);
    const float* const out = groups.out + at * groups.dim;
    for (int64_t d = 0; d < groups.dim; ++d) residuals[d * groups.num_groups + j] = weight * (out[d] - whole_out[d]);
  }
  for (int64_t d = 0; d < groups.dim; ++d) {
    float* const of_dim = residuals.data() + d * groups.num_groups;
    float sum = 0.0f;
    for (int64_t j = 0; j < groups.num_groups; ++j) sum += of_dim[j];
    for (int64_t j = 0; j < groups.num_groups; ++j) of_dim[j] -= sum / static_cast<float>(groups.num_groups);
  }
}

}  // namespace

void shuffle_left(WorkerPool& pool, const Left& left, const PageTable& slots, uint64_t seed, int32_t* to) {
  pool.run(left.num_seqs * left.num_kv_heads,
           [&](int64_t row) { shuffle_row(left, slots, row, seed, to + row * left.num_blocks); });
}

void scatter(WorkerPool& pool, const Groups& groups, const float* whole_out, const float* whole_lse, double* variance,
             double* products) {
  const int64_t num = groups.num_groups, dim = groups.dim;
  pool.run(groups.num_seqs * groups.num_rows, [&](int64_t item) {
    thread_local std::vector<float> residuals, dots;
    residuals.resize(num * dim);
    put_residuals(groups, item / groups.num_rows, item % groups.num_rows, whole_out + item * dim, whole_lse[item],
                  residuals);
    double own = 0.0, others = 0.0;
    for (int64_t i = 0; i < num; ++i) {
      dots.assign(num - i, 0.0f);
      float* __restrict const to = dots.data();
      for (int64_t d = 0; d < dim; ++d) {
        const float* const of_dim = residuals.data() + d * num + i;
        for (int64_t j = 0; j < num - i; ++j) to[j] += of_dim[0] * of_dim[j];
      }
      own += to[0];
      for (int64_t j = 1; j < num - i; ++j) others += 2.0 * to[j] * to[j];
    }
    variance[item] = own / static_cast<double>(std::max<int64_t>(1, num - 1));
    products[item] = others / static_cast<double>(std::max<int64_t>(1, num * (num - 1)));
  });
}

}  // namespace tandem
