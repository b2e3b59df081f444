#include "encode.hip"
#include "kernels.h"

namespace kvarn::nvidia {

Kernels encode_kernels() {
  static const Kernel all[] = {KVARN_KERNEL(kvarn_encode_f32, EncodeArgs), KVARN_KERNEL(kvarn_encode_f16, EncodeArgs),
                               KVARN_KERNEL(kvarn_encode_bf16, EncodeArgs)};
  return {all, all + sizeof all / sizeof all[0]};
}

}  // namespace kvarn::nvidia
