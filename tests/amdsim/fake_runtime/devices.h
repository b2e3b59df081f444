// The devices that the stand-in runtime shows, and the runtime's errors.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

namespace {

// Values of hipError_t.
enum Error : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidConfiguration = 9,
  kInvalidDevicePointer = 17,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kNoBinaryForGpu = 209,
  kInvalidHandle = 400,
  kNotFound = 500,
  kIllegalAddress = 700,
  kLaunchFailure = 719,
  kCaptureUnsupported = 900,
};

struct ErrorText {
  int code;
  const char *name, *text;
};
constexpr ErrorText kErrors[] = {
    {kSuccess, "hipSuccess", "no error"},
    {kInvalidValue, "hipErrorInvalidValue", "invalid argument"},
    {kOutOfMemory, "hipErrorOutOfMemory", "out of memory"},
    {kInvalidConfiguration, "hipErrorInvalidConfiguration", "invalid configuration argument"},
    {kInvalidDevicePointer, "hipErrorInvalidDevicePointer", "invalid device pointer"},
    {kNoDevice, "hipErrorNoDevice", "no ROCm-capable device is detected"},
    {kInvalidDevice, "hipErrorInvalidDevice", "invalid device ordinal"},
    {kNoBinaryForGpu, "hipErrorNoBinaryForGpu", "no kernel image is available for execution on the device"},
    {kInvalidHandle, "hipErrorInvalidHandle", "invalid resource handle"},
    {kNotFound, "hipErrorNotFound", "named symbol not found"},
    {kIllegalAddress, "hipErrorIllegalAddress", "an illegal memory access was encountered"},
    {kLaunchFailure, "hipErrorLaunchFailure", "unspecified launch failure"},
    {kCaptureUnsupported, "hipErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
};

const ErrorText& describe(int code) {
  for (const ErrorText& e : kErrors) {
    if (e.code == code) return e;
  }
  return kErrors[1];
}

// What a device of each target reports; the backend is built for all but the last two. `processors` is what HIP counts: compute units of
// CDNA, pairs of them of RDNA.
struct Target {
  const char *name, *full_name;
  int major, minor, wave, processors, l2_bytes, threads_per_processor;
};
constexpr Target kTargets[] = {
    {"gfx90a", "gfx90a:sramecc+:xnack-", 9, 0, 64, 104, 8 << 20, 2048},
    {"gfx942", "gfx942:sramecc+:xnack-", 9, 4, 64, 304, 4 << 20, 2048},
    {"gfx950", "gfx950:sramecc+:xnack-", 9, 5, 64, 256, 4 << 20, 2048},
    {"gfx1030", "gfx1030", 10, 3, 32, 40, 4 << 20, 2048},
    {"gfx1100", "gfx1100", 11, 0, 32, 48, 6 << 20, 2048},
    {"gfx1200", "gfx1200", 12, 0, 32, 16, 4 << 20, 2048},
    {"gfx1201", "gfx1201", 12, 0, 32, 32, 8 << 20, 2048},
    {"gfx1036", "gfx1036", 10, 3, 32, 1, 256 << 10, 2048},
    {"gfx906", "gfx906:sramecc+:xnack-", 9, 0, 64, 60, 4 << 20, 2560},
};
constexpr int kLdsBytes = 64 << 10, kMaxThreads = 1024;
constexpr size_t kMemoryBytes = size_t{16} << 30;

// AMDSIM_TARGET: the targets of the devices, separated by commas.
std::vector<const Target*> devices() {
  std::vector<const Target*> found;
  const char* names = getenv("AMDSIM_TARGET");
  std::istringstream list(names ? names : "");
  for (std::string name; std::getline(list, name, ',');) {
    for (const Target& t : kTargets) {
      if (name == t.name) found.push_back(&t);
    }
  }
  return found;
}

thread_local int g_device = 0;  // current

// Of a device, or the current one; null: there is none.
const Target* target(int device = g_device) {
  const auto all = devices();
  return device >= 0 && device < static_cast<int>(all.size()) ? all[device] : nullptr;
}

int number_from(const char* variable, int otherwise) {
  const char* text = getenv(variable);
  return text && *text ? atoi(text) : otherwise;
}

thread_local int g_last = kSuccess;
thread_local std::string g_detail;

int fail(int code, const std::string& detail = {}) {
  g_last = code;
  g_detail = detail;
  if (!detail.empty()) fprintf(stderr, "fake HIP runtime: %s\n", detail.c_str());
  return code;
}

int check_device(int device) {
  if (devices().empty()) return fail(kNoDevice);
  return target(device) ? kSuccess : fail(kInvalidDevice);
}

}  // namespace
