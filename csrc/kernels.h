// The native kernel's door: what may be called, and by which instruction set it is answered.
#pragma once

#include <string>
#include <vector>

#include "attend.h"
#include "worker_pool.h"

namespace tandem {

// Partial results over disjoint tokens, each out [num_rows][dim] and lse [num_rows], contiguous.
struct Partials {
  std::vector<const float*> out, lse;
  int64_t num_rows, dim;
};

Status attend(WorkerPool& pool, const KernelTable& kernels, const AttendArgs& args);
void merge(WorkerPool& pool, const Partials& parts, float* out, float* lse);

struct Isa {
  const KernelTable* kernels;
  std::string missing;  // empty where this machine has it, else the first thing it lacks
};

// Every instruction set this module was compiled for, in the order of choice.
const std::vector<Isa>& isas();

// Gigabytes (1e9) per second of plain loads over a 64-byte aligned buffer, one pass with each prefetch distance, the
// best of them: what no kernel can exceed.
double read_gbps(WorkerPool& pool, const KernelTable& kernels, const char* buffer, int64_t num_bytes);

}  // namespace tandem
