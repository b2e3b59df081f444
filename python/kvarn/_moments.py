"""Second moments of a model, from which the encoder weighs rounding errors ("error feedback", docs/FORMAT.md, section 7, step 3).

To second order, an error e of a token's K costs ``e M_K e^T / 2`` in the divergence of what the model predicts, with M_K the mean of
``g^T g`` over gradients g of a log-likelihood for K (Fisher's information); the same holds of V. Both are constants of the model: they are
made once (`kvarn.prepare`), and nothing in them depends on a sequence. A rotary encoding turns K, and with it M_K, as positions go by, so
there are several M_K, each for a bucket of positions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn._balance import Balance
from kvarn._errors import CorruptError, InvalidArgumentError
from kvarn._turns import BUCKET_TOKENS

__all__ = ["CALIBRATION_TOKENS", "WINDOW_TOKENS", "Moments", "config_fingerprint"]

# What moments are made of unless the caller says otherwise, and the tokens that are read at once. Shorter windows miss what a model reads
# from afar.
CALIBRATION_TOKENS = 131072
WINDOW_TOKENS = 8192

VERSION = "3"
# Fields of a model's configuration that shape K, V or the queries.
_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
)


def damping_of(k_bits: int) -> float:
    """Share of the mean of a moment's diagonal that is added to it, in formats with K of a width.

    A moment is an average over other texts than the one that is encoded; damping keeps errors from being moved into directions that those
    texts happened not to use. Where K has few levels, errors are large.
    """
    return 0.1 if k_bits <= 3 else 0.03


def config_fingerprint(config: Any) -> str:
    """SHA-256, 16 hexadecimal digits, of what a transformers configuration says about the shape of the model."""
    text = config.get_text_config(decoder=True)
    fields = {name: getattr(text, name, None) for name in _FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Moments:
    """M_K and M_V of every layer and KV head.

    Args:
        k: float32 ``[num_buckets, num_layers, num_kv_heads, head_dim, head_dim]``, symmetric, in the rotated frame (``H^T M H``), where the
            encoder works. Bucket i is for positions from ``i * BUCKET_TOKENS`` (1024) on, the last one for all positions after it.
        v: float32 ``[num_layers, num_kv_heads, head_dim, head_dim]``, likewise, for all positions.
        config: `config_fingerprint` of the model's configuration.
        weights: fingerprint of the model's weights.
        source: in words, what K's moments were averaged over.
        balance: what `kvarn.balance` changes the model by; None where there is nothing to change, as in the moments that it returns.

    Raises:
        ValueError: another shape or dtype, or values that are not finite.
    """

    def __init__(
        self,
        k: NDArray[np.float32],
        v: NDArray[np.float32],
        *,
        config: str = "",
        weights: str = "",
        source: str = "",
        balance: Balance | None = None,
    ) -> None:
        for name, value in (("k", k), ("v", v)):
            shape = value.shape[1:] if name == "k" else value.shape
            if value.dtype != np.float32 or len(shape) != 4 or shape[2] != shape[3] or shape != k.shape[1:] or len(k) == 0:
                buckets = "num_buckets, " if name == "k" else ""
                expected = f"float32 [{buckets}num_layers, num_kv_heads, head_dim, head_dim], the same for k and v"
                raise InvalidArgumentError(f"[kvarn.Moments] {name}: expected {expected}, got {value.dtype} {list(value.shape)}")
            if not np.isfinite(value).all():
                raise InvalidArgumentError(f"[kvarn.Moments] {name}: expected finite values, got NaN or infinity")
        self.k, self.v = np.ascontiguousarray(k), np.ascontiguousarray(v)
        self.config, self.weights, self.source, self.balance = config, weights, source, balance
        if balance is not None and balance.v_frame.shape != self.v.shape:
            raise InvalidArgumentError(f"[kvarn.Moments] balance: expected one of {list(self.v.shape)}, got {list(balance.v_frame.shape)}")
        self._v_factors: dict[float, NDArray[np.float32]] = {}  # by damping

    def __repr__(self) -> str:
        layers, heads, dim = self.shape
        buckets = f"{len(self.k)} buckets of positions"
        return f"Moments({layers} layers, {heads} KV heads, head_dim {dim}, {buckets}, {self.hash}, {self.source or 'of unknown source'})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(num_layers, num_kv_heads, head_dim)"""
        return self.v.shape[0], self.v.shape[1], self.v.shape[2]

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256, 16 hexadecimal digits, of the tensors."""
        digest = hashlib.sha256(repr((self.k.shape, self.v.shape)).encode())
        for value in self._tensors().values():
            digest.update(value.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()[:16]

    def _tensors(self) -> dict[str, NDArray[np.float32]]:
        balance = {} if self.balance is None else {"k_scale": self.balance.k_scale, "v_frame": self.balance.v_frame}
        return {"k": self.k, "v": self.v, **balance}

    def bucket(self, position: int) -> int:
        """Which of K's moments serves a tile whose first token has this position."""
        return min(position // BUCKET_TOKENS, len(self.k) - 1)

    def k_factors(self, bucket: int, k_bits: int) -> NDArray[np.float32]:
        """``k_feedback`` of `kvarn.ops.encode` for tiles of a bucket, in formats with K of a width: float32 ``[num_layers, num_kv_heads,
        head_dim, head_dim]``."""
        return _factors(self.k[bucket], damping_of(k_bits))

    def v_factors(self, k_bits: int) -> NDArray[np.float32]:
        """``v_feedback`` of `kvarn.ops.encode` in formats with K of a width: float32 ``[num_layers, num_kv_heads, head_dim, head_dim]``."""
        damping = damping_of(k_bits)
        if damping not in self._v_factors:
            self._v_factors[damping] = _factors(self.v, damping)
        return self._v_factors[damping]

    def check(self, *, num_layers: int, num_kv_heads: int, head_dim: int, config: Any = None) -> None:
        """Raises ValueError when these are not the moments of a model of that shape and (transformers) configuration."""
        expected = (num_layers, num_kv_heads, head_dim)
        if self.shape != expected:
            what = "(num_layers, num_kv_heads, head_dim)"
            raise InvalidArgumentError(f"[kvarn.Moments] moments: expected those of a model with {what} {expected}, got {self.shape}")
        if config is not None and self.config and self.config != config_fingerprint(config):
            raise InvalidArgumentError(
                f"[kvarn.Moments] moments: expected those of a model with the configuration {config_fingerprint(config)}, got {self.config}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: ``k``, ``v``, with a balance ``k_scale`` and ``v_frame``, and as metadata the fingerprints, the source
        and the hash."""
        from safetensors.numpy import save_file

        metadata = {
            "kvarn_moments": VERSION,
            "config": self.config,
            "weights": self.weights,
            "source": self.source,
            "hash": self.hash,
        }
        save_file(self._tensors(), os.fspath(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Reads what `save` wrote.

        Raises:
            CorruptError: not such a file, or one whose contents do not have the hash it states.
        """
        from safetensors import SafetensorError, safe_open

        name = os.fspath(path)
        try:
            with safe_open(name, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("kvarn_moments") != VERSION:
                    raise CorruptError(
                        f"[kvarn.Moments] {name}: expected moments of version {VERSION} (make them anew: kvarn prepare), got {metadata}"
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CorruptError(f"[kvarn.Moments] {name}: expected a file of moments, got one that does not open ({error})") from None
        if set(tensors) not in ({"k", "v"}, {"k", "v", "k_scale", "v_frame"}):
            raise CorruptError(f"[kvarn.Moments] {name}: expected tensors k, v and perhaps k_scale, v_frame, got {sorted(tensors)}")
        known = {key: metadata.get(key, "") for key in ("config", "weights", "source")}
        try:
            balance = Balance(tensors["k_scale"], tensors["v_frame"]) if "k_scale" in tensors else None
            moments = cls(tensors["k"], tensors["v"], **known, balance=balance)
        except InvalidArgumentError as error:
            raise CorruptError(f"[kvarn.Moments] {name}: expected moments, got what is none: {error}") from None
        if moments.hash != metadata.get("hash"):
            raise CorruptError(f"[kvarn.Moments] {name}: expected contents of hash {metadata.get('hash')}, got {moments.hash}")
        return moments


def _factors(moments: NDArray[np.float32], damping: float) -> NDArray[np.float32]:
    """For M of each layer and head, damped: above the diagonal the unit triangular F with ``F M F^T`` diagonal, on it the channel that each
    step takes. Computed in float64, then rounded to float32.

    F is the GPTQ factor (arXiv 2210.17323) of M with the channels in that order: the upper Cholesky factor of ``M^-1``, every row divided
    by its diagonal. It comes of eliminating what is above the diagonal, from the last column on, with elementwise operations alone, so
    that every machine gets the same bits. Each time, of the channels that are left, the one comes last whose error costs least when the
    steps after it make up for what they can: the last steps have few or none after them.
    """
    out = np.empty_like(moments)
    dim = moments.shape[-1]
    diagonal = np.arange(dim)
    for layer, of_layer in zip(out, moments, strict=True):
        m = of_layer.astype(np.float64)
        heads = np.arange(len(m))
        # A mean without numpy's order of summation, which depends on the machine.
        mean = functools.reduce(np.add, (m[:, i, i] for i in range(dim))) / dim
        m[:, diagonal, diagonal] += damping * mean[:, None]
        order = np.tile(diagonal, (len(m), 1))
        f = np.tile(np.eye(dim), (len(m), 1, 1))
        for j in range(dim - 1, 0, -1):
            # The last of equals, so that without correlation channels stay as they lie.
            least = j - m[:, diagonal[j::-1], diagonal[j::-1]].argmin(1)
            for rows in (order, m, m.swapaxes(1, 2), f[:, :, j + 1 :]):
                rows[heads, j], rows[heads, least] = rows[heads, least], rows[heads, j]
            pivot = m[:, j, j, None]
            share = np.divide(m[:, :j, j], pivot, out=np.zeros_like(m[:, :j, j]), where=pivot > 0)[:, :, None]
            m[:, :j, :j] -= share * m[:, j, None, :j]
            f[:, :j, j:] -= share * f[:, j, None, j:]
        f[:, diagonal, diagonal] = order
        layer[:] = f
    return out
