// A persistent pool of threads that run numbered items of one job at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

namespace tandem {

class WorkerPool {
 public:
  // `num_threads` counts the caller, who works too; the others start with the first job that needs them. Where `cpus`
  // are given, each of the others runs on one of them alone, the first being left to the caller, who may run anywhere.
  explicit WorkerPool(int num_threads, std::vector<int> cpus = {});
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls run_item(i) once for every i in [0, num_items), in any order, and returns when all have returned.
  // run_item must not throw: the others could still be at work on the job.
  // Callers on several threads take turns. A child process after fork gets threads of its own.
  void run(int64_t num_items, const std::function<void(int64_t)>& run_item);

  // Wakes the others ahead of a job that is about to come, while its caller prepares it. Without a job they sleep
  // again.
  void rouse();

 private:
  struct Crew;
  Crew& crew();

  const int num_threads_;
  const std::vector<int> cpus_;
  std::atomic<Crew*> crew_;
};

}  // namespace tandem
