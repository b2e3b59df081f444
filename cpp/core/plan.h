// A plan: one backend's prepared state and the limits its calls are checked against.
#pragma once

#include <string>

#include "core/backend.h"

struct kvarn_plan {
  const kvarn::BackendTable* table = nullptr;
  void* state = nullptr;
  std::string description;
  kvarn_config config{};
  int64_t record_bytes = 0;
  int64_t value_bytes = 0;  // of one value of config.dtype
  int32_t num_q_heads = 0;  // 0: the plan does not attend, and the three limits below are 0
  int32_t max_num_seqs = 0;
  int64_t max_q_tokens = 0;
  int32_t max_tiles = 0;
  int64_t workspace_bytes = 0;
  bool host_memory = false;  // the backend's device pointers can be read here
};
