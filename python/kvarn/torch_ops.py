"""torch.ops.kvarn.*: the operations as torch custom operators, for models and torch.compile. Imported on request; registers on import.

Schemas (``plan`` is Plan.handle; shapes and meanings as in kvarn.ops):

    kvarn::hadamard(int plan, Tensor x, bool inverse) -> Tensor
    kvarn::hadamard_out(int plan, Tensor x, bool inverse, Tensor(a!) out) -> ()
    kvarn::append(int plan, Tensor k, Tensor v, Tensor slot_mapping, Tensor(a!) staging, bool rotated) -> ()
    kvarn::encode(int plan, Tensor staging, Tensor(a!) records, Tensor slots, Tensor blocks, str normalisation, str rounding,
        Tensor? k_feedback, Tensor? v_feedback) -> ()
    kvarn::decode(int plan, Tensor records, Tensor blocks, Tensor? destinations, Tensor(a!)? k, Tensor(b!)? v, bool rotated) -> ()
    kvarn::attend(int plan, Tensor q, ..., Tensor(a!) out, Tensor(b!)? lse, Tensor(c!)? workspace, ...) -> ()

A workspace of None is memory of the plan on the CPU, and of torch's allocator on a GPU.
Every operator checks its tensors as kvarn.ops does when it runs; the fake implementations check nothing and allocate only what is returned.
The plan must stay alive as long as a compiled model uses its handle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvarn import _core
from kvarn._plan import plan_of

_SCHEMAS = {
    "hadamard": "(int plan, Tensor x, bool inverse=False) -> Tensor",
    "hadamard_out": "(int plan, Tensor x, bool inverse, Tensor(a!) out) -> ()",
    "append": "(int plan, Tensor k, Tensor v, Tensor slot_mapping, Tensor(a!) staging, bool rotated=False) -> ()",
    "encode": (
        "(int plan, Tensor staging, Tensor(a!) records, Tensor slots, Tensor blocks, "
        "str normalisation='scale_invariant', str rounding='auto', Tensor? k_feedback=None, Tensor? v_feedback=None) -> ()"
    ),
    "decode": "(int plan, Tensor records, Tensor blocks, Tensor? destinations, Tensor(a!)? k, Tensor(b!)? v, bool rotated=False) -> ()",
    "attend": (
        "(int plan, Tensor q, Tensor records, Tensor staging, Tensor block_table, Tensor seq_lens, Tensor cu_q_lens, Tensor(a!) out, "
        "Tensor(b!)? lse, Tensor(c!)? workspace, float softmax_scale, bool causal=True, int window=0, float logits_soft_cap=0.0, "
        "Tensor? alibi_slopes=None, Tensor? sinks=None, bool q_rotated=False, bool out_rotated=False) -> ()"
    ),
}

# torch drops the operators when this object dies. A reload of the module finds it in its old globals.
_library: torch.library.Library | None = globals().get("_library")


def _hadamard(plan: int, x: Tensor, inverse: bool = False) -> Tensor:
    out = x.new_empty(x.shape)
    _core.hadamard(plan_of(plan), x, out, inverse)
    return out


def _hadamard_out(plan: int, x: Tensor, inverse: bool, out: Tensor) -> None:
    _core.hadamard(plan_of(plan), x, out, inverse)


def _append(plan: int, k: Tensor, v: Tensor, slot_mapping: Tensor, staging: Tensor, rotated: bool = False) -> None:
    _core.append(plan_of(plan), k, v, slot_mapping, staging, rotated)


def _encode(
    plan: int,
    staging: Tensor,
    records: Tensor,
    slots: Tensor,
    blocks: Tensor,
    normalisation: str = "scale_invariant",
    rounding: str = "auto",
    k_feedback: Tensor | None = None,
    v_feedback: Tensor | None = None,
) -> None:
    _core.encode(plan_of(plan), staging, records, slots, blocks, normalisation, rounding, k_feedback, v_feedback)


def _decode(
    plan: int,
    records: Tensor,
    blocks: Tensor,
    destinations: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    rotated: bool = False,
) -> None:
    _core.decode(plan_of(plan), records, blocks, k, v, destinations, rotated)


def _attend(
    plan: int,
    q: Tensor,
    records: Tensor,
    staging: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_q_lens: Tensor,
    out: Tensor,
    lse: Tensor | None,
    workspace: Tensor | None,
    softmax_scale: float,
    causal: bool = True,
    window: int = 0,
    logits_soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_rotated: bool = False,
    out_rotated: bool = False,
) -> None:
    made = plan_of(plan)
    if workspace is None and made.backend != "cpu":
        workspace = q.new_empty(made.workspace_bytes, dtype=torch.uint8)
    _core.attend(
        made,
        q,
        records,
        staging,
        block_table,
        seq_lens,
        cu_q_lens,
        out,
        lse,
        workspace,
        alibi_slopes,
        sinks,
        softmax_scale,
        causal,
        window,
        logits_soft_cap,
        q_rotated,
        out_rotated,
    )


def _fake_hadamard(plan: int, x: Tensor, inverse: bool = False) -> Tensor:
    return x.new_empty(x.shape)


def _fake_nothing(*arguments: object, **options: object) -> None:
    return None


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "hadamard": (_hadamard, _fake_hadamard),
    "hadamard_out": (_hadamard_out, _fake_nothing),
    "append": (_append, _fake_nothing),
    "encode": (_encode, _fake_nothing),
    "decode": (_decode, _fake_nothing),
    "attend": (_attend, _fake_nothing),
}


def register() -> None:
    """Defines torch.ops.kvarn.*; does nothing when that has been done."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("kvarn", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        _library.define(name + schema)
        real, fake = _IMPLEMENTATIONS[name]
        # torch gives ROCm tensors the key CUDA too.
        for key in ("CPU", "CUDA"):
            _library.impl(name, real, key)
        torch.library.register_fake(f"kvarn::{name}", fake, lib=_library)


register()
