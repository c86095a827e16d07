// The halves of attention on every instruction set this machine has: together they are `attend`, to the bit, and
// neither touches the memory of what belongs to the other.
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "expected.h"
#include "problem.h"

namespace tandem {
namespace {

// As much memory as something needs, which ends the program where it is read or written.
class Forbidden {
 public:
  explicit Forbidden(size_t num_bytes)
      : num_bytes_(num_bytes), at_(mmap(nullptr, num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    CHECK(at_ != MAP_FAILED);
  }
  ~Forbidden() { munmap(at_, num_bytes_); }
  Forbidden(const Forbidden&) = delete;
  Forbidden& operator=(const Forbidden&) = delete;
  char* data() const { return static_cast<char*>(at_); }

 private:
  size_t num_bytes_;
  void* at_;
};

// Room for the logits of a problem, aligned to 64 bytes.
struct LogitRoom {
  std::vector<float> room;
  float* data;
  int64_t num;

  explicit LogitRoom(const AttendArgs& args)
      : num(args.q.num_seqs * args.q.num_heads * args.q.q_len * args.kv.num_tokens()) {
    room.assign(num + 16, kNan);
    data = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64 / 4;
  }
};

AttendArgs over(const Problem& p, const Arena& arena, LogitRoom& logits) {
  AttendArgs args = args_of(p);
  args.kv.arenas = arena;
  args.logits = logits.data;
  return args;
}

// Scores over pages without V, then what they weigh over pages without K and without queries.
Result run_halves(WorkerPool& pool, const KernelTable& kernels, const Problem& p, LogitRoom& room) {
  const Forbidden none(std::max(p.pages.k.size(), p.pages.v.size()));
  Arena keys = p.pages.arena, values = p.pages.arena;
  keys.v = values.k = none.data();
  CHECK(logits(pool, kernels, {over(p, keys, room)}) == Status::kOk);
  AttendArgs second = over(p, values, room);
  second.q.data = none.data();
  const int64_t num_rows = static_cast<int64_t>(p.q.size()) / p.shape.head_dim, dim = p.shape.v_head_dim();
  const int64_t stride_head = second.q.q_len * dim;
  Result result{Status::kOk, std::vector<float>(num_rows * dim, kNan), std::vector<float>(num_rows, kNan)};
  const Output to{result.out.data(), DType::kFloat32, second.q.num_heads * stride_head, stride_head, dim,
                  result.lse.data(), nullptr};
  result.status = weigh(pool, kernels, {second}, to);
  return result;
}

// Of every row: as many as its sequence has are finite, and the others are -inf.
void check_outside(const Problem& p, const LogitRoom& room) {
  const AttendArgs args = args_of(p);
  const int64_t num_tokens = args.kv.num_tokens(), rows_of_seq = args.q.num_heads * args.q.q_len;
  for (int64_t i = 0; i < room.num; ++i) {
    const int64_t seq = i / num_tokens / rows_of_seq, token = i % num_tokens;
    const bool inside = token >= p.shape.kv_start[seq] && token < p.shape.kv_len[seq];
    CHECK(inside ? std::isfinite(room.data[i]) : room.data[i] == -INFINITY, i, token, room.data[i]);
  }
}

void check_halves(const Problem& p) {
  WorkerPool pool(2), caller(1);
  for (const KernelTable* kernels : available_kernels()) {
    current_case() = case_name(*kernels, p);
    const Result whole = run_attend(pool, *kernels, p);
    LogitRoom room(args_of(p)), again(args_of(p));
    const Result found = run_halves(pool, *kernels, p, room), alone = run_halves(caller, *kernels, p, again);
    CHECK(found.status == Status::kOk && found.out == whole.out && found.lse == whole.lse);
    CHECK(alone.out == whole.out && alone.lse == whole.lse);
    check_outside(p, room);
    for (int64_t i = 0; i < room.num; ++i) CHECK(room.data[i] == again.data[i], i);
  }
}

// Ragged lengths: empty, one token, starts and ends inside blocks and pages and on their edges, starts behind the end.
void every_shape() {
  const std::vector<int64_t> starts = {0, 0, 1, 5, 70, 64, 33, 50}, lens = {0, 1, 3, 6, 131, 192, 33, 20};
  for_each_storage([&](DType kv, DType q, Packing packing) {
    for (const int64_t group_size : {1, 4, 17}) {
      for (const int64_t head_dim : {8, 64, 129}) {
        for (const int64_t page_size : {16, 48, 64}) {
          check_halves(
              Problem({kv, q, packing, 2, group_size, 2, head_dim, page_size, false, starts, lens}, fill_normal));
        }
      }
    }
    check_halves(Problem({kv, q, packing, 2, 3, 2, 40, 16, false, starts, lens, 65, 0.7f}, fill_normal));
  });
}

// Several chunks of one sequence.
void long_sequences() {
  for (const DType kv : kDTypes) {
    for (const Packing packing : {Packing::kRows, Packing::kPanels}) {
      check_halves(Problem({kv, kv, packing, 8, 4, 1, 256, 64, false, {0, 77}, {700, 1030}}, fill_normal));
    }
  }
}

// What is wrong is told by the half that sees it, and nothing is read through it.
void what_is_refused() {
  WorkerPool pool(2);
  for (const KernelTable* kernels : available_kernels()) {
    const auto nan_in_q = [](Problem& p, std::mt19937& random) {
      fill_normal(p, random);
      p.q.back() = kNan;
    };
    const DType bf16 = DType::kBFloat16;
    const Shape shape{bf16, bf16, Packing::kPanels, 2, 4, 1, 64, 16, false, {0, 17}, {70, 40}};
    Problem p(shape, fill_normal), bad_q(shape, nan_in_q);
    current_case() = case_name(*kernels, p);
    LogitRoom room(args_of(p));
    CHECK(logits(pool, *kernels, {over(bad_q, bad_q.pages.arena, room)}) == Status::kNanInQuery);
    std::vector<float> out(2 * 8 * 64), lse(2 * 8);
    const Output to{out.data(), DType::kFloat32, 8 * 64, 64, 64, lse.data(), nullptr};
    for (const int32_t wild : kWildSlots) {
      p.slot(1, 1, 2) = wild;
      CHECK(logits(pool, *kernels, {over(p, p.pages.arena, room)}) == Status::kSlotOutOfRange, wild);
      CHECK(weigh(pool, *kernels, {over(p, p.pages.arena, room)}, to) == Status::kSlotOutOfRange, wild);
    }
    AttendArgs outside = over(p, p.pages.arena, room);
    const int64_t lens[] = {70, p.num_tokens + 1};
    outside.kv.kv_len = lens;
    CHECK(logits(pool, *kernels, {outside}) == Status::kOutsideTable);
    CHECK(weigh(pool, *kernels, {outside}, to) == Status::kOutsideTable);
  }
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  using namespace tandem;
  return run_tests(
      {{"every shape", every_shape}, {"long sequences", long_sequences}, {"what is refused", what_is_refused}}, argc,
      argv);
}
