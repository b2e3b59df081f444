#include "cpu/isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/plan.h"

#if defined(KVARN_X86_KERNELS)
#include <cpuid.h>
#endif

namespace kvarn::cpu {
namespace {

constexpr char kIsaVariable[] = "KVARN_CPU_ISA";

constexpr uint32_t bit(int i) { return uint32_t{1} << i; }

// XCR0: xmm and ymm; opmask, the upper halves of zmm0-15, and zmm16-31.
constexpr uint64_t kAvxState = 0x06;
constexpr uint64_t kAvx512State = 0xe6;

struct Requirement {
  uint32_t CpuFeatures::* word;
  int bit;
  const char* message;
};

constexpr Requirement kAvx2Requirements[] = {
    {&CpuFeatures::leaf1_ecx, 28, "the CPU has no AVX"},
    {&CpuFeatures::leaf7_ebx, 5, "the CPU has no AVX2"},
    {&CpuFeatures::leaf1_ecx, 12, "the CPU has no FMA"},
    {&CpuFeatures::leaf1_ecx, 29, "the CPU has no F16C"},
};
constexpr Requirement kAvx512Requirements[] = {
    {&CpuFeatures::leaf7_ebx, 16, "the CPU has no AVX512F"},
    {&CpuFeatures::leaf7_ebx, 30, "the CPU has no AVX512BW"},
    {&CpuFeatures::leaf7_ebx, 31, "the CPU has no AVX512VL"},
    {&CpuFeatures::leaf7_ebx, 17, "the CPU has no AVX512DQ"},
};
constexpr Requirement kVnniRequirements[] = {
    {&CpuFeatures::leaf7_ecx, 11, "the CPU has no AVX512_VNNI"},
};

template <int N>
const char* first_missing(const Requirement (&requirements)[N], const CpuFeatures& features) {
  for (const Requirement& r : requirements) {
    if ((features.*r.word & bit(r.bit)) == 0) return r.message;
  }
  return nullptr;
}

#if defined(KVARN_X86_KERNELS)
uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}
#endif

// "avx512_vnni,avx2,generic"
struct NameList {
  char text[64] = "";
  NameList() {
    const CpuFeatures features = read_cpu_features();
    for (int i = 0; i < kIsaCount; ++i) {
      const Isa isa = static_cast<Isa>(i);
      if (isa_kernels(isa) == nullptr || missing_feature(isa, features) != nullptr) continue;
      if (text[0] != '\0') std::strcat(text, ",");
      std::strcat(text, isa_name(isa));
    }
  }
};

}  // namespace

CpuFeatures read_cpu_features() {
  CpuFeatures f;
#if defined(KVARN_X86_KERNELS)
  uint32_t eax, ebx, ecx, edx;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return f;
  f.leaf1_ecx = ecx;
  // Without OSXSAVE the instruction xgetbv does not exist, and nothing wider than xmm is usable.
  if ((ecx & bit(27)) != 0) f.xcr0 = read_xcr0();
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) {
    f.leaf7_ebx = ebx;
    f.leaf7_ecx = ecx;
  }
#endif
  return f;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kGeneric:
      return "generic";
  }
  return "";
}

const Kernels* isa_kernels(Isa isa) {
  switch (isa) {
#if defined(KVARN_X86_KERNELS)
    case Isa::kAvx512Vnni:
      return &kernels_avx512_vnni;
    case Isa::kAvx512:
      return &kernels_avx512;
    case Isa::kAvx2:
      return &kernels_avx2;
#endif
    case Isa::kGeneric:
      return &kernels_generic;
    default:
      return nullptr;
  }
}

const char* missing_feature(Isa isa, const CpuFeatures& features) {
  if (isa == Isa::kGeneric) return nullptr;
  if (const char* missing = first_missing(kAvx2Requirements, features)) return missing;
  if ((features.xcr0 & kAvxState) != kAvxState) return "the operating system does not save AVX registers";
  if (isa == Isa::kAvx2) return nullptr;
  if (const char* missing = first_missing(kAvx512Requirements, features)) return missing;
  if ((features.xcr0 & kAvx512State) != kAvx512State) return "the operating system does not save AVX-512 registers";
  if (isa == Isa::kAvx512) return nullptr;
  return first_missing(kVnniRequirements, features);
}

const char* runnable_isas() {
  static const NameList list;
  return list.text;
}

kvarn_status choose_isa(const char* name, const Kernels** kernels) {
  const char* source = "cpu_isa";
  if (name == nullptr) {
    name = std::getenv(kIsaVariable);
    source = kIsaVariable;
  }
  const CpuFeatures features = read_cpu_features();
  const bool any = name == nullptr || *name == '\0';
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!any && std::strcmp(name, isa_name(isa)) != 0) continue;
    const char* missing = isa_kernels(isa) == nullptr ? "this build has no kernels for it" : missing_feature(isa, features);
    if (missing == nullptr) {
      *kernels = isa_kernels(isa);
      return KVARN_OK;
    }
    if (!any) {
      return fail(KVARN_UNAVAILABLE, "[kvarn.plan_create] %s: expected one of %s, got %s: %s", source, runnable_isas(), name, missing);
    }
  }
  return fail(KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] %s: expected one of %s, got \"%.64s\"", source, kIsaChoices, name);
}

}  // namespace kvarn::cpu
