// What is left out of a step, drawn from: a shuffle of its blocks, and how groups of a sample scatter.
#pragma once

#include "attend.h"
#include "kernels.h"
#include "worker_pool.h"

namespace tandem {

// Far blocks of every sequence and KV head, of which some were chosen: [num_seqs][num_kv_heads][capacity], rising
// positions, counts [num_seqs][num_kv_heads] tokens of them. kv_start: [num_seqs], tokens of padding.
struct Left {
  int64_t num_seqs, num_kv_heads, num_blocks, page_blocks;
  const int64_t* kv_start;
  const int32_t* chosen;
  int64_t capacity;
  const int64_t* chosen_tokens;
};

// Entries of a table of blocks (attend.h, Run) of all that is left, in an order that is random, for every sequence and
// head another: to [num_seqs][num_kv_heads][num_blocks], 0 behind them. The same seed gives the same order for the same
// place in a batch, whatever comes behind it. slots as in score_blocks.
void shuffle_left(WorkerPool& pool, const Left& left, const PageTable& slots, uint64_t seed, int32_t* to);

// How the residuals r_j = exp(lse_j - lse) (out_j - out) of the groups scatter about their mean, for every row:
// variance [num_seqs][num_rows], the trace of their covariance, and products [num_seqs][num_rows], the mean of
// (r_i . r_j)^2 over all i and j that differ. whole: out and lse of [num_seqs][num_rows].
void scatter(WorkerPool& pool, const Groups& groups, const float* whole_out, const float* whole_lse, double* variance,
             double* products);

}  // namespace tandem
