#include "attend_generic.hip"
#include "kernels.h"

namespace kvarn::nvidia {

Kernels attend_kernels() {
  static const Kernel all[] = {KVARN_KERNEL(kvarn_attend_generic, AttendArgs)};
  return {all, all + sizeof all / sizeof all[0]};
}

}  // namespace kvarn::nvidia
