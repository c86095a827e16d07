// Moves between plain tensors and pages: every bit arrives, nothing else is touched, a wild slot is refused.
#include "pages.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "paged.h"

namespace tandem {
namespace {

constexpr int64_t kNumSeqs = 2, kNumKvHeads = 3, kNumPages = 4;
constexpr char kUntouched = 0x5A;
Refused refused;  // by moves into panels: never anything

// K and V [num_seqs][num_kv_heads][num_tokens][head_dim, v_head_dim] of random bits, NaNs among them. Rows lie apart,
// K's and V's gaps differ, and the gaps are never touched.
struct Tokens {
  int64_t k_bytes, v_bytes, num_tokens, k_row, v_row;
  std::vector<char> k, v;

  Tokens(const Arena& arena, int64_t num_tokens)
      : k_bytes(arena.head_dim * item_bytes(arena.dtype)),
        v_bytes(arena.v_head_dim * item_bytes(arena.dtype)),
        num_tokens(num_tokens),
        k_row(k_bytes + 8),
        v_row(v_bytes + 4),
        k(kNumSeqs * kNumKvHeads * num_tokens * k_row, kUntouched),
        v(kNumSeqs * kNumKvHeads * num_tokens * v_row, kUntouched) {}

  char* k_at(int64_t seq, int64_t head, int64_t token) {
    return k.data() + ((seq * kNumKvHeads + head) * num_tokens + token) * k_row;
  }
  char* v_at(int64_t seq, int64_t head, int64_t token) {
    return v.data() + ((seq * kNumKvHeads + head) * num_tokens + token) * v_row;
  }
  template <class Visit>
  void for_each_row(const Visit& visit) {
    for (int64_t seq = 0; seq < kNumSeqs; ++seq) {
      for (int64_t head = 0; head < kNumKvHeads; ++head) {
        for (int64_t token = 0; token < num_tokens; ++token) visit(seq, head, token);
      }
    }
  }
  void randomize(std::mt19937& random) {
    for_each_row([&](int64_t seq, int64_t head, int64_t token) {
      for (int64_t i = 0; i < k_bytes; ++i) k_at(seq, head, token)[i] = static_cast<char>(random());
      for (int64_t i = 0; i < v_bytes; ++i) v_at(seq, head, token)[i] = static_cast<char>(random());
    });
  }
  // The view whose first token is `token`.
  TokenRows rows_from(int64_t token) {
    const int64_t k_head = num_tokens * k_row, v_head = num_tokens * v_row;
    return {
        k_at(0, 0, token), v_at(0, 0, token), kNumKvHeads * k_head, k_head, k_row, kNumKvHeads * v_head, v_head, v_row};
  }
};

// One table of all sequences and heads over an arena of `shape`, and the tokens that were appended to it.
struct Fixture {
  std::mt19937 random{20};
  OwnedArena pages;
  std::vector<int32_t> slots;
  PageTable table;
  Tokens tokens;
  int64_t num_tokens;

  static Arena shape(DType dtype, Packing packing, int64_t page_size, int64_t head_dim, int64_t v_head_dim) {
    const int64_t num_slots = kNumSeqs * kNumKvHeads * kNumPages + 3;
    return {nullptr, nullptr, dtype, packing, num_slots, kNumKvHeads, page_size, head_dim, v_head_dim};
  }

  explicit Fixture(const Arena& shape)
      : pages(shape),
        slots(shuffled_slots(pages.arena.num_slots, random)),
        table{slots.data(), kNumKvHeads * kNumPages, kNumPages},
        tokens(pages.arena, kNumPages * shape.page_size),
        num_tokens(kNumPages * shape.page_size) {
    tokens.randomize(random);
  }

