# From a fresh clone, `make demo` and `make test` set up everything they need inside .venv and build/, then run.
# They need Python 3.10 or newer, a C++20 compiler and make. PYTHON=..., CXX=... and JOBS=... choose other ones.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# The C++ build compiles the CUDA backend wherever a CUDA compiler >= 12.8 is (AUTO); ON makes its absence an error.
KVARN_CUDA ?= AUTO
# The same for the HIP backend and a clang with lld that compiles for AMD GPUs.
KVARN_HIP ?= AUTO
# ON in continuous integration; OFF here, because a newer compiler may know more warnings.
KVARN_WERROR ?= OFF
# The package in .venv has the GPU backends only where such a GPU is.
PACKAGE_CUDA ?= $(if $(shell command -v nvidia-smi),AUTO,OFF)
PACKAGE_HIP ?= $(if $(wildcard /dev/kfd),AUTO,OFF)
# Sanitizers run under clang when it is there, so that both compilers see the code.
SANITIZE_CXX ?= $(firstword $(foreach c,clang++ clang++-20 clang++-19 clang++-18 clang++-17,$(shell command -v $(c))) $(CXX))
# Extra arguments of the tools: make pytest PYTEST_ARGS="-k sequence", make demo DEMO_ARGS="--help".
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CMAKE := $(BIN)/cmake
CTEST := $(BIN)/ctest
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONNOUSERSITE := 1

CXX_SOURCES := $(shell git ls-files '*.cpp' '*.h' '*.hpp' '*.c' '*.cu' '*.cuh' '*.hip' 2>/dev/null)
# One of the instruction sets stands for all: they share their sources.
TIDY_SOURCES := $(filter-out cpp/cpu/%_avx512.cpp cpp/cpu/%_avx512_vnni.cpp cpp/cpu/%_generic.cpp,$(shell git ls-files 'cpp/*.cpp' 'python/bindings/*.cpp' 2>/dev/null))
PACKAGE_SOURCES := $(shell git ls-files pyproject.toml CMakeLists.txt cmake cpp cuda hip python 2>/dev/null)

.PHONY: help demo test lint typecheck cpp-test sanitize tidy pytest package format bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/package.stamp ## generated problems, solved by a small model through the quantised cache, beside the 16-bit cache
	$(BIN)/kvarn demo $(DEMO_ARGS)

test: lint cpp-test sanitize pytest typecheck tidy ## every check: linters, C++ tests, sanitizers, Python tests, types, clang-tidy
	@echo "make test: all checks passed"

# ---- set-up ----------------------------------------------------------------------------------------------------------------------

$(VENV)/build.stamp: requirements/build.txt requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "kvarn needs Python 3.10 or newer, got " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements/build.txt
	touch $@

$(VENV)/demo.stamp: $(VENV)/build.stamp requirements/demo.txt
	$(PIP) install --quiet -r requirements/demo.txt
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp requirements/test.txt
	$(PIP) install --quiet -r requirements/test.txt
	touch $@

$(VENV)/package.stamp: $(VENV)/demo.stamp $(PACKAGE_SOURCES)
	$(PIP) install --quiet --no-build-isolation -c requirements/constraints.txt \
	  -C cmake.define.KVARN_CUDA=$(PACKAGE_CUDA) -C cmake.define.KVARN_HIP=$(PACKAGE_HIP) -C cmake.define.KVARN_WERROR=$(KVARN_WERROR) .
	touch $@

package: $(VENV)/package.stamp ## build the Python package and install it into .venv

# GoogleTest from the system where there is one; CMake downloads it where there is none and it cannot be installed.
$(VENV)/gtest.stamp: $(VENV)/build.stamp
	@if ! test -e /usr/include/gtest/gtest.h && test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends libgtest-dev) </dev/null || echo "make: libgtest-dev could not be installed; CMake will download GoogleTest"; \
	fi
	touch $@

# ---- checks ----------------------------------------------------------------------------------------------------------------------

lint: $(VENV)/test.stamp ## clang-format, ruff and spelling, without changing anything
	@$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/typos

build/release/CMakeCache.txt: $(VENV)/gtest.stamp
	$(CMAKE) -S . -B build/release -G Ninja -DCMAKE_BUILD_TYPE=Release -DKVARN_BUILD_TESTS=ON -DKVARN_BUILD_BENCHMARKS=ON \
	  -DKVARN_BUILD_PYTHON=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DKVARN_WERROR=$(KVARN_WERROR) -DKVARN_CUDA=$(KVARN_CUDA) \
	  -DKVARN_HIP=$(KVARN_HIP)

cpp-test: build/release/CMakeCache.txt ## C++ build (with CUDA where a compiler for it is) and its tests
	$(CMAKE) --build build/release -j $(JOBS)
	$(CTEST) --test-dir build/release --output-on-failure -j $(JOBS)

build/cpu-asan/CMakeCache.txt: CMakePresets.json $(VENV)/gtest.stamp
	$(CMAKE) --preset cpu-asan -DKVARN_WERROR=$(KVARN_WERROR) $(if $(SANITIZE_CXX),-DCMAKE_CXX_COMPILER=$(SANITIZE_CXX))

sanitize: build/cpu-asan/CMakeCache.txt ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(CMAKE) --build build/cpu-asan -j $(JOBS)
	$(CTEST) --test-dir build/cpu-asan --output-on-failure -j $(JOBS)

pytest: $(VENV)/test.stamp $(VENV)/package.stamp build/release/CMakeCache.txt ## Python tests, against the installed package
	KVARN_CMAKE_BUILD_DIR=$(CURDIR)/build/release $(BIN)/python -m pytest tests $(PYTEST_ARGS)

typecheck: $(VENV)/test.stamp $(VENV)/package.stamp ## mypy, strict, on the package
	$(BIN)/mypy

tidy: $(VENV)/test.stamp build/release/CMakeCache.txt ## clang-tidy on the C++ sources
	@printf '%s\n' $(TIDY_SOURCES) | xargs -P $(JOBS) -n 4 $(BIN)/clang-tidy -p build/release --quiet --warnings-as-errors='*' \
	  --extra-arg=-Wno-unknown-warning-option

# ---- other -----------------------------------------------------------------------------------------------------------------------

format: $(VENV)/test.stamp ## rewrite sources in the project's format
	@$(BIN)/clang-format -i $(CXX_SOURCES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/package.stamp ## CPU decode and encode against other libraries; see benchmarks/README.md
	$(BIN)/python benchmarks/python/bench_attend_cpu.py $(BENCH_ARGS)

clean: ## remove everything that was built or installed here
	rm -rf build $(VENV)
