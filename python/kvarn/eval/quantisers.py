"""What is compared: a `Quantiser` turns complete tiles of K and V into what its cache would give back.

Tiles come as ``[L, B, H, n * G, D]`` float32 (layers, sequences, KV heads, whole tiles of G tokens, channels), K after the position
encoding.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kvarn._turns import BUCKET_TOKENS
from kvarn.eval.encoder import EncoderOptions, Feedback, encode, rotation
from kvarn.integrations.frames import moved

if TYPE_CHECKING:
    from kvarn.eval.language_model import LanguageModel

Tensor = torch.Tensor


class Quantiser:
    """A cache format. `prepare` is called once with the model that it will serve.

    Attributes:
        name: as `parse` reads it.
        tile_tokens: tokens of a tile; a tile is replaced when it is complete.
        sink_tokens: the first tokens of a sequence that stay as they are.
        recent_tokens: (K, V) last tokens that stay as they are, besides the unfinished tile.
        logit_bias: scores of quantised tokens are lowered by half their noise's variance, ``(softmax_scale |q|)^2 s^2 / 2`` with s^2 the
            mean squared error of the token's channels: noise raises the mean of exp(score) by that much. A question to the attention
            kernels, which the record does not answer yet.
    """

    name = "?"
    tile_tokens = 128
    sink_tokens = 128
    recent_tokens: tuple[int, int] = (0, 0)
    logit_bias = False

    def prepare(self, model: LanguageModel) -> None:
        """Takes from the model what the method needs beforehand: nothing, unless it says so."""

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        """Bits of a value of K and of V in a quantised tile, all metadata included."""
        raise NotImplementedError

    def keys(self, x: Tensor, start: int) -> Tensor:
        """What the cache gives back for K; `start` is the position of the first token."""
        raise NotImplementedError

    def values(self, x: Tensor, start: int) -> Tensor:
        """The same for V."""
        raise NotImplementedError


class Cast(Quantiser):
    """16 bits: every token is stored in `dtype`, none is quantised."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sink_tokens = 0

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        return 16.0, 16.0

    def keys(self, x: Tensor, start: int) -> Tensor:
        stored: Tensor = x.to(self.dtype).to(x.dtype)
        return stored

    values = keys


def tiles(x: Tensor, tile_tokens: int) -> Tensor:
    """[L, B, H, n * G, D] -> [L, B, n, H, G, D]."""
    tiled: Tensor = x.unflatten(3, (-1, tile_tokens)).transpose(2, 3)
    return tiled


def untile(x: Tensor) -> Tensor:
    """The inverse of `tiles`."""
    return x.transpose(2, 3).flatten(3, 4)


@dataclasses.dataclass(frozen=True)
class Widths:
    """The numbers of a format's name, k4v2_g128_m8."""

    k: int
    v: int
    tile: int = 128
    metadata: int = 16

    def bits(self, head_dim: int) -> tuple[float, float]:
        """KVarN's bits per value: three vectors of metadata for each operand; with 8 bits also a low and a step of 16 bits for each."""
        m, extra = self.metadata, 0.0 if self.metadata == 16 else 3 * 32 / (self.tile * head_dim)
        return (
            self.k + 2 * m / self.tile + m / head_dim + extra,
            self.v + m / self.tile + 2 * m / head_dim + extra,
        )


