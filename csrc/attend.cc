// Splits a call into work items, runs them on the pool and merges what they found.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "round.h"

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
  int64_t item_heads = 0;  // KV heads of an item

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

// Tokens that any query of the call sees: what lies before them is not read.
struct Tokens {
  int64_t begin, end;
};

Tokens visible_tokens(const AttendArgs& run, int64_t seq, int64_t head) {
  return {std::max(run.kv.start(seq, head), run.visible_begin(seq, 0)), run.kv.len(seq, head)};
}

int64_t chunk_tokens_of(const Arenas& arenas, Tokens tokens, int64_t num_heads) {
  int64_t token_bytes = 0;  // of the widest
  for (int part = 0; part < arenas.num; ++part) {
    token_bytes = std::max(token_bytes, num_heads * arenas.parts[part].token_bytes());
  }
  const int64_t bytes = std::max<int64_t>(0, tokens.end - tokens.begin) * token_bytes;
  const int64_t chunk_bytes = std::clamp(bytes / kMinChunks, kMinChunkBytes, kMaxChunkBytes);
  return std::max<int64_t>(1, chunk_bytes / token_bytes / kChunkStep) * kChunkStep;
}

// All items of some rows, over every run.
void cut_rows(const std::vector<AttendArgs>& runs, const WorkItem& rows, Schedule& schedule) {
  const int64_t first_item = static_cast<int64_t>(schedule.items.size());
  for (size_t run = 0; run < runs.size(); ++run) {
    WorkItem item = rows;
    item.run = static_cast<int64_t>(run);
    const Tokens tokens = visible_tokens(runs[run], item.seq, item.head_begin);
    // Not of this item's heads: the last one may have fewer, and every head is cut at the same places.
    const int64_t chunk_tokens = chunk_tokens_of(runs[run].kv.arenas, tokens, schedule.item_heads);
    schedule.add(item, tokens.begin, tokens.end, chunk_tokens);
  }
  schedule.spans.push_back({first_item, static_cast<int64_t>(schedule.items.size()) - first_item});
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Schedule cut(const std::vector<AttendArgs>& runs) {
  const AttendArgs& first = runs.front();
  const int64_t rows_per_head = first.group_size() * first.q.q_len, num_heads = first.kv.arena().num_kv_heads;
  const int64_t head_rows = std::min(rows_per_head, kMaxHeadRows);
  Schedule schedule;
  // As many heads as fit, in items of equal size: 7 of 8 heads and then 1 took 4 % longer than 4 and 4. Where heads
  // have runs of their own, each alone: a long one is cut, and none waits for it.
  const bool alone = std::any_of(runs.begin(), runs.end(), [](const AttendArgs& run) { return run.kv.of_blocks; });
  const int64_t num_shares = alone ? num_heads : ceil_div(num_heads, kMaxItemRows / head_rows);
  schedule.item_heads = ceil_div(num_heads, num_shares);
  for (int64_t seq = 0; seq < first.q.num_seqs; ++seq) {
    for (int64_t head = 0; head < num_heads; head += schedule.item_heads) {
      for (int64_t row = 0; row < rows_per_head; row += head_rows) {
        const int64_t head_end = std::min(head + schedule.item_heads, num_heads);
        const int64_t row_end = std::min(row + head_rows, rows_per_head);
        cut_rows(runs, {0, seq, head, head_end, row, row_end, 0, 0}, schedule);
      }
    }
  }
  return schedule;
}

// Whether [kv_start, kv_len) of every sequence lies inside its table.
bool inside_table(const Run& kv) {
  for (int64_t i = 0; i < kv.num_lengths(); ++i) {
    const int64_t start = kv.kv_start[i], len = kv.kv_len[i];
    if (start < 0 || len < 0 || len > kv.num_pages * kv.entry_tokens()) return false;
  }
  return true;
}

struct PartOfRow {
  const float* out;
  float lse;
};

// Merges `num_parts` of one row in index order: part(i) gives each. The sink's logit is a part without a value, as is
// -inf for none.
template <class PartOf>
void merge_row(const PartOf& part, int64_t num_parts, int64_t dim, float sink_logit, float* out, float* lse) {
  float top = sink_logit;
  for (int64_t i = 0; i < num_parts; ++i) {
    const float part_lse = part(i).lse;
    top = std::isnan(top) || part_lse <= top ? top : part_lse;  // a NaN stays
  }
  std::fill(out, out + dim, 0.0f);
  *lse = top;
  if (top == -INFINITY) return;
  float total = std::exp(sink_logit - top);
  for (int64_t i = 0; i < num_parts; ++i) {
    const PartOfRow found = part(i);
    const float weight = std::exp(found.lse - top);
    total += weight;
    if (weight == 0.0f) continue;
    for (int64_t d = 0; d < dim; ++d) out[d] += weight * found.out[d];
  }
  for (int64_t d = 0; d < dim; ++d) out[d] /= total;
  *lse = top + std::log(total);
}

float sink_of(const float* sink_logit, int64_t head) { return sink_logit == nullptr ? -INFINITY : sink_logit[head]; }

// One row of out to element `at`.
void store_row(const float* row, int64_t dim, const Output& to, int64_t at) {
  if (to.dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(to.out) + at, row, dim * sizeof(float));
    return;
  }
  uint16_t* const out = static_cast<uint16_t*>(to.out) + at;
  if (to.dtype == DType::kBFloat16) {
    for (int64_t d = 0; d < dim; ++d) out[d] = to_bf16(row[d]);
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d] = to_float16(row[d]);
  }
}

