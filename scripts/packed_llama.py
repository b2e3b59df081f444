"""The forward pass of transformers' LlamaForCausalLM over packed documents, for training.

The model holds the weights. Its layers are computed by functions of tensors alone, on one flat stream of T tokens: compiled, each has one
shape and serves all layers. Attention, whose shapes differ from pack to pack, stays outside of them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

Tensor = torch.Tensor
#: (q [T, H, D], k and v [T, KV heads, D], ends [documents + 1] int32, tokens of the longest) -> [T, H, D]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

BEGIN, END, PADDING, VOCABULARY = 256, 257, 258, 260

# Relative error, in norm, that attention in bfloat16 may have: its roundings are of 2^-9 each and partly cancel; a wrong mask makes it 1.
_TOLERANCE = 0.02


def llama_config(**changes: Any) -> LlamaConfig:
    """The shape of the model: 8 query heads a KV head, head_dim 64, nothing normalised after the projections."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": PADDING,
    }
    return LlamaConfig(**{**shape, **changes})


def new_model(config: LlamaConfig) -> Any:
    """A model with random weights, float32."""
    model: Any = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            # The sum of all layers' outputs then starts at the size of one.
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


# ---- attention within documents ------------------------------------------------------------------------------------------------------


def attend_by_document(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    """Causal attention within each document, one at a time."""
    out = []
    for first, last in itertools.pairwise(ends.tolist()):
        own_q, own_k, own_v = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
        out.append(functional.scaled_dot_product_attention(own_q, own_k, own_v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def attend_packed(grouped: bool) -> Attend:
    """The same for all documents at once, on a CUDA device in 16 bits; `grouped`: the kernel shares KV heads, else they are repeated."""
    from torch.nn.attention.varlen import varlen_attn

    # The name of the causal mask, and whether heads can be shared, differ between torch's versions.
    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    if grouped:
        options["enable_gqa"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        if not grouped:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, **options)
        made: Tensor = out[0] if isinstance(out, tuple) else out
        return made

    return attend


def attention_error(attend: Attend, config: LlamaConfig) -> float:
    """The largest relative error, of the output and the gradients, against `attend_by_document` in float32; on the CUDA device."""
    generator = torch.Generator("cuda").manual_seed(0)
    ends = torch.tensor([0, 100, 101, 700], dtype=torch.int32, device="cuda")
    dim: Any = config.head_dim
    heads: tuple[Any, ...] = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    inputs = [torch.randn(700, n, dim, generator=generator, device="cuda").bfloat16() for n in heads]
    weight = torch.randn(inputs[0].shape, generator=generator, device="cuda").bfloat16()

    def outcome(function: Attend, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(leaves[0], leaves[1], leaves[2], ends, 599)
        return [out.detach().float(), *(g.float() for g in torch.autograd.grad(out, leaves, weight.to(dtype)))]

    pairs = zip(outcome(attend, torch.bfloat16), outcome(attend_by_document, torch.float32), strict=True)
    return max(float((mine - exact).norm() / exact.norm()) for mine, exact in pairs)


def choose_attention(device: torch.device, config: LlamaConfig) -> Attend:
    """The fastest attention that this torch has and that computes what it should.

    Raises:
        RuntimeError: none does.
    """
    if device.type != "cuda":
        return attend_by_document
    for grouped in (True, False):
        try:
            attend = attend_packed(grouped)
            error = attention_error(attend, config)
        except (RuntimeError, TypeError, ValueError) as problem:
            print(f"varlen_attn, KV heads {'shared' if grouped else 'repeated'}: {problem}", flush=True)
            continue
        print(f"varlen_attn, KV heads {'shared' if grouped else 'repeated'}: relative error {error:.4f}", flush=True)
        if error < _TOLERANCE:
            return attend
    raise RuntimeError(f"[kvarn.train] attention: expected torch's varlen_attn to be exact, got neither form of it in {torch.__version__}")


# ---- layers --------------------------------------------------------------------------------------------------------------------------


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary position encoding, in float32, of x [T, heads, D] by cos and sin [T, D]."""
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]).to(x.dtype)


def _before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, query: Tensor, key: Tensor, value: Tensor, dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [T, heads, D] of the residual stream x [T, hidden]."""
    y = _normalise(x, norm, eps)
    q, k, v = (functional.linear(y, weight).unflatten(-1, (-1, dim)) for weight in (query, key, value))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _after_attention(x: Tensor, o: Tensor, output: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    """The residual stream after attention's output o [T, H, D] and the layer's network."""
    x = x + functional.linear(o.flatten(1), output)
    y = _normalise(x, norm, eps)
    return x + functional.linear(functional.silu(functional.linear(y, gate)) * functional.linear(y, up), down)


def _loss(
    x: Tensor, norm: Tensor, embedding: Tensor, ids: Tensor, kinds: Tensor, num_kinds: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss in nats of the tokens that are learnt; sums of losses and numbers of tokens by kind [num_kinds] float32."""
    logits = functional.linear(_normalise(x, norm, eps), embedding).float()
    # A document's last token has no kind, so what a roll brings to it from the next document is not read.
    losses = functional.cross_entropy(logits, ids.roll(-1), reduction="none")
    of_kind = kinds[:, None] == torch.arange(num_kinds, device=kinds.device)
    sums = (losses[:, None] * of_kind).sum(0)
    counts = of_kind.sum(0).float()
    return sums.sum() / counts.sum(), sums.detach(), counts


class PackedLlama:
    """A LlamaForCausalLM over packs.

    Args:
        model: its weights are read where they are.
        compiled: compile the layers for the shapes of the first pack.
    """

    def __init__(self, model: Any, attend: Attend, compiled: bool) -> None:
        config = model.config
        self._body, self._attend = model.model, attend
        self._dim, self._eps = config.head_dim, config.rms_norm_eps
        channels = torch.arange(0, self._dim, 2, dtype=torch.float64) / self._dim
        frequencies = float(config.rope_parameters["rope_theta"]) ** -channels
        angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float64), frequencies).repeat(1, 2)
        self._cos, self._sin = (f(angles).float().to(model.device) for f in (torch.cos, torch.sin))
        functions: tuple[Callable[..., Any], ...] = (_before_attention, _after_attention, _loss)
        self._before, self._after, self._losses = (torch.compile(f, dynamic=False) if compiled else f for f in functions)

    def hidden(self, ids: Tensor, positions: Tensor, ends: Tensor, longest: int) -> Tensor:
        """The residual stream [T, hidden] after the last layer, of ids and positions [T] int64."""
        cos, sin = self._cos[positions], self._sin[positions]
        x: Tensor = self._body.embed_tokens(ids)
        for layer in self._body.layers:
            a, m = layer.self_attn, layer.mlp
            q, k, v = self._before(
                x, cos, sin, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, self._dim, self._eps
            )
            o = self._attend(q, k, v, ends, longest)
            norm = layer.post_attention_layernorm.weight
            x = self._after(x, o, a.o_proj.weight, norm, m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight, self._eps)
        return x

    def logits(self, ids: Tensor, positions: Tensor, ends: Tensor, longest: int) -> Tensor:
        """Logits [T, vocabulary]."""
        x = self.hidden(ids, positions, ends, longest)
        return functional.linear(_normalise(x, self._body.norm.weight, self._eps), self._body.embed_tokens.weight)

    def loss(
        self, ids: Tensor, positions: Tensor, kinds: Tensor, ends: Tensor, longest: int, num_kinds: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss, and sums and numbers of tokens by kind."""
        x = self.hidden(ids, positions, ends, longest)
        made: tuple[Tensor, Tensor, Tensor] = self._losses(
            x, self._body.norm.weight, self._body.embed_tokens.weight, ids, kinds, num_kinds, self._eps
        )
        return made
