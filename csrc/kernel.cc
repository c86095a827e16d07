// Decode attention over pages, for one instruction set: this file is compiled once for each (CMakeLists.txt).
//
// One work item is read in tiles: one KV head, up to 64 tokens of one page. Legend:
//   R rows (query heads of the group x query tokens), T tokens, D dims, P pairs of neighbours in a panel (attend.h).
//   scores_RT = q_RD . k_TD, then an online softmax (Milakov & Gimelshein, 1805.02867), then out_RD += p_RT . v_TD.
// Both products are the same small matrix product on panels (`panel_product`). Accumulation is float32.
//
// No function with external linkage but the table at the end: an inline function of the standard library that is
// compiled here with AVX-512 could be the copy the linker keeps for everybody.
#include "attend.h"
#include "panels.h"
#include "simd.h"

namespace tandem::TANDEM_ISA {
namespace {

constexpr int64_t kTileTokens = 64;
constexpr int kMaxTileRows = TANDEM_MAX_TILE_ROWS;

#if defined(__AMX_BF16__)
constexpr int64_t kMinDotRows = 5;  // fewer rows fill too little of a tile: multiply-adds keep up with memory
#elif defined(TANDEM_BF16_DOT)
constexpr int64_t kMinDotRows = 1;
#endif

// ---- The product ---------------------------------------------------------------------------------------------------

// The lines of the tile after this one, asked for a few at a time while this one is computed, in the products and in
// the softmax alike: a core has some 16 requests in flight, and memory idles whenever none is waiting. So the pace
// follows from the rows: at that of 4 rows, 8 had asked for everything before their longest product, p.v, began (15 to
// 25 % of a call).
struct Ahead {
  const char *at = nullptr, *end = nullptr;            // K
  const char *then_at = nullptr, *then_end = nullptr;  // V
  int64_t num_lines = 1;                               // that a step of a product asks for

  int64_t num_bytes() const { return max64(end - at, 0) + then_end - then_at; }

  // Whether any is left; behind the end of K follows V.
  bool more() {
    if (at < end) return true;
    at = then_at;
    end = then_end;
    then_at = then_end;
    return at < end;
  }

  // A run may be overshot by less than `num`.
  void ask(int num) {
    if (!more()) return;
    for (int line = 0; line < num; ++line, at += 64) __builtin_prefetch(at, 0, 2);
  }

  // About `num_bytes` in the next num_steps Steps: whole lines at each, for parts of one were no faster.
  void pace(int64_t num_bytes, int64_t num_steps) { num_lines = max64(1, min64(4, (num_bytes / num_steps + 48) / 64)); }

  // A run of lines that the caller asks for; where none is left, lines at `idle`, which are in the cache.
  const char* take(int64_t num, const char* idle) {
    if (!more()) return idle;
    const char* const run = at;
    at += num * 64;
    return run;
  }
};

// What the num_steps steps of one panel's product ask for.
#if TANDEM_LANES == 16
class Steps {
 public:
  Steps(const Ahead& ahead, int64_t, const char*) : ahead_(ahead) {}
  void give_back(Ahead& ahead) const { ahead = ahead_; }

  // Branches, not a loop: they always go the same way, and a loop took 2 % of a call.
  void ask() {
    if (!ahead_.more()) return;
    __builtin_prefetch(ahead_.at, 0, 2);
    if (ahead_.num_lines > 1) __builtin_prefetch(ahead_.at + 64, 0, 2);
    if (ahead_.num_lines > 2) __builtin_prefetch(ahead_.at + 128, 0, 2);
    if (ahead_.num_lines > 3) __builtin_prefetch(ahead_.at + 192, 0, 2);
    ahead_.at += ahead_.num_lines * 64;
  }

