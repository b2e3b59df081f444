// What hip/CMakeLists.txt writes for AMD: the names of the sources whose kernels there are. runtime.cpp needs no code objects.
#include "hip_rt.h"

namespace kvarn::hip {

const Bundle kBundles[] = {{"rows", nullptr}, {"encode", nullptr}, {"attend_generic", nullptr}};
const int kBundleCount = sizeof kBundles / sizeof kBundles[0];
const char kTargets[] = "gfx-of-nvidia";

}  // namespace kvarn::hip
