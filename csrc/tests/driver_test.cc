// The driver: jobs in order, in time, on one thread; the bell: nobody sleeps through it, or past a moment.
#include "driver.h"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"

namespace tandem {
namespace {

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

bool has_ended(const Driver::Job& job) { return std::isfinite(job.end.load(std::memory_order_acquire)); }

// As a device waits: for whichever thing is first.
void wait_for(Bell& bell, const Driver::Job& job) {
  while (true) {
    const int64_t num_rung = bell.num_rung();
    if (has_ended(job)) return;
    bell.wait(num_rung, seconds_now() + 10);
  }
}

// Plain memory that the driver writes and this thread reads: ThreadSanitizer sees an end that comes too early.
void jobs_are_done_in_order() {
  const auto bell = std::make_shared<Bell>();
  Driver driver(bell, -1);
  std::vector<int> seen;
  std::vector<std::shared_ptr<Driver::Job>> jobs;
  for (int i = 0; i < 2000; ++i) {
    jobs.push_back(driver.submit(
        [&seen, i] {
          seen.push_back(i);
          return i % 2 == 0 ? Status::kOk : Status::kNanInQuery;
        },
        0));
    if (i % 7 == 0) wait_for(*bell, *jobs.back());
  }
  wait_for(*bell, *jobs.back());
  CHECK(seen.size() == jobs.size() && std::is_sorted(seen.begin(), seen.end()), seen.size());
  for (size_t i = 0; i < jobs.size(); ++i) {
    CHECK(jobs[i]->status == (i % 2 == 0 ? Status::kOk : Status::kNanInQuery), i);
    CHECK(jobs[i]->begin <= jobs[i]->end.load(), i);
    CHECK(i == 0 || jobs[i - 1]->end.load() <= jobs[i]->begin, i);
  }
}

void none_begins_too_early() {
  const auto bell = std::make_shared<Bell>();
  Driver driver(bell, -1);
  for (const double wait : {1e-5, 1e-3, 2e-2}) {
    const double not_before = seconds_now() + wait;
    const auto job = driver.submit([] { return Status::kOk; }, not_before);
    wait_for(*bell, *job);
    CHECK(job->begin >= not_before, wait);
  }
}

void what_was_cancelled_is_not_begun() {
  const auto bell = std::make_shared<Bell>();
  Driver driver(bell, -1);
  const auto first = driver.submit([] { return sleep_ms(20), Status::kOk; }, 0);
  bool was_begun = false;
  const auto second = driver.submit([&] { return was_begun = true, Status::kOk; }, 0);
  second->is_cancelled.store(true);
  const auto third = driver.submit([] { return Status::kOk; }, 0);
  wait_for(*bell, *third);
  CHECK(has_ended(*first) && has_ended(*second) && !was_begun);
}

void what_is_cancelled_while_it_waits_is_not_begun() {
  const auto bell = std::make_shared<Bell>();
  Driver driver(bell, -1);
  bool was_begun = false;
  const auto job = driver.submit([&] { return was_begun = true, Status::kOk; }, seconds_now() + 0.05);
  sleep_ms(10);  // the thread has it
  job->is_cancelled.store(true);
  wait_for(*bell, *driver.submit([] { return Status::kOk; }, 0));
  CHECK(has_ended(*job) && !was_begun);
}

void memory_that_is_not_there_is_told() {
  const auto bell = std::make_shared<Bell>();
  Driver driver(bell, -1);
  const auto job = driver.submit([]() -> Status { throw std::bad_alloc(); }, 0);
  wait_for(*bell, *job);
  CHECK(job->status == Status::kOutOfMemory);
}

void a_child_waits_for_nobody() {
  const auto bell = std::make_shared<Bell>();
  Driver driver(bell, -1);
  wait_for(*bell, *driver.submit([] { return Status::kOk; }, 0));
  const pid_t child = fork();
  if (child == 0) {
    bool was_refused = false;
    try {
      driver.submit([] { return Status::kOk; }, 0);
    } catch (const std::runtime_error&) {
      was_refused = true;
    }
    const double begin = seconds_now();
    driver.close(10);
    _exit(was_refused && seconds_now() - begin < 1 ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, status);
}

void it_stays_where_it_was_put() {
  cpu_set_t mine;
  sched_getaffinity(0, sizeof mine, &mine);
  int last = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &mine)) last = cpu;
  }
  const auto bell = std::make_shared<Bell>();
  Driver driver(bell, last);
  int found = -1;
  wait_for(*bell, *driver.submit([&] { return found = sched_getcpu(), Status::kOk; }, 0));
  CHECK(found == last, found, last);
}

void closing_ends_what_was_submitted() {
  const auto bell = std::make_shared<Bell>();
  int num_done = 0;
  {
    Driver driver(bell, -1);
    for (int i = 0; i < 50; ++i) driver.submit([&] { return ++num_done, Status::kOk; }, 0);
    CHECK(driver.close(10));
    CHECK(driver.close(10));  // again changes nothing
  }
  CHECK(num_done == 50, num_done);
}

void a_thread_that_hangs_is_left_alone() {
  const auto bell = std::make_shared<Bell>();
  const auto let_go = std::make_shared<std::atomic<bool>>(false);
  const auto was_let_go = std::make_shared<std::atomic<bool>>(false);
  const double begin = seconds_now();
  {
    Driver driver(bell, -1);
    driver.submit(
        [=] {
          while (!let_go->load()) sleep_ms(1);
          was_let_go->store(true);
          return Status::kOk;
        },
        0);
    const auto next = driver.submit([] { return Status::kOk; }, 0);
    CHECK(!driver.close(0.05));
    CHECK(next->is_cancelled.load());
  }
  CHECK(seconds_now() - begin < 5 && !was_let_go->load());
  let_go->store(true);
  while (!was_let_go->load()) sleep_ms(1);
  sleep_ms(20);  // it ends by itself
}

void a_bell_wakes_and_a_moment_does() {
  Bell bell;
  for (const double wait : {0.0, 2e-5, 1e-3, 1e-2}) {
    const double until = seconds_now() + wait;
    bell.wait(0, until);
    CHECK(seconds_now() >= until, wait);
  }
  bell.wait(0, -1e300);
  for (int i = 0; i < 200; ++i) {  // asleep, about to sleep, or not yet there
    const int64_t num_rung = bell.num_rung();
    std::thread other([&] {
      if (i % 3 == 0) sleep_ms(1);
      bell.ring();
    });
    bell.wait(num_rung, std::numeric_limits<double>::infinity());
    CHECK(bell.num_rung() == num_rung + 1, i);
    other.join();
  }
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  using namespace tandem;
  return run_tests({{"jobs are done in order", jobs_are_done_in_order},
                    {"none begins too early", none_begins_too_early},
                    {"what was cancelled is not begun", what_was_cancelled_is_not_begun},
                    {"what is cancelled while it waits is not begun", what_is_cancelled_while_it_waits_is_not_begun},
                    {"memory that is not there is told", memory_that_is_not_there_is_told},
                    {"a child waits for nobody", a_child_waits_for_nobody},
                    {"it stays where it was put", it_stays_where_it_was_put},
                    {"closing ends what was submitted", closing_ends_what_was_submitted},
                    {"a thread that hangs is left alone", a_thread_that_hangs_is_left_alone},
                    {"a bell wakes, and a moment does", a_bell_wakes_and_a_moment_does}},
                   argc, argv);
}
