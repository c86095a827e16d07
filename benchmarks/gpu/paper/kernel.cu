// Decode attention over paged KV as the baseline of asynchronous KV prefetch (2504.06319) is built, and the prefetch
// itself: a thread block for each query head of each sequence, grid [H, B] of 128 threads, which takes every KV block
// of the sequence (no split), warp w those numbered w, w + 4, ...; logits of the whole context in shared memory; one
// softmax; then V. Loads are plain ones into registers. Query heads of a group each read their KV head's blocks anew.
//
// Compiled at run time (__init__.py), once for every set of these macros:
//   HEAD_DIM            64, 80, ..., 256
//   BLOCK_TOKENS        of a KV block: 16, 32 or 64
//   BF16                1: bfloat16, 0: float16 (q, K and V)
//   PREFETCH_DISTANCE   how many of its own iterations ahead a warp asks L2 for a block: 0 none, 1 as the paper
//   PROLOGUE            1: the iterations that no earlier one can ask for are asked for before the first
//   LOADS_FIRST         1: all loads of a chunk (or stage of rows), then the prefetch, then arithmetic, whatever the
//                       distance; 0: as the compiler orders them. ptxas 13.0 moves loads in between the arithmetic
//                       for sm_80 and sm_90, so that fewer are under way, but only where no prefetch stands in the way:
//                       the switch would be timed together with that
//   BULK_PREFETCH       set by the architecture, if not given
//
// A chunk is what one KV block holds for one KV head, contiguous: K [D/8][BLOCK_TOKENS][8], V [D][BLOCK_TOKENS].
//   words   two elements each, as loaded
//   group   the lanes that share a token in the K loop: together they load 16 bytes of it at a time
//   ahead   the chunk that a warp will read PREFETCH_DISTANCE iterations later, or null

#ifndef HOST_CUDA  // tests/gpu/host_cuda.h has the same names for a CPU

#ifndef BULK_PREFETCH
#define BULK_PREFETCH (__CUDA_ARCH__ >= 900)
#endif

using Address = unsigned long long;

struct Pair {
  float low, high;
};

// NVRTC comes without cuda_fp16.h and cuda_bf16.h: a float16 is converted by hand, a bfloat16 is a float's upper half.
__device__ __forceinline__ Pair unpack_float16(unsigned word) {
  Pair pair;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(pair.low), "=f"(pair.high)
      : "r"(word));
  return pair;
}

// A vector of a cache, 8 or 16 bytes.
template <class T>
__device__ __forceinline__ T read(const T* from) {
#if LOADS_FIRST
  T words;
  unsigned* const word = words.word;
  const Address address = __cvta_generic_to_global(from);
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "l"(address));
  } else {
    static_assert(sizeof(T) == 8, "a vector");
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(address));
  }
  return words;
#else
  return *from;
#endif
}

// What is loaded before it is not moved behind it.
__device__ __forceinline__ void hold_order() {
#if LOADS_FIRST
  __syncwarp();
#endif
}

// Volatile, and over memory, so that neither the compiler moves it before the loads of the chunk that is being read.
// PTX ISA 8.0, sm_90: one thread asks for any multiple of 16 bytes.
__device__ __forceinline__ void prefetch_bulk(const void* from, unsigned num_bytes) {
#if BULK_PREFETCH
  const Address address = __cvta_generic_to_global(from);
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(num_bytes) : "memory");
#endif
}

// Before sm_90: the line of 128 bytes that holds an address.
__device__ __forceinline__ void prefetch_line(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"((Address)__cvta_generic_to_global(from)) : "memory");
}

extern __shared__ uint4 dynamic_shared[];

#endif

