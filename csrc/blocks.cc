#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace tandem {
namespace {

// A key for every score, in the same order: -inf is 0, and a NaN above all, so that it is seen and not skipped.
uint32_t rank_of(float score) {
  const float positive_zero = score + 0.0f;  // zeros of either sign are equal
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  const uint32_t flipped = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return score != score ? UINT32_MAX : score == -INFINITY ? 0 : flipped;
}

// The `num_wanted` largest of the ranks are those above `rank`, and the first `num_equal` of those that equal it.
struct Cut {
  uint32_t rank;
  int64_t num_equal;
};

// Moves what `keep` says to the front, in order, and forgets the rest. No branch: half of them would be mispredicted.
template <class Keep>
void keep_if(const Keep& keep, std::vector<uint32_t>& ranks) {
  size_t num = 0;
  for (const uint32_t rank : ranks) {
    ranks[num] = rank;
    num += keep(rank);
  }
  ranks.resize(num);
}

// Ranks are counted in bins, and those of the cut's bin again, until a bin is one rank. Bins follow the range at hand,
// because scores of one head often share their first 11 bits. A rank of 0 is not taken. `rest` is used up.
Cut cut_at(int64_t num_wanted, std::vector<uint32_t>& rest) {
  constexpr int kBinBits = 11;
  keep_if([](uint32_t rank) { return rank != 0; }, rest);
  if (rest.empty()) return {UINT32_MAX, 0};
  uint32_t low = UINT32_MAX, high = 0;
  for (const uint32_t rank : rest) {
    low = std::min(low, rank);
    high = std::max(high, rank);
  }
  for (int64_t left = num_wanted;;) {
    const int num_bits = 32 - __builtin_clz((high - low) | 1), shift = std::max(0, num_bits - kBinBits);
    uint32_t counts[2][1 << kBinBits] = {};  // two tables: an addition waits for the last one to its place
    for (size_t i = 0; i < rest.size(); ++i) ++counts[i % 2][(rest[i] - low) >> shift];
    uint32_t bin = (high - low) >> shift;
    const auto count = [&] { return int64_t{counts[0][bin]} + counts[1][bin]; };
    for (; bin > 0 && count() < left; --bin) left -= count();
    low += bin << shift;
    if (shift == 0) return {low, left};
    high = low + ((1u << shift) - 1);
    keep_if([&](uint32_t rank) { return rank - low <= high - low; }, rest);
    if (rest.empty()) return {low, left};
  }
}

// Blocks behind the padding, and how many of them the first tokens fill.
struct Bounds {
  int64_t first, num_sinks;
};

Bounds bounds_of(const Choice& choice, int64_t seq) {
  const int64_t start = choice.kv_start[seq], first = start / kBlockTokens;
  const int64_t sinks_end = (start + choice.num_sink_tokens + kBlockTokens - 1) / kBlockTokens;
  return {first, choice.num_sink_tokens == 0 ? 0 : std::min(sinks_end, choice.num_blocks) - first};
}

void choose_of_head(const Choice& choice, const PageTable& slots, int64_t page_blocks, int64_t seq, int64_t head,
                    const Chosen& chosen) {
  thread_local std::vector<uint32_t> ranks, rest;
  const Bounds bounds = bounds_of(choice, seq);
  const float* const scores = choice.scores + seq * choice.stride_seq + head * choice.stride_head;
  const int64_t num = std::max<int64_t>(0, choice.num_blocks - bounds.first);
  ranks.resize(num);
  for (int64_t i = 0; i < num; ++i) ranks[i] = rank_of(scores[bounds.first + i]);
  const int64_t num_sinks = std::min(num, bounds.num_sinks);
  std::fill_n(ranks.begin(), num_sinks, 0);
  const int64_t at = seq * choice.num_kv_heads + head;
  const int64_t wanted = std::min({choice.num_wanted[at], num, chosen.capacity});
  int32_t *const blocks = chosen.blocks + at * chosen.capacity, *const entries = chosen.entries + at * chosen.capacity;
  const int64_t slot_blocks = choice.num_kv_heads * page_blocks;
  int64_t count = 0;
  if (wanted > 0) {
    rest = ranks;
    Cut cut = cut_at(wanted - num_sinks, rest);
    for (int64_t i = 0; i < num && count < wanted; ++i) {
      const bool is_equal = ranks[i] == cut.rank;
      if (i >= num_sinks && (ranks[i] == 0 || ranks[i] < cut.rank || (is_equal && cut.num_equal-- <= 0))) continue;
      const int64_t block = bounds.first + i, slot = slots.slot(seq, head, block / page_blocks);
      blocks[count] = static_cast<int32_t>(block);
      entries[count++] = static_cast<int32_t>(slot * slot_blocks + block % page_blocks);
    }
  }
  std::fill(blocks + count, blocks + chosen.capacity, 0);  // positions that may be looked up
  const bool has_padding = count > 0 && blocks[0] == bounds.first;
  chosen.kv_start[at] = has_padding ? choice.kv_start[seq] % kBlockTokens : 0;
  chosen.kv_len[at] = count * kBlockTokens;
}

// What queries are as weights, and their memory.
struct OwnedQueries {
  std::vector<int8_t> weights;
  std::vector<int32_t> offsets;
  std::vector<float> scales;
  int64_t num_lines;

