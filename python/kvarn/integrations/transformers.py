"""KVarN caches for Hugging Face transformers: `KvarnCache`, given as ``past_key_values`` to a model or to ``generate``.

Two paths, chosen by the model's attention implementation:

- **fused**, after `enable` (``model.set_attn_implementation("kvarn")``): decode steps attend straight from the records;
- **plain**, with any other implementation: ``update`` returns K and V in full, the cached part dequantised. Slower, and correct.

Both agree on what a token sees: the tokens of its own step in full precision, earlier tokens as the cache holds them. The tokens of a step
stay uncommitted until the next one, so that ``crop`` takes back speculated tokens exactly.

Eager PyTorch only: the fused path hands K and V on through an attribute, which ``torch.compile`` does not follow.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import cache_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from kvarn._errors import InvalidArgumentError, UnsupportedError
from kvarn._moments import Moments
from kvarn.cache import Cache, CacheMemory, CacheSequence, Step
from kvarn.integrations.moments import check_weights

__all__ = ["ATTENTION", "KvarnCache", "disable", "enable"]

#: Name of the attention implementation.
ATTENTION = "kvarn"

# Arguments of attention functions that change the result and that this one does not know.
_REFUSED = ("position_bias", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k", "cache", "block_table")


def enable(model: Any) -> Any:
    """Switches a model to the fused path: ``model.set_attn_implementation("kvarn")``. Without a `KvarnCache` it then computes as "sdpa".

    Returns:
        The model.
    """
    model.set_attn_implementation(ATTENTION)
    if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION:
        raise UnsupportedError(f"[kvarn.transformers] model: expected one that lets its attention be chosen, got {type(model).__name__}")
    return model


def disable(model: Any, implementation: str = "sdpa") -> Any:
    """Switches a model back. Returns the model."""
    model.set_attn_implementation(implementation)
    return model


@dataclass
class _Fresh:
    """What `update` leaves on K for the attention function: whose K and V these are."""

    cache: KvarnCache
    layer: int


@dataclass
class _MaskInfo:
    """What `_kvarn_mask` leaves on the mask: the 2D padding mask (None: no padding), the sliding window (0: none), and whether that is all
    there is to it beyond causality."""

    padding: torch.Tensor | None = None
    window: int = 0
    regular: bool = True


class KvarnLayer(cache_utils.CacheLayerMixin):  # type: ignore[no-untyped-call, unused-ignore]
    """One layer of a `KvarnCache`, as transformers sees it. The cache does the work."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: KvarnCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # A strong reference would be a cycle, and keep a cache's memory until the garbage collector comes by.
        self._reference = weakref.ref(cache)
        self._index = index

    @property
    def _cache(self) -> KvarnCache:
        cache = self._reference()
        if cache is None:
            raise UnsupportedError("[kvarn.transformers] layer: expected one whose KvarnCache is alive, got one of a cache that is gone")
        return cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the cache allocates at the first update."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KvarnCache.update`."""
        return self._cache.update(key_states, value_states, self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns of the mask, first column)."""
        return self._cache.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first update."""
        return len(self._cache.sequences) or -1

    def _refuse(self, name: str) -> None:
        raise UnsupportedError(f"[kvarn.transformers] {name}: expected a call on the whole KvarnCache, got one on a single layer")

    def reset(self) -> None:
        self._refuse("reset")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._refuse("reorder_cache")

    def crop(self, tokens_to_remove: int) -> None:
        self._refuse("crop")

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._refuse("batch_select_indices")

    def offload(self) -> None:
        self._refuse("offload")

    def prefetch(self) -> None:
        self._refuse("prefetch")


