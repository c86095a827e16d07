#include "pages.h"

#include <algorithm>
#include <cstring>

namespace tandem {
namespace {

bool in_arenas(const Arenas& arenas, int64_t slot) { return slot >= 0 && slot < arenas.num_slots(); }

// A head's slice of a page, and whose it is.
struct Located {
  const Part& arena;
  HeadSlice slice;
};

Located locate(const Arenas& arenas, int64_t slot, int64_t head) {
  const int part = arenas.part_of(slot);
  const Part& arena = arenas.parts[part];
  return {arena, arena.slice(slot - arenas.first[part], head)};
}

// Calls visit(seq, head, slot, first token in the page, last, first token in the range) for every page of the range.
template <class Visit>
Status for_each_page(WorkerPool& pool, const Arenas& arenas, const TokenRange& tokens, const Visit& visit) {
  const Arena& arena = arenas.shape();
  const int64_t size = arena.page_size, begin = tokens.begin, end = tokens.end;
  const int64_t first_page = begin / size, num_pages = end > begin ? (end + size - 1) / size - first_page : 0;
  const PageTable& table = tokens.table;
  for (int64_t seq = 0; seq < tokens.num_seqs; ++seq) {
    for (int64_t head = 0; head < arena.num_kv_heads; ++head) {
      for (int64_t page = first_page; page < first_page + num_pages; ++page) {
        if (!in_arenas(arenas, table.slot(seq, head, page))) return Status::kSlotOutOfRange;
      }
    }
  }
  const auto visit_item = [&](int64_t i) {
    const int64_t page = first_page + i % num_pages, head = i / num_pages % arena.num_kv_heads;
    const int64_t seq = i / num_pages / arena.num_kv_heads;
    const int64_t first = std::max(begin, page * size), last = std::min(end, (page + 1) * size);
    visit(seq, head, table.slot(seq, head, page), first - page * size, last - page * size, first - begin);
  };
  const int64_t num_items = tokens.num_seqs * arena.num_kv_heads * num_pages;
  // One token of a decode step is a few KiB: copying it costs less than waking anybody.
  if (end - begin < kBlockTokens) {
    for (int64_t i = 0; i < num_items; ++i) visit_item(i);
  } else {
    pool.run(num_items, visit_item);
  }
  return Status::kOk;
}

// The rows that follow token `first` of one sequence's head.
TokenRun run_of(const TokenRows& rows, int64_t seq, int64_t head, int64_t first) {
  return {rows.k + seq * rows.k_stride_seq + head * rows.k_stride_head + first * rows.k_stride_token,
          rows.v + seq * rows.v_stride_seq + head * rows.v_stride_head + first * rows.v_stride_token,
          rows.k_stride_token, rows.v_stride_token};
}

// Token `first` of a head's slice of rows, and what follows.
TokenRun rows_in_page(const Arena& arena, HeadSlice slice, int64_t first) {
  const int64_t k_bytes = arena.k_token_bytes(), v_bytes = arena.v_token_bytes();
  return {slice.k + first * k_bytes, slice.v + first * v_bytes, k_bytes, v_bytes};
}

// Between two runs of rows, of which one is in pages.
void copy_rows(const Arena& arena, const TokenRun& from, const TokenRun& to, int64_t num_tokens) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::memcpy(to.k + t * to.k_stride, from.k + t * from.k_stride, arena.head_dim * item_bytes(arena.dtype));
    std::memcpy(to.v + t * to.v_stride, from.v + t * from.v_stride, arena.v_head_dim * item_bytes(arena.dtype));
  }
}

}  // namespace

Status copy_tokens(WorkerPool& pool, const KernelTable& kernels, const Arenas& arenas, const TokenRange& tokens,
                   const TokenRows& rows, Direction direction) {
  const bool is_append = direction == Direction::kAppend;
  return for_each_page(pool, arenas, tokens,
                       [&](int64_t seq, int64_t head, int64_t slot, int64_t first, int64_t last, int64_t in_range) {
                         const Located found = locate(arenas, slot, head);
                         const TokenRun outside = run_of(rows, seq, head, in_range);
                         if (found.arena.packing != Packing::kRows) {
                           if (is_append) {
                             kernels.pack(found.arena, found.slice, first, last, outside);
                           } else {
                             kernels.unpack(found.arena, found.slice, first, last, outside);
                           }
                           return;
                         }
                         const TokenRun inside = rows_in_page(found.arena, found.slice, first);
                         copy_rows(found.arena, is_append ? outside : inside, is_append ? inside : outside,
                                   last - first);
                       });
}

namespace {

// Slices that one thread moves alone: 8 take 140 us in int8, and 200 where another has to be woken first.
constexpr int64_t kFewSlices = 16;

// One head of one page; the first token that is not finite where it could not be packed, else -1.
int64_t move_slice(const KernelTable& kernels, const Located& from, const Located& to, const float* channel_weights) {
  const Arena& source = from.arena;
  if (source.packing == to.arena.packing && source.num_channels == to.arena.num_channels) {
    std::memcpy(to.slice.k, from.slice.k, source.k_slice_bytes());
    std::memcpy(to.slice.v, from.slice.v, source.v_slice_bytes());
    return -1;
  }
  TokenRun rows = rows_in_page(source, from.slice, 0);
  thread_local std::vector<char> unpacked;
  if (source.packing != Packing::kRows) {
    const int64_t k_bytes = source.head_dim * item_bytes(source.dtype);
    const int64_t v_bytes = source.v_head_dim * item_bytes(source.dtype);
    unpacked.resize(source.page_size * (k_bytes + v_bytes));
    rows = {unpacked.data(), unpacked.data() + source.page_size * k_bytes, k_bytes, v_bytes};
    kernels.unpack(source, from.slice, 0, source.page_size, rows);
  }
  rows.channel_weights = channel_weights;
  return kernels.pack(to.arena, to.slice, 0, source.page_size, rows);
}

}  // namespace

Status move_pages(WorkerPool& pool, const KernelTable& kernels, const Arenas& from, const Arenas& to, const Move& move,
                  Refused& refused) {
  const int64_t num_pages = static_cast<int64_t>(move.from_slots.size()), num_heads = from.shape().num_kv_heads;
  for (int64_t i = 0; i < num_pages; ++i) {
    if (!in_arenas(from, move.from_slots[i]) || !in_arenas(to, move.to_slots[i])) return Status::kSlotOutOfRange;
  }
  std::vector<int64_t> bad(num_pages * num_heads);
  const auto move_one = [&](int64_t i) {
    const int64_t page = i / num_heads, head = i % num_heads;
    const float* const weights = move.channel_weights;
    bad[i] = move_slice(kernels, locate(from, move.from_slots[page], head), locate(to, move.to_slots[page], head),
                        weights == nullptr ? nullptr : weights + i * from.shape().head_dim);
  };
  if (num_pages * num_heads <= kFewSlices) {
    for (int64_t i = 0; i < num_pages * num_heads; ++i) move_one(i);
  } else {
    pool.run(num_pages * num_heads, move_one);
  }
  for (int64_t page = 0; page < num_pages; ++page) {
    int64_t first = -1;
    for (int64_t i = page * num_heads; i < (page + 1) * num_heads; ++i) {
      if (bad[i] >= 0 && (first < 0 || bad[i] < first)) first = bad[i];
    }
    if (first < 0) continue;
    refused.pages.push_back(page);
    refused.tokens.push_back(first);
  }
  return Status::kOk;
}

}  // namespace tandem
