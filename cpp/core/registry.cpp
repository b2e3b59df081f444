#include "core/registry.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "core/status.h"
#include "core/structs.h"

namespace kvarn {
namespace {

constexpr const char* kNames[] = {"cpu", "cuda", "hip"};
constexpr int kBackendCount = 3;
constexpr const char* kChoices = "cpu, cuda or hip";

// One backend that was looked for. Never unloaded: plans and `detail` strings point into it until the process ends.
struct Entry {
  std::once_flag once;
  const BackendTable* table = nullptr;
  std::string reason;  // why there is no table
};

// Leaked on purpose: other static destructors may still use it.
Entry& entry(int index) {
  static Entry* const entries = new Entry[kBackendCount];
  return entries[index];
}

int index_of(const char* name) {
  for (int i = 0; i < kBackendCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i;
  }
  return -1;
}

// The folder of the library (or program) that holds this code.
std::string own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&kvarn_version), &info) == 0 || info.dli_fname == nullptr) return "";
  // A program that was started through PATH is known by its bare name.
  const char* file = std::strchr(info.dli_fname, '/') != nullptr ? info.dli_fname : "/proc/self/exe";
  char resolved[PATH_MAX];
  if (realpath(file, resolved) == nullptr) return "";
  const std::string path(resolved);
  return path.substr(0, path.rfind('/'));
}

void load(int index, Entry& e) {
  const std::string name = kNames[index];
  std::string folder;
  if (const char* chosen = std::getenv(kBackendPathVariable); chosen != nullptr && *chosen != '\0') {
    if (*chosen != '/') {
      e.reason = std::string(kBackendPathVariable) + ": expected an absolute folder, got \"" + chosen + "\"";
      return;
    }
    folder = chosen;
  } else {
    folder = own_folder();
  }
  const std::string file = "libkvarn_" + name + ".so";
  const std::string path = folder + "/" + file;
  if (access(path.c_str(), F_OK) != 0) {
    e.reason = "not built into this installation (no " + file + " in " + folder + ")";
    return;
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* error = dlerror();
    e.reason = error != nullptr ? error : path + " cannot be loaded";
    return;
  }
  const auto get_table = reinterpret_cast<BackendEntry>(dlsym(library, "kvarn_backend_table"));
  if (get_table == nullptr) {
    e.reason = path + ": no symbol kvarn_backend_table";
    return;
  }
  const BackendTable* table = get_table(host_services());
  if (table == nullptr) {
    e.reason = path + ": gave no table";
  } else if (table->abi_version != kBackendAbiVersion) {
    e.reason =
        path + ": expected backend ABI version " + std::to_string(kBackendAbiVersion) + ", got " + std::to_string(table->abi_version);
  } else if (table->name == nullptr || name != table->name) {
    e.reason = path + ": expected a backend named " + name + ", got " + (table->name != nullptr ? table->name : "NULL");
  } else {
    e.table = table;
  }
}

Entry& loaded(int index) {
  Entry& e = entry(index);
  std::call_once(e.once, [&] {
    if (index == 0) {
      e.table = cpu_backend_table(host_services());
      if (e.table == nullptr) e.reason = "gave no table";
    } else {
      load(index, e);
    }
  });
  return e;
}

// Fills everything but struct_size.
kvarn_status describe(int index, kvarn_backend_info& info) {
  const Entry& e = loaded(index);
  info = kvarn_backend_info{};
  info.struct_size = sizeof info;
  if (e.table != nullptr) {
    if (const kvarn_status status = e.table->probe(&info); status != KVARN_OK) return status;
    info.available = info.available != 0 ? 1 : 0;
  }
  info.name = kNames[index];
  if (info.detail == nullptr) info.detail = e.reason.c_str();
  return KVARN_OK;
}

}  // namespace

kvarn_status find_backend(const char* operation, const char* name, const BackendTable** table) {
  const char* source = "backend";
  if (name == nullptr) {
    name = std::getenv(kBackendVariable);
    source = kBackendVariable;
    if (name == nullptr || *name == '\0') name = kNames[0];
  }
  const int index = index_of(name);
  if (index < 0) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected %s, got \"%.64s\"", operation, source, kChoices, name);
  kvarn_backend_info info{};
  if (const kvarn_status status = describe(index, info); status != KVARN_OK) return status;
  if (!info.available) {
    return fail(KVARN_UNAVAILABLE, "[kvarn.%s] %s: expected an available backend, got %s: %s", operation, source, name, info.detail);
  }
  *table = loaded(index).table;
  return KVARN_OK;
}

}  // namespace kvarn

extern "C" {

int32_t kvarn_backend_count(void) { return kvarn::kBackendCount; }

kvarn_status kvarn_backend_get(int32_t index, kvarn_backend_info* info) {
  return kvarn::guarded("backend_get", [&]() -> kvarn_status {
    if (const kvarn_status status = kvarn::check_out_struct("backend_get", "info", info); status != KVARN_OK) return status;
    if (index < 0 || index >= kvarn::kBackendCount) {
      return kvarn::fail(KVARN_INVALID_ARGUMENT, "[kvarn.backend_get] index: expected 0 to %d, got %d", kvarn::kBackendCount - 1, index);
    }
    kvarn_backend_info full{};
    if (const kvarn_status status = kvarn::describe(index, full); status != KVARN_OK) return status;
    kvarn::give_struct(full, info);
    return KVARN_OK;
  });
}

}  // extern "C"
