// Splits a call into work items, runs them on the pool and merges what they found.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace tandem {
namespace {

// A sequence is cut into chunks at places that follow from the shape alone, never from the number of threads: the same
// call gives the same bits on any pool. Chunks of a long one are 2 MiB of K and V, which take 50 to 150 us to read
// (with 1 MiB a call over 32K tokens was 5 % slower, with 8 MiB as fast); a short one is cut into kMinChunks, so that
// every thread has work, but not below 256 KiB.
constexpr int64_t kMaxChunkBytes = 2 << 20, kMinChunkBytes = 256 << 10, kMinChunks = 4;
constexpr int64_t kChunkStep = 64;

// Items that answer for the same rows, in the order of their chunks.
struct Span {
  int64_t first_item, num_items;
};

struct Schedule {
  std::vector<WorkItem> items;
  std::vector<Span> spans;

  // The item's rows over tokens [begin, end) of its run.
  void add(WorkItem item, int64_t begin, int64_t end, int64_t chunk_tokens) {
    int64_t at = begin;
    do {  // an empty range is one item too: it checks q and writes the identity
      item.token_begin = at;
      item.token_end = std::min((at / chunk_tokens + 1) * chunk_tokens, std::max(end, at));
      items.push_back(item);
      at = item.token_end;
    } while (at < end);
  }
};

int64_t chunk_tokens_of(const Run& kv, int64_t seq, int64_t num_heads) {
  const int64_t token_bytes = 2 * num_heads * kv.arena.stored_dim() * item_bytes(kv.arena.dtype);
  const int64_t bytes = std::max<int64_t>(0, kv.kv_len[seq] - kv.kv_start[seq]) * token_bytes;
  const int64_t chunk_bytes = std::clamp(bytes / kMinChunks, kMinChunkBytes, kMaxChunkBytes);
  return std::max<int64_t>(1, chunk_bytes / token_bytes / kChunkStep) * kChunkStep;
}

Schedule cut(const std::vector<AttendArgs>& runs) {
  Schedule schedule;
  const AttendArgs& first = runs.front();
  const int64_t rows_per_head = first.group_size() * first.q.q_len, num_heads = first.kv.arena.num_kv_heads;
  const int64_t head_rows = std::min(rows_per_head, kMaxHeadRows);
  const int64_t heads = std::min(num_heads, std::max<int64_t>(1, kMaxItemRows / head_rows));
  for (int64_t seq = 0; seq < first.q.num_seqs; ++seq) {
    for (int64_t head = 0; head < num_heads; head += heads) {
      for (int64_t row = 0; row < rows_per_head; row += head_rows) {
        const int64_t first_item = static_cast<int64_t>(schedule.items.size());
        for (size_t run = 0; run < runs.size(); ++run) {
          const Run& kv = runs[run].kv;
          const WorkItem item{static_cast<int64_t>(run),
                              seq,
                              head,
                              std::min(head + heads, num_heads),
                              row,
                              std::min(row + head_rows, rows_per_head),
                              0,
                              0};
          schedule.add(item, kv.kv_start[seq], kv.kv_len[seq], chunk_tokens_of(kv, seq, heads));
        }
        schedule.spans.push_back({first_item, static_cast<int64_t>(schedule.items.size()) - first_item});
      }
    }
  }
  return schedule;
}

// Whether [kv_start, kv_len) of every sequence lies inside its table.
bool inside_table(const Run& kv) {
  for (int64_t seq = 0; seq < kv.num_seqs; ++seq) {
    const int64_t start = kv.kv_start[seq], len = kv.kv_len[seq];
    if (start < 0 || len < 0 || len > kv.num_pages * kv.arena.page_size) return false;
  }
  return true;
}

// Merges `num_parts` of one row in index order; `part(i)` gives its out and lse.
void merge_row(const float* const* outs, const float* lses, int64_t num_parts, int64_t dim, float* out, float* lse) {
  float top = -INFINITY;
  for (int64_t i = 0; i < num_parts; ++i) top = std::isnan(top) || lses[i] <= top ? top : lses[i];  // a NaN stays
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

// Nearest, ties to even; a NaN stays one.
uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// One row of out to element `at`.
void store_row(const float* row, int64_t dim, const Output& to, int64_t at) {
  if (to.dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(to.out) + at, row, dim * sizeof(float));
  } else {
    uint16_t* const out = static_cast<uint16_t*>(to.out) + at;
    for (int64_t d = 0; d < dim; ++d) out[d] = to_bf16(row[d]);
  }
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

bool ends_with_queries(const AttendArgs& run) {
  const Run& kv = run.kv;
  for (int64_t seq = 0; seq < kv.num_seqs; ++seq) {
    if (kv.kv_len[seq] != kv.kv_len[0] || kv.kv_len[seq] < run.q.q_len) return false;
  }
  return inside_table(kv);
}

Status attend(WorkerPool& pool, const KernelTable& kernels, const std::vector<AttendArgs>& runs, const Output& to) {
  for (const AttendArgs& run : runs) {
    if (!inside_table(run.kv)) return Status::kOutsideTable;
  }
  const Schedule schedule = cut(runs);
  const Queries& q = runs[0].q;
  const int64_t dim = runs[0].kv.arena.head_dim;
  const int64_t num_items = static_cast<int64_t>(schedule.items.size());
  const int64_t item_rows = schedule.items.empty() ? 0 : schedule.items[0].num_rows();  // the first is the largest
  const int64_t item_size = item_rows * (dim + 1);  // item i: out [item_rows][dim], then lse [item_rows]
  // Kept between calls: it would be mapped and faulted in anew each time.
  thread_local std::vector<float> workspace;
  if (static_cast<int64_t>(workspace.size()) < num_items * item_size) workspace.resize(num_items * item_size);
  float* const parts = workspace.data();

  std::vector<int64_t> span_of(num_items);
  std::vector<std::atomic<int64_t>> remaining(schedule.spans.size());
  for (size_t i = 0; i < schedule.spans.size(); ++i) {
    const Span& span = schedule.spans[i];
    remaining[i].store(span.num_items, std::memory_order_relaxed);
    std::fill_n(span_of.begin() + span.first_item, span.num_items, static_cast<int64_t>(i));
  }
  const auto merge_span = [&](const Span& span) {
    const WorkItem& item = schedule.items[span.first_item];
    std::vector<const float*> outs(span.num_items);
    std::vector<float> lses(span.num_items);
    float out[kMaxHeadDim], lse;
    for (int64_t row = 0; row < item.num_rows(); ++row) {
      for (int64_t i = 0; i < span.num_items; ++i) {
        const float* part = parts + (span.first_item + i) * item_size;
        outs[i] = part + row * dim;
        lses[i] = part[item_rows * dim + row];
      }
      merge_row(outs.data(), lses.data(), span.num_items, dim, out, &lse);
      const int64_t in_head = item.row_begin + row % item.head_rows();  // attend.h, WorkItem
      const int64_t head = (item.head_begin + row / item.head_rows()) * runs[0].group_size() + in_head / q.q_len;
      const int64_t token = in_head % q.q_len;
      store_row(out, dim, to, item.seq * to.stride_seq + head * to.stride_head + token * to.stride_token);
      if (to.lse != nullptr) to.lse[(item.seq * q.num_heads + head) * q.q_len + token] = lse;
    }
  };

  std::atomic<Status> status{Status::kOk};
  pool.run(num_items, [&](int64_t i) {
    float* part = parts + i * item_size;
    const WorkItem& item = schedule.items[i];
    const Status item_status = kernels.attend_item(runs[item.run], item, part, part + item_rows * dim);
    if (item_status != Status::kOk) status.store(item_status, std::memory_order_relaxed);
    // Whoever finishes a span's last item merges it: acquire-release orders the others' writes before the merge.
    if (remaining[span_of[i]].fetch_sub(1, std::memory_order_acq_rel) == 1) merge_span(schedule.spans[span_of[i]]);
  });
  constexpr size_t kKeptFloats = 4 << 20;  // 16 MiB: 128K tokens of a large layer; more goes back
  if (workspace.size() > kKeptFloats) std::vector<float>().swap(workspace);
  return status.load();
}

}  // namespace tandem
