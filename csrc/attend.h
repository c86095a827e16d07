// The nouns of the native kernel: where pages lie, what one call attends to, and what may go wrong.
//
// Everything here is a plain struct of pointers, counts and strides. No torch, no Python.
#pragma once

#include <cstdint>

namespace tandem {

// Tokens are scored, packed and masked 16 at a time ("block", architecture.md §2).
constexpr int64_t kBlockTokens = 16;
constexpr int64_t kMaxHeadDim = 256;

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// kRows:   a head's slice is [token][dim], as the model wrote it.
// kPanels: a head's slice is ready for dot products of `pair` neighbours:
//            K as [block][dim / pair][16 tokens][pair],  V as [token / pair][dim][pair],
//          with dim padded to a multiple of 16 by zeros. The packing is the same for every instruction set.
enum class Packing : int32_t { kRows = 0, kPanels = 1 };

enum class Status : int32_t { kOk = 0, kNanInQuery = 1, kSlotOutOfRange = 2, kOutsideTable = 3 };

constexpr int64_t item_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// bf16 has dot products of two; float16 is widened 16 in a row by one instruction, and a 32-bit number is alone.
constexpr int64_t pair_of(DType dtype) { return dtype == DType::kBFloat16 ? 2 : 1; }

// One head's slice of one page.
struct HeadSlice {
  char* k;
  char* v;
};

// One pair of K and V arenas: `num_slots` pages, each [kv_head][a head's slice].
struct Arena {
  char* k;
  char* v;
  DType dtype;
  Packing packing;
  int64_t num_slots, num_kv_heads, page_size;
  int64_t head_dim, v_head_dim;  // of a row of K (and of q), of a row of V (and of out)

  int64_t stored(int64_t dim) const { return packing == Packing::kRows ? dim : (dim + 15) / 16 * 16; }
  // Of one token of one head.
  int64_t k_token_bytes() const { return stored(head_dim) * item_bytes(dtype); }
  int64_t v_token_bytes() const { return stored(v_head_dim) * item_bytes(dtype); }

  // From token `begin`, which starts a block, to the end of the page.
  HeadSlice slice(int64_t slot, int64_t head, int64_t begin = 0) const {
    const int64_t token = (slot * num_kv_heads + head) * page_size + begin;
    return {k + token * k_token_bytes(), v + token * v_token_bytes()};
  }
};

// int32 slots, [num_seqs][num_kv_heads][pages]; a stride of 0 lets sequences or heads share a row.
struct PageTable {
  const int32_t* slots;
  int64_t stride_seq, stride_head;

  int32_t slot(int64_t seq, int64_t head, int64_t page) const {
    return slots[seq * stride_seq + head * stride_head + page];
  }
};

// A run of tokens of every sequence: [kv_start, kv_len) of its table.
//
// Where it is `of_blocks`, a table entry is a block of a page: slot * num_kv_heads * blocks per page + block in the
// page, the same number for every head; and heads have runs of their own lengths.
struct Run {
  Arena arena;
  PageTable table;
  int64_t num_seqs, num_pages;  // of the table
  const int64_t* kv_start;      // [num_seqs], of blocks [num_seqs][num_kv_heads]
  const int64_t* kv_len;        // the same
  bool of_blocks = false;
  // [num_seqs][num_kv_heads][tokens of the table] or nullptr: log of how many tokens each stands for, -inf for none.
  const float* log_counts = nullptr;

  int64_t num_lengths() const { return of_blocks ? num_seqs * arena.num_kv_heads : num_seqs; }
  int64_t start(int64_t seq, int64_t head) const { return kv_start[length_of(seq, head)]; }
  int64_t len(int64_t seq, int64_t head) const { return kv_len[length_of(seq, head)]; }

  const float* log_counts_of(int64_t seq, int64_t head) const {
    const int64_t row = seq * arena.num_kv_heads + head;
    return log_counts == nullptr ? nullptr : log_counts + row * num_pages * entry_tokens();
  }

  int64_t num_blocks() const { return num_pages * entry_tokens() / kBlockTokens; }
  int64_t entry_tokens() const { return of_blocks ? kBlockTokens : arena.page_size; }
  // Entries of a table lie in [0, num_entries).
  int64_t num_entries() const {
    const int64_t page_blocks = arena.page_size / kBlockTokens;
    return of_blocks && arena.num_slots > 0 ? ((arena.num_slots - 1) * arena.num_kv_heads + 1) * page_blocks
                                            : arena.num_slots;
  }
  // One head's slice of what an entry stands for, from its token `begin` on, which starts a block.
  HeadSlice slice(int64_t entry, int64_t head, int64_t begin) const {
    if (!of_blocks) return arena.slice(entry, head, begin);
    const int64_t page_blocks = arena.page_size / kBlockTokens, slot_blocks = arena.num_kv_heads * page_blocks;
    return arena.slice(entry / slot_blocks, head, entry % slot_blocks * kBlockTokens + begin);
  }

 private:
  int64_t length_of(int64_t seq, int64_t head) const { return of_blocks ? seq * arena.num_kv_heads + head : seq; }
};

struct Queries {
  const void* data;  // [num_seqs][num_heads][q_len][head_dim], strides in elements, head_dim contiguous
  DType dtype;
  int64_t stride_seq, stride_head, stride_token;
  int64_t num_seqs, num_heads, q_len;
};

// How a score follows from q and k, and how far back a query sees; types.py, ScoreRule.
constexpr int64_t kNoWindow = int64_t{1} << 62;

struct ScoreRule {
  float scale;
  float softcap;   // 0: none
  int64_t window;  // tokens up to the query's own, or kNoWindow
};

// Attention of queries over one run, of which they are the last tokens where it is `causal`.
struct AttendArgs {
  Queries q;
  Run kv;
  ScoreRule rule;
  bool causal;  // where it is not, rule.window is kNoWindow

