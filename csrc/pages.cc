#include "pages.h"

#include <algorithm>
#include <cstring>

namespace tandem {
namespace {

bool in_arena(const Arena& arena, int64_t slot) { return slot >= 0 && slot < arena.num_slots; }

// Calls visit(seq, head, slot, first token in the page, last, first token in the range) for every page of the range.
template <class Visit>
Status for_each_page(WorkerPool& pool, const Arena& arena, const TokenRange& tokens, const Visit& visit) {
  const int64_t size = arena.page_size, begin = tokens.begin, end = tokens.end;
  const int64_t first_page = begin / size, num_pages = end > begin ? (end + size - 1) / size - first_page : 0;
  const PageTable& table = tokens.table;
  for (int64_t seq = 0; seq < tokens.num_seqs; ++seq) {
    for (int64_t head = 0; head < arena.num_kv_heads; ++head) {
      for (int64_t page = first_page; page < first_page + num_pages; ++page) {
        if (!in_arena(arena, table.slot(seq, head, page))) return Status::kSlotOutOfRange;
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

Status copy_tokens(WorkerPool& pool, const KernelTable& kernels, const Arena& arena, const TokenRange& tokens,
                   const TokenRows& rows, Direction direction) {
  const bool is_append = direction == Direction::kAppend;
  return for_each_page(pool, arena, tokens,
                       [&](int64_t seq, int64_t head, int64_t slot, int64_t first, int64_t last, int64_t in_range) {
                         const HeadSlice slice = arena.slice(slot, head);
                         const TokenRun outside = run_of(rows, seq, head, in_range);
                         if (arena.packing == Packing::kPanels) {
                           (is_append ? kernels.pack : kernels.unpack)(arena, slice, first, last, outside);
                           return;
                         }
                         const TokenRun inside = rows_in_page(arena, slice, first);
                         copy_rows(arena, is_append ? outside : inside, is_append ? inside : outside, last - first);
                       });
}

Status move_pages(WorkerPool& pool, const KernelTable& kernels, const Arena& from, const Arena& to,
                  const std::vector<int32_t>& from_slots, const std::vector<int32_t>& to_slots) {
  const int64_t num_pages = static_cast<int64_t>(from_slots.size());
  for (int64_t i = 0; i < num_pages; ++i) {
    if (!in_arena(from, from_slots[i]) || !in_arena(to, to_slots[i])) return Status::kSlotOutOfRange;
  }
  pool.run(num_pages * from.num_kv_heads, [&](int64_t i) {
    const int64_t page = i / from.num_kv_heads, head = i % from.num_kv_heads;
    const HeadSlice source = from.slice(from_slots[page], head), target = to.slice(to_slots[page], head);
    if (from.packing == to.packing) {
      std::memcpy(target.k, source.k, from.page_size * from.k_token_bytes());
      std::memcpy(target.v, source.v, from.page_size * from.v_token_bytes());
    } else {
      kernels.pack(to, target, 0, to.page_size, rows_in_page(from, source, 0));
    }
  });
  return Status::kOk;
}

}  // namespace tandem
