// Moves of whole pages and runs of tokens between arenas and plain tensors, threaded over heads.
#pragma once

#include <vector>

#include "attend.h"
#include "worker_pool.h"

namespace tandem {

// [num_seqs][num_kv_heads][num_tokens][head_dim] of K, [v_head_dim] of V: strides in bytes, the last contiguous.
struct TokenRows {
  char *k, *v;
  int64_t k_stride_seq, k_stride_head, k_stride_token;
  int64_t v_stride_seq, v_stride_head, v_stride_token;
};

// Tokens [begin, end) of every sequence's table.
struct TokenRange {
  PageTable table;
  int64_t num_seqs, begin, end;
};

enum class Direction { kAppend, kGather };

// Copies tokens between rows and pages of either packing: to the pages where they are appended, other tokens not
// touched, and back where they are gathered.
Status copy_tokens(WorkerPool& pool, const KernelTable& kernels, const Arenas& arenas, const TokenRange& tokens,
                   const TokenRows& rows, Direction direction);

// Which pages were not packed, because a number in them is not finite: places in the list of a move, rising, and the
// first such token in each.
struct Refused {
  std::vector<int64_t> pages, tokens;
};

// A move of whole pages: slot from_slots[i] -> slot to_slots[i].
struct Move {
  std::vector<int32_t> from_slots, to_slots;
  const float* channel_weights = nullptr;  // [page][kv_head][head_dim], see TokenRun; or nullptr
};

// Between arenas, or inside one where no target slot is a source or a target again. Pages of any packing become
// panels or codes; rows come only from rows.
Status move_pages(WorkerPool& pool, const KernelTable& kernels, const Arenas& from, const Arenas& to, const Move& move,
                  Refused& refused);

}  // namespace tandem
