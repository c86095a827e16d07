// Splits a call into work items, runs them on the pool and merges what they found.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace tandem {
namespace {

// A long sequence is cut here, at fixed places counted from the start of its table, never by the number of threads:
// the same call gives the same bits on any pool. 1024 tokens of head_dim 128 in bf16 are 512 KiB, 10 to 40 us.
constexpr int64_t kChunkTokens = 1024;

// Items that answer for the same rows, in the order of their chunks.
struct RowBlock {
  int64_t first_item, num_items;
  int64_t first_row, num_rows;  // rows of the whole output
};

struct Schedule {
  std::vector<WorkItem> items;
  std::vector<RowBlock> blocks;
};

Schedule cut(const AttendArgs& args) {
  Schedule schedule;
  const int64_t rows_per_head = args.group_size() * args.q_len;
  for (int64_t seq = 0; seq < args.num_seqs; ++seq) {
    const int64_t begin = args.kv_start[seq], end = args.kv_len[seq];
    for (int64_t head = 0; head < args.arena.num_kv_heads; ++head) {
      for (int64_t row = 0; row < rows_per_head; row += kMaxRows) {
        const int64_t row_end = std::min(row + kMaxRows, rows_per_head);
        const int64_t first_item = static_cast<int64_t>(schedule.items.size());
        int64_t at = begin;
        do {  // an empty range is one item too: it checks q and writes the identity
          const int64_t chunk_end = std::min((at / kChunkTokens + 1) * kChunkTokens, std::max(end, at));
          schedule.items.push_back({seq, head, row, row_end, at, chunk_end});
          at = chunk_end;
        } while (at < end);
        const int64_t first_row = (seq * args.arena.num_kv_heads + head) * rows_per_head + row;
        schedule.blocks.push_back(
            {first_item, static_cast<int64_t>(schedule.items.size()) - first_item, first_row, row_end - row});
      }
    }
  }
  return schedule;
}

// Merges `num_parts` of one row in index order; `part(i)` gives its out and lse.
void merge_row(const float* const* outs, const float* lses, int64_t num_parts, int64_t dim, float* out, float* lse) {
  float top = -INFINITY;
  for (int64_t i = 0; i < num_parts; ++i) top = std::max(top, lses[i]);
  std::fill(out, out + dim, 0.0f);
  *lse = top;
  if (top == -INFINITY) return;
  float total = 0.0f;
  for (int64_t i = 0; i < num_parts; ++i) {
    const float weight = std::exp(lses[i] - top);
    total += weight;
    if (weight == 0.0f) continue;
    for (int64_t d = 0; d < dim; ++d) out[d] += weight * outs[i][d];
  }
  for (int64_t d = 0; d < dim; ++d) out[d] /= total;
  *lse = top + std::log(total);
}

}  // namespace

void merge(WorkerPool& pool, const Partials& parts, float* out, float* lse) {
  constexpr int64_t kRowsPerItem = 64;
  pool.run((parts.num_rows + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item) {
    const int64_t num_parts = static_cast<int64_t>(parts.out.size());
    std::vector<const float*> outs(num_parts);
    std::vector<float> lses(num_parts);
    const int64_t end = std::min((item + 1) * kRowsPerItem, parts.num_rows);
    for (int64_t row = item * kRowsPerItem; row < end; ++row) {
      for (int64_t i = 0; i < num_parts; ++i) {
        outs[i] = parts.out[i] + row * parts.dim;
        lses[i] = parts.lse[i][row];
      }
      merge_row(outs.data(), lses.data(), num_parts, parts.dim, out + row * parts.dim, lse + row);
    }
  });
}

Status attend(WorkerPool& pool, const KernelTable& kernels, const AttendArgs& args) {
  const Schedule schedule = cut(args);
  const int64_t dim = args.arena.head_dim;
  const int64_t num_items = static_cast<int64_t>(schedule.items.size());
  std::vector<int64_t> block_of(num_items);
  std::vector<std::atomic<int64_t>> remaining(schedule.blocks.size());
  for (size_t b = 0; b < schedule.blocks.size(); ++b) {
    const RowBlock& block = schedule.blocks[b];
    remaining[b].store(block.num_items, std::memory_order_relaxed);
    std::fill_n(block_of.begin() + block.first_item, block.num_items, static_cast<int64_t>(b));
  }
  const int64_t item_rows = std::min(kMaxRows, args.group_size() * args.q_len), item_size = item_rows * (dim + 1);
  // Kept between calls: fresh pages from the system would cost 1 % of a call at 128K tokens.
  thread_local std::vector<float> parts;
  if (static_cast<int64_t>(parts.size()) < num_items * item_size) parts.resize(num_items * item_size);
  float* const part_of_item = parts.data();  // item i: out [item_rows][dim], then lse [item_rows]
  std::atomic<Status> status{Status::kOk};

  pool.run(num_items, [&](int64_t i) {
    const int64_t b = block_of[i];
    const RowBlock& block = schedule.blocks[b];
    float* out = args.out + block.first_row * dim;
    float* lse = args.lse + block.first_row;
    const bool alone = block.num_items == 1;
    float* item_out = alone ? out : part_of_item + i * item_size;
    float* item_lse = alone ? lse : item_out + item_rows * dim;
    const Status item_status = kernels.attend_item(args, schedule.items[i], item_out, item_lse);
    if (item_status != Status::kOk) status.store(item_status, std::memory_order_relaxed);
    // Whoever finishes a block's last item merges them all: acquire-release orders the others' writes before it.
    if (remaining[b].fetch_sub(1, std::memory_order_acq_rel) != 1 || alone) return;
    std::vector<const float*> outs(block.num_items);
    std::vector<float> lses(block.num_items);
    for (int64_t row = 0; row < block.num_rows; ++row) {
      for (int64_t p = 0; p < block.num_items; ++p) {
        const float* part = part_of_item + (block.first_item + p) * item_size;
        outs[p] = part + row * dim;
        lses[p] = part[item_rows * dim + row];
      }
      merge_row(outs.data(), lses.data(), block.num_items, dim, out + row * dim, lse + row);
    }
  });
  return status.load();
}

}  // namespace tandem
