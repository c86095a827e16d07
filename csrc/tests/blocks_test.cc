// Runs of blocks, what each block weighs, scores from codes and the choice of the highest, against plain loops.
#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "expected.h"
#include "problem.h"

namespace tandem {
namespace {

// Attention over blocks: the run of every sequence and KV head is a problem of its own, whose tokens lie in blocks of
// one arena. What no head has chosen is NaN there, and table entries behind a run are wild.
struct BlockProblem {
  Shape shape;  // kv_start and kv_len are [num_seqs][num_kv_heads]; page_size is the arena's
  int64_t num_seqs, capacity;
  std::vector<std::unique_ptr<Problem>> pieces;  // [num_seqs][num_kv_heads]
  OwnedArena pages;
  std::vector<int32_t> entries;  // [num_seqs][num_kv_heads][capacity]
  std::vector<char> q_stored;    // [num_seqs][num_q_heads][q_len][head_dim]

  BlockProblem(const Shape& s, int64_t seqs)
      : shape(s),
        num_seqs(seqs),
        capacity(*std::max_element(s.kv_len.begin(), s.kv_len.end()) / kBlockTokens + 2),
        pages({nullptr, nullptr, s.kv_dtype, s.packing, num_slots_of(s, seqs), s.num_kv_heads, s.page_size, s.head_dim,
               s.v_head_dim()}) {
    std::mt19937 random(3);
    for (int64_t at = 0; at < num_runs(); ++at) {
      Shape one = s;
      one.num_kv_heads = 1, one.page_size = kBlockTokens, one.causal = false;
      one.kv_start = {s.kv_start[at]}, one.kv_len = {s.kv_len[at]};
      pieces.push_back(std::make_unique<Problem>(one, [&](Problem& p, std::mt19937& numbers) {
        numbers.discard(static_cast<uint64_t>(at) * 1000);
        fill_normal(p, numbers);
      }));
    }
    for (int64_t at = 0; at < num_runs(); ++at) choose_blocks_of(at, random);
    store_queries();
  }

  static int64_t num_slots_of(const Shape& s, int64_t seqs) {
    const int64_t longest = *std::max_element(s.kv_len.begin(), s.kv_len.end());
    return seqs * (longest / s.page_size + 1) + 2;
  }
  int64_t num_runs() const { return num_seqs * shape.num_kv_heads; }

  // Places of the run's blocks: most of them behind each other, some exchanged, each of one run of a head alone.
  void choose_blocks_of(int64_t at, std::mt19937& random) {
    const int64_t head = at % shape.num_kv_heads, seq = at / shape.num_kv_heads;
    const int64_t page_blocks = shape.page_size / kBlockTokens, num_pages = (pages.arena.num_slots - 2) / num_seqs;
    std::vector<int64_t> slots(num_pages);
    for (int64_t i = 0; i < num_pages; ++i) slots[i] = seq + i * num_seqs;
    std::shuffle(slots.begin(), slots.end(), random);
    std::vector<int32_t> places;
    for (const int64_t slot : slots) {
      for (int64_t i = 0; i < page_blocks; ++i) {
        places.push_back(static_cast<int32_t>(slot * shape.num_kv_heads * page_blocks + i));
      }
    }
    for (size_t i = 0; i + 1 < places.size(); ++i) {
      if (random() % 4 == 0) std::swap(places[i], places[i + 1 + random() % (places.size() - i - 1)]);
    }
    const int64_t num_blocks = shape.kv_len[at] / kBlockTokens;
    for (int64_t i = 0; i < capacity; ++i) {
      entries.push_back(i < num_blocks ? places[i] : kWildSlots[random() % 3]);
    }
    for (int64_t token = shape.kv_start[at]; token < shape.kv_len[at]; ++token) {
      store_token(*pieces[at], head, places[token / kBlockTokens], token);
    }
  }

  void store_token(const Problem& piece, int64_t head, int64_t entry, int64_t token) {
    const Arena& arena = pages.arena;
    const int64_t page_blocks = shape.page_size / kBlockTokens, slot_blocks = shape.num_kv_heads * page_blocks;
    const HeadSlice slice = arena.slice(entry / slot_blocks, head);
    const int64_t in_page = entry % slot_blocks * kBlockTokens + token % kBlockTokens;
    for (int64_t d = 0; d < arena.stored(arena.head_dim); ++d) {
      const float value = d < arena.head_dim ? piece.k[piece.k_at(0, 0, token) + d] : 0.0f;
      store_element(slice.k + k_offset(arena, in_page, d), arena.dtype, value);
    }
    for (int64_t d = 0; d < arena.stored(arena.v_head_dim); ++d) {
      const float value = d < arena.v_head_dim ? piece.v[piece.v_at(0, 0, token) + d] : 0.0f;
      store_element(slice.v + v_offset(arena, in_page, d), arena.dtype, value);
    }
  }

