// The only file that knows Python. Tensors arrive as addresses: the Python doors (kernels/cpu.py) have checked device,
// dtype, shape and strides, and hold the tensors while a call runs. Every call leaves the interpreter free.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "blocks.h"
#include "driver.h"
#include "kernels.h"
#include "pages.h"
#include "sample.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tandem {
namespace {

using Address = uintptr_t;
using Four = std::tuple<int64_t, int64_t, int64_t, int64_t>;
template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

const KernelTable& kernels_named(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (name == isa.kernels->name && isa.missing.empty()) return *isa.kernels;
  }
  throw nb::value_error(("instruction set not available: " + name).c_str());
}

PageTable table_of(Address slots, std::tuple<int64_t, int64_t> strides) {
  return {as<const int32_t>(slots), std::get<0>(strides), std::get<1>(strides)};
}

// A tensor [num_seqs][num_heads][num_tokens][head_dim] as Python hands it over, head_dim contiguous.
struct Rows {
  Address data;
  DType dtype;
  int64_t num_seqs, num_heads, num_tokens;
  int64_t stride_seq, stride_head, stride_token;  // elements

  char* bytes() const { return as<char>(data); }
  Rows at(Address other) const {
    Rows rows = *this;
    rows.data = other;
    return rows;
  }
  int64_t in_bytes(int64_t stride) const { return stride * item_bytes(dtype); }
};

TokenRows rows_of(const Rows& k, const Rows& v) {
  return {k.bytes(),
          v.bytes(),
          k.in_bytes(k.stride_seq),
          k.in_bytes(k.stride_head),
          k.in_bytes(k.stride_token),
          v.in_bytes(v.stride_seq),
          v.in_bytes(v.stride_head),
          v.in_bytes(v.stride_token)};
}

std::vector<AttendArgs> args_of(const std::vector<Run>& runs, const Rows& q, const ScoreRule& rule, bool causal) {
  const Queries queries{q.bytes(),      q.dtype,    q.stride_seq, q.stride_head,
                        q.stride_token, q.num_seqs, q.num_heads,  q.num_tokens};
  std::vector<AttendArgs> args;
  for (const Run& run : runs) args.push_back({queries, run, rule, causal && &run == &runs.back()});
  return args;
}

// All that `append_and_attend` takes but where the operands lie, which changes with every step.
struct PreparedCall {
  const KernelTable* kernels;
  std::vector<Run> runs;
  Rows q, k, v;
  ScoreRule rule;
};

// A call that was checked and can be made on any thread, once or more often.
struct Call {
  std::function<Status()> make;
};

// A Python callable as a call: on whatever thread makes it, or drops it.
std::function<Status()> call_of(nb::object callable) {
  struct Held {
    nb::object callable;
    ~Held() {
      nb::gil_scoped_acquire acquire;
      callable.reset();
    }
  };
  return [held = std::shared_ptr<Held>(new Held{std::move(callable)})] {
    nb::gil_scoped_acquire acquire;
    held->callable();
    return Status::kOk;
  };
}

// All that `attend` takes but where the operands lie, which changes with every step.
struct PreparedAttend {
  const KernelTable* kernels;
  std::vector<Run> runs;
  Rows q;
  ScoreRule rule;
  bool causal;
};

