// Assertions on kvarn_status.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "kvarn/kvarn.h"

namespace kvarn::test {

inline ::testing::AssertionResult succeeded(kvarn_status status) {
  if (status == KVARN_OK) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << kvarn_status_name(status) << ": " << kvarn_last_error();
}

// The call failed with `status`, and the message contains `text`.
inline ::testing::AssertionResult failed_with(kvarn_status got, kvarn_status status, const std::string& text) {
  if (got != status) {
    return ::testing::AssertionFailure() << "expected " << kvarn_status_name(status) << ", got " << kvarn_status_name(got)
                                         << (got != KVARN_OK ? std::string(": ") + kvarn_last_error() : "");
  }
  const std::string message = kvarn_last_error();
  if (message.find(text) == std::string::npos) {
    return ::testing::AssertionFailure() << "expected a message with \"" << text << "\", got \"" << message << "\"";
  }
  return ::testing::AssertionSuccess();
}

}  // namespace kvarn::test

#define EXPECT_SUCCEEDS(call) EXPECT_TRUE(kvarn::test::succeeded(call))
#define ASSERT_SUCCEEDS(call) ASSERT_TRUE(kvarn::test::succeeded(call))
#define EXPECT_FAILS(call, status, text) EXPECT_TRUE(kvarn::test::failed_with(call, status, text))
