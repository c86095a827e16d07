// Moves between plain tensors and pages: every bit arrives, nothing else is touched, a wild slot is refused.
#include "pages.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "paged.h"

namespace tandem {
namespace {

constexpr int64_t kNumSeqs = 2, kNumKvHeads = 3, kNumPages = 4;
constexpr char kUntouched = 0x5A;

// K and V [num_seqs][num_kv_heads][num_tokens][head_dim] of random bits, NaNs among them. Rows lie `gap` bytes apart,
// K's and V's gaps differ, and the gaps are never touched.
struct Tokens {
  int64_t row_bytes, num_tokens, k_row, v_row;
  std::vector<char> k, v;

  Tokens(const Arena& arena, int64_t num_tokens)
      : row_bytes(arena.head_dim * item_bytes(arena.dtype)),
        num_tokens(num_tokens),
        k_row(row_bytes + 8),
        v_row(row_bytes + 4),
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
      for (int64_t i = 0; i < row_bytes; ++i) k_at(seq, head, token)[i] = static_cast<char>(random());
      for (int64_t i = 0; i < row_bytes; ++i) v_at(seq, head, token)[i] = static_cast<char>(random());
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

  static Arena shape(DType dtype, Packing packing, int64_t page_size, int64_t head_dim) {
    const int64_t num_slots = kNumSeqs * kNumKvHeads * kNumPages + 3;
    return {nullptr, nullptr, dtype, packing, num_slots, kNumKvHeads, page_size, head_dim};
  }

  Fixture(DType dtype, Packing packing, int64_t page_size, int64_t head_dim)
      : pages(shape(dtype, packing, page_size, head_dim)),
        slots(shuffled_slots(pages.arena.num_slots, random)),
        table{slots.data(), kNumKvHeads * kNumPages, kNumPages},
        tokens(pages.arena, kNumPages * page_size),
        num_tokens(kNumPages * page_size) {
    tokens.randomize(random);
  }
};

// Calls body(fixture) for every dtype, packing, page_size and head_dim.
template <class Body>
void for_each_shape(const KernelTable& kernels, const Body& body) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
      for (const int64_t page_size : {16, 48, 64}) {
        for (const int64_t head_dim : {2, 8, 64, 80, 256}) {
          Fixture f(dtype, packing, page_size, head_dim);
          current_case() = shape_name(kernels, f.pages.arena);
          body(f);
        }
      }
    }
  }
}

// `arena` holds tokens [0, num_tokens) of the table exactly as attend.h says, its padding 0.
void check_stored(Fixture& f, const Arena& arena, const PageTable& table, int64_t num_tokens) {
  const int64_t bytes = item_bytes(arena.dtype);
  const char zeros[4] = {};
  f.tokens.for_each_row([&](int64_t seq, int64_t head, int64_t token) {
    if (token >= num_tokens) return;
    const int64_t at = arena.offset(table.slot(seq, head, token / arena.page_size), head);
    const int64_t in_page = token % arena.page_size;
    for (int64_t d = 0; d < arena.stored_dim(); ++d) {
      const bool pad = d >= arena.head_dim;
      const char* k = pad ? zeros : f.tokens.k_at(seq, head, token) + d * bytes;
      const char* v = pad ? zeros : f.tokens.v_at(seq, head, token) + d * bytes;
      CHECK(std::memcmp(arena.k + at + k_offset(arena, in_page, d), k, bytes) == 0, "K", seq, head, token, d);
      CHECK(std::memcmp(arena.v + at + v_offset(arena, in_page, d), v, bytes) == 0, "V", seq, head, token, d);
    }
  });
}