 private:
  Ahead ahead_;  // in registers
};
#else
// Shorter vectors have more and shorter steps: a line at each. At a slower pace, or with a branch in the loop, a call
// was 4 to 10 % slower.
class Steps {
 public:
  Steps(Ahead& ahead, int64_t num_steps, const char* idle) : run_(ahead.take(num_steps, idle)) {}
  void give_back(Ahead&) const {}

  void ask() {
    __builtin_prefetch(run_, 0, 2);
    run_ += 64;
  }

 private:
  const char* run_;
};
#endif

// A panel: num_k rows `k_stride` bytes apart, of blocks of 16 lanes `block_stride` bytes apart.
struct Panel {
  const char* data;
  int64_t k_stride, block_stride, num_k, num_blocks;
};

// Rows of accumulators, a block of 16 lanes beside the next; rows of weights, as an Element prepared them.
struct Accumulators {
  float* data;
  int64_t stride;
};
struct Weights {
  const uint32_t* data;
  int64_t stride;
};

// Bytes of one lane of a panel row: kPair neighbours.
template <class Element>
constexpr int64_t lane_bytes() {
  return pair_of(Element::kDType) * item_bytes(Element::kDType);
}

// acc_R[block * 16 ...] += sum over k of panel[k][block] * weights_R[k], for kRows rows and kBlocks blocks.
template <class Element, int kRows, int kBlocks>
inline void panel_product(const Panel& panel, int64_t block, Weights weights, Accumulators acc, Ahead& ahead) {
  constexpr int kVecs = kBlocks * kVecsPerBlock;
  Vec sum[kRows][kVecs];
  float* const first = acc.data + block * 16;
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) sum[r][n] = load(first + r * acc.stride + n * kLanes);
  }
  const char* row = panel.data + block * panel.block_stride;
  constexpr int64_t kLaneBytes = lane_bytes<Element>();
  Steps steps(ahead, panel.num_k, panel.data);
  for (int64_t k = 0; k < panel.num_k; ++k, row += panel.k_stride) {
    steps.ask();
    typename Element::Panel m[kVecs];
    for (int n = 0; n < kVecs; ++n) {
      const int64_t lane = n % kVecsPerBlock * kLanes;
      m[n] = Element::panel(row + n / kVecsPerBlock * panel.block_stride + lane * kLaneBytes);
    }
    for (int r = 0; r < kRows; ++r) {
      const auto w = Element::weight(weights.data + r * weights.stride, k, panel.num_k);
      for (int n = 0; n < kVecs; ++n) sum[r][n] = Element::mac(sum[r][n], m[n], w);
    }
  }
  steps.give_back(ahead);
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) store(first + r * acc.stride + n * kLanes, sum[r][n]);
  }
}

constexpr int kTileBlocks = kLanes == 16 ? 4 : 1;  // as many accumulators as the registers hold

template <class Element, int kRows>
void product_rows(const Panel& panel, Weights weights, Accumulators acc, Ahead& ahead) {
  int64_t block = 0;
  for (; block + kTileBlocks <= panel.num_blocks; block += kTileBlocks) {
    panel_product<Element, kRows, kTileBlocks>(panel, block, weights, acc, ahead);
  }
  for (; block < panel.num_blocks; ++block) panel_product<Element, kRows, 1>(panel, block, weights, acc, ahead);
}

#if defined(__AMX_BF16__)
// A tile register multiplies up to 16 rows of weights by 32 x 16 numbers of a panel at once, whatever the rows: panels
// are what TDPBF16PS reads. Shapes are set per item: 0 to 3 hold accumulators and 4, 5 weights (num_rows rows), 6 and 7
// hold 16 panel rows.
struct TileShapes {
  explicit TileShapes(int64_t num_rows) {
    alignas(64) uint8_t config[64] = {1};  // palette 1; bytes per row from 16, rows from 48
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = static_cast<uint8_t>(tile >= 6 ? 16 : num_rows);
    }
    _tile_loadconfig(config);
  }
  ~TileShapes() { _tile_release(); }
};

