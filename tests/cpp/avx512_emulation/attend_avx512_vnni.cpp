#define KVARN_TARGET_AVX512
#define KVARN_TARGET_VNNI
#define KVARN_ATTEND_EMULATED attend_avx512_vnni_emulated
#include "attend_emulation.h"
