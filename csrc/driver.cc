#include "driver.h"

#include <unistd.h>

#include <chrono>
#include <deque>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "threads.h"

namespace tandem {
namespace {

using Clock = std::chrono::steady_clock;

// A sleeper woke 80 us late here (median of a virtual machine). One that wakes so long before its moment, and spins for
// the rest, is in time; nobody else has work for this processor meanwhile.
constexpr double kSpinBefore = 150e-6;

// Whatever comes within this time of being waited for costs no waking.
constexpr double kSpinFirst = 500e-6;

Clock::time_point moment(double seconds) {
  constexpr double kFarAway = 1e9;  // what comes later would not fit the clock's integers
  const std::chrono::duration<double> since(seconds < kFarAway ? seconds : kFarAway);
  return Clock::time_point(std::chrono::duration_cast<Clock::duration>(since));
}

}  // namespace

double seconds_now() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

void Bell::ring() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    num_rung_.fetch_add(1, std::memory_order_release);
  }
  rung_.notify_all();
}

void Bell::wait(int64_t num_rung, double until) {
  const double sleeps_at = seconds_now() + kSpinFirst;
  while (num_rung_.load(std::memory_order_acquire) <= num_rung) {
    const double now = seconds_now();
    if (now >= until) return;
    if (now < sleeps_at || now >= until - kSpinBefore) {
      relax();
      continue;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    rung_.wait_until(lock, moment(until - kSpinBefore), [&] { return num_rung_.load() > num_rung; });
  }
}

// The thread may outlive its owner, if it hangs.
struct Driver::State {
  explicit State(std::shared_ptr<Bell> bell) : bell(std::move(bell)) {}

  const pid_t owner = getpid();
  const std::shared_ptr<Bell> bell;  // of those who wait for jobs
  Bell submitted;
  std::mutex mutex;
  std::deque<std::shared_ptr<Job>> jobs;
  bool is_closing = false;
  bool has_ended = false;
  std::condition_variable ended;
  std::thread thread;

  // The next job, waiting for it; null when there will be none.
  std::shared_ptr<Job> next() {
    while (true) {
      const int64_t num_rung = submitted.num_rung();
      {
        std::lock_guard<std::mutex> lock(mutex);
        if (!jobs.empty()) {
          std::shared_ptr<Job> job = std::move(jobs.front());
          jobs.pop_front();
          return job;
        }
        if (is_closing) return nullptr;
      }
      submitted.wait(num_rung, std::numeric_limits<double>::infinity());
    }
  }

  static Status made(const Job& job) {
    try {
      return job.call();
    } catch (const std::bad_alloc&) {
      return Status::kOutOfMemory;
    }
  }

  void work() {
    Bell never;
    while (const std::shared_ptr<Job> job = next()) {
      if (!job->is_cancelled.load()) never.wait(0, job->not_before);
      if (!job->is_cancelled.load()) {  // meanwhile, too
        job->begin = seconds_now();
        job->status = made(*job);
      }
      job->call = nullptr;  // with what it holds, before anybody can think it is over
      job->end.store(seconds_now(), std::memory_order_release);
      bell->ring();
    }
    std::lock_guard<std::mutex> lock(mutex);
    has_ended = true;
    ended.notify_all();
  }
};

Driver::Driver(std::shared_ptr<Bell> bell, int cpu) : state_(std::make_shared<State>(std::move(bell))) {
  state_->thread = std::thread([state = state_, cpu] {
    if (cpu >= 0) pin_this_thread(cpu);
    state->work();
  });
}

Driver::~Driver() { close(10.0); }

std::shared_ptr<Driver::Job> Driver::submit(std::function<Status()> call, double not_before) {
  if (state_->owner != getpid()) throw std::runtime_error("this thread stayed in the process that was forked");
  auto job = std::make_shared<Job>();
  job->call = std::move(call);
  job->not_before = not_before;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->jobs.push_back(job);
  }
  state_->submitted.ring();
  return job;
}

bool Driver::close(double seconds) {
  if (state_->owner != getpid()) {  // the thread stayed in the parent, perhaps holding the locks
    if (state_->thread.joinable()) new std::shared_ptr<State>(state_);  // its handle must not be destroyed
    return true;
  }
  if (!state_->thread.joinable()) return true;  // closed before
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->is_closing = true;
  }
  state_->submitted.ring();
  std::unique_lock<std::mutex> lock(state_->mutex);
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  const bool has_ended = state_->ended.wait_until(lock, until, [&] { return state_->has_ended; });
  for (const std::shared_ptr<Job>& job : state_->jobs) job->is_cancelled.store(true);
  lock.unlock();
  if (has_ended) {
    state_->thread.join();
  } else {
    state_->thread.detach();
  }
  return has_ended;
}

}  // namespace tandem
