"""kvarn: a paged KV cache of 2 to 8 bits with variance normalisation, and attention straight from its records.

For people: Cache. For engines: Plan and kvarn.ops on arrays of numpy, torch or whatever has DLPack, never copied; BlockPool and Sequence.
torch.ops.kvarn exists after ``import kvarn.torch_ops``. Importing this package needs neither torch nor a GPU.
"""

from __future__ import annotations

from typing import Any

from kvarn import _core, ops
from kvarn._backends import BackendInfo, backends, cmake_dir, cpu_isas, include_dir, library_path
from kvarn._errors import (
    ArgumentTypeError,
    CorruptError,
    InternalError,
    InvalidArgumentError,
    KvarnError,
    LaunchError,
    OutOfBlocksError,
    OutOfMemoryError,
    StaleHandleError,
    UnavailableError,
    UnsupportedError,
)
from kvarn._formats import Format, RecordLayout
from kvarn._moments import Moments
from kvarn._plan import Plan
from kvarn._pool import BlockPool, PoolInfo, Sequence, Work
from kvarn.cache import Cache, CacheMemory, CacheSequence, Step

__version__: str = _core.version()

__all__ = [
    "ArgumentTypeError",
    "BackendInfo",
    "BlockPool",
    "Cache",
    "CacheMemory",
    "CacheSequence",
    "CorruptError",
    "Format",
    "InternalError",
    "InvalidArgumentError",
    "KvarnError",
    "LaunchError",
    "Moments",
    "OutOfBlocksError",
    "OutOfMemoryError",
    "Plan",
    "PoolInfo",
    "RecordLayout",
    "Sequence",
    "StaleHandleError",
    "Step",
    "UnavailableError",
    "UnsupportedError",
    "Work",
    "__version__",
    "backends",
    "balance",
    "cmake_dir",
    "cpu_isas",
    "include_dir",
    "library_path",
    "ops",
    "prepare",
]


def balance(model: Any, moments: Moments, *, per_head: bool = True) -> Moments:
    """Changes a transformers model's weights, not what it computes, so that K and V cost less to round; returns its new moments:
    `kvarn.integrations.balance.balance`. Needs torch."""
    from kvarn.integrations.balance import balance as balance_model

    return balance_model(model, moments, per_head=per_head)


def prepare(model: Any, text: Any = None, **options: Any) -> Moments:
    """The moments of a transformers model, for caches that round with feedback: `kvarn.integrations.moments.prepare`. Needs torch."""
    from kvarn.integrations.moments import prepare as prepare_model

    return prepare_model(model, text, **options)
