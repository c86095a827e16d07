#include "worker_pool.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "threads.h"

namespace tandem {
namespace {

// Waking a sleeping thread costs tens of microseconds. Spinning this long keeps the crew awake between `rouse` and the
// job it announces, and between jobs that follow each other, and no longer: spinning for milliseconds is what makes
// libgomp lose its bandwidth when another job runs.
constexpr auto kSpin = std::chrono::microseconds(50);

}  // namespace

// Why this cannot race: a job's fields are written under `mutex` before `generation` moves, and read by a worker only
// after it saw the new generation under the same mutex. Items are handed out by one atomic counter. The caller leaves
// `run` only when `num_working` is 0, so no worker can still touch the job, and none can join it afterwards because
// `job` is then null.
struct WorkerPool::Crew {
  const pid_t owner = getpid();
  std::mutex turn;  // one job at a time
  std::mutex mutex;
  std::condition_variable wake, done;
  std::atomic<int64_t> generation{0};
  const std::function<void(int64_t)>* job = nullptr;
  int64_t num_items = 0;
  std::atomic<int64_t> next{0};
  int num_working = 0;
  bool stop = false;
  std::vector<std::thread> threads;

  ~Crew() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
      generation.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  void drain(const std::function<void(int64_t)>& run_item, int64_t count) noexcept {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) run_item(i);
  }

  // The crew's next thread; `cpus` outlive it.
  void hire(const std::vector<int>& cpus) {
    const size_t number = threads.size() + 1;  // the caller is 0
    threads.emplace_back([this, &cpus, number] {
      if (!cpus.empty()) pin_this_thread(cpus[number % cpus.size()]);
      work();
    });
  }

  void work() {
    int64_t seen = 0;
    while (true) {
      const auto until = std::chrono::steady_clock::now() + kSpin;
      while (generation.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) relax();
      std::unique_lock<std::mutex> lock(mutex);
      wake.wait(lock, [&] { return generation.load(std::memory_order_relaxed) != seen; });
      seen = generation.load(std::memory_order_relaxed);
      if (stop) return;
      if (job == nullptr) continue;  // roused, or the others finished it before this thread woke: spin again
      const std::function<void(int64_t)>& run_item = *job;
      const int64_t count = num_items;
      ++num_working;
      lock.unlock();
      drain(run_item, count);
      lock.lock();
      if (--num_working == 0) done.notify_one();
    }
  }
};

WorkerPool::WorkerPool(int num_threads, std::vector<int> cpus)
    : num_threads_(num_threads < 1 ? 1 : num_threads), cpus_(std::move(cpus)), crew_(new Crew) {}

WorkerPool::~WorkerPool() {
  Crew* const crew = crew_.load();
  if (crew->owner == getpid()) delete crew;  // else the parent's threads are not ours to join
}

WorkerPool::Crew& WorkerPool::crew() {
  Crew* found = crew_.load(std::memory_order_acquire);
  if (found->owner == getpid()) return *found;
  // After fork: the threads stayed in the parent, perhaps holding the locks. The first of several callers puts a new
  // crew in the place of the parent's, which is left alone.
  Crew* const mine = new Crew;
  if (crew_.compare_exchange_strong(found, mine, std::memory_order_acq_rel)) return *mine;
  delete mine;
  return *found;
}

void WorkerPool::rouse() {
  if (num_threads_ == 1) return;
  Crew& c = crew();
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    if (c.job != nullptr) return;  // they are at work
    c.generation.fetch_add(1, std::memory_order_release);
  }
  c.wake.notify_all();
}

void WorkerPool::run(int64_t num_items, const std::function<void(int64_t)>& run_item) {
  if (num_items <= 0) return;
  if (num_threads_ == 1 || num_items == 1) {
    for (int64_t i = 0; i < num_items; ++i) run_item(i);
    return;
  }
  Crew& c = crew();
  std::lock_guard<std::mutex> my_turn(c.turn);
  while (static_cast<int>(c.threads.size()) < num_threads_ - 1) c.hire(cpus_);
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    c.job = &run_item;
    c.num_items = num_items;
    c.next.store(0, std::memory_order_relaxed);
    c.generation.fetch_add(1, std::memory_order_release);
  }
  c.wake.notify_all();
  c.drain(run_item, num_items);
  std::unique_lock<std::mutex> lock(c.mutex);
  c.job = nullptr;
  // The caller found no more items; the crew may still be inside their last ones: spin first, they end together.
  const auto until = std::chrono::steady_clock::now() + kSpin;
  while (c.num_working != 0 && std::chrono::steady_clock::now() < until) {
    lock.unlock();
    relax();
    lock.lock();
  }
  c.done.wait(lock, [&] { return c.num_working == 0; });
}

}  // namespace tandem