  // The first of them, which a table of all sequences and heads names.
  std::vector<int32_t> used_slots(const std::vector<int32_t>& slots) const {
    return {slots.begin(), slots.begin() + kNumSeqs * kNumKvHeads * kNumPages};
  }
};

// Calls body(fixture) for every dtype, packing and page_size, and pairs of head_dim and v_head_dim.
template <class Body>
void for_each_shape(const KernelTable& kernels, const Body& body) {
  const std::pair<int64_t, int64_t> dims[] = {{2, 2}, {8, 64}, {64, 64}, {80, 1}, {33, 35}, {255, 256}};
  for (const DType dtype : kDTypes) {
    for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
      for (const int64_t page_size : {16, 48, 64}) {
        for (const auto& [head_dim, v_head_dim] : dims) {
          Fixture f(Fixture::shape(dtype, packing, page_size, head_dim, v_head_dim));
          current_case() = shape_name(kernels, f.pages.arena);
          body(f);
        }
      }
    }
  }
}

// Calls visit(element of K or V in the arena, what it must hold) for every element of a token, padding included.
template <class Visit>
void for_each_element(Fixture& f, const Arena& arena, const PageTable& table, int64_t seq, int64_t head, int64_t token,
                      const Visit& visit) {
  static const char zeros[4] = {};
  const int64_t bytes = item_bytes(arena.dtype), in_page = token % arena.page_size;
  const HeadSlice slice = arena.slice(table.slot(seq, head, token / arena.page_size), head);
  for (int64_t d = 0; d < arena.stored(arena.head_dim); ++d) {
    visit(slice.k + k_offset(arena, in_page, d),
          d < arena.head_dim ? f.tokens.k_at(seq, head, token) + d * bytes : zeros);
  }
  for (int64_t d = 0; d < arena.stored(arena.v_head_dim); ++d) {
    visit(slice.v + v_offset(arena, in_page, d),
          d < arena.v_head_dim ? f.tokens.v_at(seq, head, token) + d * bytes : zeros);
  }
}

// `arena` holds tokens [0, num_tokens) of the table exactly as attend.h says, its padding 0.
void check_stored(Fixture& f, const Arena& arena, const PageTable& table, int64_t num_tokens) {
  f.tokens.for_each_row([&](int64_t seq, int64_t head, int64_t token) {
    if (token >= num_tokens) return;
    for_each_element(f, arena, table, seq, head, token, [&](const char* found, const char* right) {
      CHECK(std::memcmp(found, right, item_bytes(arena.dtype)) == 0, seq, head, token);
    });
  });
}

// gather brings back tokens [begin, end) bit for bit and writes nothing between the rows.
void check_gather(WorkerPool& pool, const KernelTable& kernels, Fixture& f, const Arena& arena, const PageTable& table,
                  int64_t begin, int64_t end) {
  Tokens back(arena, end - begin);
  const TokenRange tokens{table, kNumSeqs, begin, end};
  const Status status = copy_tokens(pool, kernels, arena, tokens, back.rows_from(0), Direction::kGather);
  CHECK(status == Status::kOk, begin, end);
  Tokens expected(arena, end - begin);
  expected.for_each_row([&](int64_t seq, int64_t head, int64_t token) {
    std::memcpy(expected.k_at(seq, head, token), f.tokens.k_at(seq, head, begin + token), back.k_bytes);
    std::memcpy(expected.v_at(seq, head, token), f.tokens.v_at(seq, head, begin + token), back.v_bytes);
  });
  CHECK(back.k == expected.k, "K", begin, end);
  CHECK(back.v == expected.v, "V", begin, end);
}

void check_gathers(WorkerPool& pool, const KernelTable& kernels, Fixture& f, const Arena& arena,
                   const PageTable& table) {
  const int64_t size = arena.page_size, all = f.num_tokens;
  const std::vector<std::pair<int64_t, int64_t>> runs = {
      {0, all}, {0, 0},   {all, all},           {0, 1},           {1, 2},
      {3, 20},  {15, 17}, {size - 1, size + 1}, {size, 3 * size}, {7, all - 5}};
  for (const auto& [begin, end] : runs) check_gather(pool, kernels, f, arena, table, begin, end);
}

Status append_run(WorkerPool& pool, const KernelTable& kernels, Fixture& f, const PageTable& table, int64_t begin,
                  int64_t end) {
  const TokenRange tokens{table, kNumSeqs, begin, end};
  return copy_tokens(pool, kernels, f.pages.arena, tokens, f.tokens.rows_from(begin), Direction::kAppend);
}

// Appends all tokens in runs of odd lengths, as decoding and prefill chunks do.
void append_in_runs(WorkerPool& pool, const KernelTable& kernels, Fixture& f) {
  const int64_t lengths[] = {1, 5, 40, 1, 0, 17, 31};
  for (int64_t begin = 0, i = 0; begin < f.num_tokens; ++i) {
    const int64_t end = std::min(begin + lengths[i % 7], f.num_tokens);
    CHECK(append_run(pool, kernels, f, f.table, begin, end) == Status::kOk);
    begin = end;
  }
}

void round_trip() {
  WorkerPool pool(2);
  for (const KernelTable* kernels : available_kernels()) {
    for_each_shape(*kernels, [&](Fixture& f) {
      append_in_runs(pool, *kernels, f);
      check_stored(f, f.pages.arena, f.table, f.num_tokens);
      check_gathers(pool, *kernels, f, f.pages.arena, f.table);
      for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
        if (packing == Packing::kRows && f.pages.arena.packing == Packing::kPanels) continue;
        Arena shape = f.pages.arena;
        shape.packing = packing;
        OwnedArena far(shape);
        const std::vector<int32_t> far_slots = shuffled_slots(far.arena.num_slots, f.random);
        const PageTable far_table{far_slots.data(), f.table.stride_seq, f.table.stride_head};
        CHECK(move_pages(pool, *kernels, f.pages.arena, far.arena, {f.used_slots(f.slots), f.used_slots(far_slots)},
                         refused) == Status::kOk);
        check_stored(f, far.arena, far_table, f.num_tokens);
        check_gathers(pool, *kernels, f, far.arena, far_table);
      }
    });
  }
}

