// How fast this machine reads memory: the limit every attention kernel is judged by.
#include <algorithm>
#include <chrono>

#include "kernels.h"

namespace tandem {

double read_gbps(WorkerPool& pool, const KernelTable& kernels, const char* buffer, int64_t num_bytes) {
  constexpr int64_t kPiece = 1 << 20;
  const int64_t num_pieces = num_bytes / kPiece;
  double best = 0.0;
  for (const int64_t prefetch_bytes : {0, 2048, 4096}) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(num_pieces, [&](int64_t i) {
      volatile uint64_t keep = kernels.read(buffer + i * kPiece, kPiece, prefetch_bytes);  // so that the loads happen
      (void)keep;
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(num_pieces * kPiece) / seconds / 1e9);
  }
  return best;
}

}  // namespace tandem