  explicit OwnedQueries(const QueryRows& q) {
    const bool columns = q.directions != nullptr;
    const int64_t num_rows = q.num_seqs * q.num_kv_heads * q.rows_per_head;
    const int64_t words = ((columns ? q.num_columns : q.dim) + 3) / 4, lanes = columns ? kBlockTokens : kLaneBlocks;
    const int64_t num_words = columns ? words : 2 * words, line_words = kLineBytes / 4 / lanes;
    num_lines = (num_words + line_words - 1) / line_words;
    offsets.resize(num_rows);
    scales.resize(num_rows);
    weights.assign(num_rows * num_lines * kLineBytes, 0);
    std::vector<float> row(num_words * 4);
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* const from = q.data + r * q.dim;
      if (columns) {
        coordinates(q, from, r / q.rows_per_head % q.num_kv_heads, row);
      } else {
        for (int64_t d = 0; d < q.dim; ++d) {  // a negative number meets the lower bound, a positive one the upper
          row[d] = std::min(from[d], 0.0f);
          row[words * 4 + d] = std::max(from[d], 0.0f);
        }
      }
      put_row(r, row, lanes, line_words);
    }
  }

 private:
  static void coordinates(const QueryRows& q, const float* from, int64_t head, std::vector<float>& row) {
    std::fill(row.begin(), row.end(), 0.0f);
    const float* along = q.directions + head * q.dim * q.num_columns;
    for (int64_t d = 0; d < q.dim; ++d, along += q.num_columns) {
      for (int64_t c = 0; c < q.num_columns; ++c) row[c] += from[d] * along[c];
    }
  }

  void put_row(int64_t r, const std::vector<float>& row, int64_t lanes, int64_t line_words) {
    float most = 0.0f;
    for (const float x : row) most = std::max(most, std::abs(x));
    const float step = std::max(most, 1.17549435e-38f) / 127.0f;
    int8_t* const to = weights.data() + r * num_lines * kLineBytes;
    int32_t sum = 0;
    for (size_t i = 0; i < row.size(); ++i) {
      const float rounded = std::nearbyint(row[i] / step);
      const int8_t weight = rounded == rounded ? static_cast<int8_t>(rounded) : 0;
      const int64_t word = static_cast<int64_t>(i) / 4;
      int8_t* const at = to + word / line_words * kLineBytes + word % line_words * lanes * 4 + i % 4;
      for (int64_t lane = 0; lane < lanes; ++lane) at[lane * 4] = weight;
      sum += weight;
    }
    offsets[r] = sum * 128;
    scales[r] = step;
  }
};

}  // namespace

