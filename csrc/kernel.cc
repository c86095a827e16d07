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

// What the rows of one head have gathered so far; views into Scratch.
struct HeadRows {
  const uint32_t* q_RD;   // as weights of panels
  const float* exact_RD;  // as they are, for codes
  float *out_RD, *max_R, *sum_RL;
  float* mass;  // of the head's first row; or nullptr
  int64_t num;
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
// that must not be read (an open page, padding). True where they were copied, which lie one behind the other.
template <DType kDType>
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
      copy_k(k, block->k, begin, end, k_to);
      copy_v(v, block->v, begin, end, v_to);
    } else {
      if (end - begin < kBlockTokens) {
        std::memset(k_to, 0, k.block_bytes());
        std::memset(v_to, 0, v.block_bytes());
      }
      put_k(k, block->k + begin * k.row_bytes(), k.row_bytes(), begin, end, k_to);
      put_v(v, block->v + begin * v.row_bytes(), v.row_bytes(), begin, end, v_to);
    }
    *block = {k_to, v_to};
    k_to += k.block_bytes();
    v_to += v.block_bytes();
  }
  return true;
}

// Dot products of row r -> scores that follow the rule, in place, -inf where the row does not see a token; their
// maximum.
template <bool kHasCap>
float score_row(const ScoreRule& rule, const Tile& tile, int64_t num_tokens, int64_t r, Scratch& s) {
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
    store(score + t, x);
    tile_max = max(x, tile_max);
  }
  return reduce_max(tile_max);
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
void softmax(const ScoreRule& rule, const Tile& tile, int64_t num_tokens, int64_t stored, const HeadRows& rows,
             Scratch& s) {
  float base_R[kMaxHeadRows];
  for (int64_t r = 0; r < rows.num; ++r) {
    base_R[r] = rule.softcap == 0.0f ? score_row<false>(rule, tile, num_tokens, r, s)
                                     : score_row<true>(rule, tile, num_tokens, r, s);
  }
  for (int64_t r = 0; r < rows.num; ++r) base_R[r] = raise_maximum(base_R[r], stored, r, rows);
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

// A tile of panels, or of rows that become panels.
template <class Element, class QueryElement>
void attend_panels(const AttendArgs& args, Tile& tile, const HeadRows& rows, Scratch& s) {
  constexpr int64_t kPair = pair_of(Element::kDType), kRowBytes = 16 * lane_bytes<Element>();
  const int64_t k_stored = padded(args.kv.arena().head_dim), v_stored = padded(args.kv.arena().v_head_dim);
  const int64_t num_blocks = tile.num_blocks(), num_tokens = num_blocks * kBlockTokens;
  const int64_t ahead_bytes = s.ahead.num_bytes();
  const bool is_staged = stage<Element::kDType>(tile, s);
  Panel k{{}, kRowBytes, k_stored / kPair, num_blocks, 0, 1};
  Panel v{{}, v_stored / 16 * kRowBytes, num_tokens / kPair, v_stored / 16, kRowBytes, 1};
  if (!is_staged && !tile.is_one_run()) {
    v.num_k = kBlockTokens / kPair;
    v.num_parts = num_blocks;
  }
  for (int64_t i = 0; i < num_blocks; ++i) {
    k.at[i] = tile.blocks[i].k;
    v.at[i] = tile.blocks[i].v;
  }
  const Accumulators<true> scores{s.score_RT, kTileTokens};
  product<QueryElement>(k, {rows.q_RD, k_stored}, scores, rows.num, ahead_bytes / 3, s.ahead);
  // Much less than the softmax's share of the time: its loads and stores wait behind a burst.
  s.row_lines = static_cast<int>(min64(16, ahead_bytes / 8 / 64 / (2 * rows.num)));
  softmax<Element>(args.rule, tile, num_tokens, v_stored, rows, s);
  const Accumulators<false> out{rows.out_RD, v_stored};
  product<Element>(v, {s.p_RT, kTileTokens}, out, rows.num, s.ahead.num_bytes(), s.ahead);
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

// A tile of codes: its pages are whole, so nothing has to be hidden but by the softmax.
template <int kBits>
void attend_codes(const AttendArgs& args, const Tile& tile, const HeadRows& rows, Scratch& s) {
  const Part& arena = tile.arena();
  const int64_t num_tokens = tile.num_blocks() * kBlockTokens, ahead_bytes = s.ahead.num_bytes();
  const char* codes[kTileBlocks];
  for (int64_t i = 0; i < tile.num_blocks(); ++i) codes[i] = tile.blocks[i].k;
  for (int64_t i = 0; i < tile.num_blocks();) {
    const int64_t num = tile.num_in_page(i);
    const ScoresOfPage page{arena, tile.places[i].slice.k, codes + i, tile.places[i].token, num};
    score_page<kBits>(page, rows.exact_RD, padded(arena.head_dim), rows.num, ahead_bytes * num / tile.num_blocks(),
                      s.score_RT + i * kBlockTokens, s.ahead, s.whole);
    i += num;
  }
  s.row_lines = lines_each(ahead_bytes, kSoftmaxPercent, 2 * rows.num);
  softmax<Float32>(args.rule, tile, num_tokens, padded(arena.v_head_dim), rows, s);
  s.row_lines = lines_each(ahead_bytes, kWeighPercent, rows.num * arena.of_v.num_groups);
  add_values<kBits>(tile, num_tokens, rows, s);
}

template <class Element, class QueryElement>
void attend_part(const AttendArgs& args, Tile& tile, const HeadRows& rows, Scratch& s) {
  switch (tile.arena().packing) {
    case Packing::kInt8: attend_codes<8>(args, tile, rows, s); break;
    case Packing::kInt4: attend_codes<4>(args, tile, rows, s); break;
    default: attend_panels<Element, QueryElement>(args, tile, rows, s);
  }
}

template <class Element, class QueryElement>
void attend_tile(const AttendArgs& args, Tile& tile, const HeadRows& rows, Scratch& s) {
  if (tile.has_one_arena()) {
    attend_part<Element, QueryElement>(args, tile, rows, s);
  } else {
    for (int64_t i = 0; i < tile.num_blocks();) {
      Tile part = tile.of_one_arena(i);
      i += part.num_blocks();
      attend_part<Element, QueryElement>(args, part, rows, s);
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

// What is asked for while another tile is computed: its K, then its V, in as few stretches as they lie in; the scales
// of quantised pages follow the codes.
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
  for (int64_t block = 0, t = 0; t < num_tokens; ++block, t += kBlockTokens) {
    const Part& arena = *tile.places[block].arena;
    const int64_t last_token = min64(kBlockTokens, num_tokens - t);
    add(tile.blocks[block].k, arena.is_quantised() ? arena.k_block_bytes : last_token * arena.k_token_bytes());
    if (arena.is_quantised() && is_last_of_page(block)) {
      add(tile.places[block].slice.k + arena.of_k.scales, arena.k_page_bytes - arena.of_k.scales);
    }
  }
  for (int64_t block = 0, t = 0; t < num_tokens; ++block, t += kBlockTokens) {
    const Part& arena = *tile.places[block].arena;
    const int64_t last_token = min64(kBlockTokens, num_tokens - t);
    add(tile.blocks[block].v, arena.is_quantised() ? arena.v_block_bytes : last_token * arena.v_token_bytes());
    if (arena.is_quantised() && is_last_of_page(block)) {
      add(tile.places[block].slice.v + arena.of_v.scales, arena.v_page_bytes - arena.of_v.scales);
    }
  }
  return {stretches->at, stretches->end, stretches + 1, last};
}

template <class Element, class QueryElement>
Status attend_tiles(const AttendArgs& args, const WorkItem& item, Scratch& s) {
  const Arena& arena = args.kv.arena();
  const int64_t k_stored = padded(arena.head_dim), v_stored = padded(arena.v_head_dim), head_rows = item.head_rows();
  if (item.token_begin >= item.token_end) return Status::kOk;
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
      s.ahead = ahead_of(next, s.ahead_stretches);
    }
    const int64_t row = (tile.head - item.head_begin) * head_rows;
    const HeadRows rows{s.q_RD + row * k_stored,
                        s.exact_RD + row * k_stored,
                        s.out_RD + row * v_stored,
                        s.max_R + row,
                        s.sum_RL + row * kLanes,
                        s.mass.sum == nullptr ? nullptr : s.mass.sum + row * s.mass.stride,
                        head_rows};
    s.mass_block = tile.begin / kBlockTokens - item.token_begin / kBlockTokens;
    attend_tile<Element, QueryElement>(args, tile, rows, s);
  }
  return Status::kOk;
}

template <class Element, class QueryElement>
Status attend_item_as(const AttendArgs& args, const WorkItem& item, float* out, float* lse, const BlockMass& mass) {
  Scratch s;
  s.mass = mass;
  const int64_t num_rows = item.num_rows(), dim = args.kv.arena().v_head_dim, stored = padded(dim);
  if (!prepare_queries<QueryElement>(args, item, padded(args.kv.arena().head_dim), s)) return Status::kNanInQuery;
  std::memset(s.out_RD, 0, num_rows * stored * 4);
  std::memset(s.sum_RL, 0, num_rows * kLanes * 4);
  for (int64_t r = 0; r < num_rows; ++r) s.max_R[r] = -INFINITY;
  const TileShapes shapes(item.head_rows());
  const Status status = attend_tiles<Element, QueryElement>(args, item, s);
  for (int64_t r = 0; r < num_rows; ++r) {
    const float sum = reduce_add(load(s.sum_RL + r * kLanes)), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < dim; ++d) out[r * dim + d] = s.out_RD[r * stored + d] * inverse;
    lse[r] = sum == 0.0f ? -INFINITY : s.max_R[r] + logf(sum);
  }
  return status;
}

Status attend_item(const AttendArgs& args, const WorkItem& item, float* out, float* lse, const BlockMass& mass) {
  const auto as = [&](auto attend) { return attend(args, item, out, lse, mass); };
  if (args.kv.arena().dtype == DType::kFloat32) return as(attend_item_as<Float32, Float32>);
  if (args.kv.arena().dtype == DType::kFloat16) return as(attend_item_as<Float16, Float16>);
#if defined(TANDEM_BF16_DOT)
  if (item.head_rows() >= kMinDotRows) {
    if (args.q.dtype == DType::kBFloat16) return as(attend_item_as<Bf16Dot<true>, Bf16Dot<false>>);
    return as(attend_item_as<Bf16Dot<true>, Bf16Dot<true>>);
  }
#endif
  return as(attend_item_as<Bf16Wide, Bf16Wide>);
}

}  // namespace

#define TANDEM_STRING_(x) #x
#define TANDEM_STRING(x) TANDEM_STRING_(x)
extern const KernelTable kTable;
const KernelTable kTable{TANDEM_STRING(TANDEM_ISA),
                         attend_item,
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
