#include "kernels.h"
#include "rows.hip"

namespace kvarn::nvidia {

#define KVARN_ROW_KERNELS_OF(name)                                                                  \
  KVARN_KERNEL(kvarn_hadamard_##name, HadamardArgs), KVARN_KERNEL(kvarn_append_##name, AppendArgs), \
      KVARN_KERNEL(kvarn_decode_##name, DecodeArgs)

Kernels row_kernels() {
  static const Kernel all[] = {KVARN_ROW_KERNELS_OF(any), KVARN_ROW_KERNELS_OF(d64), KVARN_ROW_KERNELS_OF(d128), KVARN_ROW_KERNELS_OF(d256),
                               KVARN_ROW_KERNELS_OF(d512)};
  return {all, all + sizeof all / sizeof all[0]};
}

}  // namespace kvarn::nvidia
