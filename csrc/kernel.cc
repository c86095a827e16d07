// Decode attention over pages, for one instruction set: this file is compiled once for each (CMakeLists.txt).
//
// One work item is read in tiles: one KV head, up to 64 tokens, whose blocks of 16 may lie anywhere. Legend:
//   R rows (query heads of the group x query tokens), T tokens, D dims, P pairs of neighbours in a panel (attend.h).
//   scores_RT = q_RD . k_TD, then an online softmax (Milakov & Gimelshein, 1805.02867), then out_RD += p_RT . v_TD.
// Both products are the same small matrix product on panels (`panel_product`). Accumulation is float32.
//
// No function with external linkage but the table at the end: an inline function of the standard library that is
// compiled here with AVX-512 could be the copy the linker keeps for everybody.
#include "attend.h"
#include "digits.h"
#include "panels.h"
#include "probes.h"
#include "product.h"
#include "quantise.h"
#include "simd.h"
#include "summaries.h"

namespace tandem::TANDEM_ISA {
namespace {

constexpr int64_t kTileTokens = 64, kTileBlocks = kTileTokens / kBlockTokens;

// What is done with a tile: all of it, only what needs K, from q to scores, or only what needs V, from scores to out.
// Known to the compiler, so that attention as a whole has no branch for its halves.
enum class Halves { kBoth, kScores, kValues };
constexpr bool reads_k(Halves halves) { return halves != Halves::kValues; }
constexpr bool reads_v(Halves halves) { return halves != Halves::kScores; }

// What the rows of one head have gathered so far; views into Scratch.
struct HeadRows {
  const uint32_t* q_RD;   // as weights of panels
  const float* exact_RD;  // as they are, for codes
  float *out_RD, *max_R, *sum_RL;
  float* mass;  // of the head's first row; or nullptr
  int64_t num;
  float* logits;         // of the head's first row, from the table's first token on; of a half alone
  int64_t logit_stride;  // from a row to the next
};

// What one item needs beside the pages: about 240 KiB, on the worker's stack.
struct alignas(64) Scratch {
  uint32_t q_RD[kMaxItemRows * kMaxHeadDim];
  float exact_RD[kMaxItemRows * kMaxHeadDim];
  float out_RD[kMaxItemRows * kMaxHeadDim];
  float max_R[kMaxItemRows];
  float sum_RL[kMaxItemRows * kLanes];                                 // added up over the lanes at the end
  int64_t visible_begin_R[kMaxHeadRows], visible_end_R[kMaxHeadRows];  // row r of every head sees tokens in between
  uint32_t p_RT[kMaxHeadRows * kTileTokens];
  float score_RT[kMaxHeadRows * kTileTokens];
  float highest_R[kMaxHeadRows];  // of a tile's scores
  Ahead ahead;
  Stretch ahead_stretches[4 * kTileBlocks];
  BlockMass mass;
  int64_t mass_block;  // of the item, where the tile begins
  int row_lines;       // that a pass of the softmax over one row asks for
  alignas(64) char k_tile[kTileTokens * kMaxHeadDim * 4];
  alignas(64) char v_tile[kTileTokens * kMaxHeadDim * 4];
  WholeScratch whole;
};

// Tokens [begin, end) of one head's table, starting at a block; [valid_begin, valid_end) may be read.
struct Tile {
  int64_t head, begin, end, valid_begin, valid_end;
  const float* log_counts;  // of its tokens; or nullptr
  Run::Place places[kTileBlocks];
  HeadSlice blocks[kTileBlocks];  // their panels, rows or codes

  int64_t num_blocks() const { return (end - begin + kBlockTokens - 1) / kBlockTokens; }
  const Part& arena() const { return *places[0].arena; }  // of a tile that lies in one arena

