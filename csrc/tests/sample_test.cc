// Draws from what is left out, and how groups of a sample scatter, against plain loops.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "paged.h"

namespace tandem {
namespace {

// Every block that is left, once, and no other; the same on any threads, and alone as in a batch.
void shuffles() {
  std::mt19937 random(7);
  constexpr int64_t kSeqs = 2, kHeads = 3;
  for (int round = 0; round < 500; ++round) {
    const int64_t page_blocks = std::vector<int64_t>{1, 3, 4}[random() % 3], num_pages = random() % 30;
    const int64_t num_blocks = num_pages * page_blocks, capacity = 1 + random() % 40;
    const std::vector<int32_t> slots = shuffled_slots(kSeqs * num_pages, random);
    std::vector<int64_t> starts, tokens;
    std::vector<int32_t> chosen(kSeqs * kHeads * capacity, -7);
    for (int64_t i = 0; i < kSeqs; ++i) starts.push_back(random() % (num_blocks * kBlockTokens + 1));
    for (int64_t row = 0; row < kSeqs * kHeads; ++row) {
      int64_t count = 0;
      for (int64_t block = starts[row / kHeads] / kBlockTokens; block < num_blocks && count < capacity; ++block) {
        if (random() % 3 == 0) chosen[row * capacity + count++] = static_cast<int32_t>(block);
      }
      tokens.push_back(count * kBlockTokens);
    }
    const Left left{kSeqs, kHeads, num_blocks, page_blocks, starts.data(), chosen.data(), capacity, tokens.data()};
    const PageTable table{slots.data(), num_pages, 0};
    std::vector<int32_t> order(kSeqs * kHeads * num_blocks, -7), again(order), alone(order);
    WorkerPool one(1), three(3);
    shuffle_left(one, left, table, static_cast<uint64_t>(round), order.data());
    shuffle_left(three, left, table, static_cast<uint64_t>(round), again.data());
    CHECK(order == again, round);
    Left first = left;
    first.num_seqs = 1;
    shuffle_left(one, first, table, static_cast<uint64_t>(round), alone.data());
    CHECK(std::equal(alone.begin(), alone.begin() + kHeads * num_blocks, order.begin()), round);
    for (int64_t row = 0; row < kSeqs * kHeads; ++row) {
      current_case() = "round " + std::to_string(round) + " row " + std::to_string(row);
      std::vector<int32_t> want;
      const auto taken = chosen.begin() + row * capacity;
      for (int64_t block = starts[row / kHeads] / kBlockTokens; block < num_blocks; ++block) {
        if (std::find(taken, taken + tokens[row] / kBlockTokens, block) != taken + tokens[row] / kBlockTokens) continue;
        const int64_t slot = slots[row / kHeads * num_pages + block / page_blocks];
        want.push_back(static_cast<int32_t>(slot * kHeads * page_blocks + block % page_blocks));
      }
      std::vector<int32_t> got(order.begin() + row * num_blocks, order.begin() + (row + 1) * num_blocks);
      CHECK(std::all_of(got.begin() + want.size(), got.end(), [](int32_t entry) { return entry == 0; }), want.size());
      got.resize(want.size());
      std::sort(got.begin(), got.end());
      std::sort(want.begin(), want.end());
      CHECK(got == want, want.size());
    }
  }
}

struct RandomGroups {
  std::vector<float> out, lse, whole_out, whole_lse;
  Groups groups;

