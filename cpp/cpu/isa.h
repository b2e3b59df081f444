// Instruction sets of the CPU backend: which this build has, which this machine runs, and which one a plan uses.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace kvarn::cpu {

enum class Isa { kAvx512Vnni, kAvx512, kAvx2, kGeneric };  // best first
inline constexpr int kIsaCount = 4;
inline constexpr const char* kIsaChoices = "avx512_vnni, avx512, avx2, generic";

// What CPUID and XGETBV say; all zero on other machines.
struct CpuFeatures {
  uint32_t leaf1_ecx = 0;
  uint32_t leaf7_ebx = 0;
  uint32_t leaf7_ecx = 0;
  uint64_t xcr0 = 0;  // register state that the operating system saves
};
CpuFeatures read_cpu_features();

const char* isa_name(Isa isa);
// The kernels, or null when this build has none for `isa`.
const Kernels* isa_kernels(Isa isa);
// Why `isa` cannot run with these features: "the CPU has no AVX512VL"; null when it can.
const char* missing_feature(Isa isa, const CpuFeatures& features);

// Names of what runs here, best first, comma separated.
const char* runnable_isas();

// `name`: the caller's choice or null; then the environment's; then the best. The message of a failure starts with "[kvarn.plan_create]".
kvarn_status choose_isa(const char* name, const Kernels** kernels);

}  // namespace kvarn::cpu
