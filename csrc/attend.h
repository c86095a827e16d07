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
// kInt8, kInt4: a whole page at a time, as codes with scales; see SliceOfK and SliceOfV.
enum class Packing : int32_t { kRows = 0, kPanels = 1, kInt8 = 2, kInt4 = 3 };

enum class Status : int32_t { kOk = 0, kNanInQuery = 1, kSlotOutOfRange = 2, kOutsideTable = 3, kOutOfMemory = 4 };

constexpr int64_t item_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// bf16 has dot products of two; float16 is widened 16 in a row by one instruction, and a 32-bit number is alone.
constexpr int64_t pair_of(DType dtype) { return dtype == DType::kBFloat16 ? 2 : 1; }

// Dims of V that share a scale in int4, and in how many dims of K one channel is kept as it is.
constexpr int64_t kGroupDims = 64;

// In headers that kernel.cc includes: it is compiled for several instruction sets, and no copy of a function of one may
// be taken for another.
#define TANDEM_INLINE inline __attribute__((always_inline))

constexpr TANDEM_INLINE int64_t round_up(int64_t num, int64_t step) { return (num + step - 1) / step * step; }

// Where things lie in a head's slice of K of a quantised page, in bytes; every part begins at a line of 64.
//
// A key is scale[channel] * (code - 128) in int8, scale[channel] * code + zero[channel] in int4: scales and zeros are
// bf16 and hold for all tokens of the page. Codes: int8 [block][channel / 4][16 tokens][4]; int4 [block][channel / 8]
// [16 tokens][4], the low halves of 4 bytes 4 channels and the high halves the 4 that follow.
// Where channels are left out (ThinK, 2407.21018), `index` names those that are kept. In int4 the widest channels are
// kept as they are, [num_exact][token] in the arena's dtype, with a scale of 0; `exact_index` names them.
struct SliceOfK {
  int64_t bits, num_channels, num_exact;  // num_channels: kept and stored, a multiple of 16
  int64_t scales, zeros, exact, index, exact_index, num_bytes;

  int64_t block_bytes() const { return kBlockTokens * num_channels * bits / 8; }
};

// The same of V: a value is scale[group][token] * (code - 128), or scale * code + zero; int8 has one group for all
// dims. Codes: int8 [token / 4][dim][4], int4 [token / 8][dim][4], with 4 tokens in low halves and 4 in high ones.
struct SliceOfV {
  int64_t bits, num_dims, num_groups;  // num_dims: stored, a multiple of 16
  int64_t scales, zeros, num_bytes;

  int64_t block_bytes() const { return kBlockTokens * num_dims * bits / 8; }
};

// One head's slice of one page.
struct HeadSlice {
  char* k;
  char* v;
};

// One pair of K and V arenas: `num_slots` pages, each [kv_head][a head's slice].
struct Arena {
  char* k;
  char* v;
  DType dtype;  // of the rows that go in and come out
  Packing packing;
  int64_t num_slots, num_kv_heads, page_size;
  int64_t head_dim, v_head_dim;  // of a row of K (and of q), of a row of V (and of out)
  int64_t num_channels = 0;      // of K, that quantised pages keep; 0: all

  bool is_quantised() const { return packing >= Packing::kInt8; }
  int64_t stored(int64_t dim) const { return packing == Packing::kRows ? dim : round_up(dim, 16); }

  TANDEM_INLINE SliceOfK slice_of_k() const {
    SliceOfK k{};
    const bool is_int4 = packing == Packing::kInt4, keeps_all = num_channels == 0;
    k.bits = is_int4 ? 4 : 8;
    k.num_channels = round_up(keeps_all ? head_dim : num_channels, 16);
    k.num_exact = is_int4 ? (head_dim + kGroupDims - 1) / kGroupDims : 0;
    k.scales = page_size / kBlockTokens * k.block_bytes();
    k.zeros = k.scales + 2 * k.num_channels;
    k.exact = round_up(k.zeros + (is_int4 ? 2 * k.num_channels : 0), 64);
    k.index = k.exact + round_up(k.num_exact * page_size * item_bytes(dtype), 64);
    k.exact_index = k.index + (keeps_all ? 0 : round_up(k.num_channels, 64));
    k.num_bytes = k.exact_index + (is_int4 ? 64 : 0);
    return k;
  }