class KvarnCache(cache_utils.Cache):
    """A quantised KV cache for one batch of sequences.

    Args:
        config: the model's configuration (``model.config``), or the model itself.
        format: record format, such as "k4v2_g128".
        moments: of the model (`kvarn.prepare`), for rounding with feedback. Given the model as `config`, its weights are checked too.
        sink_tokens, recent_tokens, normalisation, rounding, max_tokens, max_sequences, num_threads: as for `kvarn.Cache`, which is made at
            the first update with the model's shapes and device.
        dtype: of what the cache keeps in full precision; None: the model's.

    Left-padded batches: on the fused path only real tokens are stored; on the plain path padding is stored as well, because ``update`` is
    not told which tokens are padding.

    Sliding-window layers keep all tokens, and attend to those in their window.

    Raises:
        UnsupportedError: layers that are neither full nor sliding-window attention; K and V of different shapes, or that differ between
            layers; layers on several devices; a model in training mode with dropout.
        ValueError: moments of another model.
    """

    def __init__(
        self,
        config: Any,
        format: str = "k4v2_g128",
        *,
        sink_tokens: int | None = None,
        recent_tokens: int = 0,
        normalisation: str = "scale_invariant",
        rounding: str = "auto",
        moments: Moments | None = None,
        max_tokens: int = 0,
        max_sequences: int = 1,
        num_threads: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(config, PreTrainedModel):
            if moments is not None:
                check_weights(moments, config)
            config = config.config
        self.config = config.get_text_config(decoder=True)
        kinds = cache_utils.get_layer_types_and_kwargs(self.config)[0]
        other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if other or getattr(config, "is_encoder_decoder", False):
            expected = "[kvarn.transformers] config: expected a decoder of full_attention and sliding_attention layers"
            raise UnsupportedError(f"{expected}, got {other or 'an encoder-decoder'}")
        super().__init__(layers=[KvarnLayer(self, index) for index in range(len(kinds))])
        if moments is not None:
            heads = self.config.num_key_value_heads
            dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
            moments.check(num_layers=len(kinds), num_kv_heads=heads, head_dim=dim, config=config)
        self.format = format
        self._options: dict[str, Any] = {
            "sink_tokens": sink_tokens,
            "recent_tokens": recent_tokens,
            "normalisation": normalisation,
            "rounding": rounding,
            "moments": moments,
            "max_tokens": max_tokens,
            "max_sequences": max_sequences,
            "num_threads": num_threads,
            "dtype": dtype,
        }
        self._store: Cache | None = None
        self.sequences: list[CacheSequence] = []
        self._columns = 0  # columns of the mask so far, padding included
        self._real: torch.Tensor | None = None  # bool [batch, columns] on the CPU, where a batch has padding: which columns are stored
        self._step: Step | None = None
        self._rows: torch.Tensor | None = None  # bool [batch, new columns] where the step has padding
        self._past: list[tuple[Any, int]] = []  # block table and tokens of each sequence before the step
        self._past_real: torch.Tensor | None = None  # `_real` before the step
        self._has_gaps = False  # padding after real tokens
        self._is_prepared = False  # `DecodeGraph` has opened the step
        self._waiting: int | None = None  # layer whose fresh K and V the attention function has not taken yet

    def __repr__(self) -> str:
        return f'KvarnCache("{self.format}", {len(self.sequences)} sequences, {self._columns} tokens)'

    # ---- what transformers asks ---------------------------------------------------------------------------------------------------

    @property
    def is_fused(self) -> bool:
        """Whether the model is on the fused path."""
        return bool(self.config._attn_implementation == ATTENTION)

    @property
    def is_initialized(self) -> bool:
        """Whether memory has been allocated."""
        return self._store is not None

    @property
    def store(self) -> Cache:
        """The `kvarn.Cache` underneath. Raises UnsupportedError before the first update."""
        if self._store is None:
            raise UnsupportedError("[kvarn.transformers] store: expected a cache that has been updated, got an empty one")
        return self._store

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(columns of the mask, first column)."""
        return self._columns + query_length, 0

    def usage(self) -> CacheMemory:
        """Bytes in use; see `kvarn.CacheMemory`."""
        return self.store.usage()

    # ---- update -------------------------------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the new K and V of one layer, ``[batch, num_kv_heads, new tokens, head_dim]``, K after the rotary embedding.

        Returns:
            On the plain path K and V of all tokens so far, ``[batch, num_kv_heads, tokens, head_dim]``. On the fused path the new ones,
            marked for the attention function, which stores them and reads the rest itself.
        """
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            raise UnsupportedError(
                f'[kvarn.transformers] layer {waiting}: expected its attention function to be "{ATTENTION}" and to get K as the cache '
                'returned it, got neither; use the plain path (attn_implementation="sdpa") with this model'
            )
        self._check_shapes(key_states, value_states, layer_idx)
        if self.is_fused:
            key_states = key_states.view_as(key_states)  # a tensor of our own: the mark must not stay on the model's
            key_states._kvarn = _Fresh(self, layer_idx)  # type: ignore[attr-defined]
            self._waiting = layer_idx
            return key_states, value_states
        if layer_idx == 0:
            self._begin(key_states.shape[2], None)
        full = self._with_past(layer_idx, key_states, value_states)
        self._write(layer_idx, key_states, value_states)
        return full

    def _check_shapes(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> None:
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise UnsupportedError(
                "[kvarn.transformers] update: expected torch.no_grad() or inference_mode(), got K or V that require grad"
            )
        if key.shape != value.shape:
            raise UnsupportedError(
                f"[kvarn.transformers] update: expected K and V of the same shape, got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        batch, heads, _, head_dim = key.shape
        if self._store is None:
            options = dict(self._options, max_sequences=max(batch, self._options["max_sequences"]))
            options["dtype"] = options["dtype"] or key.dtype
            self._store = Cache(
                self.format,
                num_layers=len(self.layers),
                num_kv_heads=heads,
                head_dim=head_dim,
                num_q_heads=self.config.num_attention_heads,
                device=key.device,
                **options,
            )
        store = self._store
        if not self.sequences:
            self.sequences = [store.sequence() for _ in range(batch)]
        expected = (len(self.sequences), store.num_kv_heads, store.head_dim)
        if (batch, heads, head_dim) != expected:
            raise UnsupportedError(
                f"[kvarn.transformers] layer {layer}: expected batch, KV heads and head_dim {expected}, got {(batch, heads, head_dim)}"
            )
        if key.device != store.staging.device:
            raise UnsupportedError(f"[kvarn.transformers] layer {layer}: expected K on {store.memory.torch_device}, got {key.device}")

    # ---- a step -------------------------------------------------------------------------------------------------------------------

    def _begin(self, new: int, padding: torch.Tensor | None) -> None:
        """Opens a step of `new` columns, after the tokens of the last one were made permanent.

        `padding` is the bool mask [batch, columns so far + new] when some column is padding.
        """
        store, batch = self.store, len(self.sequences)
        if any(sequence.num_committed != sequence.num_tokens for sequence in self.sequences):
            store.commit(self.sequences)
        if padding is None and self._real is None:
            self._open(new, [new] * batch)
            return
        before = torch.ones(batch, self._columns, dtype=torch.bool) if self._real is None else self._real
        real = torch.cat([before, torch.ones(batch, new, dtype=torch.bool)], 1) if padding is None else padding.cpu()
        if (
            real.shape[1] != self._columns + new
            or not torch.equal(real[:, : self._columns], before)
            or (padding is None and self._real is not None)
        ):
            raise UnsupportedError(
                f"[kvarn.transformers] attention_mask: expected [{batch}, {self._columns + new}] with the columns so far unchanged, "
                f"got {'none' if padding is None else f'{list(padding.shape)} with other columns'}"
            )
        rows = real[:, self._columns :]
        self._open(new, [int(count) for count in rows.sum(1)])
        self._rows = None if bool(rows.all()) else rows.to(store.memory.torch_device)
        self._real = None if padding is None else real
        self._has_gaps = self._real is not None and bool((self._real[:, :-1] & ~self._real[:, 1:]).any())

    def _open(self, new: int, counts: list[int]) -> None:
        self._past = [(sequence.table(), sequence.num_tokens) for sequence in self.sequences]
        self._past_real, self._rows, self._has_gaps = self._real, None, False
        self._step = self.store.begin(self.sequences, counts)
        self._columns += new

    def _flat(self, states: torch.Tensor) -> torch.Tensor:
        """[batch, heads, new, D] -> [real tokens, heads, D] in the cache's dtype, sequence after sequence."""
        tokens = states.detach().transpose(1, 2)
        if tokens.dtype != self._dtype:
            tokens = tokens.to(self._dtype)
        return tokens.flatten(0, 1) if self._rows is None else tokens[self._rows]

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        assert self._step is not None
        self.store.write(self._step, layer, self._flat(key), self._flat(value))

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.store.staging.dtype
        return dtype

    def _with_past(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns before this step, dequantised, and the new ones: K and V [batch, heads, columns, D]. Called before the layer is
        written, because its old tiles lie where the tables said before the step began. Padding is zero."""
        store, past = self.store, self._columns - key.shape[2]
        if past == 0:
            return key, value
        shape = (len(self.sequences), self._columns, store.num_kv_heads, store.head_dim)
        full_k, full_v = key.new_zeros(shape), key.new_zeros(shape)
        for row, (table, tokens) in enumerate(self._past):
            k, v = store._dequantise(table, tokens, layer)
            columns: Any = slice(0, past)
            if self._past_real is not None:
                columns = self._past_real[row].nonzero()[:, 0].to(full_k.device)
            full_k[row, columns], full_v[row, columns] = k.to(key.dtype), v.to(key.dtype)
        full_k[:, past:], full_v[:, past:] = key.transpose(1, 2), value.transpose(1, 2)
        return full_k.transpose(1, 2), full_v.transpose(1, 2)

    def _attend(
        self,
        layer: int,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: _Options,
    ) -> torch.Tensor:
        """Stores the fresh K and V of one layer and returns the attention output [batch, new, query heads, D]."""
        self._waiting = None
        batch, _, new, _ = key.shape
        # A mask without a note was made by hand; the kernels do not know it.
        info = _MaskInfo() if mask is None else getattr(mask, "_kvarn", _MaskInfo(regular=False))
        if layer == 0 and not self._is_prepared:
            self._begin(new, info.padding)
        first_step = new == self._columns
        known = info.regular and options.causal and not (info.window and self._has_gaps)
        # A prompt attends to its own tokens in full precision, and so does any step that the kernels cannot do.
        if first_step or new > self.store.format.tile_tokens or not known:
            full = self._with_past(layer, key, value)
            self._write(layer, key, value)
            return _dense_attention(module, query, *full, mask, options)
        self._write(layer, key, value)
        assert self._step is not None
        out = self.store.attend(
            self._step,
            layer,
            self._flat(query),
            softmax_scale=options.scaling,
            window=info.window,
            logits_soft_cap=options.soft_cap,
            sinks=options.sinks,
        )
        out = out.to(query.dtype)
        if self._rows is None:
            result: torch.Tensor = out.view(batch, new, *out.shape[1:])
            return result
        padded: torch.Tensor = out.new_zeros(batch, new, *out.shape[1:])
        padded[self._rows] = out
        return padded

    # ---- changes of the batch and the length -----------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` columns. Exact for the tokens of the last step, up to one tile."""
        if tokens_to_remove > 0:
            raise InvalidArgumentError(f"[kvarn.transformers] crop: expected 0 or a negative number of tokens, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self._store is None:
            return
        columns = self._columns + tokens_to_remove
        if columns < 0:
            raise InvalidArgumentError(f"[kvarn.transformers] crop: expected at most {self._columns} tokens, got {-tokens_to_remove}")
        for row, sequence in enumerate(self.sequences):
            removed = -tokens_to_remove if self._real is None else int(self._real[row, columns:].sum())
            sequence.truncate(sequence.num_tokens - removed)
        self._columns = columns
        if self._real is not None:
            self._real = self._real[:, :columns]
            if bool(self._real.all()):
                self._real = None
        self._step = None

    def reset(self) -> None:
        """Drops all tokens; the memory stays."""
        for sequence in self.sequences:
            sequence.free()
        self.sequences = []
        self._columns, self._real, self._step, self._rows, self._waiting = 0, None, None, None, None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes a continuation of what was sequence ``beam_idx[i]``."""
        self._select([int(index) for index in beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence becomes `repeats` sequences that share its memory."""
        self._select([index for index in range(len(self.sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences, in that order."""
        chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._select([int(index) for index in chosen])

    def _select(self, indices: list[int]) -> None:
        if self._store is None:
            return
        old = self.sequences
        used: set[int] = set()
        new = []
        for index in indices:
            new.append(old[index].fork() if index in used else old[index])
            used.add(index)
        for index, sequence in enumerate(old):
            if index not in used:
                sequence.free()
        self.sequences = new
        if self._real is not None:
            self._real = self._real[indices]
        self._step = None

    @classmethod
    def from_cache(cls, config: Any, cache: cache_utils.Cache, format: str = "k4v2_g128", **options: Any) -> KvarnCache:
        """A KvarnCache with the tokens of a cache in full precision, as if the same prompt had been read with it.

        Args:
            config, format, options: as for `KvarnCache`.
            cache: a ``DynamicCache`` that holds every token of one or more sequences of equal length, without padding. It is only read.
        """
        made = cls(config, format, **options)
        layers: list[Any] = list(cache.layers)
        keys = [layer.keys for layer in layers]
        if len(keys) != len(made.layers) or any(key is None or key.shape[2] != cache.get_seq_length() for key in keys):
            raise UnsupportedError("[kvarn.transformers] cache: expected K and V of every token in every layer, got fewer")
        for index, layer in enumerate(layers):
            made._check_shapes(layer.keys, layer.values, index)
            if index == 0:
                made._begin(layer.keys.shape[2], None)
            made._write(index, layer.keys, layer.values)
        return made

    def fork(self) -> KvarnCache:
        """A second cache with the same tokens, in the same memory (copy-on-write); what ``copy.deepcopy`` does as well."""
        twin = KvarnCache(self.config, self.format, **self._options)
        twin._store, twin._columns = self._store, self._columns
        twin._real = None if self._real is None else self._real.clone()
        twin.sequences = [sequence.fork() for sequence in self.sequences]
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> KvarnCache:
        return self.fork()

    def activate_past_recording(self) -> None:
        """Nothing: the last step can always be cropped."""


@dataclass
class _Options:
    """Arguments of an attention call, checked."""

    scaling: float | None
    soft_cap: float
    sinks: torch.Tensor | None
    causal: bool
    dropout: float


def _dense_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: _Options
) -> torch.Tensor:
    """Attention over K and V in full precision; [batch, tokens, query heads, D]. The mask is transformers' 4D mask, or None: causal."""
    if not options.soft_cap and options.sinks is None:
        causal = None if options.causal else False
        out: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, mask, dropout=options.dropout, scaling=options.scaling, is_causal=causal
        )[0]
        return out
    if options.dropout:
        raise UnsupportedError(f"[kvarn.transformers] dropout: expected 0 with a soft cap or sinks, got {options.dropout}")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = (query @ key.transpose(2, 3)).float() * scale
    if options.soft_cap:
        scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    elif options.causal and query.shape[2] > 1:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - query.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    if options.sinks is None:
        weights = scores.softmax(-1).nan_to_num(0.0)  # rows of padding see nothing
    else:
        sinks = options.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()


def _kvarn_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "kvarn"; query, key, value are ``[batch, heads, tokens, D]``, the result ``[batch, tokens, heads, D]``."""
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"[kvarn.transformers] {name}: expected None, got a value; use another attention implementation")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    fresh: _Fresh | None = getattr(key, "_kvarn", None)
    sinks = None if s_aux is None else s_aux.detach().float()
    options = _Options(scaling, softcap or 0.0, sinks, causal, dropout if module.training else 0.0)
    if fresh is None:
        return _dense_attention(module, query, key, value, attention_mask, options), None
    if options.dropout:
        raise UnsupportedError(f"[kvarn.transformers] dropout: expected 0 with a KvarnCache, got {options.dropout}")
    return fresh.cache._attend(fresh.layer, module, query, key, value, attention_mask, options), None


def _kvarn_mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """The mask function "kvarn": the boolean mask of "sdpa" (None: causal without padding), with what the kernels need noted on it."""
    mask: torch.Tensor | None = sdpa_mask(**kwargs, attention_mask=attention_mask)
    if mask is not None:
        regular = bool(kwargs.get("allow_is_causal_skip", True)) and not kwargs.get("use_vmap", False)
        padding = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        mask._kvarn = _MaskInfo(padding, kwargs.get("local_size") or 0, regular)  # type: ignore[attr-defined]
    return mask


def _register(attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    AttentionInterface.register(ATTENTION, attention)
    # Without a mask function of its own an implementation gets no mask at all, and padding would be attended to.
    AttentionMaskInterface.register(ATTENTION, mask)


_register(_kvarn_attention, _kvarn_mask)
