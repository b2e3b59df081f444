"""
Bindings of libkvarn's C ABI. Use the functions and classes of the package kvarn, which call these.
"""

from typing import Annotated, Any

import numpy
from numpy.typing import NDArray


def version() -> str:
    """Version of libkvarn, "major.minor.patch"."""

def library_path() -> str:
    """Path of the loaded libkvarn."""

def format_parse(name: object | None) -> tuple[int, int, int, int]:
    """(k_bits, v_bits, tile_tokens, metadata_bits) of a format name."""

def format_name(format: tuple[int, int, int, int]) -> str:
    """Name of (k_bits, v_bits, tile_tokens, metadata_bits)."""

def record_layout(format: tuple[int, int, int, int], head_dim: int) -> dict[str, Any]:
    """Offsets of one record in bytes, by field name."""

def published_bytes(format: tuple[int, int, int, int], head_dim: object | None) -> int:
    """Bytes of one record in the authors' layout."""

def import_published(format: tuple[int, int, int, int], head_dim: object | None, published: object | None) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,))]:
    """uint8 [record_bytes] of uint8 [published_bytes]."""

def export_published(format: tuple[int, int, int, int], head_dim: object | None, record: object | None) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,))]:
    """uint8 [published_bytes] of uint8 [record_bytes]."""

class Plan:
    """A plan of libkvarn; kvarn.Plan derives from it."""

    def __init__(self, format: tuple[int, int, int, int], *, head_dim: object | None, num_kv_heads: object | None, dtype: object | None, num_q_heads: object | None, max_num_seqs: object | None, max_q_tokens: object | None, max_tiles: object | None, backend: object | None, device: object | None, batch_invariant: object | None, cpu_isa: object | None, num_threads: object | None) -> None: ...

    @property
    def head_dim(self) -> int:
        """Channels of one head."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""

    @property
    def num_q_heads(self) -> int:
        """Query heads; 0 when the plan does not attend."""

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile."""

    @property
    def record_bytes(self) -> int:
        """Bytes of one record: one tile of one KV head."""

    @property
    def dtype(self) -> str:
        """Element type of staging, K, V, q and out: "float16", ..."""

    @property
    def backend(self) -> str:
        """"cpu", "cuda" or "hip"."""

    @property
    def device(self) -> int:
        """Index of the GPU; 0 on the CPU."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace that attend needs, 256-byte aligned."""

    @property
    def describe(self) -> str:
        """What the plan runs on: "cpu/avx2, 2 threads"."""

def backends() -> list[tuple[str, bool, str, int, int]]:
    """
    (name, available, detail, num_devices, num_threads) of every backend this build knows.
    """

def cpu_isas() -> str:
    """
    Instruction sets that this build has and this machine runs, comma separated, best first.
    """

class Pool:
    """A pool of libkvarn; kvarn.BlockPool owns one."""

    def __init__(self, num_blocks: object | None, num_slots: object | None, tile_tokens: object | None, sink_tokens: object | None, recent_tokens: object | None) -> None: ...

    def info(self) -> tuple[int, int, int, int, int]:
        """(num_blocks, free_blocks, num_slots, free_slots, num_sequences)"""

    def sequence_info(self, sequence: int) -> tuple[int, int, int, int, int]:
        """(num_tokens, num_committed, num_tiles, num_blocks, num_slots)"""

    def sequence_create(self) -> int:
        """Handle of a new sequence."""

    def sequence_free(self, sequence: int) -> None:
        """Gives back a sequence."""

    def sequence_append(self, sequence: int, num_tokens: object | None) -> tuple[Annotated[NDArray[numpy.int32], dict(shape=(None, None))], Annotated[NDArray[numpy.int32], dict(shape=(None, None))], Annotated[NDArray[numpy.int32], dict(shape=(None, None))], Annotated[NDArray[numpy.int64], dict(shape=(None,))]]:
        """(copies, decodes, encodes, slot_mapping)"""

    def sequence_commit(self, sequence: int, num_tokens: object | None) -> tuple[Annotated[NDArray[numpy.int32], dict(shape=(None, None))], Annotated[NDArray[numpy.int32], dict(shape=(None, None))], Annotated[NDArray[numpy.int32], dict(shape=(None, None))], Annotated[NDArray[numpy.int64], dict(shape=(None,))]]:
        """(copies, decodes, encodes, slot_mapping)"""

    def sequence_truncate(self, sequence: int, num_tokens: object | None) -> tuple[Annotated[NDArray[numpy.int32], dict(shape=(None, None))], Annotated[NDArray[numpy.int32], dict(shape=(None, None))], Annotated[NDArray[numpy.int32], dict(shape=(None, None))], Annotated[NDArray[numpy.int64], dict(shape=(None,))]]:
        """(copies, decodes, encodes, slot_mapping)"""

    def sequence_rollback(self, sequence: int, num_tokens: object | None) -> None:
        """Drops uncommitted tokens."""

    def sequence_fork(self, sequence: int) -> int:
        """Handle of a second sequence with the same tokens."""

    def sequence_share_prefix(self, sequence: int, num_tokens: object | None) -> int:
        """Handle of a new sequence that shares a prefix."""

    def sequence_table(self, sequence: int) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """int32 [num_tiles]: block or ~slot of every tile."""

def hadamard(plan: object | None, x: object | None, out: object | None, inverse: object | None, empty: object | None = None) -> object:
    """Rotates rows and returns out. See kvarn.ops.hadamard."""

def append(plan: object | None, k: object | None, v: object | None, slot_mapping: object | None, staging: object | None, rotated: object | None) -> None:
    """
    Rotates new K, V and writes them into staging slots. See kvarn.ops.append.
    """

def encode(plan: object | None, staging: object | None, records: object | None, slots: object | None, blocks: object | None, normalisation: object | None, rounding: object | None, k_feedback: object | None, v_feedback: object | None) -> None:
    """Encodes staging slots into records. See kvarn.ops.encode."""

def decode(plan: object | None, records: object | None, blocks: object | None, k: object | None, v: object | None, destinations: object | None, rotated: object | None, empty: object | None = None) -> tuple[object, object]:
    """Decodes records into K and V and returns them. See kvarn.ops.decode."""

def attend(plan: object | None, q: object | None, records: object | None, staging: object | None, block_table: object | None, seq_lens: object | None, cu_q_lens: object | None, out: object | None, lse: object | None, workspace: object | None, alibi_slopes: object | None, sinks: object | None, softmax_scale: object | None, causal: object | None, window: object | None, logits_soft_cap: object | None, q_rotated: object | None, out_rotated: object | None, return_lse: object | None = False, empty: object | None = None) -> tuple[object, object]:
    """
    Softmax attention against records and staging; returns out and lse. See kvarn.ops.attend.
    """