  TANDEM_INLINE SliceOfV slice_of_v() const {
    SliceOfV v{};
    const bool is_int4 = packing == Packing::kInt4;
    v.bits = is_int4 ? 4 : 8;
    v.num_dims = round_up(v_head_dim, 16);
    v.num_groups = is_int4 ? (v_head_dim + kGroupDims - 1) / kGroupDims : 1;
    v.scales = page_size / kBlockTokens * v.block_bytes();
    v.zeros = v.scales + 2 * v.num_groups * page_size;
    v.num_bytes = round_up(v.zeros + (is_int4 ? 2 * v.num_groups * page_size : 0), 64);
    return v;
  }

  TANDEM_INLINE int64_t k_slice_bytes() const {
    return is_quantised() ? slice_of_k().num_bytes : page_size * k_token_bytes();
  }
  TANDEM_INLINE int64_t v_slice_bytes() const {
    return is_quantised() ? slice_of_v().num_bytes : page_size * v_token_bytes();
  }
  // Of one token of one head, in rows and panels.
  int64_t k_token_bytes() const { return stored(head_dim) * item_bytes(dtype); }
  int64_t v_token_bytes() const { return stored(v_head_dim) * item_bytes(dtype); }
  // About what a token of one head costs to read.
  TANDEM_INLINE int64_t token_bytes() const { return (k_slice_bytes() + v_slice_bytes()) / page_size; }

  TANDEM_INLINE HeadSlice slice(int64_t slot, int64_t head) const {
    const int64_t at = slot * num_kv_heads + head;
    return {k + at * k_slice_bytes(), v + at * v_slice_bytes()};
  }
};

// An arena among others, with what follows from its shape: computed once, not for every block.
struct Part : Arena {
  SliceOfK of_k;  // where it is quantised
  SliceOfV of_v;
  int64_t k_page_bytes, v_page_bytes;    // of a head
  int64_t k_block_bytes, v_block_bytes;  // of a head's codes, panels or rows

  Part() = default;
  Part(const Arena& arena)
      : Arena(arena),
        of_k(arena.slice_of_k()),
        of_v(arena.slice_of_v()),
        k_page_bytes(arena.k_slice_bytes()),
        v_page_bytes(arena.v_slice_bytes()),
        k_block_bytes(is_quantised() ? of_k.block_bytes() : kBlockTokens * k_token_bytes()),
        v_block_bytes(is_quantised() ? of_v.block_bytes() : kBlockTokens * v_token_bytes()) {}

  TANDEM_INLINE HeadSlice slice(int64_t slot, int64_t head) const {
    const int64_t at = slot * num_kv_heads + head;
    return {k + at * k_page_bytes, v + at * v_page_bytes};
  }
  // What follows token `begin`, which starts a block: all of it in rows and panels, in quantised pages its codes.
  TANDEM_INLINE HeadSlice behind(HeadSlice slice, int64_t begin) const {
    const int64_t block = begin / kBlockTokens;
    return {slice.k + block * k_block_bytes, slice.v + block * v_block_bytes};
  }
};

// Arenas whose pages differ in packing alone. Slots are counted on: those of part i begin at first[i].
constexpr int kMaxArenas = 4;

struct Arenas {
  Part parts[kMaxArenas];
  int64_t first[kMaxArenas + 1];
  int num;

  Arenas(const Arena& one) : parts{Part(one)}, first{0, one.num_slots}, num(1) {}

