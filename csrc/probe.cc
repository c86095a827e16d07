// How fast this machine reads memory, and multiplies: the limits every attention kernel is judged by.
#include <algorithm>
#include <atomic>
#include <chrono>

#include "kernels.h"

namespace tandem {
namespace {

template <class Body>
double seconds_of(const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double read_gbps(WorkerPool& pool, const KernelTable& kernels, const char* buffer, int64_t num_bytes) {
  constexpr int64_t kPiece = 1 << 20;
  const int64_t num_pieces = num_bytes / kPiece;
  double best = 0.0;
  for (const int64_t prefetch_bytes : {0, 2048, 4096}) {
    const double seconds = seconds_of([&] {
      pool.run(num_pieces, [&](int64_t i) {
        volatile uint64_t keep = kernels.read(buffer + i * kPiece, kPiece, prefetch_bytes);  // so that the loads happen
        (void)keep;
      });
    });
    best = std::max(best, static_cast<double>(num_pieces * kPiece) / seconds / 1e9);
  }
  return best;
}

double load_latency_ns(const int64_t* next, int64_t num_steps) {
  int64_t at = 0;
  const double seconds = seconds_of([&] {
    for (int64_t step = 0; step < num_steps; ++step) at = next[at];
  });
  volatile int64_t keep = at;  // so that the loads happen
  (void)keep;
  return seconds * 1e9 / static_cast<double>(num_steps);
}

double dot_gops(WorkerPool& pool, const KernelTable& kernels) {
  constexpr int kNumPasses = 5;
  constexpr int64_t kSteps = 2000;  // some 20 us: threads that wake late take fewer items
  const int64_t num_items = 50 * pool.num_threads();
  double best = 0.0;
  for (int pass = 0; pass < kNumPasses; ++pass) {
    std::atomic<int64_t> num_done{0};
    const double seconds = seconds_of([&] {
      pool.run(num_items, [&](int64_t) { num_done.fetch_add(kernels.dot(kSteps), std::memory_order_relaxed); });
    });
    best = std::max(best, static_cast<double>(num_done.load()) / seconds / 1e9);
  }
  return best;
}

}  // namespace tandem
