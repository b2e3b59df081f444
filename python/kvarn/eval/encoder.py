"""KVarN's encoder in PyTorch, with every decision open to change.

With the default options it is the encoder of docs/FORMAT.md, section 7, except for the order of its sums, so that its codes differ from
`kvarn.ops.encode` only where a value lies within rounding of a boundary. A matrix is [..., R, C]: rows get a scale and a zero, columns
a scale (K: rows = channels; V: rows = tokens).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from kvarn._moments import damping_of

Tensor = torch.Tensor


_CHOICES: dict[str, tuple[object, ...]] = {
    "normalisation": ("scale_invariant", "published", "none"),
    "rounding": ("auto", "minmax", "unbiased", "least_squares"),
    "keep": ("imbalance", "error", "last"),
    "imbalance": ("std", "variance"),
    "target": ("rms", "axis"),
    "order": ("natural", "largest", "smallest", "pivoted"),
    "restretch": ("", "rows", "tile"),
    "metadata_bits": (8, 16),
}


@dataclass(frozen=True)
class EncoderOptions:
    """What the encoder of one operand does; the defaults are the engine's."""

    normalisation: str = "scale_invariant"  #: or "published" (the paper's clamps), or "none" (no variance normalisation)
    rounding: str = "auto"  #: "minmax", "unbiased", "least_squares" (unbiased without the stretch), or "auto": unbiased up to 3 bits
    iterations: int = 8
    scale_low: float = math.exp(-0.3)
    scale_high: float = math.exp(10)
    keep: str = "imbalance"  #: which iterate is kept: least "imbalance", least squared "error" of the rounded tile, or the "last"
    imbalance: str = "std"  #: of standard deviations, or of "variance", as the paper writes it
    target: str = "rms"  #: what scale_invariant divides by: the tile's "rms", or its least axis standard deviation ("axis")
    size_share: float = 0.0625  #: of that target
    share: float = 0.0  #: of the row's range that the first grid of unbiased rounding spans; 0: by width
    refits: int = 3
    starts: int = 1  #: grids tried by unbiased rounding; 6: the shares 1, .85, .7, .6, .5, .4
    rescore: bool = False  #: codes are rounded once more, against the scales as they are stored
    widening: float = 0.0  #: of an unbiased grid about its middle before feedback; 0: 1.125 at 2 bits, 1.0625 at 3, else 1
    stretch: float = 1.0  #: of a row's grid about its mean after feedback
    damping: float = 0.0  #: of the feedback's moment, as a share of its mean diagonal; 0: by K's width, as the library has it
    order: str = "pivoted"  #: of the channels in feedback: see `pivoted`; "natural": as they lie; "largest" or "smallest" moment first
    sweeps: int = 0  #: of coordinate descent after feedback: each channel's code is chosen again, the others' being as they are
    passes: int = 1  #: of feedback; each further one fits the rows' grids to the values that the one before had to round
    restretch: str = ""  #: after feedback: "rows" are stretched again, or the "tile" is, as its readers see it
    metadata_bits: int = 16

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"[kvarn.eval] {name}: expected one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Encoded:
    """Codes [..., R, C] (float), row scale and zero [..., R, 1], column scale [..., 1, C], as the record stores them."""

    codes: Tensor
    row_scale: Tensor
    row_zero: Tensor
    column_scale: Tensor

    def decode(self) -> Tensor:
        """The reconstruction [..., R, C]."""
        return (self.codes * self.row_scale + self.row_zero) * self.column_scale