class Kvarn(Quantiser):
    """KVarN by the encoder in PyTorch, with its options, and optionally with feedback.

    Args:
        widths: of the format.
        k_options, v_options: of the two operands.
        feedback: "", "k", "v" or "kv": operands whose rounding feeds its errors on.
        rotate: "hadamard", "signed" (with random signs) or "none", for K and V.
        moments: what feedback weighs errors by: "gradients" (of the model's predictions, K's at the tile's positions), or only "queries"
            and output projections, averaged over all positions.
        bucket: positions that share K's moment.
    """

    def __init__(
        self,
        widths: Widths,
        k_options: EncoderOptions | None = None,
        v_options: EncoderOptions | None = None,
        feedback: str = "",
        rotate: tuple[str, str] = ("hadamard", "hadamard"),
        moments: str = "gradients",
        bucket: int = BUCKET_TOKENS,
    ) -> None:
        if moments not in ("gradients", "queries"):
            raise ValueError(f"[kvarn.eval] moments: expected gradients or queries, got {moments!r}")
        if bucket < widths.tile or bucket % widths.tile:
            raise ValueError(f"[kvarn.eval] bucket: expected a multiple of {widths.tile} tokens, got {bucket}")
        self.widths, self.feedback, self.rotate = widths, feedback, rotate
        self.moments, self.bucket = moments, bucket
        self.k_options, self.v_options = k_options or EncoderOptions(), v_options or EncoderOptions()
        self.tile_tokens = widths.tile
        self._model: LanguageModel | None = None
        self._feedback: dict[tuple[bool, int], Feedback] = {}

    def prepare(self, model: LanguageModel) -> None:
        """Takes the model, whose moments become factors when they are needed."""
        self._model = model

    def _feedback_at(self, is_key: bool, bucket: int) -> Feedback:
        """For tiles [L, B, n, H, ...] of one bucket of positions."""
        if (is_key, bucket) not in self._feedback:
            model = self._model
            if model is None:
                raise ValueError("[kvarn.eval] feedback: expected a prepared quantiser, got one without a model")
            back = self._frame(is_key, model.head_dim, model.device)[1]
            if self.moments == "queries":
                moment = moved(model.query_moment() if is_key else model.output_moment(), back.double())
            else:
                moment = moment_at(model, is_key, back, bucket * self.bucket, self.bucket)
            options = self.k_options if is_key else self.v_options
            self._feedback[is_key, bucket] = Feedback.of(moment[:, None, None], self.widths.k, options)
        return self._feedback[is_key, bucket]

    def _feedback_for(self, is_key: bool, start: int, count: int) -> Feedback | None:
        """For `count` tiles from position `start` on."""
        if ("k" if is_key else "v") not in self.feedback:
            return None
        if not is_key or self.moments == "queries":
            return self._feedback_at(is_key, 0)
        buckets = [(start + i * self.tile_tokens) // self.bucket for i in range(count)]
        if len(set(buckets)) == 1:
            return self._feedback_at(True, buckets[0])
        parts = [self._feedback_at(True, bucket) for bucket in buckets]
        return Feedback(
            torch.cat([part.factor for part in parts], 2),
            None if parts[0].rank is None else torch.cat([part.rank for part in parts if part.rank is not None], 2),
            None if parts[0].moment is None else torch.cat([part.moment for part in parts if part.moment is not None], 2),
        )

    def _frame(self, is_key: bool, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The matrix that leads rows of K or V to where they are rounded, and the one that leads back: [D, D] or [L, H, D, D]."""
        how = self.rotate[0 if is_key else 1]
        if how == "none":
            h = torch.eye(head_dim, device=device)
        else:
            h = rotation(head_dim, device, 1 if how == "signed" else None)
        return h, h.T

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        k, v = self.widths.bits(head_dim)
        # Without normalisation the column scale need not be stored.
        if self.k_options.normalisation == "none":
            k -= self.widths.metadata / head_dim
        if self.v_options.normalisation == "none":
            v -= self.widths.metadata / self.widths.tile
        return k, v

    def _round_trip(self, x: Tensor, is_key: bool, start: int) -> Tensor:
        to, back = (m if m.ndim == 2 else m[:, None] for m in self._frame(is_key, x.shape[-1], x.device))
        turned = x @ to
        if self.rotate[0 if is_key else 1] != "none":
            turned = turned.half().float()  # staging holds the rotated tile in fp16
        t = tiles(turned, self.tile_tokens)
        feedback = self._feedback_for(is_key, start, t.shape[2])
        if is_key:
            out = encode(t.transpose(-1, -2), self.widths.k, self.k_options, feedback).decode().transpose(-1, -2)
        else:
            out = encode(t, self.widths.v, self.v_options, feedback, is_key=False).decode()
        return untile(out) @ back

    def keys(self, x: Tensor, start: int) -> Tensor:
        return self._round_trip(x, True, start)

    def values(self, x: Tensor, start: int) -> Tensor:
        return self._round_trip(x, False, start)


class Balanced(Kvarn):
    """KVarN on a model that `kvarn.balance` has changed.

    Args:
        per_head: K's heads have scales of their own.
    """

    def __init__(self, *arguments: Any, per_head: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.per_head = per_head
        self._frames: list[tuple[Tensor, Tensor]] = []

    def prepare(self, model: LanguageModel) -> None:
        """Takes the balance of the model's moments."""
        super().prepare(model)
        found = model.sensitivity().balance
        scale, frame = (torch.from_numpy(x).double() for x in (found.k_scale, found.v_frame))
        if not self.per_head:
            scale = scale.log().mean(1, keepdim=True).exp().expand_as(scale)
        pairs = (torch.diag_embed(1 / scale), torch.diag_embed(scale)), (frame, torch.linalg.inv(frame))
        self._frames = []
        for is_key, (to, back) in zip((True, False), pairs, strict=True):
            h, h_back = super()._frame(is_key, model.head_dim, torch.device("cpu"))
            self._frames.append(((to @ h.double()).float().to(model.device), (h_back.double() @ back).float().to(model.device)))

    def _frame(self, is_key: bool, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return self._frames[0 if is_key else 1]


def moment_at(model: LanguageModel, is_key: bool, back: Tensor, start: int = 0, count: int = BUCKET_TOKENS) -> Tensor:
    """M_K or M_V [L, H, D, D] float64 in the frame from which `back` leads to the model's; K's for the `count` positions from `start`
    on."""
    found = model.sensitivity()
    moment = found.k if is_key else found.v
    if is_key and found.turns is not None:
        moment = torch.from_numpy(found.turns.mean(moment.numpy(), start, count))
    return moved(moment.to(model.device), back.double())


class Engine(Quantiser):
    """KVarN by kvarn.ops: encode, then decode; on the CPU, or on a GPU whose backend is there."""

    def __init__(
        self,
        widths: Widths,
        feedback: str = "",
        normalisation: str = "scale_invariant",
        rounding: str = "auto",
        moments: str = "gradients",
    ) -> None:
        suffix = "_m8" if widths.metadata == 8 else ""
        self.widths, self.format = widths, f"k{widths.k}v{widths.v}_g{widths.tile}{suffix}"
        self.tile_tokens, self.feedback, self.moments = widths.tile, feedback, moments
        self.options: dict[str, Any] = {"normalisation": normalisation, "rounding": rounding}
        self._plan: Any = None
        self._factors: dict[str, Callable[[int], Tensor]] = {}

    def prepare(self, model: LanguageModel) -> None:
        """With feedback: the model's moments become factors."""
        for operand in self.feedback:
            self._factors[operand] = functools.partial(_engine_factor, model, operand == "k", self.widths.k, self.moments)

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        return self.widths.bits(head_dim)

    def _round_trip(self, x: Tensor, which: int, start: int) -> Tensor:
        import kvarn

        head_dim, heads = x.shape[-1], x.shape[2]
        if self._plan is None:
            self._plan = kvarn.Plan(self.format, head_dim=head_dim, num_kv_heads=heads, backend="cuda" if x.is_cuda else "cpu")
        t = tiles(x, self.tile_tokens).contiguous()
        flat = t.flatten(1, 2)  # [L, B * n, H, G, D]
        staging = flat.new_zeros(len(flat), flat.shape[1], 2, *flat.shape[2:], dtype=torch.float16)
        staging[:, :, which] = kvarn.ops.hadamard(self._plan, flat)
        records = flat.new_zeros(len(flat), flat.shape[1], heads, self._plan.record_bytes, dtype=torch.uint8)
        index = torch.arange(flat.shape[1], dtype=torch.int32, device=x.device)
        count = t.shape[2]
        bucket_of = (start + torch.arange(count, device=x.device) * self.tile_tokens) // BUCKET_TOKENS
        for bucket in bucket_of.unique().tolist() if which == 0 else [0]:
            some = index if which else index[(bucket_of == bucket).repeat(len(index) // count)]
            fed: dict[str, Any] = {
                f"{operand}_feedback": factor(bucket) for operand, factor in self._factors.items() if operand == "kv"[which]
            }
            kvarn.ops.encode(self._plan, staging, records, some, some, **self.options, **fed)
        out = torch.empty_like(flat)
        for layer in range(len(flat)):
            k, v = (out[layer], None) if which == 0 else (None, out[layer])
            kvarn.ops.decode(self._plan, records[layer], index, k=k, v=v)
        return untile(out.view(t.shape))

    def keys(self, x: Tensor, start: int) -> Tensor:
        return self._round_trip(x, 0, start)

    def values(self, x: Tensor, start: int) -> Tensor:
        return self._round_trip(x, 1, start)


@functools.lru_cache(maxsize=256)
def _engine_factor(model: LanguageModel, is_key: bool, k_bits: int, moments: str, bucket: int) -> Tensor:
    """The library's factors [L, H, D, D] for a bucket of positions."""
    back = rotation(model.head_dim, model.device).T
    if moments == "queries":
        moment = moved(model.query_moment() if is_key else model.output_moment(), back.double())
    else:
        moment = moment_at(model, is_key, back, bucket * BUCKET_TOKENS if is_key else 0)
    return Feedback.of(moment, k_bits, EncoderOptions()).engine_factor.contiguous()


class Repaired(Quantiser):
    """Another quantiser whose worst tokens, or all the others, are given back as they were: how much of the damage do they do?

    Args:
        inner: the quantiser.
        share: of each tile's tokens that are the worst: those with the largest error of the token's norm, as in the paper's Figure 3.
        worst: repair those, not the others.
    """

    def __init__(self, inner: Quantiser, share: float = 0.05, worst: bool = True) -> None:
        self.inner, self.share, self.worst = inner, share, worst
        self.tile_tokens, self.sink_tokens, self.recent_tokens = inner.tile_tokens, inner.sink_tokens, inner.recent_tokens

    def prepare(self, model: LanguageModel) -> None:
        """What the inner one needs."""
        self.inner.prepare(model)

    def bits(self, head_dim: int, num_kv_heads: int) -> tuple[float, float]:
        share = self.share if self.worst else 1 - self.share
        k, v = self.inner.bits(head_dim, num_kv_heads)
        return k + share * (16 - k), v + share * (16 - v)

    def _repair(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = tiles(x, self.tile_tokens), tiles(y, self.tile_tokens)
        error = (a.norm(dim=-1) - b.norm(dim=-1)).abs()
        count = max(1, round(self.share * self.tile_tokens))
        worst = torch.zeros_like(error, dtype=torch.bool).scatter_(-1, error.topk(count, -1).indices, True)
        return untile(torch.where((worst if self.worst else ~worst)[..., None], a, b))

    def keys(self, x: Tensor, start: int) -> Tensor:
        return self._repair(x, self.inner.keys(x, start))

    def values(self, x: Tensor, start: int) -> Tensor:
        return self._repair(x, self.inner.values(x, start))


# ---- names -----------------------------------------------------------------------------------------------------------------------------

_NAME = re.compile(
    r"(?:(?!k\d)(?P<method>[a-z][a-z0-9_]*)(?P<plus>\+[kv]+)?(?:\((?P<options>[^()]*)\))?(?:-|$))?"
    r"(?:k(?P<k>\d)v(?P<v>\d)(?:_g(?P<tile>\d+))?(?P<m8>_m8)?)?"
)

GRAMMAR = (
    "METHOD[+k|+v|+kv][(option=value;...)]-k<bits>v<bits>[_g<tokens>][_m8], for example kvarn-k4v2, kvarn+kv-k2v2_g64, "
    "published-k4v2, kivi32-k2v2, kvarn(iterations=0)-k4v4; fp16, bf16, fp8, fp8_head, q8_0 and q4_0 have no widths; "
    "a record format alone (k4v2_g128) is kvarn's"
)


def split_names(text: str) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse(name: str) -> Quantiser:
    """The quantiser of a name.

    Raises:
        ValueError: a name that is none; the message says what names look like.
    """
    from kvarn.eval import baselines

    match = _NAME.fullmatch(name)
    if match is None or not name:
        raise ValueError(f"[kvarn.eval] format: expected {GRAMMAR}, got {name!r}")
    method, plus = match["method"] or "kvarn", (match["plus"] or "")[1:]
    options = {key: value for key, _, value in (pair.partition("=") for pair in (match["options"] or "").split(";") if pair)}
    widths = None
    if match["k"]:
        widths = Widths(int(match["k"]), int(match["v"]), int(match["tile"] or 128), 8 if match["m8"] else 16)
    repair = options.pop("repair", None)
    logit_bias = options.pop("logit_bias", None)
    protocol = {key: int(options.pop(key)) for key in ("sink", "recent") if key in options}
    makers: dict[str, Callable[..., Quantiser]] = {**_WITH_WIDTHS, **baselines.WITH_WIDTHS} if widths else {**_FIXED, **baselines.FIXED}
    if method not in makers:
        raise ValueError(f"[kvarn.eval] format: expected {GRAMMAR}, got {name!r}")
    try:
        arguments: dict[str, Any] = {"plus": plus} if plus else {}
        arguments.update({"options": options} if options else {})
        made = makers[method](widths, **arguments) if widths else makers[method](**arguments)
    except TypeError:
        raise ValueError(f"[kvarn.eval] format: expected a method with these options, got {name!r}") from None
    if "sink" in protocol:
        made.sink_tokens = protocol["sink"]
    if "recent" in protocol:
        made.recent_tokens = (protocol["recent"], protocol["recent"])
    if repair is not None:
        made = Repaired(made, worst=repair != "rest")
    made.logit_bias = logit_bias is not None
    made.name = name
    return made


_ROTATIONS = ("hadamard", "signed", "none")


def _options(values: dict[str, str], **defaults: Any) -> tuple[EncoderOptions, EncoderOptions, tuple[str, str]]:
    """K's and V's encoder options and rotations; "k." or "v." before a name sets one operand's alone."""
    made: list[EncoderOptions] = []
    rotate = []
    for operand, other in (("k", "v"), ("v", "k")):
        chosen: dict[str, Any] = dict(defaults)
        turned = "hadamard"
        for key, text in values.items():
            if key.startswith(other + "."):
                continue
            key = key.removeprefix(operand + ".")
            if key == "rotate":
                turned = text
                if text not in _ROTATIONS:
                    raise ValueError(f"[kvarn.eval] rotate: expected one of {', '.join(_ROTATIONS)}, got {text!r}")
                continue
            kinds: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(EncoderOptions)}
            if key not in kinds:
                raise ValueError(f"[kvarn.eval] option: expected one of rotate, {', '.join(kinds)}, got {key!r}")
            kind = kinds[key]
            chosen[key] = text in ("1", "true", "") if kind is bool else kind(text)
        made.append(EncoderOptions(**chosen))
        rotate.append(turned)
    return made[0], made[1], (rotate[0], rotate[1])


def _kvarn(widths: Widths, options: dict[str, str] | None = None, plus: str = "", **defaults: Any) -> Quantiser:
    options = dict(options or {})
    weigh: dict[str, Any] = {"moments": options.pop("moments")} if "moments" in options else {}
    if "bucket" in options:
        weigh["bucket"] = int(options.pop("bucket"))
    kind: Callable[..., Quantiser] = defaults.pop("kind", Kvarn)
    if kind is Balanced and "per_head" in options:
        weigh["per_head"] = options.pop("per_head") not in ("0", "false")
    k, v, rotate = _options(options, metadata_bits=widths.metadata, **defaults)
    return kind(widths, k, v, plus, rotate, **weigh)


def _balanced(widths: Widths, options: dict[str, str] | None = None, plus: str = "") -> Quantiser:
    return _kvarn(widths, options, plus, kind=Balanced)


def _published(widths: Widths, options: dict[str, str] | None = None, plus: str = "") -> Quantiser:
    return _kvarn(widths, options, plus, normalisation="published", rounding="minmax")


def _hadamard(widths: Widths, options: dict[str, str] | None = None, plus: str = "") -> Quantiser:
    return _kvarn(widths, options, plus, normalisation="none", rounding="minmax")


def _rtn(widths: Widths) -> Quantiser:
    return _hadamard(widths, {"rotate": "none"})


def _engine(widths: Widths, options: dict[str, str] | None = None, plus: str = "") -> Quantiser:
    return Engine(widths, plus, **(options or {}))


_WITH_WIDTHS: dict[str, Callable[..., Quantiser]] = {
    "kvarn": _kvarn,
    "balanced": _balanced,
    "published": _published,
    "hadamard": _hadamard,
    "rtn": _rtn,
    "engine": _engine,
}
_FIXED: dict[str, Callable[..., Quantiser]] = {"fp16": lambda: Cast(torch.float16), "bf16": lambda: Cast(torch.bfloat16)}
