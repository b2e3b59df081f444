// CUDA's header of this name, for the sources shared with it.
#pragma once
#if defined(__HIP__)
#include "amd.h"
#else
namespace kvarn::cuda {
struct alignas(8) float2 {
  float x, y;
};
}  // namespace kvarn::cuda
#endif