// Four blocks of a panel whose num_k is a multiple of 16.
template <bool kSplit>
void tile_product(const Panel& panel, int64_t block, Weights weights, Accumulators acc, Ahead& ahead) {
  float* c = acc.data + block * 16;
  const int64_t c_stride = acc.stride * 4, w_stride = weights.stride * 4;
  const char* b = panel.data + block * panel.block_stride;
  _tile_loadd(0, c, c_stride);
  _tile_loadd(1, c + 16, c_stride);
  _tile_loadd(2, c + 32, c_stride);
  _tile_loadd(3, c + 48, c_stride);
  Ahead asking = ahead;  // in registers: a store in the loop would hold back the tile loads (12 % of a call)
  for (int64_t k = 0; k < panel.num_k; k += 16, b += 16 * panel.k_stride) {
    _tile_loadd(4, weights.data + k, w_stride);
    if constexpr (kSplit) _tile_loadd(5, weights.data + panel.num_k + k, w_stride);
#define TANDEM_TILE(C, B)                                     \
  asking.ask(16);                                             \
  _tile_loadd(B, b + C * panel.block_stride, panel.k_stride); \
  _tile_dpbf16ps(C, 4, B);                                    \
  if constexpr (kSplit) _tile_dpbf16ps(C, 5, B)
    TANDEM_TILE(0, 6);
    TANDEM_TILE(1, 7);
    TANDEM_TILE(2, 6);
    TANDEM_TILE(3, 7);
#undef TANDEM_TILE
  }
  ahead = asking;
  _tile_stored(0, c, c_stride);
  _tile_stored(1, c + 16, c_stride);
  _tile_stored(2, c + 32, c_stride);
  _tile_stored(3, c + 48, c_stride);
}

// True where tiles did the product.
template <class Element>
bool product_by_tiles(const Panel& panel, Weights weights, Accumulators acc, Ahead& ahead) {
  if constexpr (Element::kIsDot) {
    if (panel.num_k % 16 != 0 || panel.num_blocks % 4 != 0) return false;
    for (int64_t block = 0; block < panel.num_blocks; block += 4) {
      tile_product<Element::kIsSplit>(panel, block, weights, acc, ahead);
    }
    return true;
  }
  return false;
}
#else
struct TileShapes {
  explicit TileShapes(int64_t) {}
};

template <class Element>
bool product_by_tiles(const Panel&, Weights, Accumulators, Ahead&) {
  return false;
}
#endif

// All rows, while some `ahead_bytes` are asked for.
template <class Element>
void product(const Panel& panel, Weights weights, Accumulators acc, int64_t num_rows, int64_t ahead_bytes,
             Ahead& ahead) {
  if (product_by_tiles<Element>(panel, weights, acc, ahead)) return;
  const int64_t num_passes = (num_rows + kMaxTileRows - 1) / kMaxTileRows;
  const int64_t num_panels = panel.num_blocks / kTileBlocks + panel.num_blocks % kTileBlocks;
  ahead.pace(ahead_bytes, num_passes * num_panels * panel.num_k);
  for (int64_t pass = 0, r = 0; pass < num_passes; ++pass) {
    const int64_t rows = (num_rows - r + num_passes - pass - 1) / (num_passes - pass);
    const Weights w{weights.data + r * weights.stride, weights.stride};
    const Accumulators a{acc.data + r * acc.stride, acc.stride};
    switch (rows) {
      case 1: product_rows<Element, 1>(panel, w, a, ahead); break;
      case 2: product_rows<Element, 2>(panel, w, a, ahead); break;
#if TANDEM_MAX_TILE_ROWS > 2
      case 3: product_rows<Element, 3>(panel, w, a, ahead); break;
#endif
#if TANDEM_MAX_TILE_ROWS > 3
      case 4: product_rows<Element, 4>(panel, w, a, ahead); break;
#endif
#if TANDEM_MAX_TILE_ROWS > 4
      case 5: product_rows<Element, 5>(panel, w, a, ahead); break;
#endif
#if TANDEM_MAX_TILE_ROWS > 5
      case 6: product_rows<Element, 6>(panel, w, a, ahead); break;
#endif
    }
    r += rows;
  }
}

