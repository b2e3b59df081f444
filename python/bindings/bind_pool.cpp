// Pools and sequences: handles go out as integers, kvarn.Sequence wraps them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <memory>

#include "errors.h"
#include "kvarn/kvarn.h"
#include "module.h"
#include "scalar_arg.h"

namespace nb = nanobind;

namespace kvarn::python {
namespace {

struct PoolDeleter {
  void operator()(kvarn_pool* pool) const { kvarn_pool_destroy(pool); }
};

struct Pool {
  std::unique_ptr<kvarn_pool, PoolDeleter> handle;
};

using Pairs = nb::ndarray<nb::numpy, int32_t, nb::ndim<2>>;
using Mapping = nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>;
using Table = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;
using WorkTuple = std::tuple<Pairs, Pairs, Pairs, Mapping>;  // copies, decodes, encodes, slot mapping

template <class T>
nb::capsule owner_of(T* data) {
  return nb::capsule(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
}

// [count, 2], column by column, so that the sources and the destinations are each contiguous.
Pairs pairs_of(const kvarn_pair* pairs, int64_t count) {
  const auto n = static_cast<size_t>(count);
  auto* data = new int32_t[2 * n + 1];
  for (size_t i = 0; i < n; ++i) {
    data[i] = pairs[i].source;
    data[n + i] = pairs[i].destination;
  }
  return Pairs(data, {n, 2}, owner_of(data), {1, count});
}

WorkTuple work_of(const kvarn_work& work) {
  const auto n = static_cast<size_t>(work.num_tokens);
  auto* mapping = new int64_t[n + 1];
  std::copy_n(work.slot_mapping, n, mapping);
  return {pairs_of(work.copies, work.num_copies), pairs_of(work.decodes, work.num_decodes), pairs_of(work.encodes, work.num_encodes),
          Mapping(mapping, {n}, owner_of(mapping))};
}

void make_pool(Pool* self, nb::handle num_blocks, nb::handle num_slots, nb::handle tile_tokens, nb::handle sink_tokens,
               nb::handle recent_tokens) {
  const auto integer = [](const char* argument, nb::handle object) { return integer_arg<int32_t>({"pool_create", argument}, object); };
  kvarn_pool_params params{};
  KVARN_INIT(params);
  params.num_blocks = integer("num_blocks", num_blocks);
  params.num_slots = integer("num_slots", num_slots);
  params.tile_tokens = integer("tile_tokens", tile_tokens);
  params.sink_tokens = integer("sink_tokens", sink_tokens);
  params.recent_tokens = integer("recent_tokens", recent_tokens);
  kvarn_pool* pool = nullptr;
  check_status(kvarn_pool_create(&params, &pool));
  new (self) Pool{std::unique_ptr<kvarn_pool, PoolDeleter>(pool)};
}

kvarn_pool_info pool_info(const Pool& pool) {
  kvarn_pool_info info{};
  KVARN_INIT(info);
  check_status(kvarn_pool_get_info(pool.handle.get(), &info));
  return info;
}

kvarn_sequence_info sequence_info(const Pool& pool, kvarn_sequence sequence) {
  kvarn_sequence_info info{};
  KVARN_INIT(info);
  check_status(kvarn_sequence_get_info(pool.handle.get(), sequence, &info));
  return info;
}

int64_t tokens_arg(const char* operation, nb::handle num_tokens) { return integer_arg<int64_t>({operation, "num_tokens"}, num_tokens); }

// A call that changes a sequence by a number of tokens and says what is to be done on the memory.
template <auto Function>
auto change(const char* operation) {
  return [operation](Pool& pool, kvarn_sequence sequence, nb::handle num_tokens) {
    kvarn_work work{};
    KVARN_INIT(work);
    check_status(Function(pool.handle.get(), sequence, tokens_arg(operation, num_tokens), &work));
    return work_of(work);
  };
}

Table table_of(const Pool& pool, kvarn_sequence sequence) {
  const auto n = static_cast<size_t>(sequence_info(pool, sequence).num_tiles);
  auto* data = new int32_t[n + 1];
  Table table(data, {n}, owner_of(data));
  check_status(kvarn_sequence_table(pool.handle.get(), sequence, data, static_cast<int64_t>(n)));
  return table;
}

}  // namespace

void bind_pool(nb::module_& m) {
  nb::class_<Pool>(m, "Pool", "A pool of libkvarn; kvarn.BlockPool owns one.")
      .def("__init__", &make_pool, nb::arg("num_blocks").none(), nb::arg("num_slots").none(), nb::arg("tile_tokens").none(),
           nb::arg("sink_tokens").none(), nb::arg("recent_tokens").none())
      .def(
          "info",
          [](const Pool& p) {
            const kvarn_pool_info i = pool_info(p);
            return std::make_tuple(i.num_blocks, i.free_blocks, i.num_slots, i.free_slots, i.num_sequences);
          },
          "(num_blocks, free_blocks, num_slots, free_slots, num_sequences)")
      .def(
          "sequence_info",
          [](const Pool& p, kvarn_sequence s) {
            const kvarn_sequence_info i = sequence_info(p, s);
            return std::make_tuple(i.num_tokens, i.num_committed, i.num_tiles, i.num_blocks, i.num_slots);
          },
          nb::arg("sequence"), "(num_tokens, num_committed, num_tiles, num_blocks, num_slots)")
      .def(
          "sequence_create",
          [](Pool& p) {
            kvarn_sequence s = 0;
            check_status(kvarn_sequence_create(p.handle.get(), &s));
            return s;
          },
          "Handle of a new sequence.")
      .def(
          "sequence_free", [](Pool& p, kvarn_sequence s) { check_status(kvarn_sequence_free(p.handle.get(), s)); }, nb::arg("sequence"),
          "Gives back a sequence.")
      .def("sequence_append", change<&kvarn_sequence_append>("sequence_append"), nb::arg("sequence"), nb::arg("num_tokens").none(),
           "(copies, decodes, encodes, slot_mapping)")
      .def("sequence_commit", change<&kvarn_sequence_commit>("sequence_commit"), nb::arg("sequence"), nb::arg("num_tokens").none(),
           "(copies, decodes, encodes, slot_mapping)")
      .def("sequence_truncate", change<&kvarn_sequence_truncate>("sequence_truncate"), nb::arg("sequence"), nb::arg("num_tokens").none(),
           "(copies, decodes, encodes, slot_mapping)")
      .def(
          "sequence_rollback",
          [](Pool& p, kvarn_sequence s, nb::handle num_tokens) {
            check_status(kvarn_sequence_rollback(p.handle.get(), s, tokens_arg("sequence_rollback", num_tokens)));
          },
          nb::arg("sequence"), nb::arg("num_tokens").none(), "Drops uncommitted tokens.")
      .def(
          "sequence_fork",
          [](Pool& p, kvarn_sequence s) {
            kvarn_sequence fork = 0;
            check_status(kvarn_sequence_fork(p.handle.get(), s, &fork));
            return fork;
          },
          nb::arg("sequence"), "Handle of a second sequence with the same tokens.")
      .def(
          "sequence_share_prefix",
          [](Pool& p, kvarn_sequence s, nb::handle num_tokens) {
            kvarn_sequence shared = 0;
            check_status(kvarn_sequence_share_prefix(p.handle.get(), s, tokens_arg("sequence_share_prefix", num_tokens), &shared));
            return shared;
          },
          nb::arg("sequence"), nb::arg("num_tokens").none(), "Handle of a new sequence that shares a prefix.")
      .def("sequence_table", &table_of, nb::arg("sequence"), "int32 [num_tiles]: block or ~slot of every tile.");
}

}  // namespace kvarn::python
