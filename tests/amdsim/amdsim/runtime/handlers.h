// What the generated handlers of instructions include.
#pragma once

#include "machine.h"
#include "matrix.h"
#include "modes.h"
