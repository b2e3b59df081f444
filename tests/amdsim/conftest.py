"""Fixtures of the emulator's own tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from amdsim import TARGETS, Module
from amdsim.testing import load_kernels, require_target

_KERNELS = Path(__file__).parent / "kernels"


@functools.cache
def _load(name: str, target: str) -> Module:
    module = load_kernels(_KERNELS / f"{name}.hip", target)
    module.prepare()
    return module


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """Every target in turn; those that the compiler lacks are skipped."""
    require_target(request.param)
    return request.param


@pytest.fixture
def kernels() -> Callable[[str, str], Module]:
    """A function from the name of a file in kernels/ and a target to its module."""
    return _load


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
