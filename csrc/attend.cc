// Splits a call into work items, runs them on the pool and merges what they found.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace tandem {
namespace {

// A long sequence is cut into chunks of about this many bytes of K and V, at places that follow from the shape alone,
// never from the number of threads: the same call gives the same bits on any pool. 2 MiB take 50 to 150 us to read;
// with 1 MiB a call over 32K tokens was 5 % slower, with 8 MiB as fast.
constexpr int64_t kChunkBytes = 2 << 20;
constexpr int64_t kChunkStep = 64;

// Items that answer for the same rows, in the order of their chunks.
struct Span {
  int64_t first_item, num_items;
};

struct Schedule {
  std::vector<WorkItem> items;
  std::vector<Span> spans;

  void add(WorkItem item, int64_t begin, int64_t end, int64_t chunk_tokens) {
    const int64_t first_item = static_cast<int64_t>(items.size());
    int64_t at = begin;
    do {  // an empty range is one item too: it checks q and writes the identity
      item.token_begin = at;
      item.token_end = std::min((at / chunk_tokens + 1) * chunk_tokens, std::max(end, at));
      items.push_back(item);
      at = item.token_end;
    } while (at < end);
    spans.push_back({first_item, static_cast<int64_t>(items.size()) - first_item});
  }
};

Schedule cut(const AttendArgs& args) {
  Schedule schedule;
  const int64_t rows_per_head = args.group_size() * args.q_len, num_heads = args.arena.num_kv_heads;
  const int64_t head_rows = std::min(rows_per_head, kMaxHeadRows);
  const int64_t heads = std::min(num_heads, std::max<int64_t>(1, kMaxItemRows / head_rows));
  const int64_t token_bytes = 2 * heads * args.arena.stored_dim() * item_bytes(args.arena.dtype);
  const int64_t chunk_tokens = std::max<int64_t>(1, kChunkBytes / token_bytes / kChunkStep) * kChunkStep;
  for (int64_t seq = 0; seq < args.num_seqs; ++seq) {
    for (int64_t head = 0; head < num_heads; head += heads) {
      for (int64_t row = 0; row < rows_per_head; row += head_rows) {
        const WorkItem item{seq, head, std::min(head + heads, num_heads), row, std::min(row + head_rows, rows_per_head),
                            0,   0};
        schedule.add(item, args.kv_start[seq], args.kv_len[seq], chunk_tokens);
      }
    }
  }
  return schedule;
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
  const int64_t dim = args.arena.head_dim, rows_per_head = args.group_size() * args.q_len;
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
    for (int64_t row = 0; row < item.num_rows(); ++row) {
      for (int64_t i = 0; i < span.num_items; ++i) {
        const float* part = parts + (span.first_item + i) * item_size;
        outs[i] = part + row * dim;
        lses[i] = part[item_rows * dim + row];
      }
      const int64_t head = item.head_begin + row / item.head_rows();
      const int64_t to =
          (item.seq * args.arena.num_kv_heads + head) * rows_per_head + item.row_begin + row % item.head_rows();
      merge_row(outs.data(), lses.data(), span.num_items, dim, args.out + to * dim, args.lse + to);
    }
  };

  std::atomic<Status> status{Status::kOk};
  pool.run(num_items, [&](int64_t i) {
    float* part = parts + i * item_size;
    const Status item_status = kernels.attend_item(args, schedule.items[i], part, part + item_rows * dim);
    if (item_status != Status::kOk) status.store(item_status, std::memory_order_relaxed);
    // Whoever finishes a span's last item merges it: acquire-release orders the others' writes before the merge.
    if (remaining[span_of[i]].fetch_sub(1, std::memory_order_acq_rel) == 1) merge_span(schedule.spans[span_of[i]]);
  });
  constexpr size_t kKeptFloats = 4 << 20;  // 16 MiB: 128K tokens of a large layer; more goes back
  if (workspace.size() > kKeptFloats) std::vector<float>().swap(workspace);
  return status.load();
}

}  // namespace tandem
