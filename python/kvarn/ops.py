"""The five operations, on the caller's arrays.

Arrays are numpy's, torch's or any library's with DLPack. They are borrowed, never copied: outputs are written where the caller's array
is, and an array that cannot be used as it is (element type, shape, strides, device, read-only, requires_grad, no memory) raises before
anything is written: InvalidArgumentError, a ValueError, or ArgumentTypeError, a TypeError, with a message that names what was expected and
what came. numpy has no bfloat16; arrays of ml_dtypes.bfloat16 serve. On a GPU the work goes to the current stream of the arrays' library.
The GIL is released.

Names in shapes: D = head_dim, Hkv = num_kv_heads, Hq = num_q_heads, G = tile_tokens of the plan; T = tokens.
records: uint8 [num_blocks, Hkv, record_bytes]. staging: plan dtype [num_slots, 2 (K, V), Hkv, G, D], rotated. Both contiguous.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar, cast

import numpy as np

from kvarn import _core
from kvarn._errors import ArgumentTypeError
from kvarn._plan import Plan

Array = Any
ArrayT = TypeVar("ArrayT")

__all__ = ["append", "attend", "decode", "encode", "hadamard"]


def hadamard(plan: Plan, x: ArrayT, *, out: ArrayT | None = None, inverse: bool = False) -> ArrayT:
    """Rotates rows by the orthonormal Hadamard matrix H: ``x H``, or ``x H^T`` when ``inverse``.

    Args:
        plan: Gives D.
        x: float32, float16 or bfloat16 [..., D], contiguous. Need not be the plan's dtype.
        out: Same shape and dtype, written; may be ``x``. Allocated when None.
        inverse: Undo the rotation.

    Returns:
        ``out``.
    """
    return cast(ArrayT, _core.hadamard(plan, x, out, inverse, _empty))


def append(plan: Plan, k: Array, v: Array, slot_mapping: Array, staging: Array, *, rotated: bool = False) -> None:
    """Rotates new K and V and writes them into staging slots.

    Args:
        plan: Gives Hkv, D, G and the dtype.
        k: [T, Hkv, D], K after the position embedding; channels contiguous, tokens and heads at any strides.
        v: [T, Hkv, D], likewise.
        slot_mapping: int64 [T], contiguous: slot * G + position in the tile, all different; a negative entry skips the token.
        staging: Written.
        rotated: k and v are rotated already.
    """
    _core.append(plan, k, v, slot_mapping, staging, rotated)


def encode(
    plan: Plan,
    staging: Array,
    records: Array,
    slots: Array,
    blocks: Array,
    *,
    normalisation: str = "scale_invariant",
    rounding: str = "auto",
    k_feedback: Array | None = None,
    v_feedback: Array | None = None,
) -> None:
    """Encodes staging slots into records, in every layer given.

    Args:
        plan: Gives the format.
        staging: Read. May have a leading layer axis: [L, num_slots, 2, Hkv, G, D], each layer contiguous.
        records: Written at ``blocks``. Has a layer axis when staging has one: [L, num_blocks, Hkv, record_bytes].
        slots: int32 [n], contiguous: source slots.
        blocks: int32 [n], contiguous: destination blocks, all different.
        normalisation: "scale_invariant": codes do not depend on the scale of the input; or "published": the paper's clamps.
        rounding: "minmax", "unbiased", or "auto": unbiased for widths 2 and 3, minmax for the others.
        k_feedback: float32 [Hkv, D, D], with a layer axis when staging has one, contiguous: the factors by which rounding errors of K are
            fed back (kvarn.Moments.k_factors). Above the diagonal they are finite, on it is the channel that each step takes, 0 ... D - 1
            once each; what lies below does not matter. None: no feedback.
        v_feedback: The same of V (kvarn.Moments.v_factors).

    K or V that hold NaN, infinity or a magnitude above 2^30, or whose factor leaves a channel out, make a record that decodes to NaN.
    """
    _core.encode(plan, staging, records, slots, blocks, normalisation, rounding, k_feedback, v_feedback)


def decode(
    plan: Plan,
    records: ArrayT,
    blocks: Array,
    *,
    k: ArrayT | None = None,
    v: ArrayT | None = None,
    destinations: Array | None = None,
    rotated: bool = False,
) -> tuple[ArrayT | None, ArrayT | None]:
    """Decodes records into K and V.

    Args:
        plan: Gives the format.
        records: Read.
        blocks: int32 [n], contiguous.
        k: float32, float16 or bfloat16 [m, Hkv, G, D], written where destinations say and left alone elsewhere; [G, D] contiguous, tiles
            and heads at any strides. When both k and v are None both are allocated, [n, Hkv, G, D] in the plan's dtype; when only one is
            None, it is not decoded.
        v: As k, with k's dtype, shape and strides.
        destinations: int32 [n], contiguous, all different: the index into k and v of each tile; None: tile i goes to index i. Needs k or
            v: an array made here would have undefined values between the destinations.
        rotated: Leave the values in the rotated frame, as staging holds them.

    Returns:
        (k, v).
    """
    return cast("tuple[ArrayT | None, ArrayT | None]", _core.decode(plan, records, blocks, k, v, destinations, rotated, _empty))


def attend(
    plan: Plan,
    q: ArrayT,
    *,
    records: Array,
    staging: Array,
    block_table: Array,
    seq_lens: Array,
    cu_q_lens: Array,
    softmax_scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    logits_soft_cap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    out: ArrayT | None = None,
    lse: ArrayT | None = None,
    return_lse: bool = False,
    workspace: Array | None = None,
    q_rotated: bool = False,
    out_rotated: bool = False,
) -> Any:
    """Softmax attention of q against records and staging in one pass over a ragged batch of S sequences.

    Args:
        plan: Made with num_q_heads, max_num_seqs, max_q_tokens and max_tiles.
        q: [T, Hq, D] in the plan's dtype, all sequences one after the other; channels contiguous, tokens and heads at any strides.
        records: Read.
        staging: Read.
        block_table: int32 [S, max_tiles], contiguous: tile t of sequence s is block ``entry`` when >= 0, staging slot ``~entry`` when < 0.
        seq_lens: int32 [S]: tokens of K and V, this step's included; query i of q_len sits at position seq_len - q_len + i.
        cu_q_lens: int32 [S + 1]: sequence s owns the query tokens from cu_q_lens[s] up to cu_q_lens[s + 1]; starts at 0, never falls.
        softmax_scale: None: 1 / sqrt(D).
        causal: A query sees the positions up to its own; else all of seq_len.
        window: > 0: a query sees only the last ``window`` positions up to and including its own.
        logits_soft_cap: > 0: scores become cap * tanh(score / cap).
        alibi_slopes: float32 [Hq]: adds slope * (key position - query position), after the soft cap.
        sinks: float32 [Hq]: a logit that joins the softmax and has no value.
        out: [T, Hq, D] in the plan's dtype, written; channels contiguous, apart from q's memory. Allocated when None.
        lse: float32 [T, Hq], contiguous, written: natural-log sum of exponentials of the scaled scores, sinks included.
        return_lse: Allocate lse when it is None, and return (out, lse).
        workspace: uint8 [at least plan.workspace_bytes], contiguous, 256-byte aligned, overwritten. When None, a CPU plan uses memory of
            its own and a GPU call allocates.
        q_rotated: q is rotated already.
        out_rotated: Leave the output in V's rotated frame.

    Returns:
        ``out``, or ``(out, lse)`` when return_lse. A query that sees no position and no sink gives zeros and lse = -inf.
    """
    result, sums = _core.attend(
        plan,
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
        return_lse,
        _empty,
    )
    return (result, sums) if return_lse else result


def _empty(operation: str, argument: str, like: Any, shape: tuple[int, ...], dtype: str | None) -> Any:
    """An array of the library and device of ``like``; ``dtype`` None takes that of ``like``."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype if dtype is None else _numpy_dtype(dtype))
    if hasattr(like, "new_empty"):
        return like.new_empty(shape, dtype=like.dtype if dtype is None else getattr(sys.modules["torch"], dtype))
    if type(like).__module__.partition(".")[0] == "cupy":
        with like.device:
            return sys.modules["cupy"].empty(shape, like.dtype if dtype is None else _numpy_dtype(dtype))
    expected = (
        f"[kvarn.{operation}] {argument}: expected an array to write, because only arrays of numpy, torch and cupy are allocated here"
    )
    raise ArgumentTypeError(f"{expected}, got None beside {type(like).__module__}.{type(like).__name__}")


def _numpy_dtype(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        raise ArgumentTypeError("[kvarn.ops] dtype: expected the package ml_dtypes for bfloat16 arrays of numpy, got none") from None
    return np.dtype(ml_dtypes.bfloat16)
