// The only file that knows Python. Tensors arrive as addresses: the Python doors (kernels/cpu.py) have checked device,
// dtype, shape and strides, and hold the tensors while a call runs. Every call leaves the interpreter free.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "kernels.h"
#include "pages.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tandem {
namespace {

using Address = uintptr_t;
using Strides = std::tuple<int64_t, int64_t, int64_t>;

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

TokenRows rows_of(Address k, Address v, const Strides& k_strides, const Strides& v_strides) {
  const auto [ks, kh, kt] = k_strides;
  const auto [vs, vh, vt] = v_strides;
  return {as<char>(k), as<char>(v), ks, kh, kt, vs, vh, vt};
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // the process's worker pool lives until exit, in a functools.cache
  nb::enum_<DType>(m, "DType").value("float32", DType::kFloat32).value("bfloat16", DType::kBFloat16);
  nb::enum_<Packing>(m, "Packing").value("rows", Packing::kRows).value("panels", Packing::kPanels);
  nb::enum_<Status>(m, "Status")
      .value("ok", Status::kOk)
      .value("nan_in_query", Status::kNanInQuery)
      .value("slot_out_of_range", Status::kSlotOutOfRange);

  nb::class_<WorkerPool>(m, "WorkerPool")
      .def(nb::init<int>(), "num_threads"_a)
      .def_prop_ro("num_threads", &WorkerPool::num_threads);

  nb::class_<Arena>(m, "Arena")
      .def(
          "__init__",
          [](Arena* arena, Address k, Address v, DType dtype, Packing packing, int64_t num_slots, int64_t num_kv_heads,
             int64_t page_size, int64_t head_dim) {
            new (arena) Arena{as<char>(k), as<char>(v), dtype, packing, num_slots, num_kv_heads, page_size, head_dim};
          },
          "k"_a, "v"_a, "dtype"_a, "packing"_a, "num_slots"_a, "num_kv_heads"_a, "page_size"_a, "head_dim"_a);

  m.def("isas", [] {
    std::vector<std::tuple<std::string, std::string>> names;
    for (const Isa& isa : isas()) names.emplace_back(isa.kernels->name, isa.missing);
    return names;
  });

  m.def(
      "attend",
      [](WorkerPool& pool, const std::string& isa, Address q, DType q_dtype, const Strides& q_strides, int64_t num_seqs,
         int64_t num_q_heads, int64_t q_len, const Arena& arena, Address table, std::tuple<int64_t, int64_t> strides,
         Address kv_start, Address kv_len, float scale, bool causal, Address out, Address lse) {
        const auto [qs, qh, qt] = q_strides;
        const AttendArgs args{as<const void>(q),
                              q_dtype,
                              qs,
                              qh,
                              qt,
                              num_seqs,
                              num_q_heads,
                              q_len,
                              arena,
                              table_of(table, strides),
                              as<const int64_t>(kv_start),
                              as<const int64_t>(kv_len),
                              scale,
                              causal,
                              as<float>(out),
                              as<float>(lse)};
        const KernelTable& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        return attend(pool, kernels, args);
      },
      "pool"_a, "isa"_a, "q"_a, "q_dtype"_a, "q_strides"_a, "num_seqs"_a, "num_q_heads"_a, "q_len"_a, "arena"_a,
      "table"_a, "table_strides"_a, "kv_start"_a, "kv_len"_a, "scale"_a, "causal"_a, "out"_a, "lse"_a);

  m.def(
      "merge",
      [](WorkerPool& pool, const std::vector<Address>& outs, const std::vector<Address>& lses, int64_t num_rows,
         int64_t dim, Address out, Address lse) {
        Partials parts{{}, {}, num_rows, dim};
        for (const Address address : outs) parts.out.push_back(as<const float>(address));
        for (const Address address : lses) parts.lse.push_back(as<const float>(address));
        nb::gil_scoped_release release;
        merge(pool, parts, as<float>(out), as<float>(lse));
      },
      "pool"_a, "outs"_a, "lses"_a, "num_rows"_a, "dim"_a, "out"_a, "lse"_a);

  m.def(
      "append",
      [](WorkerPool& pool, const Arena& arena, Address table, std::tuple<int64_t, int64_t> strides, int64_t num_seqs,
         int64_t begin, int64_t end, Address k, Address v, const Strides& k_strides, const Strides& v_strides) {
        nb::gil_scoped_release release;
        return append(pool, arena, table_of(table, strides), num_seqs, begin, end, rows_of(k, v, k_strides, v_strides));
      },
      "pool"_a, "arena"_a, "table"_a, "table_strides"_a, "num_seqs"_a, "begin"_a, "end"_a, "k"_a, "v"_a, "k_strides"_a,
      "v_strides"_a);

  m.def(
      "gather",
      [](WorkerPool& pool, const std::string& isa, const Arena& arena, Address table,
         std::tuple<int64_t, int64_t> strides, int64_t num_seqs, int64_t begin, int64_t end, Address k, Address v,
         const Strides& k_strides, const Strides& v_strides) {
        const KernelTable& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        return gather(pool, kernels, arena, table_of(table, strides), num_seqs, begin, end,
                      rows_of(k, v, k_strides, v_strides));
      },
      "pool"_a, "isa"_a, "arena"_a, "table"_a, "table_strides"_a, "num_seqs"_a, "begin"_a, "end"_a, "k"_a, "v"_a,
      "k_strides"_a, "v_strides"_a);

  m.def(
      "move_pages",
      [](WorkerPool& pool, const std::string& isa, const Arena& from, const Arena& to,
         const std::vector<int32_t>& from_slots, const std::vector<int32_t>& to_slots) {
        const KernelTable& kernels = kernels_named(isa);
        const int64_t num_pages = static_cast<int64_t>(from_slots.size());
        nb::gil_scoped_release release;
        return move_pages(pool, kernels, from, to, from_slots.data(), to_slots.data(), num_pages);
      },
      "pool"_a, "isa"_a, "source"_a, "target"_a, "source_slots"_a, "target_slots"_a);

  m.def(
      "read_gbps",
      [](WorkerPool& pool, const std::string& isa, Address buffer, int64_t num_bytes) {
        const KernelTable& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        return read_gbps(pool, kernels, as<const char>(buffer), num_bytes);
      },
      "pool"_a, "isa"_a, "buffer"_a, "num_bytes"_a);
}

}  // namespace tandem