  void add(const Arena& more) {
    parts[num] = Part(more);
    first[num + 1] = first[num] + more.num_slots;
    ++num;
  }
  // What they have in common.
  const Part& shape() const { return parts[0]; }
  int64_t num_slots() const { return first[num]; }
  TANDEM_INLINE int part_of(int64_t slot) const {
    int part = 0;
    while (slot >= first[part + 1]) ++part;
    return part;
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
  Arenas arenas;
  PageTable table;
  int64_t num_seqs, num_pages;  // of the table
  const int64_t* kv_start;      // [num_seqs], of blocks [num_seqs][num_kv_heads]
  const int64_t* kv_len;        // the same
  bool of_blocks = false;
  // [num_seqs][num_kv_heads][tokens of the table] or nullptr: log of how many tokens each stands for, -inf for none.
  const float* log_counts = nullptr;

  const Part& arena() const { return arenas.shape(); }
  int64_t num_lengths() const { return of_blocks ? num_seqs * arena().num_kv_heads : num_seqs; }
  int64_t start(int64_t seq, int64_t head) const { return kv_start[length_of(seq, head)]; }
  int64_t len(int64_t seq, int64_t head) const { return kv_len[length_of(seq, head)]; }

  const float* log_counts_of(int64_t seq, int64_t head) const {
    const int64_t row = seq * arena().num_kv_heads + head;
    return log_counts == nullptr ? nullptr : log_counts + row * num_tokens();
  }

  int64_t num_tokens() const { return num_pages * entry_tokens(); }  // of the table
  int64_t num_blocks() const { return num_tokens() / kBlockTokens; }
  int64_t entry_tokens() const { return of_blocks ? kBlockTokens : arena().page_size; }
  // Entries of a table lie in [0, num_entries).
  int64_t num_entries() const {
    const int64_t page_blocks = arena().page_size / kBlockTokens, num_slots = arenas.num_slots();
    return of_blocks && num_slots > 0 ? ((num_slots - 1) * arena().num_kv_heads + 1) * page_blocks : num_slots;
  }
  // Where a block lies: a head's slice of a page of one of the arenas, and its first token in that page.
  struct Place {
    const Part* arena;
    HeadSlice slice;
    int64_t token;
  };
  // Of one head, what follows token `begin` of what an entry stands for; it starts a block.
  TANDEM_INLINE Place place(int64_t entry, int64_t head, int64_t begin) const {
    int64_t slot = entry;
    if (of_blocks) {
      const int64_t page_blocks = arena().page_size / kBlockTokens, slot_blocks = arena().num_kv_heads * page_blocks;
      slot = entry / slot_blocks;
      begin += entry % slot_blocks * kBlockTokens;
    }
    const int part = arenas.part_of(slot);
    const Part& found = arenas.parts[part];
    return {&found, found.slice(slot - arenas.first[part], head), begin};
  }

 private:
  int64_t length_of(int64_t seq, int64_t head) const { return of_blocks ? seq * arena().num_kv_heads + head : seq; }
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
  // Of a half of attention alone: its scores, [num_seqs][num_heads][q_len][tokens of the table], which `logits` writes,
  // aligned to 64 bytes, and `weigh` reads.
  float* logits = nullptr;

  int64_t group_size() const { return q.num_heads / kv.arena().num_kv_heads; }
  // Of row `row` of a KV head; see WorkItem.
  float* logits_of(int64_t seq, int64_t head, int64_t row) const {
    return logits + ((seq * q.num_heads + head * group_size()) * q.q_len + row) * kv.num_tokens();
  }

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
  const float* channel_weights = nullptr;  // [head_dim], how much each channel of K matters to queries; for `pack`
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
  // Its halves: scores of the item's tokens to args.logits, in whole blocks, with -inf for tokens of these that are not
  // the item's; and the same as attend_item from there. The first does not read V, the second neither q nor K.
  Status (*score_item)(const AttendArgs& args, const WorkItem& item);
  Status (*weigh_item)(const AttendArgs& args, const WorkItem& item, float* out, float* lse, const BlockMass& mass);
  // Tokens [begin, end) of a head's slice of panels <- rows, other tokens untouched; and back, rounded to the arena's
  // dtype. Quantised pages are packed whole, and not at all where a token is not finite: it is returned, else -1.
  int64_t (*pack)(const Arena& arena, HeadSlice to, int64_t begin, int64_t end, const TokenRun& from);
  void (*unpack)(const Arena& arena, HeadSlice from, int64_t begin, int64_t end, const TokenRun& to);
  // Bounds of the block of a page that starts at `token` as lane `lane` of its lines; other lanes and padding are not
  // touched.
  void (*make_bounds)(const Arena& arena, HeadSlice slice, int64_t token, int64_t lane, uint8_t* codes, float* step);
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