// ---- One work item -------------------------------------------------------------------------------------------------

// What the rows of one head have gathered so far; views into Scratch.
struct Rows {
  uint32_t* q_RD;
  float *out_RD, *max_R, *sum_RL;
  int64_t num;
};

// What one item needs beside the pages: about 280 KiB, on the worker's stack.
struct alignas(64) Scratch {
  uint32_t q_RD[kMaxItemRows * kMaxHeadDim];
  float out_RD[kMaxItemRows * kMaxHeadDim];
  float max_R[kMaxItemRows];
  float sum_RL[kMaxItemRows * kLanes];                                 // added up over the lanes at the end
  int64_t visible_begin_R[kMaxHeadRows], visible_end_R[kMaxHeadRows];  // row r of every head sees tokens in between
  uint32_t p_RT[kMaxHeadRows * kTileTokens];
  float score_RT[kMaxHeadRows * kTileTokens];
  Ahead ahead;
  int row_lines;  // that a pass of the softmax over one row asks for
  alignas(64) char k_tile[kTileTokens * kMaxHeadDim * 4];
  alignas(64) char v_tile[kTileTokens * kMaxHeadDim * 4];
};

// Tokens [begin, end) of one head's table, inside one page and starting at a block; [valid_begin, valid_end) may be
// read.
struct Tile {
  int64_t head, begin, end, valid_begin, valid_end;
  char *k, *v;
};

// One query row as float32; false where it holds a NaN.
bool load_query(const AttendArgs& args, int64_t at, float* row) {
  const int64_t dim = args.kv.arena.head_dim;
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
      s.visible_begin_R[r - item.row_begin] = args.visible_begin(item.seq, token);
      s.visible_end_R[r - item.row_begin] = args.visible_end(item.seq, token);
    }
  }
  return true;
}

// Points the tile at panels: the page's own, or a copy in scratch where the page holds rows or the tile holds tokens
// that must not be read (an open page, padding).
template <DType kDType>
void stage(const Arena& arena, Tile& tile, Scratch& s) {
  const bool whole = tile.valid_begin == tile.begin && tile.valid_end == tile.end && tile.end % kBlockTokens == 0;
  if (whole && arena.packing == Packing::kPanels) return;
  const BlockShape<kDType> k(arena.head_dim), v(arena.v_head_dim);
  char *k_to = s.k_tile, *v_to = s.v_tile;
  for (int64_t t = tile.begin; t < tile.end; t += kBlockTokens, k_to += k.block_bytes(), v_to += v.block_bytes()) {
    const int64_t begin = min64(max64(tile.valid_begin - t, 0), kBlockTokens);
    const int64_t end = max64(min64(tile.valid_end - t, kBlockTokens), begin);
    if (arena.packing == Packing::kPanels) {
      copy_k(k, tile.k + (k_to - s.k_tile), begin, end, k_to);
      copy_v(v, tile.v + (v_to - s.v_tile), begin, end, v_to);
      continue;
    }
    if (end - begin < kBlockTokens) {
      std::memset(k_to, 0, k.block_bytes());
      std::memset(v_to, 0, v.block_bytes());
    }
    const int64_t from = t - tile.begin + begin;
    put_k(k, tile.k + from * k.row_bytes(), k.row_bytes(), begin, end, k_to);
    put_v(v, tile.v + from * v.row_bytes(), v.row_bytes(), begin, end, v_to);
  }
  tile.k = s.k_tile;
  tile.v = s.v_tile;
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
    if (t < begin || t + kLanes > end) x = keep_lanes(x, begin - t, end - t);
    store(score + t, x);
    tile_max = max(x, tile_max);
  }
  return reduce_max(tile_max);
}

