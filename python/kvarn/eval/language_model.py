"""A causal language model of transformers, as the measurements use it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvarn.demo.model import BEGIN, END
from kvarn.eval.attention import ATTENTION, SimulatedCache, attending
from kvarn.integrations.sensitivity import Sensitivity, measure

Tensor = torch.Tensor

# A model without a tokenizer whose vocabulary is this small reads bytes, as the project's models do.
_BYTE_VOCABULARY = 512
# Tokens whose K, V and gradients are kept whole, for KVQuant; its authors calibrate with as many.
_KEPT_TOKENS = 32768
# Positions over which the calibration's windows are spread.
_MOST_POSITIONS = 16384


@dataclass(frozen=True)
class Calibration:
    """K (after the position encoding), V and the gradients of the loss for them, [L, B, H, tokens, D] float32."""

    k: Tensor
    v: Tensor
    k_gradient: Tensor
    v_gradient: Tensor


class LanguageModel:
    """A model, its tokens, and what quantisers may ask of it.

    Args:
        model: of AutoModelForCausalLM; its attention is switched to "kvarn_eval" and its weights are frozen.
        tokenizer: None: tokens are bytes.
        calibration_tokens: int64 [B, tokens], for methods that need a text; None: random tokens.
    """

    def __init__(self, model: Any, tokenizer: Any = None, calibration_tokens: Tensor | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        model.set_attn_implementation(ATTENTION)
        config = model.config.get_text_config(decoder=True)
        self.config = config
        self.num_layers = int(config.num_hidden_layers)
        self.num_q_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(getattr(config, "num_key_value_heads", None) or self.num_q_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.num_q_heads)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        if calibration_tokens is None:
            generator = torch.Generator().manual_seed(0)
            calibration_tokens = torch.randint(
                0, min(256, config.vocab_size) if self.is_bytes else config.vocab_size, (4, 512), generator=generator
            )
        self.calibration_tokens = calibration_tokens
        self._calibration: Calibration | None = None
        self._query_moment: Tensor | None = None
        self._sensitivity: Sensitivity | None = None

    @classmethod
    def load(cls, name: str | Path, device: str, dtype: torch.dtype, calibration_tokens: Tensor | None = None) -> LanguageModel:
        """A model of a folder or of the hub. Without tokenizer files and with a vocabulary of at most 512 tokens it reads bytes."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        model = model.to(device)
        tokenizer = None
        if AutoConfig.from_pretrained(name).get_text_config(decoder=True).vocab_size > _BYTE_VOCABULARY:
            tokenizer = AutoTokenizer.from_pretrained(name)
        return cls(model, tokenizer, calibration_tokens)

    @property
    def is_bytes(self) -> bool:
        """Whether one token is one byte."""
        return self.tokenizer is None

    def encode(self, text: str) -> list[int]:
        """Tokens of a document, with the token that begins one where the model has it."""
        if self.tokenizer is None:
            return [BEGIN, *text.encode()]
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Text of the tokens, without the special ones."""
        if self.tokenizer is None:
            return bytes(token for token in tokens if token < BEGIN).decode(errors="replace")
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    @property
    def end_tokens(self) -> list[int]:
        """Tokens that end a response."""
        if self.is_bytes:
            return [END]
        end = self.model.generation_config.eos_token_id
        return [] if end is None else list(end) if isinstance(end, (list, tuple)) else [int(end)]

    def cache(self, batch: int, length: int, quantiser: Any = None, source: tuple[Tensor, Tensor] | None = None) -> SimulatedCache:
        """An empty cache with room for `length` tokens."""
        return SimulatedCache(
            (self.num_layers, batch, self.num_kv_heads, length, self.head_dim), self.device, self.dtype, quantiser, source
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: SimulatedCache, last_only: bool = False, observer: Any = None, start: int = 0) -> Tensor:
        """Logits float32 [B, t or 1, vocabulary] of tokens [B, t] after those in the cache, which is written but not advanced; `start` is
        the position of the cache's first token."""
        if cache.position is None:
            first = start + cache.length
            positions = torch.arange(first, first + tokens.shape[1], device=self.device)[None]
        else:
            positions = cache.position[None]
        with attending(cache, observer):
            out = self.model(tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1 if last_only else 0)
        logits: Tensor = out.logits.float()
        return logits

    # ---- what quantisers ask ---------------------------------------------------------------------------------------------------------

    def _rope(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin [count, rotated channels] float32."""
        module = next((m for name, m in self.model.named_modules() if name.endswith("rotary_emb")), None)
        if module is None:
            raise ValueError(f"[kvarn.eval] model: expected one with a rotary position encoding, got {type(self.model).__name__}")
        positions = torch.arange(start, start + count, device=self.device)[None]
        cos, sin = module(torch.zeros(1, device=self.device, dtype=torch.float32), positions)
        return cos[0].float(), sin[0].float()

    def rotate(self, x: Tensor, start: int, inverse: bool = False) -> Tensor:
        """The rotary position encoding of x [..., tokens, D] at positions from `start` on."""
        cos, sin = self._rope(start, x.shape[-2])
        sin = -sin if inverse else sin
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        a, b = turned.chunk(2, -1)
        turned = turned * cos + torch.cat([-b, a], -1) * sin
        if inverse:
            turned = turned / (cos.square() + sin.square())
        return torch.cat([turned, rest], -1)

    def unrotate(self, x: Tensor, start: int) -> Tensor:
        """The inverse of `rotate`."""
        return self.rotate(x, start, inverse=True)

    def query_moment(self) -> Tensor:
        """M_K [L, H, D, D] float64: the mean of ``q q^T`` over the queries of each KV head, from one pass over the calibration tokens.

        Their windows are spread over the model's positions, because queries turn with them.
        """
        if self._query_moment is None:
            shape = (self.num_layers, self.num_kv_heads, self.head_dim, self.head_dim)
            total = torch.zeros(shape, dtype=torch.float64, device=self.device)
            count = self.calibration_tokens.numel() * self.num_q_heads // self.num_kv_heads

            def observe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
                flat = q.double().unflatten(1, (self.num_kv_heads, -1)).transpose(0, 1).flatten(1, 3)
                total[layer] += flat.transpose(1, 2) @ flat / count

            windows = self.calibration_tokens.to(self.device)
            room = min(int(getattr(self.config, "max_position_embeddings", _MOST_POSITIONS)), _MOST_POSITIONS) - windows.shape[1]
            for index, row in enumerate(windows):
                start = max(0, room) * index // max(1, len(windows) - 1)
                self.step(row[None], self.cache(1, len(row)), True, observe, start)
            self._query_moment = total
        return self._query_moment

    def use_sensitivity(self, made: Sensitivity) -> None:
        """Takes moments that were made before, of this model and these calibration tokens."""
        self._sensitivity = made

    def sensitivity(self) -> Sensitivity:
        """Moments of the gradients for K and V on the calibration tokens, as `kvarn.prepare` makes them."""
        if self._sensitivity is None:
            # In 16 bits small gradients would vanish.
            model = copy.deepcopy(self.model).float() if self.dtype == torch.float16 else self.model
            self._sensitivity = measure(model, list(self.calibration_tokens))
        return self._sensitivity

    def output_moment(self) -> Tensor:
        """M_V [L, H, D, D] float64: the sum of ``W_o^T W_o`` over the query heads of each KV head, from the weights."""
        projections = [
            module.weight for name, module in self.model.named_modules() if name.endswith(("self_attn.o_proj", "self_attn.dense"))
        ]
        if len(projections) != self.num_layers:
            raise ValueError(f"[kvarn.eval] model: expected {self.num_layers} output projections self_attn.o_proj, got {len(projections)}")
        moments = []
        for weight in projections:
            w = weight.double().unflatten(1, (self.num_kv_heads, -1, self.head_dim))
            moments.append(torch.einsum("ikgd,ikge->kde", w, w))
        return torch.stack(moments)

    def calibration(self) -> Calibration:
        """K, V and their gradients on the calibration tokens, at most 32,768 of them."""
        if self._calibration is None:
            windows: list[list[tuple[Tensor, Tensor]]] = []

            def observe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
                k.retain_grad()
                v.retain_grad()
                windows[-1].append((k, v))

            count = max(1, _KEPT_TOKENS // self.calibration_tokens.shape[1])
            for tokens in self.calibration_tokens[:count].to(self.device).split(1):
                windows.append([])
                embedded = self.model.get_input_embeddings()(tokens).detach().requires_grad_()
                with torch.enable_grad(), attending(None, observe):
                    logits = self.model(inputs_embeds=embedded, use_cache=False).logits.float()
                    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
            parts = [torch.cat([torch.stack([pair[i].detach().float() for pair in kept]) for kept in windows], 1) for i in range(2)]
            gradients = [
                torch.cat([torch.stack([g.float() for pair in kept if (g := pair[i].grad) is not None]) for kept in windows], 1)
                for i in range(2)
            ]
            self._calibration = Calibration(*parts, *gradients)
        return self._calibration
