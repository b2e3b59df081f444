"""What happens where the tools are missing."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from amdsim import MissingToolError, toolchain
from amdsim.testing import require_toolchain


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "/usr/bin/g++")
    monkeypatch.setattr(importlib.import_module("amdsim.toolchain"), "_ROCM", str(tmp_path))
    toolchain.cache_clear()
    yield
    toolchain.cache_clear()


@pytest.mark.usefixtures("no_tools")
def test_the_reason_names_what_was_looked_for() -> None:
    with pytest.raises(MissingToolError, match=r"no clang that compiles for AMDGPU: looked for clang\+\+-22, .*clang-19 lld-19 llvm-19"):
        toolchain()


@pytest.mark.usefixtures("no_tools")
def test_missing_tools_skip_a_test_unless_they_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVARN_REQUIRE_AMDGPU", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no clang"):
        require_toolchain()
    monkeypatch.setenv("KVARN_REQUIRE_AMDGPU", "1")
    with pytest.raises(pytest.fail.Exception, match="no clang"):
        require_toolchain()


@pytest.mark.usefixtures("no_tools")
def test_a_clang_without_its_linker_is_named(tmp_path: Path) -> None:
    clang = tmp_path / "clang++-19"
    clang.write_text("#!/bin/sh\n")
    clang.chmod(0o755)
    with pytest.raises(MissingToolError, match=r"clang\+\+-19 has no ld\.lld-19 beside it"):
        toolchain()