namespace {

using Element = unsigned short;  // 16 bits of float16 or bfloat16
using Index = long long;

constexpr int kThreads = 128, kLanes = 32, kWarps = kThreads / kLanes;
constexpr int kElements = 8;  // in 16 bytes
constexpr int kChunk = HEAD_DIM * BLOCK_TOKENS;

// K: lanes of a group, elements that one of them loads of a token at a time, and how often it does.
constexpr int kGroup = BLOCK_TOKENS < kLanes ? kLanes / BLOCK_TOKENS : 1;
constexpr int kTokenStep = kLanes / kGroup;
constexpr int kLoadElements = kElements / kGroup;
constexpr int kLoads = HEAD_DIM / kElements;
// So many are under way before the first is used: 64 registers.
constexpr int kMaxKStage = 128 / kLoadElements, kKStage = kLoads < kMaxKStage ? kLoads : kMaxKStage;

// V: lanes that share a row of BLOCK_TOKENS, rows that a warp loads at once, and rows of a lane, of which 8 are under
// way before the first is used: 32 registers.
constexpr int kRowLanes = BLOCK_TOKENS / kElements;
constexpr int kRowStep = kLanes / kRowLanes;
constexpr int kRows = HEAD_DIM / kRowStep;
constexpr int kVStage = kRows < 8 ? kRows : 8;

static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM >= 64 && HEAD_DIM <= 256, "head_dim");
static_assert(BLOCK_TOKENS == 16 || BLOCK_TOKENS == 32 || BLOCK_TOKENS == 64, "tokens of a KV block");
static_assert(kLoads * kElements == HEAD_DIM && kRows * kRowStep == HEAD_DIM, "lanes share rows evenly");

template <int N>
struct alignas(4 * N) Words {
  unsigned word[N];
};

using KLoad = Words<kLoadElements / 2>;
using VLoad = Words<kElements / 2>;

// What a thread block attends to: K and V begin at its KV head's first chunk, stride elements lie between KV blocks.
struct Task {
  const Element* k;
  const Element* v;
  const int* table;
  Index stride;
  int num_tokens, num_blocks, warp, lane;
};

// Shared memory: q as it came, a float for each warp twice, then the logits. Partial outs of all warps take the place
// of the logits when V has been read. `shared_bytes` in __init__.py counts the same.
struct Shared {
  unsigned* q;
  float* maxima;
  float* sums;
  float* logits;
};

__device__ __forceinline__ Shared shared_memory() {
  unsigned* const q = reinterpret_cast<unsigned*>(dynamic_shared);
  float* const maxima = reinterpret_cast<float*>(q + HEAD_DIM / 2);
  return {q, maxima, maxima + kWarps, maxima + 2 * kWarps};
}

__device__ __forceinline__ Pair unpack(unsigned word) {
#if BF16
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
#else
  return unpack_float16(word);
#endif
}

__device__ __forceinline__ const Element* chunk_of(const Element* cache, const Task& task, int block) {
  return cache + task.table[block] * task.stride;
}

// The chunk that this warp reads `distance` iterations after block; null where there is none. Called before the loads
// of the current one, so that both entries of the table are waited for together.
__device__ __forceinline__ const Element* ahead_of(const Element* cache, const Task& task, int block, int distance) {
  const int ahead = block + distance * kWarps;
  return distance > 0 && ahead < task.num_blocks ? chunk_of(cache, task, ahead) : nullptr;
}

// All lanes call it: one asks for the whole chunk, or every lane for a line of each 4 KiB.
__device__ __forceinline__ void ask_for(const Element* chunk, int lane) {
  if (chunk == nullptr) return;
#if BULK_PREFETCH
  if (lane == 0) prefetch_bulk(chunk, kChunk * sizeof(Element));
#else
  constexpr int line = 128 / sizeof(Element);
#pragma unroll
  for (int at = lane * line; at < kChunk; at += kLanes * line) prefetch_line(chunk + at);
#endif
}

// The warp's first PREFETCH_DISTANCE chunks: no iteration is early enough to ask for them.
__device__ __forceinline__ void ask_for_first(const Element* cache, const Task& task) {
  for (int i = 0; i < (PROLOGUE ? PREFETCH_DISTANCE : 0); ++i) {
    const int block = task.warp + i * kWarps;
    if (block < task.num_blocks) ask_for(chunk_of(cache, task, block), task.lane);
  }
}