// append and gather: one copies where the other reads.
auto copying(Direction direction) {
  return [direction](WorkerPool& pool, const std::string& isa, const Arenas& arenas, Address table,
                     std::tuple<int64_t, int64_t> strides, int64_t begin, const Rows& k, const Rows& v) {
    const KernelTable& kernels = kernels_named(isa);
    const TokenRows rows = rows_of(k, v);
    nb::gil_scoped_release release;
    const TokenRange tokens{table_of(table, strides), k.num_seqs, begin, begin + k.num_tokens};
    return copy_tokens(pool, kernels, arenas, tokens, rows, direction);
  };
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // the process's worker pool lives until exit, in a functools.cache
  nb::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  nb::enum_<Packing>(m, "Packing")
      .value("rows", Packing::kRows)
      .value("panels", Packing::kPanels)
      .value("int8", Packing::kInt8)
      .value("int4", Packing::kInt4);
  nb::enum_<Status>(m, "Status")
      .value("ok", Status::kOk)
      .value("nan_in_query", Status::kNanInQuery)
      .value("slot_out_of_range", Status::kSlotOutOfRange)
      .value("outside_table", Status::kOutsideTable)
      .value("out_of_memory", Status::kOutOfMemory);

  nb::class_<WorkerPool>(m, "WorkerPool")
      .def(nb::init<int, std::vector<int>>(), "num_threads"_a, "cpus"_a = std::vector<int>())
      .def("rouse", &WorkerPool::rouse)
      .def_prop_ro("num_threads", &WorkerPool::num_threads);

  nb::class_<Bell>(m, "Bell")
      .def(nb::new_([] { return std::make_shared<Bell>(); }))
      .def_prop_ro("num_rung", &Bell::num_rung)
      .def("ring", &Bell::ring)
      .def("wait", &Bell::wait, "num_rung"_a, "until"_a, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Driver::Job>(m, "Job")
      .def_prop_ro("begin", [](const Driver::Job& job) { return job.begin; })
      .def_prop_ro("end", [](const Driver::Job& job) { return job.end.load(std::memory_order_acquire); })
      .def_prop_ro("status", [](const Driver::Job& job) { return job.status; })
      .def("cancel", [](Driver::Job& job) { job.is_cancelled.store(true); });

  nb::class_<Driver>(m, "Driver")
      .def(nb::init<std::shared_ptr<Bell>, int>(), "bell"_a, "cpu"_a)
      .def(
          "make",
          [](Driver& driver, const Call& call, double not_before) { return driver.submit(call.make, not_before); },
          "call"_a, "not_before"_a)
      .def(
          "do",
          [](Driver& driver, nb::object callable, double not_before) {
            return driver.submit(call_of(std::move(callable)), not_before);
          },
          "callable"_a, "not_before"_a)
      .def("close", &Driver::close, "seconds"_a, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Arena>(m, "Arena")
      .def(
          "__init__",
          [](Arena* arena, Address k, Address v, DType dtype, Packing packing, int64_t num_slots, int64_t num_kv_heads,
             int64_t page_size, int64_t head_dim, int64_t v_head_dim, int64_t num_channels) {
            new (arena) Arena{as<char>(k),  as<char>(v), dtype,    packing,    num_slots,
                              num_kv_heads, page_size,   head_dim, v_head_dim, num_channels};
          },
          "k"_a, "v"_a, "dtype"_a, "packing"_a, "num_slots"_a, "num_kv_heads"_a, "page_size"_a, "head_dim"_a,
          "v_head_dim"_a, "num_channels"_a)
      .def_prop_ro("slice_bytes",
                   [](const Arena& arena) { return std::make_tuple(arena.k_slice_bytes(), arena.v_slice_bytes()); });

  nb::class_<Arenas>(m, "Arenas")
      .def(
          "__init__",
          [](Arenas* arenas, const std::vector<Arena>& parts) {
            if (parts.empty() || parts.size() > kMaxArenas) throw nb::value_error("1 to 4 arenas count their slots on");
            new (arenas) Arenas(parts.front());
            for (size_t part = 1; part < parts.size(); ++part) arenas->add(parts[part]);
          },
          "parts"_a);

  m.def("isas", [] {
    std::vector<std::tuple<std::string, std::string>> names;
    for (const Isa& isa : isas()) names.emplace_back(isa.kernels->name, isa.missing);
    return names;
  });

  nb::class_<Rows>(m, "Rows").def(
      "__init__",
      [](Rows* rows, Address data, DType dtype, const Four& shape, const Four& strides) {
        const auto [num_seqs, num_heads, num_tokens, dim] = shape;
        const auto [stride_seq, stride_head, stride_token, stride_dim] = strides;
        new (rows) Rows{data, dtype, num_seqs, num_heads, num_tokens, stride_seq, stride_head, stride_token};
      },
      "data"_a, "dtype"_a, "shape"_a, "strides"_a);

  nb::class_<Run>(m, "Run").def(
      "__init__",
      [](Run* run, const Arenas& arenas, Address slots, std::tuple<int64_t, int64_t> strides, int64_t num_seqs,
         int64_t num_pages, Address kv_start, Address kv_len, bool of_blocks, Address log_counts) {
        new (run) Run{arenas,    table_of(slots, strides),    num_seqs,
                      num_pages, as<const int64_t>(kv_start), as<const int64_t>(kv_len),
                      of_blocks, as<const float>(log_counts)};
      },
      "arenas"_a, "slots"_a, "strides"_a, "num_seqs"_a, "num_pages"_a, "kv_start"_a, "kv_len"_a, "of_blocks"_a,
      "log_counts"_a);

  nb::class_<ScoreRule>(m, "ScoreRule")
      .def(
          "__init__",
          [](ScoreRule* rule, float scale, std::optional<float> softcap, std::optional<int64_t> window) {
            new (rule) ScoreRule{scale, softcap.value_or(0.0f), window.value_or(kNoWindow)};
          },
          "scale"_a, "softcap"_a.none(), "window"_a.none());

  nb::class_<Output>(m, "Output")
      .def(
          "__init__",
          [](Output* to, const Rows& out, Address lse, Address mass, int64_t mass_blocks) {
            new (to) Output{out.bytes(),    out.dtype, out.stride_seq,  out.stride_head, out.stride_token,
                            as<float>(lse), nullptr,   as<float>(mass), mass_blocks};
          },
          "out"_a, "lse"_a, "mass"_a, "mass_blocks"_a);

  nb::class_<PreparedAttend>(m, "PreparedAttend")
      .def(
          "__init__",
          [](PreparedAttend* call, const std::string& isa, const std::vector<Run>& runs, const Rows& q,
             const ScoreRule& rule,
             bool causal) { new (call) PreparedAttend{&kernels_named(isa), runs, q, rule, causal}; },
          "isa"_a, "runs"_a, "q"_a, "rule"_a, "causal"_a);

  // Pool and tensors are the caller's to hold until the call was made.
  nb::class_<Call>(m, "Call").def("make", [](const Call& call) {
    nb::gil_scoped_release release;
    return call.make();
  });
  // The output is [num_seqs, num_heads, q_len, v_head_dim], float32, contiguous.
  m.def(
      "attend",
      [](WorkerPool& pool, const PreparedAttend& call, Address q, Address out, Address lse, Address mass,
         int64_t mass_blocks) {
        const int64_t dim = call.runs.front().arena().v_head_dim, head = call.q.num_tokens * dim;
        const Output to{as<void>(out),  DType::kFloat32, call.q.num_heads * head, head,       dim,
                        as<float>(lse), nullptr,         as<float>(mass),         mass_blocks};
        return Call{[&pool, kernels = call.kernels, args = args_of(call.runs, call.q.at(q), call.rule, call.causal),
                     to] { return attend(pool, *kernels, args, to); }};
      },
      "pool"_a, "call"_a, "q"_a, "out"_a, "lse"_a, "mass"_a, "mass_blocks"_a);

  // The halves of attention: logits are [num_seqs, num_q_heads, q_len, tokens of the table], contiguous.
  m.def(
      "logits",
      [](WorkerPool& pool, const std::string& isa, const Run& run, const Rows& q, const ScoreRule& rule,
         Address logits_to) {
        std::vector<AttendArgs> args = args_of({run}, q, rule, false);
        args[0].logits = as<float>(logits_to);
        const KernelTable& kernels = kernels_named(isa);
        return Call{[&pool, &kernels, args = std::move(args)] { return logits(pool, kernels, args); }};
      },
      "pool"_a, "isa"_a, "run"_a, "q"_a, "rule"_a, "logits_to"_a);
  m.def(
      "weigh",
      [](WorkerPool& pool, const std::string& isa, const Run& run, const Rows& logits, const Output& to) {
        std::vector<AttendArgs> args = args_of({run}, logits.at(0), {1.0f, 0.0f, kNoWindow}, false);
        args[0].logits = as<float>(logits.data);
        const KernelTable& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        return weigh(pool, kernels, args, to);
      },
      "pool"_a, "isa"_a, "run"_a, "logits"_a, "to"_a);

  nb::class_<PreparedCall>(m, "PreparedCall")
      .def(
          "__init__",
          [](PreparedCall* call, const std::string& isa, const std::vector<Run>& runs, const Rows& q, const Rows& k,
             const Rows& v,
             const ScoreRule& rule) { new (call) PreparedCall{&kernels_named(isa), runs, q, k, v, rule}; },
          "isa"_a, "runs"_a, "q"_a, "k"_a, "v"_a, "rule"_a);

  // The output is [num_seqs, q_len, num_heads, v_head_dim], contiguous.
  m.def(
      "append_and_attend",
      [](WorkerPool& pool, const PreparedCall& call, Address q, Address k, Address v, Address out, Address sink_logit,
         Address mass, int64_t mass_blocks) {
        nb::gil_scoped_release release;
        const int64_t dim = call.runs.back().arena().v_head_dim, token = call.q.num_heads * dim;
        const Output to{as<void>(out), call.q.dtype, call.q.num_tokens * token,   dim,
                        token,         nullptr,      as<const float>(sink_logit), as<float>(mass),
                        mass_blocks};
        return append_and_attend(pool, *call.kernels, args_of(call.runs, call.q.at(q), call.rule, true),
                                 rows_of(call.k.at(k), call.v.at(v)), to);
      },
      "pool"_a, "call"_a, "q"_a, "k"_a, "v"_a, "out"_a, "sink_logit"_a, "mass"_a, "mass_blocks"_a);

  m.def(
      "merge",
      [](WorkerPool& pool, const std::vector<Address>& outs, const std::vector<Address>& lses, const Four& shape,
         Address sink_logit, Address out, Address lse) {
        const auto [num_seqs, num_heads, q_len, dim] = shape;
        Partials parts{{}, {}, num_seqs * num_heads * q_len, dim, num_heads, q_len};
        for (const Address address : outs) parts.out.push_back(as<const float>(address));
        for (const Address address : lses) parts.lse.push_back(as<const float>(address));
        nb::gil_scoped_release release;
        merge(pool, parts, as<const float>(sink_logit), as<float>(out), as<float>(lse));
      },
      "pool"_a, "outs"_a, "lses"_a, "shape"_a, "sink_logit"_a, "out"_a, "lse"_a);

  for (const auto& [name, direction] : {std::pair{"append", Direction::kAppend}, {"gather", Direction::kGather}}) {
    m.def(name, copying(direction), "pool"_a, "isa"_a, "arenas"_a, "table"_a, "table_strides"_a, "begin"_a, "k"_a,
          "v"_a);
  }

  // The status, and the pages that were not packed with their first token that is not finite.
  m.def(
      "move_pages",
      [](WorkerPool& pool, const std::string& isa, const Arenas& from, const Arenas& to,
         const std::vector<int32_t>& from_slots, const std::vector<int32_t>& to_slots, Address channel_weights) {
        const KernelTable& kernels = kernels_named(isa);
        const Move move{from_slots, to_slots, as<const float>(channel_weights)};
        Refused refused;
        Status status;
        {
          nb::gil_scoped_release release;
          status = move_pages(pool, kernels, from, to, move, refused);
        }
        return std::make_tuple(status, refused.pages, refused.tokens);
      },
      "pool"_a, "isa"_a, "source"_a, "target"_a, "source_slots"_a, "target_slots"_a, "channel_weights"_a);

  nb::enum_<Codes>(m, "Codes").value("bounds", Codes::kBounds).value("columns", Codes::kColumns);
  nb::class_<BlockCodes>(m, "BlockCodes")
      .def(
          "__init__",
          [](BlockCodes* self, Codes kind, Address codes, Address steps, int64_t num_kv_heads, int64_t num_slots,
             int64_t page_blocks) {
            new (self) BlockCodes{kind,       as<const uint8_t>(codes), as<const float>(steps), num_kv_heads, num_slots,
                                  page_blocks};
          },
          "kind"_a, "codes"_a, "steps"_a, "num_kv_heads"_a, "num_slots"_a, "page_blocks"_a);
  m.def(
      "make_bounds",
      [](WorkerPool& pool, const std::string& isa, const Arenas& arenas, const std::vector<int32_t>& slots,
         int64_t num_lines, Address codes, Address steps) {
        const KernelTable& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        return make_bounds(pool, kernels, arenas, slots, num_lines, as<uint8_t>(codes), as<float>(steps));
      },
      "pool"_a, "isa"_a, "arenas"_a, "slots"_a, "num_lines"_a, "codes"_a, "steps"_a);

  // slots: [num_seqs][num_pages], the same for all heads.
  m.def(
      "score_blocks",
      [](WorkerPool& pool, const std::string& isa, const BlockCodes& codes, Address rows, DType dtype,
         const Four& shape, Address directions, int64_t num_columns, Address slots, int64_t slot_stride,
         int64_t num_pages, Address scores) {
        const KernelTable& kernels = kernels_named(isa);
        const auto [num_seqs, num_kv_heads, rows_per_head, dim] = shape;
        const QueryRows q{
            as<const void>(rows), dtype, as<const float>(directions), num_seqs, num_kv_heads, rows_per_head, dim,
            num_columns};
        nb::gil_scoped_release release;
        return score_blocks(pool, kernels, codes, q, table_of(slots, {slot_stride, 0}), num_pages, as<float>(scores));
      },
      "pool"_a, "isa"_a, "codes"_a, "rows"_a, "dtype"_a, "shape"_a, "directions"_a, "num_columns"_a, "slots"_a,
      "slot_stride"_a, "num_pages"_a, "scores"_a);

  m.def(
      "choose_blocks",
      [](WorkerPool& pool, const std::string& isa, Address scores, std::tuple<int64_t, int64_t> strides,
         std::tuple<int64_t, int64_t, int64_t> shape, Address padding, int64_t num_wanted, int64_t num_sink_tokens,
         Address slots, int64_t slot_stride, int64_t page_blocks, Address blocks, Address entries, int64_t capacity,
         Address kv_start, Address kv_len) {
        const auto [num_seqs, num_kv_heads, num_blocks] = shape;
        const Choice choice{
            as<const float>(scores),    std::get<0>(strides), std::get<1>(strides), num_seqs, num_kv_heads, num_blocks,
            as<const int64_t>(padding), num_wanted,           num_sink_tokens};
        const Chosen chosen{as<int32_t>(blocks), as<int32_t>(entries), capacity, as<int64_t>(kv_start),
                            as<int64_t>(kv_len)};
        const KernelTable& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        choose_blocks(pool, kernels, choice, table_of(slots, {slot_stride, 0}), page_blocks, chosen);
      },
      "pool"_a, "isa"_a, "scores"_a, "strides"_a, "shape"_a, "padding"_a, "num_wanted"_a, "num_sink_tokens"_a,
      "slots"_a, "slot_stride"_a, "page_blocks"_a, "blocks"_a, "entries"_a, "capacity"_a, "kv_start"_a, "kv_len"_a);

  m.def(
      "shuffle_left",
      [](WorkerPool& pool, std::tuple<int64_t, int64_t, int64_t> shape, int64_t page_blocks, Address kv_start,
         Address chosen, int64_t capacity, Address chosen_tokens, Address slots, int64_t slot_stride, uint64_t seed,
         Address to) {
        const auto [num_seqs, num_kv_heads, num_blocks] = shape;
        const Left left{num_seqs,
                        num_kv_heads,
                        num_blocks,
                        page_blocks,
                        as<const int64_t>(kv_start),
                        as<const int32_t>(chosen),
                        capacity,
                        as<const int64_t>(chosen_tokens)};
        nb::gil_scoped_release release;
        shuffle_left(pool, left, table_of(slots, {slot_stride, 0}), seed, as<int32_t>(to));
      },
      "pool"_a, "shape"_a, "page_blocks"_a, "kv_start"_a, "chosen"_a, "capacity"_a, "chosen_tokens"_a, "slots"_a,
      "slot_stride"_a, "seed"_a, "to"_a);

  nb::class_<Groups>(m, "Groups")
      .def(
          "__init__",
          [](Groups* self, Address out, Address lse, const Four& shape) {
            const auto [num_seqs, num_groups, num_rows, dim] = shape;
            new (self) Groups{as<const float>(out), as<const float>(lse), num_seqs, num_groups, num_rows, dim};
          },
          "out"_a, "lse"_a, "shape"_a);
  m.def(
      "collapse",
      [](WorkerPool& pool, const Groups& groups, Address out, Address lse) {
        nb::gil_scoped_release release;
        collapse(pool, groups, as<float>(out), as<float>(lse));
      },
      "pool"_a, "groups"_a, "out"_a, "lse"_a);
  m.def(
      "scatter",
      [](WorkerPool& pool, const Groups& groups, Address out, Address lse, Address variance, Address products) {
        nb::gil_scoped_release release;
        scatter(pool, groups, as<const float>(out), as<const float>(lse), as<double>(variance), as<double>(products));
      },
      "pool"_a, "groups"_a, "out"_a, "lse"_a, "variance"_a, "products"_a);

  m.def(
      "read_gbps",
      [](WorkerPool& pool, const std::string& isa, Address buffer, int64_t num_bytes) {
        const KernelTable& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        return read_gbps(pool, kernels, as<const char>(buffer), num_bytes);
      },
      "pool"_a, "isa"_a, "buffer"_a, "num_bytes"_a);

  m.def(
      "dot_gops",
      [](WorkerPool& pool, const std::string& isa) {
        const KernelTable& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        return dot_gops(pool, kernels);
      },
      "pool"_a, "isa"_a);

  m.def(
      "load_latency_ns",
      [](Address next, int64_t num_steps) {
        nb::gil_scoped_release release;
        return load_latency_ns(as<const int64_t>(next), num_steps);
      },
      "next"_a, "num_steps"_a);

  m.def(
      "multiply_adds",
      [](const std::string& isa, int64_t group_size) { return kernels_named(isa).multiply_adds(group_size); }, "isa"_a,
      "group_size"_a);
}

}  // namespace tandem
