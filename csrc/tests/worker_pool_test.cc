// The worker pool: every item once, callers taking turns, life after fork.
#include "worker_pool.h"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "check.h"

namespace tandem {
namespace {

// The items of a job are plain memory that different threads write: ThreadSanitizer sees a pool that returns early.
bool each_item_once(WorkerPool& pool, int64_t num_items) {
  std::vector<int> times(num_items, 0);
  pool.run(num_items, [&](int64_t i) { ++times.at(i); });
  for (const int n : times) {
    if (n != 1) return false;
  }
  return true;
}

void every_item_once() {
  for (const int num_threads : {-1, 0, 1, 2, 3, 8}) {
    WorkerPool pool(num_threads);
    CHECK(pool.num_threads() == (num_threads < 1 ? 1 : num_threads), num_threads, pool.num_threads());
    for (const int64_t num_items : {0, 1, 2, 3, 7, 1000}) {
      CHECK(each_item_once(pool, num_items), num_threads, num_items);
    }
  }
}

void many_jobs() {
  WorkerPool pool(3);
  for (int64_t job = 1; job <= 20000; ++job) {
    std::atomic<int64_t> sum{0};
    pool.run(4, [&](int64_t i) { sum.fetch_add(job * (i + 1), std::memory_order_relaxed); });
    CHECK(sum.load() == 10 * job, job);
  }
}

// The crew falls asleep when no job comes, and wakes for the next one.
void jobs_after_sleep() {
  WorkerPool pool(3);
  for (int job = 0; job < 20; ++job) {
    CHECK(each_item_once(pool, 64), job);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// Rousing changes nothing but who is awake: before jobs, without jobs, and from another thread while a job runs.
void rousing() {
  WorkerPool pool(3), alone(1);
  alone.rouse();
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop.load()) pool.rouse();
  });
  for (int job = 0; job < 200; ++job) {
    if (job % 3 != 0) pool.rouse();
    if (job % 20 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    CHECK(each_item_once(pool, job % 7), job);
  }
  stop.store(true);
  other.join();
}

void one_thread_is_the_caller() {
  WorkerPool pool(1);
  std::vector<int64_t> order;
  pool.run(5, [&](int64_t i) { order.push_back(i); });
  CHECK((order == std::vector<int64_t>{0, 1, 2, 3, 4}));
}

// Items that wait for each other finish only if all threads take part. Before a fork this makes sure that none of them
// is still starting: the child would inherit the lock that AddressSanitizer's allocator holds then.
void meet(WorkerPool& pool) {
  std::atomic<int> arrived{0};
  pool.run(pool.num_threads(), [&](int64_t) {
    arrived.fetch_add(1);
    while (arrived.load() < pool.num_threads()) std::this_thread::yield();
  });
}

void threads_work_at_once() {
  for (const int num_threads : {2, 3}) {
    WorkerPool pool(num_threads);
    for (int job = 0; job < 100; ++job) meet(pool);
  }
}

void callers_take_turns() {
  WorkerPool pool(3);
  std::atomic<int> num_wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 2; ++caller) {
    callers.emplace_back([&] {
      for (int job = 0; job < 2000; ++job) num_wrong += !each_item_once(pool, 5 + job % 7);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(num_wrong == 0, num_wrong);
}

// Runs `body` in a forked child; true where it returned true before half a minute passed.
template <class Body>
bool holds_in_child(const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    _exit(body() ? 0 : 1);
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Three threads, each in one item at a time: the caller where it was, the others on processors in turn.
bool is_pinned(WorkerPool& pool, const std::vector<int>& cpus, const cpu_set_t& all) {
  const std::thread::id caller = std::this_thread::get_id();
  std::vector<int> num_on(CPU_SETSIZE, 0);
  std::atomic<int> arrived{0}, caller_free{0};
  std::mutex mutex;
  pool.run(3, [&](int64_t) {
    arrived.fetch_add(1);
    while (arrived.load() < 3) std::this_thread::yield();
    std::lock_guard<std::mutex> lock(mutex);
    cpu_set_t mine;
    sched_getaffinity(0, sizeof mine, &mine);
    if (std::this_thread::get_id() == caller) {
      caller_free += CPU_EQUAL(&mine, &all);
    } else if (CPU_COUNT(&mine) == 1) {
      for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) num_on[cpu] += CPU_ISSET(cpu, &mine);
    }
  });
  std::vector<int> expected(CPU_SETSIZE, 0);
  for (const size_t number : {1, 2}) ++expected[cpus[number % cpus.size()]];
  return caller_free == 1 && num_on == expected;
}

void pinned() {
  cpu_set_t all;
  CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &all)) cpus.push_back(cpu);
  }
  WorkerPool pool(3, cpus), first(3, {cpus[0]}), gone(3, {CPU_SETSIZE - 1});
  for (int round = 0; round < 20; ++round) {
    CHECK(is_pinned(pool, cpus, all), round);
    CHECK(is_pinned(first, {cpus[0]}, all), round);
  }
  meet(gone);                      // no such processor: the threads stay where they are
#if !defined(__SANITIZE_THREAD__)  // see main
  CHECK(holds_in_child([&] { return is_pinned(pool, cpus, all); }));
#endif
}

void destroyed_while_idle() {
  for (int round = 0; round < 50; ++round) {
    auto pool = std::make_unique<WorkerPool>(4);
    if (round % 5 != 0) CHECK(each_item_once(*pool, 9));  // every fifth never started its threads
    if (round % 7 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    pool.reset();
  }
}

void used_after_fork() {
  auto pool = std::make_unique<WorkerPool>(3);
  meet(*pool);
  const bool child_works = holds_in_child([&] {
    const bool works = each_item_once(*pool, 100) && each_item_once(*pool, 3);
    pool.reset();
    return works;
  });
  CHECK(child_works);
  CHECK(holds_in_child([&] {  // the parent's threads are not the child's to join
    pool.reset();
    return true;
  }));
  CHECK(each_item_once(*pool, 100));
}

// Two callers at once are the first to use the pool in the child.
void used_after_fork_by_two() {
  WorkerPool pool(3);
  meet(pool);
  for (int round = 0; round < 100; ++round) {
    const bool child_works = holds_in_child([&] {
      std::atomic<int> num_ready{0}, num_wrong{0};
      const auto call = [&] {
        num_ready.fetch_add(1);
        while (num_ready.load() < 2) std::this_thread::yield();
        num_wrong += !each_item_once(pool, 50) + !each_item_once(pool, 50);
      };
      std::thread other(call);
      call();
      other.join();
      return num_wrong == 0;
    });
    CHECK(child_works, round);
  }
}

// The child is born while the crew is at work and its locks are taken: the pool's, not those of an allocator, for the
// jobs allocate nothing.
void forked_while_busy() {
  WorkerPool pool(3);
  meet(pool);
  std::atomic<bool> stop{false};
  std::atomic<int64_t> num_items{0};
  std::thread caller([&] {
    while (!stop) pool.run(16, [&](int64_t) { num_items.fetch_add(1); });
  });
  while (num_items.load() == 0) std::this_thread::yield();
  for (int round = 0; round < 10; ++round) {
    CHECK(holds_in_child([&] { return each_item_once(pool, 100); }), round);
  }
  stop = true;
  caller.join();
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  using namespace tandem;
  std::vector<Test> tests = {{"every item once", every_item_once},
                             {"many jobs", many_jobs},
                             {"jobs after sleep", jobs_after_sleep},
                             {"rousing", rousing},
                             {"one thread is the caller", one_thread_is_the_caller},
                             {"threads work at once", threads_work_at_once},
                             {"callers take turns", callers_take_turns},
                             {"pinned", pinned},
                             {"destroyed while idle", destroyed_while_idle}};
#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer itself dies of threads that a forked child starts
  tests.push_back({"used after fork", used_after_fork});
  tests.push_back({"used after fork by two", used_after_fork_by_two});
  tests.push_back({"forked while busy", forked_while_busy});
#endif
  return run_tests(tests, argc, argv);
}
