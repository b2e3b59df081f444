#!/usr/bin/env bash
# Builds, checks and times the CUDA backend on a machine with a GPU and without a network.
#
#   scripts/gpu_check.sh [test|bench|sanitize|cpu ...]     default: test bench
#
# GTEST_SOURCE: a GoogleTest source tree, where CMake finds none installed. ARCHITECTURES: default: this GPU's. OUT: logs go there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(test bench)
build=${BUILD:-build/gpu}
logs=${OUT:-$build/logs}
mkdir -p "$logs"

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu --format=csv | tee "$logs/device.txt"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
case $capability in 90 | 100 | 103 | 120) capability=${capability}a ;; esac
architectures=${ARCHITECTURES:-$capability-real}
arguments=(-DCMAKE_BUILD_TYPE=Release -DKVARN_CUDA=ON "-DKVARN_CUDA_ARCHITECTURES=$architectures" -DKVARN_BUILD_TESTS=ON -DKVARN_BUILD_BENCHMARKS=ON)
[ -z "${GTEST_SOURCE:-}" ] || arguments+=("-DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=$GTEST_SOURCE")
cmake -S . -B "$build" -G Ninja "${arguments[@]}" >"$logs/configure.txt"
targets=(kvarn kvarn_cuda)
for step in "${steps[@]}"; do
  case $step in
    test | sanitize) targets+=(kvarn_tests_cuda) ;;
    bench) targets+=(bench_cuda) ;;
    cpu) targets+=(kvarn_tests_cpu kvarn_tests_cpu_attend) ;;
    *) echo "gpu_check.sh: expected test, bench, sanitize or cpu, got $step" >&2; exit 2 ;;
  esac
done
cmake --build "$build" --target "${targets[@]}" >"$logs/build.txt" 2>&1 || { tail -50 "$logs/build.txt"; exit 1; }

status=0
for step in "${steps[@]}"; do
  case $step in
    test)
      "$(find "$build" -name kvarn_tests_cuda -type f)" ${TEST_ARGS:-} >"$logs/test.txt" 2>&1 || status=1
      grep -E "^\[( +OK|  FAILED|  PASSED|  SKIPPED)|Failure" "$logs/test.txt" | head -80 || true
      ;;
    cpu)
      lscpu | tee "$logs/lscpu.txt" | grep -E "Model name|avx512" | cut -c1-2000 | head -3
      for program in kvarn_tests_cpu kvarn_tests_cpu_attend; do
        "$(find "$build" -name $program -type f)" >"$logs/$program.txt" 2>&1 || status=1
        tail -4 "$logs/$program.txt"
      done
      ;;
    bench) "$(find "$build" -name bench_cuda -type f)" ${BENCH_ARGS:-} | tee "$logs/bench.txt" ;;
    sanitize)
      for tool in memcheck racecheck synccheck initcheck; do
        # Small shapes: every access is checked.
        compute-sanitizer --tool $tool --error-exitcode 1 "$(find "$build" -name kvarn_tests_cuda -type f)" \
          --gtest_filter="${SANITIZE_FILTER:-*OddLengths*:*TilesInRegisters*:*Append*:*Decode*:*Graph*}" >"$logs/$tool.txt" 2>&1 || status=1
        echo "$tool: $(tail -1 "$logs/$tool.txt")"
      done
      ;;
  esac
done
nvidia-smi --query-gpu=clocks.sm,clocks.mem,temperature.gpu --format=csv,noheader | tee -a "$logs/device.txt"
exit $status