  void store_queries() {
    const int64_t bytes = item_bytes(shape.q_dtype);
    for (const auto& piece : pieces) {
      for (const float value : piece->q) {
        q_stored.resize(q_stored.size() + bytes);
        store_element(&q_stored[q_stored.size() - bytes], shape.q_dtype, value);
      }
    }
  }

  AttendArgs args() const {
    const int64_t row = shape.head_dim, stride_head = shape.q_len * row;
    const Queries q{q_stored.data(),     shape.q_dtype, shape.num_q_heads() * stride_head, stride_head, row, num_seqs,
                    shape.num_q_heads(), shape.q_len};
    const PageTable table{entries.data(), shape.num_kv_heads * capacity, capacity};
    const Run run{pages.arena, table, num_seqs, capacity, shape.kv_start.data(), shape.kv_len.data(), true};
    return {q, run, {pieces[0]->scale, shape.softcap, kNoWindow}, false};
  }
};

struct Weighed {
  Result result;
  std::vector<float> mass;  // [row][capacity]
};

Weighed run_weighed(WorkerPool& pool, const KernelTable& kernels, const BlockProblem& p, bool with_mass) {
  const AttendArgs args = p.args();
  const int64_t num_rows = args.q.num_seqs * args.q.num_heads * args.q.q_len, dim = p.shape.v_head_dim();
  Weighed found{{Status::kOk, std::vector<float>(num_rows * dim, kNan), std::vector<float>(num_rows, kNan)},
                std::vector<float>(with_mass ? num_rows * p.capacity : 0, 0.0f)};
  const int64_t head = args.q.q_len * dim;
  const Output to{found.result.out.data(),
                  DType::kFloat32,
                  args.q.num_heads * head,
                  head,
                  dim,
                  found.result.lse.data(),
                  nullptr,
                  with_mass ? found.mass.data() : nullptr,
                  with_mass ? p.capacity : 0};
  found.result.status = attend(pool, kernels, {args}, to);
  return found;
}

// The share of every block is a weight, or a sum of 16, and right as weights are (expected.h); it is weighed once more
// by its distance to lse: an exponent more, and an exp.
void check_mass(const Problem& piece, int64_t head, int64_t i, const float* mass, int64_t capacity) {
  const Scores scores = scores_of(piece, 0, head, i);
  const double u = std::ldexp(1.0, -24), num = static_cast<double>(std::max<size_t>(scores.score.size(), 1));
  const double exponent = scores.rounding + 16 * u * (scores.largest + std::log(num) + 1);
  const double relative = std::expm1(2 * (exponent + 5 * u * (num / 16 + 2))) + (4 * num + 32) * u;
  double highest = -INFINITY, total = 0.0;
  for (const double score : scores.score) highest = std::max(highest, score);
  for (const double score : scores.score) total += std::exp(score - highest);
  std::vector<double> shares(capacity, 0.0);
  for (size_t t = 0; t < scores.score.size(); ++t) {
    const int64_t token = piece.visible_begin(0, i) + static_cast<int64_t>(t);
    shares[token / kBlockTokens] += std::exp(scores.score[t] - highest) / total;
  }
  for (int64_t block = 0; block < capacity; ++block) {
    const double allowed = relative * shares[block];
    CHECK(std::abs(mass[block] - shares[block]) <= allowed, block, mass[block], shares[block], allowed);
  }
}

void check_blocks(const Shape& shape, int64_t num_seqs) {
  const BlockProblem p(shape, num_seqs);
  std::vector<Expected> expected;
  for (const auto& piece : p.pieces) {
    for (Expected& row : reference(*piece)) expected.push_back(std::move(row));
  }
  WorkerPool pool(2);
  for (const KernelTable* kernels : available_kernels()) {
    current_case() = case_name(*kernels, *p.pieces[0]) + " page_size " + std::to_string(shape.page_size);
    const Weighed found = run_weighed(pool, *kernels, p, true), alone = run_weighed(pool, *kernels, p, false);
    check_close(found.result, expected);
    CHECK(found.result.out == alone.result.out && found.result.lse == alone.result.lse);
    int64_t row = 0;
    for (const auto& piece : p.pieces) {
      for (int64_t head = 0; head < shape.group_size; ++head) {
        for (int64_t i = 0; i < shape.q_len; ++i, ++row) {
          check_mass(*piece, head, i, &found.mass[row * p.capacity], p.capacity);
        }
      }
    }
  }
}

// Heads with nothing, one block, tiles of 4, and more; padding in the first block.
void runs_of_blocks() {
  const std::vector<int64_t> starts = {0, 3, 0, 15}, lens = {16, 144, 0, 64};
  for_each_storage([&](DType kv, DType q, Packing packing) {
    for (const int64_t group_size : {1, 3, 4, 8}) {
      for (const int64_t head_dim : {24, 65, 128}) {
        for (const int64_t page_size : {16, 48, 64}) {
          if ((group_size + head_dim / 8 + page_size / 16) % 2 == 0) continue;  // every second shape
          check_blocks({kv, q, packing, 2, group_size, 1, head_dim, page_size, false, starts, lens}, 2);
        }
      }
    }
    check_blocks({kv, q, packing, 4, 3, 4, 33, 128, false, {0, 1, 14, 0}, {256, 128, 16, 80}, 50}, 1);
    check_blocks({kv, q, packing, 2, 5, 2, 40, 64, false, {0, 7}, {96, 32}, 0, 0.7f}, 1);
  });
}

// Several items of each head, merged: shares are of the whole.
void long_runs_of_blocks() {
  for (const DType kv : kDTypes) {
    check_blocks({kv, kv, Packing::kPanels, 4, 2, 1, 256, 64, false, {0, 9, 0, 0}, {4096, 2064, 16, 3200}}, 1);
  }
}

void wild_entry_in_use() {
  WorkerPool pool(2);
  for (const KernelTable* kernels : available_kernels()) {
    const DType bf16 = DType::kBFloat16;
    BlockProblem p({bf16, bf16, Packing::kPanels, 2, 4, 1, 64, 64, false, {0, 3}, {96, 64}}, 1);
    current_case() = case_name(*kernels, *p.pieces[0]);
    const std::vector<int32_t> good = p.entries;
    const auto outside = static_cast<int32_t>(p.pages.arena.num_slots * 2 * 4);
    for (const int32_t wild : {kWildSlots[0], kWildSlots[1], kWildSlots[2], outside}) {
      for (const int64_t at : {int64_t{0}, int64_t{5}, p.capacity + 3}) {
        p.entries = good;
        p.entries[at] = wild;
        const Status status = run_weighed(pool, *kernels, p, true).result.status;
        CHECK(status == Status::kSlotOutOfRange, wild, at, static_cast<int>(status));
      }
    }
  }
}

// Codes of a pool, exactly as much memory as there must be, and queries to slots [num_seqs][num_pages]. Queries are
// whole numbers up to 127, so that rounding to 8 bits changes nothing.
struct CodeProblem {
  Codes kind;
  int64_t page_blocks, num_lines, rows, dim;
  static constexpr int64_t kSeqs = 2, kHeads = 3, kPages = 70, kSlots = 80;  // more pages than one item scores
  std::vector<uint8_t> codes;
  std::vector<float> steps, q, directions;
  std::vector<int32_t> slots;