Status make_bounds(WorkerPool& pool, const KernelTable& kernels, const Arena& arena, const std::vector<int32_t>& slots,
                   int64_t num_lines, uint8_t* codes, float* steps) {
  for (const int32_t slot : slots) {
    if (slot < 0 || slot >= arena.num_slots) return Status::kSlotOutOfRange;
  }
  const int64_t page_blocks = arena.page_size / kBlockTokens, unit_bytes = num_lines * kLineBytes;
  const int64_t page_units = (page_blocks + kLaneBlocks - 1) / kLaneBlocks;
  pool.run(static_cast<int64_t>(slots.size()) * arena.num_kv_heads, [&](int64_t item) {
    const int64_t slot = slots[item / arena.num_kv_heads], head = item % arena.num_kv_heads;
    const int64_t unit = (head * arena.num_slots + slot) * page_units;
    std::memset(codes + unit * unit_bytes, 128, page_units * unit_bytes);
    std::fill_n(steps + unit * kLaneBlocks, page_units * kLaneBlocks, 0.0f);
    for (int64_t block = 0; block < page_blocks; ++block) {
      const int64_t at = unit + block / kLaneBlocks, lane = block % kLaneBlocks;
      kernels.make_bounds(arena, arena.slice(slot, head, block * kBlockTokens).k, lane, codes + at * unit_bytes,
                          steps + at * kLaneBlocks + lane);
    }
  });
  return Status::kOk;
}

Status score_blocks(WorkerPool& pool, const KernelTable& kernels, const BlockCodes& codes, const QueryRows& rows,
                    const PageTable& slots, int64_t num_pages, float* scores) {
  const int64_t num_seqs = rows.num_seqs;
  // A quarter of a mebibyte and less of codes at a time; heads and ranges of pages are handed out to threads.
  constexpr int64_t kItemPages = 64;
  const OwnedQueries owned(rows);
  const CodeQueries q{owned.weights.data(), owned.offsets.data(), owned.scales.data(), rows.rows_per_head,
                      owned.num_lines};
  const int64_t unit_bytes = q.num_lines * kLineBytes, page_units = codes.page_units();
  const int64_t step_blocks = codes.kind == Codes::kBounds ? page_units * kLaneBlocks : 0;
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    for (int64_t page = 0; page < num_pages; ++page) {
      const int64_t slot = slots.slot(seq, 0, page);
      if (slot < 0 || slot >= codes.num_slots) return Status::kSlotOutOfRange;
    }
  }
  const auto score = codes.kind == Codes::kBounds ? kernels.score_bounds : kernels.score_columns;
  const int64_t num_shares = (num_pages + kItemPages - 1) / kItemPages;
  pool.run(num_seqs * codes.num_kv_heads * num_shares, [&](int64_t item) {
    const int64_t share = item % num_shares, row = item / num_shares;
    const int64_t head = row % codes.num_kv_heads, seq = row / codes.num_kv_heads;
    const int64_t end = std::min((share + 1) * kItemPages, num_pages);
    float* to = scores + (row * num_pages + share * kItemPages) * codes.page_blocks;
    for (int64_t page = share * kItemPages; page < end;) {
      const int64_t slot = slots.slot(seq, head, page);
      int64_t num = 1;  // pages that lie one behind the other
      while (codes.page_blocks % kLaneBlocks == 0 && page + num < end &&
             slots.slot(seq, head, page + num) == slot + num) {
        ++num;
      }
      const int64_t at = head * codes.num_slots + slot;
      score(q, codes.codes + at * page_units * unit_bytes, codes.steps + at * step_blocks, row * q.rows_per_head,
            num * codes.page_blocks, to);
      page += num;
      to += num * codes.page_blocks;
    }
  });
  return Status::kOk;
}

void choose_blocks(WorkerPool& pool, const Choice& choice, const PageTable& slots, int64_t page_blocks,
                   const Chosen& chosen) {
  pool.run(choice.num_seqs * choice.num_kv_heads, [&](int64_t i) {
    choose_of_head(choice, slots, page_blocks, i / choice.num_kv_heads, i % choice.num_kv_heads, chosen);
  });
}

}  // namespace tandem