// A run writes its own tokens and no others: beside it, and in other heads' slices, the poison stays.
void append_touches_only_its_run() {
  WorkerPool pool(2);
  for (const KernelTable* kernels : available_kernels()) {
    for_each_shape(*kernels, [&](Fixture& f) {
      const Arena& arena = f.pages.arena;
      const int64_t begin = arena.page_size - 3, end = arena.page_size + 18, bytes = item_bytes(arena.dtype);
      CHECK(append_run(pool, *kernels, f, f.table, begin, end) == Status::kOk);
      OwnedArena expected(arena);
      f.tokens.for_each_row([&](int64_t seq, int64_t head, int64_t token) {
        if (token < begin || token >= end) return;
        for_each_element(f, expected.arena, f.table, seq, head, token,
                         [&](char* at, const char* right) { std::memcpy(at, right, bytes); });
      });
      CHECK(f.pages.k == expected.k && f.pages.v == expected.v);
    });
  }
}

// Inside one arena, as copy on write does: the copies are right, the sources stay, other slots stay poisoned.
void moves_inside_one_arena() {
  WorkerPool pool(2);
  for (const KernelTable* kernels : available_kernels()) {
    for_each_shape(*kernels, [&](Fixture& f) {
      const Arena& arena = f.pages.arena;
      const std::vector<int32_t> from = {f.slots[0], f.slots[5]}, to = {f.slots.end()[-1], f.slots.end()[-2]};
      append_in_runs(pool, *kernels, f);
      OwnedArena expected(arena);
      expected.k = f.pages.k;
      expected.v = f.pages.v;
      const int64_t k_page = arena.num_kv_heads * arena.page_size * arena.k_token_bytes();
      const int64_t v_page = arena.num_kv_heads * arena.page_size * arena.v_token_bytes();
      for (size_t i = 0; i < from.size(); ++i) {
        std::copy_n(&f.pages.k[from[i] * k_page], k_page, &expected.k[to[i] * k_page]);
        std::copy_n(&f.pages.v[from[i] * v_page], v_page, &expected.v[to[i] * v_page]);
      }
      CHECK(move_pages(pool, *kernels, arena, arena, {from, to}, refused) == Status::kOk);
      CHECK(f.pages.k == expected.k && f.pages.v == expected.v);
    });
  }
}