  int64_t group_size() const { return q.num_heads / kv.arena.num_kv_heads; }

  // Query `i` of q_len sees those of its sequence's tokens that are in [visible_begin, visible_end).
  int64_t visible_end(int64_t seq, int64_t i) const { return causal ? kv.kv_len[seq] - q.q_len + 1 + i : kNoWindow; }
  int64_t visible_begin(int64_t seq, int64_t i) const { return visible_end(seq, i) - rule.window; }
};

// The share of a call that one thread computes at a time: some query rows of each of some KV heads over a range of
// tokens. Row r of a KV head is query head kv_head * group_size + r / q_len, query token r % q_len.
//
// An item walks pages, and inside a page its heads, because that is how they lie in memory: on a 2-core Xeon 6, 16 KiB
// slices of one head in random pages were read at 20 GB/s, whole pages of 8 heads at 28, one long run at 31. The fewer
// rows, the more of their queries and output stay in L1: docs/architecture.md, section 5.
constexpr int64_t kMaxItemRows = 24;
constexpr int64_t kMaxHeadRows = 16;

struct WorkItem {
  int64_t run, seq;
  int64_t head_begin, head_end;
  int64_t row_begin, row_end;      // of every one of these heads; at most kMaxHeadRows
  int64_t token_begin, token_end;  // inside [kv_start, kv_len), and not before what its first query sees

  int64_t head_rows() const { return row_end - row_begin; }
  int64_t num_rows() const { return (head_end - head_begin) * head_rows(); }  // at most kMaxItemRows
};

// How much each block of 16 tokens of an item weighs in each of its rows: in the end sum * exp(base - lse).
// [head][row][blocks of the item], `stride` from a row to the next.
struct BlockMass {
  float *sum, *base;
  int64_t stride;
};

// A run of one head's tokens as rows of head_dim (K) and v_head_dim (V) elements; strides in bytes, between tokens.
struct TokenRun {
  char *k, *v;
  int64_t k_stride, v_stride;
};

// What is known of far blocks beside their keys: int8 codes in lines of 64 bytes, stored with 128 added, because the
// dot-product instruction multiplies unsigned by signed ones. A word is 4 neighbouring codes of one lane.
//   kBounds:  the 4 lanes are blocks: [4 words][block]; the words of channel minima, then those of maxima. A block's
//             codes count its own steps.
//   kColumns: the 16 lanes are the tokens of a block: [token]; each has a word of its coordinates.
enum class Codes : int32_t { kBounds = 0, kColumns = 1 };
constexpr int64_t kLineBytes = 64, kLaneBlocks = 4;

// Queries as int8 weights of codes. Row r of KV head h of sequence s is (s * num_kv_heads + h) * rows_per_head + r.
struct CodeQueries {
  const int8_t* weights;   // [num_rows][num_lines][64], in the order of codes
  const int32_t* offsets;  // [num_rows], 128 times the sum of a row's weights of one lane
  const float* scales;     // [num_rows], what a weight counts
  int64_t rows_per_head, num_lines;
};

// The highest of some ranks: those above `rank`, and the first `num_equal` of those that equal it.
struct Cut {
  int32_t rank;
  int64_t num_equal;
};

// What one instruction set provides; see kernel.cc, which is compiled once for each.
struct KernelTable {
  const char* name;
  // out [head][row][v_head_dim] and lse [head][row] of one item, and its mass where mass.sum is there.
  Status (*attend_item)(const AttendArgs& args, const WorkItem& item, float* out, float* lse, const BlockMass& mass);
  // Tokens [begin, end) of a head's slice of panels <- rows, other tokens untouched; and back.
  void (*pack)(const Arena& arena, HeadSlice to, int64_t begin, int64_t end, const TokenRun& from);
  void (*unpack)(const Arena& arena, HeadSlice from, int64_t begin, int64_t end, const TokenRun& to);
  // Bounds of a block of panels as lane `lane` of its lines; other lanes and padding are not touched.
  void (*make_bounds)(const Arena& arena, const char* k_panel, int64_t lane, uint8_t* codes, float* step);
  // scores[i] of blocks that follow each other: the largest of a head's rows, of bounds the upper one of q.k, of
  // columns that of the best token. steps: [num_blocks] of bounds.
  void (*score_bounds)(const CodeQueries& q, const uint8_t* codes, const float* steps, int64_t first_row,
                       int64_t num_blocks, float* scores);
  void (*score_columns)(const CodeQueries& q, const uint8_t* codes, const float* steps, int64_t first_row,
                        int64_t num_blocks, float* scores);
  // What scores are as numbers that sort alike, -inf as INT32_MIN and NaN as INT32_MAX, and the cut above which the
  // `num_wanted` highest lie; no INT32_MIN is among them. ranks: room for num and 15 more.
  Cut (*cut)(const float* scores, int64_t num, int64_t num_wanted, int32_t* ranks);
  // Reads every byte with plain loads, asking for lines `prefetch_bytes` ahead where that is not 0.
  uint64_t (*read)(const char* data, int64_t num_bytes, int64_t prefetch_bytes);
  // What bf16 products are made of, from registers alone; how many multiply-adds those were.
  int64_t (*dot)(int64_t num_steps);
  // Multiply-adds that an element of K and one of V cost together, in bf16, with a bf16 q: q.k and p.v of all rows of a
  // head. 0 where tiles do them, which `dot` does not measure.
  int64_t (*multiply_adds)(int64_t head_rows);
};

}  // namespace tandem