__device__ __forceinline__ float sum_over(float x, int num_lanes) {
  for (int mask = num_lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

__device__ __forceinline__ float max_over(float x, int num_lanes) {
  for (int mask = num_lanes / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

// Adds the products of q with loads [begin, begin + kKStage) of a token's K to as many sums as a load has elements: one
// sum would wait for itself.
__device__ __forceinline__ void multiply(const KLoad (&k)[kKStage], int begin, const unsigned* q,
                                         float (&sums)[kLoadElements]) {
#pragma unroll
  for (int i = 0; i < kKStage && begin + i < kLoads; ++i) {
    const KLoad part = *reinterpret_cast<const KLoad*>(q + (begin + i) * (kElements / 2));
#pragma unroll
    for (int j = 0; j < kLoadElements / 2; ++j) {
      const Pair x = unpack(part.word[j]), y = unpack(k[i].word[j]);
      sums[2 * j] += x.low * y.low;
      sums[2 * j + 1] += x.high * y.high;
    }
  }
}

// This lane's share of q k for a token, whose first elements for this lane are at k; asks for what is ahead between
// loads and arithmetic.
__device__ __forceinline__ float dot(const Element* k, const Element* ahead, const unsigned* q, int lane) {
  float sums[kLoadElements] = {};
#pragma unroll
  for (int begin = 0; begin < kLoads; begin += kKStage) {
    KLoad loaded[kKStage];
#pragma unroll
    for (int i = 0; i < kKStage && begin + i < kLoads; ++i) {
      loaded[i] = read(reinterpret_cast<const KLoad*>(k + (begin + i) * BLOCK_TOKENS * kElements));
    }
    if (begin == 0) ask_for(ahead, lane);
    hold_order();
    multiply(loaded, begin, q, sums);
  }
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kLoadElements; ++j) sum += sums[j];
  return sum;
}

// Logits of all tokens of the warp's blocks, 0 for those of the last block that do not exist. Returns the largest that
// this lane has seen.
__device__ __forceinline__ float logits_of(const Task& task, const Shared& shared, float scale) {
  const int member = task.lane % kGroup, own = member * kLoadElements;
  float largest = __int_as_float(0xff800000);
  for (int block = task.warp; block < task.num_blocks; block += kWarps) {
    const Element* ahead = ahead_of(task.k, task, block, PREFETCH_DISTANCE);
    const Element* const chunk = chunk_of(task.k, task, block) + own;
#pragma unroll 1  // K of two tokens at once would not fit registers
    for (int in_block = task.lane / kGroup; in_block < BLOCK_TOKENS; in_block += kTokenStep) {
      const int token = block * BLOCK_TOKENS + in_block;
      const float part = dot(chunk + in_block * kElements, ahead, shared.q + own / 2, task.lane);
      const float logit = scale * sum_over(part, kGroup);
      ahead = nullptr;  // once for a chunk
      const bool exists = token < task.num_tokens;
      if (member == 0) shared.logits[token] = exists ? logit : 0;
      if (exists) largest = fmaxf(largest, logit);
    }
  }
  return largest;
}

// Makes weights of the logits, in place; returns the natural log of the sum of their exponentials.
__device__ __forceinline__ float softmax(const Task& task, const Shared& shared, float largest, int thread) {
  largest = max_over(largest, kLanes);
  if (task.lane == 0) shared.maxima[task.warp] = largest;
  __syncthreads();  // maxima and every logit
  for (int warp = 0; warp < kWarps; ++warp) largest = fmaxf(largest, shared.maxima[warp]);
  float sum = 0;
  for (int token = thread; token < task.num_tokens; token += kThreads) {
    const float weight = __expf(shared.logits[token] - largest);
    shared.logits[token] = weight;
    sum += weight;
  }
  sum = sum_over(sum, kLanes);
  if (task.lane == 0) shared.sums[task.warp] = sum;
  __syncthreads();
  sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += shared.sums[warp];
  const float share = 1 / sum;  // the largest weight was 1
  for (int token = thread; token < task.num_tokens; token += kThreads) shared.logits[token] *= share;
  __syncthreads();
  return largest + logf(sum);
}

// Zero for the tokens from num_valid on: their weight is 0, but what lies there may be NaN.
__device__ __forceinline__ void drop_beyond(VLoad& v, int num_valid) {
#pragma unroll
  for (int i = 0; i < kElements / 2; ++i) {
    if (2 * i >= num_valid) v.word[i] = 0;
    if (2 * i + 1 == num_valid) v.word[i] &= 0xffffu;
  }
}

__device__ __forceinline__ float weigh(const VLoad& v, const float (&weights)[kElements]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kElements / 2; ++i) {
    const Pair pair = unpack(v.word[i]);
    sum += weights[2 * i] * pair.low;
    sum += weights[2 * i + 1] * pair.high;
  }
  return sum;
}

// Adds weights times values of the warp's blocks to out, which holds rows lane / kRowLanes + i * kRowStep of V.
__device__ __forceinline__ void values_of(const Task& task, const Shared& shared, float (&out)[kRows]) {
  const int row = task.lane / kRowLanes, column = task.lane % kRowLanes * kElements;
  for (int block = task.warp; block < task.num_blocks; block += kWarps) {
    const Element* ahead = ahead_of(task.v, task, block, PREFETCH_DISTANCE);
    const Element* const chunk = chunk_of(task.v, task, block) + row * BLOCK_TOKENS + column;
    const int token = block * BLOCK_TOKENS + column;
    float weights[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) weights[i] = shared.logits[token + i];
#pragma unroll
    for (int begin = 0; begin < kRows; begin += kVStage) {
      VLoad v[kVStage];
#pragma unroll
      for (int i = 0; i < kVStage && begin + i < kRows; ++i) {
        v[i] = read(reinterpret_cast<const VLoad*>(chunk + (begin + i) * kRowStep * BLOCK_TOKENS));
      }
      if (begin == 0) ask_for(ahead, task.lane);
      hold_order();
#pragma unroll
      for (int i = 0; i < kVStage && begin + i < kRows; ++i) {
        if (block == task.num_blocks - 1) drop_beyond(v[i], task.num_tokens - token);
        out[begin + i] += weigh(v[i], weights);
      }
    }
  }
}

// Sums what the lanes of a row and then what the warps found; writes HEAD_DIM floats.
__device__ __forceinline__ void write_out(const Task& task, const Shared& shared, float (&found)[kRows], float* out,
                                          int thread) {
  __syncthreads();  // the last warp has read its weights
  float* const partial = shared.logits;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float sum = sum_over(found[i], kRowLanes);
    const int row = task.lane / kRowLanes + i * kRowStep;
    if (task.lane % kRowLanes == 0) partial[task.warp * HEAD_DIM + row] = sum;
  }
  __syncthreads();
  for (int d = thread; d < HEAD_DIM; d += kThreads) {
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp * HEAD_DIM + d];
    out[d] = sum;
  }
}