  RandomGroups(int64_t num_seqs, int64_t num_groups, int64_t num_rows, int64_t dim) {
    std::mt19937 random(static_cast<uint32_t>(num_groups * 100 + dim));
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& to, int64_t num) {
      to.resize(num);
      for (float& x : to) x = normal(random);
    };
    fill(out, num_seqs * num_groups * num_rows * dim);
    fill(lse, num_seqs * num_groups * num_rows);
    fill(whole_out, num_seqs * num_rows * dim);
    fill(whole_lse, num_seqs * num_rows);
    groups = {out.data(), lse.data(), num_seqs, num_groups, num_rows, dim};
  }
  int64_t at(int64_t row, int64_t group) const {
    return (row / groups.num_rows * groups.num_groups + group) * groups.num_rows + row % groups.num_rows;
  }
};

// Sums of up to 64 rounded terms, relative to a sum of as many squares.
constexpr double kRounding = 1e-4;

void scatters() {
  WorkerPool pool(2);
  for (const int64_t num : {1, 2, 16, 64}) {
    for (const int64_t dim : {1, 7, 128}) {
      const RandomGroups p(2, num, 3, dim);
      std::vector<double> variance(6, -7), products(6, -7);
      scatter(pool, p.groups, p.whole_out.data(), p.whole_lse.data(), variance.data(), products.data());
      for (int64_t row = 0; row < 6; ++row) {
        current_case() = std::to_string(num) + " groups of " + std::to_string(dim);
        std::vector<std::vector<double>> r(num, std::vector<double>(dim));
        for (int64_t d = 0; d < dim; ++d) {
          double mean = 0.0;
          for (int64_t j = 0; j < num; ++j) {
            const double weight = std::exp(double{p.lse[p.at(row, j)]} - p.whole_lse[row]);
            r[j][d] = weight * (double{p.out[p.at(row, j) * dim + d]} - p.whole_out[row * dim + d]);
            mean += r[j][d] / static_cast<double>(num);
          }
          for (int64_t j = 0; j < num; ++j) r[j][d] -= mean;
        }
        double own = 0.0, others = 0.0;
        for (int64_t i = 0; i < num; ++i) {
          for (int64_t j = 0; j < num; ++j) {
            double dot = 0.0;
            for (int64_t d = 0; d < dim; ++d) dot += r[i][d] * r[j][d];
            own += i == j ? dot : 0.0;
            others += i != j ? dot * dot : 0.0;
          }
        }
        const double want = own / static_cast<double>(std::max<int64_t>(1, num - 1));
        const double mean = others / static_cast<double>(std::max<int64_t>(1, num * (num - 1)));
        CHECK(std::abs(variance[row] - want) <= kRounding * want + 1e-12, variance[row], want);
        CHECK(std::abs(products[row] - mean) <= kRounding * want * want + 1e-12, products[row], mean);
      }
    }
  }
}

// Rows of padding attend to nothing: their residuals are 0, not NaN.
void scatter_of_nothing() {
  WorkerPool pool(1);
  RandomGroups p(1, 4, 2, 8);
  for (int64_t group = 0; group < 4; ++group) p.lse[p.at(1, group)] = -INFINITY;
  p.whole_lse[1] = -INFINITY;
  std::vector<double> variance(2, -7), products(2, -7);
  scatter(pool, p.groups, p.whole_out.data(), p.whole_lse.data(), variance.data(), products.data());
  CHECK(variance[0] > 0 && products[0] > 0, variance[0], products[0]);
  CHECK(variance[1] == 0 && products[1] == 0, variance[1], products[1]);
}

// Collapsed groups are merged parts; a group of nothing changes nothing, and of nothing alone nothing is found.
void collapses() {
  WorkerPool pool(2);
  constexpr int64_t kSeqs = 2, kGroups = 5, kRows = 3, kDim = 8;
  RandomGroups p(kSeqs, kGroups, kRows, kDim);
  for (int64_t seq = 0; seq < kSeqs; ++seq) p.lse[p.at(seq * kRows, 1)] = -INFINITY;
  for (int64_t group = 0; group < kGroups; ++group) p.lse[p.at(1, group)] = -INFINITY;
  std::vector<float> out(kSeqs * kRows * kDim, -7), lse(kSeqs * kRows, -7), want_out(kRows * kDim), want_lse(kRows);
  collapse(pool, p.groups, out.data(), lse.data());
  for (int64_t seq = 0; seq < kSeqs; ++seq) {
    Partials parts{{}, {}, kRows, kDim, kRows, 1};
    for (int64_t group = 0; group < kGroups; ++group) {
      parts.out.push_back(p.out.data() + p.at(seq * kRows, group) * kDim);
      parts.lse.push_back(p.lse.data() + p.at(seq * kRows, group));
    }
    merge(pool, parts, nullptr, want_out.data(), want_lse.data());
    CHECK(std::equal(want_out.begin(), want_out.end(), out.begin() + seq * kRows * kDim), seq);
    CHECK(std::equal(want_lse.begin(), want_lse.end(), lse.begin() + seq * kRows), seq);
  }
  CHECK(lse[1] == -INFINITY && out[kDim] == 0.0f, lse[1], out[kDim]);
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  using namespace tandem;
  return run_tests({{"shuffles", shuffles},
                    {"scatters", scatters},
                    {"scatter of nothing", scatter_of_nothing},
                    {"collapses", collapses}},
                   argc, argv);
}