// What is done with an item: attend_item, or the half of it that weighs.
using Compute = decltype(KernelTable::attend_item);

// A call in flight: its items, where their results wait, and which spans still lack some.
class Call {
 public:
  Call(Compute compute, const std::vector<AttendArgs>& runs, const Output& to)
      : compute_(compute),
        runs_(runs),
        to_(to),
        schedule_(cut(runs)),
        dim_(runs[0].kv.arena().v_head_dim),
        item_rows_(schedule_.items.empty() ? 0 : schedule_.items[0].num_rows()),  // the first is the largest
        item_blocks_(to.mass == nullptr ? 0 : max_blocks(schedule_.items)),
        span_of_(schedule_.items.size()),
        remaining_(schedule_.spans.size()) {
    for (size_t i = 0; i < schedule_.spans.size(); ++i) {
      const Span& span = schedule_.spans[i];
      remaining_[i].store(span.num_items, std::memory_order_relaxed);
      std::fill_n(span_of_.begin() + span.first_item, span.num_items, i);
    }
  }

  int64_t num_items() const { return static_cast<int64_t>(schedule_.items.size()); }
  int64_t workspace_size() const { return num_items() * item_size(); }
  Status status() const { return status_.load(); }

  // `workspace` holds for item i: out [item_rows][dim], then lse [item_rows], then mass [2][item_rows][item_blocks].
  void run_item(int64_t i, float* workspace) {
    const WorkItem& item = schedule_.items[i];
    float* const part = workspace + i * item_size();
    const Status status = compute_(runs_[item.run], item, part, part + item_rows_ * dim_, mass_of(part));
    if (status != Status::kOk) status_.store(status, std::memory_order_relaxed);
    // Whoever finishes a span's last item merges it: acquire-release orders the others' writes before the merge.
    const size_t span = span_of_[i];
    if (remaining_[span].fetch_sub(1, std::memory_order_acq_rel) == 1) merge_span(schedule_.spans[span], workspace);
  }

 private:
  int64_t item_size() const { return item_rows_ * (dim_ + 1 + 2 * item_blocks_); }

  static int64_t first_block(const WorkItem& item) { return item.token_begin / kBlockTokens; }
  static int64_t num_blocks(const WorkItem& item) {
    const bool is_empty = item.token_begin >= item.token_end;
    return is_empty ? 0 : ceil_div(item.token_end, kBlockTokens) - first_block(item);
  }
  static int64_t max_blocks(const std::vector<WorkItem>& items) {
    int64_t most = 0;
    for (const WorkItem& item : items) most = std::max(most, num_blocks(item));
    return most;
  }