  CodeProblem(Codes kind, int64_t blocks, int64_t lines, int64_t num_rows)
      : kind(kind), page_blocks(blocks), num_lines(lines), rows(num_rows), dim(lines * (is_bounds() ? 8 : 4)) {
    std::mt19937 random(11);
    const BlockCodes shape{kind, nullptr, nullptr, kHeads, kSlots, page_blocks};
    codes.resize(kHeads * kSlots * shape.page_units() * num_lines * kLineBytes);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
    if (is_bounds()) steps.resize(kHeads * kSlots * shape.page_units() * kLaneBlocks);
    for (float& step : steps) step = 0.01f * static_cast<float>(1 + random() % 100);
    q.resize(kSeqs * kHeads * rows * dim);
    for (float& x : q) x = static_cast<float>(static_cast<int>(random() % 255) - 127);
    for (int64_t row = 0; row < kSeqs * kHeads * rows; ++row) q[row * dim] = row % 2 == 0 ? 127.0f : -127.0f;
    if (!is_bounds()) directions.resize(kHeads * dim * dim);
    for (int64_t head = 0; head < kHeads && !is_bounds(); ++head) {  // coordinates are other channels in every head
      for (int64_t d = 0; d < dim; ++d) directions[(head * dim + d) * dim + (d + head) % dim] = 1.0f;
    }
    slots = shuffled_slots(kSlots, random);
    std::sort(slots.begin() + 10, slots.begin() + 60);  // some follow each other
    slots.resize(kPages);
    for (int64_t page = 0; page < kPages; ++page) slots.push_back(slots[kPages - 1 - page]);
  }

