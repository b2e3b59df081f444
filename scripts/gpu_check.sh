#!/usr/bin/env bash
# Builds, checks and times the CUDA backend on a machine with a GPU and without a network.
#
#   scripts/gpu_check.sh [step ...]     default: test bench
#
#   test         the C++ tests of the CUDA backend           python       installs the Python package into $BUILD/site (implied by what needs it)
#   pytest-gpu   the Python tests with the marker gpu        sanitize     C++ and Python tests under the four tools of compute-sanitizer
#   bench        C++ table of attention and encoding         bench-python the same operations beside torch and FlashInfer, with graph replays
#   model        decode of a whole transformers model        cpu          C++ tests of the CPU backend on this machine's processor
#   hip-alias    the same C++ tests of the HIP backend, whose vendor-neutral kernels are compiled for NVIDIA, and some under memcheck and racecheck
#
# From the environment: BUILD, the build folder (build/gpu); OUT, where logs and results go ($BUILD/logs); ARCHITECTURES, default this GPU's;
# GTEST_SOURCE, a GoogleTest source tree where CMake finds none installed; PYTHON (python3); WHEELS, a folder of wheels that PYTHON lacks;
# TEST_ARGS, PYTEST_ARGS, BENCH_ARGS, BENCH_PYTHON_ARGS, MODEL_ARGS; SANITIZE_TOOLS, SANITIZE_FILTER, SANITIZE_PYTEST, SANITIZE_SECONDS (of one program).
#
# Wheels for a machine without a network, fetched on one that has it (Python 3.12 on x86-64 here):
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
#     --platform manylinux2014_x86_64 -d wheels nanobind nanobind-backend scikit-build-core pathspec packaging transformers==5.20.2 ml-dtypes regex \
#     pytest pluggy iniconfig pygments hypothesis sortedcontainers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(test bench)
build=${BUILD:-build/gpu}
logs=${OUT:-$build/logs}
python=${PYTHON:-python3}
site=$(realpath -m "$build")/site
mkdir -p "$logs"

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu --format=csv | tee "$logs/device.txt"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
case $capability in 90 | 100 | 103 | 120) capability=${capability}a ;; esac
architectures=${ARCHITECTURES:-$capability-real}
definitions=(KVARN_CUDA=ON "KVARN_CUDA_ARCHITECTURES=$architectures" KVARN_BUILD_TESTS=ON KVARN_BUILD_BENCHMARKS=ON)
[ -z "${GTEST_SOURCE:-}" ] || definitions+=("FETCHCONTENT_SOURCE_DIR_GOOGLETEST=$GTEST_SOURCE")

targets=(kvarn)
needs_python=0
for step in "${steps[@]}"; do
  case $step in
    test) targets+=(kvarn_cuda kvarn_tests_cuda) ;;
    sanitize) targets+=(kvarn_cuda kvarn_tests_cuda) && needs_python=1 ;;
    bench) targets+=(kvarn_cuda bench_cuda) ;;
    cpu) targets+=(kvarn_tests_cpu kvarn_tests_cpu_attend) ;;
    hip-alias) targets+=(kvarn_tests_hip_nvidia) ;;
    python | pytest-gpu | bench-python | model) needs_python=1 ;;
    *) echo "gpu_check.sh: expected test, python, pytest-gpu, sanitize, bench, bench-python, model, cpu or hip-alias, got $step" >&2; exit 2 ;;
  esac
done

if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$build/wheels" "$WHEELS"/*.whl >"$logs/wheels.txt" 2>&1 ||
    { tail -20 "$logs/wheels.txt"; exit 1; }
  export PYTHONPATH=$(realpath "$build/wheels")${PYTHONPATH:+:$PYTHONPATH}
fi
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "${definitions[@]/#/-D}" >"$logs/configure.txt" 2>&1 || { tail -20 "$logs/configure.txt"; exit 1; }
cmake --build "$build" --target "${targets[@]}" >"$logs/build.txt" 2>&1 || { grep -E "error|FAILED" "$logs/build.txt" | head -30; tail -20 "$logs/build.txt"; exit 1; }
if [ $needs_python = 1 ]; then
  # In the same build folder, so that no kernel is compiled twice.
  options=()
  for definition in "${definitions[@]}"; do options+=(-C "cmake.define.$definition"); done
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --no-cache-dir --upgrade --target "$site" -C build-dir="$build" "${options[@]}" . \
    >"$logs/python.txt" 2>&1 || { tail -40 "$logs/python.txt"; exit 1; }
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  "$python" -m kvarn | tee -a "$logs/device.txt"
fi