// Raises the running maximum of row r and rescales what the row has gathered so far; what to subtract from scores.
float raise_maximum(float highest, int64_t stored, int64_t r, const Rows& rows) {
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
void softmax(const ScoreRule& rule, const Tile& tile, int64_t num_tokens, int64_t stored, const Rows& rows,
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
    Vec total = load(sum);
    for (int64_t t = 0; t < num_tokens; t += kLanes) {
      const Vec x = exp_nonpositive(load(score + t) - base_R[r]);
      total += x;
      Element::put(x, t, num_tokens, p);
    }
    store(sum, total);
  }
}

template <class Element, class QueryElement>
void attend_tile(const AttendArgs& args, Tile tile, const Rows& rows, Scratch& s) {
  constexpr int64_t kPair = pair_of(Element::kDType), kRowBytes = 16 * lane_bytes<Element>();
  const int64_t k_stored = padded(args.kv.arena.head_dim), v_stored = padded(args.kv.arena.v_head_dim);
  const int64_t num_blocks = (tile.end - tile.begin + 15) / 16, num_tokens = num_blocks * 16;
  const int64_t ahead_bytes = s.ahead.num_bytes();
  stage<Element::kDType>(args.kv.arena, tile, s);
  for (int64_t r = 0; r < rows.num; ++r) std::memset(s.score_RT + r * kTileTokens, 0, num_tokens * 4);
  const Panel k{tile.k, kRowBytes, k_stored / kPair * kRowBytes, k_stored / kPair, num_blocks};
  product<QueryElement>(k, {rows.q_RD, k_stored}, {s.score_RT, kTileTokens}, rows.num, ahead_bytes / 3, s.ahead);
  // Much less than the softmax's share of the time: its loads and stores wait behind a burst.
  s.row_lines = static_cast<int>(min64(16, ahead_bytes / 8 / 64 / (2 * rows.num)));
  softmax<Element>(args.rule, tile, num_tokens, v_stored, rows, s);
  const Panel v{tile.v, v_stored / 16 * kRowBytes, kRowBytes, num_tokens / kPair, v_stored / 16};
  product<Element>(v, {s.p_RT, kTileTokens}, {rows.out_RD, v_stored}, rows.num, s.ahead.num_bytes(), s.ahead);
  while (s.ahead.more()) s.ahead.ask(16);
}

// The tile of `head` that starts at a block; false where the table's entry points outside the arena.
bool locate(const AttendArgs& args, const WorkItem& item, int64_t head, int64_t begin, Tile& tile) {
  const Arena& arena = args.kv.arena;
  const int64_t in_page = begin % arena.page_size;
  const int64_t slot = args.kv.table.slot(item.seq, head, begin / arena.page_size);
  if (slot < 0 || slot >= arena.num_slots) return false;
  const int64_t end = min64(begin + min64(kTileTokens, arena.page_size - in_page), item.token_end);
  const HeadSlice from = arena.slice(slot, head, in_page);
  tile = {head, begin, end, max64(begin, item.token_begin), end, from.k, from.v};
  return true;
}

template <class Element, class QueryElement>
Status attend_tiles(const AttendArgs& args, const WorkItem& item, Scratch& s) {
  const Arena& arena = args.kv.arena;
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
      const int64_t num_tokens = next.end - next.begin;
      s.ahead = {next.k, next.k + num_tokens * arena.k_token_bytes(), next.v,
                 next.v + num_tokens * arena.v_token_bytes()};
    }
    const int64_t row = (tile.head - item.head_begin) * head_rows;
    const Rows rows{s.q_RD + row * k_stored, s.out_RD + row * v_stored, s.max_R + row, s.sum_RL + row * kLanes,
                    head_rows};
    attend_tile<Element, QueryElement>(args, tile, rows, s);
  }
  return Status::kOk;
}

