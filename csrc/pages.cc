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

}  // namespace

Status append(WorkerPool& pool, const Arena& arena, const PageTable& table, int64_t num_seqs, int64_t begin,
              int64_t end, const TokenRows& from) {
  const int64_t row_bytes = arena.head_dim * item_bytes(arena.dtype);
  return for_each_page(pool, arena, table, num_seqs, begin, end,
                       [&](int64_t seq, int64_t head, int64_t slot, int64_t first, int64_t last, int64_t run) {
                         const int64_t at = arena.offset(slot, head);
                         const char* k = from.k + seq * from.k_stride_seq + head * from.k_stride_head;
                         const char* v = from.v + seq * from.v_stride_seq + head * from.v_stride_head;
                         for (int64_t t = first; t < last; ++t, ++run) {
                           std::memcpy(arena.k + at + t * row_bytes, k + run * from.k_stride_token, row_bytes);
                           std::memcpy(arena.v + at + t * row_bytes, v + run * from.v_stride_token, row_bytes);
                         }
                       });
}

Status gather(WorkerPool& pool, const KernelTable& kernels, const Arena& arena, const PageTable& table,
              int64_t num_seqs, int64_t begin, int64_t end, const TokenRows& to) {
  const int64_t row_bytes = arena.head_dim * item_bytes(arena.dtype);
  const bool dense = to.k_stride_token == row_bytes && to.v_stride_token == row_bytes;
  return for_each_page(pool, arena, table, num_seqs, begin, end,
                       [&](int64_t seq, int64_t head, int64_t slot, int64_t first, int64_t last, int64_t run) {
                         const int64_t at = arena.offset(slot, head);
                         char* const k = to.k + seq * to.k_stride_seq + head * to.k_stride_head;
                         char* const v = to.v + seq * to.v_stride_seq + head * to.v_stride_head;
                         const int64_t step = dense ? last - first : 1;  // unpack leaves no gaps between its rows
                         for (int64_t t = first; t < last; t += step, run += step) {
                           kernels.unpack(arena, {arena.k + at, arena.v + at}, t, t + step,
                                          {k + run * to.k_stride_token, v + run * to.v_stride_token});
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
    const int64_t from_at = from.offset(from_slots[page], head), to_at = to.offset(to_slots[page], head);
    const HeadSlice source{from.k + from_at, from.v + from_at}, target{to.k + to_at, to.v + to_at};
    if (to.packing == Packing::kPanels) {
      kernels.pack(from, source, target);
    } else {
      std::memcpy(target.k, source.k, from.head_bytes());
      std::memcpy(target.v, source.v, from.head_bytes());
    }
  });
  return Status::kOk;
}

}  // namespace tandem
