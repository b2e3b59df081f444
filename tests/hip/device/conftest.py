"""Tests on an AMD device: a real one, or the stand-in runtime, under which tests/hip/test_kernels.py runs them for every target."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import kvarn
from kvarn._hip_memory import HipArray, HipRuntime


@pytest.fixture(scope="session")
def runtime() -> HipRuntime:
    info = next(backend for backend in kvarn.backends() if backend.name == "hip")
    if not info.available:
        pytest.skip(info.detail)
    return HipRuntime()


@pytest.fixture
def to_device(runtime) -> Callable[..., HipArray]:
    """A function from a numpy array to a copy of it on the device."""
    return lambda host, bfloat16=False: HipArray(runtime, host, bfloat16=bfloat16)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