template <class Element, class QueryElement>
Status attend_item_as(const AttendArgs& args, const WorkItem& item, float* out, float* lse) {
  Scratch s;
  const int64_t num_rows = item.num_rows(), dim = args.kv.arena.v_head_dim, stored = padded(dim);
  if (!prepare_queries<QueryElement>(args, item, padded(args.kv.arena.head_dim), s)) return Status::kNanInQuery;
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

Status attend_item(const AttendArgs& args, const WorkItem& item, float* out, float* lse) {
  if (args.kv.arena.dtype == DType::kFloat32) return attend_item_as<Float32, Float32>(args, item, out, lse);
  if (args.kv.arena.dtype == DType::kFloat16) return attend_item_as<Float16, Float16>(args, item, out, lse);
#if defined(TANDEM_BF16_DOT)
  if (item.head_rows() >= kMinDotRows) {
    if (args.q.dtype == DType::kBFloat16) return attend_item_as<Bf16Dot<true>, Bf16Dot<false>>(args, item, out, lse);
    return attend_item_as<Bf16Dot<true>, Bf16Dot<true>>(args, item, out, lse);
  }
#endif
  return attend_item_as<Bf16Wide, Bf16Wide>(args, item, out, lse);
}

uint64_t read(const char* data, int64_t num_bytes, int64_t prefetch_bytes) {
  IVec sum[4] = {};
  constexpr int64_t kStep = 4 * sizeof(IVec);
  for (int64_t i = 0; i + kStep <= num_bytes; i += kStep) {
    if (prefetch_bytes != 0) {
      for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(data + i + line + prefetch_bytes);
    }
    for (int n = 0; n < 4; ++n) {
      IVec x;
      std::memcpy(&x, data + i + n * sizeof x, sizeof x);
      sum[n] ^= x;
    }
  }
  const IVec all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  uint64_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits ^= static_cast<uint32_t>(all[i]);
  return bits;
}

// ---- What limits the products --------------------------------------------------------------------------------------

#if defined(TANDEM_BF16_DOT) && !defined(__AMX_BF16__)
using VectorElement = Bf16Dot<false>;
constexpr int64_t kWeightParts = 2;  // of p; a bf16 q is one
#else
using VectorElement = Bf16Wide;
constexpr int64_t kWeightParts = 1;
#endif

int64_t multiply_adds(int64_t head_rows) {
#if defined(__AMX_BF16__)
  if (head_rows >= kMinDotRows) return 0;
#endif
  return head_rows * (1 + kWeightParts);
}

int64_t dot(int64_t num_steps) {
  constexpr int kChains = kMaxTileRows > 3 ? 24 : 12;  // more than latency times rate, no more than registers hold
  alignas(64) uint32_t ones[16];
  for (uint32_t& pair : ones) pair = 0x3F803F80;
  asm volatile("" : : "r"(ones) : "memory");  // g++ 12 for Arm writes a constant bf16 1 that its assembler refuses
  auto panel = VectorElement::panel(reinterpret_cast<const char*>(ones));
  const auto weight = VectorElement::weight(ones, 0, 1);
  Vec sum[kChains] = {};
  for (int64_t step = 0; step < num_steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) {
      hide(panel);  // or equal sums would be computed once, and products that do not change
      sum[i] = VectorElement::mac(sum[i], panel, weight);
    }
  }
  Vec all{};
  for (int i = 0; i < kChains; ++i) all += sum[i];
  volatile float keep = reduce_add(all);  // so that the sums are computed
  (void)keep;
  return num_steps * kChains * kLanes * pair_of(VectorElement::kDType);
}

}  // namespace

#define TANDEM_STRING_(x) #x
#define TANDEM_STRING(x) TANDEM_STRING_(x)
extern const KernelTable kTable;
const KernelTable kTable{TANDEM_STRING(TANDEM_ISA), attend_item, pack, unpack, read, dot, multiply_adds};

}  // namespace tandem::TANDEM_ISA
