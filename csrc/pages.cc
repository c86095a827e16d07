#include "pages.h"

#include <algorithm>
#include <cstring>

namespace tandem {
namespace {

bool in_arena(const Arena& arena, int64_t slot) { return slot >= 0 && slot < arena.num_slots; }

// Calls visit(seq, head, slot, first token in the page, last, first token in the run) for every page of the run.
template <class Visit>
Status for_each_page(WorkerPool& pool, const Arena& arena, const PageTable& table, int64_t num_seqs, int64_t begin,
                     int64_t end, const Visit& visit) {
  const int64_t first_page = begin / arena.page_size, last_page = (end + arena.page_size - 1) / arena.page_size;
  const int64_t num_pages = end > begin ? last_page - first_page : 0;
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    for (int64_t head = 0; head < arena.num_kv_heads; ++head) {
      for (int64_t page = first_page; page < first_page + num_pages; ++page) {
        if (!in_arena(arena, table.slot(seq, head, page))) return Status::kSlotOutOfRange;
      }
    }
  }
  const auto visit_item = [&](int64_t i) {
    const int64_t page = first_page + i % num_pages, head = i / num_pages % arena.num_kv_heads;
    const int64_t seq = i / num_pages / arena.num_kv_heads;
    const int64_t first = std::max(begin, page * arena.page_size), last = std::min(end, (page + 1) * arena.page_size);
    visit(seq, head, table.slot(seq, head, page), first - page * arena.page_size, last - page * arena.page_size,
          first - begin);
  };
  const int64_t num_items = num_seqs * arena.num_kv_heads * num_pages;
  // One token of a decode step is a few KiB: copying it costs less than waking anybody.
  if (end - begin < kBlockTokens) {
    for (int64_t i = 0; i < num_items; ++i) visit_item(i);
  } else {
    pool.run(num_items, visit_item);
  }
  return Status::kOk;
}

// The rows that follow token `run` of one sequence's head.
TokenRun run_of(const TokenRows& rows, int64_t seq, int64_t head, int64_t run) {
  return {rows.k + seq * rows.k_stride_seq + head * rows.k_stride_head + run * rows.k_stride_token,
          rows.v + seq * rows.v_stride_seq + head * rows.v_stride_head + run * rows.v_stride_token, rows.k_stride_token,
          rows.v_stride_token};
}

void copy_rows(const TokenRun& from, const TokenRun& to, int64_t num_tokens, int64_t row_bytes) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::memcpy(to.k + t * to.k_stride, from.k + t * from.k_stride, row_bytes);
    std::memcpy(to.v + t * to.v_stride, from.v + t * from.v_stride, row_bytes);
  }
}

// Token `first` of a head's slice of rows, and what follows.
TokenRun rows_in_page(const Arena& arena, HeadSlice slice, int64_t first) {
  const int64_t row_bytes = arena.head_dim * item_bytes(arena.dtype);
  return {slice.k + first * row_bytes, slice.v + first * row_bytes, row_bytes, row_bytes};
}

}  // namespace

Status append(WorkerPool& pool, const KernelTable& kernels, const Arena& arena, const PageTable& table,
              int64_t num_seqs, int64_t begin, int64_t end, const TokenRows& from) {
  const int64_t row_bytes = arena.head_dim * item_bytes(arena.dtype);
  return for_each_page(pool, arena, table, num_seqs, begin, end,
                       [&](int64_t seq, int64_t head, int64_t slot, int64_t first, int64_t last, int64_t run) {
                         const HeadSlice slice = arena.slice(slot, head);
                         const TokenRun rows = run_of(from, seq, head, run);
                         if (arena.packing == Packing::kPanels) {
                           kernels.pack(arena, slice, first, last, rows);
                         } else {
                           copy_rows(rows, rows_in_page(arena, slice, first), last - first, row_bytes);
                         }
                       });
}

Status gather(WorkerPool& pool, const KernelTable& kernels, const Arena& arena, const PageTable& table,
              int64_t num_seqs, int64_t begin, int64_t end, const TokenRows& to) {
  const int64_t row_bytes = arena.head_dim * item_bytes(arena.dtype);
  return for_each_page(pool, arena, table, num_seqs, begin, end,
                       [&](int64_t seq, int64_t head, int64_t slot, int64_t first, int64_t last, int64_t run) {
                         const HeadSlice slice = arena.slice(slot, head);
                         const TokenRun rows = run_of(to, seq, head, run);
                         if (arena.packing == Packing::kPanels) {
                           kernels.unpack(arena, slice, first, last, rows);
                         } else {
                           copy_rows(rows_in_page(arena, slice, first), rows, last - first, row_bytes);
                         }
                       });
}

Status move_pages(WorkerPool& pool, const KernelTable& kernels, const Arena& from, const Arena& to,
                  const int32_t* from_slots, const int32_t* to_slots, int64_t num_pages) {
  for (int64_t i = 0; i < num_pages; ++i) {
    if (!in_arena(from, from_slots[i]) || !in_arena(to, to_slots[i])) return Status::kSlotOutOfRange;
  }
  pool.run(num_pages * from.num_kv_heads, [&](int64_t i) {
    const int64_t page = i / from.num_kv_heads, head = i % from.num_kv_heads;
    const HeadSlice source = from.slice(from_slots[page], head), target = to.slice(to_slots[page], head);
    if (from.packing == to.packing) {
      std::memcpy(target.k, source.k, from.head_bytes());
      std::memcpy(target.v, source.v, from.head_bytes());
    } else {
      kernels.pack(to, target, 0, to.page_size, rows_in_page(from, source, 0));
    }
  });
  return Status::kOk;
}

}  // namespace tandem