program() { find "$build" -name "$1" -type f -perm -u+x | head -1; }
status=0
sanitizers=()
wait_for_sanitizers() {
  for process in "${sanitizers[@]}"; do wait "$process" || status=1; done
  sanitizers=()
}
# sanitize <tool> <log> <command...>, beside what follows
sanitize() { run_sanitizer "$@" & sanitizers+=($!); }
run_sanitizer() {
  local tool=$1 log=$2 rc=0 options
  shift 2
  options=(--tool "$tool" --error-exitcode 1)
  # The tools for shared memory look at kvarn's kernels alone; memcheck and initcheck need to see every write.
  case $tool in racecheck | synccheck) options+=(--kernel-name kernel_substring=kvarn) ;; esac
  timeout "${SANITIZE_SECONDS:-300}" compute-sanitizer "${options[@]}" "$@" >"$log" 2>&1 || rc=$?
  echo "$(basename "$log" .txt): exit status $rc, $(grep "SUMMARY" "$log" | tail -1), $(grep -E "passed|failed|PASSED|FAILED" "$log" | tail -1)"
  return $rc
}
for step in "${steps[@]}"; do
  case $step in
    python) ;;
    test)
      "$(program kvarn_tests_cuda)" ${TEST_ARGS:-} >"$logs/test.txt" 2>&1 || status=1
      grep -E "^\[( +OK|  FAILED|  PASSED|  SKIPPED)|Failure" "$logs/test.txt" | head -80 || true
      ;;
    cpu)
      lscpu | tee "$logs/lscpu.txt" | grep -E "Model name|avx512" | cut -c1-2000 | head -3
      for name in kvarn_tests_cpu kvarn_tests_cpu_attend; do
        "$(program $name)" >"$logs/$name.txt" 2>&1 || status=1
        tail -4 "$logs/$name.txt"
      done
      ;;
    pytest-gpu)
      eval "pytest_args=(${PYTEST_ARGS:-})"  # quoted words stay together
      "$python" -m pytest tests/python -m gpu -p no:cacheprovider ${pytest_args[@]+"${pytest_args[@]}"} >"$logs/pytest.txt" 2>&1 || status=1
      grep -E "^(FAILED|ERROR|E  )|passed|failed|skipped" "$logs/pytest.txt" | cut -c1-300 | tail -60 || true
      ;;
    hip-alias)
      alias_tests() { KVARN_BACKEND_PATH=$(realpath "$build/tests/hip/nvidia/lib") "$@"; }
      alias_tests "$(program kvarn_tests_hip_nvidia)" ${TEST_ARGS:---gtest_filter=-*Graph*} >"$logs/hip-alias.txt" 2>&1 || status=1
      grep -E "^\[( +OK|  FAILED|  PASSED|  SKIPPED)|Failure" "$logs/hip-alias.txt" | head -80 || true
      for tool in ${SANITIZE_TOOLS:-memcheck racecheck}; do
        alias_tests sanitize "$tool" "$logs/hip-alias-$tool.txt" "$(program kvarn_tests_hip_nvidia)" \
          --gtest_filter="${SANITIZE_FILTER:-*Degenerate*:*UnusedStaging*:*Append*:*Decode*:*BatchInvariant*}"
      done
      wait_for_sanitizers
      ;;
    bench) "$(program bench_cuda)" ${BENCH_ARGS:-} | tee "$logs/bench.txt" ;;
    bench-python) "$python" benchmarks/python/bench_attend_gpu.py --out "$logs" ${BENCH_PYTHON_ARGS:-} 2>&1 | tee "$logs/bench-python.txt" || status=1 ;;
    model) "$python" benchmarks/python/bench_model_gpu.py --out "$logs" ${MODEL_ARGS:-} 2>&1 | tee "$logs/model.txt" || status=1 ;;
    sanitize)
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      for tool in ${SANITIZE_TOOLS:-memcheck racecheck synccheck initcheck}; do
        # Small shapes: every access is checked.
        sanitize "$tool" "$logs/$tool.txt" "$(program kvarn_tests_cuda)" \
          --gtest_filter="${SANITIZE_FILTER:-*OddLengths*:*TilesInRegisters*:*Append*:*Decode*:*Graph*}"
        sanitize "$tool" "$logs/$tool-pytest.txt" "$python" -m pytest tests/python/test_gpu_ops.py -m gpu -p no:cacheprovider \
          -k "${SANITIZE_PYTEST:-sanitizer}"
      done
      wait_for_sanitizers
      unset PYTORCH_NO_CUDA_MEMORY_CACHING
      ;;
  esac
done
nvidia-smi --query-gpu=clocks.sm,clocks.mem,temperature.gpu --format=csv,noheader | tee -a "$logs/device.txt"
exit $status