  BlockMass mass_of(float* part) const {
    if (to_.mass == nullptr) return {nullptr, nullptr, 0};
    float* const sum = part + item_rows_ * (dim_ + 1);
    return {sum, sum + item_rows_ * item_blocks_, item_blocks_};
  }

  // What the blocks of one item weigh in one of its rows, as shares of the whole row. to: [blocks of all runs].
  void store_mass(const WorkItem& item, float* part, int64_t row, float lse, float* to) const {
    for (int64_t run = 0; run < item.run; ++run) to += runs_[run].kv.num_blocks();
    to += first_block(item);
    const BlockMass mass = mass_of(part);
    const float *const sum = mass.sum + row * mass.stride, *const base = mass.base + row * mass.stride;
    for (int64_t block = 0; block < num_blocks(item); ++block) {
      to[block] = sum[block] == 0.0f ? 0.0f : sum[block] * std::exp(base[block] - lse);
    }
  }

  void merge_span(const Span& span, float* workspace) const {
    const WorkItem& item = schedule_.items[span.first_item];
    const Queries& q = runs_[0].q;
    float* const parts = workspace + span.first_item * item_size();
    float out[kMaxHeadDim], lse;
    for (int64_t row = 0; row < item.num_rows(); ++row) {
      const int64_t in_head = item.row_begin + row % item.head_rows();  // attend.h, WorkItem
      const int64_t head = (item.head_begin + row / item.head_rows()) * runs_[0].group_size() + in_head / q.q_len;
      const int64_t token = in_head % q.q_len;
      const auto part = [&](int64_t i) {
        const float* const found = parts + i * item_size();
        return PartOfRow{found + row * dim_, found[item_rows_ * dim_ + row]};
      };
      merge_row(part, span.num_items, dim_, sink_of(to_.sink_logit, head), out, &lse);
      store_row(out, dim_, to_, item.seq * to_.stride_seq + head * to_.stride_head + token * to_.stride_token);
      const int64_t at = (item.seq * q.num_heads + head) * q.q_len + token;
      if (to_.lse != nullptr) to_.lse[at] = lse;
      for (int64_t i = 0; to_.mass != nullptr && i < span.num_items; ++i) {
        const WorkItem& one = schedule_.items[span.first_item + i];
        store_mass(one, parts + i * item_size(), row, lse, to_.mass + at * to_.mass_blocks);
      }
    }
  }

  const Compute compute_;
  const std::vector<AttendArgs>& runs_;
  const Output& to_;
  const Schedule schedule_;
  const int64_t dim_, item_rows_, item_blocks_;
  std::vector<size_t> span_of_;  // of every item
  std::vector<std::atomic<int64_t>> remaining_;
  std::atomic<Status> status_{Status::kOk};
};

// -inf for those tokens of the table that lie in front of all blocks that the items of these rows have, or behind them.
void fill_outside(const AttendArgs& run, const WorkItem& item) {
  const Tokens tokens = visible_tokens(run, item.seq, item.head_begin);
  const int64_t num_tokens = run.kv.num_tokens();
  const bool is_empty = tokens.begin >= tokens.end;
  const int64_t front = is_empty ? num_tokens : tokens.begin / kBlockTokens * kBlockTokens;
  const int64_t back = is_empty ? num_tokens : ceil_div(tokens.end, kBlockTokens) * kBlockTokens;
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    for (int64_t row = item.row_begin; row < item.row_end; ++row) {
      float* const logits = run.logits_of(item.seq, head, row);
      if (item.token_begin == tokens.begin) std::fill(logits, logits + front, -INFINITY);
      if (item.token_end == tokens.end) std::fill(logits + back, logits + num_tokens, -INFINITY);
    }
  }
}