// out and lse of a head of a sequence with nothing to attend to (0, -inf), or with a length beyond its table (NaN).
__device__ __forceinline__ void write_constant(float* out, float* lse, int thread, float value, float log_sum) {
  for (int d = thread; d < HEAD_DIM; d += kThreads) out[d] = value;
  if (thread == 0) *lse = log_sum;
}

}  // namespace

// out [B, H, D] and lse [B, H] in float32, lse natural; q [B, H, D]; k_cache [blocks, Hkv, D/8, BLOCK_TOKENS, 8] and
// v_cache [blocks, Hkv, D, BLOCK_TOKENS], aligned to 16 bytes; block_table [B, max_blocks]; context_lens [B].
extern "C" __global__ void __launch_bounds__(kThreads)
    attend(float* __restrict__ out, float* __restrict__ lse, const Element* __restrict__ q,
           const Element* __restrict__ k_cache, const Element* __restrict__ v_cache,
           const int* __restrict__ block_table, const int* __restrict__ context_lens, float scale, int num_kv_heads,
           int max_blocks) {
  const int head = blockIdx.x, seq = blockIdx.y, thread = threadIdx.x;
  const Index at = (Index)seq * gridDim.x + head;
  const Index kv_head = head / (gridDim.x / num_kv_heads);
  const int num_tokens = context_lens[seq], num_blocks = (num_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
  const float infinity = __int_as_float(0x7f800000), nan = __int_as_float(0x7fc00000);
  out += at * HEAD_DIM;
  if (num_tokens <= 0) return write_constant(out, lse + at, thread, 0, -infinity);
  if (num_blocks > max_blocks) return write_constant(out, lse + at, thread, nan, nan);

  const Task task = {k_cache + kv_head * kChunk,
                     v_cache + kv_head * kChunk,
                     block_table + (Index)seq * max_blocks,
                     (Index)num_kv_heads * kChunk,
                     num_tokens,
                     num_blocks,
                     thread / kLanes,
                     thread % kLanes};
  const Shared shared = shared_memory();
  ask_for_first(task.k, task);
  const unsigned* const own_q = reinterpret_cast<const unsigned*>(q + at * HEAD_DIM);
  for (int i = thread; i < HEAD_DIM / 2; i += kThreads) shared.q[i] = own_q[i];
  __syncthreads();
  const float largest = logits_of(task, shared, scale);
  ask_for_first(task.v, task);
  const float log_sum = softmax(task, shared, largest, thread);
  if (thread == 0) lse[at] = log_sum;
  float found[kRows] = {};
  values_of(task, shared, found);
  write_out(task, shared, found, out, thread);
}
