#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace tandem {
namespace {

// Blocks behind the padding, and how many of them the first tokens fill.
struct Bounds {
  int64_t first, num_sinks;
};

Bounds bounds_of(const Choice& choice, int64_t seq) {
  const int64_t start = choice.kv_start[seq], first = start / kBlockTokens;
  const int64_t sinks_end = (start + choice.num_sink_tokens + kBlockTokens - 1) / kBlockTokens;
  return {first, choice.num_sink_tokens == 0 ? 0 : std::min(sinks_end, choice.num_blocks) - first};
}

void choose_of_head(const KernelTable& kernels, const Choice& choice, const PageTable& slots, int64_t page_blocks,
                    int64_t seq, int64_t head, const Chosen& chosen) {
  thread_local std::vector<int32_t> ranks;
  const Bounds bounds = bounds_of(choice, seq);
  const float* const scores = choice.scores + seq * choice.stride_seq + head * choice.stride_head;
  const int64_t num = std::max<int64_t>(0, choice.num_blocks - bounds.first);
  const int64_t num_sinks = std::clamp<int64_t>(bounds.num_sinks, 0, num);
  const int64_t at = seq * choice.num_kv_heads + head;
  const int64_t wanted = std::min({choice.num_wanted, num, chosen.capacity});
  int32_t *const blocks = chosen.blocks + at * chosen.capacity, *const entries = chosen.entries + at * chosen.capacity;
  const int64_t slot_blocks = choice.num_kv_heads * page_blocks;
  int64_t count = 0;
  const auto take = [&](int64_t i) {
    const int64_t block = bounds.first + i, slot = slots.slot(seq, head, block / page_blocks);
    blocks[count] = static_cast<int32_t>(block);
    entries[count++] = static_cast<int32_t>(slot * slot_blocks + block % page_blocks);
  };
  for (int64_t i = 0; i < std::min(num_sinks, wanted); ++i) take(i);
  if (count < wanted) {
    const int64_t num_ranked = num - num_sinks;
    ranks.resize(num_ranked + kBlockTokens);
    Cut cut = kernels.cut(scores + bounds.first + num_sinks, num_ranked, wanted - count, ranks.data());
    for (int64_t i = 0; i < num_ranked && count < wanted; ++i) {
      if (ranks[i] > cut.rank || (ranks[i] == cut.rank && cut.num_equal-- > 0)) take(num_sinks + i);
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
    std::vector<float> query(q.dim), row(num_words * 4);
    for (int64_t r = 0; r < num_rows; ++r) {
      load_row(q, r, query);
      if (columns) {
        coordinates(q, query.data(), r / q.rows_per_head % q.num_kv_heads, row);
      } else {
        for (int64_t d = 0; d < q.dim; ++d) {  // a negative number meets the lower bound, a positive one the upper
          row[d] = std::min(query[d], 0.0f);
          row[words * 4 + d] = std::max(query[d], 0.0f);
        }
      }
      put_row(r, row, lanes, line_words);
    }
  }

 private:
  static void load_row(const QueryRows& q, int64_t r, std::vector<float>& to) {
    if (q.dtype == DType::kFloat32) {
      std::memcpy(to.data(), static_cast<const float*>(q.data) + r * q.dim, q.dim * sizeof(float));
      return;
    }
    const uint16_t* const from = static_cast<const uint16_t*>(q.data) + r * q.dim;
    for (int64_t d = 0; d < q.dim; ++d) {
      const uint32_t bits = static_cast<uint32_t>(from[d]) << 16;
      std::memcpy(&to[d], &bits, sizeof bits);
    }
  }

  static void coordinates(const QueryRows& q, const float* from, int64_t head, std::vector<float>& row) {
    float* __restrict const to = row.data();
    std::fill(row.begin(), row.end(), 0.0f);
    const float* along = q.directions + head * q.dim * q.num_columns;
    for (int64_t d = 0; d < q.dim; ++d, along += q.num_columns) {
      for (int64_t c = 0; c < q.num_columns; ++c) to[c] += from[d] * along[c];
    }
  }

  void put_row(int64_t r, std::vector<float>& row, int64_t lanes, int64_t line_words) {
    float most = 0.0f;
    for (const float x : row) most = std::max(most, std::abs(x));
    const float step = std::max(most, 1.17549435e-38f) / 127.0f, magic = 12582912.0f;  // 1.5 * 2^23 rounds to integers
    for (float& x : row) x = x / step + magic - magic;  // a loop of its own: 8 times as fast as one with what follows
    int8_t* const to = weights.data() + r * num_lines * kLineBytes;
    int32_t sum = 0;
    for (size_t word = 0; word < row.size() / 4; ++word) {
      int8_t of_word[4];
      for (int64_t i = 0; i < 4; ++i) {
        const float rounded = row[word * 4 + i];
        of_word[i] = rounded == rounded ? static_cast<int8_t>(rounded) : 0;
        sum += of_word[i];
      }
      int8_t* const at = to + word / line_words * kLineBytes + word % line_words * lanes * 4;
      for (int64_t lane = 0; lane < lanes; ++lane) std::memcpy(at + lane * 4, of_word, 4);
    }
    offsets[r] = sum * 128;
    scales[r] = step;
  }
};

}  // namespace

Status make_bounds(WorkerPool& pool, const KernelTable& kernels, const Arenas& arenas,
                   const std::vector<int32_t>& slots, int64_t num_lines, uint8_t* codes, float* steps) {
  for (const int32_t slot : slots) {
    if (slot < 0 || slot >= arenas.num_slots()) return Status::kSlotOutOfRange;
  }
  const int64_t num_heads = arenas.shape().num_kv_heads, page_blocks = arenas.shape().page_size / kBlockTokens;
  const int64_t page_units = (page_blocks + kLaneBlocks - 1) / kLaneBlocks, unit_bytes = num_lines * kLineBytes;
  pool.run(static_cast<int64_t>(slots.size()) * num_heads, [&](int64_t item) {
    const int64_t slot = slots[item / num_heads], head = item % num_heads;
    const int64_t unit = (head * arenas.num_slots() + slot) * page_units;
    const int part = arenas.part_of(slot);
    const Part& arena = arenas.parts[part];
    const HeadSlice slice = arena.slice(slot - arenas.first[part], head);
    std::memset(codes + unit * unit_bytes, 128, page_units * unit_bytes);
    std::fill_n(steps + unit * kLaneBlocks, page_units * kLaneBlocks, 0.0f);
    for (int64_t block = 0; block < page_blocks; ++block) {
      const int64_t at = unit + block / kLaneBlocks, lane = block % kLaneBlocks;
      kernels.make_bounds(arena, slice, block * kBlockTokens, lane, codes + at * unit_bytes,
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

void choose_blocks(WorkerPool& pool, const KernelTable& kernels, const Choice& choice, const PageTable& slots,
                   int64_t page_blocks, const Chosen& chosen) {
  pool.run(choice.num_seqs * choice.num_kv_heads, [&](int64_t i) {
    choose_of_head(kernels, choice, slots, page_blocks, i / choice.num_kv_heads, i % choice.num_kv_heads, chosen);
  });
}

}  // namespace tandem