  bool is_bounds() const { return kind == Codes::kBounds; }
  BlockCodes of_slots() const {
    return {kind, codes.data(), steps.empty() ? nullptr : steps.data(), kHeads, kSlots, page_blocks};
  }
  QueryRows queries() const {
    return {q.data(), DType::kFloat32,      directions.empty() ? nullptr : directions.data(), kSeqs, kHeads, rows,
            dim,      is_bounds() ? 0 : dim};
  }

  // Weight i of a lane: of bounds what meets the minima, then what meets the maxima.
  int64_t weight(int64_t row, int64_t i) const {
    const auto at = [&](int64_t d) { return static_cast<int64_t>(q[row * dim + d]); };
    if (is_bounds()) return i < dim ? std::min<int64_t>(at(i), 0) : std::max<int64_t>(at(i - dim), 0);
    return at((i - row / rows % kHeads + dim) % dim);
  }

  // [lane] of a unit in a row.
  int64_t dot(const uint8_t* unit, int64_t row, int64_t num_lanes, int64_t lane) const {
    const int64_t line_words = kLineBytes / 4 / num_lanes;
    int64_t sum = 0;
    for (int64_t i = 0; i < (is_bounds() ? 2 * dim : dim); ++i) {
      const int64_t word = i / 4, in_line = (word % line_words * num_lanes + lane) * 4 + i % 4;
      sum += (int64_t{unit[word / line_words * kLineBytes + in_line]} - 128) * weight(row, i);
    }
    return sum;
  }