  // Its blocks that follow the first `skip`, as far as they lie in one arena.
  Tile of_one_arena(int64_t skip) const {
    Tile part = *this;
    int64_t num = 1;
    while (skip + num < num_blocks() && places[skip + num].arena == places[skip].arena) ++num;
    part.begin = begin + skip * kBlockTokens;
    part.end = min64(part.begin + num * kBlockTokens, end);
    part.valid_begin = max64(part.begin, valid_begin);
    part.valid_end = max64(min64(part.end, valid_end), part.valid_begin);
    if (log_counts != nullptr) part.log_counts = log_counts + skip * kBlockTokens;
    for (int64_t i = 0; i < num; ++i) {
      part.places[i] = places[skip + i];
      part.blocks[i] = blocks[skip + i];
    }
    return part;
  }
  bool has_one_arena() const {
    for (int64_t i = 1; i < num_blocks(); ++i) {
      if (places[i].arena != places[0].arena) return false;
    }
    return true;
  }
  // Blocks behind `first`, itself included, that follow each other in one page.
  int64_t num_in_page(int64_t first) const {
    int64_t num = 1;
    while (first + num < num_blocks() && places[first + num].slice.k == places[first].slice.k &&
           places[first + num].token == places[first].token + num * kBlockTokens) {
      ++num;
    }
    return num;
  }
  // Whether every block's K and V begin where those of the one before end.
  bool is_one_run() const {
    for (int64_t i = 1; i < num_blocks(); ++i) {
      const HeadSlice before = blocks[i - 1];
      if (blocks[i].k != before.k + arena().k_block_bytes || blocks[i].v != before.v + arena().v_block_bytes)
        return false;
    }
    return true;
  }
};

// One query row as float32; false where it holds a NaN.
bool load_query(const AttendArgs& args, int64_t at, float* row) {
  const int64_t dim = args.kv.arena().head_dim;
  if (args.q.dtype == DType::kFloat32) {
    std::memcpy(row, static_cast<const float*>(args.q.data) + at, dim * 4);
  } else if (args.q.dtype == DType::kBFloat16) {
    const Half* q = static_cast<const Half*>(args.q.data) + at;
    for (int64_t d = 0; d < dim; ++d) row[d] = as_float(static_cast<uint32_t>(q[d]) << 16);
  } else {
    uint16_t halves[kMaxHeadDim] = {};
    std::memcpy(halves, static_cast<const Half*>(args.q.data) + at, dim * 2);
    for (int64_t d = 0; d < dim; d += kLanes) store(row + d, widen_half(halves + d));
  }
  int has_nan = 0;
  for (int64_t d = 0; d < dim; ++d) has_nan |= row[d] != row[d];
  return has_nan == 0;
}

// The item's query rows as weights, zero-padded to stored dims; false where one holds a NaN.
template <class Element>
bool prepare_queries(const AttendArgs& args, const WorkItem& item, int64_t stored, Scratch& s) {
  alignas(64) float row[kMaxHeadDim] = {};
  uint32_t* weights = s.q_RD;
  for (int64_t kv_head = item.head_begin; kv_head < item.head_end; ++kv_head) {
    for (int64_t r = item.row_begin; r < item.row_end; ++r, weights += stored) {
      const int64_t head = kv_head * args.group_size() + r / args.q.q_len, token = r % args.q.q_len;
      const int64_t at = item.seq * args.q.stride_seq + head * args.q.stride_head + token * args.q.stride_token;
      if (!load_query(args, at, row)) return false;
      for (int64_t d = 0; d < stored; d += kLanes) Element::put(load(row + d), d, stored, weights);
      std::memcpy(s.exact_RD + (weights - s.q_RD), row, stored * 4);
      s.visible_begin_R[r - item.row_begin] = args.visible_begin(item.seq, token);
      s.visible_end_R[r - item.row_begin] = args.visible_end(item.seq, token);
    }
  }
  return true;
}

// Points the tile at panels: the page's own, or a copy in scratch where the page holds rows or the tile holds tokens
// that must not be read (an open page, padding). True where they were copied, which lie one behind the other. Of a half
// alone, its K or its V.
template <Halves kHalves, DType kDType>
bool stage(Tile& tile, Scratch& s) {
  const Arena& arena = tile.arena();
  const bool whole = tile.valid_begin == tile.begin && tile.valid_end == tile.end && tile.end % kBlockTokens == 0;
  if (whole && arena.packing == Packing::kPanels) return false;
  const BlockShape<kDType> k(arena.head_dim), v(arena.v_head_dim);
  char *k_to = s.k_tile, *v_to = s.v_tile;
  int64_t t = tile.begin;
  for (HeadSlice* block = tile.blocks; t < tile.end; ++block, t += kBlockTokens) {
    const int64_t begin = min64(max64(tile.valid_begin - t, 0), kBlockTokens);
    const int64_t end = max64(min64(tile.valid_end - t, kBlockTokens), begin);
    if (arena.packing == Packing::kPanels) {
      if (reads_k(kHalves)) copy_k(k, block->k, begin, end, k_to);
      if (reads_v(kHalves)) copy_v(v, block->v, begin, end, v_to);
    } else {
      if (end - begin < kBlockTokens) {
        if (reads_k(kHalves)) std::memset(k_to, 0, k.block_bytes());
        if (reads_v(kHalves)) std::memset(v_to, 0, v.block_bytes());
      }
      if (reads_k(kHalves)) put_k(k, block->k + begin * k.row_bytes(), k.row_bytes(), begin, end, k_to);
      if (reads_v(kHalves)) put_v(v, block->v + begin * v.row_bytes(), v.row_bytes(), begin, end, v_to);
    }
    *block = {k_to, v_to};
    k_to += k.block_bytes();
    v_to += v.block_bytes();
  }
  return true;
}

// Dot products of row r -> scores that follow the rule, -inf where the row does not see a token; their maximum. In
// place, or where they go as logits: past the caches, for a line that is fetched to be overwritten is one of K less
// (4 rows read 12 % more of K a second, one row 5 %).
template <Halves kHalves, bool kHasCap>
float score_row(const ScoreRule& rule, const Tile& tile, int64_t num_tokens, int64_t r, const HeadRows& rows,
                Scratch& s) {
  float* const score = s.score_RT + r * kTileTokens;
  const int64_t begin = max64(tile.valid_begin, s.visible_begin_R[r]) - tile.begin;
  const int64_t end = min64(tile.valid_end, s.visible_end_R[r]) - tile.begin;
  s.ahead.ask(s.row_lines);
  Vec tile_max = splat(-INFINITY);
  for (int64_t t = 0; t < num_tokens; t += kLanes) {
    Vec x = load(score + t) * rule.scale;
    if constexpr (kHasCap) x = tanh(x / rule.softcap) * rule.softcap;
    if (tile.log_counts != nullptr) {
      const Vec count = load(tile.log_counts + t);
      x = count == splat(-INFINITY) ? count : x + count;  // what stands for nothing may be NaN
    }
    if (t < begin || t + kLanes > end) x = keep_lanes(x, begin - t, end - t);
    if constexpr (reads_v(kHalves)) {
      store(score + t, x);
      tile_max = max(x, tile_max);
    } else {
      stream(rows.logits + r * rows.logit_stride + tile.begin + t, x);
    }
  }
  return reduce_max(tile_max);
}

// Logits of row r -> its scores, -inf where there is no token; their maximum. Asks for those of the head's next tile,
// which comes after those of the other heads: with 4 rows 3 % of a call.
inline float load_row(const Tile& tile, int64_t num_tokens, int64_t r, const HeadRows& rows, Scratch& s) {
  float* const score = s.score_RT + r * kTileTokens;
  const float* const from = rows.logits + r * rows.logit_stride + tile.begin;
  const int64_t begin = tile.valid_begin - tile.begin, end = tile.valid_end - tile.begin;
  s.ahead.ask(s.row_lines);
  Vec tile_max = splat(-INFINITY);
  for (int64_t t = 0; t < num_tokens; t += kLanes) {
    if (t % kBlockTokens == 0) __builtin_prefetch(from + kTileTokens + t, 0, 2);
    Vec x = load(from + t);
    if (t < begin || t + kLanes > end) x = keep_lanes(x, begin - t, end - t);
    store(score + t, x);
    tile_max = max(x, tile_max);
  }
  return reduce_max(tile_max);
}

// The scores of a tile, from dot products or from logits, and the highest of each row where a softmax follows.
template <Halves kHalves>
void settle_scores(const ScoreRule& rule, const Tile& tile, int64_t num_tokens, const HeadRows& rows, Scratch& s) {
  for (int64_t r = 0; r < rows.num; ++r) {
    if constexpr (reads_k(kHalves)) {
      s.highest_R[r] = rule.softcap == 0.0f ? score_row<kHalves, false>(rule, tile, num_tokens, r, rows, s)
                                            : score_row<kHalves, true>(rule, tile, num_tokens, r, rows, s);
    } else {
      s.highest_R[r] = load_row(tile, num_tokens, r, rows, s);
    }
  }
}

// Raises the running maximum of row r and rescales what the row has gathered so far; what to subtract from scores.
float raise_maximum(float highest, int64_t stored, int64_t r, const HeadRows& rows) {
  const float old_max = rows.max_R[r];
  if (highest > old_max) {
    const Vec shrink = exp_nonpositive(splat(old_max - highest));
    float *const sum = rows.sum_RL + r * kLanes, *const out = rows.out_RD + r * stored;
    store(sum, load(sum) * shrink);
    for (int64_t d = 0; d < stored; d += kLanes) store(out + d, load(out + d) * shrink);
    rows.max_R[r] = highest;
  }
  return rows.max_R[r] == -INFINITY ? 0.0f : rows.max_R[r];  // nothing visible yet: every probability is 0
}

// Scores of a tile -> probabilities relative to each row's running maximum, as weights of V. Step by step over all
// rows: each step is a chain of dependent instructions, and those of different rows overlap.
template <class Element>
void softmax(int64_t num_tokens, int64_t stored, const HeadRows& rows, Scratch& s) {
  float base_R[kMaxHeadRows];
  for (int64_t r = 0; r < rows.num; ++r) base_R[r] = raise_maximum(s.highest_R[r], stored, r, rows);
  for (int64_t r = 0; r < rows.num; ++r) {
    float *const score = s.score_RT + r * kTileTokens, *const sum = rows.sum_RL + r * kLanes;
    uint32_t* const p = s.p_RT + r * kTileTokens;
    s.ahead.ask(s.row_lines);
    Vec total = load(sum), of_block{};
    for (int64_t t = 0; t < num_tokens; t += kLanes) {
      const Vec x = exp_nonpositive(load(score + t) - base_R[r]);
      total += x;
      Element::put(x, t, num_tokens, p);
      if (rows.mass == nullptr) continue;
      of_block += x;
      if ((t + kLanes) % kBlockTokens == 0) {
        float* const mass = rows.mass + r * s.mass.stride + s.mass_block + t / kBlockTokens;
        mass[0] = reduce_add(of_block);
        mass[s.mass.base - s.mass.sum] = base_R[r];
        of_block = Vec{};
      }
    }
    store(sum, total);
  }
}

// q . k of a tile of panels.
template <class QueryElement>
void score_panels(const Tile& tile, const HeadRows& rows, int64_t ahead_bytes, Scratch& s) {
  constexpr int64_t kPair = pair_of(QueryElement::kDType), kRowBytes = 16 * lane_bytes<QueryElement>();
  const int64_t stored = padded(tile.arena().head_dim);
  Panel k{{}, kRowBytes, stored / kPair, tile.num_blocks(), 0, 1};
  for (int64_t i = 0; i < tile.num_blocks(); ++i) k.at[i] = tile.blocks[i].k;
  const Accumulators<true> scores{s.score_RT, kTileTokens};
  product<QueryElement>(k, {rows.q_RD, stored}, scores, rows.num, ahead_bytes, s.ahead);
}

// out_RD += p . v of a tile of panels.
template <class Element>
void weigh_panels(const Tile& tile, bool is_one_run, const HeadRows& rows, Scratch& s) {
  constexpr int64_t kPair = pair_of(Element::kDType), kRowBytes = 16 * lane_bytes<Element>();
  const int64_t stored = padded(tile.arena().v_head_dim), num_blocks = tile.num_blocks();
  Panel v{{}, stored / 16 * kRowBytes, num_blocks * kBlockTokens / kPair, stored / 16, kRowBytes, 1};
  if (!is_one_run) {
    v.num_k = kBlockTokens / kPair;
    v.num_parts = num_blocks;
  }
  for (int64_t i = 0; i < num_blocks; ++i) v.at[i] = tile.blocks[i].v;
  const Accumulators<false> out{rows.out_RD, stored};
  product<Element>(v, {s.p_RT, kTileTokens}, out, rows.num, s.ahead.num_bytes(), s.ahead);
}

// A tile of panels, or of rows that become panels.
template <Halves kHalves, class Element, class QueryElement>
void attend_panels(const AttendArgs& args, Tile& tile, const HeadRows& rows, Scratch& s) {
  const int64_t num_tokens = tile.num_blocks() * kBlockTokens, ahead_bytes = s.ahead.num_bytes();
  const int64_t for_scores = reads_v(kHalves) ? ahead_bytes / 3 : ahead_bytes * 3 / 4;
  const bool is_staged = stage<kHalves, Element::kDType>(tile, s);
  if constexpr (reads_k(kHalves)) score_panels<QueryElement>(tile, rows, for_scores, s);
  // Much less than the softmax's share of the time: its loads and stores wait behind a burst.
  s.row_lines = static_cast<int>(min64(16, ahead_bytes / 8 / 64 / ((reads_v(kHalves) ? 2 : 1) * rows.num)));
  settle_scores<kHalves>(args.rule, tile, num_tokens, rows, s);
  if constexpr (reads_v(kHalves)) {
    softmax<Element>(num_tokens, padded(args.kv.arena().v_head_dim), rows, s);
    weigh_panels<Element>(tile, is_staged || tile.is_one_run(), rows, s);
  }
}

// out_RD += p . v of a tile of codes.
template <int kBits>
void add_values(const Tile& tile, int64_t num_tokens, const HeadRows& rows, Scratch& s) {
  const Part& arena = tile.arena();
  const SliceOfV& v = arena.of_v;
  WholeScratch& whole = s.whole;
  const int64_t group_blocks = kBits == 4 ? kGroupDims / 16 : v.num_dims / 16;
  const int64_t ahead_bytes = s.ahead.num_bytes() / v.num_groups;
  for (int64_t group = 0; group < v.num_groups; ++group) {
    float *const scales = whole.token_scales[group], *const zeros = whole.token_zeros[group];
    for (int64_t i = 0; i < tile.num_blocks(); ++i) {
      const char* const slice = tile.places[i].slice.v;
      const int64_t at = 2 * (group * arena.page_size + tile.places[i].token);
      widen_steps(slice + v.scales + at, kBlockTokens, scales + i * kBlockTokens);
      if (kBits == 4) widen_steps(slice + v.zeros + at, kBlockTokens, zeros + i * kBlockTokens);
    }
    const float* const p = reinterpret_cast<const float*>(s.p_RT);  // as Float32 puts them; read as bytes, by `load`
    put_rows<kBits>({p, kTileTokens, num_tokens, scales, zeros}, rows.num, s.row_lines, s.ahead, whole.rows);
    const int64_t first = group * group_blocks, num = min64(group_blocks, v.num_dims / 16 - first);
    Panel panel{{}, v.num_dims * 4, kBlockTokens * kBits / 32, num, 64, tile.num_blocks()};
    if (tile.num_in_page(0) == tile.num_blocks()) {
      panel.num_k = num_tokens * kBits / 32;
      panel.num_parts = 1;
    }
    for (int64_t i = 0; i < tile.num_blocks(); ++i) panel.at[i] = tile.blocks[i].v + first * 64;
    const Accumulators<false> out{rows.out_RD + first * 16, v.num_dims};
    whole_products<kBits>(panel, whole.rows, rows.num, out, ahead_bytes, s.ahead);
  }
}

// q . k of a tile of codes.
template <int kBits>
void score_codes(const Tile& tile, const HeadRows& rows, int64_t ahead_bytes, Scratch& s) {
  const Part& arena = tile.arena();
  const char* codes[kTileBlocks];
  for (int64_t i = 0; i < tile.num_blocks(); ++i) codes[i] = tile.blocks[i].k;
  for (int64_t i = 0; i < tile.num_blocks();) {
    const int64_t num = tile.num_in_page(i);
    const ScoresOfPage page{arena, tile.places[i].slice.k, codes + i, tile.places[i].token, num};
    score_page<kBits>(page, rows.exact_RD, padded(arena.head_dim), rows.num, ahead_bytes * num / tile.num_blocks(),
                      s.score_RT + i * kBlockTokens, s.ahead, s.whole);
    i += num;
  }
}

// A tile of codes: its pages are whole, so nothing has to be hidden but by the softmax.
template <Halves kHalves, int kBits>
void attend_codes(const AttendArgs& args, const Tile& tile, const HeadRows& rows, Scratch& s) {
  // Percentages are of what both halves read: one alone reads half of it in half of the time.
  const int64_t ahead_bytes = s.ahead.num_bytes() * (kHalves == Halves::kBoth ? 1 : 2);
  const int64_t num_tokens = tile.num_blocks() * kBlockTokens;
  if constexpr (reads_k(kHalves)) score_codes<kBits>(tile, rows, ahead_bytes, s);
  s.row_lines = lines_each(ahead_bytes, kSoftmaxPercent, 2 * rows.num);
  settle_scores<kHalves>(args.rule, tile, num_tokens, rows, s);
  if constexpr (reads_v(kHalves)) {
    softmax<Float32>(num_tokens, padded(args.kv.arena().v_head_dim), rows, s);
    s.row_lines = lines_each(ahead_bytes, kWeighPercent, rows.num * tile.arena().of_v.num_groups);
    add_values<kBits>(tile, num_tokens, rows, s);
  }
}

template <Halves kHalves, class Element, class QueryElement>
void attend_part(const AttendArgs& args, Tile& tile, const HeadRows& rows, Scratch& s) {
  switch (tile.arena().packing) {
    case Packing::kInt8: attend_codes<kHalves, 8>(args, tile, rows, s); break;
    case Packing::kInt4: attend_codes<kHalves, 4>(args, tile, rows, s); break;
    default: attend_panels<kHalves, Element, QueryElement>(args, tile, rows, s);
  }
}

template <Halves kHalves, class Element, class QueryElement>
void attend_tile(const AttendArgs& args, Tile& tile, const HeadRows& rows, Scratch& s) {
  if (tile.has_one_arena()) {
    attend_part<kHalves, Element, QueryElement>(args, tile, rows, s);
  } else {
    for (int64_t i = 0; i < tile.num_blocks();) {
      Tile part = tile.of_one_arena(i);
      i += part.num_blocks();
      attend_part<kHalves, Element, QueryElement>(args, part, rows, s);
      s.mass_block += part.num_blocks();
    }
  }
  while (s.ahead.more()) s.ahead.ask(16);
}

// The tile of `head` that starts at a block; false where one of the table's entries points outside the arena.
bool locate(const AttendArgs& args, const WorkItem& item, int64_t head, int64_t begin, Tile& tile) {
  const Run& kv = args.kv;
  const int64_t size = kv.entry_tokens(), end = min64(begin + kTileTokens, item.token_end);
  tile.head = head;
  tile.begin = begin;
  tile.end = tile.valid_end = end;
  tile.valid_begin = max64(begin, item.token_begin);
  tile.log_counts = kv.log_counts == nullptr ? nullptr : kv.log_counts_of(item.seq, head) + begin;
  for (int64_t t = begin, block = 0; t < end; t += kBlockTokens, ++block) {
    const int64_t entry = kv.table.slot(item.seq, head, t / size);
    if (entry < 0 || entry >= kv.num_entries()) return false;
    tile.places[block] = kv.place(entry, head, t % size);
    tile.blocks[block] = tile.places[block].arena->behind(tile.places[block].slice, tile.places[block].token);
  }
  return true;
}

// What is asked for while another tile is computed: its K, then its V, or one of them, in as few stretches as they lie
// in; the scales of quantised pages follow the codes.
template <Halves kHalves>
Ahead ahead_of(const Tile& tile, Stretch* stretches) {
  Stretch* last = stretches;
  const int64_t num_tokens = tile.end - tile.begin;
  const auto add = [&](const char* at, int64_t num_bytes) {
    if (last != stretches && last[-1].end == at) {
      last[-1].end += num_bytes;
    } else {
      *last++ = {at, at + num_bytes};
    }
  };
  const auto is_last_of_page = [&](int64_t block) {
    return block + 1 == tile.num_blocks() || tile.places[block + 1].slice.k != tile.places[block].slice.k;
  };
  for (int64_t block = 0, t = 0; reads_k(kHalves) && t < num_tokens; ++block, t += kBlockTokens) {
    const Part& arena = *tile.places[block].arena;
    const int64_t last_token = min64(kBlockTokens, num_tokens - t);
    add(tile.blocks[block].k, arena.is_quantised() ? arena.k_block_bytes : last_token * arena.k_token_bytes());
    if (arena.is_quantised() && is_last_of_page(block)) {
      add(tile.places[block].slice.k + arena.of_k.scales, arena.k_page_bytes - arena.of_k.scales);
    }
  }
  for (int64_t block = 0, t = 0; reads_v(kHalves) && t < num_tokens; ++block, t += kBlockTokens) {
    const Part& arena = *tile.places[block].arena;
    const int64_t last_token = min64(kBlockTokens, num_tokens - t);
    add(tile.blocks[block].v, arena.is_quantised() ? arena.v_block_bytes : last_token * arena.v_token_bytes());
    if (arena.is_quantised() && is_last_of_page(block)) {
      add(tile.places[block].slice.v + arena.of_v.scales, arena.v_page_bytes - arena.of_v.scales);
    }
  }
  return {stretches->at, stretches->end, stretches + 1, last};
}

HeadRows rows_of(const AttendArgs& args, const WorkItem& item, int64_t head, Scratch& s) {
  const Arena& arena = args.kv.arena();
  const int64_t row = (head - item.head_begin) * item.head_rows(), k_stored = padded(arena.head_dim);
  return {s.q_RD + row * k_stored,
          s.exact_RD + row * k_stored,
          s.out_RD + row * padded(arena.v_head_dim),
          s.max_R + row,
          s.sum_RL + row * kLanes,
          s.mass.sum == nullptr ? nullptr : s.mass.sum + row * s.mass.stride,
          item.head_rows(),
          args.logits == nullptr ? nullptr : args.logits_of(item.seq, head, item.row_begin),
          args.kv.num_tokens()};
}

template <Halves kHalves, class Element, class QueryElement>
Status attend_tiles(const AttendArgs& args, const WorkItem& item, Scratch& s) {
  if (item.token_begin >= item.token_end) return Status::kOk;
  const TileShapes shapes(item.head_rows());
  Tile next;
  bool more = true;
  if (!locate(args, item, item.head_begin, item.token_begin / 16 * 16, next)) return Status::kSlotOutOfRange;
  while (more) {
    Tile tile = next;
    const bool last_head = tile.head + 1 == item.head_end;
    more = !last_head || tile.end < item.token_end;
    if (more) {
      const int64_t head = last_head ? item.head_begin : tile.head + 1, begin = last_head ? tile.end : tile.begin;
      if (!locate(args, item, head, begin, next)) return Status::kSlotOutOfRange;
      s.ahead = ahead_of<kHalves>(next, s.ahead_stretches);
    }
    s.mass_block = tile.begin / kBlockTokens - item.token_begin / kBlockTokens;
    attend_tile<kHalves, Element, QueryElement>(args, tile, rows_of(args, item, tile.head, s), s);
  }
  return Status::kOk;
}

void begin_rows(const WorkItem& item, int64_t stored, Scratch& s) {
  std::memset(s.out_RD, 0, item.num_rows() * stored * 4);
  std::memset(s.sum_RL, 0, item.num_rows() * kLanes * 4);
  for (int64_t r = 0; r < item.num_rows(); ++r) s.max_R[r] = -INFINITY;
}

void finish_rows(const WorkItem& item, int64_t dim, const Scratch& s, float* out, float* lse) {
  const int64_t stored = padded(dim);
  for (int64_t r = 0; r < item.num_rows(); ++r) {
    const float sum = reduce_add(load(s.sum_RL + r * kLanes)), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < dim; ++d) out[r * dim + d] = s.out_RD[r * stored + d] * inverse;
    lse[r] = sum == 0.0f ? -INFINITY : s.max_R[r] + logf(sum);
  }
}

template <class Element, class QueryElement>
Status attend_item_as(const AttendArgs& args, const WorkItem& item, float* out, float* lse, const BlockMass& mass) {
  Scratch s;
  s.mass = mass;
  const int64_t dim = args.kv.arena().v_head_dim;
  if (!prepare_queries<QueryElement>(args, item, padded(args.kv.arena().head_dim), s)) return Status::kNanInQuery;
  begin_rows(item, padded(dim), s);
  const Status status = attend_tiles<Halves::kBoth, Element, QueryElement>(args, item, s);
  finish_rows(item, dim, s, out, lse);
  return status;
}

template <class QueryElement>
Status score_item_as(const AttendArgs& args, const WorkItem& item) {
  Scratch s;
  s.mass = {nullptr, nullptr, 0};
  if (!prepare_queries<QueryElement>(args, item, padded(args.kv.arena().head_dim), s)) return Status::kNanInQuery;
  const Status status = attend_tiles<Halves::kScores, QueryElement, QueryElement>(args, item, s);
  drain();
  return status;
}

template <class Element>
Status weigh_item_as(const AttendArgs& args, const WorkItem& item, float* out, float* lse, const BlockMass& mass) {
  Scratch s;
  s.mass = mass;
  const int64_t dim = args.kv.arena().v_head_dim;
  begin_rows(item, padded(dim), s);
  const Status status = attend_tiles<Halves::kValues, Element, Element>(args, item, s);
  finish_rows(item, dim, s, out, lse);
  return status;
}

// How V and K are multiplied.
template <class V, class K>
struct Elements {
  using OfV = V;
  using OfK = K;
};

// Both halves take the same for the same rows, so that they give the bits of the whole.
template <class Body>
Status with_elements(const AttendArgs& args, const WorkItem& item, const Body& body) {
  (void)item;
  if (args.kv.arena().dtype == DType::kFloat32) return body(Elements<Float32, Float32>());
  if (args.kv.arena().dtype == DType::kFloat16) return body(Elements<Float16, Float16>());
#if defined(TANDEM_BF16_DOT)
  if (item.head_rows() >= kMinDotRows) {
    if (args.q.dtype == DType::kBFloat16) return body(Elements<Bf16Dot<true>, Bf16Dot<false>>());
    return body(Elements<Bf16Dot<true>, Bf16Dot<true>>());
  }
#endif
  return body(Elements<Bf16Wide, Bf16Wide>());
}

Status attend_item(const AttendArgs& args, const WorkItem& item, float* out, float* lse, const BlockMass& mass) {
  return with_elements(args, item, [&](auto elements) {
    using E = decltype(elements);
    return attend_item_as<typename E::OfV, typename E::OfK>(args, item, out, lse, mass);
  });
}

Status score_item(const AttendArgs& args, const WorkItem& item) {
  return with_elements(args, item,
                       [&](auto elements) { return score_item_as<typename decltype(elements)::OfK>(args, item); });
}

Status weigh_item(const AttendArgs& args, const WorkItem& item, float* out, float* lse, const BlockMass& mass) {
  return with_elements(args, item, [&](auto elements) {
    return weigh_item_as<typename decltype(elements)::OfV>(args, item, out, lse, mass);
  });
}

}  // namespace

#define TANDEM_STRING_(x) #x
#define TANDEM_STRING(x) TANDEM_STRING_(x)
extern const KernelTable kTable;
const KernelTable kTable{TANDEM_STRING(TANDEM_ISA),
                         attend_item,
                         score_item,
                         weigh_item,
                         pack,
                         unpack,
                         make_bounds,
                         score_bounds,
                         score_columns,
                         cut,
                         read,
                         dot,
                         multiply_adds};

}  // namespace tandem::TANDEM_ISA
