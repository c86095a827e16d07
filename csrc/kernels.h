// The native kernel's door: what may be called, and by which instruction set it is answered.
#pragma once

#include <string>
#include <vector>

#include "attend.h"
#include "pages.h"
#include "worker_pool.h"

namespace tandem {

// Partial results over disjoint tokens, each out [num_rows][dim] and lse [num_rows], contiguous; a row is
// [num_seqs][num_heads][q_len].
struct Partials {
  std::vector<const float*> out, lse;
  int64_t num_rows, dim;
  int64_t num_heads, q_len;
};

// Attention over groups of tokens that are disjoint: out [num_seqs][num_groups][num_rows][dim], lse without dim.
struct Groups {
  const float *out, *lse;
  int64_t num_seqs, num_groups, num_rows, dim;
};

// Where attention goes: out [num_seqs][num_heads][q_len][v_head_dim], strides in elements, v_head_dim contiguous,
// float32 or rounded; lse [num_seqs][num_heads][q_len], contiguous, natural log, or nullptr where nobody asks.
struct Output {
  void* out;
  DType dtype;
  int64_t stride_seq, stride_head, stride_token;
  float* lse;
  const float* sink_logit;  // [num_heads], see `merge`; or nullptr
  // [num_seqs][num_heads][q_len][mass_blocks], zeros: the share of each row that every block of 16 tokens of all
  // tables, one run behind the other, has; the sink's logit counts in the whole. Or nullptr.
  float* mass = nullptr;
  int64_t mass_blocks = 0;
};

// Attention over all runs together. Runs differ in `kv`, `causal` and `logits` alone; their tokens are disjoint.
Status attend(WorkerPool& pool, const KernelTable& kernels, const std::vector<AttendArgs>& runs, const Output& to);

// The halves of it, over runs that have `logits` and are not causal. Scores as they come to the softmax, to `logits`,
// -inf for tokens of the table that are not of the run; V is not read. And attention from there, to the bit; neither K
// nor q is read, which has a shape alone.
Status logits(WorkerPool& pool, const KernelTable& kernels, const std::vector<AttendArgs>& runs);
Status weigh(WorkerPool& pool, const KernelTable& kernels, const std::vector<AttendArgs>& runs, const Output& to);

// Writes the queries' own tokens to the end of the last run, then attends. Every sequence of that run has the same
// length, which counts them; else kOutsideTable, and nothing is written.
Status append_and_attend(WorkerPool& pool, const KernelTable& kernels, const std::vector<AttendArgs>& runs,
                         const TokenRows& rows, const Output& to);

// sink_logit: [num_heads] or nullptr: one more logit in the denominator of every row of a head, which has no value.
void merge(WorkerPool& pool, const Partials& parts, const float* sink_logit, float* out, float* lse);

// Over all groups: out [num_seqs][num_rows][dim], lse [num_seqs][num_rows].
void collapse(WorkerPool& pool, const Groups& groups, float* out, float* lse);

struct Isa {
  const KernelTable* kernels;
  std::string missing;  // empty where this machine has it, else the first thing it lacks
};

// Every instruction set this module was compiled for, in the order of choice.
const std::vector<Isa>& isas();

// Gigabytes (1e9) per second of plain loads over a 64-byte aligned buffer, one pass with each prefetch distance, the
// best of them: what no kernel can exceed.
double read_gbps(WorkerPool& pool, const KernelTable& kernels, const char* buffer, int64_t num_bytes);

// 1e9 multiply-adds per second, of the instruction that bf16 products use, from registers alone, on all threads at
// once, the best of a few passes of about a millisecond: what no product can exceed, wherever its operands lie.
double dot_gops(WorkerPool& pool, const KernelTable& kernels);

// Nanoseconds of a load whose address is what the one before read: next[i] is the place to read after i.
double load_latency_ns(const int64_t* next, int64_t num_steps);

}  // namespace tandem
