"""The scale of K's channels and the frame of V in which rounding with feedback costs least.

Queries times s and K divided by s have the same products; V times a matrix and the output projection times its inverse give the same
outputs. What rounding costs is not the same. Errors in the rotated frame are as large as K (or V) is on average, and feedback moves them to
where the model's predictions depend on them least, so that the cost goes as ``trace(C) det(M + damping trace(M) / D)^(1/D)``, with C the
covariance of K and M its moment (`kvarn.Moments`). In another frame these are ``A^T C A`` and ``A^-1 M A^-T``; here A is chosen to make the
cost least. The frame that comes out depends on what the model computes, not on how it splits that between weights: channels that are
loud in K and quiet in the queries, or loud in V and quiet in the projection, are balanced away.
"""

from __future__ import annotations

import torch

__all__ = ["k_scales", "moved", "v_frames"]

# Of the cost: what feedback damps its moments by at 4 bits and more. With 0.1 costs at 2 bits come out 7 % higher.
_DAMPING = 0.03
# What every direction has at least, as a share of the mean: other texts may use those that this one did not. Takes 0.1 % of the gain.
_FLOOR = 1e-3
_ITERATIONS = 10


def _diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _over_mean(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] divided by its mean, where there is one."""
    mean = x.mean(-1, keepdim=True)
    return x / torch.where(mean > 0, mean, torch.ones_like(mean))


def _matrix_over_mean(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix divided by the mean of its diagonal, with what every direction has at least."""
    mean = _diagonal(matrix).mean(-1)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix / torch.where(mean > 0, mean, torch.ones_like(mean)) + _FLOOR * eye


def k_scales(variance: torch.Tensor, moment: torch.Tensor, pairs: torch.Tensor | None) -> torch.Tensor:
    """K's scales float64 ``[..., D]``; their logarithms have a mean of 0.

    Args:
        variance: float64 ``[..., D]``, of K's channels about their means over a tile.
        moment: float64 ``[..., D, D]``, M_K without its position encoding.
        pairs: int64 ``[num_pairs, 2]``, channels that the encoding turns together; None: it is not known, and nothing is scaled.
    """
    if pairs is None:
        return torch.ones_like(variance)
    eye = torch.eye(variance.shape[-1], dtype=variance.dtype, device=variance.device)
    first, second = pairs.T

    def tied(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[..., first] = out[..., second] = (x[..., first] + x[..., second]) / 2
        return out

    c, m = tied(_over_mean(variance)) + _FLOOR, _matrix_over_mean(moment)
    square = (c / tied(_diagonal(m))).sqrt()
    for _ in range(_ITERATIONS):
        scale = square.sqrt()
        scaled = m * scale[..., :, None] * scale[..., None, :]
        damping = _DAMPING * _diagonal(scaled).mean(-1, keepdim=True)
        inverse = _diagonal(torch.linalg.inv(scaled + damping[..., None] * eye))
        # Where the cost is least, each channel has the same share of the trace as of the (damped) logarithm of the determinant.
        of_determinant = tied(1 - damping * inverse + _DAMPING * _diagonal(scaled) * inverse.mean(-1, keepdim=True))
        square = square * (c / square / of_determinant).sqrt()
        square = square / square.log().mean(-1, keepdim=True).exp()
    return square.sqrt()


def v_frames(covariance: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """V's frames float64 ``[..., D, D]``, symmetric; V keeps its mean square.

    Args:
        covariance: float64 ``[..., D, D]``, the mean of ``v^T v``.
        moment: float64 ``[..., D, D]``, M_V.
    """
    c, m = _matrix_over_mean(covariance), _matrix_over_mean(moment)
    # The frame in which both are diagonal and the same, as that in which a control system is balanced (B. C. Moore, 1981).
    lower = torch.linalg.cholesky(c)
    product, turn = torch.linalg.eigh(lower.mT @ m @ lower)
    product = product.clamp_min(_FLOOR**2)
    same = torch.linalg.solve_triangular(lower.mT, turn, upper=True) * product[..., None, :] ** 0.25
    # In it, how large each direction of V should be.
    size = product.sqrt()
    for _ in range(_ITERATIONS):
        weight = product / size
        damped = weight + _DAMPING * weight.mean(-1, keepdim=True)
        size = (size * (weight / damped + _DAMPING * weight * (1 / damped).mean(-1, keepdim=True))).sqrt()
        size = size / size.log().mean(-1, keepdim=True).exp()
    size = size * (_diagonal(c).mean(-1, keepdim=True) / size.mean(-1, keepdim=True))
    half = same * (size / product.sqrt()).sqrt()[..., None, :]
    # Any rotation of it costs the same by this measure. In the directions of its axes a few would carry most of a token, which makes
    # uneven tiles; the symmetric one mixes them.
    square, axes = torch.linalg.eigh(half @ half.mT)
    frame: torch.Tensor = (axes * square.sqrt()[..., None, :]) @ axes.mT
    return frame


def moved(moment: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """A moment ``[..., D, D]`` in another frame, from which `back` leads to its own: an error e there is ``e @ back`` here."""
    return back @ moment @ back.mT