// Entries outside the run may be wild; one inside is refused before a byte moves.
void wild_entries() {
  WorkerPool pool(2);
  const KernelTable& kernels = *available_kernels().front();
  const auto num_slots = [](const Fixture& f) { return static_cast<int32_t>(f.pages.arena.num_slots); };
  for_each_shape(kernels, [&](Fixture& f) {
    const OwnedArena untouched(f.pages.arena);
    const int64_t size = f.pages.arena.page_size;
    for (const int32_t wild : {kWildSlots[0], kWildSlots[1], kWildSlots[2], num_slots(f)}) {
      std::vector<int32_t> slots = f.slots;
      const PageTable table{slots.data(), f.table.stride_seq, f.table.stride_head};
      slots[1 * table.stride_seq + 2 * table.stride_head + 2] = wild;  // page 2 of the last sequence and head
      Tokens back(f.pages.arena, 3 * size);
      const Tokens empty = back;
      const auto gather_run = [&](int64_t begin, int64_t end) {
        const TokenRange tokens{table, kNumSeqs, begin, end};
        return copy_tokens(pool, kernels, f.pages.arena, tokens, back.rows_from(0), Direction::kGather);
      };
      for (const int64_t begin : {size, 2 * size, 3 * size - 1}) {
        CHECK(append_run(pool, kernels, f, table, begin, 3 * size) == Status::kSlotOutOfRange, wild, begin);
        CHECK(gather_run(begin, 3 * size) == Status::kSlotOutOfRange, wild, begin);
      }
      CHECK(f.pages.k == untouched.k && f.pages.v == untouched.v, wild);
      CHECK(back.k == empty.k && back.v == empty.v, wild);
      CHECK(gather_run(0, 2 * size) == Status::kOk && gather_run(3 * size, 4 * size) == Status::kOk, wild);
    }
  });
}

void wild_moves() {
  WorkerPool pool(2);
  const KernelTable& kernels = *available_kernels().front();
  Fixture f(Fixture::shape(DType::kBFloat16, Packing::kRows, 16, 64, 64));
  OwnedArena far(Fixture::shape(DType::kBFloat16, Packing::kPanels, 16, 64, 64));
  const OwnedArena untouched(far.arena);
  const std::vector<int32_t> good = {0, 1};
  for (const int32_t wild : {kWildSlots[0], kWildSlots[1], kWildSlots[2], static_cast<int32_t>(far.arena.num_slots)}) {
    const std::vector<int32_t> bad = {0, wild};
    CHECK(move_pages(pool, kernels, f.pages.arena, far.arena, {good, bad}, refused) == Status::kSlotOutOfRange, wild);
    CHECK(move_pages(pool, kernels, f.pages.arena, far.arena, {bad, good}, refused) == Status::kSlotOutOfRange, wild);
  }
  CHECK(far.k == untouched.k && far.v == untouched.v);
  CHECK(move_pages(pool, kernels, f.pages.arena, far.arena, {{}, {}}, refused) == Status::kOk);
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  using namespace tandem;
  return run_tests({{"round trip", round_trip},
                    {"append touches only its run", append_touches_only_its_run},
                    {"moves inside one arena", moves_inside_one_arena},
                    {"wild entries", wild_entries},
                    {"wild moves", wild_moves}},
                   argc, argv);
}
