// Moves of whole pages and runs of tokens between arenas and plain tensors, threaded over heads.
#pragma once

#include "attend.h"
#include "worker_pool.h"

namespace tandem {

// [num_seqs][num_kv_heads][num_tokens][head_dim]: strides in bytes, head_dim contiguous.
struct TokenRows {
  char *k, *v;
  int64_t k_stride_seq, k_stride_head, k_stride_token;
  int64_t v_stride_seq, v_stride_head, v_stride_token;
};

// Tokens [begin, end) of every sequence's table: rows -> pages of either packing; other tokens are not touched.
Status append(WorkerPool& pool, const KernelTable& kernels, const Arena& arena, const PageTable& table,
              int64_t num_seqs, int64_t begin, int64_t end, const TokenRows& from);

// The same tokens, pages -> rows.
Status gather(WorkerPool& pool, const KernelTable& kernels, const Arena& arena, const PageTable& table,
              int64_t num_seqs, int64_t begin, int64_t end, const TokenRows& to);

// Whole pages: slot from_slots[i] -> slot to_slots[i], between arenas of one packing or from rows to panels.
Status move_pages(WorkerPool& pool, const KernelTable& kernels, const Arena& from, const Arena& to,
                  const int32_t* from_slots, const int32_t* to_slots, int64_t num_pages);

}  // namespace tandem
