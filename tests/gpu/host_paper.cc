// The paper's kernel on a CPU, as a function that ctypes calls.
#include "host_cuda.h"
// After it, so that the kernel finds a host.
#include "../../benchmarks/gpu/paper/kernel.cu"

struct Launch {
  float* out;
  float* lse;
  const void* q;
  const void* k_cache;
  const void* v_cache;
  const int* block_table;
  const int* context_lens;
  host::Event* events;
  int64_t cache_bytes, chunk_bytes, max_events, num_events, num_heads, num_seqs, num_kv_heads, max_blocks, shared_bytes,
      descending;
  double scale;
};

// Null, or what went wrong and where. num_events is how many there were, of which max_events were kept.
extern "C" const char* launch(Launch* with) {
  host::caches[0] = {static_cast<const unsigned char*>(with->k_cache), with->cache_bytes};
  host::caches[1] = {static_cast<const unsigned char*>(with->v_cache), with->cache_bytes};
  host::events = with->events;
  host::chunk_bytes = with->chunk_bytes;
  host::max_events = with->max_events;
  const Dim3 grid = {static_cast<int>(with->num_heads), static_cast<int>(with->num_seqs), 1};
  const char* fault = host::run(grid, with->shared_bytes, with->descending != 0, [&] {
    attend(with->out, with->lse, static_cast<const Element*>(with->q), static_cast<const Element*>(with->k_cache),
           static_cast<const Element*>(with->v_cache), with->block_table, with->context_lens,
           static_cast<float>(with->scale), static_cast<int>(with->num_kv_heads), static_cast<int>(with->max_blocks));
  });
  with->num_events = host::num_events;
  if (fault == nullptr) return nullptr;
  static char where[200];
  std::snprintf(where, sizeof(where), "block (%d, %d), thread %d: %s", blockIdx.x, blockIdx.y, threadIdx.x, fault);
  return where;
}
