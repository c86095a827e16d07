// What threads of ours do besides work.
#pragma once

#include <pthread.h>
#include <sched.h>

namespace tandem {

// While it spins.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A processor that was taken from this process meanwhile leaves the thread where it is, as Linux does with pinned
// threads of a processor that goes offline.
inline void pin_this_thread(int cpu) {
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(cpu, &only);
  pthread_setaffinity_np(pthread_self(), sizeof only, &only);
}

}  // namespace tandem
