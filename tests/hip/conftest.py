"""Where the HIP backend of the C++ build is, for tests of its kernels."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def hip_build() -> Path:
    """The folder hip/ of the C++ build, with code objects; skips where the backend was not built, or fails when it must be."""
    build = os.environ.get("KVARN_CMAKE_BUILD_DIR")
    folder = Path(build or "") / "hip"
    if build is None or not (Path(build) / "lib" / "libkvarn_hip.so").exists():
        reason = f"no HIP backend in KVARN_CMAKE_BUILD_DIR={build}"
        if os.environ.get("KVARN_REQUIRE_AMDGPU") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


# What the linker finds on a machine with ROCm, wherever it is.
_HIDES = """
#include <dlfcn.h>
#include <string.h>
extern "C" void* dlopen(const char* file, int flags) noexcept {
  using Open = void* (*)(const char*, int);
  static const Open open = reinterpret_cast<Open>(dlsym(RTLD_NEXT, "dlopen"));
  return open(file && strstr(file, "libamdhip64") ? "/nonexistent/libamdhip64.so" : file, flags);
}
"""


@pytest.fixture(scope="session")
def no_runtime(tmp_path_factory) -> dict[str, str]:
    """Variables under which a process finds no AMD runtime, also where there is one."""
    folder = tmp_path_factory.mktemp("no_runtime")
    (folder / "hides.cpp").write_text(_HIDES)
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-D_GNU_SOURCE", "-o", str(folder / "hides.so"), str(folder / "hides.cpp")]
    subprocess.run([*command, "-ldl"], check=True)
    return {"LD_PRELOAD": str(folder / "hides.so")}
