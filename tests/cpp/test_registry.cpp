// Which backends there are, and the exact reason when one is not: loading, environment, version checks.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <string>

#include "expect.h"

// Every case starts in a process of its own, because a backend is looked for once and the environment is read then.
namespace {

kvarn_backend_info backend(const char* name) {
  kvarn_backend_info info{};
  for (int32_t i = 0; i < kvarn_backend_count(); ++i) {
    KVARN_INIT(info);
    EXPECT_SUCCEEDS(kvarn_backend_get(i, &info));
    if (std::strcmp(info.name, name) == 0) return info;
  }
  ADD_FAILURE() << "no backend " << name;
  return info;
}

kvarn_status create_plan(const char* name) {
  kvarn_plan_params params{};
  KVARN_INIT(params);
  params.backend = name;
  params.config = kvarn_config{{4, 2, 128, 16}, 128, 1, KVARN_F16};
  kvarn_plan* plan = nullptr;
  const kvarn_status status = kvarn_plan_create(&params, &plan);
  if (status == KVARN_OK) kvarn_plan_destroy(plan);
  return status;
}

// Runs body in a fresh process, which must succeed.
template <class Body>
void in_fresh_process(Body body) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        body();
        exit(::testing::Test::HasFailure() ? 1 : 0);
      },
      ::testing::ExitedWithCode(0), "");
}

// The folder with this test's loadable backends.
std::string folder(const char* name) { return std::string(KVARN_TEST_BACKENDS) + "/" + name; }

TEST(Registry, ListsEveryBackend) {
  ASSERT_EQ(kvarn_backend_count(), 3);
  const kvarn_backend_info cpu = backend("cpu");
  EXPECT_EQ(cpu.available, 1);
  EXPECT_STRNE(cpu.detail, "");
  EXPECT_GE(cpu.num_threads, 1);
  for (const char* name : {"cuda", "hip"}) EXPECT_STRNE(backend(name).detail, "") << name;
  kvarn_backend_info info{};
  EXPECT_FAILS(kvarn_backend_get(0, &info), KVARN_INVALID_ARGUMENT, "[kvarn.backend_get] info.struct_size: expected");
  KVARN_INIT(info);
  EXPECT_FAILS(kvarn_backend_get(3, &info), KVARN_INVALID_ARGUMENT, "[kvarn.backend_get] index: expected 0 to 2, got 3");
  EXPECT_FAILS(kvarn_backend_get(-1, &info), KVARN_INVALID_ARGUMENT, "[kvarn.backend_get] index: expected 0 to 2, got -1");
  EXPECT_FAILS(kvarn_backend_get(0, nullptr), KVARN_INVALID_ARGUMENT, "[kvarn.backend_get] info: expected a pointer, got NULL");
}

TEST(Registry, UnknownNamesListTheChoices) {
  EXPECT_FAILS(create_plan("tpu"), KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] backend: expected cpu, cuda or hip, got \"tpu\"");
  EXPECT_FAILS(create_plan(""), KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] backend: expected cpu, cuda or hip, got \"\"");
  EXPECT_SUCCEEDS(create_plan("cpu"));
  EXPECT_SUCCEEDS(create_plan(nullptr));
}

TEST(Registry, TheEnvironmentNamesTheDefault) {
  setenv("KVARN_BACKEND", "gpu", 1);
  EXPECT_FAILS(create_plan(nullptr), KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] KVARN_BACKEND: expected cpu, cuda or hip, got \"gpu\"");
  EXPECT_SUCCEEDS(create_plan("cpu")) << "a plan that names its backend does not ask";
  setenv("KVARN_BACKEND", "", 1);
  EXPECT_SUCCEEDS(create_plan(nullptr));
  setenv("KVARN_BACKEND", "cpu", 1);
  EXPECT_SUCCEEDS(create_plan(nullptr));
  unsetenv("KVARN_BACKEND");
}

