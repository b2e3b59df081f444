// The library's own threads: one pool per process, alive while a plan uses it.
//
// A region runs body(context, i) once for every i in [0, count); the calling thread takes part, and idle threads join it. Threads wait for
// the next region for a few microseconds and then sleep. A region inside a region, or one that starts while another thread's region runs,
// is done by its caller alone. Nothing is allocated by a region. The child of a fork() keeps working, without helpers.
#pragma once

#include "kvarn/kvarn.h"

namespace kvarn::cpu {

// Threads this process may use: the scheduler's affinity mask, cut to the cgroup's CPU quota (v1 or v2); at least 1.
int available_threads();

// The CPU quota in whole CPUs, rounded up, or 0 when there is none. `proc_self_cgroup` is the text of /proc/self/cgroup, and `root` the
// directory where the cgroup file systems are mounted ("/sys/fs/cgroup").
int cgroup_cpu_limit(const char* proc_self_cgroup, const char* root);

// Makes sure that the pool has `num_threads` - 1 helpers. Returns false when the system refuses a thread; then nothing was acquired.
bool acquire_pool(int num_threads);
// The last release ends the helpers.
void release_pool();

// `user` is the most threads that may take part, as an integer (0: all). Has the signature kvarn_parallel_for.
void pool_parallel_for(void* user, int64_t count, kvarn_parallel_body body, void* context);

}  // namespace kvarn::cpu