  float expected(int64_t seq, int64_t head, int64_t block) const {
    const int64_t units = of_slots().page_units(), in_page = block % page_blocks;
    const int64_t page = head * kSlots + slots[seq * kPages + block / page_blocks];
    const int64_t unit = page * units + (is_bounds() ? in_page / kLaneBlocks : in_page);
    const uint8_t* const of_unit = &codes[unit * num_lines * kLineBytes];
    int64_t most = INT64_MIN;
    for (int64_t row = (seq * kHeads + head) * rows; row < (seq * kHeads + head + 1) * rows; ++row) {
      const int64_t lanes = is_bounds() ? kLaneBlocks : kBlockTokens, first = is_bounds() ? in_page % kLaneBlocks : 0;
      for (int64_t lane = first; lane < (is_bounds() ? first + 1 : lanes); ++lane) {
        most = std::max(most, dot(of_unit, row, lanes, lane));
      }
    }
    const float best = static_cast<float>(most);
    return is_bounds() ? best * steps[page * units * kLaneBlocks + in_page] : best;
  }
};

void scores_from_codes() {
  WorkerPool pool(2);
  constexpr int64_t kSeqs = CodeProblem::kSeqs, kHeads = CodeProblem::kHeads, kPages = CodeProblem::kPages;
  for (const Codes kind : {Codes::kBounds, Codes::kColumns}) {
    for (const int64_t page_blocks : {1, 3, 4, 8}) {
      for (const int64_t rows : {1, 2, 3, 4, 9}) {
        const CodeProblem p(kind, page_blocks, 1 + rows % 3, rows);
        const int64_t num_blocks = kPages * page_blocks;
        for (const KernelTable* kernels : available_kernels()) {
          current_case() = std::string(kernels->name) + (p.is_bounds() ? " bounds" : " columns") + " page_blocks " +
                           std::to_string(page_blocks) + " rows " + std::to_string(rows);
          std::vector<float> scores(kSeqs * kHeads * num_blocks, kNan);
          const PageTable slots{p.slots.data(), kPages, 0};
          const Status status = score_blocks(pool, *kernels, p.of_slots(), p.queries(), slots, kPages, scores.data());
          CHECK(status == Status::kOk, static_cast<int>(status));
          for (int64_t i = 0; i < kSeqs * kHeads * num_blocks; ++i) {
            const int64_t row = i / num_blocks;
            const float want = p.expected(row / kHeads, row % kHeads, i % num_blocks);
            CHECK(scores[i] == want, i, scores[i], want);
          }
        }
      }
    }
  }
}

void wild_slot_of_codes() {
  WorkerPool pool(1);
  CodeProblem p(Codes::kColumns, 4, 1, 1);
  std::vector<float> scores(CodeProblem::kSeqs * CodeProblem::kHeads * CodeProblem::kPages * 4);
  const std::vector<int32_t> good = p.slots;
  for (const int32_t wild : {kWildSlots[0], kWildSlots[1], kWildSlots[2], static_cast<int32_t>(CodeProblem::kSlots)}) {
    for (const size_t at : {size_t{0}, good.size() - 1}) {
      p.slots = good;
      p.slots[at] = wild;
      const PageTable slots{p.slots.data(), CodeProblem::kPages, 0};
      const Status status = score_blocks(pool, *available_kernels()[0], p.of_slots(), p.queries(), slots,
                                         CodeProblem::kPages, scores.data());
      CHECK(status == Status::kSlotOutOfRange, wild, static_cast<int>(status));
    }
  }
}

// Bounds of pages hold every key, and touch no other slot.
void bounds_of_pages() {
  WorkerPool pool(2);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const KernelTable* kernels : available_kernels()) {
    for (const DType dtype : kDTypes) {
      for (const int64_t dim : {3, 64, 80, 256}) {
        const int64_t num_heads = 2, num_slots = 4, page_blocks = 3;
        OwnedArena pages({nullptr, nullptr, dtype, Packing::kPanels, num_slots, num_heads, 16 * page_blocks, dim, dim});
        current_case() = shape_name(*kernels, pages.arena);
        const int64_t words = 2 * ((dim + 3) / 4), num_lines = (words + 3) / 4, unit_bytes = num_lines * kLineBytes;
        std::vector<uint8_t> codes(num_heads * num_slots * unit_bytes, 7);
        std::vector<float> steps(num_heads * num_slots * kLaneBlocks, kNan), keys(num_heads * 16 * page_blocks * dim);
        const int32_t slot = 2;
        for (int64_t i = 0; i < static_cast<int64_t>(keys.size()); ++i) {
          const int64_t d = i % dim, token = i / dim % (16 * page_blocks), head = i / dim / (16 * page_blocks);
          keys[i] = rounded(dtype, normal(random));
          store_element(pages.arena.slice(slot, head).k + k_offset(pages.arena, token, d), dtype, keys[i]);
        }
        const Status status = make_bounds(pool, *kernels, pages.arena, {slot}, num_lines, codes.data(), steps.data());
        CHECK(status == Status::kOk, static_cast<int>(status));
        for (int64_t i = 0; i < static_cast<int64_t>(keys.size()); ++i) {
          const int64_t d = i % dim, token = i / dim % (16 * page_blocks), head = i / dim / (16 * page_blocks);
          const int64_t unit = head * num_slots + slot, lane = token / 16, high = words / 2 + d / 4;
          const auto code = [&](int64_t word) {
            return static_cast<int>(
                       codes[unit * unit_bytes + word / 4 * kLineBytes + (word % 4 * 4 + lane) * 4 + d % 4]) -
                   128;
          };
          const float step = steps[unit * kLaneBlocks + lane];
          CHECK(static_cast<float>(code(d / 4)) * step <= keys[i], i, keys[i]);
          CHECK(static_cast<float>(code(high)) * step >= keys[i], i, keys[i]);
        }
        for (int64_t i = 0; i < num_heads * num_slots; ++i) {
          if (i % num_slots != slot) CHECK(codes[i * unit_bytes] == 7 && std::isnan(steps[i * kLaneBlocks]), i);
        }
      }
    }
  }
}

// What a choice must be: first tokens, then NaN, then the highest, of equal ones the earliest; never padding nor -inf.
std::vector<int64_t> sorted_choice(const Choice& choice, int64_t seq, int64_t head, int64_t capacity) {
  const float* const scores = choice.scores + seq * choice.stride_seq + head * choice.stride_head;
  const int64_t start = choice.kv_start[seq];
  const auto is_sink = [&](int64_t block) { return block * kBlockTokens < start + choice.num_sink_tokens; };
  const auto rank = [&](int64_t block) {
    if (choice.num_sink_tokens > 0 && is_sink(block)) return 2;
    return std::isnan(scores[block]) ? 1 : 0;
  };
  std::vector<int64_t> blocks;
  for (int64_t block = start / kBlockTokens; block < choice.num_blocks; ++block) {
    if (rank(block) > 0 || scores[block] > -INFINITY) blocks.push_back(block);
  }
  std::stable_sort(blocks.begin(), blocks.end(), [&](int64_t a, int64_t b) {
    if (rank(a) != rank(b)) return rank(a) > rank(b);
    return rank(a) == 0 && scores[a] > scores[b];
  });
  const int64_t wanted = choice.num_wanted;
  blocks.resize(std::min<int64_t>({static_cast<int64_t>(blocks.size()), std::max<int64_t>(wanted, 0), capacity}));
  std::sort(blocks.begin(), blocks.end());
  return blocks;
}

void choices() {
  WorkerPool pool(2);
  std::mt19937 random(5);
  constexpr int64_t kSeqs = 2, kHeads = 3;
  const float odd[] = {0.0f, 1.0f, -1.0f, INFINITY, -INFINITY, kNan, -kNan, 3e38f, -3e38f, 1e-45f, -1e-45f};
  for (int round = 0; round < 2000; ++round) {
    const int64_t page_blocks = std::vector<int64_t>{1, 3, 4}[random() % 3], num_pages = 1 + random() % 40;
    const int64_t num_blocks = num_pages * page_blocks, capacity = 1 + random() % 50;
    std::vector<float> scores(kSeqs * kHeads * num_blocks);
    std::normal_distribution<float> normal;
    for (float& score : scores) score = round % 2 == 0 ? normal(random) : odd[random() % 11];
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < kSeqs; ++i) starts.push_back(random() % 2 == 0 ? 0 : random() % 100);
    std::vector<int32_t> slots = shuffled_slots(kSeqs * num_pages, random);
    const Choice choice{scores.data(),
                        kHeads * num_blocks,
                        num_blocks,
                        kSeqs,
                        kHeads,
                        num_blocks,
                        starts.data(),
                        static_cast<int64_t>(random() % 60) - 1,
                        static_cast<int64_t>(random() % 40 * (random() % 2))};
    std::vector<int32_t> blocks(kSeqs * kHeads * capacity, -7), entries(kSeqs * kHeads * capacity, -7);
    std::vector<int64_t> kv_start(kSeqs * kHeads, -7), kv_len(kSeqs * kHeads, -7);
    const KernelTable& kernels = *available_kernels()[round / 2 % available_kernels().size()];
    choose_blocks(pool, kernels, choice, {slots.data(), num_pages, 0}, page_blocks,
                  {blocks.data(), entries.data(), capacity, kv_start.data(), kv_len.data()});
    for (int64_t at = 0; at < kSeqs * kHeads; ++at) {
      const int64_t seq = at / kHeads, first = starts[seq] / kBlockTokens;
      current_case() = std::string(kernels.name) + " round " + std::to_string(round) + " row " + std::to_string(at);
      const std::vector<int64_t> want = sorted_choice(choice, seq, at % kHeads, capacity);
      CHECK(kv_len[at] == static_cast<int64_t>(want.size()) * kBlockTokens, kv_len[at], want.size());
      const bool is_padded = !want.empty() && want[0] == first;
      CHECK(kv_start[at] == (is_padded ? starts[seq] % kBlockTokens : 0), kv_start[at]);
      for (size_t i = 0; i < want.size(); ++i) {
        const int64_t slot = slots[seq * num_pages + want[i] / page_blocks];
        const int64_t entry = slot * kHeads * page_blocks + want[i] % page_blocks;
        CHECK(blocks[at * capacity + i] == want[i], i, blocks[at * capacity + i], want[i]);
        CHECK(entries[at * capacity + i] == entry, i, entries[at * capacity + i], entry);
      }
    }
  }
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  using namespace tandem;
  return run_tests({{"runs of blocks", runs_of_blocks},
                    {"long runs of blocks", long_runs_of_blocks},
                    {"a wild entry in use", wild_entry_in_use},
                    {"scores from codes", scores_from_codes},
                    {"a wild slot of codes", wild_slot_of_codes},
                    {"bounds of pages", bounds_of_pages},
                    {"choices", choices}},
                   argc, argv);
}
