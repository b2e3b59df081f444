// C interface of the emulator's core: loads a translated kernel and launches it. The launcher in Python and the stand-in HIP runtime share
// it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct amdsim_kernel amdsim_kernel;

typedef struct {
  uint64_t begin, end;  // addresses
  uint32_t writable;
} amdsim_range;

typedef struct {
  uint32_t lds_races;          // trap on races between waves in LDS
  uint32_t lds_uninitialized;  // trap on reads of LDS that nothing wrote
  uint32_t global_races;       // trap on what one workgroup writes and another one writes or reads
  uint32_t reverse;            // run workgroups and waves in descending order
  uint32_t interleave;         // 0: workgroups one after another, waves in order; else a seed: a few at once, waves in random order
  uint32_t threads;            // host threads that share the workgroups
  uint64_t max_instructions;   // per wave; 0: no limit
} amdsim_options;

// Loads the program file that the translator wrote. Null on failure; amdsim_error() says why.
amdsim_kernel* amdsim_open(const char* program);
void amdsim_close(amdsim_kernel* kernel);

// Number of explicit arguments, and the bytes of each.
size_t amdsim_num_arguments(const amdsim_kernel* kernel);
size_t amdsim_argument_bytes(const amdsim_kernel* kernel, size_t index);

// Runs the grid. `arguments` holds a pointer to each explicit argument's bytes. Memory outside `ranges` traps.
// 0 on success; otherwise amdsim_error() names the workgroup, the wave, the instruction and the trap.
int amdsim_launch(amdsim_kernel* kernel, const uint32_t grid[3], const uint32_t block[3], uint32_t dynamic_lds_bytes,
                  const void* const* arguments, const amdsim_range* ranges, size_t num_ranges, const amdsim_options* options);

// How often each instruction ran since the kernel was opened, in the order of the program file.
size_t amdsim_num_instructions(const amdsim_kernel* kernel);
const uint64_t* amdsim_hits(const amdsim_kernel* kernel);

const char* amdsim_error(void);

#ifdef __cplusplus
}
#endif
