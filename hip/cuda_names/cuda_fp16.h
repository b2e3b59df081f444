// CUDA's header of this name, for the device code shared with it.
#pragma once
#include "amd.h"