TEST(Registry, AMissingBackendSaysWhere) {
  in_fresh_process([] {
    setenv("KVARN_BACKEND_PATH", "/nonexistent", 1);
    EXPECT_EQ(backend("cuda").available, 0);
    EXPECT_STREQ(backend("cuda").detail, "not built into this installation (no libkvarn_cuda.so in /nonexistent)");
    EXPECT_FAILS(create_plan("cuda"), KVARN_UNAVAILABLE,
                 "[kvarn.plan_create] backend: expected an available backend, got cuda: not built into this installation");
    setenv("KVARN_BACKEND", "cuda", 1);
    EXPECT_FAILS(create_plan(nullptr), KVARN_UNAVAILABLE,
                 "[kvarn.plan_create] KVARN_BACKEND: expected an available backend, got cuda: not built");
  });
}

TEST(Registry, TheBackendFolderMustBeAbsolute) {
  in_fresh_process([] {
    setenv("KVARN_BACKEND_PATH", "lib", 1);
    EXPECT_STREQ(backend("cuda").detail, "KVARN_BACKEND_PATH: expected an absolute folder, got \"lib\"");
  });
}

TEST(Registry, ALibraryThatIsNoLibraryGivesTheLoadersReason) {
  in_fresh_process([] {
    setenv("KVARN_BACKEND_PATH", folder("broken").c_str(), 1);
    EXPECT_NE(std::strstr(backend("cuda").detail, "libkvarn_cuda.so"), nullptr) << backend("cuda").detail;
    EXPECT_EQ(backend("cuda").available, 0);
  });
}

TEST(Registry, AnotherAbiVersionIsRefused) {
  in_fresh_process([] {
    setenv("KVARN_BACKEND_PATH", folder("other_abi").c_str(), 1);
    EXPECT_NE(std::strstr(backend("cuda").detail, "expected backend ABI version 1, got 1001"), nullptr) << backend("cuda").detail;
  });
}

TEST(Registry, AnotherNameIsRefused) {
  in_fresh_process([] {
    setenv("KVARN_BACKEND_PATH", folder("other_name").c_str(), 1);
    EXPECT_NE(std::strstr(backend("cuda").detail, "expected a backend named cuda, got nobody"), nullptr) << backend("cuda").detail;
  });
}

TEST(Registry, ABackendThatCannotRunGivesItsOwnReason) {
  in_fresh_process([] {
    setenv("KVARN_BACKEND_PATH", folder("unavailable").c_str(), 1);
    EXPECT_STREQ(backend("cuda").detail, "no device today");
    EXPECT_FAILS(create_plan("cuda"), KVARN_UNAVAILABLE, "got cuda: no device today");
  });
}

TEST(Registry, ALoadedBackendServesPlans) {
  in_fresh_process([] {
    setenv("KVARN_BACKEND_PATH", folder("working").c_str(), 1);
    EXPECT_EQ(backend("cuda").available, 1);
    EXPECT_EQ(backend("cuda").num_devices, 2);
    kvarn_plan_params params{};
    KVARN_INIT(params);
    params.backend = "cuda";
    params.config = kvarn_config{{4, 2, 128, 16}, 128, 1, KVARN_F16};
    params.num_q_heads = 4;
    params.max_num_seqs = params.max_tiles = 1;
    params.max_q_tokens = 1;
    kvarn_plan* plan = nullptr;
    ASSERT_SUCCEEDS(kvarn_plan_create(&params, &plan));
    EXPECT_STREQ(kvarn_plan_describe(plan), "a backend for tests");
    EXPECT_EQ(kvarn_plan_workspace_bytes(plan), 256);
    kvarn_hadamard_params hadamard{};
    KVARN_INIT(hadamard);
    float value = 0;
    hadamard.x = hadamard.out = &value;
    hadamard.rows = 1;
    // Its errors arrive as the thread's last error.
    EXPECT_FAILS(kvarn_hadamard(plan, &hadamard, &value), KVARN_LAUNCH_FAILED, "[kvarn.hadamard] the test backend never launches");
    kvarn_plan_destroy(plan);
    params.device = 2;
    EXPECT_FAILS(kvarn_plan_create(&params, &plan), KVARN_INVALID_ARGUMENT, "[kvarn.plan_create] device: expected 0 or 1");
  });
}

}  // namespace
