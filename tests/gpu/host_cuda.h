// What benchmarks/gpu/paper/kernel.cu needs of CUDA, on one CPU thread: the same text, compiled by a C++ compiler.
//
// The 128 threads of a block are fibers. Each runs until it waits for others (__syncthreads, a shuffle) or ends; only
// then the next one of its warp does, and only when all of a warp wait for other warps, the next warp. A missing
// barrier is therefore no race that may go well: a fiber that runs ahead finds NaN where others have not written yet,
// and overwrites what others have not read yet. First come the lowest threads and warps, or the highest, so that both
// ends of each barrier are tried.
//
// Every address that is read through `read` or asked for ahead must lie in one of the two caches, and is recorded; of
// reads in one chunk in a row, the first. Shared memory begins as NaN, and so does what lies behind the bytes that were
// asked for, which must stay.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define HOST_CUDA
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(num_threads)

struct Dim3 {
  int x, y, z;
};

struct Pair {
  float low, high;
};

inline Dim3 threadIdx, blockIdx, gridDim;
alignas(16) inline unsigned char dynamic_shared[256 << 10];

namespace host {

constexpr int kThreads = 128, kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;

enum State { kReady, kAtBarrier, kAtShuffle, kDone };
enum Kind : int64_t { kRead, kBulk, kLine };

// What a thread read or asked for. place: 0 K, 1 V; at: bytes from the beginning of that cache.
struct Event {
  int64_t block_x, block_y, thread, kind, place, at, num_bytes;
};

struct Fiber {
  ucontext_t context;
  State state;
  int num_shuffles;
  int64_t last_read[2];  // chunk of K, of V
  std::vector<unsigned char> stack = std::vector<unsigned char>(kStackBytes);
};

struct Cache {
  const unsigned char* begin;
  int64_t num_bytes;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers(kThreads);
inline float exchange[2][kThreads];  // a shuffle uses one half, the next the other: nobody overwrites what is unread
inline Cache caches[2];
inline Event* events;
inline int64_t max_events, num_events, chunk_bytes;
inline const char* fault;

inline void fail(const char* what) {
  if (fault == nullptr) fault = what;
}

inline void wait(State state) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

inline void record(Kind kind, int place, int64_t at, int64_t num_bytes) {
  if (kind == kRead) {
    int64_t& last = fibers[threadIdx.x].last_read[place];
    if (last == at / chunk_bytes) return;
    last = at / chunk_bytes;
  }
  if (num_events < max_events) {
    events[num_events] = {blockIdx.x, blockIdx.y, threadIdx.x, kind, place, at, num_bytes};
  }
  ++num_events;
}

// Whether these bytes are of a cache.
inline bool touch(Kind kind, const void* from, int64_t num_bytes) {
  for (int place = 0; place < 2; ++place) {
    const int64_t at = static_cast<const unsigned char*>(from) - caches[place].begin;
    if (at < 0 || at + num_bytes > caches[place].num_bytes) continue;
    record(kind, place, at, num_bytes);
    return true;
  }
  fail(kind == kRead ? "a read outside the caches" : "a prefetch outside the caches");
  return false;
}

// Lets them go on if all of these threads wait in this state.
inline bool release(int first, int num_threads, State state) {
  for (int i = first; i < first + num_threads; ++i) {
    if (fibers[i].state != state) return false;
  }
  for (int i = first; i < first + num_threads; ++i) fibers[i].state = kReady;
  return true;
}

// Until every lane has ended or waits for something other than a shuffle of all.
inline void run_warp(int first, bool descending) {
  do {
    for (int i = 0; i < kLanes; ++i) {
      threadIdx = {first + (descending ? kLanes - 1 - i : i), 0, 0};
      Fiber& fiber = fibers[threadIdx.x];
      if (fiber.state == kReady && fault == nullptr) swapcontext(&scheduler, &fiber.context);
    }
  } while (fault == nullptr && release(first, kLanes, kAtShuffle));
}

template <class Body>
void enter_fiber(unsigned low, unsigned high) {
  (*reinterpret_cast<Body*>(static_cast<uintptr_t>(high) << 32 | low))();
  wait(kDone);
}

template <class Body>
void run_block(Body& body, bool descending) {
  const auto address = reinterpret_cast<uintptr_t>(&body);
  for (Fiber& fiber : fibers) {
    fiber.state = kReady;
    fiber.num_shuffles = 0;
    fiber.last_read[0] = fiber.last_read[1] = -1;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter_fiber<Body>), 2, static_cast<unsigned>(address),
                static_cast<unsigned>(address >> 32));
  }
  do {
    for (int i = 0; i < kThreads; i += kLanes) run_warp(descending ? kThreads - kLanes - i : i, descending);
  } while (fault == nullptr && release(0, kThreads, kAtBarrier));
  for (const Fiber& fiber : fibers) {
    if (fiber.state != kDone) fail("threads wait for others that never come");
  }
}

// body for every thread of every block of grid. Null, or what went wrong.
template <class Body>
const char* run(Dim3 grid, int64_t shared_bytes, bool descending, Body body) {
  fault = nullptr;
  num_events = 0;
  if (shared_bytes > static_cast<int64_t>(sizeof(dynamic_shared))) return "more shared memory than this host has";
  gridDim = grid;
  for (int y = 0; y < grid.y; ++y) {
    for (int x = 0; x < grid.x && fault == nullptr; ++x) {
      blockIdx = {x, y, 0};
      std::memset(dynamic_shared, 0xff, sizeof(dynamic_shared));  // NaN in float32, float16 and bfloat16
      run_block(body, descending);
      for (size_t i = shared_bytes; i < sizeof(dynamic_shared); ++i) {
        if (dynamic_shared[i] != 0xff) {
          fail("a write beyond shared memory");
          break;
        }
      }
    }
  }
  return fault;
}

}  // namespace host

inline void __syncthreads() { host::wait(host::kAtBarrier); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  host::Fiber& fiber = host::fibers[threadIdx.x];
  float* const half = host::exchange[fiber.num_shuffles++ % 2];
  half[threadIdx.x] = x;
  host::wait(host::kAtShuffle);
  return half[threadIdx.x ^ mask];
}

inline float __int_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float __uint_as_float(unsigned bits) { return __int_as_float(bits); }
inline float __expf(float x) { return std::exp(x); }

namespace host {

inline float from_float16(unsigned bits) {
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f, fraction = static_cast<float>(bits & 0x3ff);
  const int exponent = bits >> 10 & 0x1f;
  if (exponent == 0x1f) return fraction != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25));
}

inline const std::vector<float> float16s = [] {
  std::vector<float> all(1 << 16);
  for (unsigned bits = 0; bits < all.size(); ++bits) all[bits] = from_float16(bits);
  return all;
}();

}  // namespace host

inline Pair unpack_float16(unsigned word) { return {host::float16s[word & 0xffff], host::float16s[word >> 16]}; }

template <class T>
T read(const T* from) {
  return host::touch(host::kRead, from, sizeof(T)) ? *from : T();
}

inline void hold_order() {}

inline void prefetch_bulk(const void* from, unsigned num_bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || num_bytes % 16 != 0) host::fail("a bulk prefetch in odd units");
  host::touch(host::kBulk, from, num_bytes);
}

inline void prefetch_line(const void* from) { host::touch(host::kLine, from, 1); }
