// Choice of the instruction set, and of the number of threads.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "cpu/isa.h"
#include "cpu_machine.h"

namespace kvarn {
namespace {

using cpu::CpuFeatures;
using cpu::Isa;
using cpu::missing_feature;
using test::machine_isas;
using test::make_plan;
using test::plan_params;

constexpr Format kFormat{4, 2, 128, 16};

// Sets a variable of the environment for the life of the object.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before, had_ = true;
    setenv(name, value, 1);
  }
  ~Environment() {
    if (had_) {
      setenv(name_, before_.c_str(), 1);
    } else {
      unsetenv(name_);
    }
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
  std::string before_;
  bool had_ = false;
};

CpuFeatures everything() {
  CpuFeatures f;
  f.leaf1_ecx = f.leaf7_ebx = f.leaf7_ecx = 0xffffffff;
  f.xcr0 = 0xe7;
  return f;
}

// A machine that must test an instruction set says so: KVARN_REQUIRE_ISA=avx512_vnni,avx512.
TEST(CpuIsa, RequiredSetsAreAmongThoseTested) {
  const char* required = std::getenv("KVARN_REQUIRE_ISA");
  if (required == nullptr) GTEST_SKIP() << "KVARN_REQUIRE_ISA is not set";
  const std::string here = "," + std::string(kvarn_cpu_isas()) + ",";
  std::stringstream names(required);
  for (std::string name; std::getline(names, name, ',');)
    EXPECT_NE(here.find("," + name + ","), std::string::npos) << name << " in " << here;
}

TEST(CpuIsa, GenericAlwaysRuns) { EXPECT_EQ(machine_isas().back(), "generic"); }

TEST(CpuIsa, EveryMissingFeatureIsNamed) {
  const CpuFeatures all = everything();
  for (const Isa isa : {Isa::kAvx512Vnni, Isa::kAvx512, Isa::kAvx2, Isa::kGeneric}) EXPECT_EQ(missing_feature(isa, all), nullptr);
  const auto without = [&](uint32_t CpuFeatures::* word, int bit) {
    CpuFeatures f = everything();
    f.*word &= ~(uint32_t{1} << bit);
    return f;
  };
  EXPECT_STREQ(missing_feature(Isa::kAvx2, without(&CpuFeatures::leaf1_ecx, 12)), "the CPU has no FMA");
  EXPECT_STREQ(missing_feature(Isa::kAvx2, without(&CpuFeatures::leaf1_ecx, 28)), "the CPU has no AVX");
  EXPECT_STREQ(missing_feature(Isa::kAvx2, without(&CpuFeatures::leaf1_ecx, 29)), "the CPU has no F16C");
  EXPECT_STREQ(missing_feature(Isa::kAvx2, without(&CpuFeatures::leaf7_ebx, 5)), "the CPU has no AVX2");
  EXPECT_STREQ(missing_feature(Isa::kAvx512, without(&CpuFeatures::leaf7_ebx, 16)), "the CPU has no AVX512F");
  EXPECT_STREQ(missing_feature(Isa::kAvx512, without(&CpuFeatures::leaf7_ebx, 17)), "the CPU has no AVX512DQ");
  EXPECT_STREQ(missing_feature(Isa::kAvx512, without(&CpuFeatures::leaf7_ebx, 30)), "the CPU has no AVX512BW");
  EXPECT_STREQ(missing_feature(Isa::kAvx512, without(&CpuFeatures::leaf7_ebx, 31)), "the CPU has no AVX512VL");
  EXPECT_STREQ(missing_feature(Isa::kAvx512Vnni, without(&CpuFeatures::leaf7_ecx, 11)), "the CPU has no AVX512_VNNI");
  EXPECT_EQ(missing_feature(Isa::kAvx512, without(&CpuFeatures::leaf7_ecx, 11)), nullptr);
  EXPECT_EQ(missing_feature(Isa::kAvx2, without(&CpuFeatures::leaf7_ebx, 16)), nullptr);
}

TEST(CpuIsa, TheOperatingSystemMustSaveTheRegisters) {
  CpuFeatures f = everything();
  f.xcr0 = 0x07;  // x87, xmm, ymm
  EXPECT_EQ(missing_feature(Isa::kAvx2, f), nullptr);
  EXPECT_STREQ(missing_feature(Isa::kAvx512, f), "the operating system does not save AVX-512 registers");
  f.xcr0 = 0x67;  // no zmm16-31
  EXPECT_STREQ(missing_feature(Isa::kAvx512Vnni, f), "the operating system does not save AVX-512 registers");
  f.xcr0 = 0x03;
  EXPECT_STREQ(missing_feature(Isa::kAvx2, f), "the operating system does not save AVX registers");
  EXPECT_EQ(missing_feature(Isa::kGeneric, f), nullptr);
}

TEST(CpuIsa, TheArgumentDecides) {
  const Environment environment("KVARN_CPU_ISA", "no_such_set");
  for (const std::string& isa : machine_isas()) make_plan(kFormat, 128, 1, KVARN_F16, isa);
}

TEST(CpuIsa, TheEnvironmentDecidesNext) {
  for (const std::string& isa : machine_isas()) {
    const Environment environment("KVARN_CPU_ISA", isa.c_str());
    const auto plan = make_plan(plan_params(kFormat, 128, 1, KVARN_F16, nullptr));
    EXPECT_EQ(std::string(kvarn_plan_describe(plan.get())), "cpu/" + isa + ", 1 thread");
  }
}

TEST(CpuIsa, TheBestIsTheDefault) {
  const Environment environment("KVARN_CPU_ISA", "");
  const auto plan = make_plan(plan_params(kFormat, 128, 1, KVARN_F16, nullptr, 2));
  EXPECT_EQ(std::string(kvarn_plan_describe(plan.get())), "cpu/" + machine_isas().front() + ", 2 threads");
}

TEST(CpuIsa, UnknownNamesListTheChoices) {
  kvarn_plan* plan = nullptr;
  const kvarn_plan_params params = plan_params(kFormat, 128, 1, KVARN_F16, "avx9000");
  EXPECT_FAILS(kvarn_plan_create(&params, &plan), KVARN_INVALID_ARGUMENT,
               "[kvarn.plan_create] cpu_isa: expected one of avx512_vnni, avx512, avx2, generic, got \"avx9000\"");
  const Environment environment("KVARN_CPU_ISA", "AVX2");
  const kvarn_plan_params from_environment = plan_params(kFormat, 128, 1, KVARN_F16, nullptr);
  EXPECT_FAILS(kvarn_plan_create(&from_environment, &plan), KVARN_INVALID_ARGUMENT,
               "[kvarn.plan_create] KVARN_CPU_ISA: expected one of avx512_vnni, avx512, avx2, generic, got \"AVX2\"");
  EXPECT_EQ(plan, nullptr);
}

TEST(CpuIsa, KnownButMissingSetsSayWhatIsMissing) {
  const CpuFeatures here = cpu::read_cpu_features();
  for (int i = 0; i < cpu::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    const char* missing = missing_feature(isa, here);
    if (missing == nullptr || cpu::isa_kernels(isa) == nullptr) continue;
    kvarn_plan* plan = nullptr;
    const kvarn_plan_params params = plan_params(kFormat, 128, 1, KVARN_F16, cpu::isa_name(isa));
    EXPECT_FAILS(kvarn_plan_create(&params, &plan), KVARN_UNAVAILABLE, missing);
    EXPECT_FAILS(kvarn_plan_create(&params, &plan), KVARN_UNAVAILABLE, cpu::isa_name(isa));
  }
}

TEST(CpuThreads, TheEnvironmentGivesTheDefault) {
  const Environment environment("KVARN_NUM_THREADS", "3");
  const auto by_environment = make_plan(plan_params(kFormat, 128, 1, KVARN_F16, "generic", 0));
  EXPECT_STREQ(kvarn_plan_describe(by_environment.get()), "cpu/generic, 3 threads");
  const auto by_argument = make_plan(plan_params(kFormat, 128, 1, KVARN_F16, "generic", 2));
  EXPECT_STREQ(kvarn_plan_describe(by_argument.get()), "cpu/generic, 2 threads");
}

TEST(CpuThreads, NonsenseInTheEnvironmentIsAnError) {
  for (const char* text : {"0", "-1", "two", "2x", "1025", "99999999999999999999"}) {
    const Environment environment("KVARN_NUM_THREADS", text);
    kvarn_plan* plan = nullptr;
    const kvarn_plan_params params = plan_params(kFormat, 128, 1, KVARN_F16, "generic", 0);
    EXPECT_FAILS(kvarn_plan_create(&params, &plan), KVARN_INVALID_ARGUMENT,
                 std::string("[kvarn.plan_create] KVARN_NUM_THREADS: expected 1 to 1024, got \"") + text + "\"");
  }
}

}  // namespace
}  // namespace kvarn
