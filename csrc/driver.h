// A thread that works beside its owner, one job after the other, and the bell that wakes whoever waits for it. Moments
// are seconds of the steady clock, which is Python's `time.perf_counter`.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>

#include "attend.h"

namespace tandem {

double seconds_now();

// Wakes those who wait for the first of several things: each of which rings when it is there.
class Bell {
 public:
  void ring();
  int64_t num_rung() const { return num_rung_.load(std::memory_order_acquire); }

  // Until it has rung more often than `num_rung`, read before what was looked for was not there, or a moment has come.
  // What comes soon is waited for without sleeping, because waking takes as long.
  void wait(int64_t num_rung, double until);

 private:
  std::atomic<int64_t> num_rung_{0};
  std::mutex mutex_;
  std::condition_variable rung_;
};

class Driver {
 public:
  // What is asked of the thread. `status` and `begin` may be read once `end` is finite; then nothing is read or written
  // any more. What was cancelled before it began ends without.
  struct Job {
    std::function<Status()> call;
    double not_before = 0.0;
    double begin = 0.0;
    Status status = Status::kOk;
    std::atomic<double> end{std::numeric_limits<double>::infinity()};
    std::atomic<bool> is_cancelled{false};  // who has not begun need not
  };

  // The bell rings after every job. cpu: where the thread stays; -1 is anywhere. A child process after fork has no
  // thread: `submit` throws there, and nobody is waited for.
  Driver(std::shared_ptr<Bell> bell, int cpu);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // `call` may throw std::bad_alloc alone; what it reads lives until the job has ended.
  std::shared_ptr<Job> submit(std::function<Status()> call, double not_before);

  // Ends the thread after what was submitted. One that hangs is waited for so many seconds, and then left alone; what
  // it has not begun by then, it never begins. True unless it was left in the middle of a job.
  bool close(double seconds);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace tandem
