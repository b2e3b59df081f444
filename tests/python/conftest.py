"""Fixtures shared by the Python tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import kvarn


def why_no_gpu() -> str:
    """Why the tests marked gpu cannot run here; empty where they can."""
    cuda = next(info for info in kvarn.backends() if info.name == "cuda")
    if not cuda.available:
        return f"backend cuda: {cuda.detail}"
    try:
        import torch
    except ModuleNotFoundError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := why_no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["numpy", "torch"])
def to_library(request: pytest.FixtureRequest) -> Callable[[np.ndarray], Any]:
    """A function from a numpy array to an array of the library under test, which shares its memory."""
    if request.param == "numpy":
        return lambda array: array
    torch = pytest.importorskip("torch")
    return torch.from_numpy


@pytest.fixture
def plan() -> kvarn.Plan:
    """A small float16 plan that attends: 2 KV heads, 8 query heads, tiles of 32 tokens."""
    return kvarn.Plan("k4v2_g32", head_dim=64, num_kv_heads=2, num_q_heads=8, max_num_seqs=4, max_q_tokens=64, max_tiles=8, num_threads=2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch with one thread: small tensors gain nothing from more, which on a busy machine wait for each other."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
