// Plans and backends.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <string>

#include "module.h"
#include "plan.h"
#include "scalar_arg.h"

namespace kvarn::python {

namespace {

// The backend that a plan gets: the named one, else the environment's choice, else the CPU.
std::string chosen_backend(const char* named) {
  const char* chosen = named ? named : std::getenv("KVARN_BACKEND");
  return chosen && *chosen ? chosen : "cpu";
}

}  // namespace

Plan::Plan(const kvarn_plan_params& params)
    : config(params.config), num_q_heads(params.num_q_heads), backend(chosen_backend(params.backend)), device(params.device) {
  memory = backend == "cuda" ? Memory::kCuda : backend == "hip" ? Memory::kRocm : Memory::kHost;
  kvarn_plan* made = nullptr;
  kvarn_status status;
  {
    nb::gil_scoped_release unlocked;  // loads libraries and starts threads
    status = kvarn_plan_create(&params, &made);
  }
  check_status(status);
  handle.reset(made);
  kvarn_record_layout layout{};
  check_status(kvarn_record_layout_of(config.format, config.head_dim, &layout));
  record_bytes = layout.record_bytes;
  workspace_bytes = kvarn_plan_workspace_bytes(made);
}

void* Plan::own_workspace() {
  constexpr uintptr_t kAlignment = 256;
  if (!workspace_) workspace_.reset(new char[static_cast<size_t>(workspace_bytes) + kAlignment]);
  const auto address = reinterpret_cast<uintptr_t>(workspace_.get());
  return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

namespace {

struct NamedDtype {
  const char* name;
  kvarn_dtype dtype;
};
constexpr NamedDtype kDtypeNames[] = {{"float16", KVARN_F16}, {"bfloat16", KVARN_BF16}, {"float32", KVARN_F32}};

kvarn_dtype dtype_from(nb::handle object) {
  const std::string name = text_arg({"plan_create", "dtype"}, object, "float16, bfloat16 or float32");
  for (const NamedDtype& known : kDtypeNames) {
    if (name == known.name) return known.dtype;
  }
  raise("InvalidArgumentError", "[kvarn.plan_create] dtype: expected float16, bfloat16 or float32, got " + name);
}

const char* dtype_name(int32_t dtype) {
  for (const NamedDtype& known : kDtypeNames) {
    if (dtype == known.dtype) return known.name;
  }
  return "";
}

void make_plan(Plan* self, std::tuple<int32_t, int32_t, int32_t, int32_t> format, nb::handle head_dim, nb::handle num_kv_heads,
               nb::handle dtype, nb::handle num_q_heads, nb::handle max_num_seqs, nb::handle max_q_tokens, nb::handle max_tiles,
               nb::handle backend, nb::handle device, nb::handle batch_invariant, nb::handle cpu_isa, nb::handle num_threads) {
  const auto integer = [](const char* argument, nb::handle object) { return integer_arg<int32_t>({"plan_create", argument}, object); };
  const auto text = [](const char* argument, nb::handle object, const char* expected) {
    return object.is_none() ? std::string() : text_arg({"plan_create", argument}, object, expected);
  };
  const std::string backend_name = text("backend", backend, "cpu, cuda, hip or None");
  const std::string isa = text("cpu_isa", cpu_isa, "the name of an instruction set or None");
  kvarn_plan_params params{};
  KVARN_INIT(params);
  params.backend = backend.is_none() ? nullptr : backend_name.c_str();
  params.device = integer("device", device);
  params.config.format = {std::get<0>(format), std::get<1>(format), std::get<2>(format), std::get<3>(format)};
  params.config.head_dim = integer("head_dim", head_dim);
  params.config.num_kv_heads = integer("num_kv_heads", num_kv_heads);
  params.config.dtype = dtype_from(dtype);
  params.num_q_heads = integer("num_q_heads", num_q_heads);
  params.max_num_seqs = integer("max_num_seqs", max_num_seqs);
  params.max_q_tokens = integer_arg<int64_t>({"plan_create", "max_q_tokens"}, max_q_tokens);
  params.max_tiles = integer("max_tiles", max_tiles);
  params.batch_invariant = flag_arg({"plan_create", "batch_invariant"}, batch_invariant);
  params.cpu_isa = cpu_isa.is_none() ? nullptr : isa.c_str();
  params.num_threads = integer("num_threads", num_threads);
  new (self) Plan(params);
}

using Backend = std::tuple<std::string, bool, std::string, int32_t, int32_t>;

std::vector<Backend> backends() {
  std::vector<Backend> found;
  for (int32_t i = 0; i < kvarn_backend_count(); ++i) {
    kvarn_backend_info info{};
    KVARN_INIT(info);
    check_status(kvarn_backend_get(i, &info));
    found.emplace_back(info.name, info.available != 0, info.detail ? info.detail : "", info.num_devices, info.num_threads);
  }
  return found;
}

}  // namespace

void bind_plan(nb::module_& m) {
  nb::class_<Plan>(m, "Plan", "A plan of libkvarn; kvarn.Plan derives from it.", nb::is_weak_referenceable())
      .def("__init__", &make_plan, nb::arg("format"), nb::kw_only(), nb::arg("head_dim").none(), nb::arg("num_kv_heads").none(),
           nb::arg("dtype").none(), nb::arg("num_q_heads").none(), nb::arg("max_num_seqs").none(), nb::arg("max_q_tokens").none(),
           nb::arg("max_tiles").none(), nb::arg("backend").none(), nb::arg("device").none(), nb::arg("batch_invariant").none(),
           nb::arg("cpu_isa").none(), nb::arg("num_threads").none())
      .def_prop_ro(
          "head_dim", [](const Plan& p) { return p.config.head_dim; }, "Channels of one head.")
      .def_prop_ro(
          "num_kv_heads", [](const Plan& p) { return p.config.num_kv_heads; }, "KV heads.")
      .def_prop_ro(
          "num_q_heads", [](const Plan& p) { return p.num_q_heads; }, "Query heads; 0 when the plan does not attend.")
      .def_prop_ro(
          "tile_tokens", [](const Plan& p) { return p.config.format.tile_tokens; }, "Tokens of one tile.")
      .def_prop_ro(
          "record_bytes", [](const Plan& p) { return p.record_bytes; }, "Bytes of one record: one tile of one KV head.")
      .def_prop_ro(
          "dtype", [](const Plan& p) { return dtype_name(p.config.dtype); }, "Element type of staging, K, V, q and out: \"float16\", ...")
      .def_prop_ro(
          "backend", [](const Plan& p) { return p.backend; }, "\"cpu\", \"cuda\" or \"hip\".")
      .def_prop_ro(
          "device", [](const Plan& p) { return p.device; }, "Index of the GPU; 0 on the CPU.")
      .def_prop_ro(
          "workspace_bytes", [](const Plan& p) { return p.workspace_bytes; }, "Bytes of workspace that attend needs, 256-byte aligned.")
      .def_prop_ro(
          "describe", [](const Plan& p) { return kvarn_plan_describe(p.handle.get()); }, "What the plan runs on: \"cpu/avx2, 2 threads\".");
  m.def("backends", &backends, "(name, available, detail, num_devices, num_threads) of every backend this build knows.");
  m.def("cpu_isas", &kvarn_cpu_isas, "Instruction sets that this build has and this machine runs, comma separated, best first.");
}

}  // namespace kvarn::python
