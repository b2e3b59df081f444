"""Where the HIP backend of the C++ build is, for tests of its kernels."""

from __future__ import annotations

import os
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
