// Which blocks take part: scores from codes, and the choice of the highest.
#pragma once

#include <vector>

#include "attend.h"
#include "worker_pool.h"

namespace tandem {

// Codes of every slot of a pool: [head][slot][lane units of a page][num_lines][64], where a unit is 4 blocks of bounds,
// or a block of columns. steps: [head][slot][blocks of a page, rounded up to units] of bounds.
struct BlockCodes {
  Codes kind;
  const uint8_t* codes;
  const float* steps;
  int64_t num_kv_heads, num_slots, page_blocks;

  int64_t page_units() const {
    return kind == Codes::kColumns ? page_blocks : (page_blocks + kLaneBlocks - 1) / kLaneBlocks;
  }
};

// Bounds of the pages in these slots, into `codes` of that kind.
Status make_bounds(WorkerPool& pool, const KernelTable& kernels, const Arenas& arenas,
                   const std::vector<int32_t>& slots, int64_t num_lines, uint8_t* codes, float* steps);

// Queries [num_seqs][num_kv_heads][rows_per_head][dim], contiguous, and for columns what their coordinates follow by,
// [num_kv_heads][dim][num_columns]; else nullptr. dtype: float32 or bf16.
struct QueryRows {
  const void* data;
  DType dtype;
  const float* directions;
  int64_t num_seqs, num_kv_heads, rows_per_head, dim, num_columns;
};

// scores [num_seqs][num_kv_heads][num_pages * page_blocks], of the pages slots [num_seqs][num_pages], stride_seq apart.
// Queries are rounded to 8 bits, to the nearest.
Status score_blocks(WorkerPool& pool, const KernelTable& kernels, const BlockCodes& codes, const QueryRows& q,
                    const PageTable& slots, int64_t num_pages, float* scores);

// A choice among the blocks of far pages, for every sequence and KV head.
struct Choice {
  const float* scores;  // [num_seqs][num_kv_heads][num_blocks], strides in elements; -inf is never chosen, NaN always
  int64_t stride_seq, stride_head;
  int64_t num_seqs, num_kv_heads, num_blocks;
  const int64_t* kv_start;  // [num_seqs], tokens of padding: blocks of nothing else are never chosen
  int64_t num_wanted;       // of every head
  int64_t num_sink_tokens;  // behind the padding: their blocks come first of all
};

// What was chosen, in the order of positions: [num_seqs][num_kv_heads][capacity].
struct Chosen {
  int32_t* blocks;    // positions
  int32_t* entries;   // of a table of blocks (attend.h, Run)
  int64_t capacity;   // a choice is cut there
  int64_t* kv_start;  // [num_seqs][num_kv_heads] of the table's tokens
  int64_t* kv_len;
};

// The num_wanted highest scores of each head; of equal ones the earliest. slots as in score_blocks.
void choose_blocks(WorkerPool& pool, const KernelTable& kernels, const Choice& choice, const PageTable& slots,
                   int64_t page_blocks, const Chosen& chosen);

}  // namespace tandem
