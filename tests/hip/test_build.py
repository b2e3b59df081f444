"""What configuring says where ROCm's headers are asked for and cannot be used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from amdsim.testing import require_toolchain
from amdsim.toolchain import toolchain

ROOT = Path(__file__).resolve().parents[2]


def test_rocm_headers_that_cannot_be_used_end_the_configuration(tmp_path):
    require_toolchain()
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    options = {"KVARN_HIP": "ON", "KVARN_CUDA": "OFF", "KVARN_BUILD_TESTS": "OFF", "KVARN_HIP_ROCM_HEADERS": "ON"}
    options |= {"KVARN_HIP_CLANG": str(toolchain().clang), "KVARN_HIP_ARCHITECTURES": "gfx90a"}
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *(f"-D{name}={value}" for name, value in options.items())]
    environment = os.environ | {"ROCM_PATH": str(tmp_path / "none")}
    configured = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert configured.returncode != 0
    expected = r"KVARN_HIP_ROCM_HEADERS=ON: expected a ROCm whose <hip/hip_runtime.h> \S+ compiles for gfx90a .*ROCM_PATH.*, got: .*error"
    assert re.search(expected, " ".join(configured.stderr.split()))
