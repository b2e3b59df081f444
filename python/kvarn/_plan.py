"""Plans: everything that is decided before the first operation."""

from __future__ import annotations

import itertools
import weakref

from kvarn import _core
from kvarn._errors import InvalidArgumentError
from kvarn._formats import Format

_numbers = itertools.count(1)
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


class Plan(_core.Plan):
    """What operations run on: a backend, a format, the heads, and limits of a call to attend.

    Making a plan does everything lazy (loads the backend, starts threads, picks kernels); the operations then neither allocate nor
    synchronise. Calls from several threads on one plan run one after the other; different plans are independent.

    Args:
        format: Record format, a name such as "k4v2_g128" or a Format.
        head_dim: Channels of one head: 64, 80, 96, 112, 128, 160, 192, 256 or 512.
        num_kv_heads: KV heads, 1 to 1024.
        dtype: Element type of staging, K, V, q and out: "float16", "bfloat16" or "float32". A numpy or torch dtype does as well.
        num_q_heads: Query heads, a multiple of num_kv_heads; 0 for a plan that does not attend.
        max_num_seqs: Most sequences of one call to attend.
        max_q_tokens: Most query tokens of one call to attend, all sequences together.
        max_tiles: Most tiles of one sequence, which is the width of the block table.
        backend: "cpu", "cuda" or "hip"; None takes the environment variable KVARN_BACKEND or else "cpu".
        device: Index of the GPU.
        batch_invariant: Each sequence's attention is the same bit for bit whatever else is in the batch.
        cpu_isa: Instruction set, one of kvarn.cpu_isas(); None takes the environment variable KVARN_CPU_ISA or else the best.
        num_threads: CPU threads; 0 takes KVARN_NUM_THREADS or else what affinity and cgroup limits allow.

    Raises:
        InvalidArgumentError: A value outside its range.
        UnavailableError: The backend cannot run here.
        UnsupportedError: The backend does not do what is asked.
    """

    def __init__(
        self,
        format: str | Format,
        *,
        head_dim: int,
        num_kv_heads: int,
        dtype: object = "float16",
        num_q_heads: int = 0,
        max_num_seqs: int = 0,
        max_q_tokens: int = 0,
        max_tiles: int = 0,
        backend: str | None = None,
        device: int = 0,
        batch_invariant: bool = False,
        cpu_isa: str | None = None,
        num_threads: int = 0,
    ) -> None:
        self._format = Format(format)
        super().__init__(
            self._format.numbers,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            dtype=dtype_name(dtype),
            num_q_heads=num_q_heads,
            max_num_seqs=max_num_seqs,
            max_q_tokens=max_q_tokens,
            max_tiles=max_tiles,
            backend=backend,
            device=device,
            batch_invariant=batch_invariant,
            cpu_isa=cpu_isa,
            num_threads=num_threads,
        )
        self._handle = next(_numbers)
        _plans[self._handle] = self

    @property
    def format(self) -> Format:
        """The record format."""
        return self._format

    @property
    def handle(self) -> int:
        """The number that stands for this plan in torch.ops.kvarn; valid as long as the plan is alive."""
        return self._handle

    def __repr__(self) -> str:
        return f"<kvarn.Plan {self._format} head_dim={self.head_dim} num_kv_heads={self.num_kv_heads} {self.dtype} on {self.describe}>"


def plan_of(handle: int) -> Plan:
    """The living plan of a handle. Raises InvalidArgumentError when there is none."""
    plan = _plans.get(handle)
    if plan is None:
        raise InvalidArgumentError(f"[kvarn.plan] plan: expected the handle of a living kvarn.Plan, got {handle}")
    return plan


def dtype_name(dtype: object) -> str:
    """Name of an element type: "float16" of "float16", numpy.float16, numpy.dtype("float16") or torch.float16."""
    if isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).rpartition(".")[2]
