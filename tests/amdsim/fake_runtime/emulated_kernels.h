// Kernels of a code object, translated and run in the emulator.
#pragma once

#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>

#include "core.h"

namespace {

struct Core {
  decltype(&amdsim_open) open;
  decltype(&amdsim_close) close;
  decltype(&amdsim_num_arguments) num_arguments;
  decltype(&amdsim_argument_bytes) argument_bytes;
  decltype(&amdsim_launch) launch;
  decltype(&amdsim_num_instructions) num_instructions;
  decltype(&amdsim_hits) hits;
  decltype(&amdsim_error) error;
};

struct Module;

struct Function {
  Module* module;
  std::string name;
  const Core* core = nullptr;
  amdsim_kernel* kernel = nullptr;
  std::string program;
};

struct Module {
  int device;
  std::string target;
  std::string file;  // holds the code object
  std::string image;
  std::map<std::string, std::unique_ptr<Function>> functions;
};

std::map<std::string, Core> g_cores;

const Core* load_core(const std::string& path) {
  if (auto found = g_cores.find(path); found != g_cores.end()) return &found->second;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return nullptr;
  Core core{};
  const auto resolve = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
  };
  resolve(core.open, "amdsim_open");
  resolve(core.close, "amdsim_close");
  resolve(core.num_arguments, "amdsim_num_arguments");
  resolve(core.argument_bytes, "amdsim_argument_bytes");
  resolve(core.launch, "amdsim_launch");
  resolve(core.num_instructions, "amdsim_num_instructions");
  resolve(core.hits, "amdsim_hits");
  resolve(core.error, "amdsim_error");
  return &(g_cores[path] = core);
}

// Translates a kernel when it is first launched: a backend may resolve hundreds that a test never runs.
bool prepare(Function& function, std::string& why) {
  if (function.kernel) return true;
  const char* python = getenv("AMDSIM_PYTHON");
  const char* package = getenv("AMDSIM_PACKAGE");
  if (!python || !package) {
    why = "AMDSIM_PYTHON and AMDSIM_PACKAGE must name the interpreter and the folder of the package amdsim";
    return false;
  }
  const std::string command = "PYTHONPATH='" + std::string(package) + "' '" + python + "' -m amdsim.prepare '" + function.module->file +
                              "' '" + function.name + "' 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  std::string core, program, other;
  char line[4096];
  while (pipe && fgets(line, sizeof line, pipe)) {
    std::string text(line);
    if (!text.empty() && text.back() == '\n') text.pop_back();
    if (!text.rfind("core ", 0)) {
      core = text.substr(5);
    } else if (!text.rfind("program ", 0)) {
      program = text.substr(8);
    } else {
      other += text + "\n";
    }
  }
  const int status = pipe ? pclose(pipe) : -1;
  if (status || core.empty() || program.empty()) {
    why = function.name + ": translation failed\n" + other;
    return false;
  }
  function.core = load_core(core);
  if (!function.core) {
    why = dlerror();
    return false;
  }
  function.kernel = function.core->open(program.c_str());
  function.program = program;
  if (!function.kernel) why = function.core->error();
  return function.kernel != nullptr;
}

// With AMDSIM_COVERAGE the counts of each kernel's instructions go to a file in that folder when its module is unloaded or the process
// ends.
void write_coverage(const Function& function) {
  const char* folder = getenv("AMDSIM_COVERAGE");
  if (!folder || !function.kernel) return;
  static int serial = 0;
  std::ofstream file(std::string(folder) + "/" + std::to_string(getpid()) + "_" + std::to_string(serial++) + ".hits");
  file << function.module->target << " " << function.name << " " << function.program << "\n";
  const uint64_t* hits = function.core->hits(function.kernel);
  for (size_t i = 0; i < function.core->num_instructions(function.kernel); ++i) file << hits[i] << "\n";
}

struct Modules {
  std::map<Module*, std::unique_ptr<Module>> all;
  ~Modules() {
    for (auto& [key, module] : all) unload(*module);
  }
  static void unload(Module& module) {
    for (auto& [name, function] : module.functions) {
      write_coverage(*function);
      if (function->kernel) function->core->close(function->kernel);
    }
    unlink(module.file.c_str());
  }
} g_modules;

// The code object for `name` in a clang offload bundle, or the data itself when it is a code object. Empty when there is none.
std::string find_code_object(const char* data, const char* name) {
  constexpr char kMagic[] = "__CLANG_OFFLOAD_BUNDLE__";
  if (memcmp(data, kMagic, sizeof kMagic - 1) != 0) return {};
  const char* at = data + sizeof kMagic - 1;
  const auto next = [&] {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    at += sizeof value;
    return value;
  };
  for (uint64_t count = next(); count > 0; --count) {
    const uint64_t offset = next(), bytes = next(), length = next();
    std::string id(at, length);
    at += length;
    const size_t dashes = id.rfind("--");
    if (id.rfind("hip", 0) || dashes == std::string::npos) continue;
    if (const std::string processor = id.substr(dashes + 2); processor.substr(0, processor.find(':')) == name)
      return {data + offset, bytes};
  }
  return {};
}

}  // namespace
