"""Balance: the scale of K's channels and the frame of V in which a model's cache is rounded best (`kvarn.balance`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn._errors import ArgumentTypeError, InvalidArgumentError

__all__ = ["Balance"]


@dataclass(frozen=True)
class Balance:
    """k_scale: float32 ``[num_layers, num_kv_heads, head_dim]``, positive: K is divided by it and queries are multiplied. Channels that a
    rotary encoding turns together have the same. v_frame: float32 ``[num_layers, num_kv_heads, head_dim, head_dim]``: V becomes
    ``V @ v_frame``.

    Raises:
        TypeError: no numpy arrays.
        ValueError: another shape or dtype, values that are not finite, or scales that are not positive.
    """

    k_scale: NDArray[np.float32]
    v_frame: NDArray[np.float32]

    def __post_init__(self) -> None:
        for name, value in (("k_scale", self.k_scale), ("v_frame", self.v_frame)):
            if not isinstance(value, np.ndarray):
                raise ArgumentTypeError(f"[kvarn.Balance] {name}: expected a numpy array, got {type(value).__name__}")
            if value.dtype != np.float32 or not np.isfinite(value).all():
                raise InvalidArgumentError(f"[kvarn.Balance] {name}: expected finite float32, got {value.dtype} or other values")
        if self.k_scale.ndim != 3 or self.v_frame.shape != (*self.k_scale.shape, self.k_scale.shape[-1]):
            raise InvalidArgumentError(
                "[kvarn.Balance] v_frame: expected [num_layers, num_kv_heads, head_dim, head_dim], like k_scale, "
                f"got {list(self.v_frame.shape)} and {list(self.k_scale.shape)}"
            )
        if (self.k_scale <= 0).any():
            raise InvalidArgumentError(f"[kvarn.Balance] k_scale: expected positive values, got {self.k_scale.min()}")