@functools.lru_cache
def rotation(head_dim: int, device: torch.device, seed: int | None = None) -> Tensor:
    """The orthonormal Hadamard matrix of docs/FORMAT.md, section 6, [D, D] float32: rows become ``x H``. With a seed, its rows' signs are
    random: ``x diag(s) H``."""
    power = head_dim & -head_dim
    odd = head_dim // power
    block = {1: 1, 3: 12, 5: 20, 7: 28}.get(odd)
    if block is None or head_dim % block:
        raise ValueError(f"[kvarn.eval] head_dim: expected a power of two, or 12, 20 or 28 times one, got {head_dim}")
    h = _paley(block)
    while len(h) < head_dim:
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    if seed is not None:
        signs = torch.randint(0, 2, (head_dim, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        h = h * signs
    return (h / math.sqrt(head_dim)).float().to(device)


def _paley(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = {12: 11, 20: 19, 28: 13}[order]
    squares = {i * i % q for i in range(1, q)}
    chi = [0] + [1 if i in squares else -1 for i in range(1, q)]
    c = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    c[0, 1:], c[1:, 0] = 1, 1 if order == 28 else -1
    c[1:, 1:] = torch.tensor([[chi[(j - i) % q] for j in range(q)] for i in range(q)], dtype=torch.float64)
    if order != 28:
        return c + torch.eye(q + 1, dtype=torch.float64)
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(c, one) + torch.kron((c == 0).double(), zero)


def _ratio(spread: Tensor, dim: int) -> Tensor:
    return spread.amax(dim, keepdim=True) / spread.amin(dim, keepdim=True).clamp_min(1e-8)


def imbalance(x: Tensor, of: str = "std") -> Tensor:
    """max/min of the columns' spreads plus max/min of the rows', [..., 1, 1]."""
    rows, columns = x.std(-1, keepdim=True), x.std(-2, keepdim=True)
    if of == "variance":
        rows, columns = rows.square(), columns.square()
    return _ratio(columns, -1) + _ratio(rows, -2)


def normalise(m: Tensor, bits: int, o: EncoderOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 1 and 2: column scale [..., 1, C], row scale [..., R, 1], size [..., 1, 1]."""
    one = torch.ones_like(m[..., :1, :1])
    columns, rows = torch.ones_like(m[..., :1, :]), torch.ones_like(m[..., :, :1])
    if o.normalisation == "none":
        return columns, rows, one
    size = one
    if o.normalisation == "scale_invariant":
        if o.target == "rms":
            size = m.square().mean((-2, -1), keepdim=True).sqrt()
        else:
            size = torch.minimum(m.std(-1, keepdim=True).amin(-2, keepdim=True), m.std(-2, keepdim=True).amin(-1, keepdim=True))
        size = size * o.size_share
        size = torch.where(size >= 2.0**-60, size, one)
    rows = rows * size

    def score(columns: Tensor, rows: Tensor) -> Tensor:
        if o.keep != "error":
            return imbalance(m / columns / rows, o.imbalance)
        u = m / columns
        scale, zero = _minmax_grid(u, rows, bits)
        error = (_round(u, scale, zero, bits) * scale + zero - u) * columns
        return error.square().sum((-2, -1), keepdim=True)

    best, kept = score(columns, rows), (columns, rows)
    for _ in range(o.iterations):
        spread = (m / columns / rows).std(-2, keepdim=True)
        columns = (columns * spread.clamp(1e-3, 1e3)).clamp(o.scale_low, o.scale_high)
        spread = (m / columns / rows).std(-1, keepdim=True)
        rows = torch.minimum(torch.maximum(rows * spread.clamp(1e-3, 1e3), size * o.scale_low), size * o.scale_high)
        now = score(columns, rows)
        better = torch.ones_like(now, dtype=torch.bool) if o.keep == "last" else now <= best
        best = torch.where(better, now, best)
        kept = torch.where(better, columns, kept[0]), torch.where(better, rows, kept[1])
    return *kept, size


def _minmax_grid(u: Tensor, rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = u.amin(-1, keepdim=True), u.amax(-1, keepdim=True)
    return torch.maximum((high - low) / (2**bits - 1), 1e-10 * rows), low


def _round(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((x - zero) * (1 / scale)).round().clamp(0, 2**bits - 1)


def _rounding(bits: int, o: EncoderOptions) -> str:
    return o.rounding if o.rounding != "auto" else "unbiased" if bits <= 3 else "minmax"


def _default_share(bits: int) -> float:
    return {2: 0.6, 3: 0.8, 4: 0.95}.get(bits, 1.0)


def _fit(x: Tensor, middle: Tensor, grid: Tensor, share: float, bits: int, refits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of centred rows from one start: codes, scale, zero."""
    n = x.shape[-1]
    scale = share * grid
    zero = middle - scale * ((2**bits - 1) / 2)
    for _ in range(refits):
        c = _round(x, scale, zero, bits)
        c1, c2, cx = c.sum(-1, keepdim=True), c.square().sum(-1, keepdim=True), (c * x).sum(-1, keepdim=True)
        variance = n * c2 - c1 * c1
        good = (variance > 0) & (cx > 0)
        scale = torch.where(good, cx * n / variance.clamp_min(1e-30), scale)
        zero = torch.where(good, -(scale * c1 / n), zero)
    return _round(x, scale, zero, bits), scale, zero


def _stretch(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of centred rows for which the error does not correlate with the value; unchanged where codes do not rise with x."""
    cx = (codes * x).sum(-1, keepdim=True)
    stretched = x.square().sum(-1, keepdim=True) / cx.clamp_min(1e-30)
    good = cx > 0
    return torch.where(good, stretched, scale), torch.where(good, -stretched * codes.mean(-1, keepdim=True), zero)


def round_rows(u: Tensor, rows: Tensor, bits: int, o: EncoderOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Step 3: codes [..., R, C], row scale and row zero [..., R, 1] of the column-normalised matrix."""
    grid, low = _minmax_grid(u, rows, bits)
    codes = _round(u, grid, low, bits)
    rounding = _rounding(bits, o)
    if rounding == "minmax":
        return codes, grid, low
    mean = u.mean(-1, keepdim=True)
    x = u - mean
    middle = (low + u.amax(-1, keepdim=True)) * 0.5 - mean
    shares = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4)[: o.starts] if o.starts > 1 else (o.share or _default_share(bits),)
    best: tuple[Tensor, ...] | None = None
    for share in shares:
        found = _fit(x, middle, grid, share, bits, o.refits)
        error = (found[0] * found[1] + found[2] - x).square().sum(-1, keepdim=True)
        if best is None:
            best = (*found, error)
        else:
            better = error < best[3]
            best = tuple(torch.where(better, new, old) for new, old in zip((*found, error), best, strict=True))
    assert best is not None
    fitted, scale, zero, _ = best
    if rounding == "unbiased":
        scale, zero = _stretch(x, fitted, scale, zero)
    flat = grid <= 1e-10 * rows
    return torch.where(flat, codes, fitted), torch.where(flat, grid, scale), torch.where(flat, low, zero + mean)


def feedback_factor(moment: Tensor, damping: float) -> Tensor:
    """F [..., D, D], strictly upper: with ``U^T U`` the inverse of the damped moment, ``F[d, j] = U[d, j] / U[d, d]``.

    The error e of channel d, once rounded, moves channel j > d by ``-F[d, j] e`` (the recursion of GPTQ, arXiv 2210.17323).
    """
    moment = moment.double()
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device)
    moment = moment + damping * torch.where(mean > 0, mean, torch.ones_like(mean)) * eye
    upper = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    factor: Tensor = (upper / upper.diagonal(dim1=-2, dim2=-1)[..., None]).triu(1).float()
    return factor


def feed(y: Tensor, scale: Tensor, zero: Tensor, bits: int, factor: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    """Codes of y [..., D, G], rounded channel by channel, each channel's error spread over the channels to come; and the values that had
    to be rounded, y with the errors so far.

    scale and zero broadcast to y; factor [..., D, D] broadcasts over y's leading axes.
    """
    y, channels = y.clone(), y.shape[-2]
    scale, zero = scale.expand_as(y), zero.expand_as(y)
    codes, errors = torch.empty_like(y), torch.empty_like(y)
    for first in range(0, channels, block):
        last = min(first + block, channels)
        for d in range(first, last):
            row = y[..., d, :]
            code = ((row - zero[..., d, :]) * (1 / scale[..., d, :])).round().clamp(0, 2**bits - 1)
            error = row - (code * scale[..., d, :] + zero[..., d, :])
            codes[..., d, :], errors[..., d, :] = code, error
            if d + 1 < last:
                y[..., d + 1 : last, :] -= factor[..., d, d + 1 : last, None] * error[..., None, :]
        if last < channels:
            y[..., last:, :] -= factor[..., first:last, last:].transpose(-1, -2) @ errors[..., first:last, :]
    return codes, y


def pivoted(moment: Tensor, damping: float) -> Tensor:
    """The order of channels [..., D] that is found from its end: the next one before those found is the one whose error costs least once
    these have been chosen to make up for it."""
    a = moment.double().reshape(-1, *moment.shape[-2:])
    channels = a.shape[-1]
    a = a + damping * a.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(channels, dtype=a.dtype, device=a.device)
    rows, found = torch.arange(len(a), device=a.device), torch.zeros(a.shape[:2], dtype=torch.bool, device=a.device)
    order = torch.zeros(a.shape[:2], dtype=torch.long, device=a.device)
    for place in range(channels - 1, -1, -1):
        d = channels - 1 - a.diagonal(dim1=-2, dim2=-1).masked_fill(found, torch.inf).flip(-1).argmin(-1)  # of equals the last
        order[:, place], found[rows, d] = d, True
        row = a[rows, d]
        a = a - row[:, :, None] * row[:, None, :] / row[rows, d][:, None, None]
    return order.view(moment.shape[:-1])


def descend(y: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, moment: Tensor | None, sweeps: int) -> Tensor:
    """Codes of y [..., D, G] after sweeps of coordinate descent on ``e^T M e``."""
    if moment is None:
        raise ValueError("[kvarn.eval] sweeps: expected a moment, got none")
    codes, scale, zero = codes.clone(), scale.expand_as(y), zero.expand_as(y)
    error = codes * scale + zero - y
    slope = moment @ error
    for _ in range(sweeps):
        for d in range(y.shape[-2]):
            own = moment[..., d, d, None]
            wanted = codes[..., d, :] - slope[..., d, :] / (own * scale[..., d, :])
            code = wanted.round().clamp(0, 2**bits - 1)
            change = (code - codes[..., d, :]) * scale[..., d, :]
            slope = slope + moment[..., :, d, None] * change[..., None, :]
            codes[..., d, :] = code
    return codes


@dataclass(frozen=True)
class Feedback:
    """What will read the errors of an operand, in the rotated frame; broadcast over the leading axes of the tiles.

    factor: of `feedback_factor`; rank: int64 [..., D], the order of the channels that it is for (None: as they lie); moment: [..., D, D],
    in the channels' own order, for a restretch of the tile.
    """

    factor: Tensor
    rank: Tensor | None = None
    moment: Tensor | None = None

    @property
    def engine_factor(self) -> Tensor:
        """``k_feedback`` or ``v_feedback`` of `kvarn.ops.encode`: the order of the channels on the diagonal."""
        dim = self.factor.shape[-1]
        order = torch.arange(dim, device=self.factor.device).expand(self.factor.shape[:-1]) if self.rank is None else self.rank
        return self.factor + torch.diag_embed(order.to(self.factor.dtype))

    @classmethod
    def of(cls, moment: Tensor, k_bits: int, o: EncoderOptions) -> Feedback:
        """From a moment [..., D, D] in the rotated frame."""
        damping = o.damping or damping_of(k_bits)
        if o.order == "natural":
            return cls(feedback_factor(moment, damping), None, moment.float())
        if o.order == "pivoted":
            rank = pivoted(moment, damping)
        else:
            rank = moment.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=o.order == "largest")
        ranked = moment.gather(-2, rank[..., None].expand_as(moment)).gather(-1, rank[..., None, :].expand_as(moment))
        return cls(feedback_factor(ranked, damping), rank, moment.float())


def encode(m: Tensor, bits: int, o: EncoderOptions, feedback: Feedback | None = None, is_key: bool = True) -> Encoded:
    """Encodes rotated tiles.

    Args:
        m: [..., R, C] float32.
        feedback: None: each value is rounded by itself.
        is_key: channels are rows (K), not columns (V).
    """
    columns, rows, size = normalise(m, bits, o)
    u = m * (1 / columns)
    codes, scale, zero = round_rows(u, rows, bits, o)
    if feedback is not None:
        if _rounding(bits, o) != "minmax" or o.widening:
            widening = o.widening or {2: 1.125, 3: 1.0625}.get(bits, 1.0)
            flat = _minmax_grid(u, rows, bits)[0] <= 1e-10 * rows
            zero = torch.where(flat, zero, zero - scale * ((2**bits - 1) / 2 * (widening - 1)))
            scale = torch.where(flat, scale, scale * widening)
        codes, target = _feed_matrix(m, u, columns, scale, zero, bits, feedback, is_key, o.sweeps)
        for _ in range(o.passes - 1):
            _, scale, zero = round_rows(target, rows, bits, o)
            codes, target = _feed_matrix(m, u, columns, scale, zero, bits, feedback, is_key)
        if o.stretch != 1:
            zero = zero + (zero - u.mean(-1, keepdim=True)) * (o.stretch - 1)
            scale = scale * o.stretch
        if o.restretch == "rows":
            mean = u.mean(-1, keepdim=True)
            scale, zero = _stretch(u - mean, codes, scale, zero - mean)
            zero = zero + mean
        elif o.restretch == "tile":
            scale, zero = _stretch_tile(m, codes, columns, scale, zero, feedback, is_key)
    exponent = torch.zeros_like(size)
    if o.normalisation == "scale_invariant":
        exponent = ((torch.frexp(size)[1] - 1) >> 1).float()
    row_scale, row_zero = (_store(t * torch.exp2(-exponent), -2, o.metadata_bits) for t in (scale, zero))
    column_scale = _store(columns * torch.exp2(exponent), -1, o.metadata_bits)
    if o.rescore and feedback is None:
        codes = _round(m * (1 / column_scale), row_scale, row_zero, bits)
    return Encoded(codes, row_scale, row_zero, column_scale)


def _feed_matrix(
    m: Tensor, u: Tensor, columns: Tensor, scale: Tensor, zero: Tensor, bits: int, feedback: Feedback, is_key: bool, sweeps: int = 0
) -> tuple[Tensor, Tensor]:
    """Codes of the matrix, and what had to be rounded of the column-normalised one."""
    if is_key:  # a token's column scale is common to its channels
        return _feed_in_order(u, scale, zero, bits, feedback, sweeps)
    y, grid, low = (t.transpose(-1, -2) for t in (m, scale * columns, zero * columns))  # the frame that the moment is in
    codes, target = _feed_in_order(y, grid, low, bits, feedback, sweeps)
    return codes.transpose(-1, -2), target.transpose(-1, -2) / columns


def _feed_in_order(y: Tensor, scale: Tensor, zero: Tensor, bits: int, feedback: Feedback, sweeps: int = 0) -> tuple[Tensor, Tensor]:
    if feedback.rank is None:
        codes, target = feed(y, scale, zero, bits, feedback.factor)
        if sweeps:
            codes = descend(y, codes, scale, zero, bits, feedback.moment, sweeps)
        return codes, target
    rank = feedback.rank[..., None].expand(*torch.broadcast_shapes(feedback.rank.shape[:-1], y.shape[:-2]), *y.shape[-2:])
    plain = y, scale, zero
    y, scale, zero = (t.expand_as(rank).gather(-2, rank) for t in (y, scale, zero))
    codes, target = feed(y, scale, zero, bits, feedback.factor)
    codes, target = torch.empty_like(codes).scatter_(-2, rank, codes), torch.empty_like(target).scatter_(-2, rank, target)
    if sweeps:
        codes = descend(plain[0], codes, plain[1], plain[2], bits, feedback.moment, sweeps)
    return codes, target


def _stretch_tile(
    m: Tensor, codes: Tensor, columns: Tensor, scale: Tensor, zero: Tensor, feedback: Feedback, is_key: bool
) -> tuple[Tensor, Tensor]:
    """One factor for the tile, for which its readers see no correlation of error and value; of K about each channel's mean, to which
    softmax is blind."""
    if feedback.moment is None:
        raise ValueError("[kvarn.eval] restretch: expected a moment, got none")
    x, y = m, (codes * scale + zero) * columns
    if is_key:
        x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    else:
        x, y = x.transpose(-1, -2), y.transpose(-1, -2)
    seen = feedback.moment @ x
    factor = (x * seen).sum((-1, -2), keepdim=True) / (y * seen).sum((-1, -2), keepdim=True)
    factor = torch.where(factor.isfinite(), factor, 1).clamp(0.5, 2)
    if not is_key:
        return scale * factor, zero * factor
    middle = scale * codes.mean(-1, keepdim=True) + zero
    return scale * factor, middle - factor * scale * codes.mean(-1, keepdim=True)


def half(x: Tensor) -> Tensor:
    """Rounded to fp16, beyond its range to the largest finite number."""
    return x.clamp(-65504, 65504).half().float()


def _store(x: Tensor, dim: int, bits: int) -> Tensor:
    if bits == 16:
        return half(x)
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step, low = half((high - low) / 255), half(low)
    byte = torch.where(step > 0, ((x - low) / torch.where(step > 0, step, 1)).round().clamp(0, 255), 0)
    return low + byte * step