Status run_call(WorkerPool& pool, Compute compute, const std::vector<AttendArgs>& runs, const Output& to) {
  for (const AttendArgs& run : runs) {
    if (!inside_table(run.kv)) return Status::kOutsideTable;
  }
  Call call(compute, runs, to);
  // Kept between calls: it would be mapped and faulted in anew each time.
  thread_local std::vector<float> workspace;
  if (static_cast<int64_t>(workspace.size()) < call.workspace_size()) workspace.resize(call.workspace_size());
  float* const parts = workspace.data();  // the caller's: every thread has a `workspace` of its own
  pool.run(call.num_items(), [&](int64_t i) { call.run_item(i, parts); });
  constexpr size_t kKeptFloats = 4 << 20;  // 16 MiB: 128K tokens of a large layer; more goes back
  if (workspace.size() > kKeptFloats) std::vector<float>().swap(workspace);
  return call.status();
}

bool ends_with_queries(const AttendArgs& run) {
  const Run& kv = run.kv;
  if (kv.of_blocks) return false;
  for (int64_t seq = 0; seq < kv.num_seqs; ++seq) {
    if (kv.kv_len[seq] != kv.kv_len[0] || kv.kv_len[seq] < run.q.q_len) return false;
  }
  return inside_table(kv);
}

}  // namespace

void merge(WorkerPool& pool, const Partials& parts, const float* sink_logit, float* out, float* lse) {
  constexpr int64_t kRowsPerItem = 64;
  pool.run((parts.num_rows + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item) {
    const int64_t end = std::min((item + 1) * kRowsPerItem, parts.num_rows);
    for (int64_t row = item * kRowsPerItem; row < end; ++row) {
      const auto part = [&](int64_t i) { return PartOfRow{parts.out[i] + row * parts.dim, parts.lse[i][row]}; };
      const float sink = sink_of(sink_logit, row / parts.q_len % parts.num_heads);
      merge_row(part, static_cast<int64_t>(parts.out.size()), parts.dim, sink, out + row * parts.dim, lse + row);
    }
  });
}

void collapse(WorkerPool& pool, const Groups& groups, float* out, float* lse) {
  pool.run(groups.num_seqs * groups.num_rows, [&](int64_t row) {
    const int64_t first = row / groups.num_rows * groups.num_groups, in_seq = row % groups.num_rows;
    const auto part = [&](int64_t i) {
      const int64_t at = (first + i) * groups.num_rows + in_seq;
      return PartOfRow{groups.out + at * groups.dim, groups.lse[at]};
    };
    merge_row(part, groups.num_groups, groups.dim, -INFINITY, out + row * groups.dim, lse + row);
  });
}

Status attend(WorkerPool& pool, const KernelTable& kernels, const std::vector<AttendArgs>& runs, const Output& to) {
  return run_call(pool, kernels.attend_item, runs, to);
}

Status weigh(WorkerPool& pool, const KernelTable& kernels, const std::vector<AttendArgs>& runs, const Output& to) {
  return run_call(pool, kernels.weigh_item, runs, to);
}

Status logits(WorkerPool& pool, const KernelTable& kernels, const std::vector<AttendArgs>& runs) {
  for (const AttendArgs& run : runs) {
    if (!inside_table(run.kv)) return Status::kOutsideTable;
  }
  const Schedule schedule = cut(runs);
  std::atomic<Status> failed{Status::kOk};
  pool.run(static_cast<int64_t>(schedule.items.size()), [&](int64_t i) {
    const WorkItem& item = schedule.items[i];
    fill_outside(runs[item.run], item);
    const Status status = kernels.score_item(runs[item.run], item);
    if (status != Status::kOk) failed.store(status, std::memory_order_relaxed);
  });
  return failed.load();
}

Status append_and_attend(WorkerPool& pool, const KernelTable& kernels, const std::vector<AttendArgs>& runs,
                         const TokenRows& rows, const Output& to) {
  const AttendArgs& last = runs.back();
  if (!ends_with_queries(last)) return Status::kOutsideTable;
  const int64_t end = last.kv.num_seqs == 0 ? 0 : last.kv.kv_len[0];
  const TokenRange tokens{last.kv.table, last.kv.num_seqs, end - last.q.q_len, end};
  const Status status = copy_tokens(pool, kernels, last.kv.arenas, tokens, rows, Direction::kAppend);
  return status == Status::kOk ? attend(pool, kernels, runs, to) : status;
}

}  // namespace tandem