// gather brings back tokens [begin, end) bit for bit and writes nothing between the rows.
void check_gather(WorkerPool& pool, const KernelTable& kernels, Fixture& f, const Arena& arena, const PageTable& table,
                  int64_t begin, int64_t end) {
  Tokens back(arena, end - begin);
  const Status status = gather(pool, kernels, arena, table, kNumSeqs, begin, end, back.rows_from(0));
  CHECK(status == Status::kOk, begin, end);
  Tokens expected(arena, end - begin);
  expected.for_each_row([&](int64_t seq, int64_t head, int64_t token) {
    std::memcpy(expected.k_at(seq, head, token), f.tokens.k_at(seq, head, begin + token), back.row_bytes);
    std::memcpy(expected.v_at(seq, head, token), f.tokens.v_at(seq, head, begin + token), back.row_bytes);
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

// Appends all tokens in runs of odd lengths, as decoding and prefill chunks do.
void append_in_runs(WorkerPool& pool, const KernelTable& kernels, Fixture& f) {
  const int64_t lengths[] = {1, 5, 40, 1, 0, 17, 31};
  for (int64_t begin = 0, i = 0; begin < f.num_tokens; ++i) {
    const int64_t end = std::min(begin + lengths[i % 7], f.num_tokens);
    CHECK(append(pool, kernels, f.pages.arena, f.table, kNumSeqs, begin, end, f.tokens.rows_from(begin)) ==
          Status::kOk);
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
        OwnedArena far(Fixture::shape(f.pages.arena.dtype, packing, f.pages.arena.page_size, f.pages.arena.head_dim));
        const std::vector<int32_t> far_slots = shuffled_slots(far.arena.num_slots, f.random);
        const PageTable far_table{far_slots.data(), f.table.stride_seq, f.table.stride_head};
        const int64_t num_pages = kNumSeqs * kNumKvHeads * kNumPages;
        CHECK(move_pages(pool, *kernels, f.pages.arena, far.arena, f.slots.data(), far_slots.data(), num_pages) ==
              Status::kOk);
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
      const OwnedArena untouched(arena);
      const int64_t begin = arena.page_size - 3, end = arena.page_size + 18, bytes = item_bytes(arena.dtype);
      CHECK(append(pool, *kernels, arena, f.table, kNumSeqs, begin, end, f.tokens.rows_from(begin)) == Status::kOk);
      std::vector<char> k = untouched.k, v = untouched.v;
      f.tokens.for_each_row([&](int64_t seq, int64_t head, int64_t token) {
        if (token < begin || token >= end) return;
        const int64_t at = arena.offset(f.table.slot(seq, head, token / arena.page_size), head);
        const int64_t in_page = token % arena.page_size;
        for (int64_t d = 0; d < arena.stored_dim(); ++d) {
          const char zeros[4] = {};
          const bool pad = d >= arena.head_dim;
          std::memcpy(&k[at + k_offset(arena, in_page, d)], pad ? zeros : f.tokens.k_at(seq, head, token) + d * bytes,
                      bytes);
          std::memcpy(&v[at + v_offset(arena, in_page, d)], pad ? zeros : f.tokens.v_at(seq, head, token) + d * bytes,
                      bytes);
        }
      });
      CHECK(f.pages.k == k && f.pages.v == v);
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
      const auto append_run = [&](int64_t begin, int64_t end) {
        return append(pool, kernels, f.pages.arena, table, kNumSeqs, begin, end, f.tokens.rows_from(begin));
      };
      const auto gather_run = [&](int64_t begin, int64_t end) {
        return gather(pool, kernels, f.pages.arena, table, kNumSeqs, begin, end, back.rows_from(0));
      };
      for (const int64_t begin : {size, 2 * size, 3 * size - 1}) {
        CHECK(append_run(begin, 3 * size) == Status::kSlotOutOfRange, wild, begin);
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
  Fixture f(DType::kBFloat16, Packing::kRows, 16, 64);
  OwnedArena far(Fixture::shape(DType::kBFloat16, Packing::kPanels, 16, 64));
  const OwnedArena untouched(far.arena);
  const int32_t good[] = {0, 1};
  for (const int32_t wild : {kWildSlots[0], kWildSlots[1], kWildSlots[2], static_cast<int32_t>(far.arena.num_slots)}) {
    const int32_t bad[] = {0, wild};
    CHECK(move_pages(pool, kernels, f.pages.arena, far.arena, good, bad, 2) == Status::kSlotOutOfRange, wild);
    CHECK(move_pages(pool, kernels, f.pages.arena, far.arena, bad, good, 2) == Status::kSlotOutOfRange, wild);
  }
  CHECK(far.k == untouched.k && far.v == untouched.v);
  CHECK(move_pages(pool, kernels, f.pages.arena, far.arena, nullptr, nullptr, 0) == Status::kOk);
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  using namespace tandem;
  return run_tests({{"round trip", round_trip},
                    {"append touches only its run", append_touches_only_its_run},
                    {"wild entries", wild_entries},
                    {"wild moves", wild_moves}},
                   argc, argv);
}
