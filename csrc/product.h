// The small matrix product that a tile's scores and its output both are, on panels (attend.h), and what it reads ahead,
// for the instruction set this file is compiled for; included by kernel.cc alone, like simd.h.
#pragma once

#include <cstdint>

#include "attend.h"
#include "panels.h"
#include "simd.h"

namespace tandem::TANDEM_ISA {
namespace {

constexpr int kMaxTileRows = TANDEM_MAX_TILE_ROWS;

#if defined(__AMX_BF16__)
constexpr int64_t kMinDotRows = 5;  // fewer rows fill too little of a tile: multiply-adds keep up with memory
#elif defined(TANDEM_BF16_DOT)
constexpr int64_t kMinDotRows = 1;
#endif

// The lines of the tile after this one, asked for a few at a time while this one is computed, in the products and in
// the softmax alike: a core has some 16 requests in flight, and memory idles whenever none is waiting. So the pace
// follows from the rows: at that of 4 rows, 8 had asked for everything before their longest product, p.v, began (15 to
// 25 % of a call).
struct Stretch {
  const char *at, *end;
};

struct Ahead {
  const char *at = nullptr, *end = nullptr;
  const Stretch *next = nullptr, *last = nullptr;  // that follow
  int64_t num_lines = 1;                           // that a step of a product asks for

  int64_t num_bytes() const {
    int64_t sum = max64(end - at, 0);
    for (const Stretch* run = next; run < last; ++run) sum += run->end - run->at;
    return sum;
  }

  // Whether any is left.
  bool more() {
    while (at >= end) {
      if (next == last) return false;
      at = next->at;
      end = next->end;
      ++next;
    }
    return true;
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

// A panel: num_parts times num_k rows `k_stride` bytes apart, of blocks of 16 lanes. Of K every block may lie anywhere,
// and there is one part; of V every part may, and its blocks are `block_stride` bytes apart.
struct Panel {
  const char* at[4];  // of K the blocks, of V the parts
  int64_t k_stride, num_k, num_blocks;
  int64_t block_stride;  // 0: K
  int64_t num_parts;

  const char* place(int64_t part, int64_t block) const {
    return block_stride == 0 ? at[block] : at[part] + block * block_stride;
  }
  int64_t num_weights() const { return num_k * num_parts; }  // of a row
};

// Rows of accumulators, a block of 16 lanes beside the next. Those that are empty count as zeros, whatever they hold:
// known to the compiler, 2 to 4 % of a call with 7 and more rows.
template <bool kEmpty>
struct Accumulators {
  static constexpr bool kIsEmpty = kEmpty;
  float* data;
  int64_t stride;
};
// Rows of weights, as an Element prepared them.
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
template <class Element, int kRows, int kBlocks, class Acc>
inline void panel_product(const Panel& panel, int64_t block, Weights weights, Acc acc, Ahead& ahead) {
  constexpr int kVecs = kBlocks * kVecsPerBlock;
  Vec sum[kRows][kVecs];
  float* const first = acc.data + block * 16;
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) sum[r][n] = Acc::kIsEmpty ? Vec{} : load(first + r * acc.stride + n * kLanes);
  }
  constexpr int64_t kLaneBytes = lane_bytes<Element>();
  const int64_t num_weights = panel.num_weights();
  Steps steps(ahead, num_weights, panel.at[0]);
  for (int64_t part = 0, i = 0; part < panel.num_parts; ++part) {
    const char* row[kBlocks];
    for (int b = 0; b < kBlocks; ++b) row[b] = panel.place(part, block + b);
#pragma GCC unroll 4  // num_k is a multiple of 8; 1 % of a call
    for (int64_t k = 0; k < panel.num_k; ++k, ++i) {
      steps.ask();
      typename Element::Panel m[kVecs];
      for (int n = 0; n < kVecs; ++n) {
        const int64_t lane = n % kVecsPerBlock * kLanes;
        m[n] = Element::panel(row[n / kVecsPerBlock] + k * panel.k_stride + lane * kLaneBytes);
      }
      for (int r = 0; r < kRows; ++r) {
        const auto w = Element::weight(weights.data + r * weights.stride, i, num_weights);
        for (int n = 0; n < kVecs; ++n) sum[r][n] = Element::mac(sum[r][n], m[n], w);
      }
    }
  }
  steps.give_back(ahead);
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) store(first + r * acc.stride + n * kLanes, sum[r][n]);
  }
}

constexpr int kPanelBlocks = kLanes == 16 ? 4 : 1;  // as many accumulators as the registers hold

template <class Element, int kRows, class Acc>
void product_rows(const Panel& panel, Weights weights, Acc acc, Ahead& ahead) {
  int64_t block = 0;
  for (; block + kPanelBlocks <= panel.num_blocks; block += kPanelBlocks) {
    panel_product<Element, kRows, kPanelBlocks>(panel, block, weights, acc, ahead);
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

// Four blocks of a panel of one part, whose num_k is a multiple of 16.
template <bool kSplit, class Acc>
void tile_product(const Panel& panel, int64_t block, Weights weights, Acc acc, Ahead& ahead) {
  float* c = acc.data + block * 16;
  const int64_t c_stride = acc.stride * 4, w_stride = weights.stride * 4;
  const char* b[4];
  for (int i = 0; i < 4; ++i) b[i] = panel.place(0, block + i);
  if constexpr (Acc::kIsEmpty) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_stride);
    _tile_loadd(1, c + 16, c_stride);
    _tile_loadd(2, c + 32, c_stride);
    _tile_loadd(3, c + 48, c_stride);
  }
  Ahead asking = ahead;  // in registers: a store in the loop would hold back the tile loads (12 % of a call)
  for (int64_t k = 0; k < panel.num_k; k += 16) {
    const int64_t at = k * panel.k_stride;
    _tile_loadd(4, weights.data + k, w_stride);
    if constexpr (kSplit) _tile_loadd(5, weights.data + panel.num_k + k, w_stride);
#define TANDEM_TILE(C, B)                    \
  asking.ask(16);                            \
  _tile_loadd(B, b[C] + at, panel.k_stride); \
  _tile_dpbf16ps(C, 4, B);                   \
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
template <class Element, class Acc>
bool product_by_tiles(const Panel& panel, Weights weights, Acc acc, Ahead& ahead) {
  if constexpr (Element::kIsDot) {
    if (panel.num_parts != 1 || panel.num_k % 16 != 0 || panel.num_blocks % 4 != 0) return false;
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

template <class Element, class Acc>
bool product_by_tiles(const Panel&, Weights, Acc, Ahead&) {
  return false;
}
#endif

// All rows, while some `ahead_bytes` are asked for.
template <class Element, class Acc>
void product(const Panel& panel, Weights weights, Acc acc, int64_t num_rows, int64_t ahead_bytes, Ahead& ahead) {
  if (product_by_tiles<Element>(panel, weights, acc, ahead)) return;
  const int64_t num_passes = (num_rows + kMaxTileRows - 1) / kMaxTileRows;
  const int64_t num_panels = panel.num_blocks / kPanelBlocks + panel.num_blocks % kPanelBlocks;
  ahead.pace(ahead_bytes, num_passes * num_panels * panel.num_weights());
  for (int64_t pass = 0, r = 0; pass < num_passes; ++pass) {
    const int64_t rows = (num_rows - r + num_passes - pass - 1) / (num_passes - pass);
    const Weights w{weights.data + r * weights.stride, weights.stride};
    const Acc a{acc.data + r * acc.stride, acc.stride};
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

}  // namespace
}  // namespace tandem::TANDEM_ISA
